"""Criteria that score channels by what they have seen of the training: what layers read, and with which gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self, override

from lightning_prune.criteria.base import Criterion
from lightning_prune.criteria.random import Random
from lightning_prune.criteria.readers import Reader, readers_of
from lightning_prune.errors import ScoreError
from lightning_prune.graph import Graph, read
from lightning_prune.inputs import ExampleInputs, bind
from lightning_prune.modes import in_eval_mode
from lightning_prune.tensors import named_modules, unwrapped
from lightning_prune.types import ChannelGroup

Reduction: TypeAlias = Literal["mean", "sum"]
"""How a loss puts its examples together."""

AllReduce: TypeAlias = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


class Gathered(Criterion):
    """A rule that looks on while a network trains: at what the readers of each group are given (see `readers_of`).

    Inside a Trainer a prune callback does all of this. Without one:

    >>> from lightning_prune.criteria import Fisher
    >>> net, inputs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(16, 4)
    >>> criterion = Fisher()
    >>> with criterion.gathering(net, inputs):
    ...     for _ in range(10):
    ...         nn.functional.cross_entropy(net(inputs), torch.zeros(16, dtype=torch.int64)).backward()
    ...         criterion.take()
    >>> criterion.steps, criterion.examples
    (10, 160)

    A group whose readers cannot all be watched, or of which one was never called, is passed over.
    """

    gradients: ClassVar[bool] = True
    """Whether it looks at gradients; else it looks at inputs alone."""

    def __init__(self) -> None:
        self._readers: dict[str, tuple[Reader, ...]] = {}
        self._modules: dict[str, nn.Module] = {}
        self._sums: dict[str, Tensor] = {}
        self._called: set[str] = set()
        self._reached: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._rows: int | None = None

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_"))
        return f"{type(self).__name__}({settings})"

    @property
    def examples(self) -> int:
        """Examples that were taken in, on all processes."""
        return int(self._sums[_COUNTS][0]) if self._sums else 0

    @property
    def steps(self) -> int:
        """Passes that were taken in, on all processes."""
        return int(self._sums[_COUNTS][1]) if self._sums else 0

    @contextmanager
    def gathering(self, model: nn.Module, example_inputs: ExampleInputs) -> Iterator[Self]:
        """Look on while the body trains or runs the model; what was gathered before is forgotten."""
        model = unwrapped(model)
        self.begin(model, read(model, example_inputs))
        self.forget()
        self.look()
        try:
            yield self
        finally:
            self.look_away()

    @torch.no_grad()
    def look_through(
        self, model: nn.Module, graph: Graph, batches: Iterable[ExampleInputs], reduce: AllReduce | None = None
    ) -> None:
        """Look at what a model does with some batches, in eval mode, unless that takes gradients.

        Args:
            model: The model, in the state that was read.
            graph: A reading of it.
            batches: What forward takes.
            reduce: Sums over processes, each of which has batches of its own.
        """
        if self.gradients:
            return
        self.begin(model, graph)
        self.forget()
        try:
            with in_eval_mode(model):
                self.look()
                for batch in batches:
                    bind(model, batch).call(model)
                    self.take()
        finally:
            self.look_away()
        if reduce is not None and self._sums:
            self._sums = _reduced(self._sums, reduce)

    def begin(self, model: nn.Module, graph: Graph) -> None:
        """Find out whom to watch."""
        modules = named_modules(model)
        self._readers = readers_of(model, graph)
        self._modules = {reader.module: modules[reader.module] for found in self._readers.values() for reader in found}

    def forget(self) -> None:
        """Forget what was gathered, as after a cut."""
        self._sums, self._called, self._reached = {}, set(), set()

    def watches(self, group: ChannelGroup) -> bool:
        """Tell whether all readers of a group can be watched."""
        return group.name in self._readers

    def look(self, rows: int | None = None) -> None:
        """Look at the readers from now on.

        Args:
            rows: Examples in the batch; None takes what each layer has along its dimension 0. Layers that fold an
                example into several rows, one behind the other, are unfolded by it.
        """
        self.look_away()
        self._rows = rows
        self._handles = [
            module.register_forward_pre_hook(_Hook(self, name), with_kwargs=True)
            for name, module in self._modules.items()
        ]

    def look_away(self) -> None:
        """Take all hooks off, and forget a step that was not taken in."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._drop_step()

    @property
    def is_looking(self) -> bool:
        """Whether it looks at present."""
        return bool(self._handles)

    def saw_call(self, name: str) -> None:
        """Take note that a reader was called."""
        self._called.add(name)

    def saw(self, name: str, inputs: Tensor, gradient: Tensor | None) -> None:
        """Take note of what a reader is given, and of the loss's gradient with respect to that, through it alone."""
        self._reached.add(name)
        self._note(name, inputs.detach(), gradient)

    def see_loss(self, loss: Tensor) -> None:
        """Look at the loss before its backward pass; most rules do not."""

    def drop_step(self) -> None:
        """Forget what was seen since the last step that was taken in."""
        self._drop_step()

    def missed(self) -> dict[str, str]:
        """Return the groups that have a reader which was not called -> that reader."""
        return {
            group: reader.module
            for group, readers in self._readers.items()
            for reader in readers
            if reader.module not in self._called
        }

    @torch.no_grad()
    def take(self, scale: float = 1.0, reduce: AllReduce | None = None) -> None:
        """Take in a step: what was seen since the last one belongs to the same examples, which are forgotten now.

        Args:
            scale: What the gradients seen are to be multiplied by: accumulation divides them, loss scaling multiplies.
            reduce: Sums over processes; the loss of each is over its own examples.
        """
        count, found = self._of_step(scale)
        self._drop_step()
        if not count and reduce is None:
            return
        found[_COUNTS] = torch.tensor([count, 1], dtype=torch.float64)
        for name, part in (found if reduce is None else _reduced(found, reduce)).items():
            self._sums[name] = self._sums[name].to(part.device) + part if name in self._sums else part

    @override
    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        """Return the scores; None for a group that could not be watched.

        Raises:
            ScoreError: Nothing has been gathered, or for other channels than there are now.
        """
        rule = type(self).__name__
        if not self.steps:
            raise ScoreError(
                f"{rule} has seen nothing of the training yet. Let some steps go before the first event of a fit, or "
                "use `criterion.gathering(model, inputs)`. If there were steps: did `training_step` return None each "
                "time, is the model compiled, are all of its parameters frozen?"
            )
        readers = self._readers.get(group.name, ())
        if not readers or group.name in self.missed():
            return None
        if not any(reader.module in self._reached for reader in readers):
            raise ScoreError(
                f"{rule} was given no gradient for {group.name}: what {readers[0].module} reads does not depend on a "
                f"parameter that is trained. Let it train, or put {group.name!r} under `ignore`."
            )
        if len(readers[0].positions) != group.size:
            raise ScoreError(
                f"{rule} has gathered for {len(readers[0].positions)} channels of {group.name}, which has "
                f"{group.size} now. Gather anew after each cut."
            )
        return self._scores(model, group, readers)

    def state_dict(self) -> dict[str, Any]:
        """Return what was gathered, as plain data and tensors."""
        return {"sums": dict(self._sums), "called": sorted(self._called), "reached": sorted(self._reached)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was gathered before an interruption."""
        self._sums = dict(state["sums"])
        self._called, self._reached = set(state["called"]), set(state["reached"])

    @abstractmethod
    def is_finite(self) -> bool:
        """Tell whether what was seen since the last step holds neither NaN nor infinity."""

    @abstractmethod
    def _note(self, name: str, inputs: Tensor, gradient: Tensor | None) -> None:
        """Take in one call of a reader."""

    @abstractmethod
    def _of_step(self, scale: float) -> tuple[int, dict[str, Tensor]]:
        """Return the examples of the step, and what of it is to be summed over steps; the same names in each step."""

    @abstractmethod
    def _drop_step(self) -> None:
        """Forget what was noted of the step."""

    @abstractmethod
    def _scores(self, model: nn.Module, group: ChannelGroup, readers: Sequence[Reader]) -> Tensor | None:
        """Return the scores of a group from the sums."""

    def _unfolded(self, values: Tensor, name: str) -> Tensor:
        """Let dimension 0 be the examples.

        Raises:
            ScoreError: The rows are not so many for each example.
        """
        rows = self._rows or values.shape[0]
        if values.shape[0] == rows:
            return values
        if values.shape[0] % rows:
            raise ScoreError(
                f"{name} reads {values.shape[0]} rows for {rows} examples, so what belongs to which example is not "
                f"known. {type(self).__name__} needs layers that keep examples apart: put {name!r} under `ignore`."
            )
        unfolded: Tensor = values.unflatten(0, (rows, -1))
        return unfolded


class Watched(Criterion):
    """Draws lots for the groups that a criterion can watch: stands in for it where only these groups are asked for."""

    def __init__(self, criterion: Gathered) -> None:
        self._criterion, self._lots = criterion, Random()

    @override
    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        return self._lots.score(model, group) if self._criterion.watches(group) else None


_COUNTS = "examples and steps"


def _reduced(found: Mapping[str, Tensor], reduce: AllReduce) -> dict[str, Tensor]:
    """Sum over processes, in one go."""
    device = next(iter(found.values())).device
    together = reduce(torch.cat([part.to(device).flatten() for part in found.values()]))
    parts = together.split([part.numel() for part in found.values()])
    return {name: part.to(found[name]).view_as(found[name]) for name, part in zip(found, parts, strict=True)}


class _Hook:
    """Lets a criterion see what one reader is given; a copy of it, in a copied network, sees nothing.

    Args:
        criterion: Who wants to see.
        name: The reader.
    """

    def __init__(self, criterion: Gathered, name: str) -> None:
        self.criterion, self.name = criterion, name

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Give the reader aliases of its inputs, whose gradients are those through it alone."""
        if self.criterion._modules.get(self.name) is not module:
            return None
        seen: dict[int, Tensor] = {}

        def alias(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            if id(value) not in seen:
                seen[id(value)] = self._watched(value)
            return seen[id(value)]

        return tuple(map(alias, args)), {key: alias(value) for key, value in kwargs.items()}

    def _watched(self, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not self.criterion.gradients:
            self.criterion.saw_call(self.name)
        if not self.criterion.gradients:
            self.criterion.saw(self.name, inputs, None)
            return inputs
        if not (inputs.requires_grad and torch.is_grad_enabled()):
            return inputs
        alias = inputs.view_as(inputs)
        values = inputs.detach()
        alias.register_hook(lambda gradient: self.criterion.saw(self.name, values, gradient))
        return alias
