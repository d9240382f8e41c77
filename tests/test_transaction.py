"""A fault at any step of a cut: the model is then what it was before, bit for bit and object by object."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from proof import same_state, snapshot
from torch import Tensor, nn

from lightning_prune import cut, history_of, prune, pruner, surgery, tensors, trace
from lightning_prune.pruner import Request, draft_cut
from lightning_prune.tensors import named_tensors

X = torch.randn(2, 5, 12)
SIZES = {"num_heads": 2, "width": 8, "parts": [8, 8, 8], "window": (8, 5)}


class Attention(nn.Module):
    """Four heads of 4, with its sizes in an int, a list and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.width, self.parts, self.window = 4, 16, [16, 16, 16], (16, 5)
        self.qkv, self.out = nn.Linear(12, 48), nn.Linear(16, 12)
        self.register_buffer("scale", torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = (part.unflatten(2, (self.num_heads, -1)) for part in self.qkv(x).split(self.parts, 2))
        q, k, v = (part.transpose(1, 2) for part in heads)
        mixed = F.scaled_dot_product_attention(q, k, v).permute(0, 1, 3, 2).reshape(batch, *self.window)
        return self.out(mixed.mT.reshape(batch, length, self.width) * self.scale)


class Block(nn.Module):
    """A transformer block between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.attention = nn.Linear(12, 12), nn.LayerNorm(12), Attention()
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.norm(x))
        return self.head(x + self.down(self.up(x).relu()))


def block() -> Block:
    """A block in training: with gradients, one layer that is not trained, and one in eval mode."""
    model = Block()
    model.up.weight.requires_grad_(False)
    model.norm.eval()
    model(X).sum().backward()
    return model


class State:
    """All that a model holds, by value and by identity."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._values, self._objects = snapshot(model), self._held()

    def _held(self) -> list[object]:
        held: list[object] = []
        for tensor in named_tensors(self._model).values():
            held += [tensor, tensor.grad, tensor.data_ptr()]
        for module in self._model.modules():
            held += [module, *module.__dict__.values()]
        return held

    def is_kept(self) -> bool:
        held = self._held()
        same = len(held) == len(self._objects) and all(
            now is then or (type(now) is int and now == then) for now, then in zip(held, self._objects, strict=True)
        )
        return same and same_state(snapshot(self._model), self._values)


class FaultError(Exception):
    """The fault that a test injects."""


FAULTS: tuple[type[BaseException], ...] = (FaultError, KeyboardInterrupt)
STEPS = {
    "a tensor is cut": (surgery, "cut_tensor"),
    "tensors are exchanged": (surgery, "_exchange"),
    "attributes are set": (surgery, "set_attributes"),
}


def calls_of(run: Callable[[], object], place: tuple[Any, str], fault: int = -1, *, late: bool = False) -> int:
    """Count the calls of a function while something runs; the call of that number fails, before its work or after."""
    room, name = place
    real, count = getattr(room, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count - 1 == fault and not late:
            raise FaultError
        result = real(*args, **kwargs)
        if count - 1 == fault:
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, name, counted)
        run()
    return count


def test_the_block_is_cut_in_all_its_parts() -> None:
    model = block()
    record = prune(model, X, pruning_ratio=0.5)
    assert {name: change.after for name, change in record.channels.items()} == {
        "embed": 6,
        "attention.qkv": 2,
        "up": 10,
        "head": 3,
    }
    assert {name: getattr(model.attention, name) for name in SIZES} == SIZES
    assert [type(getattr(model.attention, name)) for name in SIZES] == [int, int, list, tuple]
    assert len(record.kept) == 14
    assert sum(map(len, record.attributes.values())) >= len(SIZES) + 8


@pytest.mark.parametrize("late", [False, True], ids=["before its work", "after its work"])
@pytest.mark.parametrize("step", STEPS)
def test_a_fault_in_any_call_leaves_everything(step: str, late: bool) -> None:
    model = block()
    planned = draft_cut(model, X, Request(0.5)).cut
    state = State(model)
    count = calls_of(lambda: surgery.apply(copy.deepcopy(model), planned), STEPS[step])
    assert count >= 6
    for number in range(count):
        with pytest.raises(FAULTS):
            calls_of(lambda: surgery.apply(model, planned), STEPS[step], number, late=late)
        assert state.is_kept(), f"call {number} of {count}"
    surgery.apply(model, planned)
    assert not state.is_kept()
    assert {name: getattr(model.attention, name) for name in SIZES} == SIZES


@contextmanager
def interrupted(line: int, *files: str) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt before a line of some files is run, counted in lines that have been run there.

    Yields:
        A list that grows by one with every line.
    """
    seen: list[int] = []

    def watch(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            seen.append(frame.f_lineno)
            if len(seen) - 1 == line:
                raise KeyboardInterrupt
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield seen
    finally:
        sys.settrace(before)


FILES = tuple(str(room.__file__) for room in (surgery, cut, tensors))


def test_an_interrupt_at_any_line_of_the_surgery_leaves_all_or_nothing() -> None:
    model = block()
    planned = draft_cut(model, X, Request(0.5)).cut
    state, done = State(model), copy.deepcopy(model)
    with interrupted(-1, *FILES) as lines:
        surgery.apply(done, planned)
    assert len(lines) > 300
    for line in range(0, len(lines), 2):
        with pytest.raises(KeyboardInterrupt), interrupted(line, *FILES):
            surgery.apply(model, planned)
        if not state.is_kept():
            assert line > len(lines) - 4, f"line {lines[line]}, the {line}th of {len(lines)}"
            assert all(map(torch.equal, model.state_dict().values(), done.state_dict().values()))
            assert {name: getattr(model.attention, name) for name in SIZES} == SIZES
            return


def test_an_interrupt_at_any_line_of_prune_leaves_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = block()
    planned = draft_cut(model, X, Request(0.5))
    monkeypatch.setattr(pruner, "draft_cut", lambda *arguments: planned)
    files = (str(pruner.__file__), str(surgery.__file__))
    with interrupted(-1, *files) as lines:
        prune(copy.deepcopy(model), X, pruning_ratio=0.5)
    for line in range(len(lines)):
        twin = copy.deepcopy(model)
        twin(X).sum().backward()
        state = State(twin)
        with pytest.raises(KeyboardInterrupt), interrupted(line, *files):
            prune(twin, X, pruning_ratio=0.5)
        assert state.is_kept() or history_of(twin) == (planned.record,), f"line {lines[line]}"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_any_operation_of_a_run_leaves_all_or_nothing(fault: type[BaseException]) -> None:
    place = (trace.Tracer, "_called")
    count = calls_of(lambda: draft_cut(block(), X, Request(0.5)), place)
    assert count > 100
    for number in range(0, count, count // 12):
        model = block()
        state = State(model)
        try:
            calls_of(lambda: prune(model, X, pruning_ratio=0.5), place, number, late=fault is KeyboardInterrupt)  # noqa: B023
        except fault:
            assert state.is_kept()
        else:
            assert fault is FaultError, "an interrupt is never taken for a cut that does not work"
            assert model(X).shape == (2, 5, 3)


def test_gradients_that_are_there_go_on_being_added_to() -> None:
    model = block()
    planned = draft_cut(model, X, Request(0.5)).cut
    with pytest.raises(FaultError):
        calls_of(lambda: surgery.apply(model, planned), STEPS["tensors are exchanged"], 7)
    before = model.embed.weight.grad.clone()
    model(X).sum().backward()
    assert torch.allclose(model.embed.weight.grad, 2 * before)


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_of_parameters_outlive_a_cut(fails: bool) -> None:
    model = block()
    seen: list[tuple[int, ...]] = []
    model.embed.weight.register_hook(lambda gradient: seen.append(tuple(gradient.shape)))
    model.embed.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(tuple(weight.shape)))
    planned = draft_cut(model, X, Request(0.5)).cut
    if fails:
        with pytest.raises(FaultError):
            calls_of(lambda: surgery.apply(model, planned), STEPS["tensors are exchanged"], 7)
    else:
        surgery.apply(model, planned)
    model(X).sum().backward()
    assert seen == [(12, 12)] * 2 if fails else [(6, 12)] * 2


def test_training_goes_on_after_a_fault_as_if_nothing_had_been() -> None:
    torn = block()
    nets = (torn, copy.deepcopy(torn))
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.1) for net in nets]
    planned = draft_cut(torn, X, Request(0.5)).cut
    for step in range(3):
        if step == 2:
            with pytest.raises(FaultError):
                calls_of(lambda: surgery.apply(torn, planned), STEPS["tensors are exchanged"], 9)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(X).square().sum().backward()
            optimizer.step()
    assert all(map(torch.equal, *(net.parameters() for net in nets)))
