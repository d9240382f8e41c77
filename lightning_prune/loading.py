"""The weights of a checkpoint, dense or pruned, into a model."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import HistoryError
from lightning_prune.history import KEY, load_pruned


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load what a Trainer or `save_pruned` has written, whether the network in it was pruned or not.

    Args:
        model: A model built as it was for training; it takes the shapes of the checkpoint.
        path: The checkpoint. It is read as weights and plain data only: no code in it runs.

    Raises:
        HistoryError: The file is no checkpoint, or does not fit the model.
    """
    weights = _dense_weights(path)
    if weights is None:
        load_pruned(model, path)
        return
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise HistoryError(
            f"The weights of {path} do not fit the model: {error}. Choose the model that it was trained with."
        ) from error


def _dense_weights(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the weights of a checkpoint without a history; None of all else, with which `load_pruned` deals."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # `load_pruned` says what is wrong with the file
        return None
    return content.get("state_dict") if isinstance(content, dict) and KEY not in content else None
