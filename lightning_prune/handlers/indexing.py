"""What is picked by number freezes where it is picked, and goes on elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.flow import Flow
from lightning_prune.handlers.pointwise import align, broadcast
from lightning_prune.handlers.registry import Call, handles, handles_named, packets
from lightning_prune.labels import LabelArray


def _pick(flow: Flow, labels: LabelArray | None, where: str) -> None:
    flow.freeze(labels, f"is picked by number in {where}")


@handles(*packets("index_select"))
def index_select(flow: Flow, call: Call) -> None:
    """Channels that are picked by their numbers are frozen; other dimensions pass."""
    labels = list(flow.of(call["self"]))
    if labels:
        _pick(flow, labels[call["dim"]], call.name)
        labels[call["dim"]] = (*flow.of(call["index"]), None)[0]
    flow.put(call.out, labels)


@handles(*packets("embedding"))
def embedding(flow: Flow, call: Call) -> None:
    """The rows of the table are picked by number; its columns are channels."""
    rows, columns = flow.of(call["weight"])
    _pick(flow, rows, call.name)
    flow.make(columns)
    flow.put(call.out, [*flow.of(call["indices"]), columns])


@handles(*packets("_embedding_bag _embedding_bag_forward_only"))
def embedding_bag(flow: Flow, call: Call) -> None:
    """As an embedding; the rows of a bag are added up."""
    rows, columns = flow.of(call["weight"])
    _pick(flow, rows, call.name)
    flow.make(columns)
    flow.put(call.out[0], [None, columns])


def _indexed(flow: Flow, source: Tensor, indices: list[Tensor | None], where: str) -> list[LabelArray | None]:
    """Return the labels of `source[indices]`: those of the index tensors stand where the first of them stood.

    If the indexed dimensions are not next to each other, they stand in front. A mask takes as many dimensions as it
    has and leaves one without channels.
    """
    labels = list(flow.of(source))
    places: list[int] = []
    picks: list[Tensor] = []
    dim = 0
    for given in indices:
        taken = 1 if given is None or given.dtype not in (torch.bool, torch.uint8) else given.dim()
        if given is not None:
            places.extend(range(dim, dim + taken))
            if given.dtype not in (torch.bool, torch.uint8):
                picks.append(given)
        dim += taken
    for place in places:
        _pick(flow, labels[place], where)
    shape = torch.broadcast_shapes(*(pick.shape for pick in picks)) if picks else (1,)
    picked = broadcast(flow, picks, shape, where)
    left = [part for place, part in enumerate(labels) if place not in places]
    together = places == list(range(places[0], places[-1] + 1))
    front = places[0] if together else 0
    return [*left[:front], *picked, *left[front:]]


@handles(*packets("nonzero masked_select _unique2 unique_dim unique_consecutive"))
@handles_named("torchvision::nms")
def search(flow: Flow, call: Call) -> None:
    """What is found by its value is known by its number: all that is searched freezes."""
    for tensor in call.tensors:
        flow.freeze_tensor(tensor, f"is searched in {call.name}")


@handles(*packets("index _unsafe_index"))
def index(flow: Flow, call: Call) -> None:
    """Advanced indexing, as for tables of relative positions."""
    flow.put(call.out, _indexed(flow, call["self"], call["indices"], call.name))


@handles(*packets("index_put _unsafe_index_put _index_put_impl"))
def index_put(flow: Flow, call: Call) -> None:
    """What is written meets what was there, but for the picked dimensions."""
    there, values = _indexed(flow, call["self"], call["indices"], call.name), call["values"]
    for dim, size in enumerate(flow.dense_shape(values)):
        if size > 1:
            flow.tie(there[dim - values.dim()], flow.of(values)[dim], call.name)
    flow.put(call.out, flow.of(call["self"]))


@handles(*packets("gather"))
def gather(flow: Flow, call: Call) -> None:
    """Along one dimension positions are picked by number; along the others they stay where they are."""
    source, picks = flow.of(call["self"]), list(flow.of(call["index"]))
    along = call["dim"] % max(len(source), 1)
    for dim, labels in enumerate(source):
        if dim == along:
            _pick(flow, labels, call.name)
        elif flow.dense_shape(call["self"])[dim] == flow.dense_shape(call["index"])[dim]:
            picks[dim] = align(flow, [labels, picks[dim]], call.name)
        else:
            _pick(flow, labels, call.name)
    flow.put(call.out, picks)


@handles(*packets("scatter scatter_add scatter_reduce index_add index_copy index_fill"))
def scatter(flow: Flow, call: Call) -> None:
    """Along one dimension positions are written by number; along the others all that comes in is aligned."""
    source = flow.of(call["self"])
    along = call["dim"] % max(len(source), 1)
    others = [tensor for tensor in call.tensors[1:] if tensor.dim() == len(source)]
    for dim, labels in enumerate(source):
        if dim == along:
            for tensor in (call["self"], *others):
                _pick(flow, flow.of(tensor)[dim], call.name)
        elif flow.dense_shape(call["self"])[dim] > 1:
            align(flow, [labels, *(flow.of(tensor)[dim] for tensor in others)], call.name)
    flow.put(call.out, source)
