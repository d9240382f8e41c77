"""Random networks for property tests: a recipe of steps that prints and shrinks, and the module that it builds.

A recipe is always valid: a step picks its sources among the live tensors that it can work on, counted back from the
newest, and a step that finds none is left out. So hypothesis may drop or simplify any step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import random_layers  # noqa: F401
import random_mixers  # noqa: F401
import random_moves  # noqa: F401
import torch
from hypothesis import strategies as st
from random_parts import IMAGE, OPS, TOKENS, VECTOR, Op, Shape, Step, channels, last
from torch import Tensor, nn

STARTS: dict[str, Shape] = {"image": (2, 3, 8, 8), "tokens": (2, 6, 5)}
LARGEST = 2 * 64 * 64
"""Elements of a tensor; a step that makes a larger one is left out."""


AGAIN = "again"
"""The name of the step that runs an earlier part, with the same weights, on another tensor of the same shape."""
OPS[AGAIN] = Op(lambda *_: None, (IMAGE, TOKENS, VECTOR))


@dataclass(frozen=True)
class Recipe:
    """What a network is built from.

    Attributes:
        start: The kind of input, a key of `STARTS`.
        steps: The operations in order.
        read: The live tensors, counted back, that leave the network through a layer of their own.
        bare: Those that leave it as they are.
        leaves: Whether all that no step has read leaves through a layer too, so that nothing is computed in vain.
    """

    start: str
    steps: tuple[Step, ...]
    read: tuple[int, ...] = (0,)
    bare: tuple[int, ...] = ()
    leaves: bool = False

    @property
    def safe(self) -> bool:
        """Whether channels of zeros have the same effect as none."""
        return all(OPS[step.op].safe for step in self.steps)


@dataclass(frozen=True)
class Wire:
    """One call of a part: its number, the live tensors that it reads, and how many it makes."""

    part: int
    sources: tuple[int, ...]
    makes: int


class RandomNetwork(nn.Module):
    """The network of a recipe. It builds itself by running on zeros, part by part.

    Args:
        recipe: What to build.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.wiring: list[Wire] = []
        self._live = [torch.zeros(STARTS[recipe.start])]
        with torch.no_grad():
            for step in recipe.steps:
                self._take(step)
        newest = len(self._live) - 1
        self.bare = sorted({max(newest - back, 0) for back in recipe.bare})
        read = {max(newest - back, 0) for back in recipe.read}
        if recipe.leaves:
            read |= set(range(newest + 1)).difference(self.bare, *(wire.sources for wire in self.wiring))
        self.heads = nn.ModuleDict({str(n): nn.Linear(channels(self._live[n].shape), 3) for n in sorted(read)})
        del self._live

    def _take(self, step: Step) -> None:
        """Add a step's part, unless it fits nothing or grows too large."""
        found = self._earlier(step) if step.op == AGAIN else self._new(step)
        if found is None:
            return
        part, sources = found
        made = list(tensors(part.eval()(*(self._live[n] for n in sources))))
        if max(result.numel() for result in made) <= LARGEST:
            if step.op != AGAIN:
                self.parts.append(part)
            self.wiring.append(Wire(list(self.parts).index(part), sources, len(made)))
            self._live.extend(made)

    def _new(self, step: Step) -> tuple[nn.Module, tuple[int, ...]] | None:
        what = OPS[step.op]
        fitting = [n for n, tensor in enumerate(self._live) if tensor.dim() in what.kinds]
        if not fitting:
            return None
        sources = tuple(fitting[max(len(fitting) - 1 - back, 0)] for back in (step.at, step.other)[: what.sources])
        part = what.make(step, *(tuple(self._live[n].shape) for n in sources))
        return (part, sources) if part else None

    def _earlier(self, step: Step) -> tuple[nn.Module, tuple[int, ...]] | None:
        source = max(len(self._live) - 1 - step.at, 0)
        shape = self._live[source].shape
        fitting = [wire.part for wire in self.wiring if [self._live[n].shape for n in wire.sources] == [shape]]
        return (self.parts[fitting[max(len(fitting) - 1 - step.other, 0)]], (source,)) if fitting else None

    def forward(self, x: Tensor) -> list[Tensor]:
        live = [x]
        for wire in self.wiring:
            made = list(tensors(self.parts[wire.part](*(live[n] for n in wire.sources))))
            if len(made) != wire.makes:
                raise ValueError(f"not enough values to unpack (expected {wire.makes}, got {len(made)})")
            live.extend(made)
        return [live[n] for n in self.bare] + [head(last(live[int(n)])) for n, head in self.heads.items()]


def tensors(value: Any) -> Iterator[Tensor]:
    """List the tensors that a part returned."""
    return iter((value,) if isinstance(value, Tensor) else value)


WIDTHS = (8, 4, 6, 12, 5, 16, 9, 24)
BACK = st.sampled_from((0, 0, 0, 1, 1, 2, 3, 5))
COMMON = ("linear", "conv", "activation", "add", "cat", "to tokens", "to image", AGAIN)
"""Names that are drawn more often than others, so that networks hang together."""


def steps(safe: bool) -> st.SearchStrategy[Step]:
    names = (*COMMON, *(name for name, what in OPS.items() if what.safe or not safe))
    return st.builds(
        Step,
        op=st.sampled_from(names),
        at=BACK,
        other=BACK,
        width=st.sampled_from(WIDTHS),
        form=st.integers(0, 11),
    )


def recipes(safe: bool = False, most: int = 14) -> st.SearchStrategy[Recipe]:
    """Draw recipes of up to `most` steps; with `safe`, only those in which zeroing channels equals removing them."""

    def of_length(least: int) -> st.SearchStrategy[Recipe]:
        return st.builds(
            Recipe,
            start=st.sampled_from(tuple(STARTS)),
            steps=st.lists(steps(safe), min_size=least, max_size=most).map(tuple),
            read=st.lists(BACK, min_size=1, max_size=3, unique=True).map(tuple),
            bare=st.lists(BACK, max_size=1).map(tuple),
            leaves=st.sampled_from((True, True, False)),
        )

    return st.integers(0, most - 2).flatmap(of_length)
