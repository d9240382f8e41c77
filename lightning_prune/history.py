"""The cuts that a model has been through: kept with it, written to checkpoints, done again on a dense model."""

from __future__ import annotations

import inspect
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_prune import masks
from lightning_prune.cut import Cut, Offsets
from lightning_prune.errors import HistoryError, PruningError
from lightning_prune.layers import gates
from lightning_prune.records import from_plain, to_plain
from lightning_prune.selection import can_select, selected
from lightning_prune.sizes import stale_sizes
from lightning_prune.surgery import Undo, apply, revert, together, undo_all
from lightning_prune.tensors import attributes_of, named_modules, named_tensors, unwrapped
from lightning_prune.types import Attributes, PruneRecord
from lightning_prune.witnesses import witnesses_of

KEY = "pruning_history"
"""Under this key the history lies in a checkpoint."""

_ATTRIBUTE = "_pruning_history"

Model = TypeVar("Model", bound=nn.Module)


def history_of(model: nn.Module) -> tuple[PruneRecord, ...]:
    """Return all cuts of a model in order."""
    records: tuple[PruneRecord, ...] = unwrapped(model).__dict__.get(_ATTRIBUTE, ())
    return records


def commit(model: nn.Module, cut: Cut, record: PruneRecord, offsets: Offsets | None = None) -> Undo:
    """Do a cut, add its record to the model's history, and let the model's witnesses follow: all of it, or nothing."""
    model, offsets = unwrapped(model), offsets or Offsets()
    watching = witnesses_of(model)
    for witness in watching:
        witness.before_cut(model)
    with together() as steps:
        steps.append(_cut_and_record(model, cut, record, offsets))
        steps.append(gates.settle(model, cut.kept, cut.shapes))
        for witness in watching:
            steps.append(witness.after_cut(model, cut, offsets))
    return undo_all(steps)


def _cut_and_record(model: nn.Module, cut: Cut, record: PruneRecord, offsets: Offsets | None = None) -> Undo:
    notes: dict[str, object] = {_ATTRIBUTE: (*history_of(model), record)}
    if masks.masks_of(model):
        notes[masks.ATTRIBUTE] = masks.cut_masks(masks.masks_of(model), cut)
    return apply(model, cut, notes, offsets)


def replay(model: nn.Module, records: Sequence[PruneRecord]) -> None:
    """Do the cuts of a history again on a dense model, so that its weights fit; all of them, or none.

    Args:
        model: The dense model, or one that has been through the first of these cuts already.
        records: The history to reach.

    Raises:
        HistoryError: The model has other layers, has been through other cuts, or has gates.
    """
    if gates.gates_of(model) is not None:
        raise HistoryError("The model is gated, and its gates would not follow. Take them off: `gates.fold(model)`.")
    done = history_of(model)
    if tuple(records[: len(done)]) != done:
        raise HistoryError(
            f"The model has been through {len(done)} cuts that are not the first of this history's {len(records)}. "
            "Build a dense model and load into that."
        )
    reach(model, records)


def reach(model: nn.Module, records: Sequence[PruneRecord]) -> Undo:
    """Bring a model to the shapes of a history: take back the cuts that it does not share, then do the missing ones.

    Weights that had gone come back as zeros, for a checkpoint to fill. No witness is told: this is no new cut.

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
            steps.append(revert(model, _cut(done[count]), {_ATTRIBUTE: done[:count], masks.ATTRIBUTE: {}}))
        for record in records[common:]:
            _fit(model, record)
            steps.append(_cut_and_record(model, _cut(record), record))
            _check_sizes(model, record)
    return undo_all(steps)


def reach_gated(model: nn.Module, records: Sequence[PruneRecord], packed: object) -> Undo:
    """Bring a model to the shapes of a history, and to the gates that were written down with it.

    Args:
        model: The model; gates that it has are taken off.
        records: The history.
        packed: What `layers.gates.pack` has made; {} is no gates.

    Returns:
        What takes it all back.

    Raises:
        HistoryError: The model has other layers; it is unchanged.
    """
    with together() as steps:
        steps.append(gates.exchange(model, None))
        steps.append(reach(model, records))
        steps.append(gates.exchange(model, gates.unpack(packed, model)))
    return undo_all(steps)


def _cut(record: PruneRecord) -> Cut:
    kept = {
        name: {dim: torch.tensor(positions) for dim, positions in dims.items()} for name, dims in record.kept.items()
    }
    return Cut(record.shapes, kept, record.attributes, record.before, record.biases, record.selects)


def _fit(model: nn.Module, record: PruneRecord) -> None:
    """Make sure that a record's cut is one of this model's."""
    modules = named_modules(model)
    for name in record.selects:
        if not can_select(modules.get(name)) or record.selects.count(name) > 1:
            raise HistoryError(
                f"The history puts a ChannelSelect before {name!r}, which is no BatchNorm of the model, and no "
                "convolution in one group. Build the model with the arguments that it was trained with."
            )
    with selected(model, record.selects):
        _fit_tensors(model, record)


def _fit_tensors(model: nn.Module, record: PruneRecord) -> None:
    tensors = named_tensors(model)
    modules = named_modules(model)
    for name, dims in record.kept.items():
        have = tuple(tensors[name].shape) if name in tensors else None
        if have is None or have != record.shapes.get(name):
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
        if name not in modules or not _are_sizes(modules[name], values):
            raise HistoryError(f"The history sets sizes of the module {name!r} which the model does not have.")
    for name, width in record.biases.items():
        if name not in modules or not _lacks_bias(modules[name]) or not 0 < width <= _width(modules[name]):
            raise HistoryError(f"The history gives a bias to the module {name!r}, which has no place for one.")
    if attributes_of(model, record.attributes) != record.before or not _shrink(record.attributes, record.before):
        raise HistoryError(
            "The history changes sizes that are not the model's. Build it with the arguments that it was trained with."
        )


def _are_sizes(module: nn.Module, names: Iterable[str]) -> bool:
    """Tell whether a module holds numbers under all of these names, one or several."""
    values = [module.__dict__.get(name) for name in names if not name.startswith("_")]
    several = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    return len(values) == len(list(names)) and all(type(item) is int for items in several for item in items)


def _lacks_bias(module: nn.Module) -> bool:
    """Tell whether a module has a place for a bias that is empty."""
    return isinstance(module, (nn.Linear, _ConvNd)) and module._parameters.get("bias", module) is None


def _width(module: nn.Module) -> int:
    """Return how many channels a linear or convolutional module makes."""
    return int(getattr(module, "out_features" if isinstance(module, nn.Linear) else "out_channels"))


def _shrink(after: Attributes, before: Attributes) -> bool:
    """Tell whether no size grows, and none is gone."""
    return all(
        np.shape(value) == np.shape(before[name][key])
        and bool(np.all(np.less(0, value) & np.less_equal(value, before[name][key])))
        for name, values in after.items()
        for key, value in values.items()
    )


def _check_sizes(model: nn.Module, record: PruneRecord) -> None:
    """See that what was set is what the tensors say."""
    stale = stale_sizes(model)
    wrong = [name for name, values in record.attributes.items() if values.keys() & stale.get(name, {}).keys()]
    wrong += [name for name, width in record.biases.items() if width != _width(model.get_submodule(name))]
    if wrong:
        raise HistoryError(
            f"The history sets sizes of {wrong[0]} that contradict its tensors; the checkpoint is damaged."
        )


def save_pruned(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write weights, history, masks and gates of a model; the file appears whole or not at all.

    Args:
        model: The pruned model.
        path: Where to; `load_pruned` reads it.
    """
    target = Path(path)
    unfinished = target.with_name(f"{target.name}.unfinished")
    try:
        content = {"state_dict": unwrapped(model).state_dict(), KEY: to_plain(history_of(model))}
        held = {masks.KEY: masks.pack(masks.masks_of(model)), gates.KEY: gates.pack(gates.gates_of(model))}
        torch.save({**content, **held}, unfinished)
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
    checkpoint = read(path)
    try:
        state, plain = checkpoint["state_dict"], checkpoint[KEY]
        hyper = _arguments(checkpoint) if isinstance(model, type) else {}
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise HistoryError(
            f"{path} is no checkpoint with a pruning history ({type(error).__name__}: {error}). Save with a prune "
            "callback in the Trainer, or with `save_pruned`."
        ) from error
    records = from_plain(plain)
    if getattr(state, "_metadata", {}).get("", {}).get(KEY, plain) != plain:
        raise HistoryError(f"{path} holds two histories that differ; the checkpoint is damaged.")
    built = _built(model, hyper, arguments) if isinstance(model, type) else model
    undo = reach_gated(built, records, checkpoint.get(gates.KEY, {}))
    try:
        check_weights(unwrapped(built), state)
        held = masks.unpack(checkpoint.get(masks.KEY, {}), built)
        masks.check_zeros(held, state)
        unwrapped(built).load_state_dict(state)
        masks.hold(built, held)
    except (PruningError, RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        undo()
        raise HistoryError(f"The weights of {path} do not fit the model: {error}") from error
    except BaseException:
        undo()
        raise
    return built


def read(path: str | os.PathLike[str]) -> Any:
    """Read a file of weights and plain data; no code in it runs.

    Raises:
        HistoryError: It is damaged, or holds something else.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at its checksums
                torn = archive.testzip()
            if torn is not None:
                raise HistoryError(f"{path} is damaged: {torn} is not what was written.")
        return torch.load(path, map_location="cpu", weights_only=True)
    except HistoryError:
        raise
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
    return hyper if name in ("kwargs", None) else {str(name): hyper}


def _built(kind: type[Model], hyper: Mapping[str, Any], arguments: Mapping[str, Any]) -> Model:
    """Build a model as it was built for training; hyper-parameters that its class does not take are left out."""
    parameters = inspect.signature(kind).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        hyper = {name: value for name, value in hyper.items() if name in parameters}
    model = kind(**{**hyper, **arguments})
    configure_model = getattr(model, "configure_model", None)  # where a LightningModule may make its layers
    if callable(configure_model):
        configure_model()
    return model


def check_weights(model: nn.Module, state: Mapping[str, Any]) -> None:
    """See that all weights fit before the first of them is written.

    Raises:
        ValueError: A name or a shape differs.
    """
    own = model.state_dict()
    if own.keys() != state.keys():
        missing, foreign = sorted(own.keys() - state.keys())[:3], sorted(state.keys() - own.keys())[:3]
        raise ValueError(f"missing {missing}, unexpected {foreign}")
    for name, tensor in own.items():
        if isinstance(tensor, torch.Tensor) and _kind(state[name]) != _kind(tensor):
            raise ValueError(f"{name} is {_kind(state[name])} there and {_kind(tensor)} here")


def _kind(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what two tensors must have in common for one to be copied into the other."""
    number = "float" if tensor.is_floating_point() else str(tensor.dtype)
    return tuple(tensor.shape), tensor.layout, number, tensor.is_meta
