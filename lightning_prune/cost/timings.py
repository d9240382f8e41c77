"""The table of timings on disk: how long operations take on one machine."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from lightning_prune.errors import LatencyTableError

log = logging.getLogger(__name__)

_FORMAT = 1


@dataclass(frozen=True)
class Machine:
    """What timings hold for.

    Attributes:
        device: The name of the processor, with what torch uses of it.
        threads: How many threads torch computes with.
        version: The version of torch.
    """

    device: str
    threads: int
    version: str

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """Return this machine as it is set up now."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
        return cls(name, torch.get_num_threads(), torch.__version__)

    def __str__(self) -> str:
        return f"{self.device}, {self.threads} threads, torch {self.version}"


def _processor() -> str:
    """Return the name of the CPU and the instructions that torch uses."""
    listing = Path("/proc/cpuinfo")
    text = listing.read_text(encoding="utf-8", errors="replace") if listing.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


class LatencyTable:
    """Milliseconds of operations, by their keys.

    Args:
        machine: What the timings hold for.
        path: Where they are kept; nowhere if None.
        timings: Key -> milliseconds.
    """

    def __init__(self, machine: Machine, path: Path | None = None, timings: Mapping[str, float] | None = None) -> None:
        self.machine = machine
        self.path = path
        self.timings = dict(timings or {})

    @classmethod
    def cached(cls, machine: Machine) -> LatencyTable:
        """Return what was measured on this machine before; a file that cannot be read is warned about and left out."""
        path = cache_folder() / f"{re.sub(r'[^A-Za-z0-9.]+', '-', str(machine))}.json"
        if not path.exists():
            return cls(machine, path)
        try:
            return cls.load(path, machine)
        except LatencyTableError as error:
            warnings.warn(f"{error} Until then its timings are measured anew.", stacklevel=2)
            return cls(machine, path)

    @classmethod
    def load(cls, path: Path | str, machine: Machine | None = None) -> LatencyTable:
        """Read a table.

        Args:
            path: The file.
            machine: What the timings must hold for; this machine's CPU if None.

        Raises:
            LatencyTableError: The file cannot be read, or comes from another machine.
        """
        path, machine = Path(path), machine or Machine.here(torch.device("cpu"))
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found, timings = _parsed(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LatencyTableError(
                f"The table of timings {str(path)!r} cannot be read ({type(error).__name__}: {error}). Delete the file."
            ) from error
        table = cls(found, path, timings)
        table.check(machine)
        return table

    def check(self, machine: Machine) -> None:
        """Refuse timings of another machine.

        Raises:
            LatencyTableError: They are.
        """
        if self.machine != machine:
            raise LatencyTableError(
                f"The timings{f' in {str(self.path)!r}' if self.path else ''} are those of {self.machine}; here is "
                f"{machine}. Leave out `table` to measure here, or set the threads with torch.set_num_threads."
            )

    def save(self) -> None:
        """Write the table, with what other processes have written meanwhile, at a stroke."""
        if self.path is None:
            return
        try:
            self.timings = {**LatencyTable.load(self.path, self.machine).timings, **self.timings}
        except LatencyTableError as error:
            log.debug("nothing taken over: %s", error)
        try:
            _write(self.path, self._content())
        except OSError as error:
            log.warning("timings cannot be kept in %s (%s): they will be measured anew next time", self.path, error)

    def _content(self) -> dict[str, Any]:
        return {"format": _FORMAT, "machine": asdict(self.machine), "milliseconds": self.timings}


def cache_folder() -> Path:
    """Return where tables are kept: `$LIGHTNING_PRUNE_CACHE`, else `lightning_prune` where caches are."""
    own = os.environ.get("LIGHTNING_PRUNE_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(caches) / "lightning_prune"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file so that readers see either what was there or all of the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(content, file, indent=0, sort_keys=True)
    Path(file.name).replace(path)


def _parsed(content: Any) -> tuple[Machine, dict[str, float]]:
    """Check what a file says.

    Raises:
        ValueError: It is of another format, or some time is none.
    """
    if content["format"] != _FORMAT:
        raise ValueError(f"its format is {content['format']!r}, not {_FORMAT}")
    timings = {str(key): float(value) for key, value in content["milliseconds"].items()}
    wrong = next((key for key, value in timings.items() if not isfinite(value) or value < 0), None)
    if wrong is not None:
        raise ValueError(f"{timings[wrong]} ms for {wrong}")
    machine = content["machine"]
    return Machine(str(machine["device"]), int(machine["threads"]), str(machine["version"])), timings
