"""Operations that trade space for channels: shuffles, and windows that become channels."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.flow import Flow
from lightning_prune.handlers.registry import Call, handles, packets


def _freeze_space(flow: Flow, source: Tensor, where: str) -> None:
    for labels in flow.of(source)[2:]:
        flow.freeze(labels, f"is cut into windows in {where}")


@handles(*packets("pixel_shuffle"))
def pixel_shuffle(flow: Flow, call: Call) -> None:
    """(C r r, H, W) -> (C, H r, W r): the r r channels that become the pixels of one channel go together."""
    labels = list(flow.of(call["self"]))
    channels = labels[-3]
    if channels is not None:
        rows = channels.reshape(-1, call["upscale_factor"] ** 2)
        flow.space.tie(rows, rows[:, :1])
        labels[-3] = rows[:, 0]
    for extent in labels[-2:]:
        flow.freeze(extent, f"is interleaved in {call.name}")
    flow.put(call.out, [*labels[:-2], None, None])


@handles(*packets("pixel_unshuffle"))
def pixel_unshuffle(flow: Flow, call: Call) -> None:
    """(C, H r, W r) -> (C r r, H, W): the r r channels that come from one channel go with it."""
    labels = list(flow.of(call["self"]))
    channels = labels[-3]
    if channels is not None:
        labels[-3] = channels.repeat(call["downscale_factor"] ** 2)
    for extent in labels[-2:]:
        flow.freeze(extent, f"is interleaved in {call.name}")
    flow.put(call.out, [*labels[:-2], None, None])


@handles(*packets("channel_shuffle native_channel_shuffle"))
def channel_shuffle(flow: Flow, call: Call) -> None:
    """(groups, C / groups) -> (C / groups, groups): the i-th channels of all groups go together."""
    labels = list(flow.of(call["self"]))
    channels = labels[1]
    if channels is not None:
        rows = channels.reshape(call["groups"], -1)
        flow.space.tie(rows, rows[:1])
        labels[1] = rows.T.reshape(-1)
    flow.put(call.out, labels)


@handles(*packets("im2col"))
def im2col(flow: Flow, call: Call) -> None:
    """(N, C, H, W) -> (N, C k k, windows): the k k rows of a channel go with it."""
    source: Tensor = call["self"]
    _freeze_space(flow, source, call.name)
    batch, channels = flow.of(source)[:2]
    height, width = call["kernel_size"]
    flow.put(call.out, [batch, None if channels is None else channels.repeat(height * width), None])


@handles(*packets("col2im"))
def col2im(flow: Flow, call: Call) -> None:
    """(N, C k k, windows) -> (N, C, H, W): the k k rows of a channel go together."""
    batch, channels, windows = flow.of(call["self"])
    flow.freeze(windows, f"is put together from windows in {call.name}")
    if channels is not None:
        height, width = call["kernel_size"]
        rows = channels.reshape(-1, height * width)
        flow.space.tie(rows, rows[:, :1])
        channels = rows[:, 0]
    flow.put(call.out, [batch, channels, None, None])


@handles(*packets("unfold unfold_copy"))
def unfold(flow: Flow, call: Call) -> None:
    """Windows along one dimension freeze it and add a dimension; the others pass."""
    labels = list(flow.of(call["self"]))
    along = call["dimension"]
    flow.freeze(labels[along], f"is cut into windows in {call.name}")
    labels[along] = None
    flow.put(call.out, [*labels, None])
