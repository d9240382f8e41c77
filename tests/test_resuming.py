"""Reconstruction with runs that are resumed: bit for bit the same as with whole ones, and less is computed."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.criteria import Lasso, Magnitude
from lightning_prune.inputs import Inputs, bind
from lightning_prune.one_shot import reconstruct
from lightning_prune.reconstruction import Rebuilt, Reconstruction, rebuilding
from lightning_prune.reconstruction.observer import observe
from lightning_prune.reconstruction.resuming import Astray, Resuming

aten = torch.ops.aten


def conv(inner: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(inner, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def vgg() -> nn.Module:
    pool, head = nn.MaxPool2d(2), [nn.Flatten(), nn.Linear(12 * 16, 10), nn.ReLU(inplace=True), nn.Linear(10, 3)]
    return nn.Sequential(*conv(3, 8), *conv(8, 8), pool, *conv(8, 12), *conv(12, 12), *head)


def resnet() -> nn.Module:
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)
    for module in net.modules():  # an eighth of the width
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            narrow(module)
    return net


def narrow(module: nn.Module) -> None:
    sizes = {"in_channels": 8, "out_channels": 8, "num_features": 8, "in_features": 8}
    values = {key: max(getattr(module, key) // by, 3) for key, by in sizes.items() if hasattr(module, key)}
    args = [*values.values()]
    if isinstance(module, nn.Conv2d):
        module.__init__(*args, module.kernel_size, module.stride, module.padding, bias=False)  # type: ignore[misc]
    else:
        module.__init__(*args, *([3] if isinstance(module, nn.Linear) else []))  # type: ignore[misc]


class PreActivation(nn.Module):
    """The sum is written to in place: what is kept of it has to be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.first = nn.ModuleList(nn.Conv2d(8, 6, 3, padding=1) for _ in range(3))
        self.second = nn.ModuleList(nn.Conv2d(6, 8, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, first, second in zip(self.norms, self.first, self.second, strict=True):
            x += second(first(norm(x).relu_()).relu_())
        y: Tensor = self.fc(x.relu_().mean((2, 3)))
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.blocks, self.fc = nn.Conv2d(3, 16, 4, 4), nn.Sequential(Block(), Block()), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.blocks(self.patch(x).flatten(2).transpose(1, 2)).mean(1))
        return y


class TorchsOwnTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.fc = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 3)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.blocks(self.patch(x).flatten(2).transpose(1, 2)).mean(1))
        return y


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8 + 4 * place, 4, 3, padding=1) for place in range(4))
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(F.relu(layer(torch.cat(found, 1)), inplace=True))
        y: Tensor = self.fc(torch.cat(found, 1).mean((2, 3)))
        return y


class Twice(nn.Module):
    """One layer is called twice, and one between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.between = nn.Linear(192, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x.flatten(1)))
        x = F.relu(self.between(F.relu(self.shared(x))))
        y: Tensor = self.last(F.relu(self.shared(x)))
        return y


class Scaled(nn.Module):
    """Between its layers something is done to what goes through."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.convs = nn.ModuleList((nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            x = self.change(F.relu(layer(x)))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def by_constant(x: Tensor) -> Tensor:
    return x * torch.tensor([0.5]) + torch.arange(x.shape[-1])


def in_parts(x: Tensor) -> Tensor:
    left, right = x.chunk(2, 1)
    left.mul_(2)
    right += left
    return x


def stretched(x: Tensor) -> Tensor:
    shifted = x.as_strided(x.shape, x.stride())
    return shifted.mul_(0.5).add(x)


class ByItem(nn.Module):
    """Branches on a value of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = vgg()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x * 2 if x.mean().item() > 0 else x)
        return y


def by_list(x: Tensor) -> Tensor:
    return x if x.is_meta else x * (1 + abs(x.mean().tolist()))


def by_numpy(x: Tensor) -> Tensor:
    return x if x.is_meta else x + torch.from_numpy(x.detach().numpy().mean((1, 2, 3), keepdims=True).copy())


def wholly_by_numpy(x: Tensor) -> Tensor:
    return x if x.is_meta else torch.from_numpy(x.detach().numpy().copy())


NETS: dict[str, Callable[[], nn.Module]] = {
    "vgg": vgg,
    "resnet": resnet,
    "pre-activation": PreActivation,
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)
    ),
    "transformer": Transformer,
    "torch's transformer": TorchsOwnTransformer,
    "dense": Dense,
    "twice": Twice,
    "constant": lambda: Scaled(by_constant),
    "in parts": lambda: Scaled(in_parts),
    "stretched": lambda: Scaled(stretched),
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "item": ByItem,
    "list": lambda: Scaled(by_list),
    "numpy": lambda: Scaled(by_numpy),
    "wholly numpy": lambda: Scaled(wholly_by_numpy),
    "own input": lambda: nn.Sequential(nn.ReLU(inplace=True), *vgg()),
}


ASKED: dict[str, Any] = {"pruning_ratio": 0.4, "of": "channels"}
LITTLE = Reconstruction(ridge=1e-3)


class Never(Resuming):
    """Resumes nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stop("told not to")


def rebuilt(
    monkeypatch: pytest.MonkeyPatch, made: type[Resuming], net: nn.Module, batches: Sequence[Tensor], **kwargs: Any
) -> tuple[nn.Module, Rebuilt, Resuming]:
    net, found, used = copy.deepcopy(net), [], []
    run = rebuilding._Rebuilding.run

    def spied(self: Any) -> Rebuilt:
        found.append(run(self))
        used.append(self._resuming)
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(rebuilding, "Resuming", made)
        patch.setattr(rebuilding._Rebuilding, "run", spied)
        reconstruct(net, [batch.clone() for batch in batches], **kwargs)
    return net, found[0], used[0]


def lively(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = build()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.running_mean, std=0.1)
    return net.eval()


def images(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=generator) for size in sizes]


def check_same(one: tuple[nn.Module, Rebuilt, Resuming], other: tuple[nn.Module, Rebuilt, Resuming]) -> None:
    assert one[1].refits == other[1].refits
    assert len(one[1].refits) > 1
    assert one[1].plan.removed.keys() == other[1].plan.removed.keys()
    states = [net.state_dict() for net in (one[0], other[0])]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


SETTINGS: list[tuple[Any, bool, Any]] = [
    ("original", True, Lasso()),
    ("current", True, Lasso()),
    ("current", False, Magnitude()),
    ("original", True, Magnitude()),
    ("original", False, Lasso()),
    ("original", False, Magnitude()),
    ("current", True, Magnitude()),
    ("current", False, Lasso()),
]
CASES = [
    pytest.param(name, *setting, id=f"{name}-{setting[0]}-{setting[1]}-{type(setting[2]).__name__}")
    for name in NETS
    for setting in (SETTINGS if name in ("vgg", "pre-activation") else SETTINGS[:3])
]


@pytest.mark.parametrize(("name", "targets", "shortcuts", "criterion"), CASES)
def test_the_result_is_the_same_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, name: str, targets: Any, shortcuts: bool, criterion: Any
) -> None:
    net, batches = lively(NETS[name]), images(24, 24, 24, 9)
    settings = Reconstruction(targets=targets, shortcuts=shortcuts, ridge=1e-3)
    ignored = ["patch"] if name == "torch's transformer" else []  # its trunk and its heads cannot go one by one
    asked = {**ASKED, "criterion": criterion, "reconstruction": settings, "ignore": ignored}
    whole = rebuilt(monkeypatch, Never, net, batches, **asked)
    resumed = rebuilt(monkeypatch, Resuming, net, batches, **asked)
    check_same(whole, resumed)
    assert resumed[2].refusal == ""
    assert resumed[1].kept > whole[1].kept == 0
    assert all(recording.is_checked for recording in resumed[2]._recordings.values())


@pytest.mark.parametrize("criterion", [Lasso(), Magnitude()], ids=["lasso", "magnitude"])
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:The forward pass depends on values")
def test_a_run_that_cannot_be_resumed_is_not(monkeypatch: pytest.MonkeyPatch, name: str, criterion: Any) -> None:
    net, batches = lively(REFUSED[name]), images(24, 24, 9)
    asked = {**ASKED, "criterion": criterion, "reconstruction": LITTLE}
    whole = rebuilt(monkeypatch, Never, net, batches, **asked)
    resumed = rebuilt(monkeypatch, Resuming, net, batches, **asked)
    check_same(whole, resumed)
    assert resumed[2].refusal


class Counter(TorchDispatchMode):
    """Counts the convolutions that are done."""

    def __init__(self) -> None:
        super().__init__()
        self.done = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.done += func.overloadpacket in (aten.convolution, aten.addmm)
        return func(*args, **(kwargs or {}))


LAYERS = ("0", "3", "7", "10", "14", "16")


def passes(resuming_: Resuming, net: nn.Module, batches: Sequence[Tensor]) -> tuple[list[int], list[list[Tensor]]]:
    """Look at one layer after the other; return the products that each pass took, and what was read."""
    resuming_.record(net, bind(net, batches[0]), lambda *_: None)
    counts, seen = [], []
    for name in LAYERS:
        read: list[Tensor] = []

        def see(name: str, call: int, inputs: Tensor, output: Tensor, beside: Any, read: Any = read) -> None:
            read.extend([inputs.clone(), output.clone()])

        with Counter() as counter:
            for number, batch in enumerate(batches):
                resuming_.observe(net, bind(net, batch), number, see, [name], (), 1)
        counts.append(counter.done)
        seen.append(read)
    return counts, seen


def test_layers_before_are_not_computed_again() -> None:
    net = lively(vgg)
    resumed, whole = Resuming(LAYERS), Never(LAYERS)
    counts, seen = passes(resumed, net, images(4, 4))
    counts_of_whole, seen_whole = passes(whole, net, images(4, 4))
    assert counts_of_whole == [2, 4, 6, 8, 10, 12]
    assert counts == [2, 4, (2 + 3) + 2, 4, 4, 4]  # the first that is resumed is checked against a whole run
    for ours, theirs in zip(seen, seen_whole, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_no_more_is_kept_than_there_is_room_for() -> None:
    net, one = lively(vgg), 4 * 8 * 8 * 8 * 4  # bytes of a batch's widest map
    counts, _ = passes(few := Resuming(LAYERS, one), net, images(4, 4))
    assert few.nbytes == one
    assert counts == [2, 4, (2 + 3) + 3, 4, 4, 4]  # behind the pooling there is room for both batches
    counts, _ = passes(none := Resuming(LAYERS, 0), net, images(4, 4))
    assert none.nbytes == 0
    assert counts == [2, 4, 6, 8, 10, 12]


def test_what_was_written_to_is_computed_again() -> None:
    net, batch = lively(vgg), images(4)[0]
    resumed, counts = Resuming(LAYERS), []
    passes(resumed, net, [batch])
    for name in ("16", "0", "16"):
        with torch.no_grad():
            net.get_submodule(name).weight.mul_(0.5)
        read: list[Tensor] = []
        with Counter() as counter:
            resumed.observe(net, bind(net, batch), 0, lambda *seen, read=read: read.append(seen[2]), ["16"], (), 1)
        counts.append(counter.done)
        observe(net, Inputs((batch,)), lambda *seen, read=read: read.append(seen[2]), ["16"], (), 1)
        assert torch.equal(*read)
    assert counts == [1, 6, 1]


class Switched(nn.Sequential):
    """Does something else from one call on."""

    turns = -1
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for layer in self:
            x = layer(x) if self.calls < self.turns or self.turns < 0 else layer(x.neg().neg())
        return x


def switched(turns: int) -> nn.Module:
    net = Switched(*vgg())
    net.turns = turns
    return net


def test_a_run_that_goes_astray_ends_and_the_next_ones_are_whole() -> None:
    net, batch = lively(lambda: switched(6)), images(4)[0]
    resumed = Resuming(LAYERS)
    with pytest.raises(Astray):
        passes(resumed, net, [batch])
    assert resumed.refusal == "a resumed run did something else"
    counts = []
    with Counter() as counter:
        resumed.observe(net, bind(net, batch), 0, lambda *_: None, ["16"], (), 1)
    counts.append(counter.done)
    assert counts == [6]


def test_a_reconstruction_survives_that(monkeypatch: pytest.MonkeyPatch) -> None:
    net, batches = lively(vgg), images(24, 24, 9)
    calls = 0

    class Straying(Resuming):
        def observe(self, *args: Any, **kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            super().observe(*args, **kwargs)
            if calls == 15:
                self.stop("a test")
                raise Astray

    asked = {**ASKED, "criterion": Lasso(), "reconstruction": LITTLE}
    check_same(
        rebuilt(monkeypatch, Never, net, batches, **asked), rebuilt(monkeypatch, Straying, net, batches, **asked)
    )
    assert calls > 15


def test_an_error_in_a_resumed_run_is_looked_at_in_a_whole_one() -> None:
    net, batch = lively(vgg), images(4)[0]
    resumed = Resuming(LAYERS)
    passes(resumed, net, [batch])

    def see(*_: Any) -> None:
        raise ValueError("NaN")

    with pytest.raises(Astray):
        resumed.observe(net, bind(net, batch), 0, see, ["16"], (), 1)
    with pytest.raises(ValueError, match="NaN"):
        resumed.observe(net, bind(net, batch), 0, see, ["16"], (), 1)


def test_a_self_check_that_fails_ends_it() -> None:
    """Through `ctypes` a network reads what no notes can tell of."""

    class Stealthy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.seen = torch.zeros(4)
            self.times = 0

        def forward(self, x: Tensor) -> Tensor:
            self.times += 1
            ctypes.memset(self.seen.data_ptr(), 60 + self.times, 16)  # no version is counted
            y: Tensor = self.third(self.second(self.first(x) + self.hidden()))
            return y

        def hidden(self) -> Tensor:
            return self.seen

    net = lively(Stealthy)
    net.register_buffer("seen2", net.seen)
    resumed = Resuming(["first", "second", "third"])
    x, shown = torch.randn(2, 4), []
    resumed.record(net, Inputs((x,)), lambda *_: None)
    for name in ("second", "third"):
        resumed.observe(net, Inputs((x,)), 0, lambda name, call, read, *_: shown.append(read), [name], (), 1)
    assert resumed.refusal == "a resumed run gave something else"


def test_what_is_kept_counts_for_a_copy_with_the_same_weights() -> None:
    net, batch = lively(vgg), images(4)[0]
    resumed = Resuming(LAYERS)
    passes(resumed, net, [batch])
    same, other = copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        same.get_submodule("16").weight.mul_(2)  # behind
        other.get_submodule("0").weight.mul_(2)
    counts = []
    for twin in (same, other):
        resumed.follow(net, twin)
        with Counter() as counter:
            resumed.observe(twin, bind(twin, batch), 0, lambda *_: None, ["16"], (), 1)
        counts.append(counter.done)
    assert counts == [1, 6]
    resumed.forget(but=[net])
    assert [key[0] for key in resumed._kept] == [id(net)]


def test_random_numbers_gradients_and_strange_tensors_are_refused() -> None:
    def with_gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return x * 2

    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "random": lambda x: x + torch.randn_like(x),
        "gradients": with_gradient,
        "values": lambda x: x * len(x[x > 0]),
        "layout": lambda x: x.to_sparse().to_dense(),
        "in place": lambda x: x.clone().transpose_(2, 3),
    }
    for expected, change in changes.items():
        net = lively(lambda change=change: Scaled(change))  # type: ignore[misc]
        resumed = Resuming(["convs.0"])
        resumed.record(net, Inputs((images(2)[0],)), lambda *_: None)
        assert expected in resumed.refusal
