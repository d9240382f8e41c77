"""The proof of a channel group: permuting its channels everywhere leaves the network's output unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lightning_prune.inputs import tensors_in
from lightning_prune.tensors import named_tensors
from lightning_prune.types import ChannelGroup


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a random value, so that no proof can pass on zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in named_tensors(model).items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            fan = max(tensor[0].numel(), 1) if tensor.dim() > 1 else 1
            positive = tensor.dim() < 2 and not name.endswith("bias") and "mean" not in name
            tensor.data.copy_(0.5 + noise if positive else (noise - 0.5) * (12 / fan) ** 0.5)
    return model


def permute_channels(model: nn.Module, groups: Iterable[ChannelGroup], seed: int = 0) -> None:
    """Permute the channels of each group at random, in every tensor that it touches."""
    generator = torch.Generator().manual_seed(seed)
    tensors = named_tensors(model)
    for group in groups:
        order = torch.randperm(group.size, generator=generator)
        for member in group.members:
            tensor = tensors[member.tensor].data
            moved = tensor.index_select(member.dim, member.positions[order].reshape(-1))
            tensor.index_copy_(member.dim, member.positions.reshape(-1), moved)


def outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Run the model without gradients and list the tensors that it returns."""
    with torch.no_grad():
        return list(tensors_in(model(inputs)))


def relative_error(left: Iterable[Tensor], right: Iterable[Tensor]) -> float:
    """Return the largest difference of two lists of tensors, relative to the largest value of each pair."""
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(left, right, strict=True))


class Net(nn.Module):
    """A model of a few lines: parts by name, and what forward does with them."""

    def __init__(self, run: Callable[..., object], **parts: nn.Module) -> None:
        super().__init__()
        self._run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> object:
        return self._run(self, *inputs)


def prove(model: nn.Module, inputs: Tensor, groups: Iterable[ChannelGroup], tolerance: float = 1e-10) -> None:
    """Assert that permuting every group that is not frozen leaves the output unchanged, in float64 and eval mode."""
    model = randomise(copy.deepcopy(model).double()).eval()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    before = outputs(model, inputs)
    permute_channels(model, [group for group in groups if not group.frozen])
    assert all(result.isfinite().all() for result in before)
    assert any(result.numel() > 1 and float(result.double().std()) > 1e-6 for result in before), "a constant output"
    assert relative_error(outputs(model, inputs), before) < tolerance


def summary(groups: Iterable[ChannelGroup]) -> dict[str, int | str]:
    """Return each group's size by name, or why it is frozen."""
    return {group.name: group.frozen or group.size for group in groups}


def fits(found: dict[str, int | str], expected: dict[str, int | str]) -> bool:
    """Compare a summary with what it should be, where a reason may be given by a part of its text."""
    return list(found) == list(expected) and all(
        want in have if isinstance(want, str) and isinstance(have, str) else want == have
        for have, want in zip(found.values(), expected.values(), strict=True)
    )


def snapshot(model: nn.Module) -> dict[str, object]:
    """Copy all that a model holds: tensors, gradients, modes and attributes of every module."""
    state: dict[str, object] = {}
    for name, tensor in named_tensors(model).items():
        state[name] = tensor.detach().clone()
        state[f"{name}: about"] = (id(tensor), tensor.requires_grad, tensor.dtype, tensor.stride())
        state[f"{name}: gradient"] = None if tensor.grad is None else tensor.grad.clone()
    for name, module in model.named_modules():
        state[f"{name}: module"] = {key: repr(value) for key, value in module.__dict__.items() if key not in _HELD}
        state[f"{name}: kind"] = (type(module), list(module._parameters), list(module._buffers), list(module._modules))
    return state


_HELD = {"_parameters", "_buffers", "_modules"}


def same_state(left: dict[str, object], right: dict[str, object]) -> bool:
    """Compare two snapshots bit for bit."""

    def same(a: object, b: object) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        return type(a) is type(b) and a == b

    return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
