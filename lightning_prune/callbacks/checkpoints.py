"""Checkpoints that know their shape: the history lies in each of them, and comes before the weights when they load."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_prune import history, masks
from lightning_prune.callbacks.averages import averaged_copies
from lightning_prune.layers import gates
from lightning_prune.records import from_plain, to_plain
from lightning_prune.surgery import together


def follow_checkpoints(pl_module: pl.LightningModule) -> None:
    """Write the history into every checkpoint, and cut the module to a checkpoint's shapes before its weights load.

    A callback's own hooks do not do: saving weights only skips them, and for loading they come too late. These stay
    with the module, so that it is saved with its history whatever Trainer it meets next.
    """
    pl_module.__dict__.setdefault("on_save_checkpoint", partial(_save_with_history, pl_module))
    pl_module.__dict__.setdefault("on_load_checkpoint", partial(_reach_then_load, pl_module))


def _save_with_history(pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    _save(pl_module, checkpoint)
    type(pl_module).on_save_checkpoint(pl_module, checkpoint)


def _save(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Add the history, and masks and gates if there are any."""
    checkpoint[history.KEY] = to_plain(history.history_of(module))
    if masks.masks_of(module):
        checkpoint[masks.KEY] = masks.pack(masks.masks_of(module))
    if gates.gates_of(module) is not None:
        checkpoint[gates.KEY] = gates.pack(gates.gates_of(module))


def _reach(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Bring a network to the shapes of a checkpoint and its gates, and let it hold the checkpoint's masks."""
    with together() as steps:
        records = from_plain(checkpoint.get(history.KEY, []))
        steps.append(history.reach_gated(module, records, checkpoint.get(gates.KEY, {})))
        masks.hold(module, masks.unpack(checkpoint.get(masks.KEY, {}), module))


def _reach_then_load(pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    copies = averaged_copies(pl_module._trainer) if pl_module._trainer is not None else ()
    for network in (pl_module, *copies):
        _reach(network, checkpoint)
    type(pl_module).on_load_checkpoint(pl_module, checkpoint)


def warn_of_late_scores(trainer: pl.Trainer) -> None:
    """Warn of checkpoints that are written long after the validation whose score they bear, with a cut in between."""
    validated = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
    for keep in trainer.checkpoint_callbacks:
        if not isinstance(keep, ModelCheckpoint) or "val" not in (keep.monitor or ""):
            continue
        on_steps = keep._every_n_train_steps > 0 or keep._train_time_interval is not None
        if on_steps or (keep._save_on_train_epoch_end and not validated):
            rank_zero_warn(
                f"A ModelCheckpoint saves between validations with the last {keep.monitor!r}: a file can hold a "
                "network from after a cut with a score from before it. Let it save when validation ends: leave out "
                "`save_on_train_epoch_end`, `every_n_train_steps` and `train_time_interval`."
            )


if TYPE_CHECKING:
    _Base = pl.LightningModule
else:
    _Base = object


class PrunedStateMixin(_Base):
    """For a LightningModule whose weights bring their shapes along, wherever they are loaded.

    With a prune callback in the Trainer, `fit`, `validate`, `test` and `predict` need nothing more. This mixin makes
    `load_from_checkpoint` and `load_state_dict` do the same, and strategies that start processes of their own
    (`ddp_spawn`, `ddp_fork`), which bring the weights back into a dense module.

    Example:
        >>> class Net(PrunedStateMixin, pl.LightningModule):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the history."""
        _save(self, checkpoint)
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reach the checkpoint's shapes."""
        _reach(self, checkpoint)
        super().on_load_checkpoint(checkpoint)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weights, with the history among what torch notes about them."""
        state = super().state_dict(*args, **kwargs)
        if hasattr(state, "_metadata"):
            own = kwargs.get("prefix", args[1] if len(args) > 1 else "")[:-1]
            state._metadata.setdefault(own, {})[history.KEY] = to_plain(history.history_of(self))
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Reach the shapes of the weights, then load them."""
        plain = getattr(state_dict, "_metadata", {}).get("", {}).get(history.KEY)
        with together() as steps:
            if plain is not None:
                steps.append(history.reach(self, from_plain(plain)))
            return super().load_state_dict(state_dict, *args, **kwargs)
