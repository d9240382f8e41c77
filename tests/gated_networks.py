"""Small networks that are given gates, these set at random, and what a closed gate must amount to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from difficult_layers import conv, encoder_layer, tied
from difficulties import DIFFICULTIES
from proof import Net, outputs, randomise, relative_error
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.allocation import Zeros
from lightning_prune.criteria import GateValue
from lightning_prune.errors import NothingToPruneError
from lightning_prune.gates import GateGranularity, choose, fold
from lightning_prune.graph import read
from lightning_prune.layers import HardConcrete
from lightning_prune.layers.gated import GATED, READING
from lightning_prune.layers.gates import Gates, attach, gates_of

CHANNELS: Mapping[str, GateGranularity] = {"*": "channels"}
LOGITS = torch.tensor([-4.0, -1.0, 0.5, 4.0])
"""A gate that is shut, two that let through a part, and one that is open."""

EXACT = 1e-12


def is_mixing(name: str) -> bool:
    """Tell whether a network of difficulties.py mixes channels by a norm, or sums them up, so that none is gated."""
    norms = ("groupnorm", "layernorm", "ln", "rmsnorm", "l2norm", "mixer")
    return name.startswith((*norms, "spectral_norm", "cbam", "gram"))


EQUAL = [
    name
    for name in DIFFICULTIES
    if not is_mixing(name) and name not in ("functional_conv", "lstm", "gru", "ckpt", "dyn_flow")
]


class Blocks(nn.Module):
    """A residual trunk with depthwise, grouped and transposed layers, a concat, and a flatten before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(2, 6), nn.BatchNorm2d(6)
        self.wide, self.depthwise, self.narrow = conv(6, 12, 1), conv(12, 12, groups=12), conv(12, 6, 1)
        self.grouped, self.up = conv(6, 8, groups=2), nn.ConvTranspose2d(8, 5, 2, stride=2)
        self.head = nn.Linear(11 * 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images)).relu()
        x = x + self.narrow(F.relu6(self.depthwise(self.wide(x))))
        y = F.max_pool2d(self.up(self.grouped(x).relu()).relu(), 2)
        logits: Tensor = self.head(F.adaptive_avg_pool2d(torch.cat([x, y], 1), 2).flatten(1))
        return logits


class Volumes(nn.Module):
    """A 1d convolution and a 3d one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv1d(2, 6, 3), nn.Conv3d(6, 5, 1), nn.Linear(5 * 4, 3)
        self.again = nn.Conv3d(5, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.flatten(2)).relu()[..., :16].unflatten(2, (4, 2, 2))
        y = self.again(self.second(y).relu()).relu()
        return self.head(y.mean((3, 4)).flatten(1))  # type: ignore[no-any-return]


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.ReLU(), nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 3))


def attention() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.head(net.attend(y, y, value=y, need_weights=False)[0] + y)  # type: ignore[no-any-return]

    return Net(run, a=nn.Linear(5, 8), attend=nn.MultiheadAttention(8, 2, batch_first=True), head=nn.Linear(8, 3))


def transformer() -> nn.Module:
    encoder = nn.TransformerEncoder(encoder_layer(16), 2)

    def run(net: Net, x: Tensor, padded: Tensor | None = None) -> Tensor:
        return net.head(net.encoder(net.a(x), src_key_padding_mask=padded))  # type: ignore[no-any-return]

    return Net(run, a=nn.Linear(5, 16), encoder=encoder, head=nn.Linear(16, 3))


IMAGES, TOKENS = (3, 2, 6, 6), (3, 4, 5)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "blocks": (Blocks, IMAGES),
    "volumes": (Volumes, IMAGES),
    "perceptron": (perceptron, IMAGES),
    "attention": (attention, TOKENS),
    "tied": (lambda: tied(8), TOKENS),
}
each_net = pytest.mark.parametrize("name", list(NETS))


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    build, shape = NETS[name]
    return randomise(build().to(dtype)).eval(), torch.randn(shape, dtype=dtype)


def set_gates(model: nn.Module, seed: int = 0) -> None:
    """Set the gates of a model at random."""
    set_all(gates_in(model), seed)


def set_all(gates: Gates, seed: int = 0) -> None:
    """Shut some gates, at least one of each, and leave others half or wholly open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates.named().values():
            values = LOGITS[torch.randint(0, len(LOGITS), gate.shape, generator=generator)]
            values.flatten()[0] = LOGITS[0]
            values.flatten()[-1] = LOGITS[2]
            gate.log_alpha.copy_(values)


def gates_in(model: nn.Module) -> Gates:
    gates = gates_of(model)
    assert gates is not None
    return gates


def gated(model: nn.Module, x: Tensor, granularity: Mapping[str, GateGranularity] = CHANNELS, **how: Any) -> nn.Module:
    """Put gates on a model and set them at random."""
    attach(model, choose(model, read(model, x), granularity, HardConcrete, **how).gates)
    set_gates(model)
    return model


def close(model: nn.Module, x: Tensor) -> None:
    """Cut what has closed, if it can be cut."""
    how: dict[str, Any] = {"criterion": GateValue(), "allocation": Zeros(), "constants": "drop"}
    prune(model, x, pruning_ratio=0.0, **how)


def assert_shut_is_removed(model: nn.Module, x: Tensor, tolerance: float = EXACT, events: int = 2) -> None:
    """Outputs stay what they were, whatever is cut and folded."""
    dense, names = outputs(model, x), list(model.state_dict())
    parameters = dict(model.named_parameters())
    gated(model, x)
    kinds = set(gates_in(model).named().values())
    for event in range(events):
        set_gates(model, event)
        before = outputs(model, x)
        try:
            close(model, x)
        except NothingToPruneError:
            assert event, "there are gates, and no channel can be cut"
        assert relative_error(outputs(model, x), before) <= tolerance
    assert kinds == set(gates_in(model).named().values())
    assert max(relative_error([new], [old]) for new, old in zip(before, dense, strict=True)) > 1e-6
    fold(model)
    assert relative_error(outputs(model, x), before) <= tolerance
    assert list(model.state_dict()) == names
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert_no_trace(model)


def assert_no_trace(model: nn.Module) -> None:
    assert gates_of(model) is None
    for module in model.modules():
        assert READING not in module.__dict__
        assert type(module) not in GATED.values()
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs
        assert not [key for key in module.__dict__ if "pruning_gates" in key]


def draw_alike(model: nn.Module, examples: int, seed: int = 3) -> None:
    """Draw one sample of all gates, and give it to each example where it has one of its own."""
    gates = gates_in(model)
    for name, gate in gates.named().items():
        gate.draw(torch.Generator().manual_seed(seed + len(name)))
        if gates.per_example:
            gate.noise = gate.noise.expand(examples, *gate.shape).clone()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
