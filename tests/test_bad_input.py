"""What a model or its inputs can do wrong: it works and says what it did, or an error says what to do instead."""

from __future__ import annotations

import copy
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from proof import Net, outputs, prove, randomise, relative_error, same_state, snapshot, summary
from torch import Tensor, nn

from lightning_prune import find_groups, history_of, prune
from lightning_prune.errors import PruningError, TraceError

OUT = "reaches the model's output"
X, IMAGES = torch.randn(3, 4), torch.randn(2, 3, 8, 8)
FREE = {"a": 8, "b": OUT}
BY_VALUE = "depends on values, so it was read on the real tensors: what was found holds for the branches that these"


def mlp(run: Callable[[Net, Tensor], Any] = lambda n, x: n.b(n.a(x).relu())) -> Net:
    return Net(run, a=nn.Linear(4, 8), b=nn.Linear(8, 3))


BRANCHES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "if": lambda n, x: n.b(n.a(x)) if n.a(x).sum() > -1e9 else n.a(x),
    "item": lambda n, x: n.b(n.a(x)) * (1 + n.a(x).mean().abs().item()),
    "tolist": lambda n, x: n.b(n.a(x)) * (1 + abs(n.a(x).tolist()[0][0])),
    "numpy": lambda n, x: n.b(n.a(x)) * (1 + float(abs(n.a(x).numpy()).mean())),
    "a loop": lambda n, x: n.b(sum([n.a(x).tanh()] * (int(x.square().sum()) % 2 + 2))),
    "a while": lambda n, x: n.b(_shrunk(n.a(x), x)),
    "an assert": lambda n, x: n.b(_checked(n.a(x))),
    "allclose": lambda n, x: n.b(n.a(x).relu() if torch.allclose(x, x) else n.a(x)),
}


def _shrunk(y: Tensor, x: Tensor) -> Tensor:
    while x.abs().max() > 1:
        x, y = x / 2, y / 2
    return y


def _checked(y: Tensor) -> Tensor:
    assert torch.isfinite(y).all()
    return y


@pytest.mark.parametrize("name", BRANCHES)
class TestControlFlow:
    def test_it_is_read_on_real_tensors_and_told(self, name: str) -> None:
        net = mlp(BRANCHES[name])
        before = snapshot(net)
        with pytest.warns(UserWarning, match=BY_VALUE) as told:
            groups = find_groups(net, X)
        assert summary(groups) == FREE
        assert len(told) == 1
        assert same_state(snapshot(net), before)

    @pytest.mark.parametrize("of", ["channels", "params", "macs"])
    def test_it_is_cut(self, name: str, of: Any) -> None:
        net = mlp(BRANCHES[name])
        with pytest.warns(UserWarning, match=BY_VALUE):
            record = prune(net, X, pruning_ratio=0.5, of=of)
        assert record.reached >= 0.45
        assert (net.a.out_features, net.b.in_features) in ((4, 4), (3, 3))
        with torch.no_grad():
            assert net(X).shape == (3, 3)


def test_a_branch_on_an_input_that_is_no_float_needs_no_values() -> None:
    net = Net(lambda n, x, m: n.b(n.a(x)) if m.any() else n.a(x), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    assert summary(find_groups(net, (X, torch.tensor([True, False])))) == FREE
    assert summary(find_groups(net, (X, torch.tensor([False, False])))) == {"a": OUT}


def test_both_branches_hold_what_each_was_read_with() -> None:
    net = Net(
        lambda n, x: n.b(n.a(x)) if x.mean() > 0 else n.d(n.c(x)),
        **{"a": nn.Linear(4, 8), "b": nn.Linear(8, 3), "c": nn.Linear(4, 6), "d": nn.Linear(6, 3)},
    )
    for example, expected in ((X.abs(), FREE), (-X.abs(), {"c": 6, "d": OUT})):
        with pytest.warns(UserWarning, match=BY_VALUE):
            groups = find_groups(net, example)
        assert summary(groups) == expected
        prove(net, example, groups)


SIZES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, int | str]]] = {
    "images of two sizes": (
        lambda: Net(
            lambda n, x: n.b(n.a(x).mean((2, 3)) + n.a(F.avg_pool2d(x, 2)).mean((2, 3))),
            **{"a": nn.Conv2d(3, 8, 1), "b": nn.Linear(8, 3)},
        ),
        IMAGES,
        FREE,
    ),
    "images and vectors": (
        lambda: Net(
            lambda n, x: n.b(n.norm(n.a(x)).mean((2, 3)) + n.norm(n.a(x[..., :1, :1])).flatten(1)),
            **{"a": nn.Conv2d(3, 8, 1), "norm": nn.BatchNorm2d(8), "b": nn.Linear(8, 3)},
        ),
        IMAGES,
        FREE,
    ),
    "tokens and their mean": (
        lambda: Net(lambda n, x: n.b(n.a(x).mean(1) + n.a(x.mean(1))), **{"a": nn.Linear(8, 8), "b": nn.Linear(8, 3)}),
        IMAGES[:, 0],
        FREE,
    ),
    "a pyramid with one head": (
        lambda: Net(
            lambda n, x: [n.head(n.mix(y).relu()) for y in (n.a(x), n.down(n.a(x)))],
            **{"a": nn.Conv2d(3, 8, 1), "down": nn.Conv2d(8, 8, 3, stride=2)},
            **{"mix": nn.Conv2d(8, 6, 1), "head": nn.Conv2d(6, 5, 1)},
        ),
        IMAGES,
        {"a": 8, "mix": 6, "head": OUT},
    ),
    "batches of two sizes": (
        lambda: Net(lambda n, x: n.b(n.a(x) + n.a(x[:1])), a=nn.Linear(4, 8), b=nn.Linear(8, 3)),
        X,
        FREE,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_module_that_is_called_twice_with_other_sizes(name: str) -> None:
    build, example, expected = SIZES[name]
    net = build()
    groups = find_groups(net, example)
    assert summary(groups) == expected
    prove(net, example, groups)
    before = [result.shape for result in outputs(net, example)]
    assert prune(net, example, pruning_ratio=0.5).reached == 0.5
    assert [result.shape for result in outputs(net, example)] == before


class TestDeviceAndDtype:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.complex64])
    def test_an_example_of_another_dtype_is_an_error_that_says_so(self, dtype: torch.dtype) -> None:
        net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1))
        before = snapshot(net)
        for call in (find_groups, lambda model, x: prune(model, x, pruning_ratio=0.5)):
            with pytest.raises(TraceError, match=r"fails on `example_inputs`: .*Pass inputs of the shape and dtype"):
                call(net, IMAGES.to(dtype))
        assert same_state(snapshot(net), before)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_an_example_of_another_dtype_works_where_shapes_alone_tell(self, dtype: torch.dtype) -> None:
        net = mlp()
        assert summary(find_groups(net, X.to(dtype))) == FREE
        prune(net, X.to(dtype), pruning_ratio=0.5)
        assert net(X).dtype == torch.float32

    def test_an_example_of_another_dtype_works_where_the_model_casts_it(self) -> None:
        net = mlp(lambda n, x: n.b(n.a(x.float()).relu()))
        assert summary(find_groups(net, X.double())) == FREE

    @pytest.mark.parametrize(("of_model", "of_example"), [("cpu", "meta"), ("meta", "cpu"), ("meta", "meta")])
    def test_an_example_on_another_device_works(self, of_model: str, of_example: str) -> None:
        assert summary(find_groups(mlp().to(of_model), X.to(of_example))) == FREE

    def test_an_example_on_another_device_is_not_moved(self) -> None:
        example = X.to("meta")
        prune(mlp(), example, pruning_ratio=0.5)
        assert example.is_meta

    def test_values_cannot_be_read_from_an_example_without_memory(self) -> None:
        with pytest.raises(TraceError, match=r"fails on `example_inputs`.*Pass inputs"):
            find_groups(mlp(BRANCHES["if"]), X.to("meta"))

    @pytest.mark.parametrize("shape", [(3, 5), (4,), (3, 4, 4, 4), (0, 4), (1, 4)], ids=str)
    def test_an_example_of_another_shape(self, shape: tuple[int, ...], capfd: pytest.CaptureFixture[str]) -> None:
        net = mlp()
        if shape[-1] == 4:
            assert summary(find_groups(net, torch.zeros(shape))) == FREE
        else:
            with pytest.raises(TraceError, match=r"cannot be multiplied \(3x5 and 4x8\)\. Pass inputs of the shape"):
                find_groups(net, torch.zeros(shape))
        assert capfd.readouterr() == ("", "")


def _put(held: Any, run: Callable[[Any], object]) -> Any:
    run(held)
    return held


HELD: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a number": (lambda: 0, lambda held: held + 1),
    "a list": (list, lambda held: _put(held, lambda one: one.append(1))),
    "a dict": (lambda: {"n": 0}, lambda held: _put(held, lambda one: one.update(n=one["n"] + 1))),
    "a set": (lambda: {0}, lambda held: _put(held, lambda one: one.add(len(one)))),
    "a list in a dict": (lambda: {"n": []}, lambda held: _put(held, lambda one: one["n"].append(1))),
    "a list in a list": (lambda: [[0]], lambda held: _put(held, lambda one: one[0].append(1))),
    "a list in a tuple": (lambda: ([0], 1), lambda held: _put(held, lambda one: one[0].append(1))),
    "a deque": (lambda: deque([0], maxlen=2), lambda held: _put(held, lambda one: one.append(1))),
    "an ordered dict": (OrderedDict, lambda held: _put(held, lambda one: one.update({len(one): 1}))),
    "a dict of defaults": (lambda: defaultdict(list), lambda held: _put(held, lambda one: one["n"].append(1))),
    "a counter": (Counter, lambda held: _put(held, lambda one: one.update("a"))),
    "a tensor that is written to": (lambda: torch.zeros(8), lambda held: held.add_(1)),
    "a tensor that is replaced": (lambda: torch.zeros(8), lambda held: held + 1),
    "a list of tensors": (lambda: [torch.zeros(8)], lambda held: _put(held, lambda one: one[0].add_(1))),
}


@pytest.mark.parametrize("place", ["held", "_held"])
@pytest.mark.parametrize("name", HELD)
def test_what_forward_changes_is_restored(name: str, place: str) -> None:
    make, change = HELD[name]

    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.inner = nn.Linear(4, 8), nn.Linear(8, 3), nn.Identity()
            setattr(self.inner, place, make())

        def forward(self, x: Tensor) -> Tensor:
            setattr(self.inner, place, change(getattr(self.inner, place)))
            return self.b(self.a(x))

    net = Changing()
    held, before = getattr(net.inner, place), snapshot(net)
    value = pickle.dumps(held)
    assert summary(find_groups(net, X)) == FREE
    assert same_state(snapshot(net), before)
    prune(net, X, pruning_ratio=0.5)
    assert getattr(net.inner, place) is held
    assert pickle.dumps(held) == value


def test_attributes_that_forward_deletes_or_adds_are_restored() -> None:
    def change(n: Net, x: Tensor) -> Tensor:
        n.a.__dict__.pop("there")
        n.a.new, n.a.bias = x, None
        return n.b(n.a(x))

    net = mlp(change)
    net.a.there = (1, 2)
    before, bias = snapshot(net), net.a.bias
    prune(net, X, pruning_ratio=0.5)
    assert (net.a.there, net.a.bias is bias, hasattr(net.a, "new")) == ((1, 2), True, False)
    assert before["a: kind"] == snapshot(net)["a: kind"]


class Buffered(nn.Module):
    """A running mean, written in place and anew, a step counter, and a parameter that forward itself normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("square", torch.zeros(8))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.a.weight.div_(self.a.weight.norm())
        y = self.a(x)
        self.mean.mul_(0.9).add_(y.mean(0), alpha=0.1)
        self.square = self.square + y.square().mean(0)
        self.steps += 1
        self.last = y
        return self.b((y - self.mean) / (1 + self.square))


def test_buffers_that_forward_writes_are_restored_and_cut() -> None:
    net = randomise(Buffered())
    before, tensors = snapshot(net), [*net.parameters(), *net.buffers()]
    assert summary(find_groups(net, X)) == FREE
    assert same_state(snapshot(net), before)
    dense = copy.deepcopy(net)
    kept = list(prune(net, X, pruning_ratio=0.5).kept["mean"][0])
    assert all(now is then for now, then in zip([*net.parameters(), *net.buffers()], tensors, strict=True))
    assert torch.equal(net.mean, dense.mean[kept])
    assert torch.equal(net.square, dense.square[kept])
    assert (net.steps.item(), net.last) == (0, None)


class TestModels:
    @pytest.mark.parametrize("result", [None, 3, "text", [], {}, (), range(3)], ids=repr)
    def test_one_that_returns_no_tensor(self, result: object) -> None:
        net = mlp(lambda n, x: (n.a(x), result)[1])
        before = snapshot(net)
        with pytest.raises(TraceError, match=r"returned no tensor; wrap it so that it returns what it computes\.$"):
            prune(net, X, pruning_ratio=0.5)
        assert same_state(snapshot(net), before)

    @pytest.mark.parametrize("model", [nn.Sequential(), nn.Identity(), nn.ReLU(), nn.MaxPool1d(2)], ids=str)
    def test_one_without_parameters(self, model: nn.Module) -> None:
        assert find_groups(model, X) == ()
        name = type(model).__name__
        with pytest.raises(
            ValueError, match=rf"finds nothing to prune in {name}: .*Choose another criterion, or loosen"
        ):
            prune(model, X, pruning_ratio=0.5)
        assert history_of(model) == ()

    @pytest.mark.parametrize("model", [nn.Module(), nn.ModuleList([nn.Linear(4, 3)]), nn.ModuleDict()], ids=str)
    def test_one_without_a_forward(self, model: nn.Module) -> None:
        with pytest.raises(
            TraceError, match=rf"forward of {type(model).__name__} fails.*missing the required.*forward"
        ):
            find_groups(model, X)

    @pytest.mark.parametrize(
        "error", [ValueError("as planned"), ZeroDivisionError("as planned"), KeyError("as planned")]
    )
    def test_one_whose_forward_raises(self, error: Exception) -> None:
        def fail(n: Net, x: Tensor) -> Tensor:
            raise error

        net = mlp(fail)
        before = snapshot(net)
        kind = type(error).__name__
        with pytest.raises(
            TraceError, match=rf"forward of Net fails on `example_inputs`: {kind}: .*as planned"
        ) as caught:
            prune(net, X, pruning_ratio=0.5)
        assert isinstance(caught.value, PruningError)
        assert caught.value.__cause__ is error
        assert same_state(snapshot(net), before)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
    def test_one_that_is_interrupted(self, error: type[BaseException]) -> None:
        def fail(n: Net, x: Tensor) -> Tensor:
            n.b(n.a(x))
            raise error

        net = mlp(fail)
        before = snapshot(net)
        with pytest.raises(error):
            find_groups(net, X)
        assert same_state(snapshot(net), before)
        assert torch.zeros(1).device.type == "cpu"

    def test_one_whose_layers_are_not_made_yet(self) -> None:
        with pytest.raises(TraceError, match=r"[Ll]azy|uninitialized|run it once|once"):
            find_groups(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)), X)

    def test_one_whose_layers_have_just_been_made(self) -> None:
        net = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3))
        net(X)
        assert summary(find_groups(net, X)) == {"0": 8, "1": OUT}

    @pytest.mark.filterwarnings("ignore:`torch.jit")
    @pytest.mark.parametrize("script", [torch.jit.script, lambda net: torch.jit.trace(net, X)], ids=["script", "trace"])
    def test_one_that_is_a_script_is_refused_and_stays_whole(self, script: Callable[[nn.Module], nn.Module]) -> None:
        net = script(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)))
        before, result = {name: value.clone() for name, value in net.state_dict().items()}, net(X)
        with pytest.raises((PruningError, TypeError), match=r"Script"):
            find_groups(net, X)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert torch.equal(net(X), result)

    @pytest.mark.parametrize("model", [None, "resnet", mlp().forward, {"a": nn.Linear(4, 3)}, nn.Linear], ids=type)
    @pytest.mark.parametrize("call", [find_groups, lambda m, x: prune(m, x, pruning_ratio=0.5)], ids=["find", "prune"])
    def test_one_that_is_none(self, model: object, call: Callable[[Any, Tensor], object]) -> None:
        with pytest.raises(TypeError, match=r"`model` is .*; got .*\.$"):
            call(model, X)


class TestArguments:
    @pytest.mark.parametrize("heads", ["all", "WHOLE", "", None, 2])
    def test_heads(self, heads: Any) -> None:
        for call in (
            lambda: find_groups(mlp(), X, heads=heads),
            lambda: prune(mlp(), X, pruning_ratio=0.5, heads=heads),
        ):
            with pytest.raises(ValueError, match=r"^`heads` says .*'whole', 'inside', 'keep'; got .*\.$"):
                call()

    @pytest.mark.parametrize("pattern", ["", "c", "A", "a.weight", ".*", "0"])
    def test_a_pattern_without_a_match(self, pattern: str) -> None:
        for call in (
            lambda: find_groups(mlp(), X, ignore=[pattern]),
            lambda: prune(mlp(), X, pruning_ratio=0.5, ignore=[pattern]),
        ):
            with pytest.raises(ValueError, match=r"^`ignore` pattern '.*' matches no module\..*for example a, b\.$"):
                call()

    @pytest.mark.parametrize("ignore", ["a", None, 3, [nn.Linear], [None], nn.Linear(2, 2)], ids=repr)
    def test_patterns_of_another_kind(self, ignore: Any) -> None:
        with pytest.raises(TypeError, match=r"^`ignore` is a sequence of patterns.*; got "):
            find_groups(mlp(), X, ignore=ignore)

    @pytest.mark.parametrize(
        "example", [None, (), [], {}, "x", 3, X.numpy(), [[1.0, 2.0]], iter([X]), range(3), {"x": None}], ids=type
    )
    def test_inputs_without_a_tensor(self, example: object) -> None:
        for call in (lambda: find_groups(mlp(), example), lambda: prune(mlp(), example, pruning_ratio=0.5)):
            with pytest.raises(TypeError, match=r"`example_inputs` is what the model's forward is called with"):
                call()

    @pytest.mark.parametrize("example", [X, (X,), {"input1": X}, {"input1": X, "wrong": X}])
    def test_an_input_too_few(self, example: object) -> None:
        with pytest.raises(TraceError, match=r"missing 1 required positional argument: 'input2'\. Pass inputs"):
            find_groups(nn.Bilinear(4, 4, 3), example)

    @pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
    def test_a_ratio_that_is_none(self, ratio: float) -> None:
        with pytest.raises(ValueError, match=r"`pruning_ratio` is the fraction of .*For 40 % pass 0\.4\.$"):
            prune(mlp(), X, pruning_ratio=ratio)


STRANGE: dict[str, Tensor] = {
    "nan": X * float("nan"),
    "infinite": X / 0,
    "with a gradient": X.clone().requires_grad_(),
    "not contiguous": torch.randn(4, 3).T,
    "expanded": torch.randn(1, 4).expand(3, 4),
    "a parameter": nn.Parameter(X.clone()),
    "of inference mode": torch.inference_mode()(lambda: X.clone())(),
    "an empty batch": X[:0],
    "sparse": X.to_sparse(),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_tensors_are_as_good_as_others(name: str) -> None:
    net = mlp()
    assert summary(find_groups(net, STRANGE[name])) == FREE
    assert prune(net, STRANGE[name], pruning_ratio=0.5).reached == 0.5


def test_cutting_what_was_computed_with_is_exact_after_all_this() -> None:
    net = randomise(mlp(lambda n, x: n.b(n.a(x).tanh())).double())
    dense = copy.deepcopy(net)
    kept = list(prune(net, X.double(), pruning_ratio=0.5).kept["b.weight"][1])
    dense.b.weight.data[:, [channel for channel in range(8) if channel not in kept]] = 0
    assert relative_error(outputs(net, X.double()), outputs(dense, X.double())) < 1e-12
