"""Against torch-kirigami, in one run on one thread: `python benchmarks/kirigami.py [model ...]`.

Cuts half of the channels of each model, and prints CPU seconds. torch-kirigami goes two ways: as its guide says, where
it asks once for each channel what goes with it; and by a script that asks once for each axis what goes with half of it.
"""

import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_prune import prune

try:
    from torch_kirigami import AxisRef, DependencyGraph, Impact, Selection
    from torch_kirigami.pruning import ChannelRatio, Greedy, GroupMagnitude, Pruner
except ImportError:
    sys.exit(
        "torch-kirigami is not installed, and lightning_prune does not need it. For this: pip install torch-kirigami"
    )

Case = tuple[Callable[[], nn.Module], Tensor]


def small_vit() -> nn.Module:
    """Build a transformer of four blocks for images of 32 x 32 pixels."""
    vit: nn.Module = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    return vit


IMAGES = torch.zeros(1, 3, 224, 224)
MODELS: dict[str, Case] = {
    "resnet18": (torchvision.models.resnet18, IMAGES),
    "resnet50": (torchvision.models.resnet50, IMAGES),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, IMAGES),
    "small ViT": (small_vit, torch.zeros(1, 3, 32, 32)),
}


LIMIT = 20
"""CPU seconds after which an answer is not awaited any longer."""


def half_of(graph: DependencyGraph, axis: AxisRef) -> Selection:
    """Select the half of an axis' channels that has the smaller weights."""
    weight = graph.tensor(axis.tensor).detach().movedim(axis.dim, 0).flatten(1)
    return axis.select(weight.norm(dim=1).argsort()[: len(weight) // 2].tolist())


def channel_axes(graph: DependencyGraph) -> list[AxisRef]:
    """List the axes of which torch-kirigami says that they hold channels."""
    known = [graph.operator_spec(operation) for operation in graph.operations()]
    return list(dict.fromkeys(domain.axis for spec in known if spec is not None for domain in spec.candidates))


def by_queries(model: nn.Module, images: Tensor) -> None:
    """Cut with one question for each axis, all that is free at once."""
    graph = DependencyGraph.build(model, args=(images,))
    pruner = Pruner(model, graph=graph)
    going: list[Selection] = []
    free: list[Impact] = []
    for axis in channel_axes(graph):
        if not any(impact.selection(axis.tensor).fully_selected_indices(axis.dim) for impact in free):
            half = half_of(graph, axis)
            impact = graph.propagate(remove=[half], constraints=pruner.constraints)
            if impact.status == "resolved":
                going.append(half)
                free.append(impact)
    pruner.apply(pruner.plan_remove(going))


def as_documented(model: nn.Module, images: Tensor) -> None:
    """Cut as its guide does: find all candidates, then choose greedily."""
    pruner = Pruner(model, graph=DependencyGraph.build(model, args=(images,)))
    candidates = pruner.discover_candidates()
    pruner.prune(candidates, budget=ChannelRatio(0.5), strategy=Greedy(GroupMagnitude(p=2)))


def ours(model: nn.Module, images: Tensor) -> None:
    """Cut."""
    prune(model, images, pruning_ratio=0.5)


def give_up(*_: object) -> None:
    """End what takes too long."""
    raise TimeoutError


def attempt(cut: Callable[[nn.Module, Tensor], None], name: str) -> tuple[float, str]:
    """Return the CPU seconds of a cut, and what it came to."""
    torch.manual_seed(0)
    build, images = MODELS[name]
    model = build().eval()
    dense = sum(parameter.numel() for parameter in model.parameters())
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        cut(model, images)
        taken = time.process_time() - start
        with torch.no_grad():
            model(images)
    except TimeoutError:
        return LIMIT, f"no answer in {LIMIT} s"
    except Exception as error:
        return time.process_time() - start, f"{type(error).__name__}: {str(error)[:80]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    left = sum(parameter.numel() for parameter in model.parameters())
    return taken, f"{taken:.2f} s, {1 - left / dense:.0%} of the parameters gone"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, give_up)
    title = f"50 % cuts, CPU seconds; torch-kirigami {version('torch-kirigami')}"
    table = Table("model", "ours", "kirigami, scripted", "ours / scripted", "kirigami, as documented", title=title)
    for cut in (ours, by_queries):
        attempt(cut, "small ViT")  # imports what is imported at first use
    for name in sys.argv[1:] or MODELS:
        (own, own_text), (scripted, scripted_text) = attempt(ours, name), attempt(by_queries, name)
        ratio = f"{'< ' if scripted == LIMIT else ''}{own / scripted:.2f}"
        table.add_row(name, own_text, scripted_text, ratio, attempt(as_documented, name)[1])
    Console().print(table)


if __name__ == "__main__":
    main()
