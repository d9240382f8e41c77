"""LightningCLI: callbacks can be given in YAML, with arguments of any type, and a fit from YAML is like any other."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from versions import older

if older("lightning", "2.6"):
    pytest.skip("lightning before 2.6 calls what a jsonargparse of today deprecates", allow_module_level=True)

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor, nn

from lightning_prune import Reconstruction, allocation, callbacks, criteria, history_of, masks, schedules
from lightning_prune.allocation import Allocation, ByCost, Global, Isomorphic, WeightAllocation
from lightning_prune.callbacks import PruneCallback, Retraining
from lightning_prune.criteria import Criterion, Fisher, Magnitude
from lightning_prune.masks import NM, Blocks, PerLayer
from lightning_prune.metrics import CumulativeAblationCurve
from lightning_prune.workbench import Digits

WHOLE = [find_spec(name) is not None for name in ("jsonargparse", "docstring_parser", "typeshed_client")]

pytestmark = [
    pytest.mark.skipif(not all(WHOLE), reason="needs jsonargparse[signatures]"),
    pytest.mark.filterwarnings(  # Lightning 2.6 calls what jsonargparse 4.49 deprecates
        r"ignore:[\s\S]*(in v4[.]49[.]0|JsonargparseDeprecationWarning)"
    ),
]

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "lightning_cli.md").read_text(encoding="utf-8")

NAMED = {name: getattr(callbacks, name) for name in callbacks.__all__}
CALLBACKS = {name: each for name, each in NAMED.items() if issubclass(each, pl.Callback)}

REQUIRED: dict[str, dict[str, Any]] = {
    "EWCCallback": {"strength": 1.0},
    "L0PruneCallback": {"pruning_ratio": 0.5},
    "LassoPruneCallback": {"speed_up": 2.0},
    "MaskPruneCallback": {"pruning_ratio": 0.5, "granularity": None},
    "PruneCallback": {"pruning_ratio": 0.5},
}
"""What has no default, or whose defaults say to give one of two."""


def parser() -> LightningArgumentParser:
    made = LightningArgumentParser(exit_on_error=False)
    made.add_lightning_class_args(pl.Trainer, "trainer")
    return made


def read(text: str) -> list[pl.Callback]:
    """Return the callbacks of a config as LightningCLI makes them."""
    made = parser()
    return made.instantiate_classes(made.parse_string(text)).trainer.callbacks  # type: ignore[no-any-return]


def given(name: str, init_args: Mapping[str, Any] | str) -> Any:
    """Return the callback of this name with arguments in YAML."""
    arguments = yaml.safe_load(init_args) if isinstance(init_args, str) else dict(init_args)
    one = {"class_path": f"lightning_prune.callbacks.{name}", "init_args": arguments}
    (callback,) = read(yaml.safe_dump({"trainer": {"callbacks": [one]}}))
    return callback


def refusal() -> type[Exception]:
    """Return jsonargparse's error, which is there where jsonargparse is."""
    return pytest.importorskip("jsonargparse").ArgumentError  # type: ignore[no-any-return]


def defaults(callback: type) -> dict[str, Any]:
    """Return the default of each argument, those that `**arguments` hands on included."""
    parameters = inspect.signature(callback).parameters.values()
    found = {each.name: each.default for each in parameters if each.default is not each.empty}
    hands_on = any(each.kind is each.VAR_KEYWORD for each in parameters)
    return {**(defaults(callback.__base__) if hands_on and callback.__base__ else {}), **found}


def in_yaml(value: Any) -> Any:
    """Return a default as it is written in YAML."""
    if callable(value):
        module = "torch" if value.__module__ is None or value.__module__.startswith("torch") else value.__module__
        return f"{module}.{value.__name__}"
    return list(value) if isinstance(value, tuple) else value


def told(value: Any, depth: int = 6) -> Any:
    """Return what an object consists of, so that two of them can be compared; sequences are lists."""
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {repr(key): told(each, depth - 1) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [told(each, depth - 1) for each in value]
    if callable(value) and hasattr(value, "__name__"):
        return ("function", value.__name__)
    parts = vars(value) if depth and hasattr(value, "__dict__") else {}
    if isinstance(value, nn.Module):  # the rest is torch's and torchmetrics' own
        parts = {name: each for name, each in parts.items() if not name.startswith("_")}
    return (type(value).__name__, told(parts, depth - 1))


def test_all_callbacks_are_here() -> None:
    assert len(CALLBACKS) >= 14
    assert set(NAMED) - set(CALLBACKS) == {"PrunedStateMixin", "Retraining"}


@pytest.mark.parametrize("name", CALLBACKS)
def test_all_arguments_at_their_defaults(name: str) -> None:
    required = REQUIRED.get(name, {})
    written = {key: in_yaml(value) for key, value in defaults(CALLBACKS[name]).items()} | required
    found = given(name, written)
    assert type(found) is CALLBACKS[name]
    assert told(found) == told(CALLBACKS[name](**required))


@pytest.mark.parametrize("name", CALLBACKS)
def test_what_is_saved_can_be_read_again(name: str) -> None:
    """Every argument is known to the parser by its name, and stands in the config that it saves."""
    made = parser()
    one = {"class_path": f"lightning_prune.callbacks.{name}", "init_args": REQUIRED.get(name, {})}
    config = made.parse_string(yaml.safe_dump({"trainer": {"callbacks": [one]}}))
    saved = made.dump(config, skip_none=False)
    (entry,) = yaml.safe_load(saved)["trainer"]["callbacks"]
    assert set(entry.get("init_args", {})) == {*defaults(CALLBACKS[name]), *REQUIRED.get(name, {})}
    assert told(read(saved)[0]) == told(CALLBACKS[name](**REQUIRED.get(name, {})))


def classes(module: Any, kind: type) -> list[str]:
    found = {name: getattr(module, name) for name in module.__all__}
    return [
        name
        for name, each in found.items()
        if inspect.isclass(each) and issubclass(each, kind) and not inspect.isabstract(each)
    ]


ARGUMENTS: dict[str, dict[str, Any]] = {
    "InProportion": {"bearable": {"conv*": 0.5}},
    "PerLayer": {"ratios": {"fc*": 0.9}},
    "Watched": {"criterion": {"class_path": "lightning_prune.criteria.HRank"}},
}


def an(module: str, name: str) -> dict[str, Any]:
    return {"class_path": f"lightning_prune.{module}.{name}", "init_args": ARGUMENTS.get(name, {})}


@pytest.mark.parametrize("name", [name for name in classes(criteria, Criterion) if name != "Watched"])
def test_criteria(name: str) -> None:
    found = given("PruneCallback", {"pruning_ratio": 0.5, "criterion": an("criteria", name)})
    assert type(found.request.criterion) is getattr(criteria, name)


@pytest.mark.parametrize("name", classes(allocation, Allocation))
def test_allocations_of_channels(name: str) -> None:
    found = given("MagnitudePruneCallback", {"allocation": an("allocation", name)})
    assert type(found.request.allocation) is getattr(allocation, name)


@pytest.mark.parametrize("name", classes(masks, WeightAllocation))
def test_allocations_of_weights(name: str) -> None:
    found = given("MagnitudePruneCallback", {"granularity": "weights", "allocation": an("masks", name)})
    assert type(found.weight_allocation) is getattr(masks, name)


def halfway(progress: float) -> float:
    """A schedule of one's own."""
    return 0.5 + progress / 2


class Steps:
    """A schedule with settings: an object that is called."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, progress: float) -> float:
        return round(progress * self.count) / self.count


@pytest.mark.parametrize(
    ("name", "init_args", "found"),
    [
        ("PruneCallback", "{pruning_ratio: 0.5, criterion: lightning_prune.criteria.Fisher}", Fisher()),
        (
            "PruneCallback",
            "{pruning_ratio: 0.5, criterion: {class_path: lightning_prune.criteria.Magnitude, init_args: {p: 1}}}",
            Magnitude(1),
        ),
    ],
)
def test_criteria_with_settings(name: str, init_args: str, found: Criterion) -> None:
    assert told(given(name, init_args).request.criterion) == told(found)


@pytest.mark.parametrize(
    ("init_args", "read_off", "wanted"),
    [
        ("schedule: lightning_prune.schedules.linear", lambda it: it.timing.schedule, schedules.linear),
        (f"schedule: {__name__}.halfway", lambda it: it.timing.schedule, halfway),
        (
            f"schedule: {{class_path: {__name__}.Steps, init_args: {{count: 4}}}}",
            lambda it: [it.timing.schedule(at / 8) for at in (0, 3, 8)],
            [0.0, 0.5, 1.0],
        ),
        ("allocation: lightning_prune.allocation.Isomorphic", lambda it: type(it.request.allocation), Isomorphic),
        (
            "allocation: {class_path: lightning_prune.allocation.ByCost, init_args: {beta: 8, of: params}}",
            lambda it: told(it.request.allocation),
            told(ByCost(8.0, of="params")),
        ),
        (
            "{granularity: weights, allocation: lightning_prune.allocation.Global}",
            lambda it: type(it.weight_allocation),
            Global,
        ),
        (
            "{granularity: weights, allocation: {class_path: lightning_prune.masks.PerLayer, "
            "init_args: {ratios: {'fc*': 0.9}}}}",
            lambda it: told(it.weight_allocation),
            told(PerLayer({"fc*": 0.9})),
        ),
        ("granularity: '2:4'", lambda it: it.unit, NM(2, 4)),
        ("granularity: 8x1", lambda it: it.unit, Blocks(8, 1)),
        (
            "granularity: {class_path: lightning_prune.masks.NM, init_args: {n: 1, m: 8}}",
            lambda it: it.unit,
            NM(1, 8),
        ),
        ("reconstruction: {images: 100}", lambda it: it.request.reconstruction, Reconstruction(images=100)),
        (
            "reconstruction: {class_path: lightning_prune.Reconstruction, init_args: {ridge: 0.1}}",
            lambda it: it.request.reconstruction,
            Reconstruction(ridge=0.1),
        ),
        (
            "{granularity: weights, retraining: {lr_factor: 0.1, rewind_to: 7, alternate: [[conv*], [fc*]]}}",
            lambda it: it.retraining,
            Retraining(lr_factor=0.1, rewind_to=7, alternate=[["conv*"], ["fc*"]]),
        ),
        ("round_to: auto", lambda it: it.request.limits.round_to, "auto"),
        ("round_to: 8", lambda it: it.request.limits.round_to, 8),
        ("ignore: [fc, 'conv1*']", lambda it: list(it.request.ignore), ["fc", "conv1*"]),
        ("{begin: 100, end: 900, every_n_steps: 50}", lambda it: (it.timing.unit, it.timing.begin), ("step", 100)),
    ],
)
def test_rich_arguments(init_args: str, read_off: Callable[[Any], Any], wanted: Any) -> None:
    found = read_off(given("MagnitudePruneCallback", init_args))
    assert told(found) == told(wanted)
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("name", "init_args", "read_off", "wanted"),
    [
        ("BNSlimmingCallback", "pruning_ratio: [0.5, 0.75]", lambda it: it.timing.schedule.ratios, (0.5, 0.75)),
        ("RigLCallback", "end: 500", lambda it: it.end, 500),
        ("RigLCallback", "end: 0.5", lambda it: it.end, 0.5),
        ("RigLCallback", "decay: lightning_prune.masks.growing.constant", lambda it: it.decay(0.5), 1.0),
        (
            "L0PruneCallback",
            "{strength: {'conv*': 0.1, '*': 0.2}, granularity: {'fc*': inputs, '*': channels}}",
            lambda it: (it.settings.strength, it.settings.granularity),
            ({"conv*": 0.1, "*": 0.2}, {"fc*": "inputs", "*": "channels"}),
        ),
        (
            "DistillationCallback",
            "teacher: {class_path: torch.nn.Linear, init_args: {in_features: 3, out_features: 4}}",
            lambda it: (type(it._given), it._given.out_features),
            (nn.Linear, 4),
        ),
        (
            "EWCCallback",
            "{strength: 1, loss: torch.nn.functional.mse_loss, labels: data, consolidate_on: fit_end, batches: 3}",
            lambda it: (it.loss, it.consolidate_on, it.batches),
            (F.mse_loss, "fit_end", 3),
        ),
        (
            "ChannelHealthMonitor",
            "{activation: torch.nn.functional.gelu, layers: ['bn*'], ablation: {class_path: "
            "lightning_prune.metrics.CumulativeAblationCurve, init_args: {orders: 3}}}",
            lambda it: (it.metric.layers, type(it.ablation), it.ablation.orders),
            (["bn*"], CumulativeAblationCurve, 3),
        ),
        ("ChannelEquilibriumCallback", "where: ['features.*']", lambda it: it.where, ["features.*"]),
        (
            "LassoPruneCallback",
            "{speed_up: 4, trunks: sampled, allocation: {class_path: lightning_prune.allocation.ShallowToDeep, "
            "init_args: {factor: 2.0}}}",
            lambda it: (it.request.pruning_ratio, it.request.trunks, str(it.request.allocation)),
            (0.75, "sampled", "ShallowToDeep(2.0)"),
        ),
    ],
)
def test_arguments_of_their_own(name: str, init_args: str, read_off: Callable[[Any], Any], wanted: Any) -> None:
    found = read_off(given(name, init_args))
    assert told(found) == told(wanted)
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("init_args", "message"),
    [
        ("prunning_ratio: 0.5", "Option 'prunning_ratio' is not accepted"),
        ("of: chanels", r"'of|\"of\".*'channels', 'params', 'macs', 'memory', 'latency'.*chanels"),
        ("begin: soon", "\"begin\".*<class 'int'>.*soon"),
        ("pruning_ratio: half", '"pruning_ratio".*float.*half'),
        ("schedule: lightning_prune.schedules.qubic", '"schedule".*qubic'),
        ("allocation: lightning_prune.criteria.Magnitude", '"allocation".*lightning_prune.criteria.Magnitude'),
        ("reconstruction: {imges: 100}", "\"reconstruction\".*'imges' is not accepted"),
        ("{granularity: weights, retraining: {lr: 0.1}}", "\"retraining\".*'lr' is not accepted"),
        ("heads: [whole]", '"heads".*whole'),
        ("granularity: 2:4", "\"granularity\".*<class 'str'>.*124"),  # in YAML 1.1 a number in base 60
    ],
)
def test_a_wrong_argument_is_named(init_args: str, message: str) -> None:
    with pytest.raises(refusal()) as caught:
        given("MagnitudePruneCallback", init_args)
    assert re.search(message, str(caught.value), re.DOTALL)


def test_a_value_out_of_range_is_our_own_error() -> None:
    with pytest.raises(
        ValueError, match=r"`pruning_ratio` is the fraction of channels to remove, in \[0, 1\); got 1.5"
    ):
        given("MagnitudePruneCallback", "pruning_ratio: 1.5")


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(refusal(), match="required: pruning_ratio"):
        given("PruneCallback", "of: macs")


class Net(pl.LightningModule):
    """As in examples/lightning_cli.py."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, width, 3), nn.Conv2d(width, 2 * width, 3)
        self.fc = nn.Linear(2 * width * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(images).relu()).relu().flatten(1))  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean())


def cli(*arguments: str | Path) -> LightningCLI:
    """Run a command line, in a hurry."""
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    hurried = ["--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1"]
    return LightningCLI(Net, Digits, args=[*map(str, arguments), *quiet, *hurried])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and a command line without what pytest was called with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])
    return tmp_path


def same(one: pl.LightningModule, other: pl.LightningModule) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == twin and torch.equal(a, b) for (name, a), (twin, b) in pairs)


def test_a_fit_from_yaml_and_again_from_what_it_saved(folder: Path) -> None:
    first = cli("fit", "--config", ROOT / "examples" / "lightning_cli.yaml")
    saved = folder / "lightning_logs" / "version_0" / "config.yaml"
    text = saved.read_text(encoding="utf-8")
    assert [record.epoch for record in history_of(first.model)] == [2, 3]
    assert history_of(first.model)[-1].reached >= 0.6
    for name in ("criteria.Taylor", "allocation.ByCost", "schedules.cubic"):
        assert f"lightning_prune.{name}" in text
    again = cli("fit", "--config", saved)
    assert same(first.model, again.model)
    assert [repr(record) for record in history_of(again.model)] == [repr(each) for each in history_of(first.model)]

    pruned = next((folder / "lightning_logs" / "version_0" / "checkpoints").glob("*.ckpt"))
    checked = cli("validate", "--config", saved, "--ckpt_path", pruned)
    assert same(first.model, checked.model)


def test_callbacks_from_the_command_line_by_their_short_names(folder: Path) -> None:
    short = ["--trainer.callbacks=MagnitudePruneCallback", "--trainer.callbacks.pruning_ratio=0.25"]
    more = ["--trainer.callbacks.begin=1", "--trainer.callbacks.end=1", "--trainer.callbacks+=SparsityMonitor"]
    rest = ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.logger=false", "--optimizer=SGD"]
    made = cli("fit", *short, *more, *rest, "--optimizer.lr=0.05")
    assert history_of(made.model)[-1].asked == 0.25
    assert any(isinstance(each, callbacks.SparsityMonitor) for each in made.trainer.callbacks)  # type: ignore[attr-defined]


def test_the_page_shows_yaml_that_can_be_read() -> None:
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    made = [given(each["class_path"].rpartition(".")[2], each["init_args"]) for block in blocks for each in block]
    assert len(made) >= 4
    assert all(isinstance(each, pl.Callback) for each in made)
    assert sum(isinstance(each, PruneCallback) for each in made) >= 3
