"""The random state of torch, numpy and Python, kept while something else draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept(*, of_devices: bool = True) -> Iterator[None]:
    """Restore the random state of torch, numpy and Python.

    Args:
        of_devices: Whether that of the GPUs is kept too; where they are not used, that would only take time.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if of_devices else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
