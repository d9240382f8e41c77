"""How much channels respond, how many are inhibited, and what happens while they are silenced one after another."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, distributed, nn
from torchmetrics import MetricCollection

from lightning_prune.errors import PruningError
from lightning_prune.layers import ChannelEquilibrium, Equilibrated
from lightning_prune.metrics import (
    ChannelActivity,
    CumulativeAblationCurve,
    InhibitedChannels,
    expected_activity,
    inhibited_share,
)

NAN = float("nan")


def shifted(*shifts: float) -> nn.BatchNorm1d:
    """A norm that returns its input, shifted."""
    norm = nn.BatchNorm1d(len(shifts), eps=0.0).eval()
    nn.init.constant_(norm.weight, 1.0)
    norm.bias.data = torch.tensor(shifts)
    return norm


def small(*, blocks: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    norms: list[nn.Module] = [nn.BatchNorm2d(6), nn.GroupNorm(2, 8)]
    if blocks:
        norms = [Equilibrated(norm, ChannelEquilibrium(size)) for norm, size in zip(norms, (6, 8), strict=True)]
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), norms[0], nn.ReLU(), nn.Conv2d(6, 8, 3), norms[1], nn.ReLU(), nn.Dropout(0.5), *pooled
    )


def pictures(examples: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(examples, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class TestActivity:
    def test_by_hand(self) -> None:
        batch = torch.tensor([[1.0, -3.0, 0.0], [2.0, 1.0, 0.0]])
        for form, told in (("mean", [1.5, 0.5, 0.0]), ("max", [2.0, 1.0, 0.0])):
            metric = ChannelActivity(form)  # type: ignore[arg-type]
            metric.update(nn.Sequential(shifted(0.0, 0.0, -1.0)), batch)
            assert metric.compute()["0"].tolist() == told

    def test_positions_count_and_batches_are_weighted_by_their_size(self) -> None:
        net, metric, whole = nn.Sequential(nn.BatchNorm2d(3)), ChannelActivity(), ChannelActivity()
        for part in pictures().split([5, 7]):
            metric.update(net, part)
        whole.update(net, pictures())
        by_hand = net.eval()(pictures()).relu().mean((0, 2, 3))
        assert torch.allclose(metric.compute()["0"], by_hand, atol=1e-6)
        assert torch.allclose(whole.compute()["0"], by_hand, atol=1e-6)

    def test_channels_of_a_layer_norm_lie_last(self) -> None:
        tokens = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
        metric, net = ChannelActivity(), nn.Sequential(nn.LayerNorm(6))
        metric.update(net, tokens)
        assert torch.allclose(metric.compute()["0"], net(tokens).relu().mean((0, 1)), atol=1e-6)

    def test_a_block_and_its_norm_are_one_layer(self) -> None:
        net, metric = small(blocks=True), ChannelActivity()
        metric.update(net, pictures())
        assert {name: len(each) for name, each in metric.compute().items()} == {"1": 6, "4": 8}
        behind = net.eval()[:2](pictures()).relu().mean((0, 2, 3))
        assert torch.allclose(metric.compute()["1"], behind, atol=1e-6)

    def test_a_layer_that_runs_twice_is_pooled(self) -> None:
        norm, metric = shifted(1.0), ChannelActivity()
        metric.update(nn.Sequential(norm, norm), torch.tensor([[1.0], [3.0]]))
        assert metric.activities()["0"].tolist() == [(2 + 4 + 3 + 5) / 4]

    def test_other_activations_and_other_layers(self) -> None:
        metric = ChannelActivity(activation=torch.abs, layers=["0"])
        metric.update(nn.Sequential(nn.Linear(1, 2, bias=False)), torch.ones(2, 1))
        assert (metric.compute()["0"] > 0).all()

    def test_what_comes_next_may_work_in_place(self) -> None:
        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = shifted(0.0)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.norm(x)
                y += 10
                return y

        metric = ChannelActivity()
        metric.update(Residual(), torch.tensor([[1.0], [3.0]]))
        assert metric.activities()["norm"].tolist() == [2.0]

    def test_an_activation_that_works_in_place_changes_nothing(self) -> None:
        metric, model, batch = ChannelActivity(activation=torch.relu_), nn.Sequential(shifted(-1.0)), torch.zeros(2, 1)
        with metric.listening(model):
            assert model(batch).tolist() == [[-1.0], [-1.0]]
        assert metric.activities()["0"].tolist() == [0.0]

    def test_layers_that_do_not_run_are_told(self) -> None:
        net = nn.Sequential(nn.Identity())
        net.aside = nn.BatchNorm1d(2)
        net.forward = lambda x: x  # type: ignore[method-assign]
        with pytest.raises(PruningError, match="None of the layers"):
            ChannelActivity().update(net, torch.zeros(2, 2))

    def test_the_network_stays_as_it_is(self) -> None:
        net = small(blocks=True).train()
        net[4].eval()
        before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
        state = torch.random.get_rng_state()
        ChannelActivity().update(net, pictures())
        CumulativeAblationCurve(orders=2).update(net, pictures(), torch.zeros(12, dtype=torch.long))
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
        assert [module.training for module in net.modules()] == modes
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not any(module._forward_hooks for module in net.modules())

    def test_after_a_cut_it_wants_a_reset(self) -> None:
        metric = ChannelActivity()
        metric.update(nn.Sequential(nn.BatchNorm1d(3)), torch.randn(4, 3))
        smaller = nn.Sequential(nn.BatchNorm1d(2)), torch.randn(4, 2)
        with pytest.raises(PruningError, match="reset it after a cut"):
            metric.update(*smaller)
        metric.reset()
        metric.update(*smaller)
        assert len(metric.compute()["0"]) == 2

    def test_it_travels(self) -> None:
        metric = ChannelActivity()
        metric.update(small(), pictures())
        twin = pickle.loads(pickle.dumps(metric))
        assert all(torch.equal(each, twin.compute()[name]) for name, each in metric.compute().items())

    @pytest.mark.parametrize("make", [ChannelActivity, InhibitedChannels, CumulativeAblationCurve])
    def test_it_needs_norms_or_names(self, make: type[ChannelActivity]) -> None:
        targets = () if make is not CumulativeAblationCurve else (torch.zeros(2, dtype=torch.long),)
        with pytest.raises(PruningError, match="has no norms behind which"):
            make().update(nn.Sequential(nn.Linear(2, 2)), torch.zeros(2, 2), *targets)
        with pytest.raises(ValueError, match="'conv\\*' in `layers` matches no layer"):
            make(layers=["conv*"]).update(nn.Sequential(nn.Linear(2, 2)), torch.zeros(2, 2), *targets)

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="`form` is 'mean' or 'max'; got 'median'"):
            ChannelActivity("median")  # type: ignore[arg-type]

    @pytest.mark.parametrize("threshold", [0, -0.1, float("nan"), float("inf")])
    def test_bad_thresholds(self, threshold: float) -> None:
        for refuses in (InhibitedChannels, lambda threshold: inhibited_share(small(), threshold)):
            with pytest.raises(ValueError, match=f"`threshold` is the activity below .* got {threshold}"):
                refuses(threshold)


class Attending(nn.Module):
    """Layers behind which channels lie last, and what of several outputs counts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
        self.recurrent = nn.LSTM(6, 5, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attend(x, x, x)[0]
        x = self.recurrent(self.block(x))[0]
        logits: Tensor = x.mean(1)
        return logits


class TestWhereChannelsLie:
    tokens = torch.arange(8).view(2, 4)

    @pytest.mark.parametrize("name", ["embed", "attend", "block", "block.self_attn", "block.linear1"])
    def test_last_behind_layers_of_tokens(self, name: str) -> None:
        torch.manual_seed(0)
        model, metric = Attending().eval(), ChannelActivity(layers=[name])
        metric.update(model, self.tokens)
        heard: list[Tensor] = []
        layer = model.get_submodule(name)
        handle = layer.register_forward_hook(lambda _, __, y: heard.append(y[0] if isinstance(y, tuple) else y))
        model(self.tokens)
        handle.remove()
        assert torch.allclose(metric.compute()[name], heard[0].relu().mean((0, 1)))
        assert len(metric.compute()[name]) == (12 if name == "block.linear1" else 6)

    def test_first_behind_layers_of_images(self) -> None:
        images = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0))
        for layer in (nn.Conv2d(6, 6, 1), nn.GroupNorm(2, 6), nn.Identity()):
            metric, model = ChannelActivity(layers=["0"]), nn.Sequential(layer)
            metric.update(model, images)
            assert torch.allclose(metric.compute()["0"], model(images).relu().mean((0, 2, 3)), atol=1e-6), layer

    @pytest.mark.parametrize(
        ("name", "dims"),
        [
            *((name, (0, 2, 3)) for name in ("LayerNorm2d", "LayerNorm2dFp32", "RmsNorm2d", "SimpleNorm2d")),
            *((name, (0, 1, 2)) for name in ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm")),
        ],
    )
    def test_norms_of_timm(self, name: str, dims: tuple[int, ...]) -> None:
        made = getattr(pytest.importorskip("timm.layers.norm"), name)(6)
        metric, model = ChannelActivity(layers=["0"]), nn.Sequential(made)
        x = torch.randn(2, 6, 5, 6, generator=torch.Generator().manual_seed(0))
        metric.update(model, x)
        assert torch.allclose(metric.compute()["0"], model(x).relu().mean(dims), atol=1e-6)

    def test_attention_without_channels_is_as_good_as_none(self) -> None:
        torch.manual_seed(0)
        model, targets = Attending().eval(), torch.arange(2)
        curve = CumulativeAblationCurve((0.0, 1.0), orders=1, layers=["attend"])
        curve.update(model, self.tokens, targets)
        nn.init.zeros_(model.attend.out_proj.weight)
        nn.init.zeros_(model.attend.out_proj.bias)
        told = (model(self.tokens).argmax(1) == targets).float().mean()
        assert float(curve.compute()[0, 1]) == float(told)

    @pytest.mark.parametrize("make", [ChannelActivity, CumulativeAblationCurve])
    def test_what_returns_several_tensors_is_refused_in_words(self, make: type[ChannelActivity]) -> None:
        targets = () if make is ChannelActivity else (torch.arange(2),)
        model = Attending()
        with pytest.raises(PruningError, match=r"The layer 'recurrent' .LSTM. returns a tuple; name a layer that"):
            make(layers=["recurrent"]).update(model, self.tokens, *targets)
        assert not any(module._forward_hooks for module in model.modules())

    def test_what_returns_a_value_for_each_example_is_refused_in_words(self) -> None:
        with pytest.raises(PruningError, match=r"The layer '1' .Flatten. returns a tensor of shape \(6,\)"):
            ChannelActivity(layers=["1"]).update(nn.Sequential(nn.Linear(2, 2), nn.Flatten(0)), torch.zeros(3, 2))


class TestInhibited:
    def test_by_hand(self) -> None:
        batch = torch.tensor([[0.001, 0.0, 1.0, 0.0], [0.001, 0.03, -1.0, 0.0]])
        net = nn.Sequential(shifted(0.0, 0.0, 0.0, -1.0))
        for form, share in (("mean", 0.5), ("max", 0.5)):
            metric = InhibitedChannels(form=form)  # type: ignore[arg-type]
            metric.update(net, batch)
            assert float(metric.compute()) == share
        rare = torch.zeros(100, 4)
        rare[0] = 0.5
        for form, share in (("mean", 1.0), ("max", 0.25)):  # one response of a hundred
            metric = InhibitedChannels(form=form)  # type: ignore[arg-type]
            metric.update(net, rare)
            assert float(metric.compute()) == share

    def test_of_layers(self) -> None:
        metric = InhibitedChannels()
        metric.update(nn.Sequential(shifted(0.0, -9.0), nn.ReLU(), shifted(-9.0, -9.0)), torch.ones(3, 2))
        assert {name: each.tolist() for name, each in metric.inhibited().items()} == {
            "0": [False, True],
            "2": [True, True],
        }
        assert float(metric.compute()) == 0.75

    def test_in_a_collection(self) -> None:
        both = MetricCollection([InhibitedChannels(), ChannelActivity()], compute_groups=False)
        both.update(small(), pictures())
        assert set(both.compute()) == {"InhibitedChannels", "1", "4"}  # a collection lays dicts out flat

    def test_closed_form_is_what_gaussian_channels_respond(self) -> None:
        generator = torch.Generator().manual_seed(0)
        scale, shift = torch.randn(2, 20, generator=generator, dtype=torch.float64).unbind()
        drawn = (scale * torch.randn(200_000, 20, generator=generator, dtype=torch.float64) + shift).relu()
        assert torch.allclose(expected_activity(scale, shift), drawn.mean(0), atol=0.01)

    def test_measured_equals_closed_form(self) -> None:
        net = nn.Sequential(nn.BatchNorm1d(40))
        generator = torch.Generator().manual_seed(1)
        nn.init.uniform_(net[0].weight, -0.2, 0.2, generator=generator)
        nn.init.uniform_(net[0].bias, -0.5, 0.1, generator=generator)
        metric = InhibitedChannels()
        metric.update(net, torch.randn(20_000, 40, generator=generator))
        assert abs(float(metric.compute()) - inhibited_share(net)) <= 1 / 40  # one at the threshold
        assert 0 < inhibited_share(net) < 1

    def test_a_silent_channel_counts_and_no_other(self) -> None:
        norm = nn.BatchNorm2d(4)
        norm.weight.data, norm.bias.data = torch.tensor([1e-4, 1e-4, 1.0, 0.0]), torch.tensor([-1.0, 1.0, 0.0, 0.0])
        assert inhibited_share(nn.Sequential(norm)) == 0.5  # the first, and the last, which is always 0

    @pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float64])
    def test_closed_form_in_other_dtypes(self, dtype: torch.dtype) -> None:
        norm = nn.BatchNorm2d(4)
        norm.weight.data, norm.bias.data = torch.tensor([1e-3, 1e-3, 1.0, 0.0]), torch.tensor([-1.0, 1.0, 0.0, 0.0])
        assert inhibited_share(nn.Sequential(norm).to(dtype)) == 0.5

    def test_a_block_has_no_closed_form(self) -> None:
        with pytest.raises(PruningError, match="without an equilibrium block"):
            inhibited_share(small(blocks=True)[:3])


class TestAblation:
    def net(self) -> nn.Sequential:
        """Tells class k by channel k."""
        return nn.Sequential(shifted(*[0.0] * 4), nn.ReLU())

    def test_without_ablation_it_is_the_accuracy_and_without_channels_a_constant(self) -> None:
        x, targets = torch.eye(4).repeat(3, 1) + 0.1, torch.arange(4).repeat(3)
        curve = CumulativeAblationCurve((0.0, 1.0), orders=3)
        curve.update(self.net(), x, targets)
        assert curve.compute().tolist() == [[1.0, 0.25]] * 3  # all logits 0: class 0 is told
        assert float(curve.area()) == pytest.approx(0.625)

    def test_by_hand(self) -> None:
        """Each channel that is silenced makes its own class wrong, but for class 0, which ties are told for."""
        x, targets = torch.eye(4), torch.arange(4)
        curve = CumulativeAblationCurve((0.0, 0.25, 0.5), orders=20)
        curve.update(self.net(), x, targets)
        for row in curve.compute().tolist():
            assert row[0] == 1.0
            assert row[1] in (0.75, 1.0)
            assert row[2] in (0.5, 0.75)
            assert row[1] >= row[2]
        assert 0.75 < float(curve.compute()[:, 1].mean()) < 1.0  # the orders differ
        mean = curve.compute().double().mean(0)
        assert float(curve.area()) == pytest.approx(float((mean[0] / 2 + mean[1] + mean[2] / 2) / 2))

    def test_batches_are_as_good_as_the_whole_and_a_seed_is_a_curve(self) -> None:
        targets = torch.arange(12) % 4
        curves = [CumulativeAblationCurve(orders=3, seed=seed) for seed in (0, 0, 1)]
        curves[0].update(small(), pictures(), targets)
        curves[2].update(small(), pictures(), targets)
        for part in ([0, 5], [5, 12]):
            curves[1].update(small(), pictures()[slice(*part)], targets[slice(*part)])
        whole, parts, other = (curve.compute() for curve in curves)
        assert torch.equal(whole, parts)
        assert not torch.equal(whole, other)

    def test_only_some_layers(self) -> None:
        """With all channels of the last norm gone, the bias of the linear layer alone speaks."""
        net, targets = small().eval(), torch.arange(12) % 4
        curve = CumulativeAblationCurve((0.0, 1.0), orders=1, layers=["4"])
        curve.update(net, pictures(), targets)
        told = net[-1].bias.argmax()
        assert float(curve.compute()[0, 1]) == pytest.approx(float((targets == told).float().mean()))

    def test_it_takes_classes(self) -> None:
        with pytest.raises(ValueError, match="of a classifier's accuracy"):
            CumulativeAblationCurve().update(small(), pictures(), torch.zeros(12, 4))

    @pytest.mark.parametrize("fractions", [(0.5,), (0.5, 0.1), (0.0, 0.0), (-0.1, 0.5), (0.0, 1.1), (0.0, NAN)])
    def test_bad_fractions(self, fractions: tuple[float, ...]) -> None:
        with pytest.raises(ValueError, match="`fractions` are two or more that rise"):
            CumulativeAblationCurve(fractions)

    def test_bad_orders(self) -> None:
        with pytest.raises(ValueError, match="`orders` is how many"):
            CumulativeAblationCurve(orders=0)


def _on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = (Path(folder) / "meeting").as_uri()
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    own, targets = slice(5) if rank == 0 else slice(5, None), torch.arange(12) % 4
    metrics = InhibitedChannels(0.3), ChannelActivity("max"), CumulativeAblationCurve(orders=2)
    for metric in metrics[:2]:
        metric.update(small(), pictures()[own])
    metrics[2].update(small(), pictures()[own], targets[own])
    torch.save([metric.compute() for metric in metrics], Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(_on_rank, (str(tmp_path),), nprocs=2)
    metrics = InhibitedChannels(0.3), ChannelActivity("max"), CumulativeAblationCurve(orders=2)
    for metric in metrics[:2]:
        metric.update(small(), pictures())
    metrics[2].update(small(), pictures(), torch.arange(12) % 4)
    for rank in range(2):
        share, activity, curve = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(share, metrics[0].compute())
        assert all(torch.allclose(each, activity[name]) for name, each in metrics[1].compute().items())
        assert torch.allclose(curve, metrics[2].compute())
