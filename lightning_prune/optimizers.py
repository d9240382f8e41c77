"""The optimizer follows a cut: the same object, the same parameters, their state cut along."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.cut import Cut, cut_tensor
from lightning_prune.errors import PruningError
from lightning_prune.surgery import Undo
from lightning_prune.tensors import named_parameters


def rebuild(optimizer: Optimizer, model: nn.Module, cut: Cut) -> Undo:
    """Cut the optimizer's state as its parameters were cut.

    Parameters keep their identity in a cut, so that param groups, schedulers and wrappers hold what they held.
    State of the parameter's shape (momentum, Adam's moments) loses the same channels, state that has size 1 where the
    parameter has more (the factored moments of Adafactor) loses them where it has them; numbers and step counters
    stay. A bias that the cut has made joins its weight.

    Where a parameter has state of any other shape, there is no rule: all of its state is dropped, with a warning.

    Args:
        optimizer: Changed in place.
        model: The model after the cut.
        cut: What was cut.

    Returns:
        What takes it back.
    """
    named = named_parameters(model).items()
    names: dict[Tensor, str] = {parameter: name for name, parameter in named if name in cut.kept}
    before = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    held = [list(group["params"]) for group in optimizer.param_groups]

    def undo() -> None:
        for group, parameters in zip(optimizer.param_groups, held, strict=True):
            group["params"][:] = parameters
        for parameter, state in before.items():
            optimizer.state[parameter].clear()
            optimizer.state[parameter].update(state)

    try:
        if isinstance(optimizer, LBFGS) and names:
            _forget(optimizer)
        for parameter in before:
            if parameter in names:
                _cut_state(optimizer, parameter, names[parameter], cut)
        adopt(optimizer, model, cut.biases)
    except BaseException:
        undo()
        raise
    return undo


def adopt(optimizer: Optimizer, model: nn.Module, modules: Iterable[str]) -> None:
    """Put the biases that cuts have made right behind their weights, in the weights' param groups.

    An optimizer that is built anew after a resume may have them elsewhere: so it holds them in the order in which its
    saved state has them.

    Args:
        optimizer: Changed in place.
        model: The model.
        modules: The names of the modules that got a bias.
    """
    for name in modules:
        module = model.get_submodule(name)
        homes = [group["params"] for group in optimizer.param_groups if _place(module.weight, group["params"]) >= 0]
        if homes:
            for group in optimizer.param_groups:
                group["params"][:] = [parameter for parameter in group["params"] if parameter is not module.bias]
            homes[0].insert(_place(module.weight, homes[0]) + 1, module.bias)


def _place(parameter: object, parameters: Sequence[object]) -> int:
    """Return where a parameter is in a list, or -1."""
    return next((place for place, other in enumerate(parameters) if other is parameter), -1)


def _cut_state(optimizer: Optimizer, parameter: Tensor, name: str, cut: Cut) -> None:
    state, shape = optimizer.state[parameter], cut.shapes[name]
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
    strange = {key: tuple(value.shape) for key, value in tensors.items() if not _follows(value, shape)}
    if strange:
        state.clear()
        warnings.warn(
            f"{type(optimizer).__name__} keeps {strange} for {name}, which does not follow its shape {shape}: the "
            f"state of {name} was dropped and builds up anew.",
            stacklevel=4,
        )
    else:
        state.update({key: cut_tensor(value, _present(value, cut.kept[name])) for key, value in tensors.items()})


def _forget(optimizer: LBFGS) -> None:
    """Drop what LBFGS knows of the curvature: products of whole gradients, from which no channel can be taken."""
    known = any(optimizer.state.values())
    for state in optimizer.state.values():
        state.clear()
    optimizer._numel_cache = None
    if known:
        warnings.warn(
            "LBFGS keeps one flat history of all parameters, which no cut can follow: it was dropped and builds "
            "up anew.",
            stacklevel=4,
        )


def _follows(value: Tensor, shape: tuple[int, ...]) -> bool:
    """Tell whether a state tensor has a parameter's shape, or broadcasts with it dimension by dimension."""
    return value.dim() == len(shape) and all(have in (1, want) for have, want in zip(value.shape, shape, strict=True))


def _present(value: Tensor, kept: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {dim: positions for dim, positions in kept.items() if value.shape[dim] > 1}


def check(optimizers: Iterable[Optimizer], model: nn.Module) -> None:
    """Make sure that optimizers hold parameters of the model only, with state of their shapes.

    Raises:
        PruningError: A parameter is foreign, a state tensor has another shape than its parameter, or the state is
            spread over processes.
    """
    names = {parameter: name for name, parameter in named_parameters(model).items()}
    for optimizer in optimizers:
        if type(optimizer).__name__ in _SPREAD:
            raise PruningError(
                f"{type(optimizer).__name__} spreads its state over the processes, which no cut can follow yet; use "
                "the optimizer inside of it."
            )
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter not in names:
                raise PruningError(
                    f"{type(optimizer).__name__} holds a parameter of shape {tuple(parameter.shape)} that is not in "
                    "the model; build the optimizer from the parameters of the model that is pruned."
                )
            for key, value in optimizer.state.get(parameter, {}).items() if not isinstance(optimizer, LBFGS) else ():
                if isinstance(value, Tensor) and value.dim() and not _follows(value, tuple(parameter.shape)):
                    raise PruningError(
                        f"After the cut {type(optimizer).__name__} has {key!r} of shape {tuple(value.shape)} for "
                        f"{names[parameter]} of shape {tuple(parameter.shape)}; report this, with the optimizer's name."
                    )


_SPREAD = ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer")
