"""Batches cut from tensors in one indexing step, in an order that a resumed run finds again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset


def generator_for(purpose: str, *numbers: int) -> Generator:
    """A CPU generator that depends on a purpose and some numbers only; another purpose draws other numbers.

    Example:
        >>> a, b = generator_for("order", 7, 1), generator_for("order", 7, 1)
        >>> torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))
        True
    """
    digest = sha256(f"{purpose} {numbers}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class TensorImages(TensorDataset):
    """Images and labels in memory; a batch is one indexing step."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """The whole batch, stacked."""
        rows = torch.tensor(indices)
        return tuple(tensor[rows] for tensor in self.tensors)


class EpochShuffle(Sampler[int]):
    """A shuffled order that depends on the seed and the epoch only.

    Lightning calls `set_epoch` before each epoch, so that a resumed run sees the order of the unbroken one.

    Args:
        size: How many items there are.
        seed: 0 or more.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch from the next pass on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """The indices of one epoch."""
        yield from torch.randperm(self.size, generator=generator_for("order", self.seed, self.epoch)).tolist()

    def __len__(self) -> int:
        """How many indices an epoch has."""
        return self.size


class TensorLoader(DataLoader[tuple[Tensor, ...]]):
    """A loader over `TensorImages` that goes on at the batch where a checkpoint was written.

    Lightning keeps the state of each training loader that has `state_dict` and `load_state_dict`.
    """

    _seen = 0
    _restored: Mapping[str, int] = MappingProxyType({})

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches of an epoch, without those that were done when its checkpoint was written."""
        same_epoch = self._restored.get("epoch") == self._epoch
        self._seen = self._restored["seen"] if same_epoch else 0
        self._restored = {}
        for batch in islice(super().__iter__(), self._seen, None):
            self._seen += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of which epoch are done."""
        return {"epoch": self._epoch, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Skip what is done, if the next pass is over the same epoch."""
        self._restored = state

    @property
    def _epoch(self) -> int:
        return int(getattr(self.sampler, "epoch", 0))


def loader(dataset: TensorImages, batch_size: int, *, order: EpochShuffle | None = None) -> TensorLoader:
    """Batches in the given order, or as the images lie."""
    return TensorLoader(
        dataset,
        batch_size=batch_size,
        sampler=order,
        collate_fn=_as_is,
        # a loader draws one number per pass: from its own generator, to leave the global one alone
        generator=torch.Generator(),
    )


def _as_is(batch: Any) -> Any:
    return batch
