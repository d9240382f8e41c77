"""Pruned checkpoints in files as small as their weights: zeros are not stored, and all comes back bit for bit."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune import history, masks
from lightning_prune.errors import HistoryError
from lightning_prune.masks.coding import Coded, decode, encode, from_plain, occupied, places
from lightning_prune.masks.held import Masks, masks_of
from lightning_prune.records import from_plain as read_records
from lightning_prune.records import to_plain
from lightning_prune.tensors import named_parameters, unwrapped

Model = TypeVar("Model", bound=nn.Module)

_PARTS = ("state_dict", "versions", "sparse", "masked")

_OVERHEAD = 512
"""Bytes that an entry of the file's archive takes beside its content: less is not worth the code."""


def save_sparse(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write weights, history and masks of a model, without the zeros; the file appears whole or not at all.

    Each tensor is written in the smallest of three ways: as it is, as values and a bitmap, or as values and relative
    indices (see `coding`). A tensor with 2 of every 4 weights takes its values and 4 bits a group. A mask
    takes nothing where it says what the values say.

    Args:
        model: The pruned model.
        path: Where to; `load_sparse` reads it.
    """
    state = unwrapped(model).state_dict()
    held = masks_of(model)
    coded = _coded(state, held)
    implied = [name for name, mask in held.items() if name in coded and coded[name].where.equal(mask.cpu())]
    content = {
        "state_dict": {name: entry for name, entry in state.items() if name not in coded},
        "versions": _versions(state),
        "sparse": {name: entry.plain for name, entry in coded.items()},
        "masked": implied,
        masks.KEY: masks.pack({name: mask for name, mask in held.items() if name not in implied}),
        history.KEY: to_plain(history.history_of(model)),
    }
    target = Path(path)
    unfinished = target.with_name(f"{target.name}.unfinished")
    try:
        torch.save(content, unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def load_sparse(model: Model, path: str | os.PathLike[str]) -> Model:
    """Load a file of `save_sparse` into a model.

    Args:
        model: A model built as it was for training, dense or pruned, which is changed in place.
        path: The file. It is read as weights and plain data only: no code in it runs.

    Returns:
        The model, in the shapes of the file, with its weights, history and masks.

    Raises:
        HistoryError: The file is none of `save_sparse`, or does not fit the model, which is then unchanged.
    """
    content = history.read(path)
    if type(content) is not dict or content.keys() != {*_PARTS, masks.KEY, history.KEY}:
        raise HistoryError(f"{path} is no file of `save_sparse`. Files of `save_pruned` are for `load_pruned`.")
    records = read_records(content[history.KEY])
    undo = history.reach(model, records)
    try:
        state, held = _decoded(content, unwrapped(model))
        history.check_weights(unwrapped(model), state)
        unwrapped(model).load_state_dict(state)
        masks.hold(model, held)
    except HistoryError:
        undo()
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        undo()
        raise HistoryError(
            f"The weights of {path} do not fit the model, or are damaged: {str(error)[:300]}. Build the model with the "
            "arguments that it was trained with."
        ) from error
    except BaseException:
        undo()
        raise
    return model


@dataclass(frozen=True, eq=False)
class _Entry:
    """A tensor's code, and where its values lie."""

    plain: Mapping[str, Any]
    where: Tensor


def _coded(state: Mapping[str, Any], held: Masks) -> dict[str, _Entry]:
    """Code the tensors that get smaller by it; those that share their memory share their code."""
    found: dict[str, _Entry] = {}
    seen: dict[tuple[object, ...], _Entry | None] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta:
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            if place not in seen:
                seen[place] = _entry(tensor, held.get(name))
            entry = seen[place]
            if entry is not None:
                found[name] = entry
    return found


def _entry(tensor: Tensor, mask: Tensor | None) -> _Entry | None:
    where = occupied(tensor)
    where = where if mask is None else where | mask.cpu()
    coded: Coded = encode(tensor, where)
    return _Entry(coded.to_plain(), where) if coded.bytes + _OVERHEAD < tensor.nbytes else None


def _versions(state: Mapping[str, Any]) -> dict[str, int]:
    """Return the versions of the layers, by which `load_state_dict` tells what an older torch has written."""
    noted: Mapping[str, Mapping[str, Any]] = getattr(state, "_metadata", {})
    return {name: entry["version"] for name, entry in noted.items() if isinstance(entry.get("version"), int)}


def _decoded(content: Mapping[str, Any], model: nn.Module) -> tuple[Mapping[str, Any], Masks]:
    """Return the whole state and the masks of a file."""
    state, versions, sparse, masked = (content[part] for part in _PARTS)
    own = model.state_dict()
    if [type(part) for part in (state, versions, sparse, masked)] != [dict, dict, dict, list]:
        raise TypeError("no weights in the file")
    if any(type(name) is not str or type(version) is not int for name, version in versions.items()):
        raise TypeError("versions of layers that are no numbers")
    if not sparse.keys() <= own.keys() or sparse.keys() & state.keys():
        raise ValueError(f"unexpected {sorted(map(str, sparse.keys() - own.keys()))[:3]}, or some of them twice")
    coded = {name: from_plain(plain, own[name].shape) for name, plain in sparse.items()}
    whole = OrderedDict({**state, **{name: decode(code) for name, code in coded.items()}})
    whole.__dict__["_metadata"] = {name: {"version": version} for name, version in versions.items()}
    explicit = masks.unpack(content[masks.KEY], model)
    weights = named_parameters(model)
    implied = {name: _mask(coded[name], weights[name]) for name in masked}
    return whole, {**explicit, **implied}


def _mask(coded: Coded, weight: Tensor) -> Tensor:
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[places(coded)] = True
    return mask.view(weight.shape).to(weight.device)
