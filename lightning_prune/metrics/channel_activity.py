"""How much each channel responds, and how many are inhibited: they do next to nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric
from typing_extensions import override

from lightning_prune.errors import PruningError
from lightning_prune.inputs import ExampleInputs
from lightning_prune.layers.norms import named_norms, scale_and_shift
from lightning_prune.metrics.responses import Activation, layers_of, run, seen

Form: TypeAlias = Literal["mean", "max"]
"""Of a channel's responses, over all examples and positions."""


class ChannelActivity(Metric):
    """How much each channel responds: mean, or largest, |activation(y)| over examples and positions.

    y is what the norm returns, or the equilibrium block behind it. The network runs in eval mode and is not changed.

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
        self.sizes: dict[str, int] = {}
        self.add_state("total", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("peak", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("count", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, model: nn.Module, inputs: ExampleInputs) -> None:
        """See a batch.

        Args:
            model: The network.
            inputs: What its forward is called with; see `find_groups` for the forms.

        Raises:
            PruningError: It has no norms, or other channels than before.
            ValueError: A pattern of `layers` matches no layer.
        """
        found: dict[str, list[Tensor]] = {}

        def see(name: str, output: Tensor) -> None:
            found.setdefault(name, []).append(output.clone())  # what comes next may work in place

        with seen(layers_of(model, self.layers), see):
            run(model, inputs)
        self.take_in(found)

    def take_in(self, outputs: Mapping[str, Sequence[Tensor]]) -> None:
        """See what layers have returned, (n, c, ...) each time that they were run.

        Raises:
            PruningError: There are none, or other channels than before.
        """
        if not outputs:
            raise PruningError("None of the layers that are looked at was run. Look behind others: `layers`.")
        with torch.no_grad():
            parts = [self._summed(name, each) for name, each in outputs.items()]
        sizes = {name: len(total) for name, (total, _, _) in zip(outputs, parts, strict=True)}
        if not self.sizes or not self.count.any():
            self._make_room(sizes)
        if sizes != self.sizes:
            raise PruningError(
                f"{type(self).__name__} has seen channels {self.sizes}, and now {sizes}: reset it after a cut."
            )
        total, peak, count = (torch.cat(each).to(self.total) for each in zip(*parts, strict=True))
        self.total = self.total + total
        self.peak = torch.maximum(self.peak, peak)
        self.count = self.count + count

    def _summed(self, name: str, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return sum and largest of each channel's responses, and their number."""
        each = [self.activation(output).abs().double().movedim(1, 0).flatten(1) for output in outputs]
        together = torch.cat(each, 1)
        number = together.new_full((len(together),), together.shape[1])
        return together.sum(1), together.amax(1), number

    def _make_room(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        for state in ("total", "peak", "count"):
            self._defaults[state] = torch.zeros(sum(sizes.values()), dtype=torch.float64)
            setattr(self, state, torch.zeros(sum(sizes.values()), dtype=torch.float64, device=self.device))

    def activities(self) -> dict[str, Tensor]:
        """Return for each layer the activity of its channels, (c,), >= 0; on several processes what this one saw."""
        activity = self.total / self.count if self.form == "mean" else self.peak
        return dict(zip(self.sizes, activity.float().split(list(self.sizes.values())), strict=True))

    @override
    def compute(self) -> Any:
        """Return for each layer the activity of its channels, (c,), >= 0."""
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
        ValueError: `form` is unknown, or `threshold` is not above 0.
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
        if not threshold > 0:
            raise ValueError(f"`threshold` is the activity below which a channel is inhibited, > 0; got {threshold}.")
        self.threshold = threshold

    @override
    def compute(self) -> Tensor:
        """Return the share over all channels of all layers, a scalar."""
        inhibited: Tensor = torch.cat(list(self.inhibited().values()))
        return inhibited.float().mean()

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
    """
    known = [scale_and_shift(norm) for norm in named_norms(model).values() if isinstance(norm, _BatchNorm)]
    activities = [expected_activity(*each) for each in known if each is not None]
    if not activities:
        raise PruningError(
            f"{type(model).__name__} has no BatchNorm with a scale and without an equilibrium block behind it. Measure "
            "instead: lightning_prune.metrics.InhibitedChannels."
        )
    return float((torch.cat(activities) < threshold).float().mean())
