"""Sparse storage: small files, all bits back, channel cuts and masks with them, and files that were tampered with."""

from __future__ import annotations

import io
import pickle
import random
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

from lightning_prune import history_of, load_pruned, prune, save_pruned
from lightning_prune.errors import HistoryError, PruningError
from lightning_prune.masks.held import Masks, apply, hold, masks_of
from lightning_prune.masks.magnitude import magnitude_masks
from lightning_prune.masks.semi_structured import to_semi_structured
from lightning_prune.sizes import stale_sizes
from lightning_prune.sparse_storage import load_sparse, save_sparse

pytestmark = [
    pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
]


def lenet(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def masked(net: nn.Module, masks: Masks) -> None:
    apply(masks, net)
    hold(net, masks)


def at_random(net: nn.Module, density: float) -> Masks:
    return {name: torch.rand(weight.shape) < density for name, weight in net.named_parameters() if weight.dim() > 1}


def size(path: Path) -> int:
    return path.stat().st_size


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name in left
    )


def same_masks(one: nn.Module, other: nn.Module) -> bool:
    left, right = masks_of(one), masks_of(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class TestSize:
    def test_12_times_fewer_weights_make_a_file_8_times_smaller(self, tmp_path: Path) -> None:
        net = lenet()
        masked(net, at_random(net, 1 / 12))
        torch.save(net.state_dict(), tmp_path / "dense.pt")
        save_sparse(net, tmp_path / "sparse.pt")
        assert size(tmp_path / "dense.pt") / size(tmp_path / "sparse.pt") > 8
        back = load_sparse(lenet(1), tmp_path / "sparse.pt")
        assert same_bits(back, net)
        assert same_masks(back, net)

    def test_two_of_four_take_their_values_and_four_bits_a_group(self, tmp_path: Path) -> None:
        net = nn.Linear(512, 256, bias=False)
        masked(net, magnitude_masks(net, 0.0, "2:4"))
        save_sparse(net, tmp_path / "sparse.pt")
        assert size(tmp_path / "sparse.pt") < 512 * 256 // 4 * (2 * 4 + 0.5) + 4096

    def test_a_dense_network_takes_no_more_than_it_did(self, tmp_path: Path) -> None:
        torch.save(lenet().state_dict(), tmp_path / "dense.pt")
        save_sparse(lenet(), tmp_path / "sparse.pt")
        assert size(tmp_path / "sparse.pt") < size(tmp_path / "dense.pt") + 2048


class TestThereAndBack:
    @pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_bit_for_bit(self, tmp_path: Path, kind: torch.dtype) -> None:
        net = lenet().to(kind)
        masked(net, at_random(net, 0.1))
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[kind.itemsize]
        with torch.no_grad():
            net[1].weight.view(-1).view(integer)[:3] = torch.tensor([torch.iinfo(integer).min, -1, -2], dtype=integer)
        save_sparse(net, tmp_path / "net.pt")
        back = load_sparse(lenet(1).to(kind), tmp_path / "net.pt")
        assert same_bits(back, net)
        assert same_masks(back, net)
        assert back[1].weight[0, 0] == 0
        assert back[1].weight[0, 0].signbit()

    def test_a_network_with_channel_cuts_and_masks(self, tmp_path: Path) -> None:
        net = network()
        prune(net, EXAMPLE, pruning_ratio=0.25)
        masked(net, magnitude_masks(net, 0.8))
        for target in (network(1), deepcopy(net)):
            save_sparse(net, tmp_path / "net.pt")
            back = load_sparse(target, tmp_path / "net.pt")
            assert same_bits(back, net)
            assert same_masks(back, net)
            assert history_of(back) == history_of(net)

    def test_masks_that_the_values_do_not_tell(self, tmp_path: Path) -> None:
        net = lenet()
        masks = at_random(net, 0.1)
        apply(masks, net)
        masks["1.weight"] = torch.rand(300, 784) < 0.05
        masks["5.weight"] = torch.ones(10, 100).bool()
        hold(net, masks)
        save_sparse(net, tmp_path / "net.pt")
        back = load_sparse(lenet(1), tmp_path / "net.pt")
        assert same_bits(back, net)
        assert same_masks(back, net)

    def test_kept_weights_that_are_zero_stay_kept(self, tmp_path: Path) -> None:
        net = lenet()
        masks = at_random(net, 0.1)
        masked(net, masks)
        net[1].weight.data[masks["1.weight"]] = 0
        save_sparse(net, tmp_path / "net.pt")
        assert same_masks(load_sparse(lenet(1), tmp_path / "net.pt"), net)

    def test_without_masks_there_are_none(self, tmp_path: Path) -> None:
        net = lenet()
        apply(at_random(net, 0.1), net)
        save_sparse(net, tmp_path / "net.pt")
        target = lenet(1)
        hold(target, at_random(target, 0.5))
        assert masks_of(load_sparse(target, tmp_path / "net.pt")) == {}
        assert same_bits(target, net)

    def test_tied_weights_are_written_once(self, tmp_path: Path) -> None:
        def tied() -> nn.Sequential:
            net = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
            net[1].weight = net[0].weight
            return net

        net = tied()
        masked(net, at_random(net, 0.1))
        save_sparse(net, tmp_path / "net.pt")
        back = load_sparse(tied(), tmp_path / "net.pt")
        assert same_bits(back, net)
        assert same_masks(back, net)
        assert size(tmp_path / "net.pt") < 256 * 256 * 0.1 * 5.5 + 4096

    def test_recurrent_and_convolutional_layers_and_statistics(self, tmp_path: Path) -> None:
        def net() -> nn.ModuleList:
            return nn.ModuleList([nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.LSTM(32, 32, 2), nn.Linear(8, 8)]).to(
                memory_format=torch.channels_last
            )

        one = net()
        masked(one, magnitude_masks(one, 0.95))
        one[1].running_mean.data.fill_(0.25)
        save_sparse(one, tmp_path / "net.pt")
        back = load_sparse(net(), tmp_path / "net.pt")
        assert same_bits(back, one)
        assert same_masks(back, one)

    def test_a_wrapped_model(self, tmp_path: Path) -> None:
        net = lenet()
        masked(net, at_random(net, 0.1))
        save_sparse(nn.DataParallel(net), tmp_path / "net.pt")
        assert same_bits(load_sparse(nn.DataParallel(lenet(1)), tmp_path / "net.pt").module, net)  # type: ignore[arg-type]


class TestFiles:
    def test_a_file_appears_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(content: object, path: Path) -> None:
            path.write_bytes(b"half")
            raise OSError("No space left on device")

        path = tmp_path / "net.pt"
        save_sparse(lenet(), path)
        before = path.read_bytes()
        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            save_sparse(lenet(1), path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        save_pruned(lenet(), tmp_path / "dense.pt")
        with pytest.raises(HistoryError, match=r"no file of `save_sparse`.*`load_pruned`"):
            load_sparse(lenet(), tmp_path / "dense.pt")
        save_sparse(lenet(), tmp_path / "sparse.pt")
        with pytest.raises(HistoryError):
            load_pruned(network(), tmp_path / "sparse.pt")
        with pytest.raises(FileNotFoundError):
            load_sparse(lenet(), tmp_path / "none.pt")

    def test_other_models_are_refused(self, tmp_path: Path) -> None:
        net = lenet()
        masked(net, at_random(net, 0.1))
        save_sparse(net, tmp_path / "sparse.pt")
        target = nn.Sequential(nn.Flatten(), nn.Linear(784, 200))
        before = snapshot(target)
        with pytest.raises(HistoryError, match=r"do not fit the model.*Build the model"):
            load_sparse(target, tmp_path / "sparse.pt")
        assert same_state(snapshot(target), before)


# files that were tampered with

INPUT = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(5))


def written() -> nn.Sequential:
    net = network()
    prune(net, EXAMPLE, pruning_ratio=0.25)
    masked(net, magnitude_masks(net, 0.8, ignore=["0"]))
    return net


SOURCE = written()


def good(path: Path) -> bytes:
    save_sparse(SOURCE, path)
    return path.read_bytes()


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load(path: Path, content: bytes) -> str:
    """Load into a dense network with masks of its own, and tell what is wrong with the outcome, or nothing."""
    path.write_bytes(content)
    net = network(9)
    hold(net, magnitude_masks(net, 0.3))
    before, held = snapshot(net), masks_of(net)
    try:
        load_sparse(net, path)
    except HistoryError:
        return "" if same_state(snapshot(net), before) and masks_of(net) is held else "refused, but changed"
    except BaseException as error:
        return f"{type(error).__name__} in place of a HistoryError: {error}"
    fits = all(net.get_parameter(name).shape == mask.shape for name, mask in masks_of(net).items())
    works = net.eval()(INPUT).shape == (3, 4) and not stale_sizes(net)
    return "" if fits and works else "loaded, but it does not work"


def bytes_changed(data: bytes, chance: random.Random) -> bytes:
    torn = bytearray(data)
    place, length = chance.randrange(len(torn)), chance.choice((1, 8, 100))
    action = chance.randrange(4)
    if action == 0:
        torn[place] ^= 1 << chance.randrange(8)
    elif action == 1:
        del torn[place:]
    elif action == 2:
        torn[place:place] = chance.randbytes(length)
    else:
        del torn[place : place + length]
    return bytes(torn)


ODD: list[Any] = [
    None, True, -1, 0, 1, 3, 16, 10**6, 2**63, 10**400, 0.5, nan, inf, "", "8.weight", b"4", [], {}, [[]], {"a": 1},
    (1, 2), torch.ones(2), torch.zeros(()), torch.empty(0), torch.zeros(3, dtype=torch.uint8), torch.ones(2, 2).bool(),
    torch.ones(3, device="meta"), torch.ones(3).to_sparse(), torch.full((9,), 255, dtype=torch.uint8), torch.float32,
]  # fmt: skip


def spots(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return [spot for key in value for spot in [(value, key), *spots(value[key])]]
    if isinstance(value, list):
        return [spot for key in range(len(value)) for spot in [(value, key), *spots(value[key])]]
    return []


def values_changed(data: bytes, chance: random.Random) -> bytes:
    content = torch.load(io.BytesIO(data), weights_only=True)
    parts = [part for part in content if part != "pruning_history"]
    for _ in range(chance.choice((1, 1, 2, 4))):
        holder, key = chance.choice(spots({part: content[part] for part in parts}) or [(content, "sparse")])
        action = chance.randrange(6)
        if action < 3:
            holder[key] = deepcopy(chance.choice(ODD))
        elif action == 3:
            del holder[key]
        elif isinstance(holder.get(key) if isinstance(holder, dict) else holder[key], Tensor):
            tensor = holder[key]
            other = [
                tensor.double(),
                tensor[None],
                tensor.flatten()[:-1],
                torch.cat([tensor.flatten()] * 2),
                tensor * 0,
            ]
            holder[key] = chance.choice(other)
        elif type(holder[key]) is int:
            holder[key] += chance.choice((-1, 1))
        for part in parts:
            content.setdefault(part, {})
    return saved(content)


@pytest.mark.parametrize("change", [bytes_changed, values_changed])
def test_damaged_files_are_refused_or_load_a_network_that_works(
    tmp_path: Path, change: Callable[[bytes, random.Random], bytes]
) -> None:
    chance = random.Random(3)
    data = good(tmp_path / "net.pt")
    assert load(tmp_path / "net.pt", data) == ""
    outcomes = {load(tmp_path / "net.pt", change(data, chance)) for _ in range(150)}
    assert outcomes == {""}


class _Striking:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code in a file has run",)


@pytest.mark.parametrize("part", ["state_dict", "sparse", "versions", "masked", "pruning_masks", "pruning_history"])
def test_no_code_in_a_file_runs(tmp_path: Path, part: str) -> None:
    content = torch.load(io.BytesIO(good(tmp_path / "net.pt")), weights_only=True)
    content[part] = _Striking()
    assert load(tmp_path / "net.pt", saved(content)) == ""
    assert load(tmp_path / "net.pt", pickle.dumps(content)) == ""


class TestSemiStructured:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
    def test_without_a_gpu_it_says_what_it_needs(self) -> None:
        net = nn.Linear(64, 64)
        masked(net, magnitude_masks(net, 0.0, "2:4"))
        before = net.weight
        with pytest.raises(PruningError, match=r"compute capability 8\.0.*here is no GPU.*`save_sparse`"):
            to_semi_structured(net)
        assert net.weight is before

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_products_are_those_of_the_masked_weights(self) -> None:
        net = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)).half().cuda()
        masked(net, magnitude_masks(net, 0.0, "2:4", ignore=["1"]))
        inputs = torch.randn(128, 128).half().cuda()
        expected = net(inputs)
        assert to_semi_structured(net) == ("0",)
        assert torch.allclose(net(inputs), expected, atol=1e-2)
