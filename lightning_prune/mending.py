"""Sizes that models keep in attributes: where a cut makes one stale, and what it should be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import nn

from lightning_prune.cut import Cut
from lightning_prune.labels import LabelArray
from lightning_prune.tensors import named_modules
from lightning_prune.types import Attributes

Sizes = tuple[tuple[int, ...], tuple[int, ...]]
"""The sizes of one dimension in all outputs of an operation: before the cut, and after it."""


@dataclass(frozen=True)
class Misfit:
    """Where the trial of a cut went wrong.

    Attributes:
        moment: The run and its step: the later, the better the cut.
        involved: The labels that are concerned.
        reason: What happened, in words.
        modules: Name -> module, for those whose forward was running, the innermost first.
        sizes: The sizes that change at this step and the one before.
        around: The groups whose channels were there before it went wrong, the latest first, frozen ones left out.
    """

    moment: tuple[int, int]
    involved: list[LabelArray | None]
    reason: str
    modules: dict[str, nn.Module]
    sizes: list[Sizes]
    around: list[str]


def modules_of(model: nn.Module, error: BaseException) -> dict[str, nn.Module]:
    """Return the modules that were at work when an error was raised, the innermost first."""
    names = {id(module): name for name, module in model.named_modules()}
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    found: dict[str, nn.Module] = {}
    for frame in reversed(frames):
        for value in list(frame.f_locals.values()):
            if isinstance(value, nn.Module) and id(value) in names:
                found.setdefault(names[id(value)], value)
    return found


def mendings(model: nn.Module, cut: Cut, attributes: Attributes, misfit: Misfit) -> Iterator[Attributes]:
    """Yield settings of the attributes that may bring the trial further, the likeliest first.

    An attribute is a candidate if its module was at work and it holds a size that is no longer so. Modules of the
    same class whose tensors are cut to the same shapes need the same change, so that it is tried on all of them
    first, then on the one alone.

    Args:
        model: The model.
        cut: What is done to its tensors.
        attributes: What is set already.
        misfit: Where the trial went wrong with it.
    """
    for rule, (name, module) in product((_changed, _in_proportion), misfit.modules.items()):
        fitting = [
            (attribute, new)
            for attribute, value in list(module.__dict__.items())
            for new in dict.fromkeys(rule(value, misfit.sizes))
            if attributes.get(name, {}).get(attribute, value) != new and not attribute.startswith("_")
        ]
        for attribute, new in fitting:
            alike = [
                other
                for other in _alike(model, cut, name)
                if _equal(model.get_submodule(other).__dict__.get(attribute), module.__dict__[attribute])
                and attribute not in attributes.get(other, {})
            ]
            if len(alike) > 1:
                yield _set(attributes, attribute, dict.fromkeys([*alike, name], new))
            yield _set(attributes, attribute, {name: new})
        if len(dict(fitting)) > 1:
            yield {**attributes, name: {**attributes.get(name, {}), **dict(reversed(fitting))}}
    for name in misfit.modules:
        for attribute in attributes.get(name, {}):
            yield _unset(attributes, name, attribute)


def _alike(model: nn.Module, cut: Cut, name: str) -> list[str]:
    """List the modules of the same class whose tensors are cut to the same shapes."""
    kind, shapes = type(model.get_submodule(name)), _shapes_in(cut, name)
    if not shapes:
        return []
    modules = named_modules(model).items()
    return [other for other, twin in modules if type(twin) is kind and _shapes_in(cut, other) == shapes]


def _shapes_in(cut: Cut, name: str) -> dict[str, tuple[tuple[int, ...], dict[int, int]]]:
    """Return what becomes of the tensors inside of a module."""
    prefix = f"{name}." if name else ""
    return {
        tensor[len(prefix) :]: (cut.shapes[tensor], {dim: len(positions) for dim, positions in kept.items()})
        for tensor, kept in cut.kept.items()
        if tensor.startswith(prefix)
    }


def _equal(left: Any, right: Any) -> bool:
    return type(left) is type(right) and bool(left == right)


def _changed(value: Any, sizes: list[Sizes]) -> Iterator[int | tuple[int, ...]]:
    """Yield what an attribute should hold, if it holds a size that has changed."""
    if type(value) is int:
        for old, new in sizes:
            yield from (after for before, after in zip(old, new, strict=True) if before == value != after)
    elif isinstance(value, (tuple, list)) and value and all(type(item) is int for item in value):
        for old, new in sizes:
            if tuple(value) == old:
                yield new
            yield from (
                tuple(after if item == before else item for item in value)
                for before, after in zip(old, new, strict=True)
                if before in value
            )


def _in_proportion(value: Any, sizes: list[Sizes]) -> Iterator[int]:
    """Yield what an attribute should hold, if a multiple of it is a size that has changed."""
    if type(value) is int and value > 1:
        for old, new in sizes:
            yield from (
                value * after // before
                for before, after in zip(old, new, strict=True)
                if before > value and before % value == value * after % before == 0 < after != before
            )


def _set(attributes: Attributes, attribute: str, values: dict[str, int | tuple[int, ...]]) -> Attributes:
    changed = {name: {**attributes.get(name, {}), attribute: value} for name, value in values.items()}
    return {**attributes, **changed}


def _unset(attributes: Attributes, name: str, attribute: str) -> Attributes:
    left = {key: value for key, value in attributes[name].items() if key != attribute}
    others = {other: values for other, values in attributes.items() if other != name}
    return {**others, name: left} if left else others
