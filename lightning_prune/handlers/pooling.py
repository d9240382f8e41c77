"""Pooling, resampling and padding work on the trailing dimensions and leave the channels alone."""

from __future__ import annotations

import re

from lightning_prune.flow import Flow
from lightning_prune.handlers.registry import Call, handles, handles_named, packets
from lightning_prune.inputs import tensors_in

_POOLS = packets(
    "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
    "max_pool3d_with_indices adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
)
_RESAMPLINGS = packets(
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
_PADDINGS = packets(
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"
)


@handles(*_POOLS, *_RESAMPLINGS, *_PADDINGS)
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


@handles(*packets("grid_sampler_2d grid_sampler_3d"))
def grid_sample(flow: Flow, call: Call) -> None:
    """Each channel is sampled at the places of the grid (N, *space, 2 or 3)."""
    batch, channels, *space = flow.of(call["input"])
    for extent in (*space, *flow.of(call["grid"])[1:]):
        flow.freeze(extent, f"is sampled in {call.name}")
    flow.tie(batch, flow.of(call["grid"])[0], call.name)
    flow.put(call.out, [batch, channels, *[None] * len(space)])


@handles(*packets("affine_grid_generator"))
def affine_grid(flow: Flow, call: Call) -> None:
    """Each example has a transformation (2, 3) or (3, 4) of its own."""
    batch, *matrix = flow.of(call["theta"])
    for extent in matrix:
        flow.freeze(extent, f"is a matrix in {call.name}")
    flow.put(call.out, [batch, *[None] * (call.out.dim() - 1)])


@handles_named("torchvision::roi_align", "torchvision::roi_pool")
def regions(flow: Flow, call: Call) -> None:
    """Boxes (K, 5) are cut out of all channels."""
    batch, channels, *space = flow.of(call["input"])
    for extent in (batch, *space, *flow.of(call["rois"])):
        flow.freeze(extent, f"is cut into regions in {call.name}")
    for out in tensors_in(call.out):
        flow.put(out, [None, channels, None, None])


@handles(*packets("fractional_max_pool2d fractional_max_pool3d"))
def fractional_pool(flow: Flow, call: Call) -> None:
    """Every channel has random samples (batch, channels, n) of its own."""
    source, samples = call.tensors
    for dim in (0, 1):
        flow.tie(flow.of(source)[dim], flow.of(samples)[dim], call.name)
    pool(flow, call)
