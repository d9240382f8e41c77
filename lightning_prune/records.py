"""Records as plain data: dicts, lists, numbers and strings, and back again with everything looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any, TypeVar

from lightning_prune.errors import HistoryError
from lightning_prune.types import UNITS, Attributes, Change, PruneRecord

Part = TypeVar("Part")


def to_plain(records: Sequence[PruneRecord]) -> list[dict[str, Any]]:
    """Turn records into dicts, lists, numbers and strings, which `torch.load(weights_only=True)` reads."""
    return [_plain(asdict(record)) for record in records]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_plain(plain: object) -> tuple[PruneRecord, ...]:
    """Read what `to_plain` has made.

    Raises:
        HistoryError: It is something else.
    """
    try:
        return tuple(_record(_of(dict, item)) for item in _of(list, plain))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise HistoryError(
            f"The pruning history is damaged or from another version ({type(error).__name__}: {str(error)[:200]}). "
            "Load a checkpoint that this version of lightning_prune has written."
        ) from error


def _record(plain: dict[str, Any]) -> PruneRecord:
    numbers = {key: _number(plain[key]) for key in ("asked", "reached")}
    moment = {key: None if plain[key] is None else _of(int, plain[key]) for key in ("epoch", "step")}
    if plain["of"] not in UNITS:
        raise ValueError(f"the unit {plain['of']!r}")
    parts: dict[str, Any] = {
        "channels": _each(plain["channels"], _change),
        "params": _change(plain["params"]),
        "macs": _change(plain["macs"]),
        "held_back": _each(plain["held_back"], lambda reason: _of(str, reason)),
        "shapes": _each(plain["shapes"], _numbers),
        "kept": _each(plain["kept"], lambda dims: {_of(int, dim): _numbers(at) for dim, at in _of(dict, dims).items()}),
        "attributes": _sizes(plain["attributes"]),
        "before": _sizes(plain["before"]),
        "selects": tuple(_of(str, name) for name in _of(list, plain.get("selects", []))),
        "biases": _each(plain.get("biases", {}), lambda width: _of(int, width)),
    }
    return PruneRecord(**{**plain, **numbers, **moment, **parts})


def _of(kind: type[Part], value: Any) -> Part:
    """Let a value through if it is of this type, and not of one derived from it."""
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not isfinite(value):
        raise TypeError(f"{value!r} in place of a number")
    return float(value)


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(_of(int, item) for item in _of(list, value))


def _each(value: Any, read: Callable[[Any], Part]) -> dict[str, Part]:
    return {_of(str, name): read(item) for name, item in _of(dict, value).items()}


def _change(value: Any) -> Change:
    return Change(**{name: _of(int, count) for name, count in _of(dict, value).items()})


def _sizes(value: Any) -> Attributes:
    return _each(value, lambda sizes: _each(sizes, lambda size: size if type(size) is int else _numbers(size)))
