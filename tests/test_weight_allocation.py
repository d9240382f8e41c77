"""Weight allocation: densities and thresholds computed by hand, exact totals, and what is refused."""

from __future__ import annotations

from math import erf, floor, inf, nan, prod, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.allocation import DenseLayer, Global, MaskedLayer, Uniform, WeightAllocation
from lightning_prune.masks.allocations import (
    ERK,
    LAMP,
    PerLayer,
    StdThreshold,
    deviation,
    erk_densities,
    lamp_scores,
)

LENET = {"fc1.weight": (300, 784), "fc2.weight": (100, 300), "fc3.weight": (10, 100)}


def layer(weight: Tensor, pruned: int = 0, dense: tuple[int, ...] | None = None) -> MaskedLayer:
    """Know a layer of single weights, the first of which are pruned."""
    scores = weight.abs().flatten()
    scores[:pruned] = -1
    shape = dense or tuple(weight.shape)
    return MaskedLayer(scores, weight, DenseLayer(shape, deviation(weight)), prod(shape))


def layers(**weights: list[float]) -> dict[str, MaskedLayer]:
    return {f"{name}.weight": layer(torch.tensor(values)) for name, values in weights.items()}


class TestUniformAndGlobal:
    def test_every_layer_keeps_the_same_fraction(self) -> None:
        assert Uniform().kept(layers(a=[1.0] * 10, b=[9.0] * 4), 0.75) == {"a.weight": 2, "b.weight": 1}

    def test_the_lowest_of_all_go(self) -> None:
        assert Global().kept(layers(a=[1.0, 2, 5], b=[3.0, 4]), 0.4) == {"a.weight": 1, "b.weight": 2}

    def test_of_equal_weights_those_of_the_first_layer_go(self) -> None:
        assert Global().kept(layers(a=[1.0] * 3, b=[1.0] * 5), 0.5) == {"a.weight": 1, "b.weight": 3}

    def test_no_layer_loses_its_last_weight(self) -> None:
        assert Global().kept(layers(a=[0.1, 0.2], b=[3.0, 4, 5, 6]), 0.5) == {"a.weight": 1, "b.weight": 2}
        assert Uniform().kept(layers(a=[1.0] * 3), 0.9) == {"a.weight": 1}

    def test_the_cap_holds(self) -> None:
        assert Global(cap=0.5).kept(layers(a=[0.1] * 4, b=[3.0] * 4), 0.5) == {"a.weight": 2, "b.weight": 2}
        assert Uniform(cap=0.5).kept(layers(a=[1.0] * 4), 0.75) == {"a.weight": 2}

    @pytest.mark.parametrize("kind", [Uniform, Global])
    def test_the_ratio_counts_against_the_dense_weights(self, kind: type[WeightAllocation]) -> None:
        assert kind().kept({"a.weight": layer(torch.ones(6), dense=(10,))}, 0.5) == {"a.weight": 5}  # type: ignore[call-arg]
        assert kind().kept({"a.weight": layer(torch.ones(6), dense=(10,))}, 0.3) == {"a.weight": 6}  # type: ignore[call-arg]


class TestLAMP:
    def test_scores_by_hand(self) -> None:
        assert torch.allclose(lamp_scores(torch.tensor([3.0, 1, 2])), torch.tensor([1 / 14, 4 / 13, 1]))
        assert torch.allclose(lamp_scores(torch.tensor([[2.0, 2], [2, 2]])), torch.tensor([1 / 4, 1 / 3, 1 / 2, 1]))
        assert lamp_scores(torch.tensor([-1.0, 4, -1])).tolist() == [-1, -1, 1]
        assert lamp_scores(torch.zeros(3)).tolist() == [0, 0, 0]
        assert lamp_scores(torch.tensor([-1.0, -1])).tolist() == [-1, -1]

    def test_a_layer_of_tiny_or_huge_weights_scores_as_any_other(self) -> None:
        weights = torch.tensor([3.0, 1, 2], dtype=torch.float64)
        for scale in (1e-30, 1e30):
            assert torch.allclose(lamp_scores((weights * scale).float()), lamp_scores(weights).float())
        assert torch.allclose(lamp_scores(weights.bfloat16()), lamp_scores(weights).float())

    def test_pieces_make_no_difference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weights = torch.rand(50, dtype=torch.float64)
        whole = lamp_scores(weights)
        monkeypatch.setattr("lightning_prune.masks.allocations._PIECE", 7)
        assert torch.allclose(lamp_scores(weights), whole, rtol=1e-14)

    def test_the_scale_of_a_layer_does_not_count(self) -> None:
        one, other = layers(a=[1.0, 2, 3, 4], b=[5.0, 6, 7, 8]), layers(a=[1.0, 2, 3, 4], b=[500.0, 600, 700, 800])
        assert LAMP().kept(one, 0.5) == LAMP().kept(other, 0.5)

    def test_by_hand(self) -> None:
        # a: 1/30, 4/29, 9/25, 1; b: 1/4, 1/3, 1/2, 1
        assert LAMP().kept(layers(a=[1.0, 2, 3, 4], b=[1.0, 1, 1, 1]), 0.5) == {"a.weight": 2, "b.weight": 2}
        assert LAMP().kept(layers(a=[1.0, 2, 3, 4], b=[1.0, 1, 1, 1]), 0.25) == {"a.weight": 2, "b.weight": 4}

    def test_the_largest_weight_of_a_layer_goes_last(self) -> None:
        assert LAMP().kept(layers(a=[1e-6, 2e-6], b=[1.0, 2, 3, 4]), 0.65) == {"a.weight": 1, "b.weight": 1}


class TestERK:
    def test_densities_of_lenet_300_100(self) -> None:
        sizes = {name: prod(shape) for name, shape in LENET.items()}
        densities = erk_densities(LENET, sizes, 26620)
        assert [round(density, 4) for density in densities.values()] == [0.0796, 0.2302, 1.0]

    def test_the_total_is_exact(self) -> None:
        known = {name: layer(torch.ones(shape)) for name, shape in LENET.items()}
        kept = ERK().kept(known, 0.9)
        assert sum(kept.values()) == 26620
        assert kept == {"fc1.weight": 18714, "fc2.weight": 6906, "fc3.weight": 1000}

    def test_kernels_count(self) -> None:
        known = {"a.weight": layer(torch.ones(8, 8, 3, 3)), "b.weight": layer(torch.ones(8, 8, 1, 1))}
        # density = eps * 22 / 576 and eps * 18 / 64: 40 eps = 320, which makes b dense; then 22 eps = 256
        assert ERK().kept(known, 0.5) == {"a.weight": 256, "b.weight": 64}
        # 40 eps = 64
        assert ERK().kept(known, 0.9) == {"a.weight": 35, "b.weight": 29}

    def test_nothing_asked_keeps_all(self) -> None:
        known = {name: layer(torch.ones(shape)) for name, shape in LENET.items()}
        assert ERK().kept(known, 0.0) == {name: prod(shape) for name, shape in LENET.items()}

    def test_the_dense_shape_gives_the_density(self) -> None:
        known = {
            "a.weight": layer(torch.ones(4, 50), dense=(8, 50)),
            "b.weight": layer(torch.ones(8, 50)),
        }
        assert ERK().kept(known, 0.75) == {"a.weight": 100, "b.weight": 100}

    @given(
        st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=4), min_size=1, max_size=6),
        st.floats(0, 0.999),
    )
    def test_totals_are_exact_and_no_layer_is_overfull_or_empty(self, shapes: list[list[int]], ratio: float) -> None:
        known = {f"l{place}.weight": layer(torch.ones(shape)) for place, shape in enumerate(shapes)}
        kept = ERK().kept(known, ratio)
        size = sum(map(prod, shapes))
        asked = size - floor(ratio * size + 0.5)
        assert all(1 <= kept[name] <= prod(shape) for name, shape in zip(known, shapes, strict=True))
        assert asked <= sum(kept.values()) <= asked + len(shapes)
        if all(count > 1 for count in kept.values()):
            assert sum(kept.values()) == asked


class TestStdThreshold:
    @pytest.mark.parametrize("q", [0.25, 0.5, 1.0, 1.5, 2.0])
    def test_of_normal_weights_erf_of_q_goes(self, q: float) -> None:
        size = 400_000
        kept = StdThreshold(q).kept({"a.weight": layer(torch.randn(size) * 0.05)}, 0.0)["a.weight"]
        assert 1 - kept / size == pytest.approx(erf(q / sqrt(2)), abs=4e-3)

    def test_by_hand(self) -> None:
        # the deviation of 1, -1, 3, -3 is sqrt 5 = 2.236
        assert StdThreshold(1.0).kept(layers(a=[1.0, -1, 3, -3]), 0.9) == {"a.weight": 2}
        assert StdThreshold(0.4).kept(layers(a=[1.0, -1, 3, -3]), 0.9) == {"a.weight": 4}

    def test_a_weight_on_the_threshold_goes(self) -> None:
        assert StdThreshold(1.0).kept(layers(a=[1.0, -1, 1, -1]), 0.0) == {"a.weight": 1}

    def test_whose_deviation(self) -> None:
        weight = torch.tensor([0.0, 0.0, 3.0, -3.0, 6.0, -6.0])
        known = {"a.weight": MaskedLayer(weight.abs(), weight, DenseLayer((6,), 5.0), 6)}
        assert deviation(weight) == pytest.approx(sqrt(15))
        assert StdThreshold(1.0, of="dense").kept(known, 0.0) == {"a.weight": 2}  # 5
        assert StdThreshold(0.75, of="current").kept(known, 0.0) == {"a.weight": 4}  # 0.75 * 3.87 = 2.9
        assert StdThreshold(0.75, of="nonzero").kept(known, 0.0) == {"a.weight": 2}  # 0.75 * 4.74 = 3.6

    def test_multiples_by_pattern_the_first_that_matches_holds(self) -> None:
        rule = StdThreshold({"conv1": 0.4, "conv*": 1.0})
        known = layers(conv1=[1.0, -1, 3, -3], conv2=[1.0, -1, 3, -3], fc=[1.0, -1, 3, -3])
        assert rule.kept(known, 0.0) == {"conv1.weight": 4, "conv2.weight": 2, "fc.weight": 4}

    def test_a_pattern_without_a_layer_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"Pattern 'head\*' of StdThreshold.* matches no layer.* These are a\."):
            StdThreshold({"a": 1.0, "head*": 1.0}).kept(layers(a=[1.0]), 0.0)

    @pytest.mark.parametrize("q", [0, -1.0, inf, nan, {"a": 1.0, "b": 0.0}])
    def test_multiples_are_above_zero(self, q: float | dict[str, float]) -> None:
        with pytest.raises(ValueError, match="`q` is the threshold in standard deviations, above 0; got"):
            StdThreshold(q)

    def test_other_deviations_are_refused(self) -> None:
        with pytest.raises(ValueError, match="got 'all'"):
            StdThreshold(1.0, of="all")  # type: ignore[arg-type]

    def test_a_forgotten_deviation_is_an_error(self) -> None:
        known = {"a.weight": MaskedLayer(torch.ones(2), torch.ones(2), DenseLayer((2,)), 2)}
        with pytest.raises(ValueError, match=r"dense weights of 'a\.weight' is not known any more.*`dense_layers`"):
            StdThreshold(1.0).kept(known, 0.0)

    def test_the_deviation_of_half_precision_is_that_of_its_values(self) -> None:
        weight = torch.randn(10_000).bfloat16()
        assert deviation(weight) == pytest.approx(float(weight.double().std(correction=0)), rel=1e-5)
        assert deviation(torch.empty(0)) == 0


class TestPerLayer:
    def test_each_its_own(self) -> None:
        known = layers(a=[1.0] * 10, b=[1.0] * 10, c=[1.0] * 10)
        assert PerLayer({"a": 0.9, "b": 0.26}).kept(known, 0.5) == {"a.weight": 1, "b.weight": 7, "c.weight": 10}

    def test_ratios_count_against_the_dense_weights(self) -> None:
        assert PerLayer({"*": 0.5}).kept({"a.weight": layer(torch.ones(6), dense=(10,))}, 0.0) == {"a.weight": 5}

    def test_what_is_no_ratio_is_refused(self) -> None:
        for ratio in (1.0, -0.1, nan):
            with pytest.raises(ValueError, match=r"in \[0, 1\); got .* for 'a'"):
                PerLayer({"a": ratio})
        with pytest.raises(ValueError, match="`ratios` is empty"):
            PerLayer({})

    def test_a_pattern_without_a_layer_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"Pattern 'z' of PerLayer\(\{'z': 0.5\}\) matches no layer"):
            PerLayer({"z": 0.5}).kept(layers(a=[1.0]), 0.0)


@pytest.mark.parametrize("rule", [LAMP(), ERK(), StdThreshold(1.0), PerLayer({"*": 0.5})], ids=repr)
def test_rules_for_weights_are_refused_for_channels(rule: WeightAllocation) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(TypeError, match=r"shares weights out, not channels\. Use Uniform\(\) or Global\(\)"):
        prune(net, torch.zeros(1, 4), pruning_ratio=0.5, allocation=rule)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rule", [Uniform(), Global(), LAMP(), ERK(), StdThreshold(1.0), PerLayer({"*": 0.5})], ids=repr
)
def test_what_is_pruned_is_never_needed_to_keep_a_layer_alive(rule: WeightAllocation) -> None:
    known = {"a.weight": layer(torch.ones(8), pruned=8), "b.weight": layer(torch.ones(8))}
    kept = rule.kept(known, 0.5)
    if isinstance(rule, (Global, LAMP)):
        assert kept == {"a.weight": 0, "b.weight": 8}
    assert kept["b.weight"] >= 1
