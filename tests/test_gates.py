"""Gates in a network: a closed one is a removed channel, both routes agree, and copies, files and cuts keep them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from difficult_layers import conv, encoder_layer, square, tied, tokens
from difficulties import DIFFICULTIES
from hypothesis import HealthCheck, given, settings
from proof import Net, outputs, randomise, relative_error
from random_networks import STARTS, RandomNetwork, Recipe, recipes
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_prune import find_groups, history_of, load_pruned, prune, save_pruned
from lightning_prune.allocation import Zeros
from lightning_prune.criteria import GateValue, Magnitude
from lightning_prune.cut import Cut, Offsets
from lightning_prune.errors import HistoryError, NothingToPruneError, PruningError, ScoreError
from lightning_prune.gates import GateGranularity, choose, fold
from lightning_prune.graph import read
from lightning_prune.layers import HardConcrete
from lightning_prune.layers.gated import GATED, READING, GatedLinear
from lightning_prune.layers.gates import KEY, Gates, attach, detach, exchange, gates_of, pack, ungated, unpack
from lightning_prune.surgery import Undo
from lightning_prune.witnesses import watch

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


@each_net
def test_a_closed_gate_is_a_removed_channel(name: str) -> None:
    assert_shut_is_removed(*made(name))


@each_net
def test_so_it_is_in_single_precision(name: str) -> None:
    assert_shut_is_removed(*made(name, torch.float32), tolerance=1e-6)


@pytest.mark.parametrize("name", EQUAL)
def test_so_it_is_in_difficult_networks(name: str) -> None:
    difficulty = DIFFICULTIES[name]
    assert_shut_is_removed(randomise(difficulty.dense().double()).eval(), difficulty.example().double())


@settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(recipes(safe=True))
@pytest.mark.filterwarnings("ignore")
def test_so_it_is_in_random_networks(recipe: Recipe) -> None:
    model = randomise(RandomNetwork(recipe).double(), seed=len(recipe.steps)).eval()
    x = torch.randn(STARTS[recipe.start], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    try:
        gated(model, x)
    except ValueError:
        return  # there is nothing to gate
    before = outputs(model, x)
    with suppress(NothingToPruneError):  # what is gated may still be held together by something else
        close(model, x)
    assert relative_error(outputs(model, x), before) <= 1e-9
    fold(model)
    assert relative_error(outputs(model, x), before) <= 1e-9


def test_fused_kernels_do_not_pass_the_gates_by() -> None:
    model, x = randomise(transformer()).eval(), torch.randn(3, 4, 5)
    plain = outputs(model, x)
    gated(model, x)
    assert any(isinstance(module, nn.MultiheadAttention) and module._forward_pre_hooks for module in model.modules())
    slow = model(x).detach()  # with gradients there is no fused kernel
    assert relative_error(outputs(model, x), [slow]) < 1e-5
    assert relative_error(plain, [slow]) > 1e-2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_sequences_pass_a_gated_encoder() -> None:
    model, x = randomise(transformer()).eval(), torch.randn(3, 4, 5)
    padded = torch.tensor([[False] * 4, [False, False, True, True], [False] * 4])
    gated(model, x)
    with torch.no_grad():
        slow, fast = (model(x, padded).detach() for _ in range(2))
        assert relative_error([fast[~padded]], [slow[~padded]]) < 1e-5
        copied = copy.deepcopy(model)
        fold(copied)
        assert relative_error([copied(x, padded)[~padded]], [slow[~padded]]) < 1e-5
    assert copied.encoder.use_nested_tensor
    assert_no_trace(copied)


@each_net
def test_open_gates_change_nothing(name: str) -> None:
    model, x = made(name)
    before = outputs(model, x)
    gated(model, x)
    for gate in gates_in(model).named().values():
        nn.init.constant_(gate.log_alpha, 50.0)
    assert relative_error(outputs(model, x), before) <= EXACT
    gates_in(model).draw(torch.Generator())
    assert relative_error(outputs(model.train(), x), outputs(model, x)) == 0


def test_a_sequential_runs_with_gates_as_a_child() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    gated(model, torch.zeros(1, 4))
    assert model(torch.zeros(3, 4)).shape == (3, 2)


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


@each_net
def test_both_routes_agree(name: str) -> None:
    model, x = made(name)
    by_weight, by_input = (gated(copy.deepcopy(model), x, per_example=each) for each in (False, True))
    assert any(isinstance(module, tuple(GATED.values())) for module in by_weight.modules())
    assert not any(isinstance(module, tuple(GATED.values())) for module in by_input.modules())
    for routed in (by_weight, by_input):
        draw_alike(routed.train(), len(x))
    assert relative_error(outputs(by_weight, x), outputs(by_input, x)) <= 1e-10
    one, other = gradients(by_weight, x), gradients(by_input, x)
    assert one.keys() == other.keys()
    assert any("log_alpha" in key for key in one)
    for key, gradient in one.items():
        assert torch.allclose(gradient, other[key], rtol=1e-4, atol=1e-9 + 1e-5 * float(gradient.abs().max())), key


@pytest.mark.parametrize("name", ["volumes", "perceptron", "attention", "tied"])
def test_each_example_has_its_own_sample(name: str) -> None:
    model, x = made(name)
    gated(model, x, per_example=True).train()
    gates = gates_in(model)
    gates.draw(torch.Generator().manual_seed(0), len(x))
    noise = {gate: gate.noise for gate in gates.named().values()}
    together = model(x).detach()
    for at in range(len(x)):
        for gate, drawn in noise.items():
            gate.noise = drawn[at : at + 1]
        assert relative_error([model(x[at : at + 1]).detach()], [together[at : at + 1]]) <= 1e-10
    assert float((noise[next(iter(noise))][0] - noise[next(iter(noise))][1]).abs().max()) > 0.1


def test_so_it_is_where_tokens_come_before_examples() -> None:
    parts = {"a": nn.Linear(5, 8), "attend": nn.MultiheadAttention(8, 2)}
    model, x = Net(lambda net, x: net.attend(*[net.a(x)] * 3)[0], **parts).double(), torch.randn(4, 3, 5).double()
    gated(model, x, {"a": "channels"}, per_example=True).train()
    gate = gates_in(model).named()["a"]
    gate.draw(torch.Generator(), 3)
    together, noise = model(x).detach(), gate.noise
    for at in range(3):
        gate.noise = noise[at : at + 1]
        assert relative_error([model(x[:, at : at + 1]).detach()], [together[:, at : at + 1]]) <= 1e-10


def test_other_rows_than_examples_are_refused() -> None:
    model, x = made("perceptron")
    gated(model, x, per_example=True).train()
    gates_in(model).draw(torch.Generator(), 2)
    with pytest.raises(RuntimeError, match=r"sample for each of 2 examples.*per_example=False"):
        model(x)


def test_all_readers_of_a_group_share_a_sample() -> None:
    model, x = made("blocks")
    gated(model, x).train()
    gates_in(model).draw(torch.Generator().manual_seed(5))
    gate = gates_in(model).named()["stem"]
    seen = {name: reading for name, reading in gates_in(model).read_by().items() if gate in reading.channels}
    assert seen.keys() == {"wide", "grouped", "head"}
    values = gate.values(True)
    assert len(values.unique()) > 1
    trunk = values.repeat(2)  # two convolution groups keep the same channels
    for name in ("wide", "grouped"):
        assert torch.equal(seen[name].of_input(True), trunk)
    assert torch.equal(seen["head"].of_input(True)[: 6 * 4], trunk.repeat_interleave(4))  # 4 pixels of each


@pytest.mark.parametrize(
    "granularity",
    [{"5": "weights"}, {"3": "inputs"}, {"*": "channels", "3": "inputs", "5": "weights"}, {"1": "weights"}],
)
def test_gates_of_inputs_and_weights_fold_into_masks(granularity: dict[str, GateGranularity]) -> None:
    model, x = made("perceptron")
    gated(model, x, granularity)
    before, own = outputs(model, x), {name for name in granularity if name != "*"}
    reads = {name: reading for name, reading in gates_in(model).read_by().items() if name in own}
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in own}
    expected = {
        name: reading.of_weight(model.get_submodule(name), weights[name], False) for name, reading in reads.items()
    }
    folded = fold(model)
    assert relative_error(outputs(model, x), before) <= EXACT
    assert folded.masks.keys() == {f"{name}.weight" for name in own}
    for name in own:
        weight, mask = model.get_submodule(name).weight, folded.masks[f"{name}.weight"]
        assert mask.dtype is torch.bool
        assert mask.shape == weight.shape
        assert 0 < int(mask.sum()) < mask.numel()
        assert not weight[~mask].any()
        assert torch.allclose(weight, weights[name] * expected[name].double())
    folded.undo()
    assert relative_error(outputs(model, x), before) == 0
    assert all(torch.equal(model.get_submodule(name).weight, weights[name]) for name in own)


def test_own_gates_are_cut_along_with_the_network() -> None:
    model, x = made("perceptron")
    gated(model, x, {"1": "channels", "3": "inputs", "5": "weights"})
    before = outputs(model, x)
    close(model, x)
    width = model.get_submodule("1").weight.shape[0]
    assert width < 9
    named = gates_in(model).named()
    assert (named["1"].shape, named["3:inputs"].shape, named["5:weights"].shape) == ((width,), (width,), (3, 7))
    assert relative_error(outputs(model, x), before) <= EXACT
    prune(model, x, pruning_ratio=0.3, criterion=Magnitude())
    weight = model.get_submodule("5").weight
    assert named["5:weights"].shape == tuple(weight.shape) != (3, 7)
    before = outputs(model, x)
    assert fold(model).masks.keys() == {"3.weight", "5.weight"}
    assert relative_error(outputs(model, x), before) <= EXACT


@each_net
def test_another_criterion_prunes_and_gates_follow(name: str) -> None:
    model, x = made(name)
    dense = copy.deepcopy(model)
    gated(model, x)
    settings_before = {name: gate.log_alpha.detach().clone() for name, gate in gates_in(model).named().items()}
    record = prune(model, x, pruning_ratio=0.5, criterion=Magnitude(), constants="drop")
    assert record == prune(dense, x, pruning_ratio=0.5, criterion=Magnitude(), constants="drop")
    for group, gate in gates_in(model).named().items():
        assert gate.shape == (record.channels[group].after,)
        assert torch.isin(gate.log_alpha, settings_before[group]).all()
    before = outputs(model, x)
    fold(model)
    assert relative_error(outputs(model, x), before) <= EXACT
    assert [tensor.shape for tensor in model.parameters()] == [tensor.shape for tensor in dense.parameters()]


def test_readers_that_keep_other_channels_of_a_gate_are_refused() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        y = y + net.b(net.norm(y).relu())
        return net.head(net.end(y).relu())  # type: ignore[no-any-return]

    norms = {"norm": nn.BatchNorm2d(8), "end": nn.BatchNorm2d(8)}
    model = Net(run, a=conv(3, 8), b=square(8), **norms, head=conv(8, 5))
    x = torch.randn(2, 3, 6, 6)
    gated(randomise(model).eval(), x)
    before = outputs(model, x)
    with pytest.raises(PruningError, match=r'keep other channels.*trunks="whole"'):
        prune(model, x, pruning_ratio=0.5, trunks="selected")
    assert relative_error(outputs(model, x), before) == 0
    assert not history_of(model)


def test_a_gated_model_reads_as_if_it_had_no_gates() -> None:
    for name in NETS:
        model, x = made(name)
        before = find_groups(model, x)
        gated(model, x)
        now = find_groups(model, x)
        assert [(group.name, group.size, group.frozen) for group in now] == [
            (group.name, group.size, group.frozen) for group in before
        ]
        assert gates_of(model) is not None


def test_a_model_without_gates_has_no_values_to_score() -> None:
    model, x = made("perceptron")
    with pytest.raises(ScoreError, match="has none"):
        close(model, x)
    assert fold(model).masks == {}
    assert detach(model) is None


def test_two_sets_of_gates_are_refused() -> None:
    model, x = made("perceptron")
    gates = choose(model, read(model, x), CHANNELS, HardConcrete).gates
    gated(model, x)
    with pytest.raises(PruningError, match="gated already"):
        attach(model, gates)


def test_gates_come_back_from_aside_after_an_error() -> None:
    model, x = made("blocks")
    gated(model, x)
    before, gates = outputs(model, x), gates_in(model)

    def fail() -> None:
        with ungated(model):
            assert gates_of(model) is gates
            assert KEY not in model._modules
            assert relative_error(outputs(model, x), before) > 1e-3
            with ungated(model):
                raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert relative_error(outputs(model, x), before) == 0
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    assert max(hooks) == 1


class Failing:
    """A witness that does not bear a cut."""

    def before_cut(self, model: nn.Module) -> None: ...

    def after_cut(self, model: nn.Module, cut: Cut, offsets: Offsets) -> Undo:
        raise OSError("no")


@each_net
def test_a_cut_that_fails_leaves_all_as_it_was(name: str) -> None:
    model, x = made(name)
    gated(model, x)
    gates_in(model).draw(torch.Generator())
    sampled, failing = outputs(model.train(), x), Failing()
    before, state = outputs(model.eval(), x), copy.deepcopy(model.state_dict())
    watch(model, failing)
    with pytest.raises(OSError, match="no"):
        close(model, x)
    assert relative_error(outputs(model, x), before) == 0
    assert model.state_dict().keys() == state.keys()
    assert not history_of(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert relative_error(outputs(model.train(), x), sampled) == 0


@each_net
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_gates_of_their_own(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = made(name)
    if copied is not copy.deepcopy and isinstance(model, Net):
        pytest.skip("a lambda cannot be pickled")
    gated(model, x)
    twin, before = copied(model), outputs(model, x)
    assert relative_error(outputs(twin, x), before) == 0
    set_gates(twin, 7)
    assert relative_error(outputs(twin, x), before) > 1e-6
    assert relative_error(outputs(model, x), before) == 0
    now = outputs(twin, x)
    close(twin, x)
    assert relative_error(outputs(twin, x), now) <= EXACT
    fold(twin)
    assert relative_error(outputs(twin, x), now) <= EXACT
    assert relative_error(outputs(model, x), before) == 0


def test_gates_follow_a_change_of_type() -> None:
    model, x = made("blocks", torch.float32)
    gated(model, x)
    before = outputs(model, x)
    model.double()
    assert relative_error(outputs(model, x.double()), [value.double() for value in before]) < 1e-5
    model.bfloat16()
    assert outputs(model, x.bfloat16())[0].dtype is torch.bfloat16
    assert all(reading.index.dtype is torch.int64 for reading in gates_in(model).read_by().values())


@each_net
def test_a_state_dict_goes_round(name: str) -> None:
    (model, x), (other, _) = made(name), made(name)
    gated(model, x)
    gated(other, x)
    set_gates(other, 9)
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert relative_error(outputs(other, x), outputs(model, x)) == 0
    plain = [key for key in model.state_dict() if not key.startswith(f"{KEY}.gates.")]
    assert plain == list(made(name)[0].state_dict())


@each_net
@pytest.mark.parametrize("per_example", [False, True])
def test_gates_go_through_a_file(name: str, per_example: bool, tmp_path: Path) -> None:
    (model, x), (dense, _) = made(name), made(name)
    gated(model, x, per_example=per_example)
    close(model, x)
    set_gates(model, 4)
    torch.save(pack(gates_in(model)), tmp_path / "gates.pt")
    packed = torch.load(tmp_path / "gates.pt", weights_only=True)
    if name != "attention":  # whose width follows its heads, so that nothing could go
        with pytest.raises(HistoryError, match="which reads"):
            unpack(packed, dense)  # of other widths
    save_pruned(model, tmp_path / "model.pt")
    for target in (dense, gated(made(name)[0], x), gated(made(name)[0], x, per_example=True), copy.deepcopy(model)):
        load_pruned(target, tmp_path / "model.pt")
        assert relative_error(outputs(target, x), outputs(model, x)) == 0
        assert gates_in(target).per_example is per_example
        assert history_of(target) == history_of(model)
    fold(dense)
    fold(model)
    assert relative_error(outputs(dense, x), outputs(model, x)) == 0
    save_pruned(model, tmp_path / "folded.pt")
    load_pruned(dense, tmp_path / "folded.pt")
    assert gates_of(dense) is None


def damage(packed: dict[str, Any], *path: str, value: object = None) -> dict[str, Any]:
    """Change one entry of packed gates; take it out where there is no value."""
    place: Any = packed
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return packed


INDEX = ("readings", "3", "index")
NO_GATES = {"channels": [], "index": torch.zeros(4).long(), "inputs": None, "weights": None}
DAMAGES: dict[str, tuple[tuple[str, ...], object]] = {
    "no gates": (("gates",), None),
    "no list": (("gates",), 3),
    "no readings": (("readings",), None),
    "no mode": (("per_example",), None),
    "wrong mode": (("per_example",), torch.ones(2)),
    "a gate is missing": (("gates", "1"), None),
    "no kind": (("gates", "1", "kind"), None),
    "unknown kind": (("gates", "1", "kind"), "sharp"),
    "unknown setting": (("gates", "1", "colour"), 1),
    "impossible setting": (("gates", "1", "beta"), -1.0),
    "setting of another type": (("gates", "1", "drop_rate"), "half"),
    "other shape": (("gates", "1", "shape"), [8]),
    "two dimensions": (("gates", "1", "shape"), [3, 3]),
    "negative shape": (("gates", "1", "shape"), [-9]),
    "shape of floats": (("gates", "1", "shape"), [9.0]),
    "huge shape": (("gates", "1", "shape"), [10**11]),
    "endless shape": (("gates", "1", "shape"), [10**40]),
    "no index": (INDEX, None),
    "index out of range": (INDEX, torch.arange(1, 10) + 5),
    "negative index": (INDEX, torch.arange(1, 10) - 5),
    "index of floats": (INDEX, torch.arange(1.0, 10.0)),
    "index in columns": (INDEX, torch.arange(1, 10).view(3, 3)),
    "short index": (INDEX, torch.arange(1, 8)),
    "list for an index": (INDEX, [1, 2, 3]),
    "unknown channels": (("readings", "3", "channels"), ["x"]),
    "unknown layer": (("readings", "9"), NO_GATES | {"index": torch.zeros(3).long()}),
    "no layer with weights": (("readings", "2"), NO_GATES | {"index": torch.zeros(3).long()}),
    "layer that makes, not reads": (("readings", "0"), NO_GATES),
    "input gate of another width": (("readings", "3", "inputs"), "3"),
    "weight gate of another shape": (("readings", "3", "weights"), "1"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(DAMAGES))
def test_damaged_gates_are_refused(what: str, tmp_path: Path) -> None:
    path, value = DAMAGES[what]
    model, x = made("perceptron")
    gated(model, x)
    save_pruned(model, tmp_path / "model.pt")
    held = torch.load(tmp_path / "model.pt", weights_only=True)
    damage(held, KEY, *path, value=value)
    torch.save(held, tmp_path / "damaged.pt")
    for target in (gated(made("perceptron")[0], x), made("perceptron")[0]):
        before, state = outputs(target, x), list(target.state_dict())
        with pytest.raises(HistoryError, match="gates do not fit the model, or are damaged"):
            load_pruned(target, tmp_path / "damaged.pt")
        assert relative_error(outputs(target, x), before) == 0
        assert list(target.state_dict()) == state


def test_a_layout_on_a_layer_that_reads_nothing_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 5), nn.Linear(5, 3), nn.BatchNorm1d(3))
    for name, width in (("0", 5), ("2", 3)):
        plain = {"channels": [], "index": torch.zeros(width).long(), "inputs": "g", "weights": None}
        packed = {"gates": {"g": {"kind": "hard_concrete", "shape": [width]}}, "readings": {name: plain}}
        with pytest.raises(HistoryError, match="damaged"):
            unpack({**packed, "per_example": False}, model)


@pytest.mark.parametrize("packed", [None, 3, [], {"gates": {}}, torch.ones(3), "gates"])
def test_something_else_is_no_gates(packed: object) -> None:
    with pytest.raises(HistoryError, match="no gates with readings"):
        unpack(packed, nn.Linear(2, 2))
    assert unpack({}, nn.Linear(2, 2)) is None
    assert pack(None) == {}


def test_an_exchange_can_be_taken_back() -> None:
    model, x = made("blocks")
    gated(model, x)
    before, gates = outputs(model, x), gates_in(model)
    undo = exchange(model, None)
    assert gates_of(model) is None
    undo()
    other = choose(model, read(model, x), CHANNELS, HardConcrete).gates
    undo = exchange(model, other)
    assert gates_of(model) is other
    undo()
    assert gates_of(model) is gates
    assert relative_error(outputs(model, x), before) == 0


@pytest.mark.parametrize("name", ["keys", "values", "a/b", "a~1b", "pop", "gates"])
def test_layers_may_have_any_name(name: str) -> None:
    parts = {name: nn.Linear(4, 6), "end": nn.Linear(6, 2)}
    model = Net(lambda net, x: net._modules["end"](net._modules[name](x).relu()), **parts)
    model, x = model.eval(), torch.randn(3, 4)
    attach(model, choose(model, read(model, x), {name: "inputs"}, HardConcrete).gates)
    set_gates(model)
    assert list(gates_in(model).read_by()) == [name]
    assert list(gates_in(model).named()) == [f"{name}:inputs"]
    before = outputs(model, x)
    undo = exchange(model, unpack(pack(gates_in(model)), model))
    undo()
    assert relative_error(outputs(model, x), before) == 0
    fold(model)
    assert_shut_is_removed(model.double(), x.double())


def test_a_single_layer_can_be_gated() -> None:
    model, x = nn.Linear(4, 3).eval(), torch.randn(2, 4)
    gated(model, x, {"*": "inputs"})
    before = outputs(model, x)
    assert type(model) is GatedLinear
    assert list(model.state_dict()) == [
        "weight",
        "bias",
        f"{KEY}.gates.:inputs.log_alpha",
    ]
    assert fold(model).masks["weight"].shape == (3, 4)
    assert type(model) is nn.Linear
    assert relative_error(outputs(model, x), before) < 1e-6


@pytest.mark.parametrize("name", ["blocks", "perceptron", "attention"])
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_compiled_networks_hear_every_draw(name: str, per_example: bool) -> None:
    if name == "blocks" and per_example:
        pytest.skip("one of the two routes is enough")
    torch.compiler.reset()
    model, x = made(name, torch.float32)
    gated(model, x, per_example=per_example).train()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    twin, seen = copy.deepcopy(model), []
    for step in range(5):
        for each in (model, twin):
            gates_in(each).draw(torch.Generator().manual_seed(step), len(x))
            set_gates(each, step)
        seen.append(compiled(x).detach())
        assert relative_error([seen[-1]], [twin(x).detach()]) < 1e-5
    assert counter.frame_count <= 2
    assert relative_error(seen[:1], seen[1:2]) > 1e-4
    for each in (model, twin):
        each.eval()
    assert relative_error([compiled(x).detach()], [twin(x).detach()]) < 1e-5
    assert gates_of(compiled) is gates_in(model)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["blocks", "perceptron", "attention"])
@pytest.mark.filterwarnings("ignore")
def test_gated_and_folded_networks_are_exported(name: str) -> None:
    model, x = made(name, torch.float32)
    gated(model, x)
    before = outputs(model, x)
    assert relative_error(outputs(torch.export.export(model, (x,)).module(), x), before) < 1e-5
    close(model, x)
    fold(model)
    assert relative_error(outputs(torch.export.export(model, (x,)).module(), x), before) < 1e-5


def test_a_group_that_a_cut_has_redrawn_is_passed_over() -> None:
    difficulty = DIFFICULTIES["attn_gqa"]
    model, x = randomise(difficulty.dense().double()).eval(), difficulty.example().double()
    gated(model, x)
    close(model, x)
    sizes = {group.name: group.size for group in find_groups(model, x)}
    gates = gates_in(model).named()
    assert gates["f.q"].shape != (sizes["f.q"],)  # with one head of keys left, heads of queries can go one by one
    close(model, x)
    assert "no score" in history_of(model)[-1].held_back["f.q"]


def test_a_layer_may_be_used_twice() -> None:
    model = tokens(lambda n, y: n.f(n.f(y).relu()).relu(), 8, f=nn.Linear(8, 8)).double()
    assert_shut_is_removed(randomise(model).eval(), torch.randn(2, 3, 5, dtype=torch.float64))
