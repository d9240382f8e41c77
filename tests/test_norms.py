"""Which layers of a network are norms, how many channels they have, and where these lie."""

from __future__ import annotations

import torch
from proof import randomise
from torch import Tensor, nn

from lightning_prune.layers import BatchDecorrelation, ChannelEquilibrium, Equilibrated
from lightning_prune.layers.norms import channel_dim, has_channels, named_norms, num_channels, scale_and_shift


class LayerNorm2d(nn.LayerNorm):
    """That of torchvision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def two() -> nn.Sequential:
    """A network of two norms with blocks."""
    norms = [Equilibrated(nn.BatchNorm2d(8), ChannelEquilibrium(8, group_size=4)) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), norms[0], nn.ReLU(), nn.Conv2d(8, 8, 1), norms[1])


class TestNorms:
    def test_they_are_named(self) -> None:
        shared = nn.BatchNorm2d(8)
        net = nn.ModuleDict(
            {
                "bn": shared,
                "again": shared,
                "behind": nn.Sequential(nn.Conv2d(3, 8, 1), Equilibrated(nn.GroupNorm(2, 8), ChannelEquilibrium(8))),
                "alone": ChannelEquilibrium(8),
                "images": LayerNorm2d(8),
                "tokens": nn.LayerNorm(8),
                "planes": nn.LayerNorm((8, 4)),
                "rms": nn.RMSNorm(8, elementwise_affine=False),
                "instance": nn.InstanceNorm1d(8),
                "lazy": nn.LazyBatchNorm2d(),
                "sync": nn.SyncBatchNorm(8),
            }
        )
        found = named_norms(net)
        assert list(found) == ["bn", "behind.1", "images", "tokens", "rms", "instance", "sync"]
        assert isinstance(found["behind.1"], Equilibrated)
        assert {num_channels(norm) for norm in found.values()} == {8}
        assert [channel_dim(norm) for norm in found.values()] == [1, 1, 1, -1, -1, 1, 1]
        assert named_norms(found["behind.1"]) == {"": found["behind.1"]}

    def test_a_lazy_norm_counts_once_it_is_there(self) -> None:
        norm = nn.LazyBatchNorm2d()
        assert not has_channels(norm)
        norm(torch.randn(4, 8, 3, 3))
        assert has_channels(norm)
        assert num_channels(norm) == 8

    def test_scales_and_shifts(self) -> None:
        norm = randomise(nn.BatchNorm2d(8))
        for each in (norm, Equilibrated(norm, BatchDecorrelation(8))):
            scale, shift = scale_and_shift(each)  # type: ignore[misc]
            assert torch.equal(scale, norm.weight)
            assert torch.equal(shift, norm.bias)
            assert not scale.requires_grad
        scale, shift = scale_and_shift(nn.RMSNorm(4))  # type: ignore[misc]
        assert (scale.tolist(), shift.tolist()) == ([1.0] * 4, [0.0] * 4)
        assert scale_and_shift(nn.InstanceNorm2d(4)) is None
        assert scale_and_shift(nn.BatchNorm2d(4, affine=False)) is None

    def test_synchronised_norms_keep_their_blocks(self) -> None:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(two())
        assert list(named_norms(net)) == ["1", "4"]
        for name in ("1", "4"):
            wrapper = net.get_submodule(name)
            assert isinstance(wrapper, Equilibrated)
            assert isinstance(wrapper.norm, nn.SyncBatchNorm)
            assert isinstance(wrapper.equilibrium, (ChannelEquilibrium, BatchDecorrelation))
