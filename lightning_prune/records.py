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
        return tuple(_record(of_type(dict, item)) for item in of_type(list, plain))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise HistoryError(
            f"The pruning history is damaged or from another version ({type(error).__name__}: {str(error)[:200]}). "
            "Load a checkpoint that this version of lightning_prune has written."
        ) from error


def _record(plain: dict[str, Any]) -> PruneRecord:
    numbers = {key: number_in(plain[key]) for key in ("asked", "reached")}
    moment = {key: None if plain[key] is None else of_type(int, plain[key]) for key in ("epoch", "step")}
    if plain["of"] not in UNITS:
        raise ValueError(f"the unit {plain['of']!r}")
    parts: dict[str, Any] = {
        "channels": each_in(plain["channels"], _change),
        "params": _change(plain["params"]),
        "macs": _change(plain["macs"]),
        "held_back": each_in(plain["held_back"], lambda reason: of_type(str, reason)),
        "shapes": each_in(plain["shapes"], _numbers),
        "kept": each_in(plain["kept"], _kept),
        "attributes": _sizes(plain["attributes"]),
        "before": _sizes(plain["before"]),
        "selects": tuple(of_type(str, name) for name in of_type(list, plain.get("selects", []))),
        "biases": each_in(plain.get("biases", {}), lambda width: of_type(int, width)),
    }
    return PruneRecord(**{**plain, **numbers, **moment, **parts})


def of_type(kind: type[Part], value: Any) -> Part:
    """Let a value through if it is of this type, and not of one derived from it."""
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value


def number_in(value: Any) -> float:
    """Let a finite number through, as a float."""
    if type(value) not in (int, float) or not isfinite(value):
        raise TypeError(f"{value!r} in place of a number")
    return float(value)


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(of_type(int, item) for item in of_type(list, value))


def each_in(value: Any, read: Callable[[Any], Part]) -> dict[str, Part]:
    """Read every value of a dict whose keys are names."""
    return {of_type(str, name): read(item) for name, item in of_type(dict, value).items()}


def _change(value: Any) -> Change:
    return Change(**{name: of_type(int, count) for name, count in of_type(dict, value).items()})


def _kept(dims: Any) -> dict[int, tuple[int, ...]]:
    return {of_type(int, dim): _numbers(positions) for dim, positions in of_type(dict, dims).items()}


def _sizes(value: Any) -> Attributes:
    return each_in(value, lambda sizes: each_in(sizes, lambda size: size if type(size) is int else _numbers(size)))
