"""A param group of our own that joins the user's optimizer in mid-fit, follows its schedule, and leaves it again."""

from __future__ import annotations

import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.surgery import Undo

_PER_GROUP = ("base_lrs", "_last_lr", "max_lrs", "min_lrs", "lr_lambdas", "base_momentums", "max_momentums")
"""Where torch's schedulers keep one value for each param group."""

_FOLLOWS = "follows"
"""Key of our param groups: the learning rate of the first group of which `initial_lr` is the counterpart."""

_TRIED = 20
"""So many steps of a foreign scheduler are tried out."""

_HANDLES: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()

_SCHEDULED = ("lr", "momentum", "betas")
"""Options that schedulers set."""


@dataclass(frozen=True)
class _Change:
    """Our group coming or going.

    Attributes:
        before: All param groups before.
        after: All param groups after.
        place: Where our group is.
        scale: What a learning rate of the first group is multiplied by to make one of ours.
    """

    before: Sequence[dict[str, Any]]
    after: Sequence[dict[str, Any]]
    place: int
    scale: float

    @property
    def leaves(self) -> bool:
        """Whether our group goes."""
        return len(self.before) > len(self.after)

    @property
    def ours(self) -> dict[str, Any]:
        """Our group."""
        return (self.before if self.leaves else self.after)[self.place]

    def concerns(self, key: str, values: list[Any], *, every: bool) -> bool:
        """Tell whether a scheduler's list has one value for each group."""
        if key in _PER_GROUP:  # groups that came after ours may have no value yet
            return len(values) == len(self.before) or (self.leaves and len(values) > self.place)
        return every and len(values) == len(self.before) and not any(hasattr(value, "step") for value in values)

    def edit(self, key: str, values: list[Any]) -> list[Any]:
        """Return the list after the change."""
        if self.leaves:
            return values[: self.place] + values[self.place + 1 :]
        return [*values[: self.place], _counterpart(key, values[0], self.scale), *values[self.place :]]


def join(
    optimizer: Optimizer, parameters: Sequence[Parameter], lr: float, *, schedulers: Iterable[object], name: str
) -> Undo:
    """Give parameters a param group of their own, behind all others.

    It takes the options of the first group, but for its learning rate and for weight decay, which is 0. Before each
    step its learning rate is set to

        lr * (learning rate of the first group / its initial learning rate; under OneCycleLR: its highest),

    whatever schedules the latter, so that it follows in proportion. The initial one is that which schedulers note in
    the group as `initial_lr`, or where none has (`ReduceLROnPlateau`), the present one. Where the parameters are in
    other groups already (those of a resumed fit), they are taken out; where they have this very group (restored by
    `BaseFinetuning`), it stays. Schedulers have their lists of values per group extended; the values of other groups
    stay as they are.

    Args:
        optimizer: Changed in place; not a wrapper of Lightning's.
        parameters: What gets the group.
        lr: Its learning rate where the first group has its initial, or highest, one; above 0.
        schedulers: All LR schedulers of the fit; those of other optimizers are left alone. One that torch does not
            have is tried out on a copy.
        name: What loggers call the group.

    Returns:
        What takes it back.

    Raises:
        ValueError: `parameters` is empty, `lr` is no positive number, or `name` is taken.
        MisconfigurationException: The optimizer has no groups that differ, its first group has no learning rate to
            follow, or a scheduler cannot step with one group more.
    """
    _check(optimizer, parameters, lr, name)
    schedulers = _of(optimizer, schedulers)
    undo = _remember(optimizer, parameters, schedulers)
    try:
        before = _groups_without(optimizer, parameters)
        if _place(optimizer, parameters) is None:
            names = _take_out(optimizer, parameters)
            optimizer.add_param_group(_group(optimizer, parameters, lr, name, names))
        place = len(before) if (found := _place(optimizer, parameters)) is None else found
        scale = lr / optimizer.param_groups[place][_FOLLOWS]
        _edit_all(schedulers, optimizer, _Change(before, list(optimizer.param_groups), place, scale))
        _follow(optimizer)
        _watch(optimizer)
    except BaseException:
        undo()
        raise
    return undo


def leave(optimizer: Optimizer, parameters: Sequence[Parameter], schedulers: Iterable[object]) -> Undo:
    """Take the param group of parameters out again, with all that optimizer and schedulers remember of it.

    Args:
        optimizer: Changed in place; not a wrapper of Lightning's.
        parameters: Those that the group was made for.
        schedulers: All LR schedulers of the fit.

    Returns:
        What takes it back.

    Raises:
        ValueError: These parameters have no such group.
    """
    place = _place(optimizer, parameters)
    if place is None:
        raise ValueError(
            f"{type(optimizer).__name__} has no param group that was made for just these {len(parameters)} parameters; "
            "pass those that `join` got."
        )
    schedulers = _of(optimizer, schedulers)
    undo = _remember(optimizer, parameters, schedulers)
    before = list(optimizer.param_groups)
    try:
        del optimizer.param_groups[place]
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
        _edit_all(schedulers, optimizer, _Change(before, list(optimizer.param_groups), place, 1.0))
        _watch(optimizer)
    except BaseException:
        undo()
        raise
    return undo


def at_last_moment(optimizer: Optimizer, act: Callable[[Optimizer], None]) -> RemovableHandle:
    """Act in each step of an optimizer when its gradients are final: after its closure, hooks and clipping."""

    def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            act(optimizer)
            return None

        def then_act() -> Any:
            loss = closure()
            act(optimizer)
            return loss

        return args[:1] + args[2:], {**kwargs, "closure": then_act}

    return optimizer.register_step_pre_hook(before_step)


def stand_in(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> Optimizer:
    """Return an optimizer of the same class and settings that has one small parameter of ones in each of some groups.

    It has no memory and no hooks. Only parameters of one dimension are stood in for.
    """
    twin: Optimizer = object.__new__(type(optimizer))
    settings = {key: value for key, value in vars(optimizer).items() if key != "step"}  # schedulers wrap it
    hooks = {
        key: OrderedDict[int, Any]() for key in settings if key.startswith("_optimizer_") and key.endswith("_hooks")
    }
    vars(twin).update(settings, **hooks, state=defaultdict(dict), param_groups=list(map(_small, groups)))
    return twin


def _small(group: dict[str, Any]) -> dict[str, Any]:
    device = group["params"][0].device if group["params"] else None
    options = deepcopy({key: value for key, value in group.items() if key not in ("params", "param_names")})
    return {**options, "params": [Parameter(torch.ones(2, device=device))]}


def _check(optimizer: Optimizer, parameters: Sequence[Parameter], lr: float, name: str) -> None:
    kind = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise MisconfigurationException(
            f"{kind} takes all parameters in one group, with one learning rate; use SGD or Adam, whose groups differ."
        )
    if not parameters:
        raise ValueError("`parameters` is what gets a param group of its own; got none. Pass one or more.")
    if not (isfinite(lr) and lr > 0):
        raise ValueError(f"`lr` is the learning rate of the new param group, above 0; got {lr}.")
    present = _place(optimizer, parameters)
    if any(group.get("name") == name for place, group in enumerate(optimizer.param_groups) if place != present):
        raise ValueError(f"`name` is what loggers call the new param group; {kind} has one named {name!r}. Rename one.")
    first = optimizer.param_groups[0]
    if not _reference(first) > 0:
        raise MisconfigurationException(
            f"The first param group of {kind} has the learning rate 0, which nothing can follow; put one first that "
            "has a learning rate."
        )


def _reference(first: dict[str, Any]) -> float:
    """Return the learning rate that a param group starts with, or under OneCycleLR the highest that it comes to."""
    return _number(first.get("max_lr", first.get("initial_lr", first["lr"])))


def _group(
    optimizer: Optimizer, parameters: Sequence[Parameter], lr: float, name: str, names: dict[int, str]
) -> dict[str, Any]:
    """Return a param group with the options of the first one."""
    first = optimizer.param_groups[0]
    reference = _reference(first)
    apart = ("params", "param_names", "name", "lr", "initial_lr")
    options = {key: _counterpart(key, value, lr / reference) for key, value in first.items() if key not in apart}
    named = [(names.get(id(each), f"{name}.{place}"), each) for place, each in enumerate(parameters)]
    params: list[Any] = named if "param_names" in first else list(parameters)
    own_lr = first["lr"].new_tensor(lr) if isinstance(first["lr"], Tensor) else lr
    start = deepcopy(own_lr)
    return {**options, "params": params, "lr": own_lr, "initial_lr": start, "weight_decay": 0, "name": name} | {
        _FOLLOWS: reference
    }


def _counterpart(key: str, value: Any, scale: float) -> Any:
    """Return what an option of the first group, or a scheduler's value for it, is in a group of another scale."""
    if "lr" in key and isinstance(value, (int, float, Tensor)) and not isinstance(value, bool):
        return value * scale
    return deepcopy(value)


def _number(value: float | Tensor) -> float:
    return float(value)


def _place(optimizer: Optimizer, parameters: Sequence[Parameter]) -> int | None:
    """Return where the group is that was made for these parameters."""
    wanted = set(map(id, parameters))
    for place, group in enumerate(optimizer.param_groups):
        if _FOLLOWS in group and set(map(id, group["params"])) == wanted:
            return place
    return None


def _groups_without(optimizer: Optimizer, parameters: Sequence[Parameter]) -> list[dict[str, Any]]:
    place = _place(optimizer, parameters)
    return [group for at, group in enumerate(optimizer.param_groups) if at != place]


def _take_out(optimizer: Optimizer, parameters: Sequence[Parameter]) -> dict[int, str]:
    """Take parameters out of all groups; return the names that they had there, by `id`."""
    gone, found = set(map(id, parameters)), dict[int, str]()
    for group in optimizer.param_groups:
        kept = [place for place, parameter in enumerate(group["params"]) if id(parameter) not in gone]
        if names := group.get("param_names"):
            found.update((id(each), label) for each, label in zip(group["params"], names, strict=True))
            group["param_names"] = [names[place] for place in kept]
        group["params"][:] = [group["params"][place] for place in kept]
    return found


def _remember(optimizer: Optimizer, parameters: Sequence[Parameter], schedulers: Sequence[Any]) -> Undo:
    """Return what brings optimizer and schedulers back to where they are now."""
    groups = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]
    state: dict[Tensor, Any] = {
        parameter: optimizer.state[parameter] for parameter in parameters if parameter in optimizer.state
    }
    held = [(node, dict(vars(node))) for scheduler in schedulers for node in _tree(scheduler, optimizer)]

    def undo() -> None:
        optimizer.param_groups[:] = [group for group, _, _ in groups]
        for group, options, params in groups:
            group["params"][:] = params
            if "param_names" in options:
                group["param_names"] = options["param_names"]
        optimizer.state.update(state)
        for node, values in held:
            vars(node).update({key: value for key, value in values.items() if isinstance(value, list)})
        _watch(optimizer)

    return undo


def _follow(optimizer: Optimizer) -> None:
    """Set the learning rates of our groups by that of the first group."""
    first = optimizer.param_groups[0]["lr"]
    for group in optimizer.param_groups:
        if _FOLLOWS in group:
            lr = group["initial_lr"] * (first / group[_FOLLOWS])
            group["lr"] = group["lr"].copy_(lr) if isinstance(group["lr"], Tensor) else lr


def _watch(optimizer: Optimizer) -> None:
    """Look at each step of an optimizer as long as it has a group of ours."""
    if handle := _HANDLES.pop(optimizer, None):
        handle.remove()
    if any(_FOLLOWS in group for group in optimizer.param_groups):
        _HANDLES[optimizer] = at_last_moment(optimizer, _follow)


def _of(optimizer: Optimizer, schedulers: Iterable[object]) -> list[Any]:
    return [scheduler for scheduler in schedulers if getattr(scheduler, "optimizer", None) is optimizer]


def _tree(scheduler: Any, optimizer: Optimizer, seen: set[int] | None = None) -> Iterator[Any]:
    """Go through a scheduler and all those inside of it, each once."""
    seen = set() if seen is None else seen
    if id(scheduler) not in seen and getattr(scheduler, "optimizer", None) is optimizer:
        seen.add(id(scheduler))
        yield scheduler
        for value in list(vars(scheduler).values()):
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                if hasattr(inner, "step") and hasattr(inner, "__dict__"):
                    yield from _tree(inner, optimizer, seen)


def _edit_all(schedulers: Sequence[Any], optimizer: Optimizer, change: _Change) -> None:
    """Let schedulers follow a change of the param groups."""
    for scheduler in schedulers:
        foreign = any(map(_is_foreign, _tree(scheduler, optimizer)))
        _edit(scheduler, optimizer, change, every=foreign and _has_other_lists(scheduler, optimizer, change))


def _edit(scheduler: Any, optimizer: Optimizer, change: _Change, *, every: bool = False) -> None:
    """Edit a scheduler's lists of values per group; `every`: whatever a foreign one calls them."""
    for node in _tree(scheduler, optimizer):
        for key, value in list(vars(node).items()):
            if isinstance(value, list) and change.concerns(key, value, every=every and _is_foreign(node)):
                setattr(node, key, change.edit(key, value))  # a new list: `_last_lr` may be that of an inner one


def _is_foreign(scheduler: object) -> bool:
    return not type(scheduler).__module__.startswith("torch.optim")


def _has_other_lists(scheduler: Any, optimizer: Optimizer, change: _Change) -> bool:
    """Tell whether a foreign scheduler keeps values per group under names that torch does not have.

    Copies show it: after the change they must set all other groups as they do now.

    Raises:
        MisconfigurationException: Neither with nor without them it steps as it does now.
    """
    try:
        wanted = _course(scheduler, optimizer, change, change.before, lambda copy, twin: None)
    except Exception:  # whatever a foreign class does not allow: to be copied, or to be stepped like this
        wanted = []
    if not wanted:
        rank_zero_warn(
            f"{type(scheduler).__name__} could not be tried out with another number of param groups. If it fails in "
            "this fit, use a scheduler of torch.optim.lr_scheduler."
        )
        return False
    for every in (False, True):
        course = _course(scheduler, optimizer, change, change.after, partial(_edit, change=change, every=every))
        if course[: len(wanted)] == wanted:
            return every
    raise MisconfigurationException(
        f"{type(scheduler).__name__} would not go on as it does now with {len(change.after)} param groups in place of "
        f"{len(change.before)}. Use a scheduler of torch.optim.lr_scheduler, or keep its values per param group in "
        f"lists called like torch's ({', '.join(_PER_GROUP)})."
    )


def _course(
    scheduler: Any,
    optimizer: Optimizer,
    change: _Change,
    groups: Sequence[dict[str, Any]],
    prepare: Callable[[Any, Optimizer], None],
) -> list[list[dict[str, Any]]]:
    """Return what a copy of a scheduler sets the groups of others to, until it fails or has been seen enough."""
    twin = stand_in(optimizer, groups)
    copy = deepcopy(scheduler, {id(optimizer): twin})
    prepare(copy, twin)
    others = [small for small, group in zip(twin.param_groups, groups, strict=True) if group is not change.ours]
    course = []
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        for count in range(_TRIED):
            _advance(copy, count)
            course.append([{key: _plain(group[key]) for key in _SCHEDULED if key in group} for group in others])
    return course


def _advance(scheduler: Any, count: int) -> None:
    try:
        scheduler.step()
    except TypeError:  # it wants a metric, such as `ReduceLROnPlateau`, or an epoch
        scheduler.step(count)


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) else value
