"""Convolutions that become two thinner ones: exact at full rank, best below it, and as fast as asked."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gated_networks import CHANNELS
from torch import Tensor, nn

import lightning_prune
from lightning_prune import masks
from lightning_prune.cost import count_macs
from lightning_prune.errors import NothingToPruneError, PruningError, SurgeryError
from lightning_prune.factorization import KINDS, Factorization, Kind, factorize, lay_out
from lightning_prune.factorization.outputs import Outputs
from lightning_prune.factorization.ranks import Menu, choose_ranks
from lightning_prune.factorization.spectrum import Spectrum, spectrum_of
from lightning_prune.gates import choose
from lightning_prune.graph import read
from lightning_prune.inputs import bind
from lightning_prune.layers import HardConcrete
from lightning_prune.layers.gates import attach

SETTINGS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "padding": (0, 2)},
    {"kernel_size": (5, 2), "stride": (2, 3), "padding": (3, 1)},
    {"kernel_size": 3, "stride": 2, "dilation": (2, 1), "padding": (2, 0)},
    {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": (3, 4), "padding": "same", "padding_mode": "replicate"},
    {"kernel_size": (3, 4), "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "bias": False},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    {"kernel_size": (3, 2), "padding": 2, "padding_mode": "circular", "stride": 2},
]


def network(bias: bool = True) -> nn.Sequential:
    """Three convolutions that can be factorised well, and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=bias),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=bias),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    ).eval()


EXAMPLE = torch.zeros(2, 3, 12, 12)


def pictures(count: int = 6, size: int = 8) -> list[Tensor]:
    """Batches of smooth pictures, whose neighbours are alike as in real ones."""
    rough = torch.randn(count, size, 3, 4, 4)
    smooth = [F.interpolate(batch, 12, mode="bicubic") for batch in rough]
    return [batch + 0.5 * batch.mean(1, keepdim=True) + 1 for batch in smooth]


def whole(kind: Kind, conv: nn.Conv2d) -> int:
    (height, width), c, n = conv.kernel_size, conv.in_channels, conv.out_channels
    return min(c * height, n * width) if kind == "spatial" else min(n, c * height * width)


def wrapped(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv).to(torch.float64)


class TestExactness:
    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    @pytest.mark.parametrize(("c", "n"), [(2, 7), (6, 3)])
    def test_full_rank_is_exact(self, kind: Kind, settings: dict[str, Any], c: int, n: int) -> None:
        net = wrapped(nn.Conv2d(c, n, **settings))
        x = torch.randn(3, c, 11, 13, dtype=torch.float64)
        expected, full = net(x), whole(kind, net[0])
        done = factorize(net, x, kind=kind, ranks={"0": full})
        assert torch.allclose(net(x), expected, atol=1e-10, rtol=0)
        first, second = net[0]
        assert [type(part) for part in net[0]] == [nn.Conv2d, nn.Conv2d]
        assert (first.out_channels, first.bias, second.in_channels) == (full, None, full)
        assert done.errors == {"0": 0}
        assert done.macs_after == count_macs(net, bind(net, x))

    def test_full_rank_is_exact_where_outputs_were_looked_at(self) -> None:
        for bias in (True, False):
            net = wrapped(nn.Conv2d(3, 5, 3, padding=1, bias=bias))
            x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
            expected = net(x)
            done = factorize(net, x, kind="channel", ranks={"0": 5}, batches=[x])
            assert torch.allclose(net(x), expected, atol=1e-10, rtol=0)
            assert done.biases == (() if bias else ("0",))

    def test_the_factors_are_as_the_papers_have_them(self) -> None:
        settings = {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1)}
        net = nn.Sequential(nn.Conv2d(4, 6, (3, 5), **settings))  # type: ignore[arg-type]
        factorize(net, torch.zeros(1, 4, 12, 12), kind="spatial", ranks={"0": 2})
        down, across = net[0]
        assert (down.kernel_size, down.stride, down.padding, down.dilation) == ((3, 1), (2, 1), (1, 0), (2, 1))
        assert (across.kernel_size, across.stride, across.padding, across.dilation) == ((1, 5), (1, 3), (0, 2), (1, 1))
        net = nn.Sequential(nn.Conv2d(4, 6, (3, 5), **settings))  # type: ignore[arg-type]
        factorize(net, torch.zeros(1, 4, 12, 12), kind="channel", ranks={"0": 2})
        thin, wide = net[0]
        assert (thin.kernel_size, thin.stride, thin.padding, thin.dilation) == ((3, 5), (2, 3), (1, 2), (2, 1))
        assert (wide.kernel_size, wide.stride, wide.padding, wide.in_channels) == ((1, 1), (1, 1), (0, 0), 2)


class TestErrors:
    @pytest.mark.parametrize("kind", KINDS)
    def test_of_weights_they_are_the_tail_of_the_singular_values(self, kind: Kind) -> None:
        conv = nn.Conv2d(4, 6, 3).double()
        matrix = conv.weight.permute(1, 2, 0, 3).reshape(12, 18) if kind == "spatial" else conv.weight.flatten(1)
        squares, weight = torch.linalg.svdvals(matrix.detach()).square(), conv.weight.detach()
        before = 1.0
        for rank in range(1, whole(kind, conv) + 1):
            net = nn.Sequential(copy.deepcopy(conv))
            error = factorize(net, torch.zeros(1, 4, 5, 5).double(), kind=kind, ranks={"0": rank}).errors["0"]
            assert error == pytest.approx(sqrt(float(squares[rank:].sum() / squares.sum())), abs=1e-12)
            assert error == pytest.approx(float((product(net[0]) - weight).norm() / weight.norm()), abs=1e-12)
            assert error < before
            before = error

    @pytest.mark.parametrize("bias", [True, False])
    def test_of_outputs_they_are_the_tail_of_the_eigenvalues(self, bias: bool) -> None:
        conv = nn.Conv2d(3, 6, 3, padding=1, bias=bias).double()
        batches = [batch.double() for batch in pictures(3, 4)]
        y = conv(torch.cat(batches)).detach()
        rows = y.transpose(0, 1).flatten(1)
        values = torch.linalg.eigvalsh(rows.cov(correction=0)).flip(0)
        deviation = (rows - rows.mean(1, keepdim=True)).norm()
        for rank in range(1, 7):
            net = nn.Sequential(copy.deepcopy(conv))
            done = factorize(net, batches[0], kind="channel", ranks={"0": rank}, batches=batches, points=None)
            assert done.errors["0"] == pytest.approx(sqrt(max(float(values[rank:].sum() / values.sum()), 0)), abs=1e-7)
            new = net(torch.cat(batches)).detach()
            assert done.errors["0"] == pytest.approx(float((new - y).norm() / deviation), abs=1e-7)
            assert torch.allclose(new.mean((0, 2, 3)), y.mean((0, 2, 3)), atol=1e-10)

    def test_outputs_tell_more_than_weights(self) -> None:
        conv = nn.Conv2d(3, 16, 3, padding=1)
        batches, unseen = pictures(8), torch.cat(pictures(4))
        errors = {}
        for given in (None, batches):
            net = nn.Sequential(copy.deepcopy(conv))
            factorize(net, EXAMPLE, kind="channel", ranks={"0": 4}, batches=given)
            errors[given is None] = float((net(unseen) - conv(unseen)).detach().square().mean())
        assert errors[False] < 0.5 * errors[True]

    def test_a_layer_of_zeros_loses_nothing(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 8, 3))
        nn.init.zeros_(net[0].weight)
        done = factorize(net, EXAMPLE, kind="spatial", speed_up=3)
        assert done.errors == {"0": 0}
        assert net(EXAMPLE).isfinite().all()


def product(pair: nn.Sequential) -> Tensor:
    """The one weight that two factors stand for."""
    first, second = pair[0].weight.detach(), pair[1].weight.detach()
    if second.shape[3] == 1:
        return torch.einsum("rcyx,nr->ncyx", first, second[:, :, 0, 0])
    return torch.einsum("rcy,nrx->ncyx", first[..., 0], second[:, :, 0])


class TestOutputs:
    def test_sums_over_batches_are_those_over_all_rows(self) -> None:
        rows = torch.randn(50, 4) * torch.tensor([1, 2, 3, 4]) + 7
        outputs = Outputs(4)
        for part in rows.split(11):
            outputs.add(part)
        assert outputs.rows == 50
        assert torch.allclose(outputs.mean, rows.double().mean(0))
        assert torch.allclose(outputs.covariance, rows.double().T.cov(correction=0), atol=1e-9)

    def test_so_many_points_of_each_example_are_looked_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Tensor] = []
        monkeypatch.setattr(Outputs, "add", lambda self, rows: seen.append(rows) or _add(self, rows))
        x = torch.arange(2 * 36.0).view(2, 1, 6, 6)
        conv = nn.Conv2d(1, 2, 1)
        nn.init.ones_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        factorize(nn.Sequential(conv), x, kind="channel", ranks={"0": 1}, batches=[x], points=9)
        values = seen[0][:, 0]
        assert seen[0].shape == (18, 2)
        assert len(values.unique()) == 18
        assert (values[:9] < 36).all()
        assert (values[9:] >= 36).all()

    def test_nothing_of_the_model_but_its_layers_changes(self) -> None:
        net = nn.Sequential(nn.Dropout(0.5), network())
        net.train()
        net[1][4].eval()
        net[1][3].eval()
        before, batches = copy.deepcopy(net.state_dict()), pictures()
        draws, of_numpy, of_python = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        factorize(net, EXAMPLE, kind="channel", speed_up=2, batches=shuffled(batches))
        assert torch.equal(draws, torch.get_rng_state())
        assert (of_numpy == np.random.get_state()[1]).all()
        assert of_python == random.getstate()
        assert [part.training for part in net[1]] == [index not in (3, 4) for index in range(11)]
        assert not net[1][3].training
        assert not net[1][3][0].training
        assert net[1][6][1].training
        after = net.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name in after)
        assert not any(layer._forward_hooks for layer in net.modules())

    def test_the_same_points_are_drawn_again(self) -> None:
        nets, batches = [network()] * 2, pictures()
        nets = [copy.deepcopy(net) for net in nets]
        records = [factorize(net, EXAMPLE, kind="channel", speed_up=2, batches=batches) for net in nets]
        assert records[0] == records[1]
        assert all(torch.equal(*pair) for pair in zip(*(net.state_dict().values() for net in nets), strict=True))


_add = Outputs.add


def shuffled(batches: list[Tensor]) -> Iterator[list[Tensor]]:
    """What a loader does: it draws, and yields lists with targets."""
    for index in torch.randperm(len(batches)):
        random.random(), np.random.rand()
        yield [batches[index], torch.zeros(len(batches[index]))]


class TestSpeedUp:
    @pytest.mark.parametrize(("kind", "data"), [("spatial", False), ("channel", False), ("channel", True)])
    @pytest.mark.parametrize("speed_up", [1.3, 2, 3.5])
    def test_it_is_reached(self, kind: Kind, data: bool, speed_up: float) -> None:
        net = network()
        head, before = 24 * 5, count_macs(net, bind(net, EXAMPLE))
        done = factorize(net, EXAMPLE, kind=kind, speed_up=speed_up, batches=pictures() if data else None)
        after = count_macs(net, bind(net, EXAMPLE))
        assert speed_up <= (before - head) / (after - head) < 1.06 * speed_up
        budget, total = (before - head) / speed_up, after - head
        assert all(total + done.macs[name][1] / rank > budget for name, rank in done.ranks.items())
        assert (done.macs_before, done.macs_after) == (before, after)
        assert done.speed_up == pytest.approx((before - head) / (after - head))
        assert sum(macs for macs, _ in done.macs.values()) == before - head
        assert net(torch.randn(4, 3, 12, 12)).shape == (4, 5)

    def test_a_layer_that_is_called_twice_counts_twice(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(8, 8, 3, padding=1)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(self.conv(x)[..., ::2])  # type: ignore[no-any-return]

        net, x = Twice(), torch.randn(2, 8, 6, 6)
        done = factorize(net, x, kind="spatial", ranks={"conv": 5})
        assert done.macs == {"conv": (8 * 8 * 9 * (36 + 18), (5 * 8 * 3 * 2) * (36 + 18))}
        assert done.macs_after == count_macs(net, bind(net, x))

    def test_where_one_layer_has_low_rank_that_one_pays(self) -> None:
        net = network()
        with torch.no_grad():
            basis = torch.randn(24, 3) @ torch.randn(3, 24 * 9)
            net[6].weight.copy_(basis.view_as(net[6].weight))
        x = torch.randn(4, 3, 12, 12)
        expected = net(x)
        done = factorize(net, EXAMPLE, kind="channel", speed_up=1.4)
        assert set(done.ranks) == {"6"}
        assert torch.allclose(net(x), expected, atol=1e-5)
        assert done.stayed == dict.fromkeys(("0", "3"), "is worth more whole")

    def test_thin_layers_stay(self) -> None:
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 1, 3), nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3))
        done = factorize(net, torch.zeros(1, 1, 9, 9), kind="channel", speed_up=1.5)
        assert set(done.macs) == {"0", "3"}
        assert "so thin" in done.stayed["1"]
        assert "so thin" in done.stayed["2"]

    def test_out_of_reach(self) -> None:
        unchanged(network(), PruningError, r"out of reach: with rank 1 .* times as fast", speed_up=500)

    def test_at_the_edge_of_reach(self) -> None:
        net = nn.Sequential(nn.Conv2d(4, 4, 3))
        done = factorize(net, torch.zeros(1, 4, 9, 9), kind="channel", speed_up=144 / 40)
        assert done.ranks == {"0": 1}


class TestRanks:
    def menu(self, energies: list[float], whole: int, per_rank: int) -> Menu:
        parts = torch.tensor(energies, dtype=torch.float64)
        return Menu.of(whole, per_rank, Spectrum(parts, torch.empty(0), torch.empty(0)))

    def test_what_costs_no_less_is_not_on_the_menu(self) -> None:
        menu = self.menu([4, 3, 2, 1], whole=60, per_rank=20)
        assert menu.costs.tolist() == [20, 40, 60]
        assert np.allclose(np.exp(menu.energies), [0.4, 0.7, 1.0])
        assert menu.cheaper(2) == (pytest.approx(-np.log(0.7) / 20), 1)
        assert menu.cheaper(0)[0] == np.inf
        assert menu.dearer(0, 19)[0] == -np.inf
        assert menu.dearer(0, 20) == (pytest.approx(np.log(0.7 / 0.4) / 20), 1)

    def test_a_layer_leaps_over_ranks_that_save_next_to_nothing(self) -> None:
        menu = self.menu([4, 3, 2, 1], whole=61, per_rank=20)
        assert menu.cheaper(3) == (pytest.approx(-np.log(0.7) / 21), 1)
        assert menu.cheaper(1) == (pytest.approx(np.log(0.7 / 0.4) / 20), 0)

    def test_they_come_close_to_the_best_there_are(self) -> None:
        generator = torch.Generator().manual_seed(1)
        for speed_up in (1.2, 1.5, 2, 3, 4):
            for _ in range(6):
                menus = {
                    name: self.menu((torch.rand(6, generator=generator) ** 4).sort(descending=True)[0].tolist(), *cost)
                    for name, cost in {"a": (50, 9), "b": (80, 20), "c": (30, 5)}.items()
                }
                budget = int(160 / speed_up)
                ranks = choose_ranks(menus, speed_up)
                places = [ranks.get(name, len(menu.costs)) - 1 for name, menu in menus.items()]
                cost, energy = self.told(menus, places)
                assert cost <= budget
                every = itertools.product(*(range(len(menu.costs)) for menu in menus.values()))
                best = max(told[1] for told in (self.told(menus, each) for each in every) if told[0] <= budget)
                assert best - 0.35 <= energy <= best

    def told(self, menus: dict[str, Menu], places: Any) -> tuple[int, float]:
        chosen = list(zip(menus.values(), places, strict=True))
        return sum(int(menu.costs[at]) for menu, at in chosen), sum(float(menu.energies[at]) for menu, at in chosen)

    def test_the_product_of_energies_is_better_than_with_equal_shares(self) -> None:
        net = network()
        with torch.no_grad():
            net[3].weight.mul_(torch.logspace(0, -3, 24)[:, None, None, None])
        done = factorize(copy.deepcopy(net), EXAMPLE, kind="channel", speed_up=2)
        spectra = {name: spectrum_of(net.get_submodule(name), "channel") for name in done.macs}  # type: ignore[arg-type]

        def energy(ranks: dict[str, int]) -> float:
            return prod(float(spectra[name].retained[rank - 1]) for name, rank in ranks.items())

        costs = {"0": (27 + 16, 27 * 16), "3": (144 + 24, 144 * 24), "6": (216 + 24, 216 * 24)}
        equal = {name: int(dense / 2 / per_rank) for name, (per_rank, dense) in costs.items()}
        assert energy(dict(done.ranks)) > energy(equal)


class TestWhatStays:
    @pytest.mark.parametrize("kind", KINDS)
    def test_each_says_why(self, kind: Kind) -> None:
        class Own(nn.Conv2d):
            pass

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.plain = nn.Conv2d(6, 6, 3, padding=1)
                self.point = nn.Conv2d(6, 6, 1)
                self.row = nn.Conv2d(6, 6, (1, 3), padding=(0, 1))
                self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
                self.own = Own(6, 6, 3, padding=1)
                self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3, padding=1))
                self.old = nn.utils.spectral_norm(nn.Conv2d(6, 6, 3, padding=1))
                self.hooked = nn.Conv2d(6, 6, 3, padding=1)
                self.hooked.register_forward_hook(lambda module, args, output: output * 2)
                self.one = nn.Conv2d(6, 6, 3, padding=1)
                self.again = self.one
                self.tied = nn.Conv2d(6, 6, 3, padding=1)
                self.twin = nn.Conv2d(6, 6, 3, padding=1)
                self.twin.weight = self.tied.weight
                self.ignored = nn.Conv2d(6, 6, 3, padding=1)
                self.unused = nn.Conv2d(6, 6, 3, padding=1)
                self.up = nn.ConvTranspose2d(6, 6, 3, padding=1)

            def forward(self, x: Tensor) -> Tensor:
                for name, layer in self.named_children():
                    x = x if name == "unused" else layer(x)
                return self.again(x)  # type: ignore[no-any-return]

        net = Net().eval()
        before = dict(net.named_modules())
        example = torch.randn(1, 6, 7, 7)
        done = factorize(net, example, kind=kind, speed_up=1.5, ignore=["ignor*"])
        flat = {"point", "row"} if kind == "channel" else set()
        assert {"plain"} <= set(done.macs) <= {"plain", *flat}
        words = {
            "grouped": "2 convolution groups",
            "own": "is a Own",
            "normed": "ParametrizedConv2d",
            "old": "no ordinary parameter",
            "hooked": "hooks",
            "one": "shared",
            "tied": "shared",
            "twin": "shared",
            "ignored": "ignored by the pattern 'ignor*'",
            "unused": "not run",
        }
        if kind == "spatial":
            words.update(point="one row or one column", row="one row or one column")
        assert all(words[name] in done.stayed[name] for name in words)
        assert all(net.get_submodule(name) is before[name] for name in (*words, "up"))
        assert "grouped" in str(done)

    def test_an_operation_without_a_handler_is_no_matter(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 8, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(x).renorm(2, 1, 1.0)  # type: ignore[no-any-return]

        net = Odd()
        with pytest.warns(UserWarning, match="No handler for"):
            lightning_prune.find_groups(net, EXAMPLE)
        done = factorize(net, EXAMPLE, kind="spatial", speed_up=2)
        assert set(done.ranks) == {"conv"}

    def test_none_at_all(self) -> None:
        for net in (nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Conv2d(3, 6, 1))):
            x = torch.zeros(1, 3, 4, 3)
            with pytest.raises(NothingToPruneError, match="no layer to factorise in Sequential"):
                factorize(net, x, kind="spatial", speed_up=2)
        with pytest.raises(NothingToPruneError, match="the model itself"):
            factorize(nn.Conv2d(8, 8, 3), torch.zeros(1, 8, 4, 4), kind="spatial", speed_up=2)


class TestWhatIsKept:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("kind", KINDS)
    def test_dtype_and_format(self, kind: Kind, dtype: torch.dtype) -> None:
        net = network().to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        factorize(net, EXAMPLE.to(dtype), kind=kind, ranks={"0": 4, "3": 5, "6": 6})
        parts = [part for name in "036" for part in net.get_submodule(name).parameters()]
        assert len(parts) == 9
        assert all(part.dtype is dtype for part in parts)
        assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts if part.dim() == 4)
        assert not net[6][0].weight.is_contiguous()
        plain = network()
        factorize(plain, EXAMPLE, kind=kind, ranks={"6": 6})
        assert plain[6][0].weight.is_contiguous()

    def test_what_is_trained(self) -> None:
        net = network()
        net[0].requires_grad_(False)
        net[3].weight.requires_grad_(False)
        net[6].bias.requires_grad_(False)
        with torch.inference_mode():
            factorize(net, EXAMPLE, kind="spatial", ranks={"0": 4, "3": 4, "6": 4})
        trained = [[part.requires_grad for part in net[index].parameters()] for index in (0, 3, 6)]
        assert trained == [[False] * 3, [False, False, True], [True, True, False]]
        net(torch.randn(2, 3, 12, 12)).sum().backward()
        assert net[6][0].weight.grad.abs().sum() > 0

    def test_a_bias_that_is_made_is_trained_as_the_weight(self) -> None:
        net = network(bias=False)
        net[0].requires_grad_(False)
        batches = pictures()
        done = factorize(net, EXAMPLE, kind="channel", ranks={"0": 4, "3": 4}, batches=batches)
        assert done.biases == ("0", "3")
        assert (net[0][1].bias.requires_grad, net[3][1].bias.requires_grad) == (False, True)

    def test_a_wrapped_model(self) -> None:
        net = network()
        done = factorize(nn.DataParallel(net, device_ids=[]), EXAMPLE, kind="spatial", speed_up=2)
        assert set(done.ranks) <= {"0", "3", "6"}
        assert isinstance(net[6], nn.Sequential)


class TestLayingOut:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bias", [True, False])
    def test_the_weights_can_be_loaded(self, kind: Kind, bias: bool, tmp_path: Path) -> None:
        net, twin = network(bias), network(bias).train()
        batches = pictures() if kind == "channel" else None
        done = factorize(net, EXAMPLE, kind=kind, speed_up=2.5, batches=batches)
        torch.save({"state_dict": net.state_dict(), "factorization": asdict(done)}, tmp_path / "net.pt")
        saved = torch.load(tmp_path / "net.pt", weights_only=True)
        assert Factorization(**saved["factorization"]) == done
        lay_out(twin, Factorization(**saved["factorization"]))
        assert twin[6][0].training
        twin.load_state_dict(saved["state_dict"])
        x = torch.randn(3, 3, 12, 12)
        assert torch.equal(twin.eval()(x), net(x))

    def test_what_is_laid_out_can_be_trained(self) -> None:
        net = network().train()
        done = factorize(copy.deepcopy(net), EXAMPLE, kind="spatial", speed_up=2)
        lay_out(net, done)
        net(torch.randn(4, 3, 12, 12)).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in net[6].parameters())

    def test_on_the_meta_device(self) -> None:
        done = factorize(network(), EXAMPLE, kind="channel", speed_up=2)
        net = network().to("meta")
        lay_out(net, done)
        assert all(parameter.is_meta for parameter in net.parameters())

    def test_what_does_not_fit_is_refused(self) -> None:
        done = factorize(network(), EXAMPLE, kind="spatial", speed_up=2)
        others: list[Callable[[nn.Sequential], object]] = [
            lambda net: net.__setitem__(6, nn.Conv2d(2, 2, 3)),
            lambda net: net.__setitem__(6, nn.Conv2d(24, 24, 1)),
            lambda net: net.__setitem__(6, nn.Identity()),
            lambda net: net.__delitem__(slice(6, None)),
            lambda net: lay_out(net, done),
        ]
        for change in others:
            net = network()
            change(net)
            before = list(net.modules())
            with pytest.raises(PruningError, match="does not fit: it "):
                lay_out(net, done)
            assert before == list(net.modules())
        with pytest.raises(TypeError, match="is what `factorize` returned; got dict"):
            lay_out(network(), asdict(done))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"`kind` is one of .*; got 'tucker'"):
            Factorization(**{**asdict(done), "kind": "tucker"})


class TestBesidePruning:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_factorised_model_is_pruned_as_any_other(self, kind: Kind) -> None:
        net = network()
        factorize(net, EXAMPLE, kind=kind, speed_up=2)
        groups = {group.name: group for group in lightning_prune.find_groups(net, EXAMPLE)}
        assert {"6.0", "6.1"} <= groups.keys()
        assert groups["6.0"].frozen is None
        record = lightning_prune.prune(net, EXAMPLE, pruning_ratio=0.4)
        assert record.reached == pytest.approx(0.4, abs=0.02)
        assert net[6][0].out_channels == groups["6.0"].size - round(0.4 * groups["6.0"].size)
        assert net(torch.randn(2, 3, 12, 12)).shape == (2, 5)

    def test_three_c(self, tmp_path: Path) -> None:
        net, twin = network(), network()
        spatial = factorize(net, EXAMPLE, kind="spatial", speed_up=1.5)
        channel = factorize(net, EXAMPLE, kind="channel", speed_up=1.3, batches=pictures())
        lightning_prune.prune(net, EXAMPLE, pruning_ratio=0.2)
        lightning_prune.save_pruned(net, tmp_path / "net.pt")
        for done in (spatial, channel):
            lay_out(twin, done)
        lightning_prune.load_pruned(twin, tmp_path / "net.pt")
        x = torch.randn(3, 3, 12, 12)
        assert torch.equal(twin(x), net(x))
        dense = count_macs(network(), bind(net, EXAMPLE))
        assert count_macs(net, bind(net, EXAMPLE)) < dense / 2.2

    def test_what_was_pruned_masked_or_gated_is_refused(self) -> None:
        done = factorize(network(), EXAMPLE, kind="spatial", speed_up=2)
        pruned, masked, gated = network(), network(), network()
        lightning_prune.prune(pruned, EXAMPLE, pruning_ratio=0.1)
        masks.hold(masked, {"0.weight": torch.ones(16, 3, 3, 3, dtype=torch.bool)})
        attach(gated, choose(gated, read(gated, EXAMPLE), CHANNELS, HardConcrete).gates)
        for net, words in ((pruned, "has been pruned"), (masked, "holds masks"), (gated, "is gated")):
            before = list(net.modules())
            with pytest.raises(PruningError, match=words):
                factorize(net, EXAMPLE, kind="spatial", speed_up=2)
            with pytest.raises(PruningError, match=words):
                lay_out(net, done)
            assert before == list(net.modules())


def unchanged(net: nn.Module, error: type[BaseException], words: str | None, **arguments: Any) -> None:
    """See that it is refused in these words, and that nothing of the model has changed."""
    net.train()
    modules, state = dict(net.named_modules()), copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=words):
        factorize(net, **{"example_inputs": EXAMPLE, "kind": "channel", **arguments})
    assert dict(net.named_modules()) == modules
    assert all(torch.equal(net.state_dict()[name].nan_to_num(7), each.nan_to_num(7)) for name, each in state.items())
    assert all(module.training and not module._forward_hooks for module in net.modules())


class TestBadInput:
    @pytest.mark.parametrize("speed_up", [1, 1.0, 0.5, -2, float("inf"), float("nan"), "2", True])
    def test_speed_up(self, speed_up: Any) -> None:
        unchanged(network(), ValueError, r"`speed_up` is how many times fewer .* got .* pass 2", speed_up=speed_up)

    @pytest.mark.parametrize(
        ("words", "arguments"),
        [
            ("`kind` is one of 'spatial', 'channel'; got 'tucker'", {"kind": "tucker", "speed_up": 2}),
            ("`kind` is one of", {"kind": None, "speed_up": 2}),
            ("one of them, and not both", {}),
            ("one of them, and not both", {"speed_up": 2, "ranks": {"0": 2}}),
            ("`ranks` maps names", {"ranks": {}}),
            ("`ranks` maps names", {"ranks": 4}),
            ("'7', which cannot be factorised: it is no Conv2d .*can be: 0, 3, 6", {"ranks": {"7": 2}}),
            ("it is ignored by the pattern '3'", {"ranks": {"3": 2}, "ignore": ["3"]}),
            ("rank of '6' is a whole number from 1 to 24, .*; got 25", {"ranks": {"0": 3, "6": 25}}),
            ("from 1 to 72, .*; got 73", {"ranks": {"6": 73}, "kind": "spatial"}),
            ("from 1 to 24, .*; got 0", {"ranks": {"6": 0}}),
            ("from 1 to 24, .*; got 2.0", {"ranks": {"6": 2.0}}),
            ("from 1 to 24, .*; got True", {"ranks": {"6": True}}),
            ("pattern 'stem.*' matches no module", {"speed_up": 2, "ignore": ["stem*"]}),
            ("`batches` are for kind='channel'", {"speed_up": 2, "kind": "spatial", "batches": [EXAMPLE]}),
            ("`points` is how many", {"speed_up": 2, "batches": [EXAMPLE], "points": 0}),
            ("`points` is how many", {"speed_up": 2, "batches": [EXAMPLE], "points": 1.5}),
        ],
    )
    def test_wrong_values(self, words: str, arguments: dict[str, Any]) -> None:
        unchanged(network(), ValueError, words, **arguments)

    def test_wrong_types(self) -> None:
        unchanged(network(), TypeError, "`batches` is an iterable .* list", speed_up=2, batches=EXAMPLE)
        unchanged(network(), TypeError, "`batches` is an iterable .* got int", speed_up=2, batches=3)
        unchanged(network(), TypeError, "put it in a list", speed_up=2, ignore="0")
        with pytest.raises(TypeError, match=r"`model` is a torch.nn.Module"):
            factorize("net", EXAMPLE, kind="spatial", speed_up=2)  # type: ignore[arg-type]

    def test_values_that_are_not_finite(self) -> None:
        net = network()
        with torch.no_grad():
            net[3].weight[2, 0, 1, 1] = torch.nan
        unchanged(net, PruningError, "weights of '3' are not finite", speed_up=2)
        broken = pictures()
        broken[2][1, 0] = torch.nan
        unchanged(network(), PruningError, "outputs of '0' .* not finite", speed_up=2, batches=broken)
        with pytest.raises(PruningError, match="no values at all"):
            factorize(network().to("meta"), EXAMPLE.to("meta"), kind="spatial", speed_up=2)

    def test_batches_that_tell_nothing(self) -> None:
        unchanged(network(), PruningError, "`batches` yielded nothing", speed_up=2, batches=iter([]))
        few = [torch.randn(1, 3, 12, 12)]
        unchanged(network(), PruningError, "10 points of the outputs of '0', which has 16", speed_up=2, batches=few)
        unchanged(network(), RuntimeError, "channels", speed_up=2, batches=[torch.randn(2, 4, 12, 12)])

        def torn() -> Iterator[Tensor]:
            yield from pictures()
            raise KeyboardInterrupt

        unchanged(network(), KeyboardInterrupt, None, speed_up=2, batches=torn())

    def test_inputs_that_do_not_fit(self) -> None:
        unchanged(
            network(), PruningError, "fails on `example_inputs`", speed_up=2, example_inputs=torch.zeros(1, 2, 9, 9)
        )

    def test_a_forward_that_reads_weights(self) -> None:
        class Reads(nn.Module):
            def __init__(self, through: Callable[[nn.Module, Tensor], Tensor]) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 8, 3)
                self.listed, self.through = [self.conv], through

            def forward(self, x: Tensor) -> Tensor:
                return self.through(self, x)

        reads = Reads(lambda net, x: F.conv2d(x, net.conv.weight))  # type: ignore[union-attr, arg-type]
        unchanged(reads, SurgeryError, "does not run with factors in place of conv .*unchanged", speed_up=2)
        listed = Reads(lambda net, x: net.listed[0](x))  # type: ignore[operator, index]
        unchanged(listed, SurgeryError, "in a second place, such as a list", speed_up=2)


class TestTheRecord:
    def test_it_prints_as_a_table(self) -> None:
        net = network()
        done = factorize(net, EXAMPLE, kind="channel", ranks={"3": 8, "6": 6}, ignore=["0"])
        assert str(done).splitlines() == [
            "channel factors of 2 layers; MACs of 2 layers 311,040 -> 100,224 (3.10x), of the model 373,368 -> 162,552",
            f"  3  rank 8, MACs 124,416 -> 48,384, error {done.errors['3']:.3f}",
            f"  6  rank 6, MACs 186,624 -> 51,840, error {done.errors['6']:.3f}",
            "  0  stayed: it is ignored by the pattern '0'",
        ]

    def test_a_line_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO", logger="lightning_prune"):
            done = factorize(network(), EXAMPLE, kind="channel", ranks={"3": 8})
        assert [record.getMessage() for record in caplog.records] == [done.headline]
