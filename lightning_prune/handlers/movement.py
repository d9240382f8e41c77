"""Operations that move elements move the labels with them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_prune.flow import Flow
from lightning_prune.handlers.pointwise import align
from lightning_prune.handlers.registry import Call, handles, packets
from lightning_prune.handlers.reshape import reshape
from lightning_prune.labels import LabelArray

aten = torch.ops.aten


@handles(*packets("view _unsafe_view reshape _reshape_alias _reshape_copy view_copy"))
@handles(*packets("squeeze squeeze_copy unsqueeze unsqueeze_copy"))
def view(flow: Flow, call: Call) -> None:
    """A view merges and splits dimensions; sizes of 1 come and go without a trace."""
    source: Tensor = call["self"]
    if flow.is_labelled(source):
        flow.put(call.out, reshape(flow, source, call.out, call.name))


@handles(aten.permute, aten.permute_copy)
def permute(flow: Flow, call: Call) -> None:
    """The labels follow their dimensions."""
    labels = flow.of(call["self"])
    flow.put(call.out, [labels[dim] for dim in call["dims"]])


@handles(aten.transpose, aten.transpose_copy, aten.t, aten.t_copy)
def transpose(flow: Flow, call: Call) -> None:
    """Two dimensions change places."""
    labels = list(flow.of(call["self"]))
    if len(labels) > 1:
        first, second = call.get("dim0", 0), call.get("dim1", 1)
        labels[first], labels[second] = labels[second], labels[first]
    flow.put(call.out, labels)


@handles(aten.expand, aten.expand_copy)
def expand(flow: Flow, call: Call) -> None:
    """A dimension that is widened holds copies of one element: they are free until they meet something."""
    source: Tensor = call["self"]
    new = call.out.dim() - source.dim()
    labels: list[LabelArray | None] = [*[None] * new, *flow.of(source)]
    old, wide = flow.dense_shape(source), flow.dense_shape(call.out)
    for dim, size in enumerate(call.out.shape):
        if wide[dim] > 1 and (dim < new or old[dim - new] == 1):
            labels[dim] = flow.space.fresh(size)
    flow.put(call.out, labels)


@handles(aten.repeat)
def repeat(flow: Flow, call: Call) -> None:
    """Labels repeat with their dimension; copies of a single element are free."""
    source: Tensor = call["self"]
    new = call.out.dim() - source.dim()
    labels: list[LabelArray | None] = []
    shape = flow.dense_shape(source)
    for dim, times in enumerate(call["repeats"]):
        if dim < new or shape[dim - new] == 1:
            labels.append(flow.space.fresh(times))
        else:
            old = flow.of(source)[dim - new]
            labels.append(None if old is None else np.tile(old, times))
    flow.put(call.out, labels)


@handles(aten.cat)
def cat(flow: Flow, call: Call) -> None:
    """Labels are strung together; a part without any gets frozen ones."""
    parts = [tensor for tensor in call["tensors"] if tensor.shape != (0,)]
    if not any(flow.is_labelled(tensor) for tensor in parts):
        return
    along = call["dim"] % call.out.dim()
    labels = [
        None if dim == along or size == 1 else align(flow, [flow.of(tensor)[dim] for tensor in parts], call.name)
        for dim, size in enumerate(flow.dense_shape(call.out))
    ]
    if any(flow.of(tensor)[along] is not None for tensor in parts):
        labels[along] = np.concatenate([_strung(flow, tensor, along, call.name) for tensor in parts])
    flow.put(call.out, labels)


def _strung(flow: Flow, tensor: Tensor, dim: int, where: str) -> LabelArray:
    labels = flow.of(tensor)[dim]
    if labels is None:
        return flow.fixed(tensor.shape[dim], f"is aligned with a part that holds no channels in {where}")
    return labels


@handles(aten.stack)
def stack(flow: Flow, call: Call) -> None:
    """Stacked tensors are tied to each other; the new dimension holds no channels."""
    parts = call["tensors"]
    labels = [
        None if size == 1 else align(flow, [flow.of(tensor)[dim] for tensor in parts], call.name)
        for dim, size in enumerate(flow.dense_shape(parts[0]))
    ]
    labels.insert(call["dim"] % call.out.dim(), None)
    flow.put(call.out, labels)


@handles(aten.select, aten.select_copy)
def select(flow: Flow, call: Call) -> None:
    """One position is read by its number: a labelled dimension must keep it where it is."""
    labels = list(flow.of(call["self"]))
    flow.freeze(labels.pop(call["dim"]), f"is read by its number in {call.name}")
    flow.put(call.out, labels)


@handles(aten.unbind, aten.unbind_copy)
def unbind(flow: Flow, call: Call) -> None:
    """Every position is read by its number."""
    labels = list(flow.of(call["self"]))
    flow.freeze(labels.pop(call["dim"]), f"is read by its number in {call.name}")
    for out in call.out:
        flow.put(out, labels)


@handles(aten.slice, aten.slice_copy)
def slice_(flow: Flow, call: Call) -> None:
    """A slice takes its labels along; one that divides the dimension evenly ties its siblings to it."""
    source: Tensor = call["self"]
    labels = list(flow.of(source))
    dim = call["dim"]
    whole = labels[dim]
    if whole is not None:
        size, step = len(whole), call["step"]
        start, stop, _ = slice(call["start"], call["end"]).indices(size)
        length = stop - start
        if step == 1 and length and size % length == 0 and start % length == 0:
            _tie_chunks(flow, whole, length)
        elif step > 1 and size % step == 0 and length > size - step:
            flow.space.tie(whole.reshape(-1, step), whole.reshape(-1, step)[:, :1])
        labels[dim] = whole[start:stop:step]
        flow.mark(whole[start:stop:step], whole)
    flow.put(call.out, labels)


def _tie_chunks(flow: Flow, labels: LabelArray, length: int) -> None:
    chunks = labels.reshape(-1, length)
    flow.space.tie(chunks, chunks[:1])


@handles(*packets("split split_with_sizes unsafe_split unsafe_split_with_sizes split_copy split_with_sizes_copy"))
def split(flow: Flow, call: Call) -> None:
    """Each part takes its labels along; equal parts are tied, so that halves stay halves."""
    labels = list(flow.of(call["self"]))
    dim = call["dim"]
    whole = labels[dim]
    sizes = {out.shape[dim] for out in call.out}
    if whole is not None and len(sizes) == 1:
        _tie_chunks(flow, whole, sizes.pop())
    start = 0
    for out in call.out:
        stop = start + out.shape[dim]
        if whole is not None:
            labels[dim] = whole[start:stop]
            flow.mark(whole[start:stop], whole)
        flow.put(out, labels)
        start = stop


@handles(aten.glu)
def glu(flow: Flow, call: Call) -> None:
    """The second half gates the first."""
    labels = list(flow.of(call["self"]))
    dim = call["dim"]
    whole = labels[dim]
    if whole is not None:
        _tie_chunks(flow, whole, len(whole) // 2)
        labels[dim] = whole[: len(whole) // 2]
    flow.put(call.out, labels)


@handles(aten.flip)
def flip(flow: Flow, call: Call) -> None:
    """The labels turn round."""
    labels = list(flow.of(call["self"]))
    for dim in call["dims"]:
        turned = labels[dim]
        labels[dim] = None if turned is None else turned[::-1]
    flow.put(call.out, labels)


@handles(aten.roll)
def roll(flow: Flow, call: Call) -> None:
    """A shift by a fixed number of positions freezes the channels that it shifts."""
    labels = list(flow.of(call["self"]))
    for dim in call["dims"] or range(len(labels)):
        flow.freeze(labels[dim], f"is shifted by a fixed number in {call.name}")
    flow.put(call.out, labels)


@handles(aten.constant_pad_nd)
def pad(flow: Flow, call: Call) -> None:
    """Padding adds positions that must stay, since their number is fixed."""
    source: Tensor = call["self"]
    if not flow.is_labelled(source):
        return
    labels = list(flow.of(source))
    widths = call["pad"]
    for index in range(len(widths) // 2):
        before, after = widths[2 * index : 2 * index + 2]
        dim = source.dim() - 1 - index
        old = labels[dim]
        if (before or after) and old is not None:
            labels[dim] = _padded(flow, old, before, after, call.name)
    flow.put(call.out, labels)


def _padded(flow: Flow, labels: LabelArray, before: int, after: int, where: str) -> LabelArray:
    reason = f"is aligned with a fixed number of padded positions in {where}"
    if min(before, after) < 0:
        flow.freeze(labels, f"is cropped by a fixed number in {where}")
        labels = labels[max(-before, 0) : len(labels) - max(-after, 0)]
    return np.concatenate([flow.fixed(max(before, 0), reason), labels, flow.fixed(max(after, 0), reason)])


@handles(aten.as_strided)
def as_strided(flow: Flow, call: Call) -> None:
    """A change of memory format alone moves nothing; any other stride trick freezes."""
    source: Tensor = call["self"]
    twin = torch.empty(call["size"], device="meta")
    formats = [twin.stride()]
    if twin.dim() == 4:
        formats.append(twin.contiguous(memory_format=torch.channels_last).stride())
    wide = [dim for dim, size in enumerate(call["size"]) if size > 1]
    same = any(all(stride[dim] == call["stride"][dim] for dim in wide) for stride in formats)
    if not same or tuple(call["size"]) != tuple(source.shape) or call["storage_offset"]:
        raise LookupError("strides of no known memory format")
    flow.put(call.out, flow.of(source))


@handles(*packets("tril triu"))
def triangle(flow: Flow, call: Call) -> None:
    """A triangle is told by the positions in the last two dimensions."""
    labels = flow.of(call["self"])
    for part in labels[-2:]:
        flow.freeze(part, f"is masked by its position in {call.name}")
    flow.put(call.out, labels)


@handles(*packets("diagonal diagonal_copy"))
def diagonal(flow: Flow, call: Call) -> None:
    """The main diagonal ties its two dimensions to each other; any other one freezes them."""
    labels = list(flow.of(call["self"]))
    first, second = call["dim1"] % len(labels), call["dim2"] % len(labels)
    rows, columns = labels[first], labels[second]
    rest = [part for dim, part in enumerate(labels) if dim not in (first, second)]
    if call["offset"] or len(call["self"].shape) < 2 or call["self"].shape[first] != call["self"].shape[second]:
        for part in (rows, columns):
            flow.freeze(part, f"is read along a diagonal in {call.name}")
        flow.put(call.out, [*rest, None])
    else:
        flow.put(call.out, [*rest, align(flow, [rows, columns], call.name)])


@handles(*packets("diag_embed"))
def diag_embed(flow: Flow, call: Call) -> None:
    """The last dimension becomes the diagonal of two; away from the main one it freezes."""
    *labels, part = flow.of(call["self"])
    if call["offset"]:
        flow.freeze(part, f"is written along a diagonal in {call.name}")
        part = None
    for dim in sorted((call["dim1"] % call.out.dim(), call["dim2"] % call.out.dim())):
        labels.insert(dim, part)
    flow.put(call.out, labels)


@handles(*packets("rot90"))
def rot90(flow: Flow, call: Call) -> None:
    """A quarter turn exchanges two dimensions and turns one of them round; a half turn turns both."""
    labels = list(flow.of(call["self"]))
    first, second = call["dims"]
    quarters = call["k"] % 4
    rows, columns = labels[first], labels[second]
    if quarters in (1, 2):
        columns = None if columns is None else columns[::-1]
    if quarters in (2, 3):
        rows = None if rows is None else rows[::-1]
    labels[first], labels[second] = (columns, rows) if quarters % 2 else (rows, columns)
    flow.put(call.out, labels)


@handles(*packets("view_as_real view_as_complex"))
def as_complex(flow: Flow, call: Call) -> None:
    """The two parts of a complex number are a last dimension without channels."""
    labels = list(flow.of(call["self"]))
    if call.out.dim() > len(labels):
        flow.put(call.out, [*labels, None])
    else:
        flow.freeze(labels[-1], f"is a part of a complex number in {call.name}")
        flow.put(call.out, labels[:-1])
