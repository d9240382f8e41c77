"""Runs a model once on tensors without memory while handlers carry the labels along."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lightning_prune.errors import TraceError
from lightning_prune.handlers import Call, factories, handler_for, tensors_in
from lightning_prune.inputs import Inputs
from lightning_prune.labels import Flow, Labels
from lightning_prune.tensors import swapped
from lightning_prune.types import Attributes

log = logging.getLogger(__name__)

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


def run(
    model: nn.Module,
    inputs: Inputs,
    setting: Setting,
    flow: Flow,
    tensors: Mapping[str, Tensor],
    labels: Mapping[str, Labels],
    attributes: Attributes | None = None,
) -> tuple[list[tuple[int, ...]], set[str]]:
    """Run the model once and let the labels flow; the model is afterwards what it was.

    Args:
        model: The model; its mode, buffers, attributes and the random state are restored.
        inputs: What forward is called with.
        setting: The substrate and the mode.
        flow: Collects ties, frozen labels and the operations nobody has described.
        tensors: Name -> tensor to use in place of the model's own (of another shape in a trial cut).
        labels: Name -> labels of that tensor.
        attributes: Module attributes to set for the run.

    Returns:
        The shapes of the output tensors, and the names of the tensors that no operation has read.

    Raises:
        TraceError: The model returned no tensor.
        Exception: Whatever the model's forward raises.
    """
    with ExitStack() as stack:
        make = _maker(setting.substrate, stack)
        standins = {name: make(tensor) for name, tensor in tensors.items()}
        for name, labelled in labels.items():
            flow.put(standins[name], labelled)
        stack.enter_context(swapped(model, standins, training=setting.training, attributes=attributes))
        generators = range(torch.cuda.device_count()) if setting.substrate == "real" else []
        stack.enter_context(torch.random.fork_rng(devices=generators))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        unread = {id(tensor): name for name, tensor in standins.items()}
        given = (inputs.map(_at_least_two) if setting.training else inputs).map(make)
        stack.enter_context(Tracer(flow, unread, meta=setting.substrate == "meta"))
        outputs = list(tensors_in(given.call(model)))
    if not outputs:
        raise TraceError("The model's forward returned no tensor; wrap it so that it returns what it computes.")
    for output in outputs:
        flow.read_taint(output)
        flow.freeze_tensor(output, "reaches the model's output")
    return [tuple(output.shape) for output in outputs], set(unread.values())


def _at_least_two(tensor: Tensor) -> Tensor:
    """Repeat a batch of one, which BatchNorm refuses in train mode."""
    return torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == 1 else tensor


def _maker(substrate: Substrate, stack: ExitStack) -> Any:
    """Return the function that makes a stand-in of a tensor."""
    if substrate == "meta":
        return lambda tensor: torch.empty_like(tensor.detach(), device="meta")
    if substrate == "fake":
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        return lambda tensor: mode.from_tensor(tensor.detach(), static_shapes=True)
    return lambda tensor: tensor.detach().clone()


class Tracer(TorchDispatchMode):
    """Shows each operation to its handler; one without a handler freezes the channels it reads.

    Args:
        flow: What the handlers work with.
        unread: id -> name of the tensors that no operation has read yet; emptied while the model runs.
        meta: Whether the model runs on meta tensors, which do not mix with those of other devices.
    """

    def __init__(self, flow: Flow, unread: dict[int, str], *, meta: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flow, self._unread, self._meta = flow, unread, meta

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if self._meta and handler_for(func) is factories.uniform:
            given["device"] = torch.device("meta")
        self._flow.current = (str(func), (args, given))
        try:
            out = func(*args, **given)
        except (RuntimeError, NotImplementedError):
            if not self._meta or all(tensor.is_meta for tensor in tensors_in((args, given))):
                raise
            args, given = tree_map(self._to_meta, (args, given))
            out = func(*args, **given)
        self._explain(Call(func, args, given, out))
        return out

    def _to_meta(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        twin = torch.empty_like(value, device="meta")
        self._flow.put(twin, self._flow.of(value))
        return twin

    def _explain(self, call: Call) -> None:
        labelled = False
        for tensor in call.tensors:
            self._unread.pop(id(tensor), None)
            self._flow.read_taint(tensor)
            labelled = labelled or self._flow.is_labelled(tensor)
        handler = handler_for(call.op)
        if handler is factories.uniform:
            handler(self._flow, call)
        elif labelled:
            self._carry(call)

    def _carry(self, call: Call) -> None:
        handler = handler_for(call.op)
        reason = f"enters {call.name}, which has no handler"
        if handler is not None:
            try:
                return handler(self._flow, call)
            except Exception as error:
                log.debug("handler of %s failed", call.name, exc_info=error)
                reason = f"enters {call.name} in a form that its handler does not know ({error})"
        self._flow.unknown.add(call.name)
        for tensor in call.tensors:
            self._flow.freeze_tensor(tensor, reason)
        return None
