"""What exported files give: equal outputs, and the latency of onnxruntime beside torch's, dense and pruned.

    python benchmarks/exports.py [--out exports.json] [--threads 1]
    python benchmarks/exports.py --table [--out exports.json]

Networks of torchvision with random weights lose half of their MACs by magnitude, are written to ONNX and as
torch.export programs at 224 x 224, and are checked on random images. The four latencies of a network, at batch 1, are
taken in turns; told is the median of the rounds, and the quartiles of the ratio of dense and pruned within each round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from statistics import median, quantiles

import torch
import torchvision
from circumstances import circumstances
from torch import nn

from lightning_prune import prune
from lightning_prune.cost import count_macs, count_params, measure_latency
from lightning_prune.exporting import export, onnx_latency
from lightning_prune.inputs import Inputs

NETS = ("resnet18", "mobilenet_v3_large", "efficientnet_b0", "vit_b_16", "convnext_tiny")
IMAGES = Inputs((torch.zeros(1, 3, 224, 224),))


def lively(name: str) -> nn.Module:
    """Build a network whose output is another for each image; as torchvision builds them, equality would say nothing.

    ViT's head begins with zeros and the blocks of ConvNeXt with a scale of 1e-6; and what BatchNorm has not seen
    vanishes in eval mode on its way through a deep network.
    """
    torch.manual_seed(0)
    net: nn.Module = torchvision.models.get_model(name)
    for part, parameter in net.named_parameters():
        if "layer_scale" in part or part == "heads.head.weight":
            nn.init.normal_(parameter, std=0.3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net(torch.randn(8, 3, 224, 224))
    return net.eval()


def measure(name: str, rounds: int, folder: Path) -> dict[str, object]:
    """Write one network dense and pruned, and time both with both engines."""
    dense = lively(name)
    nets = {"dense": dense, "pruned": deepcopy(dense)}
    record = prune(nets["pruned"], IMAGES.args[0], pruning_ratio=0.5, of="macs", round_to=8)
    files, differences = {}, {}
    for kind, net in nets.items():
        done = export(net, folder / f"{name}_{kind}.onnx", example_inputs=IMAGES.args[0])
        other = export(net, folder / f"{name}_{kind}.pt2", format="torch_export", example_inputs=IMAGES.args[0])
        files[kind], differences[kind] = done.path, {"onnx": done.difference, "torch_export": other.difference}
    times: dict[str, dict[str, list[float]]] = {kind: {"torch": [], "onnxruntime": []} for kind in nets}
    for _ in range(rounds):
        for kind, net in nets.items():
            times[kind]["torch"].append(measure_latency(net, IMAGES, seconds=0.4))
            times[kind]["onnxruntime"].append(onnx_latency(files[kind], IMAGES, seconds=0.4))
    ratios = {
        engine: [dense / left for dense, left in zip(times["dense"][engine], times["pruned"][engine], strict=True)]
        for engine in ("torch", "onnxruntime")
    }
    return {
        "net": name,
        "reached": record.reached,
        "params": {kind: count_params(net) for kind, net in nets.items()},
        "macs": {kind: count_macs(net, IMAGES) for kind, net in nets.items()},
        "difference": differences,
        "latency_ms": {kind: {engine: median(each) for engine, each in found.items()} for kind, found in times.items()},
        "dense over pruned": {engine: quantiles(each, n=4) for engine, each in ratios.items()},
        **circumstances(),
    }


def table(rows: list[dict[str, dict[str, dict[str, float]]]]) -> str:
    """Tell the rows as a table."""
    lines = [
        "| network | MACs left | params left | torch, dense -> pruned | onnxruntime, dense -> pruned | off by |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        left = [f"{row[name]['pruned'] / row[name]['dense']:.0%}" for name in ("macs", "params")]  # type: ignore[operator]
        speed = []
        for engine in ("torch", "onnxruntime"):
            dense, pruned = (row["latency_ms"][kind][engine] for kind in ("dense", "pruned"))
            low, middle, high = row["dense over pruned"][engine]
            speed.append(f"{dense:.1f} -> {pruned:.1f} ms ({middle:.2f}x, {low:.2f} to {high:.2f})")
        worst = max(value for kind in row["difference"].values() for value in kind.values())
        lines.append(f"| {row['net']} | {' | '.join([*left, *speed])} | {worst:.0e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        torch.set_num_threads(given.threads)
        warnings.simplefilter("ignore")
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for name in NETS:
                rows.append(measure(name, given.rounds, Path(folder)))
                given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(given.out.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
