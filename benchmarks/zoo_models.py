"""The models of the zoo benchmark, as listed in zoo.csv; `python benchmarks/zoo_models.py` makes that list anew."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

TABLE = Path(__file__).with_name("zoo.csv")
SIDES = (64, 96, 128, 160, 192, 224)
ARGUMENTS = {"timm": ("", "img_size"), "torchvision": ("", "image_size", "input_size")}


@dataclass(frozen=True)
class Choice:
    """A model of the zoo.

    Attributes:
        library: "torchvision" or "timm".
        family: The module of the library that it comes from.
        name: What the library calls it.
        millions: Its parameters, in millions.
        pixels: The side of the smallest images that it accepts.
        default: The side of the images that it was made for.
        argument: The argument of its builder that takes the side, or "".
    """

    library: str
    family: str
    name: str
    millions: float
    pixels: int
    default: int
    argument: str = ""

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"

    def build(self, pixels: int = 0) -> nn.Module:
        """Build the untrained model for images of the smallest side, or of another one."""
        side = pixels or self.pixels
        further = {self.argument: (side, side) if self.argument == "input_size" else side} if self.argument else {}
        torch.manual_seed(0)
        if self.library == "timm":
            import timm

            return timm.create_model(self.name, pretrained=False, **further)
        import torchvision

        if self.family in ("googlenet", "inception"):
            further["init_weights"] = False  # scipy's truncated normal takes seconds
        return torchvision.models.get_model(self.name, weights=None, **further)


def images(pixels: int, batch: int = 2) -> Tensor:
    """Return random images, the same ones at each call."""
    return torch.rand(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(1)) - 0.5


@cache
def choices() -> tuple[Choice, ...]:
    """Return the models of the table."""
    kinds = {"millions": float, "pixels": int, "default": int}
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return tuple(Choice(**{key: kinds.get(key, str)(value) for key, value in row.items()}) for row in rows)


def search() -> Iterator[Choice]:
    """Find all classifiers of torchvision, and of each timm family the smallest that is no toy made for tests."""
    import timm
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        weights = torchvision.models.get_model_weights(name).DEFAULT
        family = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        side = 299 if family == "inception" else 224
        yield _smallest(Choice("torchvision", family, name, weights.meta["num_params"] / 1e6, side, side))
    for family in timm.list_modules():
        sizes = {name: _params(name) for name in timm.list_models(module=family)}
        name = min(sizes, key=lambda name: (name.startswith("test_"), sizes[name]))
        side = timm.get_pretrained_cfg(name).input_size[-1]
        yield _smallest(Choice("timm", family, name, sizes[name] / 1e6, side, side))


def _params(name: str) -> int:
    import timm

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name, pretrained=False).parameters())


def _smallest(choice: Choice) -> Choice:
    """Return the choice with the smallest side that it runs with in eval and in train mode."""
    for side in (*(side for side in SIDES if side < choice.default), choice.default):
        for argument in ARGUMENTS[choice.library]:
            trial = replace(choice, pixels=side, argument=argument, millions=round(choice.millions, 2))
            if _runs(trial, "meta") or _runs(trial, "cpu"):
                return trial
    raise ValueError(f"{choice} runs on no images of {SIDES} or {choice.default} pixels.")


def _runs(choice: Choice, device: str) -> bool:
    try:
        model, x = choice.build().to(device), images(choice.pixels).to(device)
        with torch.no_grad(), torch.device(device):
            for training in (False, True):
                model.train(training)
                model(x)
    except Exception:
        return False
    return True


if __name__ == "__main__":
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Choice)], lineterminator="\n")
        writer.writeheader()
        for choice in search():
            print(choice, choice.pixels, choice.argument, file=sys.stderr, flush=True)
            writer.writerow(asdict(choice))
