"""Channels whose part in what the next layers return is best taken over by others go first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from lightning_prune.behind import Behind
from lightning_prune.criteria.inputs_seen import InputsSummed
from lightning_prune.criteria.readers import Reader
from lightning_prune.graph import Graph
from lightning_prune.lasso import choose, lasso_path, nested_errors
from lightning_prune.moments import Responses, among_channels, joined
from lightning_prune.sampling import (
    Layer,
    draw_points,
    groups_of,
    inputs_at,
    is_product,
    matrix_of,
    read_by_product,
    taps_of,
)
from lightning_prune.tensors import named_tensors
from lightning_prune.types import ChannelGroup


class Lasso(InputsSummed):
    """The order in which channels enter the LASSO that reproduces the outputs of the layers that read them.

    He, Zhang, Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks" (arXiv 1707.06168, equation 1,
    with the weights fixed). With z_i the contribution of channel i to the outputs Y of its readers, each reader counted
    in shares of its output's energy (behind a BatchNorm, of what that makes of it):

        min_b 1/2 ||Y - sum_i b_i z_i||^2 + alpha ||b||_1,    alpha from where all are 0 down to 0.

    It finds what others can take over when they are only made stronger or weaker: channels that hold the same, but are
    read through different weights, it keeps. The score of a channel is what the squared relative error rises by when it
    goes, after all that entered later; the scores of different groups are in one unit, and against what channels cost
    (`ByCost()`) they share a ratio out so that the error per multiply-accumulate saved is the same everywhere. With a
    reconstruction, the channels of each group are chosen anew when the layers before it have been refitted.

    Args:
        points: So many positions of each layer's output are looked at for each example, 1 or more.

    Raises:
        ValueError: `points` is below 1.
    """

    def __init__(self, points: int = 2) -> None:
        if points < 1:
            raise ValueError(f"`points` is positions of an output that are looked at, 1 or more; got {points}.")
        super().__init__()
        self.points = points
        self._scales: dict[str, Tensor] = {}

    @override
    def begin(self, model: nn.Module, graph: Graph) -> None:
        super().begin(model, graph)
        tensors = named_tensors(model)
        behind = Behind(next(iter(graph.runs.values())), tensors)
        self._modules = {name: module for name, module in self._modules.items() if is_product(module)}
        self._scales = {}
        for name in self._modules:
            norms = [behind.norm(step.results[0]) for step in behind.products(f"{name}.weight")]
            if len(norms) == 1 and norms[0] is not None:
                self._scales[name] = norms[0].scale(tensors)

    @staticmethod
    def choose(responses: Responses, count: int) -> Tensor:
        """Return the indices of the channels that are active where so many of them are, ascending."""
        return choose(responses.gram.cpu(), responses.target.cpu(), count)

    @override
    def _of_call(self, name: str, inputs: Tensor) -> Mapping[str, Tensor]:
        layer: Layer = self._modules[name]  # type: ignore[assignment]
        inputs = read_by_product(layer, inputs)
        points = draw_points(layer, inputs, self.points, Generator().manual_seed(self.steps))
        x = inputs_at(layer, inputs, points).transpose(0, 1).double()
        gram = among_channels(x.mT @ x, self._weight(name), taps_of(layer))
        return {name + _GRAM: gram, name + _SUM: x.sum(1), name + _ROWS: _one(x)}

    def _weight(self, name: str) -> Tensor:
        """Return the matrix of a layer, with what the norm behind it makes of its outputs."""
        layer: Layer = self._modules[name]  # type: ignore[assignment]
        matrix = matrix_of(layer).double()
        if name not in self._scales:
            return matrix
        return matrix * self._scales[name].to(matrix).view(groups_of(layer), -1, 1)

    @override
    def _scores(self, model: nn.Module, group: ChannelGroup, readers: Sequence[Reader]) -> Tensor | None:
        if any(reader.module not in self._modules for reader in readers):
            return None
        found = [(reader, self._responses(reader.module)) for reader in readers]
        return ranked(joined((responses.of(reader.positions), responses.energy) for reader, responses in found))

    def _responses(self, name: str) -> Responses:
        """Return what the channels of a layer's input contribute; its output is what all of them do."""
        layer: Layer = self._modules[name]  # type: ignore[assignment]
        weight, rows = self._weight(name), float(self._sums[name + _ROWS])
        mean = (self._sums[name + _SUM].to(weight) / rows).unsqueeze(-1)
        means = among_channels(mean @ mean.mT, weight, taps_of(layer))
        gram = self._sums[name + _GRAM].to(means) - rows * means
        return Responses(gram, gram.sum(1), float(gram.sum()))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scales": dict(self._scales)}

    @override
    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self._scales = dict(state["scales"])


_GRAM, _SUM, _ROWS = ": gram", ": sum", ": rows"


def _one(rows: Tensor) -> Tensor:
    """Return how many rows there are, as a tensor beside them."""
    return torch.tensor(float(rows.shape[1]), dtype=torch.float64, device=rows.device)


def ranked(responses: Responses) -> Tensor:
    """Score channels by what the squared relative error rises by when they go, the last to enter the LASSO first.

    Returns:
        Of shape (channels,), 0 or more; a channel that entered earlier never has less.
    """
    gram, target = responses.gram.cpu(), responses.target.cpu()
    entered = torch.tensor(lasso_path(gram, target).entered, dtype=torch.int64)
    missing = torch.ones(len(target), dtype=torch.bool)
    missing[entered] = False
    order = torch.cat([entered, torch.nonzero(missing).flatten()])
    errors = nested_errors(gram, target, responses.energy, order)
    gains = (errors[:-1] - errors[1:]) / max(responses.energy, torch.finfo(torch.float64).tiny)
    scores = torch.empty_like(gains)
    scores[order] = gains.flip(0).cummax(0).values.flip(0)
    return scores
