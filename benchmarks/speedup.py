"""What a cut buys: latency measured against MACs, and a cut network beside one that was built narrow.

    python benchmarks/speedup.py [model ...] [--shares 0.25 0.5 0.75] [--pixels 128] [--rounds 20] [--round-to 8]
                                 [--compile resnet18 mobilenet_v2 vit_b_16] [--out speedup.jsonl] [--quick] [--table]

Networks of torchvision with random weights lose a share of their MACs to `prune` by magnitude, widths in multiples of
`--round-to`, and run on one image of 3 x `--pixels` x `--pixels`, on one thread: in torch, compiled by torch.compile
where `--compile` names them, and in onnxruntime.

Beside the dense and the cut network runs one **built narrow**: the dense architecture is built once more, and each
module of another width is made by its own constructor in the sizes of the cut network; none of its tensors has ever
been through a cut (`speedup_nets.py`). It is given the values of the cut one, and must return the same. Where pruned /
narrow is 1.00, a cut leaves nothing behind: no gathers, views or masks. It is checked without a clock too: both must
do the same operations, on tensors of the same strides, and give the same ONNX file. A fourth network, `again`, is a
copy of the narrow one: narrow / again says how far from 1.00 noise gets.

In each round each network runs once without being timed and then a few times with the CPU time of the process being
taken, of which the median is kept; the order rotates from round to round, and turns about. Told are medians of the
ratios within a round, and their quartiles. Each row is written at once; rows that the file has are not measured again;
what fails leaves its error in a row. `--table` prints what the file has, `--quick` is a small trial that keeps no file.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from filecmp import cmp
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from circumstances import circumstances, installed, note, noted
from layout import markdown, middle
from speedup_nets import added_biases, classifier, left_behind, livened, narrow_of
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.cost import count_macs, count_params
from lightning_prune.exporting import export
from lightning_prune.exporting.formats import feed, session_of
from lightning_prune.inputs import Inputs

HERE = Path(__file__).resolve().parent
MODELS = (
    *("resnet18", "resnet50", "vgg16_bn", "densenet121", "mobilenet_v2", "mobilenet_v3_large"),
    *("efficientnet_b0", "convnext_tiny", "vit_b_16", "regnet_y_400mf"),
)
COMPILED = ("resnet18", "mobilenet_v2", "vit_b_16")
KINDS = ("dense", "pruned", "narrow", "again")
TURN = 0.03
"""CPU seconds that a network's turn takes, about; it runs three times at least."""
REOPENED = 5
"""After so many rounds ONNX files are opened anew: where a session's weights lie makes some percent, until it ends."""

Row = dict[str, Any]
Nets = Mapping[str, nn.Module]
Calls = dict[str, Callable[[], object]]
Opened = Callable[[], Calls]
"""Opens what an engine runs, once more each time."""


def eager(nets: Nets, images: Tensor, folder: Path) -> Opened:
    """Run in torch."""
    calls: Calls = {kind: lambda net=net: net(images) for kind, net in nets.items()}  # type: ignore[misc]
    return lambda: calls


def compiled(nets: Nets, images: Tensor, folder: Path) -> Opened:
    """Run what torch.compile makes; nothing may fall back to torch."""
    torch._dynamo.reset()  # else the eighth network of one class is no longer compiled
    return eager(
        {kind: torch.compile(net, fullgraph=True, dynamic=False) for kind, net in nets.items()}, images, folder
    )


def onnxruntime(nets: Nets, images: Tensor, folder: Path) -> Opened:
    """Run ONNX files, which are written where they are not yet; `again` opens the narrow network's once more."""
    paths = {kind: folder / f"{'narrow' if kind == 'again' else kind}.onnx" for kind in nets}
    for kind, path in paths.items():
        if not path.exists():
            export(nets[kind], path, example_inputs=images, batch="fixed")

    def call(path: Path) -> Callable[[], object]:
        session = session_of(path, torch.get_num_threads())
        arrays = feed(session, Inputs((images,)))
        return lambda: session.run(None, arrays)

    return lambda: {kind: call(path) for kind, path in paths.items()}


Engine = Callable[[Nets, Tensor, Path], Opened]
ENGINES: dict[str, Engine] = {"torch": eager, "torch.compile": compiled, "onnxruntime": onnxruntime}


def order(number: int) -> list[str]:
    """Who runs when in a round: the first one changes, and every second round goes backwards."""
    first = number // 2 % len(KINDS)
    turned = [*KINDS[first:], *KINDS[:first]]
    return turned[::-1] if number % 2 else turned


def timed(opened: Opened, rounds: int) -> dict[str, list[float]]:
    """Return the CPU milliseconds of each network in each round."""
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with torch.inference_mode():
        calls = opened()
        repeats = {kind: max(3, min(50, round(TURN / _turn(call, 2)))) for kind, call in calls.items()}
        gc.collect()
        gc.disable()
        try:
            for number in range(rounds):
                if number and number % REOPENED == 0:
                    calls = opened()
                for kind in order(number):
                    times[kind].append(round(_turn(calls[kind], repeats[kind]) * 1e3, 5))
        finally:
            gc.enable()
    return times


def _turn(call: Callable[[], object], repeats: int) -> float:
    """Return the CPU seconds of a call, in the median of some, after one that is not timed."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return median(times)


class Measurement:
    """Measures one model: its networks are built when the first row asks for them, and kept for the others.

    Args:
        build: Builds it with fresh weights.
        images: What it runs with.
        given: The command's arguments: `round_to`, `rounds`.
        folder: Where its ONNX files may lie.
    """

    def __init__(self, build: Callable[[], nn.Module], images: Tensor, given: argparse.Namespace, folder: Path) -> None:
        self._build, self._images, self._given, self._folder = build, images, given, folder
        self._dense: nn.Module | None = None
        self._cut: tuple[float, Nets, Row] | None = None

    def row(self, share: float, engine: str) -> Row:
        """Return what is found for a share and an engine; what goes wrong is a finding too."""
        if engine == "onnxruntime" and installed("onnxruntime") is None:
            return {"skipped": "onnxruntime is not installed"}
        try:
            nets, known = self._nets(share)
            folder = self._folder_of(share, engine)
            opened = ENGINES[engine](nets, self._images, folder)
            if engine == "onnxruntime":
                known = {**known, "same file": cmp(folder / "pruned.onnx", folder / "narrow.onnx", shallow=False)}
            return {**known, "ms": timed(opened, self._given.rounds)}
        except Exception as error:
            lines = str(error).strip().splitlines()
            return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}

    def _nets(self, share: float) -> tuple[Nets, Row]:
        if self._cut is None or self._cut[0] != share:
            if self._dense is None:
                torch.manual_seed(0)
                self._dense = livened(self._build(), self._images.shape[-1])
            self._cut = (share, *self._made(self._dense, share))
        return self._cut[1:]

    def _made(self, dense: nn.Module, share: float) -> tuple[Nets, Row]:
        """Return the networks, and what is to be told of them."""
        pruned, images = deepcopy(dense), self._images
        prune(pruned, images, pruning_ratio=share, of="macs", round_to=self._given.round_to)
        narrow = narrow_of(self._build(), pruned)
        nets = {"dense": dense, "pruned": pruned, "narrow": narrow, "again": deepcopy(narrow)}
        inputs, biases = Inputs((images,)), added_biases(pruned, narrow)
        with torch.inference_mode():
            outputs = [net(images) for net in (pruned, narrow)]
        row = {
            "macs": {kind: count_macs(nets[kind], inputs) for kind in ("dense", "pruned", "narrow")},
            "params": {kind: count_params(nets[kind]) for kind in ("dense", "pruned", "narrow")},
            "added biases": len(biases),
            "left behind": left_behind(pruned, narrow, images),
            "off": None if biases else float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()),
        }
        return nets, row

    def _folder_of(self, share: float, engine: str) -> Path:
        """Return where the files of a share lie; the dense network's is the same for all of them."""
        folder = self._folder / f"{share}"
        folder.mkdir(parents=True, exist_ok=True)
        if engine == "onnxruntime":
            for other in sorted(self._folder.glob("*/dense.onnx"))[:1]:
                if not (folder / other.name).exists():
                    (folder / other.name).hardlink_to(other)
        return folder


def ratios(row: Row, over: str, under: str) -> list[float]:
    """The ratios of two networks' times within each round; empty if there are none."""
    times = row.get("ms", {over: [], under: []})
    return [one / other for one, other in zip(times[over], times[under], strict=True)]


def beyond(measured: Sequence[Row], engine: str) -> list[Row]:
    """The rows whose pruned / narrow is not 1 within noise.

    It is not where the median is farther from 1 than narrow / again is anywhere with this engine, and the quartiles do
    not hold 1.
    """
    rows = [row for row in measured if row["engine"] == engine and "ms" in row]
    noise = max((abs(median(ratios(row, "narrow", "again")) - 1) for row in rows), default=0.0)
    found = []
    for row in rows:
        low, half, high = quantiles(ratios(row, "pruned", "narrow"), n=4, method="inclusive")
        if abs(half - 1) > noise and not low <= 1 <= high:
            found.append(row)
    return found


def table(measured: Sequence[Row]) -> str:
    """Return what is measured as Markdown: a line for a model and a share, and what the ratios come to."""
    rows: dict[tuple[str, float], dict[str, Row]] = {}
    for row in measured:
        rows.setdefault((row["model"], row["share"]), {})[row["engine"]] = row
    engines = [engine for engine in ENGINES if any(engine in found for found in rows.values())]
    columns = [f"{engine}, {what}" for engine in engines for what in ("dense / pruned", "pruned / narrow")]
    header = ["model", "MACs removed", "params removed", "MACs, dense / pruned", *columns]
    lines = [[name, *_line(share, found, engines)] for (name, share), found in rows.items()]
    pixels = ", ".join(dict.fromkeys(str(row["pixels"]) for row in measured))
    said = f"One image of {pixels} pixels a side, CPU time of one thread: median of the rounds' ratios (quartiles)."
    return "\n\n".join([said, markdown(header, lines), *_sums(measured, engines), *_failures(measured)])


def _line(share: float, found: Mapping[str, Row], engines: Sequence[str]) -> list[str]:
    whole = next((row for row in found.values() if "macs" in row), None)
    if whole is None:
        cells = [f"{share:.0%} asked", "", ""]
    else:
        macs, params = whole["macs"], whole["params"]
        removed = [f"{1 - counts['pruned'] / counts['dense']:.0%}" for counts in (macs, params)]
        cells = [*removed, f"{macs['dense'] / macs['pruned']:.2f}"]
    for engine in engines:
        row = found.get(engine, {})
        said = "fails" if "error" in row else row.get("skipped", "")
        cells += [middle(ratios(row, *pair)) or said for pair in (("dense", "pruned"), ("pruned", "narrow"))]
    return cells


def _sums(measured: Sequence[Row], engines: Sequence[str]) -> Iterator[str]:
    for engine in engines:
        rows = [row for row in measured if row["engine"] == engine and "ms" in row]
        if not rows:
            continue
        plain, noise = (
            sorted(median(ratios(row, *pair)) for row in rows) for pair in (("pruned", "narrow"), ("narrow", "again"))
        )
        gained = [
            median(ratios(row, "dense", "pruned")) / (row["macs"]["dense"] / row["macs"]["pruned"]) for row in rows
        ]
        apart = [f"{row['model']} at {row['share']:.0%}" for row in beyond(measured, engine)]
        yield (
            f"{engine}, {len(rows)} rows: pruned / narrow {median(plain):.3f} ({plain[0]:.3f} to {plain[-1]:.3f}); a "
            f"narrow network beside its copy {median(noise):.3f} ({noise[0]:.3f} to {noise[-1]:.3f}); beyond noise: "
            f"{', '.join(apart) or 'none'}. Of the factor that MACs promise, {median(gained):.0%} is seen in the "
            f"median ({min(gained):.0%} to {max(gained):.0%})."
        )


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    """Tell what failed, what cuts have left behind or put in, and the outputs' difference."""
    for row in rows:
        if "error" in row:
            yield f"{row['model']} at {row['share']:.0%} in {row['engine']} fails: {row['error']}"
    cuts = {(row["model"], row["share"]): row for row in rows if "left behind" in row}
    for (name, share), row in cuts.items():
        if row["left behind"]:
            yield f"Left behind in {name} at {share:.0%}: {'; '.join(row['left behind'])}"
    biased = {name: row["added biases"] for (name, _), row in cuts.items() if row["added biases"]}
    for name, count in biased.items():
        yield f"{name}: the cut puts in {count} biases, for what removed channels emit; the narrow network has none."
    off = [row["off"] for row in cuts.values() if row["off"] is not None]
    if off:
        same = sum(not row["left behind"] for row in cuts.values())
        yield (
            f"{same} of {len(cuts)} cut networks do the same operations on the same strides as the narrow ones; "
            f"largest difference of their outputs {max(off):.0e}, over {len(off)} of them."
        )
    files = [row["same file"] for row in rows if "same file" in row]
    if files:
        yield f"{sum(files)} of {len(files)} ONNX files of cut networks are those of the narrow ones, byte for byte."


def measure(given: argparse.Namespace, build: Callable[[str, int], nn.Module] = classifier) -> None:
    """Measure the rows that the file does not have yet."""
    before, settings = noted(given.out), {key: getattr(given, key) for key in ("pixels", "round_to")}
    for row in before:
        for key, value in settings.items():
            if row[key] != value:
                sys.exit(f"{given.out} was measured with {key} {row[key]}; pass another `--out`.")
    known = {(row["model"], row["share"], row["engine"]) for row in before}
    images = torch.randn(1, 3, given.pixels, given.pixels, generator=torch.Generator().manual_seed(0))
    for name in given.models:
        engines = [engine for engine in ENGINES if engine != "torch.compile" or name in given.compile]
        with tempfile.TemporaryDirectory() as folder:
            measurement = Measurement(lambda name=name: build(name, given.pixels), images, given, Path(folder))  # type: ignore[misc]
            for share in given.shares:
                for engine in engines:
                    if (name, share, engine) not in known:
                        row = {"model": name, "share": share, "engine": engine, **measurement.row(share, engine)}
                        note(given.out, {**row, **settings, **circumstances()})
                        print(*_told(row), flush=True)


def _told(row: Row) -> list[str]:
    said = [f"{pair[0]} / {pair[1]} {middle(ratios(row, *pair))}" for pair in (KINDS[:2], KINDS[1:3], KINDS[2:])]
    return [row["model"], f"{row['share']:.0%}", row["engine"], row.get("error") or row.get("skipped") or str(said)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--compile", nargs="*", default=list(COMPILED))
    parser.add_argument("--out", type=Path, default=HERE / "speedup.jsonl")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        if given.quick:
            given.models, given.shares, given.compile = given.models[:1], [0.5], []
            given.pixels, given.rounds, given.out = 64, 4, Path(folder) / "quick.jsonl"
        if not given.table:
            measure(given)
        print(table(noted(given.out)))


if __name__ == "__main__":
    main()
