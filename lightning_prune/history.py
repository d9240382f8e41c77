"""The cuts that a model has been through: kept with it, written to checkpoints, done again on a dense model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_prune.cut import Cut
from lightning_prune.errors import HistoryError
from lightning_prune.surgery import Undo, apply, revert, together
from lightning_prune.tensors import attributes_of, named_modules, named_tensors, unwrapped
from lightning_prune.types import Attributes, Change, PruneRecord

KEY = "pruning_history"
"""Under this key the history lies in a checkpoint."""

_ATTRIBUTE = "_pruning_history"

Model = TypeVar("Model", bound=nn.Module)


def history_of(model: nn.Module) -> tuple[PruneRecord, ...]:
    """Return all cuts of a model in order."""
    records: tuple[PruneRecord, ...] = unwrapped(model).__dict__.get(_ATTRIBUTE, ())
    return records


def commit(model: nn.Module, cut: Cut, record: PruneRecord) -> Undo:
    """Do a cut and add its record to the model's history: both, or neither."""
    return apply(unwrapped(model), cut, {_ATTRIBUTE: (*history_of(model), record)})


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
        return tuple(_record(item) for item in plain)  # type: ignore[attr-defined]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HistoryError(
            f"The pruning history is damaged or from another version ({type(error).__name__}: {error}). "
            "Load a checkpoint that this version of lightning_prune has written."
        ) from error


def _record(plain: Mapping[str, Any]) -> PruneRecord:
    return PruneRecord(
        **{
            **plain,
            "channels": {str(name): Change(**change) for name, change in plain["channels"].items()},
            "params": Change(**plain["params"]),
            "macs": Change(**plain["macs"]),
            "shapes": {str(name): tuple(map(int, shape)) for name, shape in plain["shapes"].items()},
            "kept": {
                str(name): {int(dim): tuple(map(int, positions)) for dim, positions in dims.items()}
                for name, dims in plain["kept"].items()
            },
            "attributes": _sizes(plain["attributes"]),
            "before": _sizes(plain["before"]),
        }
    )


def _sizes(plain: Mapping[str, Any]) -> Attributes:
    return {
        str(name): {
            str(key): tuple(map(int, value)) if isinstance(value, (list, tuple)) else int(value)
            for key, value in values.items()
        }
        for name, values in plain.items()
    }


def replay(model: nn.Module, records: Sequence[PruneRecord]) -> None:
    """Do the cuts of a history again on a dense model, so that its weights fit; all of them, or none.

    Args:
        model: The dense model, or one that has been through the first of these cuts already.
        records: The history to reach.

    Raises:
        HistoryError: The model has other layers, or has been through other cuts.
    """
    done = history_of(model)
    if tuple(records[: len(done)]) != done:
        raise HistoryError(
            f"The model has been through {len(done)} cuts that are not the first of this history's {len(records)}. "
            "Build a dense model and load into that."
        )
    reach(model, records)


def reach(model: nn.Module, records: Sequence[PruneRecord]) -> Undo:
    """Bring a model to the shapes of a history: take back the cuts that it does not share, then do the missing ones.

    Weights that had gone come back as zeros, for a checkpoint to fill.

    Returns:
        What takes it all back, weights included.

    Raises:
        HistoryError: The model has other layers; it is unchanged.
    """
    model = unwrapped(model)
    done = history_of(model)
    shared = next((at for at, pair in enumerate(zip(done, records, strict=False)) if pair[0] != pair[1]), None)
    common = min(len(done), len(records)) if shared is None else shared
    with together() as steps:
        for count in reversed(range(common, len(done))):
            steps.append(revert(model, _cut(done[count]), {_ATTRIBUTE: done[:count]}))
        for record in records[common:]:
            _fit(model, record)
            steps.append(commit(model, _cut(record), record))

    def undo() -> None:
        for step in reversed(steps):
            step()

    return undo


def _cut(record: PruneRecord) -> Cut:
    kept = {
        name: {dim: torch.tensor(positions) for dim, positions in dims.items()} for name, dims in record.kept.items()
    }
    return Cut(record.shapes, kept, record.attributes, record.before)


def _fit(model: nn.Module, record: PruneRecord) -> None:
    """Make sure that a record's cut is one of this model's."""
    tensors = named_tensors(model)
    modules = named_modules(model)
    for name, dims in record.kept.items():
        have = tuple(tensors[name].shape) if name in tensors else None
        if have != record.shapes.get(name):
            raise HistoryError(
                f"The history cuts {name} of shape {record.shapes.get(name)}, but the model's is {have}. "
                "Build the model with the arguments that it was trained with."
            )
        for dim, positions in dims.items():
            size = record.shapes[name][dim] if 0 <= dim < len(record.shapes[name]) else 0
            ascending = all(low < high for low, high in pairwise(positions))
            if not (positions and ascending and positions[0] >= 0 and positions[-1] < size):
                raise HistoryError(f"The history keeps impossible positions of {name}; the checkpoint is damaged.")
    for name, values in record.attributes.items():
        if name not in modules or not all(key in modules[name].__dict__ for key in values):
            raise HistoryError(f"The history sets sizes of the module {name!r}, which the model does not have.")
    if attributes_of(model, record.attributes) != record.before:
        raise HistoryError(
            "The history changes sizes that are not the model's. Build it with the arguments that it was trained with."
        )


def save_pruned(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write weights and history of a model; the file appears whole or not at all.

    Args:
        model: The pruned model.
        path: Where to; `load_pruned` reads it.
    """
    target = Path(path)
    unfinished = target.with_name(f"{target.name}.unfinished")
    try:
        torch.save({"state_dict": unwrapped(model).state_dict(), KEY: to_plain(history_of(model))}, unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def load_pruned(model: Model | type[Model], path: str | os.PathLike[str], **arguments: Any) -> Model:
    """Load a pruned checkpoint into a model.

    Args:
        model: A model built as it was for training, dense or pruned, which is changed in place; or its class, which
            is called with the hyper-parameters that the checkpoint holds.
        path: A checkpoint that a Trainer with a prune callback, or `save_pruned`, has written. It is read as weights
            and plain data only: no code in it runs.
        **arguments: What the class is called with in place of the checkpoint's hyper-parameters of these names.

    Returns:
        The model, in the shapes of the checkpoint and with its weights.

    Raises:
        HistoryError: The file is no such checkpoint, or does not fit the model, which is then unchanged.
    """
    checkpoint = _read(path)
    try:
        state, plain = checkpoint["state_dict"], checkpoint[KEY]
        hyper = _arguments(checkpoint) if isinstance(model, type) else {}
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise HistoryError(
            f"{path} is no checkpoint with a pruning history ({type(error).__name__}: {error}). Save with a prune "
            "callback in the Trainer, or with `save_pruned`."
        ) from error
    records = from_plain(plain)
    built = model(**_accepted(model, {**hyper, **arguments})) if isinstance(model, type) else model
    undo = reach(built, records)
    try:
        _check_weights(unwrapped(built), state)
        unwrapped(built).load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        undo()
        raise HistoryError(f"The weights of {path} do not fit the model: {error}") from error
    except BaseException:
        undo()
        raise
    return built


def _read(path: str | os.PathLike[str]) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except UnpicklingError as error:
        if "Unsupported global" not in str(error):
            raise HistoryError(f"{path} is no checkpoint: it is damaged, or of another kind.") from error
        raise HistoryError(
            f"{path} holds more than weights and plain data, which is not read for safety. If it is yours, "
            "keep objects out of its hyper-parameters (`save_hyperparameters(ignore=...)`) and save it again."
        ) from error
    except Exception as error:
        raise HistoryError(f"{path} is no checkpoint: it is damaged, or of another kind ({error}).") from error


def _arguments(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters as the model's class was called with them."""
    hyper = dict(checkpoint.get("hyper_parameters", {}))
    name = checkpoint.get("hparams_name", "kwargs")
    return hyper if name == "kwargs" else {str(name): hyper}


def _accepted(kind: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what the class does not take."""
    parameters = inspect.signature(kind).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def _check_weights(model: nn.Module, state: Mapping[str, Any]) -> None:
    """See that all weights fit before the first of them is written."""
    own = model.state_dict()
    if own.keys() != state.keys():
        missing, foreign = sorted(own.keys() - state.keys())[:3], sorted(state.keys() - own.keys())[:3]
        raise ValueError(f"missing {missing}, unexpected {foreign}")
    for name, tensor in own.items():
        if isinstance(tensor, torch.Tensor) and tensor.shape != state[name].shape:
            raise ValueError(f"{name} is {tuple(state[name].shape)} there and {tuple(tensor.shape)} here")
