"""Pooling, resampling and padding work on the trailing dimensions and leave the channels alone."""

from __future__ import annotations

import re

from lightning_prune.handlers.registry import Call, handles, packets, tensors_in
from lightning_prune.labels import Flow

_KINDS = (
    "avg_pool max_pool _adaptive_avg_pool adaptive_avg_pool adaptive_max_pool fractional_max_pool "
    "upsample_nearest _upsample_nearest_exact reflection_pad replication_pad"
).split()
_NAMES = [f"{kind}{n}d{tail}" for kind in _KINDS for n in (1, 2, 3) for tail in ("", "_with_indices")]
_FURTHER = (
    "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"
).split()


@handles(*packets(" ".join(_NAMES + _FURTHER)))
def pool(flow: Flow, call: Call) -> None:
    """The last n dimensions are mixed, the ones before pass; n stands in the operation's name."""
    match = re.search(r"([123])d", call.name)
    assert match is not None
    spatial = int(match.group(1))
    source = call.tensors[0]
    labels = flow.of(source)
    for mixed in labels[-spatial:]:
        flow.freeze(mixed, f"is pooled or resampled in {call.name}")
    for out in tensors_in(call.out):
        flow.put(out, [*labels[:-spatial], *[None] * spatial])
