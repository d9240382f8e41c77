"""Channel health with and without Channel Equilibrium (Shao et al. 2020): the paper's figure, and what it costs.

    python benchmarks/equilibrium.py --data ROOT [--seeds 0 1 2] [--out equilibrium.jsonl]
    python benchmarks/equilibrium.py --data ROOT --part resnet20
    python benchmarks/equilibrium.py --data ROOT --part ablation --out equilibrium_ablation.jsonl
    python benchmarks/equilibrium.py --data ROOT --part pruned --out equilibrium_pruned.jsonl
    python benchmarks/equilibrium.py --table --picture equilibrium.png [--out equilibrium.jsonl]

Part "decay": VGG-11 at a quarter of its width on FashionMNIST (10,000 training images, 8 epochs, SGD with a cosine
schedule from an LR of 0.1), behind each convolution BatchNorm alone, with batch decorrelation, or with Channel
Equilibrium, under weight decay from 1e-4 to 4e-2. Told are the test error; the share of channels whose response behind
norm, block and ReLU stays below 1e-2 on 2,000 test images, in the mean and at the most; the area under the cumulative
ablation curve, all layers losing channels alike, over 10 orders and 500 test images. Part "resnet20": the same for
ResNet-20 with BatchNorm, squeeze-and-excitation and Channel Equilibrium, 6 epochs, and parameters and MACs. Part
"ablation": the curve of the second and of the fourth norm of VGG-11 alone; all layers together fall to chance at once.
Part "pruned": the nets of both, with BatchNorm and with Channel Equilibrium, lose half of their MACs by the smallest
effective scales and by the smallest weights, at once, and are trained on for 2 epochs from an LR of 0.01; told is the
error right after the cut, and in the end.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from circumstances import circumstances, note
from papers_rows import Bench, Setting, Task, no_callbacks
from torch import nn
from torchvision.ops import SqueezeExcitation

from lightning_prune import prune
from lightning_prune.allocation import Global
from lightning_prune.callbacks.equilibrium import ChannelEquilibriumCallback
from lightning_prune.cost import count_macs, count_params
from lightning_prune.criteria import BNScale, Criterion, Magnitude
from lightning_prune.equilibrium import Where
from lightning_prune.inputs import Inputs
from lightning_prune.metrics import CumulativeAblationCurve, InhibitedChannels
from lightning_prune.workbench import VGG11BN, resnet20

DECAYS = (1e-4, 5e-3, 2e-2, 4e-2)
NORMS = ("bn", "bd", "ce")
NAMES = {"bn": "BatchNorm", "bd": "with batch decorrelation", "ce": "with Channel Equilibrium"}
VGG, RESNET = Setting(8, 0.1, limit=10_000), Setting(6, 0.1, limit=10_000)
SEEN, ABLATED = 2000, 500
LAYERS = ("features.5", "features.12")
CRITERIA: dict[str, Criterion] = {"scales": BNScale(), "weights": Magnitude()}


def squeezed() -> nn.Module:
    """ResNet-20 with squeeze-and-excitation behind the last norm of every block (Hu et al. 2018), a quarter as wide."""
    net = resnet20(1, 28)
    for stage in (net.stage1, net.stage2, net.stage3):
        for block in stage:
            channels = block.bn2.num_features
            block.bn2 = nn.Sequential(block.bn2, SqueezeExcitation(channels, max(channels // 4, 4)))
    return net


def task(net: str, norm: str, decay: float) -> Task:
    """A net, its images, and how it is trained."""
    make: Callable[[], nn.Module]
    if net == "vgg11":
        make, setting = partial(VGG11BN, 1, 28, width=0.25, norm=norm), VGG
    else:
        make, setting = squeezed if norm == "se" else partial(resnet20, 1, 28, norm=norm), RESNET
    setting = Setting(setting.epochs, setting.lr, decay, limit=setting.limit)
    return Task(f"{net}, {norm}, {decay:g}, FashionMNIST", make, "FashionMNIST", dense=setting, more=setting)


def rows(part: str) -> list[tuple[str, str, float]]:
    """Each net, norm and weight decay of a part."""
    if part == "decay":
        return [("vgg11", norm, decay) for decay in reversed(DECAYS) for norm in NORMS]
    return [("resnet20", norm, 5e-4) for norm in ("bn", "se", "ce")]


def trained(net: str, norm: str, decay: float, seed: int, bench: Bench) -> nn.Module:
    """The net, trained once and kept; blocks come by the callback, which takes weight decay off their mixing."""
    one = task(net, norm, decay)
    if norm != "ce":
        return bench.kept(one, seed, one.name, {"setting": str(one.dense)}, no_callbacks)
    kept = bench.cache / f"{one.name}-{seed}.pt"
    if kept.exists():
        model = one.make()
        model.load_state_dict(torch.load(kept, weights_only=True))
        return model
    torch.manual_seed(seed)
    model = task(net, "bn", decay).make()
    where: Where = "all" if net == "vgg11" else "auto"
    bench.train(model, one, seed, one.dense, [ChannelEquilibriumCallback(where)])
    torch.save(model.state_dict(), kept)
    return model


def measure(net: str, norm: str, decay: float, seed: int, bench: Bench) -> dict[str, object]:
    """Train, and look at the channels."""
    one, model = task(net, norm, decay), trained(net, norm, decay, seed, bench)
    found: dict[str, object] = {"net": net, "norm": norm, "decay": decay, "seed": seed}
    found |= {"error": bench.errors(model, one, seed)["error"]}
    found |= {"params": count_params(model), "macs": count_macs(model, Inputs((torch.zeros(1, 1, 28, 28),)))}
    data = bench.images(one, seed, replace(one.dense, batch_size=SEEN))
    images, labels = next(iter(data.test_dataloader()))
    inhibited = {form: InhibitedChannels(form=form) for form in ("mean", "max")}
    for metric in inhibited.values():
        metric.update(model, images)
    curve = CumulativeAblationCurve(seed=seed)
    curve.update(model, images[:ABLATED], labels[:ABLATED])
    found |= {f"inhibited, {form}": float(metric.compute()) for form, metric in inhibited.items()}
    found |= {"area": float(curve.area()), "curve": curve.compute().mean(0).tolist()}
    return {**found, **circumstances()}


def measure_layer(net: str, norm: str, decay: float, layer: str, seed: int, bench: Bench) -> dict[str, object]:
    """Silence the channels of one layer alone."""
    one, model = task(net, norm, decay), trained(net, norm, decay, seed, bench)
    data = bench.images(one, seed, replace(one.dense, batch_size=ABLATED))
    curve = CumulativeAblationCurve(seed=seed, layers=[layer])
    curve.update(model, *next(iter(data.test_dataloader())))
    found = {"net": net, "norm": norm, "decay": decay, "seed": seed, "layer": layer, "area": float(curve.area())}
    return {**found, "curve": curve.compute().mean(0).tolist(), **circumstances()}


def prune_rows() -> list[tuple[str, str, float, str]]:
    """Each net, norm, weight decay and criterion."""
    nets = [("vgg11", norm, 5e-3) for norm in ("bn", "ce")] + [("resnet20", norm, 5e-4) for norm in ("bn", "ce")]
    return [(*net, criterion) for net in nets for criterion in CRITERIA]


def measure_pruned(net: str, norm: str, decay: float, criterion: str, seed: int, bench: Bench) -> dict[str, object]:
    """Train, cut, and train on."""
    one, model = task(net, norm, decay), trained(net, norm, decay, seed, bench)
    example, errors = torch.zeros(2, 1, 28, 28), [bench.errors(model, one, seed)["error"]]
    record = prune(
        model, example, pruning_ratio=0.5, of="macs", criterion=CRITERIA[criterion], allocation=Global(event_cap=0.9)
    )
    errors.append(bench.errors(model, one, seed)["error"])
    bench.train(model, one, seed, Setting(2, 0.01, 1e-4, limit=one.dense.limit))
    found = {"net": net, "norm": norm, "decay": decay, "seed": seed, "criterion": criterion, "reached": record.reached}
    told = zip(("error", "right after", "tuned"), [*errors, bench.errors(model, one, seed)["error"]], strict=True)
    return {**found, **dict(told), **circumstances()}


def table(out: Path) -> str:
    """A line for each net, norm and weight decay: mean +- standard deviation over seeds."""
    found: dict[tuple[str, float, str], list[dict[str, float]]] = {}
    for line in out.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault((row["net"], row["decay"], row["norm"]), []).append(row)
    lines = [
        "| net | weight decay | norm | test error, % | inhibited (mean), % | inhibited (max), % | CAC area |",
        "|---|---|---|---|---|---|---|",
    ]
    for (net, decay, norm), runs in sorted(found.items()):
        cells = [
            told([scale * run[key] for run in runs])
            for key, scale in (("error", 1), ("inhibited, mean", 100), ("inhibited, max", 100), ("area", 100))
        ]
        lines.append(f"| {net} | {decay:g} | {norm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pruned_table(out: Path) -> str:
    """A line for each net, norm and criterion: errors around the cut, mean +- standard deviation over seeds."""
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for line in out.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row["lost"] = row["tuned"] - row["error"]
        found.setdefault((row["net"], row["norm"], row["criterion"]), []).append(row)
    lines = [
        "| net | norm | smallest go | before, % | right after | 2 epochs on | lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for names, runs in sorted(found.items()):
        cells = [told([run[key] for run in runs]) for key in ("error", "right after", "tuned", "lost")]
        lines.append(f"| {' | '.join(names)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(out: Path, path: Path) -> None:
    """Draw inhibited channels and errors against weight decay, and ablation curves; means and spreads over seeds."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["net"] == "vgg11"]
    decays = sorted({row["decay"] for row in rows})
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for norm, colour in zip(NORMS, ("#9a9a9a", "#4c8fbd", "#c2543d"), strict=True):
        place, look = range(len(decays)), {"color": colour, "label": NAMES[norm]}
        of = {decay: [row for row in rows if (row["norm"], row["decay"]) == (norm, decay)] for decay in decays}
        for axes, key, scale in ((left, "inhibited, mean", 100), (middle, "error", 1)):
            values = [[scale * row[key] for row in of[decay]] for decay in decays]
            spreads = [stdev(each) if len(each) > 1 else 0.0 for each in values]
            axes.errorbar(place, [mean(each) for each in values], spreads, marker="o", capsize=3, **look)
        curve = [100 * mean(each) for each in zip(*(row["curve"] for row in of[decays[0]]), strict=True)]
        right.plot([10 * fraction for fraction in range(len(curve))], curve, **look)
    left.set(title="Inhibited channels (mean response < 0.01)", xlabel="weight decay", ylabel="%", ylim=(0, None))
    middle.set(title="Test error", xlabel="weight decay", ylabel="%")
    right.set(title=f"Ablation, weight decay {decays[0]:g}", xlabel="% of each layer", ylabel="test accuracy, %")
    for axes in (left, middle):
        axes.set_xticks(range(len(decays)), [f"{decay:g}" for decay in decays])
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)


def told(values: list[float]) -> str:
    """Mean and spread."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def tell(out: Path, result: dict[str, object]) -> None:
    """Write a row down, and print it."""
    note(out, result)
    print(json.dumps({key: result[key] for key in result if key not in circumstances()}), flush=True)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with FashionMNIST/raw")
    parser.add_argument("--part", choices=("decay", "resnet20", "ablation", "pruned"), default="decay")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("equilibrium.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path("papers_cache"), help="folder of trained weights")
    parser.add_argument("--only-train", action="store_true", help="train and keep the weights, and measure later")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--picture", type=Path, help="draw what stands in the file, with matplotlib")
    given = parser.parse_args()
    if given.picture:
        picture(given.out, given.picture)
    if given.table:
        print(pruned_table(given.out) if given.part == "pruned" else table(given.out))
    if given.table or given.picture:
        return
    if given.data is None:
        parser.error("--data ROOT says where the images lie")
    warnings.simplefilter("ignore")
    bench = Bench(given.data, given.cache)
    there = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    if given.part == "ablation":
        known_layers = {(row["net"], row["norm"], row["decay"], row["layer"], row["seed"]) for row in there}
        for seed, decay, layer, norm in product(given.seeds, (1e-4, 2e-2), LAYERS, ("bn", "ce")):
            if ("vgg11", norm, decay, layer, seed) not in known_layers:
                tell(given.out, measure_layer("vgg11", norm, decay, layer, seed, bench))
        return
    if given.part == "pruned":
        known_cuts = {(row["net"], row["norm"], row["decay"], row["criterion"], row["seed"]) for row in there}
        for seed in given.seeds:
            for cut in prune_rows():
                if (*cut, seed) not in known_cuts:
                    tell(given.out, measure_pruned(*cut, seed, bench))
        return
    known = {(row["net"], row["norm"], row["decay"], row["seed"]) for row in there}
    for seed in given.seeds:
        for row in rows(given.part):
            if given.only_train:
                trained(*row, seed, bench)
            elif (*row, seed) not in known:
                tell(given.out, measure(*row, seed, bench))


if __name__ == "__main__":
    main()
