"""How cost grows with depth and width: CPU seconds to read, to plan and to cut, fitted exponents, and memory.

    python benchmarks/scale.py [family ...] [--out scale.jsonl] [--table]

Half of all channels is cut out of residual networks of up to 1,000 blocks, of a ResNet-50 of up to 20 times its width,
of one with weights in memory, up to 4 times as wide, and of networks in the shape of Llama 7B, by heads. All but those
with weights lie on the meta device: their cut moves no weights. Reading traces the model and finds its channel groups;
planning is scores, allocation, verification and absorption; cutting makes the new tensors and puts them in place. Last,
the memory is measured that reading torchvision's ResNet-50 takes.

Each size runs in a process of its own, on one thread, after a small network has been read; told are the least CPU
seconds of some repeats, and the largest memory that the process has had. An exponent is the slope of the straight line
through the logarithms of all sizes of a family. Rows are written at once, and not measured again; a size that fails
leaves its error. `--table` prints what the file has. The exit status tells whether a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from apart import ChildError, printed
from circumstances import circumstances, note, noted
from layout import markdown
from torch import Tensor, nn

from lightning_prune import find_groups, history, pruner
from lightning_prune.cost import count_params
from lightning_prune.criteria import Criterion, Magnitude, Random
from lightning_prune.pruner import Request, draft_cut

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from transformers_blocks import Config, Llama

HERE = Path(__file__).resolve().parent

STEEPEST = 1.25
"""The power with which time may grow: 1 is linear, 2 is quadratic, and what outgrows the caches costs a little."""

LLAMA_7B = Config(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    rotary_ndims=128,
)

TASKS = ("read", "plan", "cut")
Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A figure beside its limit."""

    what: str
    reached: float
    limit: float

    @property
    def kept(self) -> bool:
        """Whether the limit is kept."""
        return self.reached < self.limit


@dataclass(frozen=True)
class Family:
    """Networks of one kind in several sizes.

    Attributes:
        title: What the size counts.
        unit: The figure that time is told against.
        sizes: The sizes.
        build: Builds a network.
        inputs: What it is called with.
        criterion: How its channels are scored.
        device: Where it lies.
        repeats: How often it is measured; the least counts.
    """

    title: str
    unit: str
    sizes: Sequence[int]
    build: Callable[[int], nn.Module]
    inputs: Tensor
    criterion: Criterion
    device: str = "meta"
    repeats: int = 3


class Block(nn.Module):
    """Convolutions with BatchNorm, and a way past them."""

    def __init__(self, widths: Sequence[int], kernels: Sequence[int], stride: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for place, ((entering, leaving), kernel) in enumerate(zip(pairwise(widths), kernels, strict=True)):
            step = stride if place == len(kernels) // 2 else 1
            layers += [*_conv(entering, leaving, kernel, step), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        same = stride == 1 and widths[0] == widths[-1]
        self.past = nn.Identity() if same else nn.Sequential(*_conv(widths[0], widths[-1], 1, stride))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.past(x) + self.body(x))
        return out


def _conv(entering: int, leaving: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(entering, leaving, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(leaving)


def deep(blocks: int, width: int = 8) -> nn.Module:
    """Build a residual network of equal blocks."""
    body = [Block((width,) * 3, (3, 3)) for _ in range(blocks)]
    return nn.Sequential(*_conv(3, width, 3), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def wide(times: int) -> nn.Module:
    """Build a ResNet-50 with all widths multiplied."""
    entering = 64 * times
    body = []
    for stage, count in enumerate((3, 4, 6, 3)):
        inner = 64 * times * 2**stage
        for place in range(count):
            stride = 2 if stage and not place else 1
            body.append(Block((entering, inner, inner, 4 * inner), (1, 3, 1), stride))
            entering = 4 * inner
    stem = [*_conv(3, 64 * times, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(entering, 1000))


def llama(layers: int) -> nn.Module:
    """Build a network as wide as Llama 7B."""
    return Llama(replace(LLAMA_7B, num_hidden_layers=layers))


IMAGES = torch.zeros(1, 3, 64, 64)
MEMORY = ("before MB", "peak MB")
TINY, IDS = torch.zeros(1, 3, 8, 8), torch.ones(1, 16, dtype=torch.long)
FAMILIES = {
    "depth": Family("residual network: blocks", "operations", (125, 250, 500, 1000), deep, TINY, Random()),
    "width": Family("ResNet-50, no weights: times its width", "channels", (1, 5, 10, 20), wide, IMAGES, Random()),
    "weights": Family(
        *("ResNet-50 with weights: times its width", "parameters", (1, 2, 3, 4), wide, IMAGES, Magnitude()),
        device="cpu",
        repeats=2,
    ),
    "llama": Family("4,096 wide as Llama 7B: layers", "operations", (4, 8, 16, 32), llama, IDS, Random()),
}


def peak() -> float:
    """Return the largest memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def resident() -> float:
    """Return the memory that this process has now, in MB, where the system tells; elsewhere the largest."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * resource.getpagesize() / 1e6 if pages.exists() else peak()


def warm() -> None:
    """Load and look up what is loaded and looked up only once."""
    halved(deep(1).eval(), TINY, Random())


@contextmanager
def clocked(seconds: Row, task: str) -> Iterator[None]:
    """Add the CPU seconds of what is inside."""
    start = time.process_time()
    yield
    seconds[task] = seconds.get(task, 0.0) + time.process_time() - start


def halved(model: nn.Module, inputs: Tensor, criterion: Criterion) -> Row:
    """Cut half of all channels; return what that took and how large the model was."""
    found: Row = {"parameters": count_params(model)}

    def read(*args: Any) -> Any:
        with clocked(found, "read"):
            graph = pruner_read(*args)
        found["operations"] = sum(len(done.steps) for done in graph.runs.values())
        found["channels"] = sum(group.size for group in graph.groups)
        return graph

    pruner_read = pruner.read
    with patch.object(pruner, "read", read), clocked(found, "plan"):
        draft = draft_cut(model, inputs, Request(0.5, criterion=criterion))
    found["plan"] -= found["read"]
    with clocked(found, "cut"):
        history.commit(model, draft.cut, draft.record, draft.offsets)
    return found


def timed(family: Family, size: int) -> Row:
    """Measure one size: the least seconds of the repeats, and the memory."""
    warm()
    rows = []
    for _ in range(family.repeats):
        with torch.device(family.device):
            model = family.build(size).eval()
        before = resident()
        rows.append({**halved(model, family.inputs, family.criterion), "before MB": before})
        del model
    return {**{key: min(row[key] for row in rows) for key in rows[0]}, "peak MB": peak()}


def memory() -> Row:
    """Measure what reading torchvision's ResNet-50 takes, beyond torch and the model itself."""
    model, images = torchvision.models.resnet50().eval(), torch.zeros(1, 3, 224, 224)
    warm()
    before = resident()
    find_groups(model, images)
    return {"before MB": before, "peak MB": peak()}


def sizes_of(what: str) -> Sequence[int]:
    """The sizes of a family; one for the measurement of memory."""
    return FAMILIES[what].sizes if what in FAMILIES else (1,)


def in_own_process(what: str, size: int) -> Row:
    """Measure where nothing else has run; what goes wrong is a finding too."""
    try:
        found: Row = printed(HERE / "scale.py", ["--one", what, str(size)])
    except ChildError as error:
        return {"error": str(error)}
    return found


def exponent(rows: Sequence[Row], task: str, unit: str) -> float:
    """Return the power with which a figure grows with another: the slope of a straight line through the logarithms."""
    return linear_regression([math.log(row[unit]) for row in rows], [math.log(row[task]) for row in rows]).slope


def measured(rows: Sequence[Row], what: str) -> list[Row]:
    """The rows of a family in order of size, without those that failed."""
    found = [row for row in rows if row["what"] == what and "error" not in row]
    return sorted(found, key=lambda row: int(row["size"]))


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """List what was reached beside what is wanted at the most, as far as it has been measured."""
    verdicts = [
        Verdict(f"{task}: exponent in {family.unit}, {family.title}", exponent(found, task, family.unit), STEEPEST)
        for what, family in FAMILIES.items()
        for task in TASKS
        if len(found := measured(rows, what)) > 1
    ]
    for row in measured(rows, "llama"):
        if row["size"] == LLAMA_7B.num_hidden_layers:
            verdicts.append(Verdict("shape of Llama 7B: read, plan and cut, s", sum(row[task] for task in TASKS), 60))
            verdicts.append(Verdict(f"shape of Llama 7B: peak MB; {row['before MB']:.0f} before", row["peak MB"], 4000))
    for row in measured(rows, "memory"):
        extra = row["peak MB"] - row["before MB"]
        verdicts.append(Verdict("torchvision's resnet50: extra MB that reading takes", extra, 50))
    return verdicts


def table(rows: Sequence[Row]) -> str:
    """Return what is measured as Markdown: a line for each size, the exponents beneath, then the limits."""
    header = ["network and size", "operations", "channels", "parameters", *(f"{task}, s" for task in TASKS)]
    lines = []
    for what, family in FAMILIES.items():
        found = measured(rows, what)
        lines += [_line(f"{family.title} {row['size']:,}", row) for row in found]
        if len(found) > 1:
            powers = [f"**{exponent(found, task, family.unit):.2f}**" for task in TASKS]
            lines.append([f"**exponent in {family.unit}**", "", "", "", *powers, "", ""])
    limits = [
        [verdict.what, f"{verdict.reached:.2f}", f"{verdict.limit:g}", "yes" if verdict.kept else "NO"]
        for verdict in verdicts(rows)
    ]
    failures = [f"{row['what']} {row['size']} fails: {row['error']}" for row in rows if "error" in row]
    sizes = markdown([*header, "MB before", "peak MB"], lines)
    return "\n\n".join([sizes, markdown(["", "reached", "at most", "kept"], limits), *failures])


def _line(title: str, row: Row) -> list[str]:
    counts = [f"{row[key]:,}" for key in ("operations", "channels", "parameters")]
    return [title, *counts, *(f"{row[task]:.3f}" for task in TASKS), *(f"{row[key]:.0f}" for key in MEMORY)]


def measure(given: argparse.Namespace) -> None:
    """Measure the sizes that the file does not have yet."""
    known = {(row["what"], row["size"]) for row in noted(given.out)}
    for what in given.families:
        for size in sizes_of(what):
            if (what, size) not in known:
                row = {"what": what, "size": size, **in_own_process(what, size)}
                note(given.out, {**row, **circumstances()})
                print(row, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, and print the table; fail if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=[*FAMILIES, "memory"])
    parser.add_argument("--out", type=Path, default=HERE / "scale.jsonl")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("FAMILY", "SIZE"), help="measure one size here, and print its JSON")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.one:
        what, size = given.one
        print(json.dumps(memory() if what == "memory" else timed(FAMILIES[what], int(size))))
        return 0
    if not given.table:
        measure(given)
    rows = noted(given.out)
    print(table(rows))
    return 0 if all(verdict.kept for verdict in verdicts(rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
