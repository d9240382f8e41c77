"""Taking values out of files that anything may stand in: each has its type, or is named with what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Value = TypeVar("Value")


class UnfitError(Exception):
    """A file holds something else than it should; the message says where, what, and the way out."""

    def __init__(self, words: str, way_out: str = "Run it again, or remove the folder.") -> None:
        super().__init__(f"{words}. {way_out}")


class Fields:
    """A mapping from a file, and where in the file it stands.

    >>> fields = Fields({"accuracy": {"end": 0.9}}, "summary.json")
    >>> fields.inside("accuracy").number("end")
    0.9
    >>> fields.inside("accuracy").number("dense")
    Traceback (most recent call last):
    lightning_prune.sweeps.fields.UnfitError: summary.json: accuracy.dense is missing. Run it again, ...
    """

    def __init__(self, values: Any, file: str, place: str = "") -> None:
        self._file, self._place = file, place
        if not isinstance(values, Mapping):
            raise self.unfit("", f"should be a mapping and is {_brief(values)}")
        self.values: Mapping[str, Any] = values

    def unfit(self, name: str, words: str) -> UnfitError:
        """Return an error that names the file and the place in it."""
        place = ".".join(part for part in (self._place, name) if part)
        return UnfitError(f"{self._file}: {place or 'its content'} {words}")

    def inside(self, name: str) -> Fields:
        """Return a mapping that stands in this one."""
        place = ".".join(part for part in (self._place, name) if part)
        return Fields(self._needed(name), self._file, place)

    def each(self, name: str) -> dict[str, Fields]:
        """Return the mappings of a mapping; none where it is missing."""
        found = self.inside(name) if self.values.get(name) is not None else None
        return {} if found is None else {str(key): found.inside(key) for key in found.values}

    def number(self, name: str) -> float:
        """Return a finite number."""
        return self._as(name, self._needed(name), finite, "a number")

    def number_or_none(self, name: str) -> float | None:
        """Return a finite number, or None where nothing stands."""
        return None if self.values.get(name) is None else self.number(name)

    def count_or_none(self, name: str) -> int | None:
        """Return a whole number, or None where nothing stands."""
        found = self.number_or_none(name)
        return None if found is None else int(found)

    def text(self, name: str, default: str = "") -> str:
        """Return a text; a number becomes one."""
        found = self.values.get(name)
        return default if found is None else str(found)

    def sequence(self, name: str) -> Sequence[Any]:
        """Return a list; an empty one where nothing stands."""
        found = self.values.get(name)
        return self._as(name, [] if found is None else found, _sequence, "a list")

    def numbers(self, name: str) -> tuple[float, ...]:
        """Return a list of finite numbers; an empty one where nothing stands."""
        return tuple(self._as(name, each, finite, "a list of numbers") for each in self.sequence(name))

    def texts(self, name: str) -> dict[str, str]:
        """Return a mapping of texts, without those that are null; an empty one where nothing stands."""
        found = self.inside(name).values if self.values.get(name) is not None else {}
        return {str(key): str(value) for key, value in found.items() if value is not None}

    def _needed(self, name: str) -> Any:
        if self.values.get(name) is None:
            raise self.unfit(name, "is missing")
        return self.values[name]

    def _as(self, name: str, value: Any, make: Callable[[Any], Value | None], words: str) -> Value:
        made = make(value)
        if made is None:
            raise self.unfit(name, f"should be {words} and is {_brief(value)}")
        return made


def finite(value: Any) -> float | None:
    """Return a number that can be drawn; None for anything else."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        return float(value) if number and math.isfinite(value) else None
    except OverflowError:
        return None


def _sequence(value: Any) -> Sequence[Any] | None:
    return value if isinstance(value, list) else None


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
