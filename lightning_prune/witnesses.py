"""Those who are told of each cut of a model, and follow it or measure around it."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from lightning_prune.cut import Cut, Offsets
from lightning_prune.surgery import Undo
from lightning_prune.tensors import unwrapped


class Witness(Protocol):
    """Somebody who is told of each cut of a model."""

    def before_cut(self, model: nn.Module) -> None:
        """See the model before a cut."""

    def after_cut(self, model: nn.Module, cut: Cut, offsets: Offsets) -> Undo:
        """See the model after a cut; if this fails, the cut is taken back.

        Args:
            model: The model, with the record in its history.
            cut: What was done.
            offsets: What was added to tensors before they were cut.

        Returns:
            What takes back what the witness has done, should the cut be taken back.
        """


_WITNESSES: WeakKeyDictionary[nn.Module, WeakSet[Witness]] = WeakKeyDictionary()
"""Beside the models, not in them: copies and files of a model have no witnesses."""


def watch(model: nn.Module, witness: Witness) -> None:
    """Tell a witness of each cut of a model from now on, as long as both live."""
    _WITNESSES.setdefault(unwrapped(model), WeakSet()).add(witness)


def leave(model: nn.Module, witness: Witness) -> None:
    """Tell a witness no longer."""
    _WITNESSES.get(unwrapped(model), WeakSet()).discard(witness)


def witnesses_of(model: nn.Module) -> tuple[Witness, ...]:
    """Return those who watch a model."""
    return tuple(_WITNESSES.get(unwrapped(model), ()))
