"""Notes down what a run does, operation by operation, or why it cannot be resumed.

Of each operation is noted what it is called with, what it returns, and into whose memory it writes:
all that is needed to tell whether a later run does the same, and what of an earlier one is still read at some place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from lightning_prune.inputs import Inputs, flat_tensors, tensors_in
from lightning_prune.reconstruction.observer import Work
from lightning_prune.tensors import named_tensors

aten = torch.ops.aten

_LARGEST_CONSTANT = 2**20
"""Bytes of a tensor from outside up to which it is looked at in each run."""

_BY_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_INDEXING = (aten.index.Tensor, aten._unsafe_index.Tensor)
_TAG = "_lightning_prune_resuming"

Origin: TypeAlias = int | str | None
"""Where a tensor comes from: the number of a result, the name of one of the network's or an input, or neither."""


@dataclass(frozen=True, slots=True)
class New:
    """A result that is a tensor of its own."""

    number: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def blank(self) -> Tensor:
        """Return what stands for it where nobody reads its values."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class Back:
    """A result that is one of the tensors that the operation was given."""

    place: int


@dataclass(frozen=True, slots=True)
class Call:
    """What an operation is called with.

    Attributes:
        op: The operation.
        plain: Its arguments without the tensors.
        origins: Where the tensors come from.
    """

    op: OpOverload
    plain: Any
    origins: tuple[Origin, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """An operation as it was noted.

    Attributes:
        call: What it was called with.
        constants: The tensors among that which come from outside.
        results: What it returned.
        form: The kind of sequence that it returned; None for a single value.
    """

    call: Call
    constants: tuple[Tensor, ...]
    results: tuple[Any, ...]
    form: type | None


@dataclass
class Recording:
    """What a run has done, from the images to the end.

    Attributes:
        steps: The operations.
        starts: Name of a layer -> the place of its first call among them.
        made: Number of a result -> the place of the operation that made it.
        last_read: Number of a result -> the place of the last operation that reads it.
        memory: Number of a result -> the number of the first in the same memory; None for memory from outside.
        last_written: Number of such a first result -> the last operation that writes into its memory.
        first_read: Name of one of the network's tensors -> the first operation that reads it.
        refusal: Why a run cannot be resumed; empty if it can.
        is_checked: Whether a resumed run was seen to give what a full one gives.
    """

    steps: list[Step] = field(default_factory=list)
    starts: dict[str, int] = field(default_factory=dict)
    made: dict[int, int] = field(default_factory=dict)
    last_read: dict[int, int] = field(default_factory=dict)
    memory: dict[int, int | None] = field(default_factory=dict)
    last_written: dict[int, int] = field(default_factory=dict)
    first_read: dict[str, int] = field(default_factory=dict)
    refusal: str = ""
    is_checked: bool = False

    def live(self, at: int) -> set[int]:
        """Return the results from before a place that are read there or later."""
        return {number for number, last in self.last_read.items() if self.made[number] < at <= last}

    def spoiled(self, at: int) -> set[int]:
        """Return those of them into whose memory something is written there or later."""
        written = {memory for memory, last in self.last_written.items() if last >= at}
        return {number for number in self.live(at) if self.memory[number] in written}


class Run(Work):
    """Knows where each tensor of a run comes from."""

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        self._own = {id(tensor): name for name, tensor in named_tensors(network).items()}
        self._inputs = list(tensors_in((inputs.args, dict(inputs.kwargs))))
        self._own.update({id(tensor): f"<{place}>" for place, tensor in enumerate(self._inputs)})
        self._mark = object()  # tensors may live on in the network, with numbers of earlier runs

    def called(self, op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: list[Tensor]) -> Call:
        """Return what an operation is called with."""
        origins = tuple([self._origin(tensor) for tensor in tensors])
        return Call(op, (_plain(args), tuple([(key, _plain(value)) for key, value in kwargs.items()])), origins)

    def _origin(self, tensor: Tensor) -> Origin:
        mark, number = getattr(tensor, _TAG, (None, 0))
        return number if mark is self._mark else self._own.get(id(tensor))

    def number(self, tensor: Tensor, number: int) -> None:
        """Mark a tensor as the result of that number in this run."""
        setattr(tensor, _TAG, (self._mark, number))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Tensor
    return tuple([_plain(item) for item in value]) if type(value) in (list, tuple) else value


class Recorder(Run):
    """Notes what a run does while it does it."""

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        super().__init__(network, inputs)
        self.recording = Recording()
        self._sizes: dict[int, tuple[Any, ...]] = {}

    def starts(self, name: str) -> None:
        """Note where a layer is first called."""
        self.recording.starts.setdefault(name, len(self.recording.steps))

    def __call__(self, op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Do an operation, and note it as long as nothing was refused."""
        if self._refuse(""):
            return op(*args, **kwargs)
        tensors = flat_tensors((*args, *kwargs.values()))
        call, place = self.called(op, args, kwargs, tensors), len(self.recording.steps)
        constants = [tensor for tensor, origin in zip(tensors, call.origins, strict=True) if origin is None]
        if self._refuse(_why_not(op, tensors, kwargs) or _too_large(constants)):
            return op(*args, **kwargs)
        held, draws = tuple([tensor.clone() for tensor in constants]), _draws(op, tensors)
        out = op(*args, **kwargs)
        self._refuse("it draws random numbers" if draws is not None and draws != _draws(op, tensors) else "")
        if self._refuse(next(filter(None, map(_unusual, flat_tensors((out,)))), "")):
            return out
        for origin in call.origins:
            if isinstance(origin, int):
                self.recording.last_read[origin] = place
            elif origin is not None and not origin.startswith("<"):
                self.recording.first_read.setdefault(origin, place)
        for tensor in _written(op, args, kwargs):
            self._write(self._origin(tensor), place)
        form = type(out) if isinstance(out, (list, tuple)) else None
        values = (out,) if form is None else tuple(out)
        results = tuple([self._result(value, tensors, place) for value in values])
        self.recording.steps.append(Step(call, held, results, form))
        return out

    def _refuse(self, reason: str) -> bool:
        """Note a reason, if there is one; tell whether there was one already."""
        self.recording.refusal = self.recording.refusal or reason
        return bool(self.recording.refusal)

    def _memory(self, origin: Origin) -> int | None:
        return self.recording.memory[origin] if isinstance(origin, int) else None

    def _write(self, origin: Origin, place: int) -> None:
        memory = self._memory(origin)
        if memory is None:
            self._refuse("it writes into what outlives the run")
        else:
            self.recording.last_written[memory] = place

    def _result(self, value: Any, tensors: list[Tensor], place: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        back = next((at for at, tensor in enumerate(tensors) if tensor is value), None)
        sizes = (value.shape, value.stride())
        if back is not None:
            origin = self._origin(value)
            if isinstance(origin, int) and self._sizes[origin] != sizes:
                self._refuse("it changes a tensor's shape in place")
            return Back(back)
        number, storage = len(self._sizes), value.untyped_storage()._cdata
        source = next((tensor for tensor in tensors if tensor.untyped_storage()._cdata == storage), None)
        self._sizes[number] = sizes
        self.recording.memory[number] = number if source is None else self._memory(self._origin(source))
        self.recording.made[number] = place
        self.number(value, number)
        return New(number, *sizes, value.dtype, value.device)


def _why_not(op: OpOverload, tensors: list[Tensor], kwargs: Mapping[str, Any]) -> str:
    """Tell why nothing that comes behind an operation can be resumed."""
    if any(tag in op.tags for tag in _BY_VALUE) or op.name() == "torchvision::nms":
        return f"{op} depends on values"
    if op in _INDEXING and any(index.dtype in (torch.bool, torch.uint8) for index in tensors[1:]):
        return f"{op} depends on values"
    if torch.is_grad_enabled():
        return "it computes gradients"
    if kwargs.get("generator") is not None:
        return "it draws random numbers"
    return next(filter(None, map(_unusual, tensors)), "")


def _unusual(tensor: Tensor) -> str:
    """Tell why a tensor cannot be kept or stood for."""
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
    is_usual = plain and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    return "" if is_usual else f"it works with {type(tensor).__name__} of layout {tensor.layout}"


def _too_large(constants: list[Tensor]) -> str:
    large = any(constant.nbytes > _LARGEST_CONSTANT for constant in constants)
    return "it reads large tensors that are not its own" if large else ""


def _draws(op: OpOverload, tensors: list[Tensor]) -> list[bytes] | None:
    """Return the state of what an operation may draw from; None where it does not."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return None
    states = [torch.get_rng_state()]
    states += [torch.cuda.get_rng_state(device) for device in {tensor.device for tensor in tensors if tensor.is_cuda}]
    return [state.numpy().tobytes() for state in states]


@cache
def _writes(op: OpOverload) -> tuple[tuple[int, str], ...]:
    """Return the places and names of the arguments that an operation writes into."""
    arguments = enumerate(op._schema.arguments)
    return tuple([(at, arg.name) for at, arg in arguments if arg.alias_info is not None and arg.alias_info.is_write])


def _written(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return flat_tensors([args[at] if at < len(args) else kwargs.get(name) for at, name in _writes(op)])
