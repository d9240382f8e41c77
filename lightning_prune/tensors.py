"""A model's tensors by name, and other tensors put in their place for a while."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import Tensor, nn

from lightning_prune.types import Attributes


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of `DataParallel`, `DistributedDataParallel` and `torch.compile`."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
            assert inner is not None
            model = inner
        else:
            return model


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return what `named_modules` yields, in a tenth of the time."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[name] = module
        if module._modules:
            prefix = f"{name}." if name else ""
            children = reversed(module._modules.items())
            waiting.extend([(prefix + key, child) for key, child in children if child is not None])
    return found


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by their qualified names, each tensor once.

    The names and the order are those of `named_parameters` and then `named_buffers`, in a tenth of the time.
    """
    return tensors_of(named_modules(model))


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what `named_parameters` yields, in a tenth of the time."""
    return {name: tensor for name, tensor in named_tensors(model).items() if isinstance(tensor, nn.Parameter)}


def tensors_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return what `named_tensors` does, of modules that are named already."""
    held: list[tuple[str, Mapping[str, Tensor | None]]] = [
        (name, module._parameters) for name, module in modules.items()
    ]
    held += [(name, module._buffers) for name, module in modules.items()]
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for owner, tensors in held:
        for name, tensor in tensors.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{owner}.{name}" if owner else name] = tensor
    return found


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """Return one parameter or buffer by its qualified name."""
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def attributes_of(model: nn.Module, names: Attributes) -> Attributes:
    """Return the values that the attributes named in a mapping have now."""
    modules = named_modules(model)
    return {name: {key: _plain(getattr(modules[name], key)) for key in values} for name, values in names.items()}


def _plain(value: Any) -> int | tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else int(value)


def set_attributes(module: nn.Module, values: Mapping[str, int | tuple[int, ...]]) -> None:
    """Set sizes that a module keeps; a list stays a list."""
    for key, value in values.items():
        module.__dict__[key] = list(value) if isinstance(module.__dict__.get(key), list) else value  # type: ignore[arg-type]


def with_own_train(model: nn.Module) -> list[nn.Module]:
    """List the modules with a `train` of their own: some keep what they have computed, and forget it there."""
    return _with_own_train(named_modules(model).values())


def _with_own_train(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if type(module).train is not nn.Module.train]


@contextmanager
def swapped(
    model: nn.Module, tensors: Mapping[str, Tensor], *, training: bool = False, attributes: Attributes | None = None
) -> Iterator[None]:
    """Put other tensors, another mode and other attributes into a model, and restore all of it afterwards.

    Args:
        model: The model. Whatever its forward assigns to attributes in the meantime is undone too.
        tensors: Name -> what stands in for that tensor, wherever modules hold it.
        training: The mode.
        attributes: Module name -> attribute -> value.
    """
    modules = named_modules(model)
    named = tensors_of(modules)
    own: dict[int, Any] = {id(named[name]): standin for name, standin in tensors.items() if name in named}
    saved = [
        (part, dict(part))
        for module in modules.values()
        for part in (module.__dict__, module._parameters, module._buffers, module._modules)
    ]
    try:
        for module in modules.values():
            _swap(module, own)
            module.__dict__["training"] = training
        for module in _with_own_train(modules.values()):
            module.train(training)
        for name, values in (attributes or {}).items():
            set_attributes(modules[name], values)
        yield
    finally:
        for part, content in saved:
            if part or content:
                part.clear()
                part.update(content)


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def _swap(module: nn.Module, own: dict[int, Any]) -> None:
    """Swap the tensors of a module, and let copies stand in for all else that its forward may write to."""
    registered: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for part in registered:
        for key, tensor in part.items():
            if id(tensor) in own:
                part[key] = own[id(tensor)]
    for key, value in module.__dict__.items():
        if key not in _OF_EVERY_MODULE and type(value) not in _ATOMS and not _is_constant(value):
            module.__dict__[key] = _standin(value, own)


_ATOMS = frozenset((int, float, bool, str, type(None)))
_CONTAINERS = (list, tuple, dict, set, deque)
_HOLDERS = (Tensor, *_CONTAINERS)


def _is_constant(value: Any) -> bool:
    """Tell whether it is a tuple of plain values, in which nothing can be written to."""
    return isinstance(value, tuple) and _ATOMS.issuperset(map(type, value))


def _standin(value: Any, own: dict[int, Any]) -> Any:
    """Return what stands in for a tensor or a container, the same for the same."""
    if id(value) in own or not isinstance(value, _HOLDERS) or _is_constant(value):
        return own.get(id(value), value)
    if isinstance(value, Tensor):
        own[id(value)] = value.detach().clone()
    elif isinstance(value, tuple):
        items = [_standin(item, own) for item in value]
        same = all(item is old for item, old in zip(items, value, strict=True))
        own[id(value)] = value if same else type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    else:
        twin: Any = copy(value)
        own[id(value)] = twin
        if not isinstance(value, set):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                twin[key] = _standin(item, own)
    return own[id(value)]
