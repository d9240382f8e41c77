"""Blocks in a real fit: they come before the optimizer, train, are resumed, cut along, and fold at the end."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import EXAMPLE, STEPS, Module, Resumable, equal, images, network, trainer, widths
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_conf import composed
from test_mask_resume import alike, cosine, files
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from lightning_prune import history_of, load_pruned, save_pruned
from lightning_prune.callbacks import (
    BNSlimmingCallback,
    ChannelEquilibriumCallback,
    L0PruneCallback,
    MagnitudePruneCallback,
    PruneCallback,
)
from lightning_prune.callbacks.base import unwrapped
from lightning_prune.cli.building import experiment_from
from lightning_prune.equilibrium import Equilibrium, blocks_of
from lightning_prune.equilibrium.inserting import put_behind
from lightning_prune.errors import PruningError
from lightning_prune.layers import BatchDecorrelation, ChannelEquilibrium, InstanceReweighting
from lightning_prune.workbench import resnet20

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]

sgd = partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
adamw = partial(AdamW, lr=0.01)
each_optimizer = pytest.mark.parametrize("make", [sgd, adamw], ids=["sgd", "adamw"])

own = partial(ChannelEquilibriumCallback, group_size=4)
folding = partial(own, branches="decorrelation", at_end="fold")

FREE = [
    f"net.{place}.equilibrium.{name}"
    for place in (1, 4)
    for name in ("mixing", "reweighting.gate.1.weight", "reweighting.gate.1.bias")
]


class Stages(Module):
    """Can be tested and asked as well."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def test_dataloader(self) -> Any:
        return images(seed=2)

    predict_dataloader = test_dataloader

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


def groups_of(fit: pl.Trainer) -> list[dict[str, Any]]:
    (optimizer,) = map(unwrapped, fit.optimizers)
    return optimizer.param_groups


def names_in(module: nn.Module, group: dict[str, Any]) -> list[str]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [names[parameter] for parameter in group["params"]]


class TestBuiltIn:
    def test_blocks_that_are_there_lose_decay_and_are_not_put_in_again(self) -> None:
        module = Module(sgd)
        put_behind(module, ["net.1", "net.4"], Equilibrium(group_size=4))
        fit = trainer(ChannelEquilibriumCallback("there"), max_epochs=1)
        fit.fit(module)
        assert list(blocks_of(module)) == ["net.1", "net.4"]
        assert sorted(names_in(module, groups_of(fit)[-1])) == sorted(FREE)
        assert groups_of(fit)[-1]["weight_decay"] == 0

    def test_where_none_are_it_refuses(self) -> None:
        with pytest.raises(PruningError, match=r"looks after the equilibrium blocks .* has none"):
            trainer(ChannelEquilibriumCallback("there"), max_epochs=1).fit(Module(sgd))


class TestOptimizer:
    @each_optimizer
    def test_it_knows_the_blocks(self, make: Callable[..., Optimizer]) -> None:
        module, callback = Module(make), own()
        trainer(callback, max_epochs=1).fit(module)
        assert callback.names == list(blocks_of(module)) == ["net.1", "net.4"]

    @each_optimizer
    def test_what_decay_would_harm_has_a_group_of_its_own(self, make: Callable[..., Optimizer]) -> None:
        module, fit = Module(make), trainer(own(), max_epochs=1)
        fit.fit(module)
        first, second = groups_of(fit)
        assert names_in(module, second) == FREE
        assert sorted(names_in(module, first) + FREE) == sorted(dict(module.named_parameters()))
        assert (first["weight_decay"], second["weight_decay"], second["name"]) == (0.01, 0, "equilibrium")
        apart = ("params", "weight_decay", "name", "follows", "initial_lr")
        assert {k: v for k, v in second.items() if k not in apart} == {k: v for k, v in first.items() if k not in apart}

    def test_of_a_gate_alone(self) -> None:
        module, fit = Module(sgd), trainer(own(branches="reweighting"), max_epochs=1)
        fit.fit(module)
        found = [f"net.{place}.equilibrium.gate.1.{leaf}" for place in (1, 4) for leaf in ("weight", "bias")]
        assert names_in(module, groups_of(fit)[1]) == found

    def test_without_decay_there_is_one_group(self) -> None:
        fits = [(Module(), own()), (Module(sgd), own(branches="decorrelation"))]
        for module, callback in fits:
            fit = trainer(callback, max_epochs=1)
            fit.fit(module)
            (group,) = groups_of(fit)
            assert names_in(module, group) == list(dict(module.named_parameters()))

    @each_optimizer
    @pytest.mark.parametrize("schedule", ["none", "cosine", "one cycle", "lambda", "plateau"])
    def test_it_learns_as_fast_as_the_others(self, make: Callable[..., Optimizer], schedule: str) -> None:
        schedules: dict[str, Callable[[Optimizer], dict[str, Any]] | None] = {
            "none": None,
            "cosine": cosine,
            "one cycle": lambda each: stepped(OneCycleLR(each, 0.2, total_steps=4 * STEPS)),
            "lambda": lambda each: stepped(LambdaLR(each, lambda step: 1 / (1 + step))),
            "plateau": lambda each: {
                "lr_scheduler": {"scheduler": ReduceLROnPlateau(each, patience=0, threshold=9.0), "monitor": "val_loss"}
            },
        }
        rates: list[tuple[float, ...]] = []

        class Look(Callback):
            def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                (optimizer,) = map(unwrapped, trainer.optimizers)
                optimizer.register_step_post_hook(
                    lambda each, *_: rates.append(tuple(group["lr"] for group in each.param_groups))
                )

        trainer(own(), Look()).fit(Module(make, schedules[schedule]))
        assert len(rates) == 4 * STEPS
        for first, second in rates:
            assert second == pytest.approx(first, rel=1e-9)
        assert (len(set(rates)) > 1) == (schedule != "none")

    @each_optimizer
    def test_blocks_train(self, make: Callable[..., Optimizer]) -> None:
        module = Module(make)
        trainer(own()).fit(module)
        for block in blocks_of(module).values():
            both = block.equilibrium
            assert isinstance(both, ChannelEquilibrium)
            assert abs(both.mixing.item()) > 1e-4
            assert not torch.equal(both.decorrelation.running_whitening, torch.eye(4).repeat(2, 1, 1))
            assert float(both.reweighting.running_scale) != 1.0
            assert both.reweighting.gate[1].weight.ne(1).any()

    def test_a_block_that_came_after_it_is_refused(self) -> None:
        class Late(Callback):
            def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                put_behind(pl_module, ["net.4"], Equilibrium())

        class LateModule(Module):
            def on_fit_start(self) -> None:
                put_behind(self, ["net.4"], Equilibrium())

        tried: list[tuple[Module, tuple[Callback, ...]]] = [
            (Module(), (Late(), own(["net.1"]))),
            (Module(), (own(["net.1"]), Late())),
            (LateModule(), (own(["net.1"]),)),
        ]
        for module, callbacks in tried:
            with pytest.raises(MisconfigurationException, match=r"behind net\.4 came after the optimizer.*never train"):
                trainer(*callbacks).fit(module)

    def test_frozen_norms_may_be_left_to_themselves(self) -> None:
        class HeadOnly(Module):
            def configure_optimizers(self) -> Optimizer:
                return sgd(self.net[8].parameters())

        module, fit = HeadOnly(), trainer(own(), max_epochs=1)
        fit.fit(module)
        assert len(groups_of(fit)) == 1
        assert blocks_of(module)["net.1"].equilibrium.mixing.item() == 0.0  # type: ignore[union-attr,operator]


def stepped(scheduler: Any) -> dict[str, Any]:
    return {"lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TestStages:
    def test_they_come_once(self) -> None:
        module, callback = Stages(sgd), own()
        fit = trainer(callback, max_epochs=1)
        fit.validate(module, verbose=False)
        blocks = blocks_of(module)
        assert list(blocks) == callback.names == ["net.1", "net.4"]
        fit.fit(module)
        fit.test(module, verbose=False)
        fit.predict(module)
        fit.fit_loop.max_epochs = 2
        fit.fit(module)
        again = trainer(callback, max_epochs=1)
        again.fit(module)
        assert blocks_of(module) == blocks
        assert all(not isinstance(block.norm, type(block)) for block in blocks.values())
        assert names_in(module, groups_of(again)[1]) == FREE

    def test_another_network_gets_its_own(self) -> None:
        callback = own()
        for _ in range(2):
            module = Module(sgd)
            trainer(callback, max_epochs=1).fit(module)
            assert list(blocks_of(module)) == ["net.1", "net.4"]

    def test_another_callback_finds_them_there(self) -> None:
        module = Module()
        trainer(own(), max_epochs=1).fit(module)
        with pytest.raises(PruningError, match=r"has equilibrium blocks already, at net\.1, net\.4\. Go on with them"):
            trainer(own(), max_epochs=1).fit(module)

    def test_data_come_in_the_same_order(self) -> None:
        class Shuffling(Module):
            def train_dataloader(self) -> Any:
                return DataLoader(images().dataset, batch_size=8, shuffle=True)

        def run(*callbacks: Callback) -> list[Tensor]:
            seen: list[Tensor] = []

            class Look(Callback):
                def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                    seen.append(batch[0])

            module = Shuffling()
            torch.manual_seed(3)
            trainer(*callbacks, Look(), max_epochs=2).fit(module)
            return seen

        plain, blocks = run(), run(own())
        assert len(plain) == 2 * STEPS
        assert all(map(torch.equal, plain, blocks))
        assert not torch.equal(plain[0], plain[STEPS])

    def test_what_is_there_starts_as_without_them(self) -> None:
        module = Module()
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        trainer(own(), max_epochs=0).fit(module)
        after = {name.replace(".norm.", "."): tensor for name, tensor in module.state_dict().items()}
        assert equal({name: after[name] for name in before}, before)
        assert len(after) > len(before)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "where": ({"where": "some"}, "`where` is 'auto', 'all', or patterns"),
    "where, empty": ({"where": []}, "`where` is"),
    "branches": ({"branches": "none"}, "`branches` is"),
    "group_size": ({"group_size": 0}, "`group_size` is 1 or more; got 0"),
    "iterations": ({"iterations": 0}, "`iterations`"),
    "reduction": ({"reduction": 0}, "`reduction`"),
    "momentum": ({"momentum": -0.1}, "`momentum`"),
    "at_end": ({"at_end": "drop"}, "`at_end` is 'keep' or 'fold'; got 'drop'"),
    "fold both": ({"at_end": "fold"}, "at_end='fold' goes with branches='decorrelation'.*got 'both'"),
    "fold gates": ({"at_end": "fold", "branches": "reweighting"}, "got 'reweighting'"),
}


class TestRefusals:
    @pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
    def test_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ChannelEquilibriumCallback(**arguments)

    def test_auto_wants_an_example(self) -> None:
        with pytest.raises(PruningError, match=r"Set `example_input_array`, or say where='all'"):
            trainer(own()).fit(Module(example=None))
        module = Module(example=None)
        trainer(own("all"), max_epochs=1).fit(module)
        assert list(blocks_of(module)) == ["net.1", "net.4"]

    def test_so_does_folding(self) -> None:
        with pytest.raises(
            MisconfigurationException, match=r"at_end='fold' runs the network.*Set `example_input_array`"
        ):
            trainer(folding("all")).fit(Module(example=None))

    def test_a_pattern_that_matches_nothing(self) -> None:
        with pytest.raises(ValueError, match=r"The pattern 'bn\*' in `where` matches none of the norms net\.1, net\.4"):
            trainer(own(["bn*"])).fit(Module())

    def test_a_network_that_comes_later(self) -> None:
        class Later(Module):
            def __init__(self) -> None:
                super().__init__(net=nn.Identity())

            def configure_model(self) -> None:
                self.net = network()

        with pytest.raises(
            PruningError, match=r"no norms.*`configure_model`.*equilibrate\(model\) once they are there"
        ):
            trainer(own("all")).fit(Later())


def ended(module: pl.LightningModule, fit: pl.Trainer) -> dict[str, Any]:
    """All that a fit leaves behind."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    (optimizer,) = map(unwrapped, fit.optimizers)
    return {
        "weights": module.state_dict(),
        "optimizer": {names[parameter]: state for parameter, state in optimizer.state.items()},
        "groups": [{**group, "params": names_in(module, group)} for group in optimizer.param_groups],
        "schedulers": [config.scheduler.state_dict() for config in fit.lr_scheduler_configs],
        "history": history_of(module),
    }


def fitted(
    make: Callable[..., Optimizer],
    *callbacks: Callback,
    seed: int = 0,
    file: Path | None = None,
    scheduler: Any = cosine,
) -> dict[str, Any]:
    module = Resumable(make, scheduler, net=network(seed))
    keeps = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    fit = trainer(*callbacks, enable_checkpointing=keeps, limit_val_batches=0)
    fit.fit(module, ckpt_path=file)
    return ended(module, fit)


class TestResuming:
    @pytest.mark.parametrize("branches", ["both", "decorrelation"])
    @each_optimizer
    def test_it_ends_as_the_unbroken_fit(self, tmp_path: Path, make: Callable[..., Optimizer], branches: Any) -> None:
        whole = fitted(make, own(branches=branches), files(tmp_path))
        assert len(whole["groups"]) == (2 if branches == "both" else 1)
        for step in (1, 2 * STEPS - 1, 3 * STEPS + 2):
            resumed = fitted(make, own(branches=branches), seed=9, file=tmp_path / f"{step}.ckpt")
            for key, value in whole.items():
                assert alike(value, resumed[key]), (step, key)

    def test_after_two_of_four_epochs(self, tmp_path: Path) -> None:
        whole = fitted(adamw, own(), files(tmp_path, filename="{epoch}", every_n_train_steps=None, every_n_epochs=1))
        resumed = fitted(adamw, own(), seed=9, file=tmp_path / "1.ckpt")
        assert all(alike(value, resumed[key]) for key, value in whole.items())

    def test_under_one_cycle(self, tmp_path: Path) -> None:
        def cycle(optimizer: Optimizer) -> dict[str, Any]:
            return stepped(OneCycleLR(optimizer, 0.1, total_steps=4 * STEPS))

        whole = fitted(adamw, own(), files(tmp_path), scheduler=cycle)
        resumed = fitted(adamw, own(), seed=9, file=tmp_path / "9.ckpt", scheduler=cycle)
        assert all(alike(value, resumed[key]) for key, value in whole.items())

    def test_files_hold_the_running_whitening(self, tmp_path: Path) -> None:
        fitted(sgd, own(), files(tmp_path))
        name = "net.1.equilibrium.decorrelation.running_whitening"
        early, late = (torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["state_dict"] for step in (1, 12))
        assert not torch.equal(early[name], late[name])


class Answers(Callback):
    """Notes what the network answers when training has ended."""

    def __init__(self) -> None:
        self.found = torch.empty(0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found = answers(pl_module)


def answers(module: nn.Module) -> Tensor:
    training = module.training
    x, _ = images(seed=5).dataset[:16]  # type: ignore[misc]
    with torch.no_grad():
        found: Tensor = module.eval()(x)
    module.train(training)
    return found


class TestFolding:
    @pytest.mark.parametrize("first", [True, False])
    def test_blocks_are_gone_and_answers_stay(self, first: bool) -> None:
        module, look, callback = Stages(sgd), Answers(), folding()
        fit = trainer(*[callback, look][:: 1 if first else -1])
        fit.fit(module)
        assert blocks_of(module) == {}
        assert not any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
        assert torch.allclose(answers(module), look.found, rtol=1e-5, atol=1e-5)
        assert look.found.std() > 0.01
        assert module.net[0].bias is not None
        for again in (fit, trainer(callback)):
            again.test(module, verbose=False)
            assert len(again.predict(module)) == STEPS  # type: ignore[arg-type]
        assert blocks_of(module) == {}

    def test_some_stay(self) -> None:
        """Behind a GroupNorm nothing can be folded; the network is used on with what has stayed."""
        net = network()
        net[4] = nn.GroupNorm(2, 8)
        module, look = Stages(sgd, net=net), Answers()
        fit = trainer(folding(), look, max_epochs=2)
        fit.fit(module)
        assert list(blocks_of(module)) == ["net.4"]
        assert isinstance(module.net[1], nn.Identity)
        assert torch.allclose(answers(module), look.found, rtol=1e-5, atol=1e-5)
        fit.test(module, verbose=False)
        assert list(blocks_of(module)) == ["net.4"]

    def test_keep_keeps(self) -> None:
        module, look = Stages(sgd), Answers()
        trainer(own(branches="decorrelation"), look).fit(module)
        assert len(blocks_of(module)) == 2
        assert torch.equal(answers(module), look.found)

    def test_validation_alone_folds_nothing(self) -> None:
        module = Stages(sgd)
        trainer(folding()).validate(module, verbose=False)
        assert len(blocks_of(module)) == 2

    def test_after_a_cut(self) -> None:
        module, look = Stages(sgd), Answers()
        trainer(folding(), MagnitudePruneCallback(0.5, begin=2, end=2), look).fit(module)
        assert blocks_of(module) == {}
        assert sum(widths(module)) == 8
        assert torch.allclose(answers(module), look.found, rtol=1e-5, atol=1e-5)

    def test_another_network_for_the_same_callback(self) -> None:
        callback = folding()
        for _ in range(2):
            module = Module(sgd)
            trainer(callback, max_epochs=1).fit(module)
            assert isinstance(module.net[1], nn.Identity)


magnitude = partial(MagnitudePruneCallback, 0.5, begin=2, end=2)
slimming = partial(BNSlimmingCallback, 0.5, strength=0.01, begin=2)
each_method = pytest.mark.parametrize("method", [magnitude, slimming], ids=["magnitude", "slimming"])


def whitenings(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(part.running_whitening.shape) for part in module.modules() if isinstance(part, BatchDecorrelation)]


class TestPruning:
    @each_method
    @each_optimizer
    def test_blocks_are_cut_along(self, make: Callable[..., Optimizer], method: Callable[..., PruneCallback]) -> None:
        module, shapes = Module(make), []

        class Look(Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
                shapes.append(tuple(whitenings(pl_module)))

        fit = trainer(own(), method(), Look())
        fit.fit(module)
        assert set(shapes[: 2 * STEPS]) == {((2, 4, 4), (2, 4, 4))}
        assert len(set(shapes[2 * STEPS :])) == 1
        assert all(groups == 2 and 1 <= rows == columns < 4 for groups, rows, columns in shapes[-1])
        assert [rows * groups for groups, rows, _ in shapes[-1]] == widths(module)
        assert sum(widths(module)) == 8
        for block in blocks_of(module).values():
            assert isinstance(block.equilibrium, ChannelEquilibrium)
            assert isinstance(block.equilibrium.reweighting, InstanceReweighting)
            assert block.equilibrium.reweighting.gate[0].in_features == block.norm.num_features
        first, second = groups_of(fit)
        assert names_in(module, second) == FREE
        assert sorted(names_in(module, first) + FREE) == sorted(dict(module.named_parameters()))
        assert answers(module).isfinite().all()

    @each_method
    def test_the_order_of_callbacks_is_free(self, method: Callable[..., PruneCallback]) -> None:
        one, other = fitted(sgd, own(), method()), fitted(sgd, method(), own())
        assert all(alike(value, other[key]) for key, value in one.items())

    @pytest.mark.parametrize(
        ("make", "method", "first"), [(sgd, slimming, False), (adamw, slimming, True), (adamw, magnitude, False)]
    )
    def test_resumed_before_and_after_the_cut(
        self, tmp_path: Path, make: Callable[..., Optimizer], method: Callable[..., PruneCallback], first: bool
    ) -> None:
        def both() -> list[Callback]:
            return [own(), method()][:: 1 if first else -1]

        whole = fitted(make, *both(), files(tmp_path))
        assert len(whole["history"]) == 1
        for step in (STEPS - 1, 2 * STEPS + 1, 3 * STEPS + 2):
            resumed = fitted(make, *both(), seed=9, file=tmp_path / f"{step}.ckpt")
            for key, value in whole.items():
                assert alike(value, resumed[key]), (step, key)

    def test_slimming_draws_the_scales_of_the_norms_inside(self) -> None:
        fits = {}
        for strength in (1e-6, 0.2):
            module = Module(sgd)
            trainer(own(), BNSlimmingCallback(0.5, strength=strength, begin=3), max_epochs=4).fit(module)
            fits[strength] = sum(block.norm.weight.abs().mean().item() for block in blocks_of(module).values())  # type: ignore[union-attr,operator]
        assert fits[0.2] < 0.8 * fits[1e-6]

    def test_gates_cut_where_no_block_is(self) -> None:
        """L0 gates channels that only layers with weights read."""
        module = Module(sgd)
        fit = trainer(
            own(["net.4"], branches="decorrelation"),
            L0PruneCallback(0.3, of="channels", granularity={"net.0": "channels"}, gate_lr=0.3, begin=2, end=3),
        )
        fit.fit(module)
        first, second = widths(module)
        assert first < second == 8
        assert whitenings(module) == [(2, 4, 4)]

    def test_gates_are_refused_before_blocks(self) -> None:
        with pytest.raises(ValueError, match=r"only what cannot be gated \(net\.0: it is read by something that is no"):
            trainer(own(branches="decorrelation"), L0PruneCallback(0.5, of="channels")).fit(Module(sgd))

    def test_a_file_of_a_network_that_is_built_with_blocks(self, tmp_path: Path) -> None:
        def built(seed: int) -> Module:
            torch.manual_seed(seed)
            return Module(sgd, net=resnet20(1, 6, 4, width=0.25, norm="ce"), example=EXAMPLE)

        module = built(0)
        trainer(magnitude(begin=1, end=1), max_epochs=2, limit_train_batches=2).fit(module)
        save_pruned(module, tmp_path / "net.ckpt")
        loaded = load_pruned(built(1), tmp_path / "net.ckpt")
        assert equal(loaded.state_dict(), module.state_dict())
        assert widths(loaded) == widths(module) != widths(built(0))
        assert torch.equal(answers(loaded), answers(module))


class TestConfig:
    def test_the_callback_is_built(self) -> None:
        (each,) = composed("callbacks=[channel_equilibrium]").callbacks.values()
        callback, plain = instantiate(each), ChannelEquilibriumCallback()
        assert isinstance(callback, ChannelEquilibriumCallback)
        assert vars(callback) == vars(plain), "the defaults in the file are those of the class"

    def test_every_trainer_gets_one_of_its_own(self, in_a_folder_of_its_own: None, monkeypatch: Any) -> None:
        monkeypatch.setattr("lightning_prune.cli.building.folder", Path.cwd)
        config = composed("callbacks=[channel_equilibrium]", "callbacks.channel_equilibrium.group_size=8")
        made = experiment_from(config).trainer
        found = [
            [each for each in made(name, []).callbacks if isinstance(each, ChannelEquilibriumCallback)]  # type: ignore[attr-defined]
            for name in ("dense", "dense again")
        ]
        assert [len(each) for each in found] == [1, 1]
        assert found[0][0] is not found[1][0]
        assert found[0][0].equilibrium.group_size == 8

    @pytest.mark.parametrize("name", ["resnet20", "resnet56", "vgg16_bn", "vgg11_bn"])
    def test_models_are_built_with_blocks(self, name: str) -> None:
        sizes = {"in_channels": 1, "image_size": 8, "num_classes": 10}
        kinds = {"ce": ChannelEquilibrium, "bd": BatchDecorrelation, "ir": InstanceReweighting}
        for norm, kind in kinds.items():
            net = instantiate(composed(f"model={name}", f"model.norm={norm}").model, **sizes)
            assert blocks_of(net)
            assert all(type(block.equilibrium) is kind for block in blocks_of(net).values())
            assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
        assert blocks_of(instantiate(composed(f"model={name}").model, **sizes)) == {}
        with pytest.raises(
            InstantiationException, match=re.escape("`norm` is one of 'bn', 'bd', 'ir', 'ce'; got 'foo'")
        ):
            instantiate(composed(f"model={name}", "model.norm=foo").model, **sizes)
