"""The memory of this process, as Linux tells it."""

from __future__ import annotations

from pathlib import Path


def resident() -> float:
    """MiB in use now."""
    return _status("VmRSS")


def peak() -> float:
    """MiB in use at the most, since the process began or `forget_peak` was called."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Let the peak be what is in use now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(which: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(which))
