"""The cut as a transaction: tried out and verified first, then done at once or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.cut import Cut, cut_tensor, prepare, uncut_tensor
from lightning_prune.errors import SurgeryError
from lightning_prune.graph import Graph
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


def apply(model: nn.Module, cut: Cut, notes: Mapping[str, object] | None = None) -> Undo:
    """Make all new tensors, then put them in their places; if anything fails, everything is what it was.

    Args:
        model: The model, changed in place.
        cut: What is done.
        notes: Entries of the model's `__dict__` that are set together with the cut.

    Returns:
        What takes the cut back.
    """
    return _exchange_all(
        model, cut, lambda tensor, name: cut_tensor(tensor, cut.kept[name]), cut.attributes, notes or {}
    )


def revert(model: nn.Module, cut: Cut, notes: Mapping[str, object] | None = None) -> Undo:
    """Give a model the shapes and attributes that it had before a cut; what had gone comes back as zeros.

    Args:
        model: The model, changed in place.
        cut: What was done.
        notes: Entries of the model's `__dict__` that are set together with it.

    Returns:
        What does the cut again, with the weights that there are now.
    """
    return _exchange_all(
        model, cut, lambda tensor, name: uncut_tensor(tensor, cut.kept[name], cut.shapes[name]), cut.before, notes or {}
    )


def _exchange_all(
    model: nn.Module,
    cut: Cut,
    change: Callable[[Tensor, str], Tensor],
    attributes: Attributes,
    notes: Mapping[str, object],
) -> Undo:
    tensors = {name: tensor for name, tensor in named_tensors(model).items() if name in cut.kept}
    with torch.inference_mode(False), torch.no_grad():
        data = {name: change(tensor, name) for name, tensor in tensors.items()}
        gradients = {name: change(tensor.grad, name) for name, tensor in tensors.items() if tensor.grad is not None}
        return _put_in_place(model, tensors, data, gradients, attributes, notes)


def _put_in_place(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    data: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    attributes: Attributes,
    notes: Mapping[str, object],
) -> Undo:
    modules = named_modules(model)
    own = dict(model.__dict__)
    before = {name: (tensor.data, tensor.grad) for name, tensor in tensors.items()}
    sizes = {name: {key: getattr(modules[name], key) for key in values} for name, values in attributes.items()}

    def undo() -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name, (old, gradient) in before.items():
                _exchange(tensors[name], old, gradient)
        for name, values in sizes.items():
            modules[name].__dict__.update(values)
        for key in notes:
            model.__dict__.pop(key, None)
        model.__dict__.update({key: own[key] for key in notes if key in own})
        _forget_what_was_computed(model)

    try:
        for name, new in data.items():
            _exchange(tensors[name], new, gradients.get(name))
        for name, values in attributes.items():
            set_attributes(modules[name], values)
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
