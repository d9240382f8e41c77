"""The workbench: known parameter counts, splits, orders, resuming, accuracy around a cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune.workbench import (
    VGG16BN,
    Classifier,
    CutProbe,
    Digits,
    LeNet5,
    LeNet300,
    ShiftAndFlip,
    TorchvisionImages,
    extras,
    probe,
    resnet20,
    resnet56,
    torchvision_model,
)
from lightning_prune.workbench.augmentation import shifted
from lightning_prune.workbench.batches import EpochShuffle, TensorImages, loader
from lightning_prune.workbench.models import PaddedShortcut
from lightning_prune.workbench.probe import evaluating

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # Lightning 2.6 on torch 2.14
]

NETS: dict[str, Callable[..., nn.Module]] = {
    "lenet300": LeNet300,
    "lenet5": LeNet5,
    "vgg16bn": partial(VGG16BN, width=0.125),
    "resnet20-A": partial(resnet20, option="A", width=0.5),
    "resnet20-B": partial(resnet20, option="B", width=0.5),
    "resnet56": partial(resnet56, width=0.25),
}


def parameters(net: nn.Module, of: type[nn.Module] = nn.Module) -> int:
    owners = [module for module in net.modules() if isinstance(module, of)]
    return sum(p.numel() for p in {p for module in owners for p in module.parameters(recurse=of is nn.Module)})


def data_root() -> Path | None:
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("LIGHTNING_PRUNE_DATA", shared))
    return root if (root / "MNIST" / "raw").is_dir() else None


def classifier(seed: int = 0, lr: float = 0.05) -> Classifier:
    pl.seed_everything(seed, verbose=False)
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    return Classifier(LeNet5(1, 8, 10), num_classes=10, optimizer=optimizer)


def trainer(**settings: object) -> pl.Trainer:
    quiet: dict[str, object] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**(quiet | settings))  # type: ignore[arg-type]


# networks


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("image_size", [8, 28, 32])
@pytest.mark.parametrize("name", NETS)
def test_every_net_takes_every_image(name: str, image_size: int, in_channels: int) -> None:
    net = NETS[name](in_channels=in_channels, image_size=image_size, num_classes=7)
    assert net(torch.randn(2, in_channels, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("net", "count"),
    [
        (LeNet300(1, 28, 10), 266_610),
        (LeNet5(1, 28, 10), 431_080),
        (resnet20(option="A"), 269_722),
        (resnet20(option="B"), 269_722 + 16 * 32 + 32 * 64 + 2 * 32 + 2 * 64),
        (resnet56(option="A"), 853_018),
    ],
    ids=["lenet300", "lenet5", "resnet20-A", "resnet20-B", "resnet56-A"],
)
def test_parameters_as_published(net: nn.Module, count: int) -> None:
    assert parameters(net) == count


def test_vgg16_has_13_convolutions_and_the_published_weights() -> None:
    net = VGG16BN(3, 32, 10)
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 13
    assert all(conv.bias is None for conv in convolutions)
    assert parameters(net, nn.Conv2d) == 14_710_464


def test_vgg16_starts_from_the_bn_scale_it_is_given() -> None:
    scales = [m.weight for m in VGG16BN(width=0.125, bn_scale=0.5).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(scales) == 13
    assert all(bool((scale == 0.5).all()) for scale in scales)


def test_width_scales_the_channels() -> None:
    assert VGG16BN(width=0.25).classifier.in_features == 128
    assert resnet20(width=2).fc.in_features == 128


def test_padded_shortcut_keeps_every_second_pixel_and_adds_zeros() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    y = PaddedShortcut(stride=2, extra=1)(x)
    assert y.tolist() == [[[[0, 2], [8, 10]], [[0, 0], [0, 0]]]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeNet5(1, 3, 10), r"`image_size` .* got 3\. Enlarge"),
        (lambda: LeNet300(0, 28, 10), r"`in_channels` .* got 0\."),
        (lambda: resnet20(num_classes=0), r"`num_classes` .* got 0\."),
        (lambda: VGG16BN(width=0), r"`width` .* got 0\."),
        (lambda: resnet20(option="C"), r"`option` .* got 'C'\."),  # type: ignore[arg-type]
    ],
)
def test_nets_refuse_wrong_sizes(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_torchvision_model_takes_other_colours() -> None:
    pytest.importorskip("torchvision")
    net = torchvision_model("squeezenet1_1", num_classes=5, in_channels=1).eval()
    assert net(torch.randn(1, 1, 64, 64)).shape == (1, 5)


def test_torchvision_model_suggests_near_names() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=r"got 'resnet19'\. Near matches: .*resnet18"):
        torchvision_model("resnet19", num_classes=5)


def test_a_missing_package_names_its_extra() -> None:
    with pytest.raises(ImportError, match=r"pip install lightning-prune\[vision\]"):
        extras.optional("a_package_nobody_has", extra="vision")


# batches


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        shuffle = EpochShuffle(50, seed)
        shuffle.set_epoch(epoch)
        torch.rand(epoch + seed)
        return list(shuffle)

    assert order(1, 2) == order(1, 2)
    assert sorted(order(1, 2)) == list(range(50))
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_a_pass_leaves_the_global_generator_alone() -> None:
    batches = loader(TensorImages(torch.arange(6), torch.arange(6)), 4)
    state = torch.get_rng_state()
    assert [images.tolist() for images, _ in batches] == [[0, 1, 2, 3], [4, 5]]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_restored_loader_goes_on_in_the_same_epoch_only() -> None:
    data = TensorImages(torch.arange(6), torch.arange(6))
    first = loader(data, 2, order=EpochShuffle(6, 0))
    whole = [images.tolist() for images, _ in first]
    passing = iter(first)
    next(passing)
    state = first.state_dict()
    assert state == {"epoch": 0, "seen": 1}

    again = loader(data, 2, order=EpochShuffle(6, 0))
    again.load_state_dict(state)
    assert [images.tolist() for images, _ in again] == whole[1:]
    assert [images.tolist() for images, _ in again] == whole

    order = EpochShuffle(6, 0)
    later = loader(data, 2, order=order)
    later.load_state_dict(state)
    order.set_epoch(1)
    assert len(list(later)) == 3


# augmentation


def test_shift_moves_up_and_left_and_lets_black_in() -> None:
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    moved = shifted(image.repeat(2, 1, 1, 1), torch.tensor([[1, 0], [0, -1]]), black=torch.full((1, 1, 1), -9.0))
    assert moved[0, 0].tolist() == [[3, 4], [-9, -9]]
    assert moved[1, 0].tolist() == [[-9, 1], [-9, 3]]


def test_augmentation_follows_its_generator() -> None:
    images, black = torch.rand(64, 3, 8, 8), torch.zeros(3, 1, 1)
    augment = ShiftAndFlip(shift=2, flip=True)
    once, twice = (augment(images, black, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(once, twice)
    assert once.shape == images.shape
    assert not torch.equal(once, images)


def test_flip_mirrors_some_images_and_leaves_the_others() -> None:
    images = torch.rand(64, 1, 4, 4)
    flipped = ShiftAndFlip(flip=True)(images, torch.zeros(1, 1, 1), torch.Generator().manual_seed(0))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 16 < int(mirrored.sum()) < 48


# data modules


def images_of(batches: object) -> Tensor:
    return torch.cat([images for images, _ in batches])  # type: ignore[attr-defined]


def digit_rows(data: Digits) -> list[set[bytes]]:
    data.setup()
    return [{image.numpy().tobytes() for image in part.tensors[0]} for part in data._sets]


def test_digits_are_split_without_overlap_and_in_fixed_sizes() -> None:
    pytest.importorskip("sklearn")
    data = Digits()
    train, val, test = digit_rows(data)
    assert [len(part) for part in data._sets] == [1257, 180, 360]
    assert not train & val
    assert not (train | val) & test


def test_digits_split_depends_on_the_seed_only() -> None:
    pytest.importorskip("sklearn")
    one, same, other = (images_of(Digits(seed=seed).test_dataloader()) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_digits_are_standardised_by_the_training_images_and_stratified() -> None:
    pytest.importorskip("sklearn")
    data = Digits()
    data.setup()
    images, labels = data._sets[0].tensors
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std()) == pytest.approx(1, abs=1e-3)
    assert labels.bincount().min() >= 120


def test_mnist_has_the_official_test_split() -> None:
    pytest.importorskip("torchvision")
    root = data_root()
    if root is None:
        pytest.skip("MNIST not found: set LIGHTNING_PRUNE_DATA to the folder that holds MNIST/raw")
    data = TorchvisionImages("MNIST", root, val_size=100, limit_train=500)
    images, labels = next(iter(data.test_dataloader()))
    assert [len(part) for part in data._sets] == [500, 100, 10_000]
    assert images.shape == (256, data.in_channels, data.image_size, data.image_size)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]
    with pytest.raises(ValueError, match=r"`limit_train` must be at most 59900"):
        TorchvisionImages("MNIST", root, val_size=100, limit_train=60_000).setup()


def test_cifar_comes_with_its_colours_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8)
    official = SimpleNamespace(data=pixels.numpy(), targets=[i % 10 for i in range(20)])
    monkeypatch.setattr(TorchvisionImages, "_open", lambda *_, **__: official)
    data = TorchvisionImages("CIFAR10", val_size=5)
    images, labels = next(iter(data.test_dataloader()))
    train = data._sets[0].tensors[0]
    assert images.shape == (20, data.in_channels, data.image_size, data.image_size)
    assert labels.tolist() == official.targets
    assert train.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert torch.equal(images[3, 1] > images[3, 1].mean(), pixels[3, :, :, 1] > pixels[3, :, :, 1].float().mean())


def test_a_missing_set_says_where_it_was_looked_for(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}.*data\.root=.*data\.download=true"):
        TorchvisionImages("MNIST", tmp_path).setup()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Digits(batch_size=0), r"`batch_size` .* got 0\."),
        (lambda: Digits(seed=-1), r"`seed` .* got -1\."),
        (lambda: TorchvisionImages("MINST"), r"`name` is one of MNIST.* got 'MINST'\."),  # type: ignore[arg-type]
        (lambda: TorchvisionImages(val_size=0), r"`val_size` .* got 0\."),
        (lambda: TorchvisionImages(limit_train=0), r"`limit_train` .* got 0\."),
        (lambda: ShiftAndFlip(shift=-1), r"`shift` .* got -1\."),
        (lambda: Classifier(nn.Identity(), 1, optimizer=torch.optim.SGD), r"`num_classes` .* got 1\."),
        (
            lambda: Classifier(nn.Identity(), 10, optimizer=torch.optim.SGD, label_smoothing=1.0),
            r"`label_smoothing` .* got 1\.0\.",
        ),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# training


def test_classifier_learns_digits_in_two_epochs() -> None:
    pytest.importorskip("sklearn")
    fit = trainer(max_epochs=2)
    model = classifier()
    fit.fit(model, datamodule=Digits())
    assert float(fit.callback_metrics["val/acc"]) > 0.8
    assert {"train/loss", "train/acc", "val/loss"} <= fit.callback_metrics.keys()
    fit.test(model, datamodule=Digits(), verbose=False)
    assert float(fit.callback_metrics["test/acc"]) > 0.8


def test_lr_scheduler_steps_after_each_epoch() -> None:
    pytest.importorskip("sklearn")
    model = Classifier(
        LeNet300(1, 8, 10),
        num_classes=10,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.1),
        example=torch.zeros(1, 1, 8, 8),
    )
    fit = trainer(max_epochs=2, limit_train_batches=3, limit_val_batches=1)
    fit.fit(model, datamodule=Digits())
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)
    assert model(model.example_input_array).shape == (1, 10)


class Watch(pl.Callback):
    """Keeps the training images, batch by batch."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self.batches.append(batch[0])  # type: ignore[index]


def test_lightning_tells_the_order_its_epoch() -> None:
    pytest.importorskip("sklearn")
    watched, expected = Watch(), Digits(batch_size=256, seed=4).train_dataloader()
    trainer(max_epochs=2, callbacks=[watched]).fit(classifier(), datamodule=Digits(batch_size=256, seed=4))
    expected.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert all(torch.equal(seen, images) for seen, (images, _) in zip(watched.batches[5:], expected, strict=True))
    assert not torch.equal(watched.batches[0], watched.batches[5])


def augmented_digits() -> Digits:
    data = Digits(batch_size=256)
    data.augment = ShiftAndFlip(shift=1)
    return data


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.parametrize("steps", [3, 5, 7], ids=["mid first epoch", "end of epoch", "mid second epoch"])
def test_a_killed_run_ends_where_the_unbroken_one_ends(tmp_path: Path, steps: int) -> None:
    pytest.importorskip("sklearn")
    unbroken, watched = classifier(), Watch()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(max_epochs=3, callbacks=[watched, keep], enable_checkpointing=True).fit(
        unbroken, datamodule=augmented_digits()
    )

    resumed, rest = classifier(seed=1), Watch()
    checkpoint = tmp_path / f"step={steps}.ckpt"
    trainer(max_epochs=3, callbacks=[rest]).fit(resumed, datamodule=augmented_digits(), ckpt_path=str(checkpoint))

    assert len(watched.batches) == 15
    assert len(rest.batches) == 15 - steps
    assert all(torch.equal(a, b) for a, b in zip(watched.batches[steps:], rest.batches, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True))


# the probe


class FakeCut(pl.Callback):
    """Says at each given (epoch, batch) that it cut, and forgets all that was learned if it `forgets`."""

    def __init__(self, *when: tuple[int, int], forgets: bool = True) -> None:
        self.when = when
        self.forgets = forgets
        self.history: list[str] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) in self.when:
            self.history.append("cut")
            if not self.forgets:
                return
            for parameter in pl_module.parameters():
                nn.init.zeros_(parameter)
            nn.init.constant_(pl_module.net.fc2.bias[:1], 1.0)  # type: ignore[union-attr, index]


def probed(cut: FakeCut, monkeypatch: pytest.MonkeyPatch, **settings: object) -> tuple[CutProbe, pl.Trainer]:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(probe, "history_of", lambda module: tuple(cut.history))
    watch = CutProbe()
    fit = trainer(max_epochs=3, callbacks=[cut, watch], **settings)
    fit.fit(classifier(), datamodule=Digits())
    return watch, fit


def test_probe_notes_accuracy_around_each_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, _ = probed(FakeCut((1, 0), (2, 5)), monkeypatch)
    zeros = float((torch.cat([labels for _, labels in Digits().val_dataloader()]) == 0).float().mean())
    assert watch.before is not None
    assert watch.before > 0.6
    assert watch.after == pytest.approx([zeros, zeros])


def test_probe_without_a_validation_before_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, _ = probed(FakeCut((0, 0)), monkeypatch)
    assert watch.before is None
    assert len(watch.after) == 1


def test_probe_without_a_cut_notes_the_last_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, fit = probed(FakeCut(), monkeypatch)
    assert watch.before == pytest.approx(float(fit.callback_metrics["val/acc"]))
    assert watch.after == []


def test_probe_measures_the_batches_that_validation_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, _ = probed(FakeCut((1, 0)), monkeypatch, limit_val_batches=1)
    labels = next(iter(Digits().val_dataloader()))[1]
    assert watch.after == pytest.approx([float((labels == 0).float().mean())])


class GlobalDigits(Digits):
    """Digits whose validation loader draws from the global generator at each pass, as a plain one does."""

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:  # type: ignore[override]
        return DataLoader(self._set(1), 64, collate_fn=tuple)


def test_probe_leaves_training_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    ends: list[tuple[Tensor, ...]] = []
    for cuts in ((), tuple((0, batch) for batch in range(20))):
        cut = FakeCut(*cuts, forgets=False)
        monkeypatch.setattr(probe, "history_of", lambda _, cut=cut: tuple(cut.history))
        watch, model = CutProbe(), classifier()
        trainer(max_epochs=1, callbacks=[cut, watch]).fit(model, datamodule=GlobalDigits())
        assert len(watch.after) == len(cuts)
        ends.append((*model.parameters(), torch.get_rng_state()))
    assert all(torch.equal(plain, watched) for plain, watched in zip(*ends, strict=True))


def test_probe_survives_a_checkpoint() -> None:
    watch, restored = CutProbe(), CutProbe()
    watch.before, watch.after = 0.9, [0.5]
    restored.load_state_dict(watch.state_dict())
    assert (restored.before, restored.after) == (0.9, [0.5])


def test_evaluating_puts_every_mode_back() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    net[0].eval()
    with evaluating(net):
        assert not net[1].training
        assert not torch.is_grad_enabled()
    assert (net.training, net[0].training, net[1].training) == (True, False, True)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_probe_says_that_it_needs_validation_images(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = FakeCut((0, 0))
    monkeypatch.setattr(probe, "history_of", lambda module: tuple(cut.history))
    images = loader(TensorImages(torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)), 4)
    with pytest.raises(ValueError, match="`CutProbe` measures on validation images; got none"):
        trainer(max_epochs=1, callbacks=[cut, CutProbe()], limit_val_batches=0).fit(classifier(), images)
