"""A trained network is pruned in one go, without a Trainer, without labels: cut and reconstructed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_prune import history
from lightning_prune.allocation import Allocation, Limits, RoundTo, Uniform
from lightning_prune.criteria import Criterion, Lasso
from lightning_prune.errors import PruningError
from lightning_prune.graph import check_model
from lightning_prune.inputs import ExampleInputs, first_examples
from lightning_prune.pruner import Request, draft_cut
from lightning_prune.reconstruction import Reconstruction, Refit
from lightning_prune.restoring import Sights
from lightning_prune.tensors import unwrapped
from lightning_prune.types import Heads, PruneRecord, Trunks, Unit


@dataclass(frozen=True)
class Reconstructed:
    """What was cut, and how well what is left reproduces the original network.

    Attributes:
        record: What was asked, what was reached, and what held it back.
        refits: For each refitted layer its error, in the order in which they were refitted.
        nbytes: The most memory that the moments of what layers read have taken.
        kept: The most memory that was kept from one pass over the examples to the next, 1 GiB at most.
    """

    record: PruneRecord
    refits: tuple[Refit, ...]
    nbytes: int
    kept: int

    def __str__(self) -> str:
        memory = f"memory: moments {self.nbytes / 2**20:,.0f} MiB, kept between passes {self.kept / 2**20:,.0f} MiB"
        return "\n".join([str(self.record), *(f"  {refit}" for refit in self.refits), memory])


def ratio_of(pruning_ratio: float | None, speed_up: float | None, of: Unit) -> float:
    """Return the pruning ratio that is asked for in one of two ways.

    Raises:
        ValueError: None or both are given, or `speed_up` is not above 1 or meant of something else than "macs".
    """
    if (pruning_ratio is None) == (speed_up is None):
        raise ValueError(
            f"Either `pruning_ratio` or `speed_up` is given; got {pruning_ratio} and {speed_up}. A speed-up of 4 is a "
            'pruning ratio of 0.75 of "macs".'
        )
    if speed_up is None:
        assert pruning_ratio is not None
        return pruning_ratio
    if not 1 < speed_up < float("inf"):
        raise ValueError(f"`speed_up` is how many times fewer MACs there will be, above 1; got {speed_up}.")
    if of != "macs":
        raise ValueError(f'`speed_up` counts "macs"; got it with of={of!r}. Say `pruning_ratio` for other units.')
    return 1 - 1 / speed_up


def reconstruct(
    model: nn.Module,
    batches: Iterable[ExampleInputs],
    *,
    pruning_ratio: float | None = None,
    speed_up: float | None = None,
    of: Unit = "macs",
    criterion: Criterion | None = None,
    allocation: Allocation | None = None,
    reconstruction: Reconstruction | None = None,
    ignore: Sequence[str] = (),
    heads: Heads = "whole",
    min_channels: int = 1,
    round_to: RoundTo = None,
    trunks: Trunks = "whole",
) -> Reconstructed:
    """Cut channels out of a trained network and let the layers behind them make up for it, by least squares.

    He, Zhang, Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks" (arXiv 1707.06168). It takes a
    few thousand inputs, no labels, and no training.

    Args:
        model: A trained network in eval mode; changed in place.
        batches: What forward takes, as a data loader yields it. It is gone through once, until
            `reconstruction.images` examples have come, which are held in memory.
        pruning_ratio: Fraction to be gone afterwards, counted against the dense model, in [0, 1).
        speed_up: In its place: how many times fewer MACs there will be, above 1.
        of: What `pruning_ratio` is a fraction of (see `prune`).
        criterion: How channels are chosen; `Lasso()` if None. Any other one goes with a refit as well.
        allocation: How the ratio is shared out over the groups; `Uniform()` if None. `ByCost()` with `Lasso()` lets
            the error per MAC saved be the same everywhere, `ShallowToDeep()` is the paper's.
        reconstruction: What is looked at; `Reconstruction()` if None.
        ignore: Patterns of module names that are not to be touched.
        heads: How attention heads are cut (see `find_groups`).
        min_channels: Channels that each group keeps at least.
        round_to: Widths are rounded to the nearest multiple of it (see `prune`).
        trunks: How a trunk that several layers read is cut (see `prune`); "sampled" is the paper's.

    Returns:
        What was cut, and the error of each layer; print it.

    Raises:
        ValueError: An argument is wrong, no group can be pruned, or the model is in train mode.
        PruningError: The model cannot be read, there are no batches or too few, a layer returns NaN, or its class
            changes the weight or the result in its forward; in all cases the model is unchanged.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2)).eval()
        >>> done = reconstruct(net, [torch.rand(64, 4)], speed_up=2)
        >>> net[0].out_features, len(done.refits)
        (5, 1)
    """
    check_model(model)
    model = unwrapped(model)
    if model.training:
        raise ValueError(
            "The model is in train mode, in which dropout and BatchNorm would have their part in what is reproduced. "
            "Call `model.eval()` first."
        )
    settings = reconstruction or Reconstruction()
    request = Request(
        ratio_of(pruning_ratio, speed_up, of),
        of,
        criterion or Lasso(),
        allocation or Uniform(),
        ignore,
        heads,
        Limits(min_channels, round_to),
        trunks=trunks,
        reconstruction=settings,
    )
    seen = list(first_examples(model, batches, settings.images))
    if not seen:
        raise PruningError("`batches` yields nothing to reconstruct with. Pass a few thousand images, or a loader.")
    draft = draft_cut(model, seen[0], request, Sights(seen))
    history.commit(model, draft.cut, draft.record, draft.offsets)
    return Reconstructed(draft.record, draft.refits, draft.nbytes, draft.kept)
