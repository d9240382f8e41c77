"""Runs a model once on tensors without memory while handlers carry the labels along."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from lightning_prune.chance import random_state_kept
from lightning_prune.errors import TraceError
from lightning_prune.flow import Flow
from lightning_prune.handlers import Call, Handler, factories, handler_for, movement, name_of
from lightning_prune.inputs import Inputs, flat_tensors, tensors_in
from lightning_prune.labels import Labels
from lightning_prune.meta import kernel_for
from lightning_prune.steps import Origin, Run, Seen, Sized, Step, Work
from lightning_prune.tensors import swapped
from lightning_prune.types import Attributes

log = logging.getLogger(__name__)
_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")

Substrate: TypeAlias = Literal["meta", "fake", "real"]
"""What the model runs on: tensors that are only shapes, shapes that know their device, or copies of the real ones."""

SUBSTRATES: tuple[Substrate, ...] = ("meta", "fake", "real")


@dataclass(frozen=True)
class Setting:
    """How a model is run.

    Attributes:
        substrate: What stands in for its tensors.
        training: Whether its modules are in train mode.
    """

    substrate: Substrate
    training: bool = False


class Watcher:
    """Looks on while a model runs; what it raises ends the run."""

    def before(self, name: str) -> Step | None:
        """See the name of the operation that comes next; return its like in the dense run, if there is one."""
        return None

    def after(self, step: Step) -> None:
        """See what an operation has done."""


def run(
    model: nn.Module,
    inputs: Inputs,
    setting: Setting,
    flow: Flow,
    tensors: Mapping[str, Tensor],
    labels: Mapping[str, Labels],
    attributes: Attributes | None = None,
    watcher: Watcher | None = None,
) -> Run:
    """Run the model once and let the labels flow; the model is afterwards what it was.

    Args:
        model: The model; its mode, buffers, attributes and the random state are restored.
        inputs: What forward is called with.
        setting: The substrate and the mode.
        flow: Collects ties, frozen labels and the operations nobody has described.
        tensors: Name -> tensor to use in place of the model's own (of another shape in a trial cut).
        labels: Name -> labels of that tensor.
        attributes: Module attributes to set for the run.
        watcher: Looks on.

    Returns:
        What happened.

    Raises:
        TraceError: The model returned no tensor.
        Exception: Whatever the model's forward raises.
    """
    with ExitStack() as stack:
        make = _maker(setting.substrate, stack)
        standins = {name: make(tensor) for name, tensor in tensors.items()}
        for name, standin in standins.items():
            setattr(standin, _ORIGIN, name)
        for name, labelled in labels.items():
            flow.put(standins[name], labelled)
        stack.enter_context(swapped(model, standins, training=setting.training, attributes=attributes))
        stack.enter_context(random_state_kept(of_devices=setting.substrate == "real"))
        stack.enter_context(_in_small_steps())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        given = (inputs.map(_at_least_two) if setting.training else inputs).map(make)
        tracer = Tracer(flow, standins, watcher, meta=setting.substrate == "meta")
        stack.enter_context(tracer)
        outputs = list(_returned(given.call(model)))
    if not outputs:
        raise TraceError("The model's forward returned no tensor; wrap it so that it returns what it computes.")
    for output in outputs:
        flow.read_taint(output)
        flow.freeze_tensor(output, "reaches the model's output")
    shapes = [tuple(output.shape) for output in outputs]
    return Run(tracer.steps, shapes, {_origin(output) for output in outputs}, set(tracer.unread.values()))


_ORIGIN = "_lightning_prune_origin"


def _origin(tensor: Tensor) -> Origin:
    """Return where a tensor comes from."""
    origin: Origin = getattr(tensor, _ORIGIN, None)
    return origin


def _told(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of an operation without its tensors."""
    return tuple([_seen(value) for value in call.args]), {name: _seen(value) for name, value in call.kwargs.items()}


def _seen(value: Any) -> Any:
    """Put `Seen` for the tensors in an argument."""
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout is torch.strided else ()
        return Seen(_origin(value), value.dtype, strides)
    return [_seen(item) for item in value] if type(value) in (list, tuple) else value


def _shapes(call: Call, dense: Step) -> dict[int, tuple[int, ...]]:
    """Return id -> shape in the dense run for the tensors of an operation."""
    results = [shape for shape, _ in dense.outputs]
    going_out = zip(flat_tensors((call.out,)), results, strict=False)
    going_in = zip(call.tensors, dense.inputs, strict=False)
    return {id(tensor): shape for tensor, shape in (*going_out, *going_in) if tensor.dim() == len(shape)}


def _returned(value: Any) -> Iterator[Tensor]:
    """Yield the tensors that a model returned, in an object of its own class too."""
    found = list(tensors_in(value))
    return iter(found or tensors_in(getattr(value, "__dict__", ())))


@contextmanager
def _in_small_steps() -> Iterator[None]:
    """Switch off what does the work of several operations in one: fused attention, transformer and recurrent layers."""
    transformers, recurrent = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # `torch.backends.mkldnn.flags` warns of settings that it touches besides
    try:
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(transformers)
        torch._C._set_mkldnn_enabled(recurrent)


def _at_least_two(tensor: Tensor) -> Tensor:
    """Repeat a batch of one, which BatchNorm refuses in train mode."""
    return torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == 1 else tensor


def _maker(substrate: Substrate, stack: ExitStack) -> Any:
    """Return the function that makes a stand-in of a tensor."""
    if substrate == "meta":
        return _weightless
    if substrate == "fake":
        stack.callback(_FAKE_LOG.setLevel, _FAKE_LOG.level)
        _FAKE_LOG.setLevel(logging.CRITICAL)  # it writes of errors that are raised as well
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        return lambda tensor: mode.from_tensor(tensor.detach(), static_shapes=True)
    return lambda tensor: tensor.detach().clone()


def _weightless(tensor: Tensor) -> Tensor:
    """Return a tensor without memory; numbers that code may look at, such as masks and positions, stay real."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return tensor.detach().to("cpu", copy=True)


_MAKE_LABELS = (factories.uniform, movement.expand, movement.repeat)
"""Handlers that have something to say about tensors without labels too."""

_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten._unsafe_index.Tensor)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is the same in all calls of an operation, looked up once.

    Attributes:
        name: The operation's name.
        handler: What carries labels through it.
        kernel: What does its work on meta tensors quickly.
        formula: What it costs.
        makes: Whether its handler makes labels where there were none.
        moves: Whether labels can go through it at all.
        by_value: Whether the size of what it returns can depend on values.
    """

    name: str
    handler: Handler | None
    kernel: Callable[..., Any] | None
    formula: Callable[..., int] | None
    makes: bool
    moves: bool
    by_value: bool


@cache
def _kind_of(op: OpOverload) -> _Kind:
    handler, formula = handler_for(op), flop_registry.get(op.overloadpacket)
    by_value = op in _INDEXING or torch.Tag.dynamic_output_shape in op.tags or op.name() == "torchvision::nms"
    return _Kind(
        name_of(op),
        handler,
        kernel_for(op),
        None if formula is None else formula.__wrapped__,
        handler in _MAKE_LABELS,
        op.namespace != "prim",
        by_value,
    )


def _work(flow: Flow, call: Call, formula: Callable[..., int]) -> Work | None:
    """Note what an operation costs."""
    if not isinstance(call.out, Tensor):
        return None
    args = tuple([Sized(value.shape, flow.of(value)) if isinstance(value, Tensor) else value for value in call.args])
    return Work(formula, args, (call.out.shape, flow.of(call.out)))


def _is_by_value(call: Call) -> bool:
    """Tell whether the size of what such an operation returns depends on values: indexing does so only with a mask."""
    return call.op not in _INDEXING or any(index.dtype in (torch.bool, torch.uint8) for index in call.tensors[1:])


def _is_float(dtype: torch.dtype | None) -> bool:
    return dtype is None or dtype.is_floating_point or dtype.is_complex


class Tracer(TorchDispatchMode):
    """Shows each operation to its handler; one without a handler freezes the channels it reads.

    Args:
        flow: What the handlers work with.
        standins: Name -> tensor of the model.
        watcher: Looks on; without one the arguments of each step are noted.
        meta: Whether the model runs on meta tensors, which do not mix with those of other devices.

    Attributes:
        steps: The operations so far.
        unread: id -> name of the tensors of the model that no operation has read yet.
    """

    def __init__(self, flow: Flow, standins: Mapping[str, Tensor], watcher: Watcher | None, *, meta: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flow, self._watcher, self._meta = flow, watcher or Watcher(), meta
        self._taping = watcher is None  # who looks on compares what steps did, not what they were given
        self.steps: list[Step] = []
        self.unread = {id(tensor): name for name, tensor in standins.items()}
        self._results = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given, kind = kwargs or {}, _kind_of(func)
        if self._meta and kind.handler is factories.uniform and _is_float(given.get("dtype")):
            given = {**given, "device": torch.device("meta")}
        self._flow.current = (kind.name, (args, given))
        dense = self._watcher.before(kind.name)
        call = self._called(func, kind.kernel if self._meta else None, args, given)
        if dense is not None:
            self._flow.told = _shapes(call, dense)
        self._explain(call, kind)
        return call.out

    def _called(
        self, func: OpOverload, kernel: Callable[..., Any] | None, args: tuple[Any, ...], given: Mapping[str, Any]
    ) -> Call:
        out = None if kernel is None else kernel(*args, **given)
        if out is not None:
            return Call(func, args, given, out)
        try:
            return Call(func, args, given, func(*args, **given))
        except (RuntimeError, NotImplementedError):
            if not self._meta or all(tensor.is_meta for tensor in tensors_in((args, given))):
                raise
            args, given = tree_map(self._to_meta, (args, given))
            return Call(func, args, given, func(*args, **given))

    def _to_meta(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        twin = torch.empty_like(value, device="meta")
        self._flow.put(twin, self._flow.of(value))
        return twin

    def _explain(self, call: Call, kind: _Kind) -> None:
        labelled = False
        for tensor in call.tensors:
            self.unread.pop(id(tensor), None)
            self._flow.read_taint(tensor)
            labelled = labelled or self._flow.is_labelled(tensor)
        space = self._flow.space
        made, decided = len(space.allocations), len(space.decisions)
        if kind.makes or (labelled and kind.moves):
            self._carry(call, kind.handler)
        results = flat_tensors((call.out,))
        if results:
            args, kwargs = _told(call) if self._taping else ((), {})
            step = Step(
                name=kind.name,
                op=call.op,
                args=args,
                kwargs=kwargs,
                results=self._number(results),
                inputs=tuple([tensor.shape for tensor in call.tensors]),
                outputs=tuple([(out.shape, self._flow.of(out)) for out in results]),
                fresh=tuple(space.allocations[made:]),
                decisions=tuple(space.decisions[decided:]),
                work=None if kind.formula is None else _work(self._flow, call, kind.formula),
                by_value=kind.by_value and _is_by_value(call),
            )
            self.steps.append(step)
            self._watcher.after(step)

    def _number(self, results: list[Tensor]) -> tuple[int, ...]:
        """Number the tensors that a step returns."""
        numbers = tuple(range(self._results, self._results + len(results)))
        self._results += len(results)
        for number, tensor in zip(numbers, results, strict=True):
            setattr(tensor, _ORIGIN, number)
        return numbers

    def _carry(self, call: Call, handler: Handler | None) -> None:
        reason = f"enters {call.name}, which has no handler"
        if handler is not None:
            try:
                return handler(self._flow, call)
            except Exception as error:
                log.debug("handler of %s failed", call.name, exc_info=error)
                reason = f"enters {call.name} in a form that its handler does not know ({error})"
        if any(part is not None for tensor in call.tensors for part in self._flow.of(tensor)):
            self._flow.unknown.add(call.name)
        for tensor in call.tensors:
            self._flow.freeze_tensor(tensor, reason)
        return None
