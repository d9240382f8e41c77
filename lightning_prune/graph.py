"""Reads a model's channel groups: which channels there are, where they live, and which cannot go."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_prune.collector import collector_held
from lightning_prune.errors import TraceError
from lightning_prune.flow import Flow
from lightning_prune.inputs import ExampleInputs, Inputs, bind
from lightning_prune.labels import LabelArray, Labels, LabelSpace
from lightning_prune.layers.gates import ungated
from lightning_prune.rectangles import check_heads, settle
from lightning_prune.steps import Run
from lightning_prune.tensors import named_modules, named_tensors, tensors_of, unwrapped
from lightning_prune.trace import SUBSTRATES, Setting, run
from lightning_prune.types import ChannelGroup, ChannelGroups, Heads, Member

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Graph:
    """What a reading of a model gives.

    Attributes:
        groups: The channel groups in the order in which the model makes them.
        inputs: The inputs that it was read with.
        labels: Tensor name -> the labels of its positions, numbered one after the other.
        roots: For every label the smallest label that it is tied to.
        runs: How the model was run, and what happened each time.
    """

    groups: ChannelGroups
    inputs: Inputs
    labels: Mapping[str, Labels]
    roots: LabelArray
    runs: Mapping[Setting, Run]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward pass in eval mode, for the whole batch."""
        return next(iter(self.runs.values())).macs


def find_groups(
    model: nn.Module, example_inputs: ExampleInputs, ignore: Sequence[str] = (), heads: Heads = "whole"
) -> ChannelGroups:
    """Find the channels that can only go together.

    The model runs once on tensors without memory, and every operation says how the channels pass through it.
    The model is not changed: neither its mode, nor its buffers, nor the random state.

    Args:
        model: Any module.
        example_inputs: A tensor, a tuple of positional inputs, a dict of keyword inputs, or a whole batch.
        ignore: Patterns of module names that are not to be touched (`fnmatch` style); a pattern that matches a
            module covers all that is inside it.
        heads: What a channel of an attention is: "whole" takes a head with all that it holds, "inside" takes the
            same part of the width of every head, "keep" leaves attentions as they are inside.

    Returns:
        The channel groups in the order in which the model makes them, frozen ones included; print them. Names are
        those inside of `DataParallel`, `DistributedDataParallel` and `torch.compile`.

    Raises:
        ValueError: A pattern of `ignore` matches no module, or `heads` is none of the three.
        TraceError: The model's forward fails on the example inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> print(find_groups(net, torch.zeros(1, 3, 8, 8)))
        0: 8 channels, prunable
          0.weight [dim 0]
          0.bias [dim 0]
          1.weight [dim 0]
          1.bias [dim 0]
          3.weight [dim 1]
          1.running_mean [dim 0]
          1.running_var [dim 0]
        3: 4 channels, frozen: reaches the model's output
          3.weight [dim 0]
          3.bias [dim 0]
    """
    return read(model, example_inputs, ignore, heads).groups


def read(model: nn.Module, example_inputs: ExampleInputs, ignore: Sequence[str] = (), heads: Heads = "whole") -> Graph:
    """Find the channel groups and keep what is needed to verify a cut; see `find_groups`. Gates are not read."""
    check_model(model)
    check_heads(heads)
    with ungated(model), collector_held():
        return _read(unwrapped(model), example_inputs, ignore, heads)


def _read(model: nn.Module, example_inputs: ExampleInputs, ignore: Sequence[str], heads: Heads) -> Graph:
    ignored = ignored_tensors(model, ignore)
    inputs = bind(model, example_inputs)
    tensors = named_tensors(model)
    index = _Index({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    flow, runs, unread = _run_all(model, inputs, tensors, index)
    for name, pattern in ignored.items():
        for labels in index.labels.get(name, ()):
            flow.freeze(labels, f"is ignored by the pattern {pattern!r}")
    for name in unread:
        for labels in index.labels[name]:
            flow.freeze(labels, "is not used by the forward pass")
    settle(flow.space, flow.rectangles, flow.attended, len(index.tensor_dim), heads)
    if flow.unknown:
        warnings.warn(
            f"No handler for {', '.join(sorted(flow.unknown))}: the channels that enter there are frozen. "
            "Write one (CONTRIBUTING.md, 'Add an op handler'), or ignore this if those layers may stay as they are.",
            stacklevel=4,
        )
    return Graph(ChannelGroups(_groups(flow, index)), inputs, index.labels, flow.space.roots(), runs)


def check_model(model: object) -> None:
    """Refuse what cannot be read.

    Raises:
        TypeError: It is no module, or a compiled script.
        TraceError: It has lazy layers that have not seen an input yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a torch.nn.Module; got {type(model).__name__}.")
    modules = named_modules(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules.values()):
        raise TypeError("`model` holds a ScriptModule, which cannot be cut; pass the module that it was made from.")
    lazy = [name for name, tensor in tensors_of(modules).items() if isinstance(tensor, UninitializedParameter)]
    if lazy:
        raise TraceError(f"{lazy[0]} has no shape yet: run a lazy model once before it is read.")


def ignored_tensors(model: nn.Module, patterns: object) -> dict[str, str]:
    """Return tensor name -> the pattern that protects it.

    Raises:
        ValueError: A pattern matches no module.
        TypeError: `patterns` is a single string, or no sequence of strings.
    """
    if isinstance(patterns, str):
        raise TypeError(f"`ignore` is a sequence of patterns; got the string {patterns!r}: put it in a list.")
    if not isinstance(patterns, Iterable) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"`ignore` is a sequence of patterns of module names, such as ['head*']; got {patterns!r}.")
    modules = named_modules(model) if patterns else {}
    protected: dict[str, str] = {}
    for pattern in patterns:
        matching = [name for name in modules if name and fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(
                f"`ignore` pattern {pattern!r} matches no module. Modules are named as `model.named_modules()` "
                f"prints them, for example {', '.join(list(modules)[1:4])}."
            )
        for name in matching:
            own = [*modules[name].named_parameters(name), *modules[name].named_buffers(name)]
            protected.update({tensor: pattern for tensor, _ in own})
    return protected


def _run_all(
    model: nn.Module, inputs: Inputs, tensors: Mapping[str, Tensor], index: _Index
) -> tuple[Flow, dict[Setting, Run], set[str]]:
    """Run in eval mode, and in train mode too where that reaches parameters which eval mode leaves unread."""
    setting, flow, evaluated = _run_eval(model, inputs, tensors, index)
    runs, unread = {setting: evaluated}, evaluated.unread
    hidden = {name for name in unread if isinstance(tensors[name], nn.Parameter)}
    if hidden:
        train = Setting(setting.substrate, training=True)
        try:
            runs[train] = run(model, inputs, train, flow, tensors, index.labels)
            unread = unread & runs[train].unread
        except Exception as error:
            warnings.warn(
                f"{len(hidden)} parameters, {min(hidden)} among them, are not read in eval mode, and the forward fails "
                f"in train mode: {error}. If they are part of the training, pass inputs that train mode accepts.",
                stacklevel=4,
            )
    return flow, runs, unread


def _run_eval(
    model: nn.Module, inputs: Inputs, tensors: Mapping[str, Tensor], index: _Index
) -> tuple[Setting, Flow, Run]:
    """Run on the lightest tensors that the model accepts."""
    failure: Exception | None = None
    for substrate in SUBSTRATES:
        setting, flow = Setting(substrate), Flow(LabelSpace(len(index.tensor_dim)))
        try:
            done = run(model, inputs, setting, flow, tensors, index.labels)
        except TraceError:
            raise
        except Exception as error:
            log.debug("forward on %s tensors failed", substrate, exc_info=error)
            failure = error
        else:
            if substrate == "real":
                warnings.warn(
                    "The forward pass depends on values, so it was read on the real tensors: what was found holds "
                    "for the branches that these example inputs take.",
                    stacklevel=5,
                )
            return setting, flow, done
    raise TraceError(
        f"The forward of {type(model).__name__} fails on `example_inputs`: {type(failure).__name__}: {failure}. "
        "Pass inputs of the shape and dtype that the model is trained on."
    ) from failure


class _Index:
    """Numbers the positions of all dimensions of all tensors one after the other.

    Args:
        shapes: Tensor name -> its shape.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.places = [(name, dim) for name, shape in shapes.items() for dim in range(len(shape))]
        sizes = [size for shape in shapes.values() for size in shape]
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self.tensor_dim: LabelArray = np.repeat(np.arange(len(sizes)), sizes)
        self.position: LabelArray = np.arange(starts[-1]) - starts[self.tensor_dim]
        ranges = (np.arange(start, stop) for start, stop in pairwise(starts))
        self.labels: dict[str, Labels] = {name: tuple(next(ranges) for _ in shape) for name, shape in shapes.items()}


def _groups(flow: Flow, index: _Index) -> Iterator[ChannelGroup]:
    """Gather the labels into channels, and the channels that live in the same places into groups."""
    count = len(index.tensor_dim)
    if not count:
        return
    roots = flow.space.roots()
    reason, reasons = flow.space.reasons()
    made = _made_order(flow, roots)
    order = np.argsort(roots[:count], kind="stable")  # labels are numbered by tensor, dimension and position
    sorted_roots = roots[order]
    start = np.flatnonzero(np.diff(sorted_roots, prepend=-1))
    channel_root = sorted_roots[start]
    length = np.diff(np.append(start, count))
    signature = _signatures(flow, index, order, start, channel_root)
    keep = np.flatnonzero(
        (made[channel_root] >= 0) | ((reason[channel_root] < 0) & _spans_tensors(index, order, start))
    )
    if not len(keep):
        return
    alike = signature[keep] + _hashes(len(reasons) + 1)[reason[channel_root[keep]]] * length[keep].astype(np.uint64)
    by_kind = np.argsort(alike, kind="stable")
    found = []
    for channels in np.split(keep[by_kind], np.flatnonzero(np.diff(alike[by_kind])) + 1):
        cells = order[start[channels][:, None] + np.arange(length[channels[0]])]
        frozen = reason[channel_root[channels[0]]]
        first = made[channel_root[channels]].min()
        found.append((first if first >= 0 else len(made), cells, reasons[frozen] if frozen >= 0 else None))
    yield from _named(sorted(found, key=lambda item: (item[0], item[1].min())), flow, index)


def _signatures(
    flow: Flow, index: _Index, order: LabelArray, start: LabelArray, channel_root: LabelArray
) -> NDArray[np.uint64]:
    """Return a number for every channel, the same for channels that live in the same places and go the same ways."""
    hashes = _hashes(len(index.places) + len(flow.marks))
    signature: NDArray[np.uint64] = np.add.reduceat(hashes[index.tensor_dim[order]], start)
    roots = flow.space.roots()
    for mark, part in zip(hashes[len(index.places) :], flow.marks, strict=True):
        marked = np.unique(roots[part])
        place = np.searchsorted(channel_root, marked)
        inside = place < len(channel_root)
        hit = place[inside][channel_root[place[inside]] == marked[inside]]
        signature[hit] += mark
    return signature


def _made_order(flow: Flow, roots: LabelArray) -> LabelArray:
    """Return for every root when it was first made, counted in makings, or -1."""
    first = np.full(len(roots), -1)
    for moment, labels in reversed(list(enumerate(flow.made))):
        first[roots[labels]] = moment
    return first


def _spans_tensors(index: _Index, order: LabelArray, start: LabelArray) -> LabelArray:
    places = index.tensor_dim[order]
    low, high = np.minimum.reduceat(places, start), np.maximum.reduceat(places, start)
    spans: LabelArray = low != high
    return spans


def _hashes(count: int) -> NDArray[np.uint64]:
    """Return well mixed 64-bit numbers (splitmix64), so that a sum of them tells a set of places."""
    with np.errstate(over="ignore"):
        mixed: NDArray[np.uint64] = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def _named(found: Sequence[tuple[int, LabelArray, str | None]], flow: Flow, index: _Index) -> Iterator[ChannelGroup]:
    """Give each group the name of the module that makes its channels."""
    makers = _maker_places(flow, index)
    taken: dict[str, int] = {}
    for moment, cells, frozen in found:
        places = index.tensor_dim[cells[0]]
        maker = next((place for place in makers.get(moment, ()) if place in places), places[0])
        rank = np.argsort(index.position[cells[:, int(np.argmax(places == maker))]], kind="stable")
        tensor = index.places[maker][0]
        name = tensor.rpartition(".")[0] or tensor
        seen = taken[name] = taken.get(name, 0) + 1
        members = tuple(_members(cells[rank], places, index))
        yield ChannelGroup(name if seen == 1 else f"{name}#{seen}", len(cells), members, frozen)


def _maker_places(flow: Flow, index: _Index) -> dict[int, list[int]]:
    """Return for each making the tensor dimensions whose own labels it passed on."""
    count = len(index.tensor_dim)
    places = (index.tensor_dim[labels[labels < count]] for labels in flow.made)
    return {
        moment: list(dict.fromkeys(part[np.flatnonzero(np.diff(part, prepend=-1))].tolist()))
        for moment, part in enumerate(places)
    }


def _members(cells: LabelArray, places: LabelArray, index: _Index) -> Iterator[Member]:
    """Tell the places of a group's channels; the cells of each channel are numbered in the order of their places."""
    starts = np.flatnonzero(np.diff(places, prepend=-1)).tolist()
    for start, stop in pairwise([*starts, len(places)]):
        tensor, dim = index.places[places[start]]
        yield Member(tensor, dim, torch.from_numpy(index.position[cells[:, start:stop]]))
