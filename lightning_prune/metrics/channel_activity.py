"""How much each channel responds, and how many are inhibited: they do next to nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from lightning_prune.errors import PruningError
from lightning_prune.inputs import ExampleInputs
from lightning_prune.layers.norms import named_norms, scale_and_shift
from lightning_prune.metrics.responses import Activation, layers_of, run, seen

Form: TypeAlias = Literal["mean", "max"]
"""Of a channel's responses, over all examples and positions."""


@dataclass(frozen=True)
class Tally:
    """What a layer's channels have responded.

    Attributes:
        total: Sum of each channel's responses, (c,).
        peak: The largest, (c,).
        count: How many responses each channel has had, a scalar.
    """

    total: Tensor
    peak: Tensor
    count: Tensor

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.total + other.total, torch.maximum(self.peak, other.peak), self.count + other.count)


class ChannelActivity(Metric):
    """How much each channel responds: mean, or largest, |activation(y)| over examples and positions.

    y is what the norm returns, or the equilibrium block behind it. The network runs in eval mode and is not changed.
    Layers may differ from batch to batch, and from process to process: each is measured where it ran. Sums are kept in
    float64; where a device has none (MPS) batches are summed in float32 there, and added up on the CPU.

    Args:
        form: "mean" or "max".
        activation: What follows the norm in the network.
        layers: Patterns of layers' names (`fnmatch` style) to look behind; None takes all norms.
        **settings: Those of `torchmetrics.Metric`.

    Raises:
        ValueError: `form` is unknown.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> norm.bias.data[:] = torch.tensor([1.0, -1.0])
        >>> metric = ChannelActivity()
        >>> metric.update(nn.Sequential(norm), torch.zeros(4, 2))
        >>> metric.compute()
        {'0': tensor([1., 0.])}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better: bool | None = None

    layout: Tensor
    total: Tensor
    peak: Tensor
    count: Tensor

    def __init__(
        self,
        form: Form = "mean",
        *,
        activation: Activation = torch.relu,
        layers: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if form not in ("mean", "max"):
            raise ValueError(f"`form` is 'mean' or 'max'; got {form!r}.")
        self.form = form
        self.activation = activation
        self.layers = None if layers is None else tuple(layers)
        # names and widths of the layers are a state too: only states survive syncs, groups of metrics and checkpoints
        states = {"layout": torch.uint8, "total": torch.float64, "peak": torch.float64, "count": torch.long}
        place = self.device if has_double(self.device) else "cpu"
        for name, dtype in states.items():
            self.add_state(name, torch.zeros(0, dtype=dtype, device=place), dist_reduce_fx=None)

    @override
    def update(self, model: nn.Module, inputs: ExampleInputs) -> None:
        """See a batch.

        Args:
            model: The network.
            inputs: What its forward is called with; see `find_groups` for the forms.

        Raises:
            PruningError: It has no norms, or other channels than before, or a layer returns something else than a
                tensor.
            ValueError: A pattern of `layers` matches no layer.
        """
        with self.listening(model) as heard:
            run(model, inputs)
        if not heard:
            raise PruningError("None of the layers that are looked at was run. Look behind others: `layers`.")

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[Mapping[str, Tally]]:
        """See what a network's layers return while it is run by others; yields what was heard of each so far.

        Raises:
            PruningError: It has no norms, or other channels than before, or a layer returns something else than a
                tensor.
            ValueError: A pattern of `layers` matches no layer.
        """
        heard: dict[str, Tally] = {}

        def see(name: str, output: Tensor) -> None:
            heard[name] = _added(name, heard.get(name), self._tally(output))

        with seen(layers_of(model, self.layers), see):
            yield heard
        self._keep(_pooled([self._tallies(self.metric_state), heard]))

    @torch.no_grad()
    def _tally(self, output: Tensor) -> Tally:
        responses = self.activation(output.clone()).abs()  # the activation may work in place
        others = [dim for dim in range(responses.dim()) if dim != 1]
        exact = torch.float64 if has_double(responses.device) else torch.float32
        total = responses.sum(others, dtype=exact).to(self.total)
        return Tally(total, responses.amax(others).to(self.total), self.count.new_tensor(responses[:, 0].numel()))

    def _tallies(self, states: Mapping[str, Any]) -> dict[str, Tally]:
        """Read the states of this metric, or of one like it, layer by layer."""
        states = {name: state.to(self.total.device) for name, state in states.items()}
        layout = json.loads(bytes(states["layout"].tolist()) or b"{}")
        widths = list(layout.values())
        parts = zip(states["total"].split(widths), states["peak"].split(widths), states["count"], strict=True)
        return {name: Tally(*each) for name, each in zip(layout, parts, strict=True)}

    def _keep(self, tallies: Mapping[str, Tally]) -> None:
        """Write the states."""
        if not tallies:
            return
        each = tallies.values()
        layout = json.dumps({name: len(tally.total) for name, tally in tallies.items()}).encode()
        self.layout = torch.tensor(list(layout), dtype=torch.uint8, device=self.total.device)
        self.total = torch.cat([tally.total for tally in each])
        self.peak = torch.cat([tally.peak for tally in each])
        self.count = torch.stack([tally.count for tally in each])

    @override
    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Add another state, layer by layer: torchmetrics' own would add them place by place."""
        self._keep(_pooled([self._tallies(incoming_state), self._tallies(self.metric_state)]))

    @override
    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        """Add up the states of all processes, layer by layer; one that saw nothing takes part."""
        group = process_group or self.process_group
        gathered = {name: dist_sync_fn(state, group=group) for name, state in self.metric_state.items()}
        processes = (dict(zip(gathered, states, strict=True)) for states in zip(*gathered.values(), strict=True))
        self._keep(_pooled(map(self._tallies, processes)))

    @override
    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = ()) -> nn.Module:
        """Move the states, but not to where there is no float64; `set_dtype` leaves them as exact as they are."""
        target = fn(torch.zeros(1, device=self.device)).device
        stay = self._dtype_convert or not has_double(target)
        return super()._apply(fn, tuple(self._defaults) if stay else exclude_state)

    def activities(self) -> dict[str, Tensor]:
        """Return for each layer the activity of its channels, (c,), >= 0; on several processes what this one saw."""
        tallies = self._tallies(self.metric_state)
        found = {name: each.total / each.count if self.form == "mean" else each.peak for name, each in tallies.items()}
        return {name: activity.float().to(self.device) for name, activity in found.items()}

    @override
    def compute(self) -> Any:
        """Return for each layer the activity of its channels, (c,), >= 0; nothing before the first batch."""
        return self.activities()


class InhibitedChannels(ChannelActivity):
    """The share of inhibited channels, in [0, 1]: those whose activity stays below a threshold.

    Shao et al. 2020, "Channel equilibrium networks" (ICML), call channels inhibited whose response behind norm and
    activation is below 0.01. Whether the mean or the largest counts, their code does not tell: here it is the mean
    over all examples and positions, or with form="max" the largest.

    Args:
        threshold: Activities below are inhibited, > 0.
        form: "mean" or "max".
        activation: What follows the norm in the network.
        layers: Patterns of layers' names (`fnmatch` style) to look behind; None takes all norms.
        **settings: Those of `torchmetrics.Metric`.

    Raises:
        ValueError: `form` is unknown, or `threshold` out of its range.
    """

    higher_is_better = False

    def __init__(
        self,
        threshold: float = 1e-2,
        form: Form = "mean",
        *,
        activation: Activation = torch.relu,
        layers: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(form, activation=activation, layers=layers, **settings)
        self.threshold = _checked(threshold)

    @override
    def compute(self) -> Tensor:
        """Return the share over all channels of all layers, a scalar; NaN before the first batch."""
        inhibited = [torch.zeros(0, device=self.device), *self.inhibited().values()]
        return torch.cat([each.float() for each in inhibited]).mean()

    def inhibited(self) -> dict[str, Tensor]:
        """Tell for each layer which of its channels are inhibited, (c,); on several processes by what this one saw."""
        return {name: each < self.threshold for name, each in self.activities().items()}


def expected_activity(scale: Tensor, shift: Tensor) -> Tensor:
    """Return the mean of max(0, gamma z + beta) for z ~ N(0, 1): what a channel responds behind BatchNorm and ReLU.

        E[y] = beta Phi(beta / |gamma|) + |gamma| phi(beta / |gamma|)

    It is 0 just where beta <= 0 and gamma is (Shao et al. 2020, lemma 1).

    Args:
        scale: gamma, (c,).
        shift: beta, (c,).

    Returns:
        (c,), >= 0.

    Example:
        >>> expected_activity(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, -2.0]))
        tensor([0.3989, 2.0000, 0.0000])
    """
    spread = scale.abs().clamp_min(torch.finfo(scale.dtype).tiny)
    place = shift / spread
    density = torch.exp(-0.5 * place.square()) * (2 * torch.pi) ** -0.5
    expected: Tensor = shift * torch.special.ndtr(place) + spread * density
    return expected.clamp_min(0.0)


def inhibited_share(model: nn.Module, threshold: float = 1e-2) -> float:
    """Return the share of channels whose expected activity is below a threshold, from gamma and beta alone.

    It counts BatchNorms with a scale and without an equilibrium block, takes what they normalise for Gaussian and what
    follows for ReLU, and needs no data.

    Args:
        model: Any module.
        threshold: Activities below are inhibited, > 0.

    Returns:
        In [0, 1].

    Raises:
        PruningError: There is no such BatchNorm.
        ValueError: `threshold` is out of its range.
    """
    threshold = _checked(threshold)
    known = [scale_and_shift(norm) for norm in named_norms(model).values() if isinstance(norm, _BatchNorm)]
    activities = [expected_activity(*each) for each in known if each is not None]
    if not activities:
        raise PruningError(
            f"{type(model).__name__} has no BatchNorm with a scale and without an equilibrium block behind it. Measure "
            "instead: lightning_prune.metrics.InhibitedChannels."
        )
    return float((torch.cat(activities) < threshold).float().mean())


@cache
def has_double(device: torch.device) -> bool:
    """Tell whether a device calculates in float64."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add(1)
    except (TypeError, RuntimeError):
        return False
    return True


def _pooled(several: Iterable[Mapping[str, Tally]]) -> dict[str, Tally]:
    """Add up what was seen of each layer, in one place and another."""
    pooled: dict[str, Tally] = {}
    for tallies in several:
        for name, tally in tallies.items():
            pooled[name] = _added(name, pooled.get(name), tally)
    return pooled


def _added(name: str, before: Tally | None, tally: Tally) -> Tally:
    if before is None:
        return tally
    if len(before.total) != len(tally.total):
        raise PruningError(
            f"The layer {name!r} was seen with {len(before.total)} channels and with {len(tally.total)}. A metric is "
            "of one network: reset it after a cut."
        )
    return before + tally


def _checked(threshold: float) -> float:
    if not 0 < threshold < inf:
        raise ValueError(f"`threshold` is the activity below which a channel is inhibited, > 0; got {threshold}.")
    return threshold
