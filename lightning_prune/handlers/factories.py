"""Tensors made in the forward pass: constants are free to follow what they meet, counters are not."""

from __future__ import annotations

from lightning_prune.flow import Flow
from lightning_prune.handlers.registry import Call, handles, packets


@handles(*packets("zeros ones full empty rand randn randint new_zeros new_ones new_full new_empty empty_strided"))
def uniform(flow: Flow, call: Call) -> None:
    """All positions are alike, so that each may go with whatever it is combined with."""
    flow.put(call.out, [flow.space.fresh(size) for size in call.out.shape])


@handles(*packets("zeros_like ones_like full_like empty_like rand_like randn_like randint_like"))
def like(flow: Flow, call: Call) -> None:
    """The new tensor has the shape, and so the labels, of its model."""
    flow.put(call.out, flow.of(call["self"]))


@handles(*packets("arange linspace logspace eye scalar_tensor randperm tril_indices triu_indices"))
def counter(flow: Flow, call: Call) -> None:
    """The positions have a meaning of their own: nothing to carry."""
