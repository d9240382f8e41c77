"""How time and memory grow with a model's depth and width: `python benchmarks/growth.py [--out results.json]`.

Reads and cuts residual networks of up to 1,000 blocks, a ResNet-50 of up to 20 times its width, and a network in the
shape of Llama 7B, which has no memory of its own; measures the memory that reading a ResNet-50 takes. Each in a
process of its own, on one thread, in CPU seconds.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_prune import find_groups, prune
from lightning_prune.criteria import Random
from lightning_prune.graph import read
from lightning_prune.types import PruneRecord

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from transformers_blocks import Config, Llama

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

Row = dict[str, float]


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


def weightless(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model on the meta device."""
    with torch.device("meta"):
        return build().eval()


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def peak() -> float:
    """Return the largest memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def resident() -> float:
    """Return the memory that this process has now, in MB, where the system tells; elsewhere the largest."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * resource.getpagesize() / 1e6 if pages.exists() else peak()


def halve(model: nn.Module, inputs: Tensor) -> PruneRecord:
    """Cut half of all channels."""
    return prune(model, inputs, pruning_ratio=0.5, criterion=Random())


def timed(build: Callable[[], nn.Module], inputs: Tensor) -> Row:
    """Return what reading and cutting take, and how large the model is."""
    model = weightless(build)
    graph = read(model, inputs)
    return {
        "operations": sum(len(done.steps) for done in graph.runs.values()),
        "channels": sum(group.size for group in graph.groups),
        "find_groups": seconds(lambda: find_groups(model, inputs)),
        "prune": seconds(lambda: halve(model, inputs)),
    }


def growth(build: Callable[[int], nn.Module], sizes: Sequence[int], inputs: Tensor, repeats: int = 2) -> list[Row]:
    """Return the best times at each size; the sizes take turns, so that a busy minute does not hit one alone."""
    find_groups(deep(1), torch.zeros(1, 3, 8, 8))
    turns = [[timed(partial(build, size), inputs) for size in sizes] for _ in range(repeats)]
    best = [{key: min(row[key] for row in rows) for key in rows[0]} for rows in zip(*turns, strict=True)]
    return [{"size": size, **row, "peak MB": peak()} for size, row in zip(sizes, best, strict=True)]


def depth() -> list[Row]:
    """Measure residual networks of 125 to 1,000 blocks."""
    return growth(deep, (125, 250, 500, 1000), torch.zeros(1, 3, 8, 8))


def width() -> list[Row]:
    """Measure a ResNet-50 of 1 to 20 times its width."""
    return growth(wide, (1, 5, 10, 20), torch.zeros(1, 3, 64, 64))


def llama() -> list[Row]:
    """Measure networks as wide as Llama 7B, of 4 to all of its 32 layers; peaks are those of the largest so far."""
    ids = torch.ones(1, 16, dtype=torch.long)
    find_groups(deep(1), torch.zeros(1, 3, 8, 8))
    before = peak()
    rows = growth(lambda layers: Llama(replace(LLAMA_7B, num_hidden_layers=layers)), (4, 8, 16, 32), ids, repeats=1)
    return [{**row, "before MB": before} for row in rows]


def memory() -> list[Row]:
    """Measure what reading torchvision's ResNet-50 takes, beyond torch and the model itself."""
    model, images = torchvision.models.resnet50().eval(), torch.zeros(1, 3, 224, 224)
    find_groups(deep(1), torch.zeros(1, 3, 8, 8))
    before = resident()
    find_groups(model, images)
    return [{"before MB": before, "peak MB": peak(), "extra MB": peak() - before}]


MEASURES = {measure.__name__: measure for measure in (depth, width, llama, memory)}
TABLES = {
    "depth": ("Residual networks: blocks", "operations"),
    "width": ("ResNet-50: times its width", "channels"),
    "llama": ("Llama, 4,096 wide: layers", "operations"),
}
TASKS = ("find_groups", "prune")


def in_own_process(name: str) -> list[Row]:
    """Run a measurement where nothing else has run."""
    done = subprocess.run([sys.executable, __file__, "--measure", name], stdout=subprocess.PIPE, check=True)
    rows: list[Row] = json.loads(done.stdout)
    return rows


def power(rows: Sequence[Row], task: str, unit: str) -> float:
    """Return the power with which time grows from the second size to the largest."""
    smaller, larger = rows[1], rows[-1]
    return math.log(larger[task] / smaller[task]) / math.log(larger[unit] / smaller[unit])


def growth_table(rows: Sequence[Row], title: str, unit: str) -> Table:
    """Show the time, and the time for a thousand operations or channels."""
    table = Table(title=title)
    for column in ("size", unit, *(f"{task}: {part}" for task in TASKS for part in ("s", f"s / 1,000 {unit}"))):
        table.add_column(column, justify="right")
    for row in rows:
        times = [text for task in TASKS for text in (f"{row[task]:.2f}", f"{1e3 * row[task] / row[unit]:.4f}")]
        table.add_row(f"{row['size']:,}", f"{row[unit]:,}", *times)
    return table


def verdicts(results: Mapping[str, Sequence[Row]]) -> list[Verdict]:
    """List what was reached beside what is wanted at the most."""
    largest, resnet = results["llama"][-1], results["memory"][0]
    powers = [
        Verdict(f"{task}: power of its growth with {unit}, {title}", power(results[name], task, unit), STEEPEST)
        for name, (title, unit) in TABLES.items()
        for task in TASKS
    ]
    return [
        *powers,
        Verdict("Llama 7B: find_groups and prune, s", largest["find_groups"] + largest["prune"], 60),
        Verdict(f"Llama 7B: peak memory, MB; {largest['before MB']:.0f} before", largest["peak MB"], 4000),
        Verdict("ResNet-50: extra memory of find_groups, MB", resnet["extra MB"], 50),
    ]


def main() -> int:
    """Measure, print the tables and write the figures; fail if a limit is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--out", type=Path, help="where to write the figures, as JSON")
    parser.add_argument("--measure", choices=MEASURES, help="run one of them here, and print its JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.measure:
        print(json.dumps(MEASURES[given.measure]()))
        return 0
    results = {name: in_own_process(name) for name in MEASURES}
    found = verdicts(results)
    limits = Table("", "reached", "at most", "", title="Limits")
    for verdict in found:
        mark = "[green]yes" if verdict.kept else "[red]NO"
        limits.add_row(verdict.what, f"{verdict.reached:.2f}", f"{verdict.limit:g}", mark)
    Console().print(*(growth_table(results[name], *about) for name, about in TABLES.items()), limits)
    if given.out:
        limits_kept = [{**asdict(verdict), "kept": verdict.kept} for verdict in found]
        given.out.write_text(json.dumps({"torch": torch.__version__, **results, "limits": limits_kept}, indent=2))
    return 0 if all(verdict.kept for verdict in found) else 1


if __name__ == "__main__":
    sys.exit(main())
