"""Random networks: groups are proven, cuts run, zeroing equals removing, and a replay gives the same bits.

Where one fails, hypothesis shrinks it and prints its recipe: put that into `REGRESSIONS` once the engine is mended.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proof import outputs, permute_channels, randomise, relative_error
from random_networks import STARTS, RandomNetwork, Recipe, Step, recipes
from torch import Tensor, nn

from lightning_prune import ChannelGroup, PruneRecord, find_groups, history_of, prune
from lightning_prune.criteria import Random
from lightning_prune.history import replay
from lightning_prune.records import from_plain, to_plain
from lightning_prune.surgery import cut_tensor
from lightning_prune.tensors import named_tensors

TOLERANCE = 1e-9
HEADS = ("whole", "inside", "keep")


@dataclass(frozen=True)
class Wish:
    """How a network is cut."""

    ratio: float = 0.5
    heads: str = "whole"
    seed: int = 0


WISHES = st.builds(
    Wish,
    ratio=st.sampled_from((0.5, 0.2, 0.35, 0.65, 0.8, 0.9)),
    heads=st.sampled_from(HEADS),
    seed=st.integers(0, 3),
)
NETWORKS = st.one_of(recipes(), recipes(safe=True))
QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def network(recipe: Recipe) -> tuple[nn.Module, Tensor]:
    """Build a network in float64 with random values everywhere, and its input."""
    x = torch.randn(STARTS[recipe.start], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return randomise(RandomNetwork(recipe).double(), seed=len(recipe.steps)).eval(), x


def check(recipe: Recipe, wish: Wish) -> None:
    """Assert everything that must hold of a network and of its cut."""
    dense, x = network(recipe)
    groups = find_groups(dense, x, heads=wish.heads)
    assert_well_formed(dense, groups)
    assert_proven(dense, x, groups)
    cut = copy.deepcopy(dense)
    try:
        how = {"pruning_ratio": wish.ratio, "heads": wish.heads, "criterion": Random(wish.seed)}
        record = prune(cut, x, **how, constants="drop")
    except ValueError as error:
        assert_nothing_to_prune(groups, wish, error)
        return
    assert_trains(cut, x, [result.shape for result in outputs(dense, x)])
    assert_only_smaller(dense, cut, record)
    assert_replays(dense, cut, x)
    if recipe.safe and all(named_tensors(dense)[name].is_floating_point() for name in record.kept):
        assert_zeroing_is_removing(dense, cut, x, record)


def assert_well_formed(model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Groups have names of their own, reasons in words, and share no position of any tensor."""
    assert len({group.name for group in groups}) == len(groups)
    owned: dict[tuple[str, int], list[Tensor]] = {}
    for group in groups:
        assert group.frozen is None or group.frozen.strip()
        assert group.size > 0
        for member in group.members:
            assert len(member.positions) == group.size
            owned.setdefault((member.tensor, member.dim), []).append(member.positions.reshape(-1))
    shapes = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    for (name, dim), parts in owned.items():
        positions = torch.cat(parts)
        assert len(positions.unique()) == len(positions), f"two channels own the same position of {name} [dim {dim}]"
        assert 0 <= int(positions.min()) <= int(positions.max()) < shapes[name][dim]


def assert_proven(dense: nn.Module, x: Tensor, groups: Sequence[ChannelGroup]) -> None:
    """Permuting the channels of all groups that can be pruned leaves the outputs unchanged."""
    before = outputs(dense, x)
    assert all(result.isfinite().all() for result in before)
    assert any(float(result.std()) > 1e-3 for result in before), "constant outputs prove nothing"
    permuted = copy.deepcopy(dense)
    permute_channels(permuted, [group for group in groups if not group.frozen])
    assert relative_error(outputs(permuted, x), before) <= TOLERANCE


def assert_nothing_to_prune(groups: Sequence[ChannelGroup], wish: Wish, error: ValueError) -> None:
    """A refusal is right only where all is frozen, or where the ratio leaves no channel to any group."""
    sizes = [group.size for group in groups if not group.frozen]
    if sizes:
        assert "would leave no channel" in str(error)
        assert all(round((1 - wish.ratio) * size) == 0 for size in sizes)
    else:
        assert "finds nothing to prune" in str(error)


def assert_trains(cut: nn.Module, x: Tensor, shapes: Sequence[torch.Size]) -> None:
    """The cut network returns what it did in shape, in eval and train mode, and every gradient fits."""
    assert [result.shape for result in outputs(cut, x)] == list(shapes)
    trained = copy.deepcopy(cut).train()
    results = trained(x)
    assert [result.shape for result in results] == list(shapes)
    if any(result.requires_grad for result in results):
        sum(result.square().sum() for result in results).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in trained.parameters())


def assert_only_smaller(dense: nn.Module, cut: nn.Module, record: PruneRecord) -> None:
    """Every tensor holds the kept positions of the dense one, and nothing else has changed."""
    before, after = named_tensors(dense), named_tensors(cut)
    assert before.keys() == after.keys() >= record.kept.keys()
    for name, tensor in before.items():
        kept = {dim: torch.tensor(positions) for dim, positions in record.kept.get(name, {}).items()}
        assert torch.equal(after[name], cut_tensor(tensor, kept)), name
    assert record.params.after == sum(parameter.numel() for parameter in cut.parameters())


def assert_replays(dense: nn.Module, cut: nn.Module, x: Tensor) -> None:
    """The history, written out and read again, does the same to a fresh copy, bit for bit."""
    again = copy.deepcopy(dense)
    replay(again, from_plain(to_plain(history_of(cut))))
    replayed = named_tensors(again)
    assert all(torch.equal(tensor, replayed[name]) for name, tensor in named_tensors(cut).items())
    assert all(map(torch.equal, outputs(again, x), outputs(cut, x)))


def assert_zeroing_is_removing(dense: nn.Module, cut: nn.Module, x: Tensor, record: PruneRecord) -> None:
    """The dense network with zeros in all that goes returns what the cut one returns."""
    zeroed = copy.deepcopy(dense)
    for name, tensor in named_tensors(zeroed).items():
        for dim, positions in record.kept.get(name, {}).items():
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[list(positions)] = False
            tensor.data.index_fill_(dim, gone.nonzero().squeeze(1), 0)
    assert relative_error(outputs(cut, x), outputs(zeroed, x)) <= TOLERANCE


@QUICK
@given(NETWORKS, WISHES)
def test_random_networks_are_cut_exactly(recipe: Recipe, wish: Wish) -> None:
    check(recipe, wish)


@pytest.mark.slow
@settings(QUICK, max_examples=500)
@given(NETWORKS, WISHES)
def test_five_hundred_random_networks_are_cut_exactly(recipe: Recipe, wish: Wish) -> None:
    check(recipe, wish)


def image(*steps: Step, read: tuple[int, ...] = (0,)) -> Recipe:
    return Recipe("image", steps, read)


def tokens(*steps: Step, read: tuple[int, ...] = (0,)) -> Recipe:
    return Recipe("tokens", steps, read)


REGRESSIONS: dict[str, tuple[Recipe, Wish]] = {
    "a kernel slides over channels": (
        tokens(Step("linear"), Step("token linear"), Step("conv1d")),
        Wish(),
    ),
    "a slice goes through an activation": (image(Step("conv", width=16), Step("slice", form=4)), Wish()),
    "a slice is written": (image(Step("conv", width=16), Step("written slices", form=3)), Wish()),
    "tied halves are split unevenly": (
        tokens(Step("linear"), Step("written halves"), Step("split", form=2), read=(1,)),
        Wish(),
    ),
    "rotated halves are split unevenly": (
        tokens(Step("stacked weights"), Step("rotate half"), Step("split", form=2), read=(1,)),
        Wish(),
    ),
    "an index before a slice of fixed length": (
        tokens(Step("gather"), Step("linear", at=1), Step("written slices")),
        Wish(),
    ),
    "the axis of a flip is no size": (tokens(Step("flip"), Step("cross attention", form=5)), Wish()),
    "an index of the raw input is cut": (tokens(Step("gather"), Step("sum of channels")), Wish()),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_regressions(name: str) -> None:
    check(*REGRESSIONS[name])


ONE_CHANNEL: dict[str, tuple[Recipe, Wish]] = {
    "convolution transposed": (image(Step("conv transposed")), Wish(0.9)),
    "layer over channels": (image(Step("conv"), Step("linear")), Wish(0.9)),
    "batch norm of tokens": (tokens(Step("bmm", width=4), Step("batch norm")), Wish(0.8)),
    "head of one channel": (tokens(Step("attention separate", form=5)), Wish(0.9, "inside")),
}


@pytest.mark.parametrize("name", ONE_CHANNEL)
def test_a_group_may_shrink_to_one_channel(name: str) -> None:
    """A size of 1 changes strides, and with them the operations that run: one channel more may stay for that."""
    recipe, wish = ONE_CHANNEL[name]
    dense, x = network(recipe)
    record = prune(dense, x, pruning_ratio=wish.ratio, heads=wish.heads)
    free = [group for group in record.channels if not record.held_back.get(group, "").startswith("frozen")]
    assert all(record.channels[group].after <= 2 for group in free)


HARD_CODED: dict[str, Recipe] = {
    "heads times a factor": tokens(Step("attention grouped-query")),
    "two sizes of one value": tokens(Step("token linear"), Step("linear over rows", form=1), read=(2,)),
    "where a slice begins": tokens(Step("linear"), Step("slice", form=2)),
    "where a slice begins and how long it is": tokens(Step("linear"), Step("written slices", form=1)),
    "sizes of a split": tokens(Step("linear"), Step("split")),
    "size of a chunk": tokens(Step("linear"), Step("chunk", form=1)),
    "hidden size of a cell": tokens(Step("recurrent cell", form=1)),
    "heads and their size": tokens(Step("attention fused")),
    "groups of a shuffle": image(Step("conv"), Step("shuffle", form=1)),
}


@pytest.mark.parametrize("name", HARD_CODED)
def test_hard_coded_sizes_follow_the_cut(name: str) -> None:
    dense, x = network(HARD_CODED[name])
    record = prune(dense, x, pruning_ratio=0.5)
    assert [reason for reason in record.held_back.values() if not reason.startswith("frozen")] == []


def test_the_proof_notices_what_does_not_belong_together() -> None:
    """Permuting a group in all but one of its tensors must show in the outputs, or the proof would prove nothing."""
    noticed: list[bool] = []

    @settings(QUICK, max_examples=45)
    @given(NETWORKS)
    def collect(recipe: Recipe) -> None:
        dense, x = network(recipe)
        before = outputs(dense, x)
        for group in find_groups(dense, x):
            if not group.frozen and group.size > 2 and len(group.members) > 1:
                permuted = copy.deepcopy(dense)
                permute_channels(permuted, [replace(group, members=group.members[:1])])
                noticed.append(relative_error(outputs(permuted, x), before) > 1e3 * TOLERANCE)

    collect()
    assert len(noticed) > 50
    assert sum(noticed) > 0.9 * len(noticed)


def test_nearly_all_that_can_be_pruned_is_pruned() -> None:
    """The trial of a cut refuses few of the groups that were found prunable."""
    refused: list[bool] = []

    @QUICK
    @given(NETWORKS)
    def collect(recipe: Recipe) -> None:
        model, x = network(recipe)
        try:
            held_back = prune(model, x, pruning_ratio=0.4).held_back
        except ValueError:
            return
        groups = [group.name for group in find_groups(network(recipe)[0], x) if not group.frozen]
        refused.extend("the cut" in held_back.get(group, "") for group in groups)

    collect()
    assert len(refused) > 50
    assert sum(refused) < 0.05 * len(refused)
