"""Image sets small enough to lie in memory, as Lightning data modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.workbench.augmentation import ShiftAndFlip
from lightning_prune.workbench.batches import EpochShuffle, TensorImages, TensorLoader, generator_for, loader
from lightning_prune.workbench.extras import optional

ImageSet = Literal["MNIST", "FashionMNIST", "CIFAR10"]


class Split(NamedTuple):
    """Images (n, channels, h, w), float in [0, 1], and labels (n,) of one split."""

    images: Tensor
    labels: Tensor


class MemoryImages(pl.LightningDataModule):
    """Three splits in memory, normalised by the training images; subclasses say in `read` where they come from.

    The order and the augmentation of the training images depend on the seed, the epoch and the batch only.

    Args:
        batch_size: Images in a batch, 1 or more.
        seed: Of the split, the order and the augmentation; 0 or more.
        augment: What is done to each training batch, or None.

    Attributes:
        in_channels: Colours of an image.
        image_size: Pixels per side.
        num_classes: How many labels there are.
    """

    in_channels: int
    image_size: int
    num_classes: int

    def __init__(self, batch_size: int, seed: int, augment: ShiftAndFlip | None = None) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`batch_size` is the images in a batch, 1 or more; got {batch_size}.")
        if seed < 0:
            raise ValueError(f"`seed` is 0 or more; got {seed}.")
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self._sets: tuple[TensorImages, ...] = ()
        self._black = torch.zeros(1)

    def read(self) -> tuple[Split, Split, Split]:
        """The training, validation and test images."""
        raise NotImplementedError(f"{type(self).__name__} must say in `read` where its images come from.")

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read the images once, whatever the stage."""
        if self._sets:
            return
        splits = self.read()
        std, mean = torch.std_mean(splits[0].images, dim=(0, 2, 3), correction=0, keepdim=True)
        self._sets = tuple(TensorImages(images.sub_(mean).div_(std), labels) for images, labels in splits)
        self._black = (-mean / std)[0]

    @override
    def train_dataloader(self) -> TensorLoader:
        """Training batches, shuffled anew each epoch."""
        images = self._set(0)
        return loader(images, self.batch_size, order=EpochShuffle(len(images), self.seed))

    @override
    def val_dataloader(self) -> TensorLoader:
        """Validation batches, in a fixed order."""
        return loader(self._set(1), self.batch_size)

    @override
    def test_dataloader(self) -> TensorLoader:
        """Test batches, in a fixed order."""
        return loader(self._set(2), self.batch_size)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment a training batch."""
        if self.augment is None or self.trainer is None or not self.trainer.training:
            return batch
        images, labels = batch
        # `batch_idx` is that of the batch before, and -1 at the start of an epoch
        here = (self.trainer.current_epoch, self.trainer.fit_loop.batch_idx + 1, self.trainer.global_rank)
        return self.augment(images, self._black, generator_for("augment", self.seed, *here)), labels

    def _set(self, index: int) -> TensorImages:
        self.setup()
        return self._sets[index]


class Digits(MemoryImages):
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn, split into 1,257 / 180 / 360.

    Source: Alpaydin, Kaynak 1998, "Optical recognition of handwritten digits", UCI.

    Args:
        batch_size: Images in a batch, 1 or more.
        seed: Of the split, which is stratified, and the order; 0 or more.

    Raises:
        ImportError: When it is set up, if scikit-learn is not installed.
    """

    in_channels = 1
    image_size = 8
    num_classes = 10

    def __init__(self, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__(batch_size, seed)

    @override
    def read(self) -> tuple[Split, Split, Split]:
        """The training, validation and test digits."""
        bunch = optional("sklearn.datasets", extra="digits").load_digits()
        split = optional("sklearn.model_selection", extra="digits").train_test_split
        images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
        labels = torch.tensor(bunch.target, dtype=torch.long)
        rest, test = split(range(len(labels)), test_size=360, stratify=labels, random_state=self.seed)
        train, val = split(rest, test_size=180, stratify=labels[rest], random_state=self.seed)
        return tuple(Split(images[part], labels[part]) for part in (train, val, test))  # type: ignore[return-value]


class TorchvisionImages(MemoryImages):
    """MNIST, FashionMNIST or CIFAR-10; the test split is the official one.

    Sources: LeCun et al. 1998 (MNIST); Xiao, Rasul, Vollgraf 2017 (Fashion-MNIST); Krizhevsky 2009 (CIFAR-10).

    Args:
        name: Which of the three.
        root: The folder that holds the set as torchvision lays it out, such as `<root>/MNIST/raw`.
        batch_size: Images in a batch, 1 or more.
        val_size: How many of the official training images make the validation split.
        seed: Of the validation split, the order and the augmentation; 0 or more.
        limit_train: Train on that many images only, or on all.
        augment: What is done to each training batch, or None.
        download: Fetch what is missing.

    Raises:
        ImportError: When it is set up, if torchvision is not installed.
        FileNotFoundError: When it is set up, if the set is not in `root`.
    """

    num_classes = 10

    def __init__(
        self,
        name: ImageSet = "MNIST",
        root: str | Path = "data",
        batch_size: int = 256,
        *,
        val_size: int = 5000,
        seed: int = 0,
        limit_train: int | None = None,
        augment: ShiftAndFlip | None = None,
        download: bool = False,
    ) -> None:
        super().__init__(batch_size, seed, augment)
        if name not in get_args(ImageSet):
            raise ValueError(f"`name` is one of {', '.join(get_args(ImageSet))}; got {name!r}.")
        if val_size < 1:
            raise ValueError(f"`val_size` is the images of the validation split, 1 or more; got {val_size}.")
        if limit_train is not None and limit_train < 1:
            raise ValueError(f"`limit_train` is the images to train on, 1 or more, or None; got {limit_train}.")
        self.in_channels, self.image_size = (3, 32) if name == "CIFAR10" else (1, 28)
        self.image_set = name
        self.root = Path(root).expanduser()
        self.val_size = val_size
        self.limit_train = limit_train
        self.download = download

    @override
    def prepare_data(self) -> None:
        """Download what is missing, if asked to."""
        if self.download:
            for train in (True, False):
                self._open(train=train, download=True)

    @override
    def read(self) -> tuple[Split, Split, Split]:
        """The training, validation and test images."""
        official, test = self._official(train=True), self._official(train=False)
        self._check_sizes(len(official.labels))
        order = torch.randperm(len(official.labels), generator=generator_for("split", self.seed))
        val, train = order[: self.val_size], order[self.val_size :][: self.limit_train]
        return (_part(official, train), _part(official, val), _part(test, torch.arange(len(test.labels))))

    def _check_sizes(self, official: int) -> None:
        left = official - self.val_size
        if left < 1:
            raise ValueError(f"`val_size` must leave some of the {official} images for training; got {self.val_size}.")
        if self.limit_train is not None and self.limit_train > left:
            raise ValueError(
                f"`limit_train` must be at most {left}, what `val_size={self.val_size}` leaves of {official} images; "
                f"got {self.limit_train}. Take None for all of them."
            )

    def _official(self, *, train: bool) -> Split:
        data = self._open(train=train, download=False)
        images = torch.as_tensor(data.data)
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
        return Split(images, torch.as_tensor(data.targets))

    def _open(self, *, train: bool, download: bool) -> Any:
        dataset = getattr(optional("torchvision.datasets", extra="vision"), self.image_set)
        try:
            return dataset(self.root, train=train, download=download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{self.image_set} is not in {self.root.absolute()}, or is damaged ({error}). Name the folder that "
                "holds it with data.root=<folder>, or fetch it with data.download=true."
            ) from error


def _part(whole: Split, rows: Tensor) -> Split:
    images = whole.images[rows].to(torch.float32, memory_format=torch.contiguous_format)
    return Split(images.div_(255), whole.labels[rows])
