"""The last word of a sweep: how many runs are done, which failed, and how to look at them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from typing_extensions import override

log = logging.getLogger(__name__)


class TellSweep(Callback):
    """A callback of Hydra."""

    failed = 0
    """So many runs of the last sweep of this process failed."""

    @override
    def on_multirun_end(self, config: DictConfig, **arguments: Any) -> None:
        where = Path(config.hydra.sweep.dir)
        done, failures = list(where.rglob("summary.json")), sorted(where.rglob("failure.json"))
        TellSweep.failed = len(failures)
        log.info(
            "%d runs are done, %d failed. Look at them: lightning-prune report %s", len(done), len(failures), where
        )
