"""A look before cutting: costs by hand, a plan that is what a cut would do, and a model that is left alone."""

from __future__ import annotations

from copy import deepcopy
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_prune import prune
from lightning_prune.allocation import Global
from lightning_prune.analysis import analyze
from lightning_prune.criteria import BNScale, Magnitude
from lightning_prune.errors import NothingToPruneError
from lightning_prune.pruner import Request
from lightning_prune.workbench import resnet20

IMAGES = torch.rand(3, 1, 8, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 3)
    )


def test_costs_by_hand() -> None:
    found = analyze(net(), IMAGES)
    assert found.plan is None
    assert (found.params, found.macs) == (60 + 12 + 220 + 195, 6 * 9 * 36 + 4 * 54 * 16 + 3 * 64)
    first, second = found.costs["0"], found.costs["3"]
    assert (first.params, first.macs) == (10 + 2 + 4 * 9, 9 * 36 + 4 * 9 * 16)
    assert (second.params, second.macs) == (55 + 16 * 3, 54 * 16 + 16 * 3)
    assert first.params_share == pytest.approx(5 * first.params / found.params)
    assert second.macs_share == pytest.approx(3 * second.macs / found.macs)
    assert set(found.costs) == {"0", "3"}, "the last group is frozen"


def test_a_batch_costs_what_an_example_costs() -> None:
    assert analyze(net(), IMAGES).costs == analyze(net(), IMAGES[:1]).costs


@pytest.mark.parametrize(
    "settings",
    [
        {"pruning_ratio": 0.5, "of": "macs"},
        {"pruning_ratio": 0.4, "of": "params", "criterion": BNScale(), "allocation": Global()},
        {"pruning_ratio": 0.3, "of": "channels", "ignore": ["conv1"], "criterion": Magnitude(p=1)},
    ],
)
def test_the_plan_is_what_a_cut_does(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = resnet20(1, 4)
    before = deepcopy(model.state_dict())
    found = analyze(model, IMAGES, Request(**settings))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert found.plan == prune(model, IMAGES, **settings)


def test_what_is_shown() -> None:
    console = Console(width=120, record=True, file=StringIO())
    console.print(analyze(net(), IMAGES, Request(0.5)))
    text = console.export_text()
    for word in ("3 channel groups", "reaches the model's output", "A cut would give: asked 50.0% of channels"):
        assert word in text


def test_plain_data_holds_it_all() -> None:
    plain = analyze(net(), IMAGES, Request(0.5)).plain()
    assert [group["name"] for group in plain["groups"]] == ["0", "3", "5"]
    assert plain["groups"][0]["layers"] == ["0", "1", "3"]
    assert plain["groups"][2]["frozen"]
    assert plain["plan"]["widths"] == {"0": 3, "3": 2, "5": 3}


def test_nothing_to_prune_is_told() -> None:
    with pytest.raises(NothingToPruneError):
        analyze(nn.Linear(3, 2), torch.rand(1, 3), Request(0.5))
