"""Gates go with a network into copies, files and exported graphs, under any name; damaged ones are refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gated_networks import CHANNELS, EXACT, assert_shut_is_removed, close, each_net, gated, gates_in, made, set_gates
from proof import Net, outputs, relative_error
from torch import nn
from versions import older

from lightning_prune import history_of, load_pruned, save_pruned
from lightning_prune.errors import HistoryError
from lightning_prune.gates import choose, fold
from lightning_prune.graph import read
from lightning_prune.layers import HardConcrete
from lightning_prune.layers.gated import GatedLinear
from lightning_prune.layers.gates import KEY, attach, exchange, gates_of, pack, unpack


@each_net
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_gates_of_their_own(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = made(name)
    if copied is not copy.deepcopy and isinstance(model, Net):
        pytest.skip("a lambda cannot be pickled")
    gated(model, x)
    twin, before = copied(model), outputs(model, x)
    assert relative_error(outputs(twin, x), before) == 0
    set_gates(twin, 7)
    assert relative_error(outputs(twin, x), before) > 1e-6
    assert relative_error(outputs(model, x), before) == 0
    now = outputs(twin, x)
    close(twin, x)
    assert relative_error(outputs(twin, x), now) <= EXACT
    fold(twin)
    assert relative_error(outputs(twin, x), now) <= EXACT
    assert relative_error(outputs(model, x), before) == 0


@each_net
def test_a_state_dict_goes_round(name: str) -> None:
    (model, x), (other, _) = made(name), made(name)
    gated(model, x)
    gated(other, x)
    set_gates(other, 9)
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert relative_error(outputs(other, x), outputs(model, x)) == 0
    plain = [key for key in model.state_dict() if not key.startswith(f"{KEY}.gates.")]
    assert plain == list(made(name)[0].state_dict())


@each_net
@pytest.mark.parametrize("per_example", [False, True])
def test_gates_go_through_a_file(name: str, per_example: bool, tmp_path: Path) -> None:
    (model, x), (dense, _) = made(name), made(name)
    gated(model, x, per_example=per_example)
    close(model, x)
    set_gates(model, 4)
    torch.save(pack(gates_in(model)), tmp_path / "gates.pt")
    packed = torch.load(tmp_path / "gates.pt", weights_only=True)
    if name != "attention":  # whose width follows its heads, so that nothing could go
        with pytest.raises(HistoryError, match="which reads"):
            unpack(packed, dense)  # of other widths
    save_pruned(model, tmp_path / "model.pt")
    for target in (dense, gated(made(name)[0], x), gated(made(name)[0], x, per_example=True), copy.deepcopy(model)):
        load_pruned(target, tmp_path / "model.pt")
        assert relative_error(outputs(target, x), outputs(model, x)) == 0
        assert gates_in(target).per_example is per_example
        assert history_of(target) == history_of(model)
    fold(dense)
    fold(model)
    assert relative_error(outputs(dense, x), outputs(model, x)) == 0
    save_pruned(model, tmp_path / "folded.pt")
    load_pruned(dense, tmp_path / "folded.pt")
    assert gates_of(dense) is None


def damage(packed: dict[str, Any], *path: str, value: object = None) -> dict[str, Any]:
    """Change one entry of packed gates; take it out where there is no value."""
    place: Any = packed
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return packed


INDEX = ("readings", "3", "index")
NO_GATES = {"channels": [], "index": torch.zeros(4).long(), "inputs": None, "weights": None}
DAMAGES: dict[str, tuple[tuple[str, ...], object]] = {
    "no gates": (("gates",), None),
    "no list": (("gates",), 3),
    "no readings": (("readings",), None),
    "no mode": (("per_example",), None),
    "wrong mode": (("per_example",), torch.ones(2)),
    "a gate is missing": (("gates", "1"), None),
    "no kind": (("gates", "1", "kind"), None),
    "unknown kind": (("gates", "1", "kind"), "sharp"),
    "unknown setting": (("gates", "1", "colour"), 1),
    "impossible setting": (("gates", "1", "beta"), -1.0),
    "setting of another type": (("gates", "1", "drop_rate"), "half"),
    "other shape": (("gates", "1", "shape"), [8]),
    "two dimensions": (("gates", "1", "shape"), [3, 3]),
    "negative shape": (("gates", "1", "shape"), [-9]),
    "shape of floats": (("gates", "1", "shape"), [9.0]),
    "huge shape": (("gates", "1", "shape"), [10**11]),
    "endless shape": (("gates", "1", "shape"), [10**40]),
    "no index": (INDEX, None),
    "index out of range": (INDEX, torch.arange(1, 10) + 5),
    "negative index": (INDEX, torch.arange(1, 10) - 5),
    "index of floats": (INDEX, torch.arange(1.0, 10.0)),
    "index in columns": (INDEX, torch.arange(1, 10).view(3, 3)),
    "short index": (INDEX, torch.arange(1, 8)),
    "list for an index": (INDEX, [1, 2, 3]),
    "unknown channels": (("readings", "3", "channels"), ["x"]),
    "unknown layer": (("readings", "9"), NO_GATES | {"index": torch.zeros(3).long()}),
    "no layer with weights": (("readings", "2"), NO_GATES | {"index": torch.zeros(3).long()}),
    "layer that makes, not reads": (("readings", "0"), NO_GATES),
    "input gate of another width": (("readings", "3", "inputs"), "3"),
    "weight gate of another shape": (("readings", "3", "weights"), "1"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(DAMAGES))
def test_damaged_gates_are_refused(what: str, tmp_path: Path) -> None:
    path, value = DAMAGES[what]
    model, x = made("perceptron")
    gated(model, x)
    save_pruned(model, tmp_path / "model.pt")
    held = torch.load(tmp_path / "model.pt", weights_only=True)
    damage(held, KEY, *path, value=value)
    torch.save(held, tmp_path / "damaged.pt")
    for target in (gated(made("perceptron")[0], x), made("perceptron")[0]):
        before, state = outputs(target, x), list(target.state_dict())
        with pytest.raises(HistoryError, match="gates do not fit the model, or are damaged"):
            load_pruned(target, tmp_path / "damaged.pt")
        assert relative_error(outputs(target, x), before) == 0
        assert list(target.state_dict()) == state


def test_a_layout_on_a_layer_that_reads_nothing_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 5), nn.Linear(5, 3), nn.BatchNorm1d(3))
    for name, width in (("0", 5), ("2", 3)):
        plain = {"channels": [], "index": torch.zeros(width).long(), "inputs": "g", "weights": None}
        packed = {"gates": {"g": {"kind": "hard_concrete", "shape": [width]}}, "readings": {name: plain}}
        with pytest.raises(HistoryError, match="damaged"):
            unpack({**packed, "per_example": False}, model)


@pytest.mark.parametrize("packed", [None, 3, [], {"gates": {}}, torch.ones(3), "gates"])
def test_something_else_is_no_gates(packed: object) -> None:
    with pytest.raises(HistoryError, match="no gates with readings"):
        unpack(packed, nn.Linear(2, 2))
    assert unpack({}, nn.Linear(2, 2)) is None
    assert pack(None) == {}


def test_an_exchange_can_be_taken_back() -> None:
    model, x = made("blocks")
    gated(model, x)
    before, gates = outputs(model, x), gates_in(model)
    undo = exchange(model, None)
    assert gates_of(model) is None
    undo()
    other = choose(model, read(model, x), CHANNELS, HardConcrete).gates
    undo = exchange(model, other)
    assert gates_of(model) is other
    undo()
    assert gates_of(model) is gates
    assert relative_error(outputs(model, x), before) == 0


@pytest.mark.parametrize("name", ["keys", "values", "a/b", "a~1b", "pop", "gates"])
def test_layers_may_have_any_name(name: str) -> None:
    parts = {name: nn.Linear(4, 6), "end": nn.Linear(6, 2)}
    model = Net(lambda net, x: net._modules["end"](net._modules[name](x).relu()), **parts)
    model, x = model.eval(), torch.randn(3, 4)
    attach(model, choose(model, read(model, x), {name: "inputs"}, HardConcrete).gates)
    set_gates(model)
    assert list(gates_in(model).read_by()) == [name]
    assert list(gates_in(model).named()) == [f"{name}:inputs"]
    before = outputs(model, x)
    undo = exchange(model, unpack(pack(gates_in(model)), model))
    undo()
    assert relative_error(outputs(model, x), before) == 0
    fold(model)
    assert_shut_is_removed(model.double(), x.double())


def test_a_single_layer_can_be_gated() -> None:
    model, x = nn.Linear(4, 3).eval(), torch.randn(2, 4)
    gated(model, x, {"*": "inputs"})
    before = outputs(model, x)
    assert type(model) is GatedLinear
    assert list(model.state_dict()) == [
        "weight",
        "bias",
        f"{KEY}.gates.:inputs.log_alpha",
    ]
    assert fold(model).masks["weight"].shape == (3, 4)
    assert type(model) is nn.Linear
    assert relative_error(outputs(model, x), before) < 1e-6


@pytest.mark.parametrize("name", ["blocks", "perceptron", "attention"])
@pytest.mark.filterwarnings("ignore")
def test_gated_and_folded_networks_are_exported(name: str) -> None:
    if older("torch", "2.6") and name != "perceptron":
        pytest.skip("torch before 2.6 does not export gates: `id` of a tensor that was computed")
    model, x = made(name, torch.float32)
    gated(model, x)
    before = outputs(model, x)
    assert relative_error(outputs(torch.export.export(model, (x,)).module(), x), before) < 1e-5
    close(model, x)
    fold(model)
    assert relative_error(outputs(torch.export.export(model, (x,)).module(), x), before) < 1e-5
