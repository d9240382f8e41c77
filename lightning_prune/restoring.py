"""What keeps a network's outputs near where they were when channels go: absorption, or reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lightning_prune.absorption import absorb
from lightning_prune.criteria import Criterion, Lasso
from lightning_prune.cut import Offsets
from lightning_prune.errors import PruningError
from lightning_prune.graph import Graph
from lightning_prune.inputs import ExampleInputs
from lightning_prune.layers.gates import gates_of
from lightning_prune.masks.held import masks_of
from lightning_prune.reconstruction import AllReduce, Choose, Rebuilt, Reconstruction, rebuild
from lightning_prune.types import Attributes, Constants, PruningPlan


@dataclass(frozen=True)
class Sights:
    """What a reconstruction looks at.

    Attributes:
        batches: What forward takes.
        all_reduce: Sums over processes, each of which has batches of its own.
    """

    batches: Sequence[ExampleInputs] = ()
    all_reduce: AllReduce | None = None


def check_restorable(model: nn.Module) -> None:
    """Refuse a network that cannot be reconstructed.

    Raises:
        PruningError: It has gates, or masks on weights.
    """
    for what, found in (("gates", gates_of(model)), ("masked weights", masks_of(model))):
        if found:
            raise PruningError(
                f"A network with {what} cannot be reconstructed: its layers return something else than their weights "
                "tell. Reconstruct before, or leave `reconstruction` out."
            )


@dataclass(frozen=True)
class Restoring:
    """Works out what is added to a network's tensors when the channels of a plan go.

    Attributes:
        graph: A reading of the network.
        plan: What goes.
        mended: Attributes that the cut needed mending of.
        constants: What becomes of what removed channels emit, without a reconstruction.
        reconstruction: How the layers that read what is left are refitted; None leaves them.
        sights: What a reconstruction looks at.
    """

    graph: Graph
    plan: PruningPlan
    mended: Attributes
    constants: Constants
    reconstruction: Reconstruction | None
    sights: Sights

    def first(self, model: nn.Module, criterion: Criterion) -> tuple[Offsets, Rebuilt | None]:
        """Return what is added, and what was reconstructed; `Lasso` chooses the channels anew, layer by layer."""
        if self.reconstruction is None:
            return self._absorbed(model), None
        rebuilt = self._rebuilt(model, criterion.choose if isinstance(criterion, Lasso) else None)
        return rebuilt.offsets, rebuilt

    def again(self, plan: PruningPlan) -> Callable[[nn.Module], Offsets] | None:
        """Return what works out what is added for other weights, when it stands which channels go."""
        if self.reconstruction is None and self.constants == "drop":
            return None
        standing = replace(self, plan=plan)
        if self.reconstruction is None:
            return standing._absorbed
        return lambda model: standing._rebuilt(model, None).offsets

    def _absorbed(self, model: nn.Module) -> Offsets:
        """Absorb what is emitted; behind gates that are 0 that is nothing."""
        if self.constants == "drop" or gates_of(model) is not None:
            return Offsets()
        return absorb(model, self.graph, self.plan)

    def _rebuilt(self, model: nn.Module, choose: Choose | None) -> Rebuilt:
        """Reconstruct; what removed channels have emitted is part of what the refits make up for."""
        assert self.reconstruction is not None
        return rebuild(
            model,
            self.graph,
            self.plan,
            self.sights.batches,
            self.reconstruction,
            choose=choose,
            mended=self.mended,
            all_reduce=self.sights.all_reduce,
        )
