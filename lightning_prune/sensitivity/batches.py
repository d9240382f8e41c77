"""Validation batches: read once and kept where they are small, else read again each time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_prune.batches import Batch, taken_apart
from lightning_prune.inputs import Inputs, tensors_in
from lightning_prune.tensors import named_tensors

_KEPT = 2**28
"""Batches of so many bytes together are kept: 256 MiB."""

_TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class Batches:
    """The validation batches of a data module, a loader or a list, as often as they are asked for.

    They come as Lightning's validation loop gets them: through `prepare_data` and `setup("validate")`, and through the
    hooks around the transfer to the device that the data module, or else the model, brings along. What is yielded are
    copies, so that a forward that writes to its inputs does not spoil the next pass.

    Args:
        source: A LightningDataModule, or anything that yields batches and can be gone through again.
        model: The model that they are for.
        limit: Read so many batches only, 1 or more; None reads all.

    Raises:
        ValueError: There are no validation batches, or `limit` is below 1.
        TypeError: `source` is none of these.
    """

    def __init__(self, source: object, model: nn.Module, limit: int | None = None) -> None:
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(f"`batches` is how many batches are read, 1 or more; got {limit!r}. None reads all.")
        self._loaders = _loaders(source)
        self._source = source
        self._model = model
        self._limit = limit
        self._kept: list[Any] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in the loader's order."""
        for batch in self._read() if self._kept is None else self._kept:
            yield taken_apart(self._model, _each_tensor(batch, torch.clone))

    def _read(self) -> Iterator[Any]:
        kept: list[Any] = []
        size = count = 0
        for batch in islice(self._prepared(), self._limit):
            size += sum(tensor.nbytes for tensor in tensors_in(batch))
            count += 1
            if size <= _KEPT:
                kept.append(batch)
            else:
                kept.clear()
            yield batch
        if not count:
            raise ValueError(_no_batches(self._source))
        self._kept = kept if size <= _KEPT else None

    def _prepared(self) -> Iterator[Any]:
        """Yield the batches on the model's device, after the hooks that belong to them."""
        owners = (self._source, self._model)
        before, move, after = (_hook(owners, name) for name in _TRANSFER)
        device = next(iter(named_tensors(self._model).values()), torch.empty(0)).device
        for index, loader in enumerate(self._loaders):
            for batch in loader:
                ready = before(batch, index) if before else batch
                ready = move(ready, device, index) if move else _each_tensor(ready, lambda part: part.to(device))
                yield after(ready, index) if after else ready


def _loaders(source: object) -> list[Iterable[Any]]:
    """Return what yields the validation batches."""
    if not callable(getattr(source, "val_dataloader", None)):
        return [_checked(source)]
    module: Any = source
    if _hook((module,), "val_dataloader") is None:
        raise ValueError(_no_batches(source))
    for name, arguments in (("prepare_data", ()), ("setup", ("validate",))):
        getattr(module, name, lambda *_: None)(*arguments)
    found = module.val_dataloader()
    loaders = list(found) if isinstance(found, (list, tuple)) else [found]
    if not loaders or found is None:
        raise ValueError(_no_batches(source))
    return [_checked(loader) for loader in loaders]


def _checked(loader: Any) -> Iterable[Any]:
    if isinstance(loader, (str, Mapping, Tensor, nn.Module, Dataset)) or not isinstance(loader, Iterable):
        raise TypeError(
            f"`datamodule` is a LightningDataModule, a DataLoader or a list of batches; got a {type(loader).__name__}. "
            "Put a single batch in a list, and a data set in a DataLoader."
        )
    if isinstance(loader, Iterator):
        raise TypeError(
            f"`datamodule` is gone through many times, and a {type(loader).__name__} only once. Pass a DataLoader, or "
            "list(...) of it."
        )
    return loader


def _hook(owners: Iterable[object], name: str) -> Callable[..., Any] | None:
    """Return the first hook of this name that is not the empty one every Lightning module is born with."""
    for owner in owners:
        own = getattr(type(owner), name, None)
        if own is not None and not getattr(own, "__qualname__", "").startswith("DataHooks."):
            hook: Callable[..., Any] = getattr(owner, name)
            return hook
    return None


def _no_batches(source: object) -> str:
    return (
        f"`datamodule` gives no validation batches; got {type(source).__name__}. Let its `val_dataloader` return a "
        "loader that is not empty, or pass a DataLoader or a list of batches."
    )


def _each_tensor(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return Inputs((batch,)).map(change).args[0]
