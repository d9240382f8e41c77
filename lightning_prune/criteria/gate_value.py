"""Channels whose gate has closed go."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.criteria.base import Criterion
from lightning_prune.errors import ScoreError
from lightning_prune.layers.gates import gates_of
from lightning_prune.types import ChannelGroup


class GateValue(Criterion):
    """The test gate of each channel: score_k = z_k, in [0, 1], and 0 exactly where the gate is closed.

    Louizos, Welling, Kingma 2018 (arXiv 1712.01312), eq. 13. With the allocation `Zeros()` the closed ones go. Groups
    without gates are passed over, and those that a cut has given other channels than they had when they were gated.
    """

    @override
    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        """Return the test gates; None where the group has none of its size.

        Raises:
            ScoreError: The model has no gates.
        """
        gates = gates_of(model)
        if gates is None:
            raise ScoreError(
                f"{type(self).__name__} reads the gates of a model, and {type(model).__name__} has none. "
                "`L0PruneCallback` puts them on; use another criterion here."
            )
        gate = gates.named().get(group.name)
        return None if gate is None or gate.shape != (group.size,) else gate.test_values()
