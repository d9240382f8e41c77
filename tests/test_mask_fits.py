"""Masks through whole fits: exact counts on every schedule, patterns that hold, and every file that is written."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from math import floor, prod
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from beside import beside, either_side
from fits import STEPS, Module, momentum, network, trainer, widths
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks as neighbours
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from masked import Exact, is_exact, masked, weights_of, wrong
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from versions import older

from lightning_prune import history_of, load_pruned, masks
from lightning_prune.allocation import Global, Uniform
from lightning_prune.callbacks import BNSlimmingCallback, PruneCallback, RigLCallback, SparsityMonitor
from lightning_prune.callbacks.magnitude import MagnitudePruneCallback
from lightning_prune.callbacks.masking import MaskProposal
from lightning_prune.history import save_pruned
from lightning_prune.masks.allocations import ERK, LAMP, PerLayer, StdThreshold
from lightning_prune.masks.held import Masks, masks_of, sparsity
from lightning_prune.schedules import cubic, linear

SIZES = {"net.0.weight": 72, "net.3.weight": 576, "net.8.weight": 32}


def gone(taken: Masks) -> int:
    return sum(int((~mask).count_nonzero()) for mask in taken.values())


def rounded(share: float) -> int:
    return floor(share + 0.5)


def only_more(seen: list[Masks]) -> bool:
    """Whether what is pruned once stays pruned, in networks whose shapes stay."""
    pairs = [(early, late) for early, late in pairwise(seen) if early is not late]
    return all(bool((late[name] <= mask).all()) for early, late in pairs for name, mask in early.items())


# how many


@pytest.mark.parametrize("allocation", [Uniform(), Global(), LAMP(), ERK()], ids=repr)
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_a_cubic_schedule_is_met_by_the_weight(allocation: Any, unit: str) -> None:
    """s_t = s (1 - (1 - t)^3) of the 680 dense weights, at every event."""
    steps = {"begin": 2, "end": 17, "every_n_steps": 5} if unit == "step" else {"begin": 1, "end": 4}
    callback = masked(0.8, schedule=cubic, allocation=allocation, **steps)
    look = Exact()
    trainer(callback, look, max_epochs=5).fit(Module())
    scale = 1 if unit == "step" else STEPS
    for moment, share in callback.events.items():
        taken = look.masks[moment * scale]
        if isinstance(allocation, Uniform):
            assert {name: gone({name: mask}) for name, mask in taken.items()} == {
                name: rounded(0.8 * share * size) for name, size in SIZES.items()
            }
        else:
            assert gone(taken) == rounded(0.8 * share * sum(SIZES.values()))
    assert len(callback.events) == 3
    assert len({gone(taken) for taken in look.masks}) == 4
    assert only_more(look.masks)
    assert look.wrong == []


def test_ratios_of_each_layer() -> None:
    """They say themselves how many go, at every event; what no pattern matches stays."""
    ratios = {"net.3": 0.9, "*.8": 0.25}
    module, look = Module(), Exact()
    trainer(masked(0.5, allocation=PerLayer(ratios)), look).fit(module)
    for name, size in SIZES.items():
        ratio = next((one for key, one in ratios.items() if fnmatchcase(name.removesuffix(".weight"), key)), 0)
        assert gone({name: masks_of(module)[name]}) == rounded(ratio * size)
    assert look.wrong == []


def test_thresholds_are_in_deviations_of_the_dense_weights() -> None:
    """|w| <= q std(W_dense), with the deviations from before the first event, at the second one too."""
    dense: dict[str, float] = {}
    before: list[dict[str, Tensor]] = []

    class Peek(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            dense.update({name: float(weights_of(pl_module)[name].std(correction=0)) for name in SIZES})

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            before.append({name: weights_of(pl_module)[name].clone() for name in SIZES})

    module, look = Module(AdamW), Exact()
    trainer(Peek(), masked(0.5, allocation=StdThreshold(1.0), begin=1, end=3, schedule=linear), look).fit(module)
    for epoch in (2, 3):
        for name, weight in before[epoch].items():
            assert torch.equal(look.masks[epoch * STEPS][name], weight.abs() > dense[name]), (epoch, name)
    assert only_more(look.masks)


@pytest.mark.parametrize(("unit", "sides"), [("2:4", (2, 4)), ("1:4", (1, 4)), ("2:8", (2, 8))])
def test_patterns_of_inputs_hold_through_the_fit(unit: str, sides: tuple[int, int]) -> None:
    n, m = sides
    module, look = Module(), Exact()
    trainer(masked(0.5, granularity=unit, ignore=["net.0"], begin=1, end=1), look).fit(module)
    assert masks_of(module).keys() == {"net.3.weight", "net.8.weight"}
    for name, mask in masks_of(module).items():
        groups = mask.movedim(1, -1).reshape(-1, m)
        assert bool((groups.sum(1) == n).all()), name
    assert look.wrong == []


@pytest.mark.parametrize(("unit", "sides"), [("blocks", (4, 4)), ("8x1", (8, 1)), ("1x8", (1, 8))])
def test_blocks_go_as_one(unit: str, sides: tuple[int, int]) -> None:
    rows, columns = sides
    module, look = Module(), Exact()
    trainer(masked(0.5, granularity=unit, ignore=["net.0", "net.8"], schedule=cubic), look).fit(module)
    (mask,) = masks_of(module).values()
    tiles = mask.reshape(8 // rows, rows, 8 // columns, columns, 3, 3).movedim(2, 1).flatten(2, 3)
    assert bool((tiles.all(2) | ~tiles.any(2)).all())
    assert gone({"": mask}) == rounded(0.5 * 576 / prod(sides)) * prod(sides)
    assert only_more(look.masks)
    assert look.wrong == []


@pytest.mark.parametrize("unit", ["3:7", "8x3", "blocks"])
def test_what_does_not_divide_a_layer_is_refused_before_the_first_step(unit: str) -> None:
    module, callback = Module(), masked(0.5, granularity=unit)
    fit = trainer(callback)
    with pytest.raises(ValueError, match=r"'net\.0' has .*Put the layer in `ignore`"):
        fit.fit(module)
    assert fit.global_step == 0
    assert masks_of(module) == {}


def test_a_callback_serves_a_second_network() -> None:
    """It forgets the first one: its weights, deviations and dropouts."""
    callback = masked(0.5, allocation=StdThreshold(1.0), begin=1, end=1)
    ended = []
    for used in (callback, masked(0.5, allocation=StdThreshold(1.0), begin=1, end=1)):
        wide = network(3)
        wide[3].weight.data.mul_(5)  # type: ignore[union-attr,operator]
        if used is callback:
            trainer(callback, max_epochs=2).fit(Module())
        module = Module(net=wide)
        trainer(used, max_epochs=2).fit(module)
        ended.append(masks_of(module))
    assert all(torch.equal(mask, ended[1][name]) for name, mask in ended[0].items())


# other ways to train


@pytest.mark.parametrize("window", [{"accumulate_grad_batches": 4}, GradientAccumulationScheduler({0: 1, 1: 4, 2: 2})])
def test_accumulated_gradients(window: Any) -> None:
    others, settings = ([], window) if isinstance(window, dict) else ([window], {})
    module, look = Module(), Exact()
    trainer(masked(0.7), look, *others, **settings).fit(module)
    assert look.wrong == []
    assert is_exact(module)


class Game(Module):
    """A maker and a judge, trained in turns by optimizers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker = nn.Linear(4, 36)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        made = self.maker(torch.randn(8, 4)).view(-1, 1, 6, 6)
        for optimizer, sign in zip(self.optimizers(), (1, -1), strict=True):  # type: ignore[arg-type]
            self.toggle_optimizer(optimizer)
            loss = sign * F.softplus(self(made)).mean() + F.softplus(-self(batch[0])).mean()
            optimizer.zero_grad()
            self.manual_backward(loss, retain_graph=sign == 1)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            made = self.maker(torch.randn(8, 4)).view(-1, 1, 6, 6)

    def configure_optimizers(self) -> Any:
        return [self._optimizer(self.net.parameters()), AdamW(self.maker.parameters())]


def test_two_networks_against_each_other() -> None:
    """The maker is not in `forward`: its weights are masked all the same."""
    module, look = Game(), Exact()
    trainer(masked(0.7), look).fit(module)
    assert look.wrong == []
    assert "maker.weight" in masks_of(module)
    assert is_exact(module)


class Transfer(Module):
    """The head is trained from the start, the backbone once it is unfrozen."""

    def __init__(self, make: Callable[..., Optimizer] = momentum) -> None:
        super().__init__(make)
        self.backbone, self.head = self.net[:6], self.net[6:]
        del self.net

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def configure_optimizers(self) -> Any:
        return self._optimizer(self.head.parameters())


@either_side
@pytest.mark.parametrize("thaw", [1, 2, 3])
def test_a_backbone_that_joins_the_optimizer_later(thaw: int, side: int) -> None:
    module, look = Transfer(), Exact()
    unfreeze = BackboneFinetuning(thaw, backbone_initial_lr=0.05)
    trainer(*beside(masked(0.7), unfreeze, side=side), look).fit(module)  # type: ignore[arg-type]
    assert look.wrong == []
    assert len(masks_of(module)) == 3
    assert is_exact(module)


# files


def average(kind: str) -> list[Callback]:
    if kind == "swa":
        return [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)]
    return [neighbours.EMAWeightAveraging(decay=0.8)] if kind == "ema" else []


@pytest.mark.filterwarnings("ignore:.*that ended before the epoch ended")
@either_side
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("kind", ["plain", "ema", "swa"])
def test_every_file_holds_zeros_and_their_masks(tmp_path: Path, kind: str, weights_only: bool, side: int) -> None:
    if older("lightning", "2.6") and kind == "swa" and not weights_only:
        pytest.skip("lightning before 2.6 saves an object with SWA that torch does not load with weights_only=True")
    if kind == "ema" and not hasattr(neighbours, "EMAWeightAveraging"):
        pytest.skip("this Lightning has none")
    module = Module(partial(AdamW, lr=0.01))
    keep = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_weights_only=weights_only
    )
    fit = trainer(*beside(masked(0.7), *average(kind), side=side), keep, enable_checkpointing=True)  # type: ignore[arg-type]
    fit.fit(module)
    save_pruned(module, tmp_path / "saved.ckpt")
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 13
    sparse = 0
    for file in files:
        found = torch.load(file, weights_only=True)
        taken = masks.unpack(found.get(masks.KEY, {}), module)
        states = [found["state_dict"], found.get("current_model_state", {})]
        assert all(wrong(taken, state) == [] for state in states if state), file.name
        loaded = load_pruned(Module(seed=9), file)
        assert sparsity(masks_of(loaded)) == sparsity(taken)
        sparse += is_exact(loaded)
    assert sparse == 13 - 3  # the first three are from before the first event
    assert is_exact(module)


# beside other callbacks


def test_two_callbacks_on_the_same_weight_are_refused() -> None:
    pair = masked(0.5, ignore=["net.0"]), masked(0.7, ignore=["net.8"])
    for callbacks in (pair, pair[::-1], (pair[0], RigLCallback(0.5))):
        module, fit = Module(), trainer(*callbacks)
        with pytest.raises(MisconfigurationException, match=r"both mask 'net\.[38]\.weight'.*`ignore`"):
            fit.fit(module)
        assert fit.global_step == 0
        assert masks_of(module) == {}


def test_two_callbacks_on_layers_of_their_own() -> None:
    module, look = Module(partial(AdamW, lr=0.01)), Exact()
    first = masked(0.9, ignore=["net.0", "net.8"], begin=1, end=2, schedule=linear)
    second = masked(0.5, ignore=["net.3"], begin=1, end=3, schedule=linear)
    trainer(first, second, look).fit(module)
    assert {name: gone({name: mask}) for name, mask in masks_of(module).items()} == {
        "net.3.weight": 518,
        "net.0.weight": 36,
        "net.8.weight": 16,
    }
    assert look.wrong == []
    assert only_more([taken for taken in look.masks if len(taken) == 3])


@pytest.mark.filterwarnings("ignore:Asked .* of channels, reached", "ignore:.*cannot reach zero")
@either_side
@pytest.mark.parametrize("channels", ["magnitude", "slimming"])
def test_masks_travel_through_the_cuts_of_another_callback(channels: str, side: int) -> None:
    other = {
        "magnitude": lambda: PruneCallback(0.5, begin=2, end=2),
        "slimming": lambda: BNSlimmingCallback(0.5, strength=0.01, begin=2, end=2),
    }[channels]()
    module, look = Module(partial(AdamW, lr=0.01)), Exact()
    trainer(*beside(other, masked(0.6, begin=0, end=3, schedule=linear), side=side), look, max_epochs=5).fit(module)  # type: ignore[arg-type]
    assert sum(widths(module)) == 8
    assert look.wrong == []
    assert is_exact(module)
    (record,) = history_of(module)
    kept = record.kept["net.3.weight"]
    was, now = look.masks[2 * STEPS - 1]["net.3.weight"], look.masks[-1]["net.3.weight"]
    for dim, positions in kept.items():
        was = was.index_select(dim, positions if isinstance(positions, Tensor) else torch.tensor(positions))
    assert bool((now <= was).all())
    dense = {name: rounded(0.6 * size) for name, size in SIZES.items()}
    left = {name: int(mask.count_nonzero()) for name, mask in masks_of(module).items()}
    assert all(left[name] <= SIZES[name] - dense[name] for name in SIZES)


def test_the_monitor_beside_masks_and_the_cuts_that_follow_from_them() -> None:
    logged: list[dict[str, float]] = []

    class Listens(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    module = Module()
    trainer(SparsityMonitor(), masked(0.85, retraining=None), Listens()).fit(module)
    assert is_exact(module)
    assert [values["prune/params"] for values in logged][-1] == sum(p.numel() for p in module.parameters()) < 716
    assert logged[0]["prune/params"] == 716


# what ranks tell each other


def test_masks_with_as_many_weights_in_other_places_have_another_hash() -> None:
    first = MaskProposal({"a": torch.tensor([[True, False]])})
    assert first.digest() != MaskProposal({"a": torch.tensor([[False, True]])}).digest()
    assert first.digest() != MaskProposal({"a": torch.tensor([[True], [False]])}).digest()
    assert first.digest() == deepcopy(first).digest()


def test_channels_need_no_upkeep() -> None:
    callback, module = MagnitudePruneCallback(0.5, begin=1, end=1), Module()
    trainer(callback, max_epochs=2, limit_train_batches=2).fit(module)
    assert callback.masked_weights(module) == set()
    assert masks_of(module) == {}
    assert widths(module) == [4, 4]
