"""The cut as a transaction: tried out and verified first, then done at once or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.cut import Cut, Offsets, cut_tensor, prepare, uncut_tensor
from lightning_prune.errors import SurgeryError
from lightning_prune.graph import Graph
from lightning_prune.selection import insert, put
from lightning_prune.tensors import named_modules, named_tensors, set_attributes, with_own_train
from lightning_prune.types import Attributes, PruningPlan
from lightning_prune.verification import verify


def remove(model: nn.Module, graph: Graph, plan: PruningPlan) -> Cut:
    """Cut the planned channels out of the model.

    The cut is tried out on tensors without memory first: the cut model runs, its outputs have the shapes of the
    dense model's, and every position that stays goes where it went before, operation by operation. Then all new
    tensors are made, and last they take their places together. Parameters stay the same objects.

    Args:
        model: The model, changed in place.
        graph: A reading of it, by `lightning_prune.graph.read`.
        plan: What goes.

    Returns:
        What was done, for the optimizer and the history.

    Raises:
        SurgeryError: The cut model would not work; `refused` names the groups and the reasons. The model is
            what it was before.
    """
    trial = verify(model, graph, plan, prepare(model, graph, plan))
    if trial.refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in trial.refused.items())
        raise SurgeryError(f"The cut was refused, the model is unchanged. {reasons}. Put these groups in `ignore`.")
    apply(model, trial.cut)
    return trial.cut


Undo: TypeAlias = Callable[[], None]
"""Takes back what was done."""


@contextmanager
def together() -> Iterator[list[Undo]]:
    """Take back all that was done inside, the latest first, if any of it fails; add an `Undo` to the list for each."""
    done: list[Undo] = []
    try:
        yield done
    except BaseException:
        for undo in reversed(done):
            undo()
        raise


def apply(
    model: nn.Module, cut: Cut, notes: Mapping[str, object] | None = None, offsets: Offsets | None = None
) -> Undo:
    """Make all new tensors, then put them in their places; if anything fails, everything is what it was.

    Args:
        model: The model, changed in place.
        cut: What is done.
        notes: Entries of the model's `__dict__` that are set together with the cut.
        offsets: What is added to tensors before they are cut; new biases are 0 without it.

    Returns:
        What takes the cut back.
    """
    offsets = offsets or Offsets()

    def change(tensor: Tensor, name: str) -> Tensor:
        return cut_tensor(tensor, cut.kept.get(name, {}))

    def moved(tensor: Tensor, name: str) -> Tensor:
        return change(_added(tensor, offsets.added[name]) if name in offsets.added else tensor, name)

    with together() as steps:
        readers = insert(model, cut.selects)
        steps.append(lambda: put(model, readers))
        modules = named_modules(model)
        biases = {name: _bias(modules[name], width, offsets.biases.get(name)) for name, width in cut.biases.items()}
        setting = _Setting(cut.attributes, biases, notes or {})
        steps.append(_exchange_all(model, [*cut.kept, *offsets.added], moved, change, setting))
    return undo_all(steps)


def undo_all(steps: Sequence[Undo]) -> Undo:
    """Return what takes back several steps, the latest first."""

    def undo() -> None:
        for step in reversed(steps):
            step()

    return undo


def _added(tensor: Tensor, offset: Tensor) -> Tensor:
    return (tensor.detach() + offset.to(tensor.device)).to(tensor.dtype)


def _bias(module: nn.Module, width: int, values: Tensor | None) -> nn.Parameter:
    """Make a bias beside a weight."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    zeros = torch.zeros(width, dtype=weight.dtype, device=weight.device)
    data = zeros if values is None else values.to(zeros)
    return nn.Parameter(data, requires_grad=weight.requires_grad)


def revert(model: nn.Module, cut: Cut, notes: Mapping[str, object] | None = None) -> Undo:
    """Give a model the shapes and attributes that it had before a cut; what had gone comes back as zeros.

    Args:
        model: The model, changed in place.
        cut: What was done.
        notes: Entries of the model's `__dict__` that are set together with it.

    Returns:
        What does the cut again, with the weights that there are now.
    """

    def change(tensor: Tensor, name: str) -> Tensor:
        return uncut_tensor(tensor, cut.kept[name], cut.shapes[name])

    with together() as steps:
        setting = _Setting(cut.before, dict.fromkeys(cut.biases), notes or {})
        steps.append(_exchange_all(model, cut.kept, change, change, setting))
        selects = {name: model.get_submodule(name) for name in cut.selects}
        steps.append(lambda: put(model, selects))
        put(model, {name: reader for name, module in selects.items() for reader in list(module.children())[1:]})
    return undo_all(steps)


@dataclass(frozen=True)
class _Setting:
    """What is set beside the tensors.

    Attributes:
        attributes: The module attributes that hold sizes.
        biases: Module name -> the bias that it gets, or None where it loses one.
        notes: Entries of the model's `__dict__`.
    """

    attributes: Attributes
    biases: Mapping[str, nn.Parameter | None]
    notes: Mapping[str, object]


def _exchange_all(
    model: nn.Module,
    names: Iterable[str],
    change: Callable[[Tensor, str], Tensor],
    change_gradient: Callable[[Tensor, str], Tensor],
    setting: _Setting,
) -> Undo:
    chosen = set(names)
    tensors = {name: tensor for name, tensor in named_tensors(model).items() if name in chosen}
    with torch.inference_mode(False), torch.no_grad():
        data = {name: change(tensor, name) for name, tensor in tensors.items()}
        gradients = {
            name: change_gradient(tensor.grad, name) for name, tensor in tensors.items() if tensor.grad is not None
        }
        return _put_in_place(model, tensors, data, gradients, setting)


def _put_in_place(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    data: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    setting: _Setting,
) -> Undo:
    attributes, notes = setting.attributes, setting.notes
    modules = named_modules(model)
    own = dict(model.__dict__)
    before = {name: (tensor.data, tensor.grad) for name, tensor in tensors.items()}
    sizes = {name: {key: getattr(modules[name], key) for key in values} for name, values in attributes.items()}
    biases = {name: modules[name]._parameters["bias"] for name in setting.biases}

    def undo() -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name, (old, gradient) in before.items():
                _exchange(tensors[name], old, gradient)
        for name, values in sizes.items():
            modules[name].__dict__.update(values)
        for name, bias in biases.items():
            modules[name]._parameters["bias"] = bias
        for key in notes:
            model.__dict__.pop(key, None)
        model.__dict__.update({key: own[key] for key in notes if key in own})
        _forget_what_was_computed(model)

    try:
        for name, new in data.items():
            _exchange(tensors[name], new, gradients.get(name))
        for name, values in attributes.items():
            set_attributes(modules[name], values)
        for name, bias in setting.biases.items():
            modules[name]._parameters["bias"] = bias
        _forget_what_was_computed(model)
        model.__dict__.update(notes)
    except BaseException:
        undo()
        raise
    return undo


def _forget_what_was_computed(model: nn.Module) -> None:
    """Let modules that keep computed tensors, such as tables of positions, drop them, by setting the mode they have."""
    modes = {module: module.training for module in named_modules(model).values()}
    for module in with_own_train(model):
        module.train(modes[module])
    for module, mode in modes.items():
        module.__dict__["training"] = mode


def _exchange(tensor: Tensor, data: Tensor, gradient: Tensor | None) -> None:
    """Give a tensor other data and keep its identity.

    A gradient accumulator that is still alive expects the old shape. It is dropped only when type or device
    change (torch/csrc/autograd/variable.cpp, VariableHooks::set_data), hence the detour through another dtype.
    """
    tensor.grad = None
    if tensor.requires_grad:
        other = torch.float32 if tensor.dtype is torch.float16 else torch.float16
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
    tensor.grad = gradient
