"""The cumulative ablation curve: how accuracy falls while more and more channels are silenced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_prune.inputs import ExampleInputs, tensors_in
from lightning_prune.metrics.responses import layers_of, run, seen

TENTHS = tuple(tenth / 10 for tenth in range(10))


class CumulativeAblationCurve(Metric):
    """Accuracy while a growing fraction of channels, in random order, is set to zero.

    Morcos et al. 2018, "On the importance of single directions for generalization" (ICLR, section 2.4). All layers lose
    the same fraction of their channels, rounded: what their norm returns, or the equilibrium block behind it, is 0
    there. A network that relies on few channels falls early. The network runs in eval mode and is not changed.

    Args:
        fractions: Of channels that are silenced, rising, in [0, 1].
        orders: So many random orders, >= 1; the same for all batches and on all ranks.
        seed: Of the orders.
        layers: Patterns of layers' names (`fnmatch` style) that lose channels; None takes all norms.
        **settings: Those of `torchmetrics.Metric`.

    Raises:
        ValueError: An argument is out of its range.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    right: Tensor
    count: Tensor

    def __init__(
        self,
        fractions: Sequence[float] = TENTHS,
        *,
        orders: int = 10,
        seed: int = 0,
        layers: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        rising = list(fractions) == sorted({*fractions}) and all(0 <= fraction <= 1 for fraction in fractions)
        if len(fractions) < 2 or not rising:
            raise ValueError(f"`fractions` are two or more that rise, in [0, 1]; got {fractions}.")
        if orders < 1:
            raise ValueError(f"`orders` is how many random orders are tried, 1 or more; got {orders}.")
        self.fractions = tuple(fractions)
        self.orders = orders
        self.seed = seed
        self.layers = None if layers is None else tuple(layers)
        self.add_state("right", torch.zeros(orders, len(fractions), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @override
    def update(self, model: nn.Module, inputs: ExampleInputs, targets: Tensor) -> None:
        """See a batch: it is run for each order and fraction.

        Args:
            model: A classifier that returns logits, (n, classes).
            inputs: What its forward is called with; see `find_groups` for the forms.
            targets: The classes, (n,).

        Raises:
            PruningError: It has no norms, or a layer returns something else than a tensor.
            ValueError: A pattern of `layers` matches no layer, or logits and targets have other shapes.
        """
        layers = layers_of(model, self.layers)
        for place, fraction in enumerate(self.fractions):
            for order in range(self.orders if fraction else 1):
                right = self._right(model, inputs, targets, layers, order, fraction)
                self.right[order if fraction else slice(None), place] += right
        self.count += len(targets)

    def _right(
        self,
        model: nn.Module,
        inputs: ExampleInputs,
        targets: Tensor,
        layers: dict[str, nn.Module],
        order: int,
        fraction: float,
    ) -> int:
        """Count the right answers without some channels."""
        generator = torch.Generator()
        kept: dict[str, Tensor] = {}

        def silence(name: str, output: Tensor) -> Tensor:
            if name not in kept:
                generator.manual_seed((self.seed * self.orders + order) * len(layers) + list(layers).index(name))
                channels = output.shape[1]
                first = torch.randperm(channels, generator=generator)[: round(fraction * channels)]
                kept[name] = torch.ones(channels).index_fill_(0, first, 0.0).to(output.device)
            return kept[name]

        with seen(layers, silence):
            logits = next(tensors_in(run(model, inputs)))
        if logits.dim() != 2 or logits.shape[:1] != targets.shape:
            raise ValueError(
                "The curve is of a classifier's accuracy: logits (n, classes) and targets (n,); got "
                f"{tuple(logits.shape)} and {tuple(targets.shape)}."
            )
        return int((logits.argmax(1) == targets).sum())

    @override
    def compute(self) -> Tensor:
        """Return the accuracies, in [0, 1], of shape (orders, fractions)."""
        return self.right / self.count

    def area(self) -> Tensor:
        """Return the area under the mean curve, divided by its width: a mean accuracy, in [0, 1]."""
        mean = self.compute().double().mean(0)
        places = torch.tensor(self.fractions, dtype=mean.dtype, device=mean.device)
        return torch.trapezoid(mean, places) / (places[-1] - places[0])
