"""Example inputs in any form that people have them, bound to a model's forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass, field, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

ExampleInputs: TypeAlias = Any
"""A tensor, a tuple of positional inputs, a dict of keyword inputs, or a whole batch of a data loader."""


@dataclass(frozen=True)
class Inputs:
    """What the model's forward is called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Return the same inputs with each tensor changed."""

        def leaf(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, MutableMapping):
                return _with(value, {key: tree_map(leaf, item) for key, item in value.items()})
            if is_dataclass(value) and not isinstance(value, type):
                twin = copy(value)
                for key, item in vars(value).items():
                    object.__setattr__(twin, key, tree_map(leaf, item))
                return twin
            return value

        return Inputs(tree_map(leaf, self.args), tree_map(leaf, dict(self.kwargs)))

    def call(self, model: nn.Module) -> Any:
        """Run the model."""
        return model(*self.args, **self.kwargs)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples, sets, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors_in(vars(value))


def _with(mapping: MutableMapping[Any, Any], items: Mapping[Any, Any]) -> MutableMapping[Any, Any]:
    """Return a copy of a mapping of its own class, with other values."""
    twin = copy(mapping)
    twin.update(items)
    return twin


def flat_tensors(values: Iterable[Any]) -> list[Tensor]:
    """List the tensors among the arguments or results of an operation, where lists are all the nesting there is."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (list, tuple):
            found.extend(item for item in value if isinstance(item, Tensor))
    return found


def bind(model: nn.Module, example: ExampleInputs) -> Inputs:
    """Bind example inputs to the model's forward.

    Args:
        model: The model whose forward takes them.
        example: A tensor is the only input. A tuple holds the positional inputs, a dict the keyword inputs.
            A batch as a data loader yields it (a list, or more entries than forward takes) gives forward as many
            leading entries as it requires; a dict batch gives it the keys that it knows, or itself as a whole
            where forward knows none of them.

    Raises:
        TypeError: The example holds no tensor.
    """
    if next(tensors_in(example), None) is None:
        raise TypeError(
            "`example_inputs` is what the model's forward is called with: a tensor, a tuple, a dict or a batch; "
            f"got {example!r}, which holds no tensor."
        )
    if isinstance(example, Inputs):
        return example
    if isinstance(example, Mapping):
        return _bind_mapping(model, example)
    if isinstance(example, (list, tuple)) and not hasattr(example, "_fields"):
        return Inputs(_leading(model, example))
    return Inputs((example,))


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _leading(model: nn.Module, example: list[Any] | tuple[Any, ...]) -> tuple[Any, ...]:
    parameters = _parameters(model)
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return tuple(example)
    positional = [parameter for parameter in parameters if parameter.kind in _POSITIONAL]
    required = [parameter for parameter in positional if parameter.default is parameter.empty]
    if isinstance(example, tuple) and len(example) <= len(positional):
        return tuple(example)
    return tuple(example[: max(len(required), 1)])


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _bind_mapping(model: nn.Module, example: Mapping[str, Any]) -> Inputs:
    parameters = _parameters(model)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return Inputs(kwargs=dict(example))
    known = {parameter.name for parameter in parameters} & set(example)
    if not known:
        return Inputs((example,))
    return Inputs(kwargs={name: example[name] for name in example if name in known})


def examples_in(batch: ExampleInputs) -> int:
    """Return how many examples a batch holds, by the first tensor that has a dimension."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.dim()), 1)


def first_examples(model: nn.Module, batches: Iterable[ExampleInputs], most: int) -> Iterator[Inputs]:
    """Yield what forward takes of some batches, on the model's device, until so many examples have come."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    left = most
    for batch in batches:
        inputs = bind(model, batch).map(lambda tensor: tensor.to(device))
        examples = examples_in((inputs.args, dict(inputs.kwargs)))
        yield inputs if examples <= left else _cut_to(inputs, examples, left)
        left -= examples
        if left <= 0:
            return


def _cut_to(inputs: Inputs, examples: int, most: int) -> Inputs:
    """Leave out the last examples of a batch; tensors of another length belong to all of them."""
    return inputs.map(lambda tensor: tensor[:most] if tensor.dim() and len(tensor) == examples else tensor)
