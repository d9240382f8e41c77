"""A tensor with many zeros as its other values and where they lie, in as few bits as it takes, and back bit for bit.

Two codes say where the values lie, and the smaller one is taken. A bitmap has one bit for each element. Relative
indices (Han et al. 2015, "Deep Compression", section 2; 5 bits for linear layers and 8 for convolutions there) have for
each value the number of zeros before it, in the width that is smallest for the tensor. A gap too large for the width
takes a code of its own, all bits 1, that skips so many elements; the paper puts a zero there, which costs a value and
could not be told from a kept weight that is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.masks.held import packed_bits, unpacked_bits

_WIDTHS = range(2, 17)
_PIECE = 2**20
"""So many codes are packed at a time, a multiple of 8 so that each piece fills whole bytes."""


@dataclass(frozen=True, eq=False)
class Coded:
    """A tensor as its values and where they lie.

    Attributes:
        shape: Its shape.
        values: The values, in order and in their own type; all others are 0.
        index: Where they lie, in bytes.
        width: Bits of a relative index, 2 to 16; 0 where `index` is a bitmap.
        codes: How many relative indices there are; 0 for a bitmap.
    """

    shape: tuple[int, ...]
    values: Tensor
    index: Tensor
    width: int = 0
    codes: int = 0

    @property
    def bytes(self) -> int:
        """What values and index take."""
        return self.values.nbytes + self.index.nbytes

    def to_plain(self) -> dict[str, Any]:
        """Turn it into numbers and tensors, which `weights_only` loading reads."""
        return {**vars(self), "shape": list(self.shape)}


def occupied(tensor: Tensor) -> Tensor:
    """Mark the elements that have any bit set: also -0, unlike a comparison with 0."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return (flat.view(torch.uint8).view(-1, tensor.element_size()) != 0).any(1).view(tensor.shape)


def encode(tensor: Tensor, where: Tensor) -> Coded:
    """Code a tensor.

    Args:
        tensor: Strided, on any device.
        where: Bool tensor of its shape: the elements whose values are kept. All others have no bit set.

    Example:
        >>> coded = encode(torch.eye(8), torch.eye(8).bool())
        >>> coded.width, coded.index.nbytes, decode(coded).equal(torch.eye(8))
        (4, 4, True)
    """
    mask = where.detach().cpu().reshape(-1)
    values = tensor.detach().cpu().reshape(-1)[mask]
    gaps = np.diff(np.flatnonzero(mask.numpy()), prepend=-1) - 1
    lengths = {width: len(gaps) + int((gaps // _skip(width)).sum()) for width in _WIDTHS}
    width = min(lengths, key=lambda width: width * lengths[width])
    if width * lengths[width] >= mask.numel():
        return Coded(tuple(tensor.shape), values, packed_bits(mask))
    return Coded(tuple(tensor.shape), values, _packed(_codes(gaps, width), width), width, lengths[width])


def decode(coded: Coded) -> Tensor:
    """Return the tensor.

    Raises:
        ValueError: Values and index contradict each other, or the shape.
        TypeError: The index is no tensor of bytes.
    """
    size = prod(coded.shape)
    tensor = torch.zeros(size, dtype=coded.values.dtype)
    tensor[places(coded)] = coded.values
    return tensor.view(coded.shape)


def places(coded: Coded) -> Tensor:
    """Return where the values lie in the flat tensor, ascending.

    Raises:
        ValueError: Values and index contradict each other, or the shape.
        TypeError: The index is no tensor of bytes.
    """
    size = prod(coded.shape)
    found = _places(coded) if coded.width else unpacked_bits(coded.index, (size,)).nonzero().squeeze(1)
    if len(found) != len(coded.values) or (len(found) and int(found[-1]) >= size):
        raise ValueError(f"{len(coded.values)} values for {len(found)} places among {size}")
    return found


def from_plain(plain: Any, shape: Sequence[int]) -> Coded:
    """Read what `Coded.to_plain` has made.

    Args:
        plain: What a file holds.
        shape: The shape that the tensor must have.

    Raises:
        ValueError: A number is impossible.
        TypeError: Something is of another type.
        KeyError: Something is missing.
    """
    if type(plain) is not dict or plain.keys() != {"shape", "values", "index", "width", "codes"}:
        raise TypeError("no coded tensor")
    values, width, codes = plain["values"], plain["width"], plain["codes"]
    if type(plain["shape"]) is not list or plain["shape"] != list(shape):
        raise ValueError(f"shape {str(plain['shape'])[:50]} in place of {list(shape)}")
    if type(values) is not Tensor or values.dim() != 1 or values.layout is not torch.strided or values.is_meta:
        raise TypeError("values that are no tensor of one dimension")
    if (
        type(width) is not int
        or type(codes) is not int
        or not (width == codes == 0 or (width in _WIDTHS and codes >= 0))
    ):
        raise ValueError(f"{codes} codes of {width} bits")
    return Coded(tuple(shape), values, plain["index"], width, codes)


def _skip(width: int) -> int:
    """Return the code that skips so many elements and has no value."""
    return (1 << width) - 1


def _codes(gaps: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    skips, rest = np.divmod(gaps, _skip(width))
    ends = np.cumsum(skips + 1) - 1
    codes = np.full(int(ends[-1]) + 1 if len(ends) else 0, _skip(width), dtype=np.int64)
    codes[ends] = rest
    return codes


def _packed(codes: NDArray[np.int64], width: int) -> Tensor:
    shifts = np.arange(width - 1, -1, -1)
    packed = [np.empty(0, dtype=np.uint8)]
    for start in range(0, len(codes), _PIECE):
        bits = codes[start : start + _PIECE, None] >> shifts & 1
        packed.append(np.packbits(bits.astype(np.bool_).reshape(-1)))
    return torch.from_numpy(np.concatenate(packed))


def _places(coded: Coded) -> Tensor:
    bits = unpacked_bits(coded.index, (coded.codes * coded.width,)).numpy().reshape(-1, coded.width)
    codes = np.zeros(coded.codes, dtype=np.int64)
    for column in range(coded.width):
        codes = codes * 2 + bits[:, column]
    skips = codes == _skip(coded.width)
    ends = np.cumsum(np.where(skips, codes, codes + 1)) - 1
    return torch.from_numpy(ends[~skips])
