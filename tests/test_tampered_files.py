"""Files that were tampered with: `load_pruned` says so or loads a network that works; no code in them runs."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections.abc import Callable
from copy import deepcopy
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import EXAMPLE, network
from proof import same_state, snapshot
from torch import Tensor, nn

from lightning_prune import history_of, load_pruned, prune
from lightning_prune.errors import HistoryError
from lightning_prune.history import KEY
from lightning_prune.records import from_plain, to_plain
from lightning_prune.sizes import stale_sizes

# torch, for the sparse and the complex tensors that a test puts into a file
pytestmark = [
    pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
]

INPUT = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(5))


def cut(*ratios: float, seed: int = 0) -> nn.Sequential:
    net = network(seed)
    for ratio in ratios:
        prune(net, EXAMPLE, pruning_ratio=ratio)
    return net


TARGETS = [cut(seed=9), cut(0.25), cut(0.25, 0.5), cut(0.7, seed=8)]
"""What is loaded into: a dense network, the same cuts half done and done, and other cuts."""


def content() -> dict[str, Any]:
    """What is tampered with: the file of a network with two cuts."""
    net = TARGETS[2]
    return {"state_dict": deepcopy(net.state_dict()), KEY: to_plain(history_of(net))}


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


GOOD = saved(content())


def load(path: Path, written: bytes, target: nn.Module) -> str:
    """Load into a copy of a network, and tell what is wrong with the outcome, or nothing."""
    path.write_bytes(written)
    net = deepcopy(target).train()
    before = snapshot(net)
    try:
        load_pruned(net, path)
    except HistoryError:
        return "" if same_state(snapshot(net), before) else "refused, but the network has changed"
    except BaseException as error:
        return f"{type(error).__name__} in place of a HistoryError: {error}"
    modes = {module.training for module in net.modules()}
    try:
        stale, shape, cuts = stale_sizes(net), net.eval()(INPUT).shape, history_of(net)
        told = len(list(map(str, cuts))) == len(cuts) and from_plain(to_plain(cuts)) == cuts
    except Exception as error:
        return f"loaded, but {type(error).__name__}: {error}"
    if stale or modes != {True}:
        return f"loaded, with sizes that contradict the weights, or with other modes: {stale}, {modes}"
    return "" if shape == (3, 4) and told else "loaded, but it does not work"


def wrong(path: Path, runs: int, tamper: Callable[[random.Random], bytes]) -> list[str]:
    """Tamper with many files, and tell what went wrong, each kind of it once."""
    chance = random.Random(17)
    found = {load(path, tamper(chance), TARGETS[run % len(TARGETS)]): run for run in range(runs)}
    return [f"file {run}: {outcome}" for outcome, run in found.items() if outcome]


# by chance


def flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 3, 50))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut_off(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def insert(data: bytearray, chance: random.Random) -> None:
    place = chance.randrange(len(data))
    data[place:place] = chance.randbytes(chance.choice((1, 7, 64, 1000)))


def leave_out(data: bytearray, chance: random.Random) -> None:
    place = chance.randrange(len(data))
    del data[place : place + chance.choice((1, 7, 64, 1000))]


def swap(data: bytearray, chance: random.Random) -> None:
    size = chance.choice((1, 16, 64, 512))
    one, other = (chance.randrange(len(data) - size) for _ in range(2))
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]


def overwrite(data: bytearray, chance: random.Random) -> None:
    place, size = chance.randrange(len(data)), chance.choice((1, 8, 100))
    data[place : place + size] = bytes([chance.choice((0, 255))]) * len(data[place : place + size])


DAMAGES = [flip, cut_off, insert, leave_out, swap, overwrite]


def damaged(chance: random.Random) -> bytes:
    data = bytearray(GOOD)
    chance.choice(DAMAGES)(data, chance)
    return bytes(data)


def test_a_good_file_is_loaded_into_all_of_them(tmp_path: Path) -> None:
    assert [load(tmp_path / "net.pt", GOOD, target) for target in TARGETS] == [""] * len(TARGETS)


def damaged_within(chance: random.Random) -> bytes:
    """Damage the pickled part, in an archive that is whole."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(GOOD)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            data = bytearray(old.read(entry))
            if entry.filename.endswith("data.pkl"):
                chance.choice(DAMAGES)(data, chance)
            new.writestr(entry, bytes(data))
    return buffer.getvalue()


ODD: list[Any] = [
    None, True, -1, 0, 1, 2, 3, 4, 8, 10**6, 2**63, -(2**70), 10**400, 0.5, nan, inf, -inf,
    "", "4", "a", "forward", "net", b"4", [], {}, [[]], [{}], {"a": 1}, {0: [0]}, [0, 0], [3, 1], [0, 99], ["0"],
    (1, 2), {1, 2}, [nan], torch.ones(2), torch.float32, torch.Size([8]), 1j,
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """List all places in nested containers: what holds it, and under which key."""
    if isinstance(value, dict):
        return [place for key in value for place in [(value, key), *places(value[key])]]
    if isinstance(value, list):
        return [place for key in range(len(value)) for place in [(value, key), *places(value[key])]]
    return []


def rewritten(chance: random.Random) -> bytes:
    """Rewrite the history: other values, keys, orders and depths, in places that are drawn by chance."""
    file = content()
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        holder, key = chance.choice(places(file[KEY]) or [(file, KEY)])
        action = chance.randrange(7)
        if action < 3:
            holder[key] = deepcopy(chance.choice(ODD))
        elif action == 3:
            del holder[key]
        elif action == 4 and isinstance(holder[key], list):
            chance.shuffle(holder[key])
        elif action == 5 and isinstance(holder[key], (list, dict)):
            more = deepcopy(chance.choice(ODD))
            holder[key].append(more) if isinstance(holder[key], list) else holder[key].update(
                {chance.choice("ab01"): more}
            )
        else:
            other, place = chance.choice(places(file[KEY]) or [(file, KEY)])
            holder[key] = deepcopy(other[place])
    return saved(file)


def reweighted(chance: random.Random) -> bytes:
    """Change the weights' types, shapes and names."""
    file = content()
    state = file["state_dict"]
    name = chance.choice(list(state))
    tensor: Tensor = state[name]
    others: list[Any] = [
        tensor.double(), tensor.half(), tensor.to(torch.int8), tensor.to(torch.complex64), tensor * nan, tensor.bool(),
        tensor[None], tensor.flatten(), torch.cat([tensor.flatten()] * 2), torch.empty(0), torch.zeros(()),
        tensor.to("meta"), tensor.expand(2, *tensor.shape), tensor.clone().to_sparse() if tensor.dim() else tensor,
        *ODD,
    ]  # fmt: skip
    action = chance.randrange(8)
    if action == 0:
        del state[name]
    elif action == 1:
        state[chance.choice([*ODD[:12], "net", f"{name}.x"])] = tensor
    elif action == 2:
        state[name], state["8.bias"] = state["8.bias"], tensor
    else:
        state[name] = chance.choice(others)
    return saved(file)


@pytest.mark.parametrize(
    ("runs", "tamper"),
    [
        (400, damaged),
        (200, damaged_within),
        (300, rewritten),
        (100, reweighted),
    ],
)
def test_a_thousand_files(tmp_path: Path, runs: int, tamper: Callable[[random.Random], bytes]) -> None:
    assert wrong(tmp_path / "net.pt", runs, tamper) == []


# by design


def tampered(change: Callable[[dict[str, Any]], object]) -> bytes:
    file = content()
    change(file)
    return saved(file)


def entry(part: str, name: str, key: object, value: object) -> Callable[[dict[str, Any]], object]:
    """Set one entry of the first record."""
    return lambda file: file[KEY][0][part].setdefault(name, {}).update({key: value})


def attribute(module: str, name: str, before: object, after: object) -> Callable[[dict[str, Any]], object]:
    """Let the first cut set an attribute that had a value before, as the file has it."""

    def change(file: dict[str, Any]) -> None:
        entry("before", module, name, before)(file)
        entry("attributes", module, name, after)(file)

    return change


def field(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda file: file[KEY][0].update({name: value})


def deep(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


REFUSED: dict[str, Callable[[dict[str, Any]], object]] = {
    "shape of strings": lambda file: file[KEY][0]["shapes"].update({"0.weight": "wide"}),
    "huge shape": lambda file: file[KEY][0]["shapes"].update({"0.weight": [10**30, 1, 3, 3]}),
    "NaN shape": lambda file: file[KEY][0]["shapes"].update({"0.weight": [nan, 1, 3, 3]}),
    "longer shape": lambda file: file[KEY][0]["shapes"].update({"0.weight": [8, 1, 3, 3, 1]}),
    "huge position": entry("kept", "0.weight", 0, [0, 10**30]),
    "negative position": entry("kept", "0.weight", 0, [-1, 0, 1, 2, 3, 4]),
    "unsorted positions": entry("kept", "0.weight", 0, [5, 4, 3, 2, 1, 0]),
    "twice the same": entry("kept", "0.weight", 0, [0, 0, 1, 2, 3, 4]),
    "no position": entry("kept", "0.weight", 0, []),
    "no positions": entry("kept", "0.weight", 0, None),
    "positions within positions": entry("kept", "0.weight", 0, [[0, 1, 2, 3, 4, 5]]),
    "NaN positions": entry("kept", "0.weight", 0, [nan] * 6),
    "too few positions": entry("kept", "0.weight", 0, [0, 1]),
    "foreign dimension": entry("kept", "0.weight", 7, [0]),
    "huge dimension": entry("kept", "0.weight", 10**30, [0]),
    "negative dimension": entry("kept", "0.weight", -1, [0]),
    "foreign tensor": lambda file: file[KEY][0].update(kept={"9.weight": {0: [0]}}, shapes={"9.weight": [1]}),
    "foreign module": attribute("9", "out_channels", 8, 4),
    "forward": attribute("0", "forward", 0, 1),
    "__class__": attribute("0", "__class__", 0, 1),
    "to": attribute("", "to", 0, 1),
    "_pruning_history": attribute("", "_pruning_history", 0, 1),
    "other size before": attribute("0", "out_channels", 9, 6),
    "deep nesting": field("kept", deep(400)),
    "deep history": lambda file: file.update({KEY: deep(400)}),
    "extra key": field("extra", 1),
    "missing key": lambda file: file[KEY][0].pop("before"),
    "no record": lambda file: file.update({KEY: [None]}),
    "record of pairs": lambda file: file[KEY].insert(0, list(file[KEY][0].items())),
    "records in another order": lambda file: file[KEY].reverse(),
    "a record twice": lambda file: file[KEY].append(file[KEY][0]),
    "history is a tensor": lambda file: file.update({KEY: torch.zeros(2)}),
    "weights of strings": lambda file: file["state_dict"].update({"8.bias": "4"}),
    "weights of numbers": lambda file: file.update({"state_dict": dict.fromkeys(file["state_dict"], 1)}),
    "dense weights": lambda file: file.update({"state_dict": network().state_dict()}),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("target", TARGETS, ids=["dense", "half done", "done", "cut otherwise"])
def test_what_cannot_be_is_refused_and_nothing_has_changed(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], target: nn.Module
) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(tampered(change))
    net = deepcopy(target)
    before = snapshot(net)
    with pytest.raises(HistoryError):
        load_pruned(net, path)
    assert same_state(snapshot(net), before)
    path.write_bytes(GOOD)
    assert load(path, GOOD, net) == ""


SOFT: dict[str, Callable[[dict[str, Any]], object]] = {
    "infinite shape": lambda file: file[KEY][0]["shapes"].update({"0.weight": [inf, 1, 3, 3]}),
    "infinite position": entry("kept", "0.weight", 0, [inf]),
    "infinite size": attribute("0", "out_channels", 8, inf),
    "foreign tensor without a shape": lambda file: file[KEY][0]["kept"].update({"9.weight": {0: [0]}}),
    "training": attribute("1", "training", 1, 0),
    "training of 7": attribute("1", "training", 1, 7),
    "eps": attribute("1", "eps", 0, 7),
    "_forward_hooks": attribute("1", "_forward_hooks", 0, 7),
    "_parameters": attribute("1", "_parameters", [0], [7]),
    "padding_mode": attribute("0", "padding_mode", 0, 7),
    "_is_full_backward_hook": attribute("0", "_is_full_backward_hook", 0, 7),
    "stride": attribute("0", "stride", [1, 1], [0, 0]),
    "out_channels": lambda file: file[KEY][1]["attributes"]["0"].update(out_channels=77),
    "asked": field("asked", "half"),
    "reached": field("reached", None),
    "params": field("params", {"dense": "a", "before": None, "after": []}),
}


@pytest.mark.parametrize("change", SOFT.values(), ids=SOFT)
def test_what_is_no_size_and_no_number_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(tampered(change))
    net = cut(seed=9)
    before = snapshot(net)
    with pytest.raises(HistoryError):
        load_pruned(net, path)
    assert same_state(snapshot(net), before)


UNFIT: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "without memory": lambda tensor: tensor.to("meta"),
}


@pytest.mark.parametrize("unfit", UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("ratios", [(), (0.25, 0.5)], ids=["dense", "cut"])
def test_weights_are_written_all_or_none(
    tmp_path: Path, ratios: tuple[float, ...], unfit: Callable[[Tensor], Tensor]
) -> None:
    """The last weight is one that cannot be copied, all others could."""
    net = cut(*ratios)
    state = net.state_dict()
    state["8.weight"] = unfit(state["8.weight"])
    torch.save({"state_dict": state, KEY: to_plain(history_of(net))}, tmp_path / "net.pt")
    target = cut(seed=9)
    before = snapshot(target)
    with pytest.raises(HistoryError):
        load_pruned(target, tmp_path / "net.pt")
    assert same_state(snapshot(target), before)


def test_a_bit_that_flipped_in_the_weights_is_noticed(tmp_path: Path) -> None:
    data = bytearray(GOOD)
    weights = TARGETS[2].state_dict()["3.weight"].numpy().tobytes()
    data[data.index(weights) + 7] ^= 64
    (tmp_path / "net.pt").write_bytes(bytes(data))
    with pytest.raises(HistoryError):
        load_pruned(cut(seed=9), tmp_path / "net.pt")


# code


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.victim,)


TRAPS: dict[str, Callable[[dict[str, Any], Any], object]] = {
    "beside all": lambda file, trap: file.update(extra=trap),
    "the history": lambda file, trap: file.update({KEY: trap}),
    "a record": lambda file, trap: file[KEY].append(trap),
    "a position": lambda file, trap: file[KEY][0]["kept"]["0.weight"].update({0: [trap]}),
    "a key": lambda file, trap: file[KEY][0].update({trap: 1}),
    "the weights": lambda file, trap: file.update(state_dict=trap),
    "a weight": lambda file, trap: file["state_dict"].update({"8.bias": trap}),
    "the metadata": lambda file, trap: setattr(file["state_dict"], "_metadata", {"": trap}),
    "hyper-parameters": lambda file, trap: file.update(hyper_parameters={"width": trap}),
    "their name": lambda file, trap: file.update(hparams_name=trap, hyper_parameters={"width": 1}),
    "callbacks": lambda file, trap: file.update(callbacks={"PruneCallback": trap}),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "legacy"])
@pytest.mark.parametrize("place", TRAPS.values(), ids=TRAPS)
def test_no_code_runs_wherever_it_hides(
    tmp_path: Path, place: Callable[[dict[str, Any], Any], object], legacy: bool
) -> None:
    victim, path, file = tmp_path / "ran", tmp_path / "net.pt", content()
    place(file, Trap(victim))
    torch.save(file, path, _use_new_zipfile_serialization=not legacy)
    net = cut(seed=9)
    before = snapshot(net)
    for model in (net, nn.Sequential):
        with pytest.raises(HistoryError, match=r"holds more than weights and plain data|is no checkpoint"):
            load_pruned(model, path)
    assert not victim.exists()
    assert same_state(snapshot(net), before)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_is_not_run(tmp_path: Path, protocol: int) -> None:
    victim, path = tmp_path / "ran", tmp_path / "net.pt"
    path.write_bytes(pickle.dumps({"state_dict": {}, KEY: Trap(victim)}, protocol))
    with pytest.raises(HistoryError):
        load_pruned(cut(seed=9), path)
    assert not victim.exists()
    pickle.loads(path.read_bytes())
    assert victim.exists()
