"""What a model costs on average when each of its channels is there by chance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import product
from math import fsum, isclose, prod
from operator import mul
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.cost.planned import Share
from lightning_prune.cost.price import ShapeOf
from lightning_prune.cost.shapes import Shapes
from lightning_prune.graph import Graph
from lightning_prune.labels import LabelArray, Labels


class ExpectedCost:
    r"""The expected cost of a model whose channels are there independently of each other, by known probabilities.

    The cost of each part is a polynomial in the sizes of its dimensions, and these are linear in the widths: a size is
    s = fixed + sum over groups g of positions_g n_g. A width n_g is a sum of independent Bernoulli variables, so its
    cumulants are sums over channels: p, p (1 - p), p (1 - p) (1 - 2p), p (1 - p) (1 - 6p (1 - p)). Then

        E[s_1 ... s_k] = sum over the partitions of {1..k} of the product over the blocks B of
                         sum over groups g of (product over i in B of positions_g,i) * cumulant_|B|(n_g)

    (Leonov & Shiryaev 1959; the sizes' fixed parts join the blocks of one). For two sizes it is E[s] E[t] + Cov[s, t].
    This is exact: also where the same channels stand on both sides of a weight, and a channel's square counts.

    The polynomials are found once, by interpolation at 2, 3 and 4 times the present sizes: those are integers of at
    least 2, since a size of 1 can mean a broadcast, and multiples, which stay divisible by all that the present sizes
    are. Each polynomial is compared with the part's cost at the present widths, at one channel less, and at half.

    A call takes 11 to 15 tensor operations, and about as many backward, however deep the model is; nothing is copied
    to the host. It computes in float32, in float64 where the probabilities are; autocast changes nothing. Instances
    can be copied and pickled.

    Args:
        graph: A reading of the model.
        shares: What says the cost of each part; each asks for the same shapes however large they are.
        groups: Names of the groups whose channels can be missing, none of them frozen; others keep their widths.

    Attributes:
        groups: Group name -> how many channels it has, in the order of the argument.
        dense: The cost with all channels.

    Raises:
        ValueError: A name is no group's, that of a frozen one, or given twice; or a part's cost is no polynomial in
            sizes, of a degree of at most 4 in each size and in each group.
        TypeError: `groups` is a string.

    Example:
        >>> from torch import nn
        >>> from lightning_prune.cost.costs import Costs
        >>> from lightning_prune.graph import read
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> cost = Costs(net, read(net, torch.zeros(1, 4))).expected("macs", ["0"])
        >>> cost.dense, cost([torch.full((10,), 0.25)])
        (60.0, tensor(15.))
    """

    def __init__(self, graph: Graph, shares: Iterable[Share], groups: Sequence[str]) -> None:
        self.groups = _sizes_of(graph, groups)
        sizes = _Sizes(graph, self.groups)
        parts = list(shares)
        self.dense = fsum(share(lambda shape, labels: shape) for share in parts)
        terms: dict[_Term, float] = defaultdict(float)
        for monomial, coefficient in _sum(_polynomial(share, sizes) for share in parts).items():
            for term in _partitions(monomial):
                if all(map(sizes.varies_together, term)):
                    terms[tuple(sorted(term))] += coefficient
        self._plan = _Plan.of(terms, sizes, list(self.groups.values()))
        self._placed: dict[tuple[torch.device, torch.dtype], _Tables] = {}

    def __call__(self, probabilities: Sequence[Tensor]) -> Tensor:
        """Return the expected cost.

        Args:
            probabilities: For each of `groups` the probabilities that its channels are there, of shape (size,), each
                in [0, 1], floating point; 0 and 1 give the cost of the model without the channels at 0. A group may
                lose its last channel here: what is multiplied by its width then costs nothing.

        Returns:
            A scalar, differentiable in the probabilities; its unit is that of the shares.

        Raises:
            ValueError: There are not as many tensors as groups, or one has another shape or is no floating point one.
        """
        self._check(probabilities)
        chance = torch.cat(list(probabilities))
        chance = chance if chance.dtype is torch.float64 else chance.float()
        plan, tables = self._plan, self._tables(chance)
        cumulants = torch.cat(_cumulants(chance, plan.order))
        of_widths = chance.new_zeros(plan.order * len(self.groups)).index_add(0, tables.owner, cumulants)
        of_sizes = tables.fixed.index_add(0, tables.row, of_widths.index_select(0, tables.column) * tables.positions)
        factors = of_sizes.index_select(0, tables.factors).view(plan.degree, -1)
        return (reduce(mul, factors.unbind()) * tables.coefficients).sum()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_placed": {}}

    def _check(self, probabilities: Sequence[Tensor]) -> None:
        if len(probabilities) != len(self.groups):
            raise ValueError(
                f"`probabilities` holds one tensor for each of {len(self.groups)} groups, {', '.join(self.groups)}; "
                f"got {len(probabilities)}. Pass them in this order."
            )
        for (name, size), chance in zip(self.groups.items(), probabilities, strict=True):
            if chance.shape != (size,) or not chance.is_floating_point():
                raise ValueError(
                    f"`probabilities` of group {name!r} is a floating point tensor of shape ({size},), one number a "
                    f"channel; got {chance.dtype} of shape {tuple(chance.shape)}. Read the model again after a cut."
                )

    def _tables(self, like: Tensor) -> _Tables:
        """Return the tables where a tensor is."""
        key = (like.device, like.dtype)
        if key not in self._placed:
            with torch.inference_mode(False):  # what is made in inference mode could not be trained with later
                self._placed[key] = self._plan.tables.on(*key)
        return self._placed[key]


class _Size(NamedTuple):
    """How the size of a dimension depends on the widths of the groups whose channels can be missing.

    Attributes:
        fixed: The positions that stay.
        positions: Group number -> the positions that each of its channels has there, in order.
    """

    fixed: int
    positions: tuple[tuple[int, int], ...]

    def at(self, widths: Sequence[int]) -> int:
        """Return the size at some widths, by group number."""
        return self.fixed + sum(count * widths[group] for group, count in self.positions)


_Monomial: TypeAlias = tuple[int, ...]
"""The numbers of the sizes that are multiplied, ascending."""

_Polynomial: TypeAlias = Mapping[_Monomial, float]

_Term: TypeAlias = tuple[_Monomial, ...]
"""Sizes whose joint cumulants are multiplied: one cumulant for each block of sizes."""

_Point: TypeAlias = Mapping[int, int]
"""Values of sizes, by number."""

_DEGREES = (2, 4)
"""The degrees in one size that are tried; the most is also the highest order of a cumulant."""


class _Sizes:
    """The sizes that can vary, numbered as they are met.

    Args:
        graph: A reading of the model.
        groups: Name -> width of the groups whose channels can be missing.
    """

    def __init__(self, graph: Graph, groups: Mapping[str, int]) -> None:
        self.known: list[_Size] = []
        self._shapes = Shapes(graph)
        self._widths = list(groups.values())
        self._less = [max(width - 1, 1) for width in groups.values()]
        self._half = [(width + 1) // 2 for width in groups.values()]
        self._probed: list[tuple[int, ...]] = []
        self._names = list(groups)
        self._group = {name: number for number, name in enumerate(groups)}
        self._numbers: dict[_Size, int] = {}
        self._seen: dict[int, int | None] = {}  # by id: `Shapes` keeps what it has seen

    def asked(self, share: Share) -> list[int]:
        """Return the sizes that the cost of a part depends on."""
        met: dict[int, None] = {}

        def shape_of(shape: tuple[int, ...], labels: Labels) -> tuple[int, ...]:
            for size, part in zip(shape, labels, strict=True):
                number = None if part is None or part.size != size else self._number(part)
                if number is not None:
                    met[number] = None
            return shape

        share(shape_of)
        return sorted(met)

    def probes(self, numbers: Sequence[int]) -> Iterator[_Point]:
        """Yield sizes at the present widths, at one channel less of each group, and at half of the widths."""
        for values in zip(*(self._probed[number] for number in numbers), strict=True):
            yield dict(zip(numbers, values, strict=True))

    def shape_of(self, point: _Point) -> ShapeOf:
        """Return what says shapes at values of the sizes that are asked for."""

        def sized(size: int, part: LabelArray | None) -> int:
            number = None if part is None or part.size != size else self._number(part)
            return size if number is None else point[number]

        return lambda shape, labels: tuple(map(sized, shape, labels))

    def joint(self, block: _Monomial) -> dict[int, int]:
        """Return group number -> the factor of its cumulant in the joint cumulant of several sizes."""
        first, *others = (dict(self.known[number].positions) for number in block)
        shared = [group for group in first if all(group in other for other in others)]
        return {group: prod(one[group] for one in (first, *others)) for group in shared}

    def varies_together(self, block: _Monomial) -> bool:
        """Tell whether the joint cumulant of several sizes can be other than 0."""
        return len(block) == 1 or bool(self.joint(block))

    def names(self, numbers: Iterable[int]) -> str:
        """List the groups that sizes depend on."""
        groups = {group for number in numbers for group, _ in self.known[number].positions}
        return ", ".join(self._names[group] for group in sorted(groups))

    def _number(self, part: LabelArray) -> int | None:
        """Return the number of a dimension's size, or None if it cannot vary."""
        if id(part) not in self._seen:
            dimension = self._shapes.dimension(part)
            counts = {self._group[name]: count for name, count in dimension.positions.items() if name in self._group}
            fixed = dimension.size - sum(count * self._widths[group] for group, count in counts.items())
            self._seen[id(part)] = self._known(_Size(fixed, tuple(sorted(counts.items())))) if counts else None
        return self._seen[id(part)]

    def _known(self, size: _Size) -> int:
        """Return the number of a size."""
        if size not in self._numbers:
            self._numbers[size] = len(self.known)
            self.known.append(size)
            self._probed.append(tuple(map(size.at, (self._widths, self._less, self._half))))
        return self._numbers[size]


def _sizes_of(graph: Graph, groups: Sequence[str]) -> dict[str, int]:
    """Return the widths of groups, if their channels can be missing."""
    if isinstance(groups, str):
        raise TypeError(f"`groups` is a sequence of names; got the string {groups!r}: put it in a list.")
    free = {group.name: group.size for group in graph.groups if not group.frozen}
    foreign = next((name for name in groups if name not in free), None)
    if foreign is not None or not groups or len(set(groups)) < len(groups):
        wrong = repr(list(groups)) if foreign is None else repr(foreign)
        raise ValueError(
            f"`groups` names channel groups that are not frozen, as `find_groups` prints them, each once and at least "
            f"one; got {wrong}. The model has {', '.join(free) or 'none'}."
        )
    return {name: free[name] for name in groups}


def _polynomial(share: Share, sizes: _Sizes) -> _Polynomial:
    """Find the polynomial that is the cost of a part.

    Raises:
        ValueError: There is none.
    """
    asked = sizes.asked(share)
    if not asked:
        return {(): share(lambda shape, labels: shape)}
    points = list(sizes.probes(asked))
    right = [share(sizes.shape_of(point)) for point in points]
    for degree in _DEGREES:
        found = _interpolated(lambda point: share(sizes.shape_of(point)), asked, points[0], degree)
        close = (isclose(_value(found, at), cost, rel_tol=1e-9) for at, cost in zip(points, right, strict=True))
        if all(close) and all(len(block) <= _DEGREES[-1] for block in _together(found, sizes)):
            return found
    raise ValueError(
        f"`shares` are polynomials in sizes, of a degree of at most {_DEGREES[-1]}; the one of a part that depends on "
        f"{sizes.names(asked)} is none. Leave these out of `groups`, or take another unit."
    )


def _together(polynomial: _Polynomial, sizes: _Sizes) -> Iterator[_Monomial]:
    """Yield for each group in each monomial the sizes that depend on it."""
    for monomial in polynomial:
        for group in {group for number in monomial for group, _ in sizes.known[number].positions}:
            yield tuple(number for number in monomial if group in dict(sizes.known[number].positions))


def _interpolated(price: Callable[[_Point], float], asked: Sequence[int], now: _Point, degree: int) -> _Polynomial:
    """Return the polynomial of a degree in each size that is right on a grid: at 2, 3, ... times the present sizes."""
    times = range(2, degree + 3)
    grid = product(*([factor * now[number] for factor in times] for number in asked))
    values = [price(dict(zip(asked, values, strict=True))) for values in grid]
    inverse = np.rint(24 * np.linalg.inv(np.vander(times, increasing=True)))  # whole up to degree 4: 24 is 4!
    found = np.reshape(values, (degree + 1,) * len(asked))
    for axis in range(len(asked)):
        found = np.moveaxis(np.tensordot(inverse, found, (1, axis)) / 24, 0, axis)
    return _nonzero(found, asked, now)


def _nonzero(found: NDArray[np.float64], asked: Sequence[int], now: _Point) -> _Polynomial:
    """Name the coefficients, of sizes in units of the present ones, by what they multiply, without those that are 0."""
    polynomial: dict[_Monomial, float] = {}
    for powers in np.argwhere(np.abs(found) > 1e-12 * np.abs(found).max()).tolist():
        monomial = tuple(number for number, power in zip(asked, powers, strict=True) for _ in range(power))
        polynomial[monomial] = float(found[tuple(powers)]) / prod(now[number] for number in monomial)
    return polynomial


def _sum(polynomials: Iterable[_Polynomial]) -> _Polynomial:
    """Add polynomials."""
    total: dict[_Monomial, float] = defaultdict(float)
    for polynomial in polynomials:
        for monomial, coefficient in polynomial.items():
            total[monomial] += coefficient
    return total


def _value(polynomial: _Polynomial, point: _Point) -> float:
    """Evaluate a polynomial."""
    return fsum(factor * prod(point[number] for number in monomial) for monomial, factor in polynomial.items())


def _partitions(monomial: _Monomial) -> Iterator[_Term]:
    """Yield all ways to put things into blocks."""
    if not monomial:
        yield ()
        return
    first, *rest = monomial
    for blocks in _partitions(tuple(rest)):
        yield ((first,), *blocks)
        for at, block in enumerate(blocks):
            yield (*blocks[:at], (first, *block), *blocks[at + 1 :])


def _cumulants(chance: Tensor, order: int) -> list[Tensor]:
    """Return the cumulants of Bernoulli variables up to an order of 4."""
    found = [chance]
    if order > 1:
        found.append(chance * (1 - chance))
    if order > 2:
        found.append(found[1] * (1 - 2 * chance))
    if order > 3:
        found.append(found[1] * (1 - 6 * found[1]))
    return found


class _Tables(NamedTuple):
    """What a call reads. "Cumulants" of widths are numbered by order and group, those of sizes as they are met.

    Attributes:
        owner: For each order and channel the cumulant of a width that it adds to.
        fixed: For each cumulant of sizes what does not depend on chance.
        row: The cumulants of sizes that cumulants of widths add to, ...
        column: ... those cumulants, ...
        positions: ... and how often they are added.
        factors: For each factor of a term, and each term, a cumulant of sizes; number 0 is 1.
        coefficients: For each term what it is multiplied by.
    """

    owner: Tensor
    fixed: Tensor
    row: Tensor
    column: Tensor
    positions: Tensor
    factors: Tensor
    coefficients: Tensor

    def on(self, device: torch.device, dtype: torch.dtype) -> _Tables:
        """Return them on a device, numbers that are no indices in a dtype."""
        return _Tables(*(one.to(device, dtype if one.is_floating_point() else None) for one in self))


class _Plan(NamedTuple):
    """How the terms are evaluated.

    Attributes:
        order: The highest order of a cumulant.
        degree: How many factors a term has.
        tables: What is read.
    """

    order: int
    degree: int
    tables: _Tables

    @classmethod
    def of(cls, terms: Mapping[_Term, float], sizes: _Sizes, widths: Sequence[int]) -> _Plan:
        """Lay out the terms."""
        blocks = list(dict.fromkeys(block for term in terms for block in term))
        number = {block: at for at, block in enumerate(blocks, start=1)}
        order = max((len(block) for block in blocks), default=1)
        degree = max((len(term) for term in terms), default=1) or 1
        fixed = [1, *(sizes.known[block[0]].fixed if len(block) == 1 else 0 for block in blocks)]
        entries = [
            (number[block], (len(block) - 1) * len(widths) + group, count)
            for block in blocks
            for group, count in sizes.joint(block).items()
        ]
        rows, columns, positions = zip(*entries, strict=True) if entries else ((), (), ())
        factors = [[number[term[at]] if at < len(term) else 0 for term in terms] for at in range(degree)]
        owners = np.repeat(np.arange(order * len(widths)), list(widths) * order)
        whole = [np.array(one, np.int64).reshape(-1) for one in (owners, rows, columns, factors)]
        broken = [np.array(one, np.float64) for one in (fixed, positions, list(terms.values()))]
        with torch.inference_mode(False):
            owner, row, column, factor, base, count, coefficient = map(torch.from_numpy, (*whole, *broken))
        return cls(order, degree, _Tables(owner, base, row, column, count, factor, coefficient))
