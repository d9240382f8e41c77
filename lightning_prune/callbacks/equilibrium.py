"""Puts Channel Equilibrium blocks into a network before its optimizer is made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.callbacks import param_groups
from lightning_prune.callbacks.base import own_example, unwrapped
from lightning_prune.callbacks.ranks import share_buffers
from lightning_prune.chance import random_state_kept
from lightning_prune.cost import count_params
from lightning_prune.equilibrium import Branches, Equilibrium, Where, blocks_of, equilibrate, fold
from lightning_prune.equilibrium.placing import check_where
from lightning_prune.errors import PruningError
from lightning_prune.layers import ChannelEquilibrium, Equilibrated, InstanceReweighting

AtEnd: TypeAlias = Literal["keep", "fold"]
"""What becomes of the blocks when the fit has ended."""

GROUP = "equilibrium"
"""What loggers call the param group without weight decay."""


class ChannelEquilibriumCallback(pl.Callback):
    """Puts Channel Equilibrium blocks behind the norms of a network, so that no channel falls silent.

    Shao et al. 2020, "Channel equilibrium networks for learning deep representation" (ICML, arXiv 2003.00214). The
    blocks come in `setup`, before the optimizer is made; from then on they train, are saved and resumed like all other
    layers. What mixes the branches, and the gates' norms, go into a param group of their own, without weight decay.
    A prune callback beside it cuts blocks along with their channels.

    Args:
        where: "auto" takes the places of the paper in a residual network (behind the stem's norm and the last norm of
            each block, but for the last stage), and all norms of other networks; it needs `example_input_array`. "all"
            takes all; patterns of names (`fnmatch` style) take those. "there" puts none in: it looks after those that
            the network was built with, and what the other arguments say of blocks is not asked.
        branches: "both"; "decorrelation", which can be folded at the end; or "reweighting".
        group_size: Channels that are decorrelated together, >= 1; where it does not divide a layer's, its largest
            divisor below is taken, and logged.
        iterations: Of Newton's method, >= 1.
        reduction: Channels / reduction is the width of the gate's hidden layer, >= 1.
        momentum: Weight of a new batch in the running statistics, in [0, 1].
        over_ranks: Whether the covariance is that of all ranks, in distributed training.
        at_end: "keep" leaves the blocks; "fold" folds them and their BatchNorms into the layers before when the fit has
            ended, for inference. Files that were saved before hold the blocks.

    Raises:
        ValueError: An argument is out of its range.
        PruningError: (in `setup`) The network has no norms, or has blocks already; for "there", that it has none.
        MisconfigurationException: Something goes amiss with its place in the fit.

    Example:
        >>> callback = ChannelEquilibriumCallback()
        >>> callback = ChannelEquilibriumCallback(["net.*.bn2"], branches="decorrelation", at_end="fold")
    """

    def __init__(
        self,
        where: Where | Literal["there"] = "auto",
        *,
        branches: Branches = "both",
        group_size: int = 16,
        iterations: int = 3,
        reduction: int = 4,
        momentum: float = 0.1,
        over_ranks: bool = True,
        at_end: AtEnd = "keep",
    ) -> None:
        if where != "there":
            check_where(where)
        if at_end not in ("keep", "fold"):
            raise ValueError(f"`at_end` is 'keep' or 'fold'; got {at_end!r}.")
        if at_end == "fold" and branches != "decorrelation":
            raise ValueError(
                f"at_end='fold' goes with branches='decorrelation', which is linear once trained; got {branches!r}."
            )
        self.where = where
        self.equilibrium = Equilibrium(
            branches=branches,
            group_size=group_size,
            iterations=iterations,
            reduction=reduction,
            momentum=momentum,
            over_ranks=over_ranks,
        )
        self.at_end = at_end
        self.names: list[str] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._is_done(pl_module):
            return
        example = pl_module.example_input_array
        if self.at_end == "fold" and example is None:
            raise MisconfigurationException(
                "at_end='fold' runs the network once, on tensors without memory. Set `example_input_array`."
            )
        if self.where == "there":
            self.names = _found(pl_module)
            return
        before = count_params(pl_module)
        with random_state_kept():  # the data come in the same order with blocks and without
            self.names = equilibrate(pl_module, example, where=self.where, equilibrium=self.equilibrium)
        rank_zero_info(
            f"{type(self).__name__}: blocks behind {len(self.names)} norms ({', '.join(self.names[:5])}"
            f"{', ...' if len(self.names) > 5 else ''}), {count_params(pl_module) - before:,} parameters more."
        )

    def _is_done(self, pl_module: pl.LightningModule) -> bool:
        """Tell whether an earlier stage has put the blocks in, or folded them."""
        modules = dict(pl_module.named_modules())
        left = (Equilibrated, nn.Identity) if self.at_end == "fold" else Equilibrated
        return bool(self.names) and all(isinstance(modules.get(name), left) for name in self.names)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for optimizer in map(unwrapped, trainer.optimizers):
            free = _decayed(optimizer, _without_decay(pl_module))
            if free:
                first = optimizer.param_groups[0]
                lr = first.get("max_lr", first.get("initial_lr", first["lr"]))  # the one that `join` measures by
                param_groups.join(optimizer, free, float(lr), schedulers=schedulers, name=GROUP)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _check_trained(pl_module, map(unwrapped, trainer.optimizers))

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.at_end == "fold" and blocks_of(pl_module):
            share_buffers(trainer, [pl_module])
            folded = fold(pl_module, own_example(trainer, pl_module))
            rank_zero_info(f"{type(self).__name__}: {len(folded.layers)} blocks were folded.")
            for name, reason in folded.kept.items():
                rank_zero_info(f"{type(self).__name__}: the block behind {name} stays, since {reason}.")


def _found(pl_module: pl.LightningModule) -> list[str]:
    """Name the norms that have blocks.

    Raises:
        PruningError: There are none.
    """
    names = list(blocks_of(pl_module))
    if not names:
        raise PruningError(
            f"where='there' looks after the equilibrium blocks that {type(pl_module).__name__} was built with, and it "
            "has none. Let the callback put them in: where='auto'."
        )
    return names


def _check_trained(pl_module: pl.LightningModule, optimizers: Iterable[Optimizer]) -> None:
    """Refuse blocks that the optimizer does not know, although it knows the norms they stand behind."""
    known = {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}
    for name, block in blocks_of(pl_module).items():
        own = [id(parameter) for parameter in block.equilibrium.parameters() if parameter.requires_grad]
        if own and not known.intersection(own) and known.intersection(map(id, block.norm.parameters())):
            raise MisconfigurationException(
                f"The block behind {name} came after the optimizer was made, which would never train it. Leave it to "
                "ChannelEquilibriumCallback, or call `equilibrate` before `configure_optimizers`."
            )


def _without_decay(pl_module: pl.LightningModule) -> list[Parameter]:
    """List what decay would draw towards an arbitrary place: the mixing, and the norm inside of the gate."""
    found: list[Parameter] = []
    for block in blocks_of(pl_module).values():
        both = block.equilibrium
        if isinstance(both, ChannelEquilibrium):
            found.append(both.mixing)
        gated = both.reweighting if isinstance(both, ChannelEquilibrium) else both
        if isinstance(gated, InstanceReweighting):
            found.extend(gated.gate[1].parameters())
    return found


def _decayed(optimizer: Optimizer, parameters: list[Parameter]) -> list[Parameter]:
    """List those that an optimizer moves, in a group with weight decay."""
    wanted = set(map(id, parameters))
    groups = [group for group in optimizer.param_groups if group.get("weight_decay", 0)]
    return [parameter for group in groups for parameter in group["params"] if id(parameter) in wanted]
