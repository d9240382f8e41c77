"""The sensitivity scan: numbers worked out by hand, a model left as it was, wrong arguments."""

from __future__ import annotations

import copy
import random
from math import exp, log
from typing import Any

import numpy as np
import pytest
import torch
from scans import assert_same, conv_net, images, linear, snapshot, two_batches, two_layers, values
from test_lessons import TOKENS, Net
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune import prune
from lightning_prune.criteria import Random
from lightning_prune.errors import NothingToPruneError, PruningError, ScoreError
from lightning_prune.masks.magnitude import magnitude_masks
from lightning_prune.sensitivity import Sensitivity, sensitivity


class TestNumbers:
    def test_one_layer_bears_it_and_another_is_ruined(self) -> None:
        scan = sensitivity(two_layers(), two_batches(), (0.5, 0.75))
        assert [(row.layer, row.size) for row in scan.rows] == [("0", 8), ("1", 4)]
        # the weight 1.0 of the second layer goes at 3 of 4: what belongs to class 0 ties, and argmax takes the first
        assert values(scan) == {"0": (1.0, 1.0), "1": (1.0, 1.0)}
        tied = log(1 + 1)
        kept = [log(1 + exp(-2)), log(1 + exp(-6))]
        assert scan.dense == {"accuracy": 1.0, "loss": pytest.approx((2 * kept[0] + kept[1]) / 3)}
        # three of the first layer's four zeros and all its 0.1 go at 6 of 8
        assert values(scan, "loss")["0"] == pytest.approx((scan.dense["loss"],) * 2)
        assert values(scan, "loss")["1"] == pytest.approx((scan.dense["loss"], (2 * tied + kept[1]) / 3))

    def test_a_layer_whose_loss_changes_the_answers(self) -> None:
        net = nn.Sequential(linear([[1.0, 0.0], [0.0, 1.0]]), linear([[0.0, 1.0], [0.5, 0.0]]))
        data = [(torch.tensor([[1.0, 0.0], [1.0, 0.1]]), torch.tensor([1, 1]))]
        scan = sensitivity(net, data, (0.5, 0.75))
        assert values(scan) == {"0": (1.0, 0.0), "1": (1.0, 0.0)}

    def test_the_masks_are_those_of_magnitude_masks(self) -> None:
        net, data = conv_net(), images()
        pruned = copy.deepcopy(net)
        masks = magnitude_masks(net, 0.3)
        pruned[5].weight.data.mul_(masks["5.weight"])
        with torch.no_grad():
            loss = nn.functional.cross_entropy(pruned.eval()(data[0][0].clone()), data[0][1])
        assert values(sensitivity(net, data, (0.3,)), "loss")["5"][0] == pytest.approx(float(loss), rel=1e-6)

    def test_channels_are_cut_as_prune_cuts_them(self) -> None:
        net, data = conv_net(), images()
        net.eval()
        net[1].bias.data.normal_()
        scan = sensitivity(net, data, (0.5,), of="channels")
        assert [(row.layer, row.size) for row in scan.rows] == [("0", 6), ("5", 8)]
        assert scan.held_back == {"7": "frozen: reaches the model's output"}
        for layer, ignore in (("0", "5"), ("5", "0")):
            pruned = copy.deepcopy(net)
            prune(pruned, data[0][0], pruning_ratio=0.5, ignore=[ignore] if ignore == "0" else ["7"])
            with torch.no_grad():
                loss = nn.functional.cross_entropy(pruned.eval()(data[0][0].clone()), data[0][1])
            assert values(scan, "loss")[layer][0] == pytest.approx(float(loss), rel=1e-6)

    def test_groups_in_step_are_cut_together_and_refused_ones_are_told(self) -> None:
        net, data = Net(), [(TOKENS, torch.tensor([0, 1]))]
        scan = sensitivity(net, data, (0.05, 0.6), of="channels")
        assert "in step with blocks.0.qkv" in scan.held_back["embed"]
        assert "the cut was refused: the cut model fails in aten.view" in scan.held_back["blocks.1.qkv"]
        pruned = copy.deepcopy(net)
        prune(pruned, TOKENS, pruning_ratio=0.6)
        with torch.no_grad():
            loss = float(nn.functional.cross_entropy(pruned(TOKENS), data[0][1]))
        assert values(scan, "loss") == {
            "embed": (scan.dense["loss"], pytest.approx(loss, rel=1e-5)),
            "blocks.0.qkv": (scan.dense["loss"], pytest.approx(loss, rel=1e-5)),
            "blocks.1.qkv": (scan.dense["loss"], None),
        }

    def test_never_the_last_channel(self) -> None:
        net = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
        assert len(values(sensitivity(net, [(torch.randn(4, 4), torch.arange(4) % 3)], (0.9,), of="channels"))) == 1

    def test_recurrent_layers_are_one_layer(self) -> None:
        class Last(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.head(self.rnn(x)[0][:, -1])
                return out

        net, data = Last(), [(torch.randn(4, 6, 3), torch.tensor([0, 1, 0, 1]))]
        scan = sensitivity(net, data, (0.5, 0.95))
        assert [(row.layer, row.size) for row in scan.rows] == [("rnn", 160), ("head", 10)]
        assert values(scan, "loss")["rnn"][1] != pytest.approx(scan.dense["loss"], rel=1e-6)
        with torch.no_grad():
            assert scan.dense["loss"] == pytest.approx(float(nn.functional.cross_entropy(net(data[0][0]), data[0][1])))

    def test_targets_of_minus_100_do_not_count(self) -> None:
        data = [(inputs, targets.clone()) for inputs, targets in two_batches()]
        data[0][1][1] = -100
        assert sensitivity(two_layers(), data, (0.5,)).dense["loss"] == pytest.approx(log(1 + exp(-2)))

    def test_it_prunes_what_the_criterion_says(self) -> None:
        data = images()
        by_lot = sensitivity(conv_net(), data, (0.5,), of="channels", criterion=Random(1))
        assert [row.layer for row in by_lot.rows] == ["0", "5"]

    def test_numbers_that_are_not_finite_are_none(self) -> None:
        def inverse(outputs: Tensor, targets: Tensor) -> float:
            return float(1 / outputs[0, 1].abs())

        net = nn.Sequential(linear([[1.0, 1.0], [1.0, 0.5]]))
        scan = sensitivity(
            net, [(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))], (0.25,), metric=inverse, better="lower"
        )
        assert values(scan, "inverse") == {"0": (None,)}
        assert scan.thresholds() == {"0": 0.0}
        assert Sensitivity.from_json(scan.to_json()) == scan


TICKS = [0]


class Restless(nn.Module):
    """Writes to all it has, draws random numbers, and fails at a call of one's choice."""

    def __init__(self, fail_at: int = 10**9, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.hidden = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.notes: list[int] = []
        self.fail_at, self.error = fail_at, error
        self.seen = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.notes.append(1)
        self.count = 3
        self.layer.weight.data.mul_(0.5)
        x += random.random() + float(np.random.rand())
        TICKS[0] += type(x) is Tensor and not x.is_meta  # readings of the model do not count
        if self.fail_at <= TICKS[0]:
            raise self.error("now")
        out: Tensor = self.layer(self.hidden(x).relu()) + torch.rand(3)
        return out


@pytest.fixture(autouse=True)
def _ticks() -> None:
    TICKS[0] = 0


class TestTheModelStaysAsItWas:
    @pytest.mark.parametrize("of", ["weights", "channels"])
    def test_after_a_scan(self, of: Any) -> None:
        net = conv_net()
        net[3].eval()
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        before, data = snapshot(net), images()
        before.update(torch=torch.get_rng_state())
        copy = data[0][0].clone()
        sensitivity(net, data, (0.3, 0.6), of=of)
        assert_same(net, before)
        assert torch.equal(data[0][0], copy)
        assert all(parameter.grad is not None and parameter.grad.eq(1).all() for parameter in net.parameters())

    @pytest.mark.parametrize("of", ["weights", "channels"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
    def test_after_a_failure(self, of: Any, error: type[BaseException]) -> None:
        net, data = Restless(3, error), [(torch.zeros(2, 4), torch.tensor([0, 1]))]
        before = snapshot(net)
        with pytest.raises(error):
            sensitivity(net, data, (0.3, 0.6), of=of)
        assert_same(net, before)
        assert net.notes == []
        assert not data[0][0].any()

    def test_every_measurement_begins_the_same(self) -> None:
        net, data = Restless(), [(torch.zeros(2, 4), torch.tensor([0, 1]))]
        before = snapshot(net)
        scan = sensitivity(net, data, (0.01,))
        assert values(scan, "loss") == {"layer": (scan.dense["loss"],), "hidden": (scan.dense["loss"],)}
        assert_same(net, before)

    def test_a_failing_metric(self) -> None:
        def bad(outputs: Tensor, targets: Tensor) -> float:
            raise ZeroDivisionError

        net = conv_net()
        data = images()
        before = snapshot(net)
        with pytest.raises(ZeroDivisionError):
            sensitivity(net, data, (0.5,), of="channels", metric=bad, better="higher")
        assert_same(net, before)


class TestRefused:
    @pytest.mark.parametrize(
        "ratios", [(), 0.5, (0.0, 0.5), (0.5, 1.0), (0.5, 0.5), (0.7, 0.3), (-0.1,), ("a",), (float("nan"),), (True,)]
    )
    def test_ratios_that_are_no_grid(self, ratios: Any) -> None:
        with pytest.raises(ValueError, match=r"`ratios` are the fractions to prune, one or more, rising"):
            sensitivity(two_layers(), two_batches(), ratios)

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"of": "heads"}, ValueError, '`of` is what is pruned, "weights" or "channels"; got \'heads\''),
            ({"ignore": ["nothing"]}, ValueError, "`ignore` pattern 'nothing' matches no module"),
            ({"ignore": "0"}, TypeError, "`ignore` is a sequence of patterns; got the string '0'"),
            ({"ignore": ["*"]}, PruningError, "has no weight that a mask can be put on"),
            (
                {"of": "channels", "ignore": ["*"]},
                NothingToPruneError,
                "has no channels to prune: 0: frozen: is ignored",
            ),
            ({"criterion": Random()}, ValueError, '`criterion` is about channels; got Random with of="weights"'),
            ({"batches": 0}, ValueError, "`batches` is how many batches are read, 1 or more; got 0"),
            ({"better": "higher"}, ValueError, "`better` is about `metric`, which is not given"),
            ({"metric": lambda a, b: 1.0}, ValueError, "`better` says which way"),
            ({"metric": max, "better": "max"}, ValueError, "got 'max'"),
            ({"metric": MulticlassAccuracy}, TypeError, "`metric` is a torchmetrics metric, a function"),
            ({"metric": 3}, TypeError, "or the name of a logged number; got 3"),
            ({"metric": "val/acc"}, ValueError, "`trainer` and the name of a logged `metric` go together"),
            ({"trainer": 1}, ValueError, "`trainer` and the name of a logged `metric` go together; got int and None"),
            ({"trainer": 1, "batches": 3}, ValueError, "Set its `limit_val_batches`"),
            ({"metric": lambda a, b: a, "better": "lower"}, TypeError, "`metric` gives one number"),
            ({"metric": lambda a, b: float("nan"), "better": "lower"}, ScoreError, "The model as it is gives"),
        ],
    )
    def test_wrong_arguments(self, arguments: dict[str, Any], error: type[Exception], words: str) -> None:
        with pytest.raises(error) as caught:
            sensitivity(two_layers(), two_batches(), (0.5,), **arguments)
        assert words in str(caught.value)

    def test_no_model(self) -> None:
        with pytest.raises(TypeError, match=r"`model` is a torch.nn.Module; got int"):
            sensitivity(3, two_batches(), (0.5,))  # type: ignore[arg-type]
