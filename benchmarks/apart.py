"""Measuring in processes of their own: what fails, hangs or dies costs one figure, and leaves the others alone."""

from __future__ import annotations

import json
import multiprocessing as mp
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class ChildError(Exception):
    """A child process has failed, or has not ended in time."""


def printed(script: Path, arguments: Sequence[str], limit: float | None = None) -> Any:
    """Run a script, and return the JSON of the last line that it prints.

    Raises:
        ChildError: It fails, or does not end in `limit` seconds.
    """
    command = [sys.executable, str(script), *arguments]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise ChildError(f"does not end in {limit:.0f} s") from None
    if said.returncode:
        lines = said.stderr.strip().splitlines()
        raise ChildError(lines[-1] if lines else f"exit status {said.returncode}")
    return json.loads(said.stdout.splitlines()[-1])


def sent(
    target: Callable[..., None], arguments: Sequence[object], limit: float, preloaded: Sequence[str]
) -> tuple[dict[str, Any], str | None]:
    """Run a function in a process that is forked from a server, and gather what it sends.

    Args:
        target: Sends dictionaries through the connection that is its first argument.
        arguments: The others.
        limit: Seconds that it may take.
        preloaded: Modules that the server imports once, for all.

    Returns:
        All that was sent, and why the process did not end well; None where it did.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(preloaded))
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    found: dict[str, Any] = {}
    stopped: str | None = f"took more than {limit:.0f} s"
    process.start()
    theirs.close()
    deadline = time.monotonic() + limit
    try:
        while ours.poll(max(deadline - time.monotonic(), 0)):
            found.update(ours.recv())
    except EOFError:
        process.join()
        stopped = f"died with exit code {process.exitcode}" if process.exitcode else None
    process.kill()
    return found, stopped
