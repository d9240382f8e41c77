"""The history of cuts: written in plain values, done again on a dense model, and refused where it does not fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import EXAMPLE, Module, equal, network, trainer, widths
from torch import Tensor, nn

from lightning_prune import PruneRecord, history_of, load_pruned, prune, save_pruned
from lightning_prune.callbacks import MagnitudePruneCallback, PruneCallback
from lightning_prune.criteria import Random
from lightning_prune.errors import HistoryError
from lightning_prune.history import KEY, replay
from lightning_prune.records import from_plain, to_plain

INPUT = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(5))


def cut_thrice() -> nn.Sequential:
    net = network()
    for seed, ratio in enumerate((0.25, 0.4, 0.7)):
        prune(net, EXAMPLE, pruning_ratio=ratio, criterion=Random(seed), constants="drop")
    return net


def shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def output(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(INPUT)


# plain values


def test_round_trip_through_plain_values() -> None:
    records = history_of(cut_thrice())
    assert len(records) == 3
    assert from_plain(to_plain(records)) == records
    assert to_plain(from_plain(to_plain(records))) == to_plain(records)


def test_round_trip_through_a_file_without_code(tmp_path: Path) -> None:
    records = history_of(cut_thrice())
    torch.save(to_plain(records), tmp_path / "history.pt")
    assert from_plain(torch.load(tmp_path / "history.pt", weights_only=True)) == records


def test_history_is_plain_through_and_through() -> None:
    def kinds(value: Any) -> set[type]:
        if isinstance(value, dict):
            return {dict}.union(*map(kinds, [*value.keys(), *value.values()]))
        return {list}.union(*map(kinds, value)) if isinstance(value, list) else {type(value)}

    assert kinds(to_plain(history_of(cut_thrice()))) <= {dict, list, int, float, str, type(None)}


def test_a_dense_model_has_no_history() -> None:
    assert history_of(network()) == ()
    assert from_plain(to_plain(())) == ()


@pytest.mark.parametrize("plain", [None, 3, "cut", [None], ["cut"], [{}], [[]], {"a": 1}, [{"channels": {}}]])
def test_damaged_plain_values(plain: object) -> None:
    with pytest.raises(HistoryError, match=r"damaged or from another version .* Load a checkpoint"):
        from_plain(plain)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shapes", [1, 2]),
        ("shapes", {"0.weight": "wide"}),
        ("kept", {"0.weight": [0, 1]}),
        ("kept", {"0.weight": {"first": [0]}}),
        ("kept", {"0.weight": {0: None}}),
        ("attributes", {"0": {"out_channels": None}}),
        ("channels", {"0": {"dense": 8}}),
        ("params", None),
        ("unheard of", 1),
    ],
)
def test_plain_values_with_a_damaged_entry(key: str, value: object) -> None:
    plain = to_plain(history_of(cut_thrice()))
    plain[1][key] = value
    with pytest.raises(HistoryError, match="damaged or from another version"):
        from_plain(plain)


# replay


def test_replay_of_several_cuts_gives_the_same_model() -> None:
    pruned, dense = cut_thrice(), network(seed=9)
    replay(dense, history_of(pruned))
    assert shapes(dense) == shapes(pruned)
    assert widths(dense) == widths(pruned) == [2, 2]
    assert repr(dense) == repr(pruned)
    assert history_of(dense) == history_of(pruned)


def test_replay_keeps_the_same_channels() -> None:
    pruned, dense = cut_thrice(), network()
    replay(dense, history_of(pruned))
    assert equal(dense.state_dict(), pruned.state_dict())


def test_replay_goes_on_from_the_cuts_that_were_done() -> None:
    records, begun = history_of(cut_thrice()), network()
    replay(begun, records[:1])
    assert widths(begun) == [6, 6]
    replay(begun, records)
    replay(begun, records)
    assert widths(begun) == [2, 2]
    assert history_of(begun) == records


def test_ratios_after_a_replay_count_against_the_dense_model() -> None:
    dense = network()
    replay(dense, history_of(cut_thrice())[:1])
    record = prune(dense, EXAMPLE, pruning_ratio=0.5)
    assert widths(dense) == [4, 4]
    assert (record.reached, record.channels["0"].dense, record.channels["0"].before) == (0.5, 8, 6)


def test_replay_into_another_model() -> None:
    wider = network()
    wider[3] = nn.Conv2d(8, 9, 3, bias=False)
    before = shapes(wider)
    with pytest.raises(
        HistoryError, match=r"cuts 3\.weight of shape \(8, 8, 3, 3\), but the model's is \(9, 8, 3, 3\)"
    ):
        replay(wider, history_of(cut_thrice()))
    with pytest.raises(HistoryError, match=r"the model's is None\. Build the model with the arguments"):
        replay(nn.Linear(3, 3), history_of(cut_thrice()))
    assert shapes(wider) == before


def test_replay_into_a_model_that_was_cut_otherwise() -> None:
    other = network()
    prune(other, EXAMPLE, pruning_ratio=0.25, criterion=Random(99))
    before = shapes(other)
    with pytest.raises(
        HistoryError, match=r"has been through 1 cuts that are not the first of this history's 3\. Build"
    ):
        replay(other, history_of(cut_thrice()))
    assert shapes(other) == before


@pytest.mark.parametrize(
    "positions",
    [[0, 8], [-1, 2], [5, 3], [2, 2], [], [0, 10**12]],
    ids=["beyond", "negative", "descending", "twice", "none", "far beyond"],
)
def test_impossible_positions(positions: list[int]) -> None:
    plain = to_plain(history_of(cut_thrice()))
    plain[0]["kept"]["0.weight"][0] = positions
    net = network()
    with pytest.raises(HistoryError, match=r"impossible positions of 0\.weight; the checkpoint is damaged"):
        replay(net, from_plain(plain))
    assert shapes(net) == shapes(network())


@pytest.mark.parametrize("dim", [4, -1, 77])
def test_impossible_dimensions(dim: int) -> None:
    plain = to_plain(history_of(cut_thrice()))
    plain[0]["kept"]["0.weight"][dim] = [0]
    with pytest.raises(HistoryError, match=r"impossible positions of 0\.weight"):
        replay(network(), from_plain(plain))


@pytest.mark.parametrize("attributes", [{"99": {"out_channels": 3}}, {"0": {"colour": 3}}])
def test_sizes_of_what_is_not_there(attributes: dict[str, dict[str, int]]) -> None:
    plain = to_plain(history_of(cut_thrice()))
    plain[0]["attributes"] = attributes
    net = network()
    with pytest.raises(HistoryError, match=r"sets sizes of the module .* which the model does not have"):
        replay(net, from_plain(plain))
    assert shapes(net) == shapes(network())


# copies


@pytest.mark.parametrize("copy", [deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_history(copy: Callable[[nn.Module], nn.Module]) -> None:
    net = cut_thrice()
    twin = copy(net)
    assert history_of(twin) == history_of(net)
    assert torch.equal(output(twin), output(net))
    prune(twin, EXAMPLE, pruning_ratio=0.8)
    assert len(history_of(net)) == 3


# files


def test_save_and_load(tmp_path: Path) -> None:
    net = cut_thrice()
    save_pruned(net, tmp_path / "net.pt")
    dense = network(seed=9)
    loaded = load_pruned(dense, tmp_path / "net.pt")
    assert loaded is dense
    assert torch.equal(output(loaded), output(net))
    assert history_of(loaded) == history_of(net)
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt"]


def test_a_dense_model_is_saved_and_loaded_too(tmp_path: Path) -> None:
    net = network()
    save_pruned(net, str(tmp_path / "net.pt"))
    assert torch.equal(output(load_pruned(network(seed=9), str(tmp_path / "net.pt"))), output(net))


@pytest.mark.parametrize("example", [EXAMPLE, None])
def test_load_from_a_trainer_checkpoint(tmp_path: Path, example: Tensor | None) -> None:
    module = Module(example=example)
    callback = MagnitudePruneCallback(0.5, begin=0, end=3)
    fit = trainer(callback)
    fit.fit(module)
    fit.save_checkpoint(tmp_path / "net.ckpt")
    loaded = load_pruned(Module(seed=9), tmp_path / "net.ckpt")
    assert len(history_of(loaded)) > 1
    assert widths(loaded) == widths(module) == [4, 4]
    assert torch.equal(output(loaded), output(module))
    assert history_of(loaded) == history_of(module)


def test_load_from_a_checkpoint_of_weights_only(tmp_path: Path) -> None:
    """`ModelCheckpoint(save_weights_only=True)` writes no callback's keys, but the weights are of the new shapes."""
    module = Module()
    fit = trainer(PruneCallback(0.5, begin=1, end=1))
    fit.fit(module)
    fit.save_checkpoint(tmp_path / "net.ckpt", weights_only=True)
    assert torch.equal(output(load_pruned(Module(seed=9), tmp_path / "net.ckpt")), output(module))


def test_saving_replaces_the_old_file_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pt"
    save_pruned(cut_thrice(), path)
    old = path.read_bytes()

    def fail(content: object, target: Path) -> None:
        Path(target).write_bytes(b"half of")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pruned(network(), path)
    assert path.read_bytes() == old
    monkeypatch.undo()
    save_pruned(network(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt"]
    assert history_of(load_pruned(network(), path)) == ()


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


RECORDS: tuple[PruneRecord, ...] = history_of(cut_thrice())


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}},
        {KEY: []},
        {"epoch": 3, "state_dict": {"a": torch.ones(1)}},
        [1, 2],
        torch.ones(3),
        {"state_dict": network().state_dict(), KEY: None},
        {"state_dict": network().state_dict(), KEY: [{"channels": 1}]},
        {"state_dict": network().state_dict(), KEY: to_plain(RECORDS)},  # dense weights, cut shapes
        {"state_dict": {}, KEY: to_plain(RECORDS)},
        {"state_dict": [1], KEY: []},
    ],
    ids=lambda content: type(content).__name__,
)
def test_foreign_files(tmp_path: Path, content: object) -> None:
    with pytest.raises(HistoryError):
        load_pruned(network(), written(tmp_path / "net.pt", content))


def test_foreign_files_are_named_with_the_way_out(tmp_path: Path) -> None:
    path = written(tmp_path / "net.pt", {"state_dict": {}})
    with pytest.raises(
        HistoryError, match=r"net\.pt is no checkpoint with a pruning history.*Save with a prune callback"
    ):
        load_pruned(network(), path)


@pytest.mark.parametrize("bytes_left", [0, 1, 100, 1000])
def test_truncated_files(tmp_path: Path, bytes_left: int) -> None:
    path = tmp_path / "net.pt"
    save_pruned(cut_thrice(), path)
    path.write_bytes(path.read_bytes()[:bytes_left])
    net = network()
    with pytest.raises(HistoryError, match=r"net\.pt is no checkpoint"):
        load_pruned(net, path)
    assert shapes(net) == shapes(network())


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_pruned(network(), tmp_path / "nowhere.pt")


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.victim,)


def test_no_code_runs(tmp_path: Path) -> None:
    victim = tmp_path / "ran"
    written(tmp_path / "trap.pt", {"state_dict": network().state_dict(), KEY: [], "extra": Trap(victim)})
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps({"state_dict": {}, KEY: Trap(victim)}))
    for name in ("trap.pt", "trap.pkl"):
        with pytest.raises(HistoryError, match=r"is no checkpoint|holds more than weights and plain data"):
            load_pruned(network(), tmp_path / name)
        assert not victim.exists()
    pickle.loads((tmp_path / "trap.pkl").read_bytes())
    assert victim.exists()  # the trap was sharp


def test_weights_that_do_not_fit_are_told(tmp_path: Path) -> None:
    state = cut_thrice().state_dict()
    del state["8.bias"]
    path = written(tmp_path / "net.pt", {"state_dict": state, KEY: to_plain(RECORDS)})
    with pytest.raises(HistoryError, match=r"(?s)The weights of .*net\.pt do not fit the model:.*8\.bias"):
        load_pruned(network(), path)
