"""Gates in a network: a closed one is a removed channel, both routes agree, and cuts keep them."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from difficult_layers import conv, square, tokens
from difficulties import DIFFICULTIES
from gated_networks import (
    CHANNELS,
    EQUAL,
    EXACT,
    NETS,
    assert_no_trace,
    assert_shut_is_removed,
    close,
    draw_alike,
    each_net,
    gated,
    gates_in,
    gradients,
    made,
    set_gates,
    transformer,
)
from hypothesis import HealthCheck, given, settings
from proof import Net, outputs, randomise, relative_error
from random_networks import STARTS, RandomNetwork, Recipe, recipes
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from versions import older

from lightning_prune import find_groups, history_of, prune
from lightning_prune.criteria import Magnitude
from lightning_prune.cut import Cut, Offsets
from lightning_prune.errors import NothingToPruneError, PruningError, ScoreError
from lightning_prune.gates import GateGranularity, choose, fold
from lightning_prune.graph import read
from lightning_prune.layers import HardConcrete
from lightning_prune.layers.gated import GATED
from lightning_prune.layers.gates import KEY, attach, detach, gates_of, ungated
from lightning_prune.surgery import Undo
from lightning_prune.witnesses import watch


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


def test_gates_follow_a_change_of_type() -> None:
    model, x = made("blocks", torch.float32)
    gated(model, x)
    before = outputs(model, x)
    model.double()
    assert relative_error(outputs(model, x.double()), [value.double() for value in before]) < 1e-5
    model.bfloat16()
    assert outputs(model, x.bfloat16())[0].dtype is torch.bfloat16
    assert all(reading.index.dtype is torch.int64 for reading in gates_in(model).read_by().values())


@pytest.mark.parametrize("name", ["blocks", "perceptron", "attention"])
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_compiled_networks_hear_every_draw(name: str, per_example: bool) -> None:
    if name == "blocks" and per_example:
        pytest.skip("one of the two routes is enough")
    if older("torch", "2.6") and (name, per_example) != ("perceptron", False):
        pytest.skip("torch before 2.6 does not compile gates: `id` of a tensor that was computed")
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
