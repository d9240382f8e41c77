"""Models in whatever form people hand them in: wrapped, shared, frozen, weightless, in any dtype and layout."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from proof import Net, permute_channels, prove, randomise, relative_error, same_state, snapshot, summary
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune import find_groups, history_of, load_pruned, prune, save_pruned
from lightning_prune.criteria import BNScale, Criterion, Magnitude, Random
from lightning_prune.errors import ScoreError
from lightning_prune.history import replay
from lightning_prune.inputs import tensors_in
from lightning_prune.sizes import stale_sizes

OUT = "reaches the model's output"
X = torch.randn(2, 3, 6, 6)
ROWS = torch.randn(3, 4)
FOUND = {"stem": 8, "block.a": 6, "head": OUT}
DENSE = [(8, 3, 3, 3), (8,), (8,), (8,), (6, 8, 1, 1), (6,), (8, 6, 1, 1), (8,), (5, 128), (5,)]
HALVED = [(4, 3, 3, 3), (4,), (4,), (4,), (3, 4, 1, 1), (3,), (4, 3, 1, 1), (4,), (5, 64), (5,)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).relu())


class Plain(nn.Module):
    """A residual network of 8 channels, 6 inside of its block, and a head behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.block = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Block()
        self.head = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.norm(self.stem(x)).relu()).flatten(1))


class Module(pl.LightningModule):
    """The same as a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss = Plain(), nn.CrossEntropyLoss()
        self.example_input_array = X

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in model.parameters()]


def results(model: nn.Module, example: Any) -> list[Tensor]:
    """Run the model in eval mode, without gradients."""
    with torch.no_grad():
        return list(tensors_in(called(model.eval(), example)))


def called(model: nn.Module, example: Any) -> Any:
    """Call a model as `find_groups` does: a plain tuple holds positional inputs, a dict keyword inputs."""
    if type(example) in (tuple, dict):
        return model(*example) if type(example) is tuple else model(**example)
    return model(example)


def check(build: Callable[[], nn.Module], example: Any, expected: dict[str, int | str], path: Path) -> nn.Module:
    """Assert that the groups are the expected and proven ones, that a half of them goes, and that the cut can be done
    again on a dense model; return the cut model.
    """
    model = randomise(build().double())
    groups = find_groups(model, example)
    assert summary(groups) == expected
    before, permuted = results(model, example), copy.deepcopy(model)
    permute_channels(permuted, [group for group in groups if not group.frozen])
    assert relative_error(results(permuted, example), before) < 1e-10
    record = prune(model, example, pruning_ratio=0.5)
    free = {name: size for name, size in expected.items() if isinstance(size, int)}
    assert {name: record.channels[name].after for name in free} == {name: size // 2 for name, size in free.items()}
    assert stale_sizes(model) == {}
    after = results(model, example)
    assert [result.shape for result in after] == [result.shape for result in before]
    save_pruned(model, path)
    for twin in (load_pruned(build().double(), path), _replayed(build().double(), model)):
        assert shapes(twin) == shapes(model)
        assert all(map(torch.equal, results(twin, example), after))
        assert history_of(twin) == history_of(model)
    return model


def _replayed(fresh: nn.Module, model: nn.Module) -> nn.Module:
    replay(fresh, history_of(model))
    fresh.load_state_dict(model.state_dict())
    return fresh


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "torch.compile": compiled,
    "DistributedDataParallel of torch.compile": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "torch.compile of DataParallel": lambda model: compiled(nn.DataParallel(model)),
    "model.compile": compiled_in_place,
}


@pytest.fixture(scope="module", autouse=True)
def _a_world_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting = tmp_path_factory.mktemp("gloo") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", WRAPPERS)
class TestWrapped:
    def test_the_groups_are_those_of_the_model_inside(self, name: str) -> None:
        model = Plain()
        wrapped = WRAPPERS[name](model)
        before = snapshot(model)
        groups = find_groups(wrapped, X)
        assert groups == find_groups(Plain(), X)
        assert summary(groups) == FOUND
        assert same_state(snapshot(model), before)
        prove(model, X, groups)

    def test_a_wrapper_that_has_run_is_cut_and_runs_again(self, name: str) -> None:
        model = randomise(Plain()).eval()
        wrapped = WRAPPERS[name](model)
        with torch.no_grad():
            assert wrapped(X).shape == (2, 5)
            record = prune(wrapped, X, pruning_ratio=0.5)
            assert (record.reached, shapes(model)) == (0.5, HALVED)
            assert torch.equal(wrapped(X), model(X))
        assert history_of(wrapped) == history_of(model) == (record,)

    def test_a_second_cut_counts_against_the_dense_model(self, name: str) -> None:
        wrapped = WRAPPERS[name](Plain())
        assert [prune(wrapped, X, pruning_ratio=ratio).reached for ratio in (0.5, 0.5)] == [0.5, 0.5]

    def test_patterns_are_matched_with_the_names_inside(self, name: str) -> None:
        groups = find_groups(WRAPPERS[name](Plain()), X, ignore=["block.a"])
        assert summary(groups)["block.a"] == "is ignored by the pattern 'block.a'"

    def test_what_is_saved_wrapped_is_loaded_plain(self, name: str, tmp_path: Path) -> None:
        model = Plain()
        wrapped = WRAPPERS[name](model)
        prune(wrapped, X, pruning_ratio=0.5)
        save_pruned(wrapped, tmp_path / "pruned.pt")
        loaded = load_pruned(Plain(), tmp_path / "pruned.pt")
        assert all(map(torch.equal, results(loaded, X), results(model, X)))

    def test_what_is_saved_plain_is_loaded_wrapped(self, name: str, tmp_path: Path) -> None:
        model, fresh = Plain(), Plain()
        prune(model, X, pruning_ratio=0.5)
        save_pruned(model, tmp_path / "pruned.pt")
        load_pruned(WRAPPERS[name](fresh), tmp_path / "pruned.pt")
        assert all(map(torch.equal, results(fresh, X), results(model, X)))

    def test_a_wrapped_dense_model_is_cut_as_a_record_says(self, name: str) -> None:
        model, fresh = Plain(), Plain()
        prune(model, X, pruning_ratio=0.5)
        replay(WRAPPERS[name](fresh), history_of(model))
        assert shapes(fresh) == HALVED


def test_distributed_data_parallel_that_is_wrapped_anew_trains() -> None:
    model = Plain()
    prune(nn.parallel.DistributedDataParallel(model), X, pruning_ratio=0.5)
    nn.parallel.DistributedDataParallel(model)(X).sum().backward()
    assert [tuple(parameter.grad.shape) for parameter in model.parameters()] == HALVED


@pytest.mark.parametrize("wrap", [lambda model: model, compiled, compiled_in_place, nn.DataParallel])
def test_a_lightning_module_has_the_groups_of_its_network(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = Module()
    groups = find_groups(wrap(module), X)
    assert summary(groups) == {f"net.{name}": found for name, found in FOUND.items()}
    prove(Module(), X, groups)
    assert prune(wrap(module), X, pruning_ratio=0.5).reached == 0.5
    assert shapes(module) == HALVED


def test_a_lightning_module_is_cut_and_loaded(tmp_path: Path) -> None:
    found = {f"net.{name}": found for name, found in FOUND.items()}
    check(Module, X.double(), found, tmp_path / "pruned.pt")


def with_compiled_part() -> nn.Module:
    model = Plain()
    model.block = compiled(model.block)
    return model


def test_a_compiled_part(tmp_path: Path) -> None:
    found = {"stem": 8, "block._orig_mod.a": 6, "head": OUT}
    model = check(with_compiled_part, X.double(), found, tmp_path / "pruned.pt")
    assert shapes(model) == HALVED


def shared_module() -> nn.Module:
    """One layer in two places and in a list."""
    net = Net(lambda n, x: n.c(n.b(n.a(x).relu()) + n.twin(n.list[0](x))), a=nn.Linear(4, 8), b=nn.Linear(8, 8))
    for name, part in {"twin": net.b, "list": nn.ModuleList([net.a]), "c": nn.Linear(8, 3)}.items():
        net.add_module(name, part)
    return net


def tied_weights() -> nn.Module:
    net = Net(
        lambda n, x: n.c(n.twin(n.b(n.a(x).relu()).relu())),
        **{"a": nn.Linear(4, 8), "b": nn.Linear(8, 8), "twin": nn.Linear(8, 8), "c": nn.Linear(8, 3)},
    )
    net.twin.weight = net.b.weight
    return net


class Autoencoder(nn.Module):
    """The decoder is the encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(x).relu() @ self.code.weight


class Widths(nn.Module):
    """Buffers as wide as the layer, one that is None, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.rand(8))
        self.register_buffer("mask", torch.tensor([True, False] * 4))
        self.register_buffer("square", torch.rand(8, 8))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) * self.scale).masked_fill(~self.mask, 0.5) @ self.square) * self.steps


class Mixed(nn.Module):
    """Complex weights inside, and an integer table."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.filter = nn.Parameter(torch.rand(8, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) * self.filter).real)


FORMS: dict[str, tuple[Callable[[], nn.Module], dict[str, int | str]]] = {
    "a module in several places": (shared_module, {"a": 8, "b": 8, "c": OUT}),
    "tied weights": (tied_weights, {"a": 8, "c": OUT}),
    "a weight and its transpose": (
        Autoencoder,
        {"code": 8, "code#2": "meets a dimension that holds no channels in aten.addmm.default"},
    ),
    "buffers as wide as the layer": (Widths, {"a": 8, "square": 8, "b": OUT}),
    "a complex parameter": (Mixed, {"a": 8, "b": OUT}),
}


@pytest.mark.parametrize("name", FORMS)
def test_tensors_in_several_places_and_of_other_kinds(name: str, tmp_path: Path) -> None:
    build, expected = FORMS[name]
    check(build, ROWS.double(), expected, tmp_path / "pruned.pt")


def test_buffers_follow_the_width() -> None:
    net = Widths()
    kept = prune(net, ROWS, pruning_ratio=0.5).kept
    assert [tuple(buffer.shape) for buffer in net.buffers()] == [(4,), (4,), (4, 4), ()]
    assert net.mask.tolist() == [channel % 2 == 0 for channel in kept["mask"][0]]
    assert (net.mask.dtype, net.steps.item(), net.nothing) == (torch.bool, 3, None)


def with_a_ramp() -> nn.Module:
    net = Net(lambda n, x: n.b(n.a(x) * n.ramp), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    net.register_buffer("ramp", torch.arange(8) / 8, persistent=False)
    return net


def test_buffers_that_are_not_saved_are_cut_to_fit(tmp_path: Path) -> None:
    net = with_a_ramp()
    kept = prune(net, ROWS, pruning_ratio=0.5).kept["ramp"][0]
    save_pruned(net, tmp_path / "pruned.pt")
    loaded = load_pruned(with_a_ramp(), tmp_path / "pruned.pt")
    assert loaded.ramp.tolist() == net.ramp.tolist() == [position / 8 for position in kept]
    assert torch.equal(loaded(ROWS), net(ROWS))


class TestFlagsAndModes:
    def test_what_is_not_trained_stays_so_and_is_cut(self) -> None:
        model = Plain()
        model.stem.requires_grad_(False)
        model.block.b.bias.requires_grad_(False)
        flags = [parameter.requires_grad for parameter in model.parameters()]
        assert summary(find_groups(model, X)) == FOUND
        prune(model, X, pruning_ratio=0.5)
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert shapes(model) == HALVED
        model(X).sum().backward()
        assert [parameter.grad is not None for parameter in model.parameters()] == flags

    def test_a_model_without_anything_to_train(self) -> None:
        model = Plain().requires_grad_(False)
        assert prune(model, X, pruning_ratio=0.5).reached == 0.5
        assert not any(parameter.requires_grad for parameter in model.parameters())

    @pytest.mark.parametrize("training", [(True, True, True), (False, False, False), (True, False, True)])
    def test_each_module_keeps_its_mode(self, training: tuple[bool, bool, bool]) -> None:
        model = Plain()
        model.training, model.norm.training, model.block.a.training = training
        find_groups(model, X)
        prune(model, X, pruning_ratio=0.5)
        assert (model.training, model.norm.training, model.block.a.training) == training
        assert model.stem.training

    def test_the_cut_is_the_same_in_both_modes(self) -> None:
        model = Plain()
        twin = copy.deepcopy(model).eval()
        assert prune(model.train(), X, pruning_ratio=0.5).kept == prune(twin, X, pruning_ratio=0.5).kept
        assert model.norm.num_batches_tracked == 0


class TestWeightless:
    """Models of which only the shapes are there."""

    @pytest.mark.parametrize("example", ["cpu", "meta"])
    def test_the_groups_are_those_of_a_model_with_weights(self, example: str) -> None:
        with torch.device("meta"):
            model = Plain()
        assert find_groups(model, X.to(example)) == find_groups(Plain(), X)

    def test_a_model_with_weights_takes_an_example_without_memory(self) -> None:
        model = Plain()
        assert find_groups(model, X.to("meta")) == find_groups(model, X)
        prune(model, X.to("meta"), pruning_ratio=0.5)
        assert shapes(model) == HALVED

    @pytest.mark.parametrize("of", ["channels", "params", "macs"])
    def test_it_is_cut_at_random(self, of: Any) -> None:
        model = Plain().to("meta")
        record = prune(model, X.to("meta"), pruning_ratio=0.5, of=of, criterion=Random())
        assert record.reached >= 0.5
        assert all(parameter.is_meta for parameter in model.parameters())
        assert shapes(model) == HALVED if of == "channels" else shapes(model) != DENSE
        assert model(X.to("meta")).shape == (2, 5)

    def test_its_cut_is_done_again_on_a_model_with_weights(self) -> None:
        weightless, model = Plain().to("meta"), Plain()
        prune(weightless, X, pruning_ratio=0.5, criterion=Random())
        replay(model, history_of(weightless))
        assert shapes(model) == HALVED
        model(X).sum().backward()

    @pytest.mark.parametrize("criterion", [Magnitude(), Magnitude(1, normalize=None), BNScale()])
    def test_weights_that_are_not_there_cannot_be_scored(self, criterion: Criterion) -> None:
        model = Plain().to("meta")
        with pytest.raises(ScoreError, match=r"stem lie on the meta device; use `Random\(\)`\.$"):
            prune(model, X.to("meta"), pruning_ratio=0.5, criterion=criterion)
        assert shapes(model) == DENSE

    def test_a_part_without_weights(self) -> None:
        model = Plain()
        model.block.b.to("meta")
        with pytest.raises(ScoreError, match=r"lie on the meta device; use `Random\(\)`\.$"):
            prune(model, X, pruning_ratio=0.5)
        prune(model, X, pruning_ratio=0.5, criterion=Random())
        assert shapes(model) == HALVED
        assert (model.block.a.weight.is_meta, model.block.b.weight.is_meta) == (False, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model, example = Plain().to(dtype), X.to(dtype)
    assert find_groups(model, example) == find_groups(Plain(), X)
    assert prune(model, example, pruning_ratio=0.5).reached == 0.5
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert shapes(model) == HALVED
    save_pruned(model, tmp_path / "pruned.pt")
    loaded = load_pruned(Plain().to(dtype), tmp_path / "pruned.pt")
    assert all(map(torch.equal, results(loaded, example), results(model, example)))
    assert results(model, example)[0].dtype == dtype


def test_layers_of_several_dtypes() -> None:
    net = Net(lambda n, x: n.b(n.a(x.half()).float()), a=nn.Linear(4, 8).half(), b=nn.Linear(8, 3))
    assert prune(net, ROWS, pruning_ratio=0.5).reached == 0.5
    assert (net.a.weight.dtype, net.b.weight.dtype, net(ROWS).shape) == (torch.float16, torch.float32, (3, 3))


def test_autocast_around_a_cut() -> None:
    model = Plain()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert find_groups(model, X) == find_groups(Plain(), X)
        prune(model, X, pruning_ratio=0.5)
        assert model(X).dtype == torch.bfloat16
    assert shapes(model) == HALVED
    assert model.stem.weight.dtype == torch.float32


def test_channels_last_stays_channels_last(tmp_path: Path) -> None:
    model, example = Plain().to(memory_format=torch.channels_last), X.contiguous(memory_format=torch.channels_last)
    assert find_groups(model, example) == find_groups(Plain(), X)
    prune(model, example, pruning_ratio=0.5)
    assert shapes(model) == HALVED
    assert model.stem.weight.stride() == (27, 1, 9, 3)
    save_pruned(model, tmp_path / "pruned.pt")
    loaded = load_pruned(Plain().to(memory_format=torch.channels_last), tmp_path / "pruned.pt")
    assert loaded.stem.weight.stride() == (27, 1, 9, 3)
    assert all(map(torch.equal, results(loaded, example), results(model, example)))


@dataclass
class Batch:
    x: Any
    mask: Tensor | None = None
    times: int = 2


Pair = namedtuple("Pair", "x mask")


class Taking(nn.Module):
    """A network that is called with anything; `read` picks the tensor."""

    def __init__(self, read: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self._read = nn.Linear(4, 8), nn.Linear(8, 3), read

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.b(self.a(self._read(*args, **kwargs)).relu())


class Batched(Taking):
    """The same with a single input."""

    def forward(self, batch: Any) -> Tensor:
        return super().forward(batch)


TREES: dict[str, tuple[type[Taking], Any, Callable[..., Tensor]]] = {
    "positional, with None and a number": (Taking, (ROWS, None, 3), lambda x, mask, times: x * times),
    "nested lists": (Taking, (ROWS, [[ROWS, None], [2]]), lambda x, rest: x + rest[0][0] * rest[1][0]),
    "a tuple in a tuple": (Taking, ((ROWS, (ROWS,)),), lambda pair: pair[0] + pair[1][0]),
    "a dict in a tuple": (Taking, ({"x": ROWS, "n": None, "t": 2},), lambda batch: batch["x"] * batch["t"]),
    "keywords with nested values": (Taking, {"x": [ROWS, ROWS], "n": None}, lambda x, n: x[0] + x[1]),
    "a dataclass": (Batched, Batch(ROWS), lambda batch: batch.x * batch.times),
    "a dataclass of lists": (Batched, Batch([ROWS, [ROWS]]), lambda batch: batch.x[0] + batch.x[1][0]),
    "a dataclass in a tuple": (Batched, (Batch(ROWS),), lambda batch: batch.x * batch.times),
    "a dataclass in a dict": (Batched, {"batch": Batch(ROWS)}, lambda batch: batch.x * batch.times),
    "a named tuple": (Batched, Pair(ROWS, None), lambda batch: batch.x * 2),
    "a named tuple in a tuple": (Batched, (Pair(ROWS, None),), lambda batch: batch.x * 2),
    "a mapping of its own class": (Batched, UserDict(x=ROWS), lambda batch: batch["x"] * 2),
    "indices beside": (Taking, (ROWS, torch.tensor([2, 0, 1])), lambda x, index: x[index]),
    "a mask beside": (Taking, (ROWS, torch.tensor([True, False, True])), lambda x, m: x.masked_fill(~m[:, None], 0)),
    "a number as a tensor": (Taking, (ROWS, torch.tensor(3)), lambda x, times: x * times),
}


@pytest.mark.parametrize("name", TREES)
def test_inputs_of_any_shape(name: str, tmp_path: Path) -> None:
    kind, example, read = TREES[name]
    groups = find_groups(kind(read), example)
    assert groups == find_groups(Batched(lambda x: x), ROWS)
    check(lambda: kind(read), _double(example), {"a": 8, "b": OUT}, tmp_path / "pruned.pt")


@pytest.mark.parametrize("name", TREES)
def test_inputs_are_not_changed_by_a_forward_that_works_in_place(name: str) -> None:
    kind, given, read = TREES[name]
    example = copy.deepcopy(given)

    def spoil(*args: Any, **kwargs: Any) -> Tensor:
        for tensor in tensors_in((args, kwargs)):
            tensor.zero_()
        return read(*args, **kwargs)

    prune(kind(spoil), example, pruning_ratio=0.5)
    before, after = list(tensors_in(given)), list(tensors_in(example))
    assert len(before) == len(after) > 0
    assert all(map(torch.equal, before, after))


def _double(example: Any) -> Any:
    """Turn the floats of an example into doubles, in containers that pytree does not know too."""

    def change(value: Any) -> Any:
        if isinstance(value, Batch):
            return Batch(_double(value.x))
        if isinstance(value, UserDict):
            return UserDict(_double(value.data))
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(change, example)


class Remembering(nn.Module):
    """Keeps a table that it has computed while it is in eval mode, as levit does, and forgets it in `train`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.rand(8))
        self.cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def train(self, mode: bool = True) -> Remembering:
        self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.b(self.a(x) * self.gain.exp())
        if "gain" not in self.cache:
            self.cache["gain"] = self.gain.exp()
        return self.b(self.a(x) * self.cache["gain"])


def test_what_a_model_has_computed_and_kept_is_computed_again() -> None:
    model, x = Remembering().eval(), torch.rand(2, 4)
    model(x)
    model.b.training = True
    kept = model.cache
    record = prune(model, x, pruning_ratio=0.5)
    assert record.channels["a"].after == 4
    assert model(x).shape == (2, 3)
    assert model.cache["gain"].shape == (4,)
    assert kept["gain"].shape == (8,)
    assert (model.training, model.a.training, model.b.training) == (False, False, True)
