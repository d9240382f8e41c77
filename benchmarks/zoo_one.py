"""What the zoo benchmark measures on one model: the proof, the cut, what is frozen, memory, time, and the peers."""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from memory import forget_peak, peak
from torch import Tensor, nn
from zoo_models import Choice, images

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from proof import outputs, permute_channels, randomise, relative_error

from lightning_prune import ChannelGroup, find_groups, history, prune, pruner
from lightning_prune.cost import count_params
from lightning_prune.inputs import tensors_in

Result = dict[str, Any]

TOLERANCE = 1e-6
RATIO = 0.5
PROBED = 5
REPEATS = 3
PEER_SECONDS = 120
OUT = "reaches the model's output"
WANTING = ("has no handler", "form that its handler does not know")
PIECES = {"find": ("read",), "plan": ("score_groups", "_plan"), "cut": ("prepare", "verify", "commit")}
KIRIGAMI = (
    "resnet18",
    "resnet50",
    "vgg11_bn",
    "googlenet",
    "squeezenet1_1",
    "regnet_y_400mf",
    "densenet121",
    "vit_b_16",
)


class OutOfTime(BaseException):
    """A peer has used up its time; no `except Exception` of its own stops this."""


def work(pipe: Connection, choice: Choice, gibibytes: float, peers: bool) -> None:
    """Measure a model piece by piece and send each result as it comes."""
    import resource  # which Windows has not

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    limit = int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    pieces: dict[str, Callable[[Choice], Result]] = {"memory": memory, "frozen": frozen, "proof": proof, "cut": cut}
    pieces["time"] = ours
    if peers:
        pieces["torch_pruning"] = torch_pruning
    if peers and choice.name in KIRIGAMI:
        pieces["kirigami"] = kirigami
    for name, piece in pieces.items():
        start = time.process_time()
        try:
            result = piece(choice)
        except (Exception, OutOfTime) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            message = " ".join(str(error).split())[:300]
            result = {"failed": f"{type(error).__name__}: {message} ({Path(place.filename).name}:{place.lineno})"}
        pipe.send({name: {**result, "seconds": time.process_time() - start}})


def memory(choice: Choice) -> Result:
    """Measure by how many MiB reading the groups raises the peak of the process, after a first reading of something."""
    find_groups(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), images(8))
    model, x = choice.build(choice.default), images(choice.default, 1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # give back what building has freed, or reading would use that unseen
    forget_peak()
    before = peak()
    find_groups(model, x)
    return {"mebibytes": peak() - before}


def frozen(choice: Choice) -> Result:
    """Tell which share of the parameters cannot be cut, reason by reason, and which of it for want of a handler."""
    model = choice.build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = find_groups(model, images(choice.pixels))
    reasons = {group.frozen for group in groups if group.frozen and group.frozen != OUT}
    return {
        "wanting": held_share(model, groups, {reason for reason in reasons if any(text in reason for text in WANTING)}),
        "reasons": {reason: held_share(model, groups, {reason}) for reason in sorted(reasons)},
        "warnings": sorted({str(one.message) for one in caught}),
    }


def held_share(model: nn.Module, groups: Sequence[ChannelGroup], reasons: set[str]) -> float:
    """Return the share of the parameters that lie on channels frozen for one of these reasons."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    free = {name: [torch.ones(size, dtype=torch.bool) for size in p.shape] for name, p in model.named_parameters()}
    for group in groups:
        for member in group.members if group.frozen in reasons else ():
            if member.tensor in free:
                free[member.tensor][member.dim][member.positions.reshape(-1)] = False
    held = sum(sizes[name] - math.prod(int(part.sum()) for part in parts) for name, parts in free.items())
    return held / sum(sizes.values())


def proof(choice: Choice) -> Result:
    """Permute the channels of all groups in float64; then those of one member of some groups only, which must show."""
    model, x = choice.build(), images(choice.pixels).double()
    groups = [group for group in find_groups(model, x.float()) if not group.frozen]
    shaken(model.double()).eval()
    moved = copy.deepcopy(model)  # and not the same one again: some models keep what they have computed
    permute_channels(moved, groups)
    before = outputs(model, x)
    able = [group for group in groups if group.size > 1 and len(group.members) > 1]
    probed = [able[place * (len(able) - 1) // (PROBED - 1)] for place in range(PROBED)] if able else []
    broken = [outputs(with_one_member_shifted(copy.deepcopy(moved), group), x) for group in probed]
    after = outputs(moved, x)
    felt = [relative_error(wrong, after) > TOLERANCE for wrong in broken]
    return {
        "groups": len(groups),
        "error": relative_error(after, before),
        "finite": all(bool(result.isfinite().all()) for result in before),
        "spread": min(float(result.std() / result.abs().max()) for result in before),
        "sensitive": sum(felt) / len(felt) if felt else 0.0,
    }


def shaken(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic a random value; tables, masks and limits in other buffers stay."""
    tables = {name: buffer.clone() for name, buffer in model.named_buffers() if "running_" not in name}
    randomise(model)
    for name, buffer in model.named_buffers():
        buffer.copy_(tables.get(name, buffer))
    return model


def with_one_member_shifted(model: nn.Module, group: ChannelGroup) -> nn.Module:
    """Put the largest tensor of a group one channel ahead of the others."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    member = max(group.members, key=lambda one: tensors[one.tensor].numel())
    tensor = tensors[member.tensor].data
    shifted = tensor.index_select(member.dim, member.positions.roll(1, 0).reshape(-1))
    tensor.index_copy_(member.dim, member.positions.reshape(-1), shifted)
    return model


def cut(choice: Choice) -> Result:
    """Cut half of the channels, and run what is left forward and backward in train mode."""
    model, x = choice.build().train(), images(choice.pixels)
    shapes = [result.shape for result in outputs(copy.deepcopy(model), x)]
    record = prune(model, x, pruning_ratio=RATIO)
    results = list(tensors_in(model(x)))
    if [result.shape for result in results] != shapes:
        raise AssertionError(f"the cut model returns {[tuple(result.shape) for result in results]}")
    sum((result.square().mean() for result in results), torch.zeros(())).backward()
    if not all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters()):
        raise AssertionError("the cut model has gradients that are not finite")
    return {"macs": record.macs.removed, "params": record.params.removed, "channels": record.reached}


def ours(choice: Choice) -> Result:
    """Time a 50 % cut on images of the size that the model was made for: piece by piece, and as a whole."""
    model, x = choice.build(choice.default), images(choice.default, 1)

    def once(model: nn.Module) -> Result:
        with stopwatch([name for names in PIECES.values() for name in names]) as spent:
            start = time.process_time()
            prune(model, x, pruning_ratio=RATIO)
            whole = time.process_time() - start
        pieces = {piece: sum(spent[name] for name in names) for piece, names in PIECES.items()}
        return {**pieces, "sum": sum(pieces.values()), "prune": whole}

    return best(once, model, x, "sum")


@contextmanager
def stopwatch(names: Sequence[str]) -> Iterator[dict[str, float]]:
    """Add up the seconds of CPU time that the pruner spends in some of its steps."""
    spent = dict.fromkeys(names, 0.0)
    places = {name: pruner if hasattr(pruner, name) else history for name in names}
    own = {name: getattr(places[name], name) for name in names}

    def watched(name: str) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            start = time.process_time()
            try:
                return own[name](*args, **kwargs)
            finally:
                spent[name] += time.process_time() - start

        return call

    try:
        for name in names:
            setattr(places[name], name, watched(name))
        yield spent
    finally:
        for name in names:
            setattr(places[name], name, own[name])


def best(once: Callable[[nn.Module], Result], model: nn.Module, x: Tensor, key: str) -> Result:
    """Return the quickest of three runs, each on a fresh copy, and whether the last copy still runs."""
    runs, shapes = [], [result.shape for result in outputs(copy.deepcopy(model).eval(), x)]
    for _ in range(REPEATS):
        trial = copy.deepcopy(model)
        runs.append(once(trial))
    try:
        right = [result.shape for result in outputs(trial.eval(), x)] == shapes
    except Exception:
        right = False
    return {**min(runs, key=lambda run: run[key]), "runs": right}


def torch_pruning(choice: Choice) -> Result:
    """Time Torch-Pruning, without options made for the model: the graph with the pruner, and the step."""
    import torch_pruning as tp

    model, x = choice.build(choice.default).eval(), images(choice.default, 1)
    classes = class_layers(find_groups(model, x))

    def once(model: nn.Module) -> Result:
        ignored = [module for name, module in model.named_modules() if name in classes]
        start = time.process_time()
        importance = tp.importance.MagnitudeImportance()
        peer = tp.pruner.BasePruner(model, x, importance, pruning_ratio=RATIO, ignored_layers=ignored)
        middle = time.process_time()
        peer.step()
        end = time.process_time()
        gone = 1 - count_params(model) / dense
        return {"graph": middle - start, "step": end - middle, "sum": end - start, "params": gone}

    dense = count_params(model)
    return best(at_most(once), model, x, "sum")


def kirigami(choice: Choice) -> Result:
    """Time torch-kirigami: the graph, a query for half of each axis, and the plan with its execution.

    This is its quickest way: its own search for what to remove takes more than two minutes on resnet18.
    """
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Pruner

    model, x = choice.build(choice.default).eval(), images(choice.default, 1)

    def once(model: nn.Module) -> Result:
        start = time.process_time()
        graph = DependencyGraph.build(model, args=(x,))
        peer = Pruner(model, graph=graph)
        built = time.process_time()
        specs = [graph.operator_spec(operation) for operation in graph.operations()]
        axes = dict.fromkeys(domain.axis for spec in specs if spec is not None for domain in spec.candidates)
        halves = [axis.select(range(axis.tensor.shape[axis.dim] // 2)) for axis in axes]
        free = [
            half
            for half in halves
            if graph.propagate(remove=(half,), constraints=peer.constraints).status == "resolved"
        ]
        asked = time.process_time()
        peer.apply(peer.plan_remove(free))
        end = time.process_time()
        gone = 1 - count_params(model) / dense
        return {"graph": built - start, "query": asked - built, "step": end - asked, "sum": end - start, "params": gone}

    dense = count_params(model)
    return best(at_most(once), model, x, "sum")


def class_layers(groups: Sequence[ChannelGroup]) -> set[str]:
    """Return the names of the layers whose outputs leave the model."""
    return {
        member.tensor.rpartition(".")[0]
        for group in groups
        if group.frozen == OUT
        for member in group.members
        if member.dim == 0
    }


def at_most(once: Callable[[nn.Module], Result]) -> Callable[[nn.Module], Result]:
    """Let a run take no more than so many seconds of CPU time."""

    def stop(*_: object) -> None:
        raise OutOfTime(f"took more than {PEER_SECONDS} s of CPU time")

    def limited(model: nn.Module) -> Result:
        signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, PEER_SECONDS)
        try:
            return once(model)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    return limited
