"""Eighty-eight small networks, each with one thing that pruning libraries stumble over.

Every builder takes a width, and writes the network as one would write it at that width. So the cut of a network can be
held against the same network written smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from difficult_layers import (
    CLASSES,
    ChunksOfFour,
    EinsumAttention,
    FrozenBatchNorm2d,
    FunctionalConv,
    FusedAttention,
    FusedAttentionMinusOne,
    GroupedQueryAttention,
    HandMadeRMSNorm,
    IndexPermutation,
    Mixer,
    OwnTensors,
    PadShortcut,
    SeparateAttention,
    Swish,
    WeightedFusion,
    WithSizes,
    attend,
    conv,
    encoder_layer,
    flat,
    frozen_stem,
    gram,
    halved,
    hard_coded,
    heads_in_the_batch,
    images,
    layer,
    normed_patches,
    pyramid,
    readout,
    segment,
    shuffled,
    square,
    squares,
    squeeze,
    squeeze_by_views,
    steered,
    swiglu,
    tied,
    tokens,
    where_to_look,
    without_gradients,
)
from proof import Net, randomise
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

IMAGE, SIGNAL, VIDEO, ROWS, TOKENS = (2, 3, 8, 8), (2, 3, 8), (2, 3, 4, 4, 4), (4, 5), (2, 6, 5)


@dataclass(frozen=True)
class Difficulty:
    """A network and what a perfect engine makes of it.

    Attributes:
        build: Makes the network at a width.
        shape: The shape of its input.
        width: The width of the dense network.
        ratio: The pruning ratio asked for.
        normed: Something looks across all channels, so that removing channels is not zeroing them.
        stays: Words of the reasons for which channels beside the model's outputs stay.
        at_least: The builder at the smaller width is no more than a lower bound on what goes.
        warns: What the reading warns of.
    """

    build: Callable[[int], nn.Module]
    shape: tuple[int, ...] = IMAGE
    width: int = 16
    ratio: float = 0.5
    normed: bool = False
    stays: str | None = None
    at_least: bool = False
    warns: str | None = None

    def dense(self) -> nn.Module:
        """Return the network with random weights and statistics."""
        return randomise(self.build(self.width).double())

    def smaller(self) -> nn.Module:
        """Return the network written with the widths that the cut should leave."""
        return self.build(round(self.width * (1 - self.ratio))).double()

    def example(self) -> Tensor:
        """Return an input."""
        return torch.randn(self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


PLAIN = {
    "chain": Difficulty(
        lambda w: nn.Sequential(
            *(conv(3, w), nn.BatchNorm2d(w), nn.ReLU(), nn.MaxPool2d(2), conv(w, 2 * w), nn.BatchNorm2d(2 * w)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * w, CLASSES)),
        )
    ),
    "residual": Difficulty(lambda w: images(lambda n, y: y + n.g(n.f(y).relu()), w, **squares(w))),
    "stack_sum": Difficulty(lambda w: images(lambda n, y: torch.stack([n.f(y), n.g(y)]).sum(0), w, **squares(w))),
    "flatten_hw": Difficulty(lambda w: images(lambda n, y: y.flatten(1), w, flat(w, 64))),
    "view_minus1": Difficulty(lambda w: images(lambda n, y: y.view(y.shape[0], -1), w, flat(w, 64))),
    "conv1d_flatten": Difficulty(
        lambda w: nn.Sequential(nn.Conv1d(3, w, 3), nn.ReLU(), nn.Flatten(), flat(w, 6)), SIGNAL
    ),
    "conv3d_flatten": Difficulty(
        lambda w: nn.Sequential(nn.Conv3d(3, w, 3), nn.ReLU(), nn.Flatten(), flat(w, 8)), VIDEO
    ),
    "bilinear": Difficulty(
        lambda w: tokens(
            lambda n, y: n.f(n.g(y), n.h(y)), w, f=nn.Bilinear(w, w, w), g=nn.Linear(w, w), h=nn.Linear(w, w)
        ),
        ROWS,
    ),
}

CONCAT = {
    "concat": Difficulty(lambda w: images(lambda n, y: torch.cat([n.f(y), n.g(y)], 1), w, 3 * w, **squares(w, g=2))),
    "concat_nested": Difficulty(
        lambda w: images(lambda n, y: torch.cat([torch.cat([y, n.f(y)], 1), n.g(y)], 1), w, 4 * w, **squares(w, g=2))
    ),
    "concat_same_twice": Difficulty(lambda w: images(lambda n, y: torch.cat([y, y], 1), w, 2 * w)),
    "concat_same_sandwich": Difficulty(
        lambda w: images(lambda n, y: torch.cat([y, n.f(y), y], 1), w, 3 * w, f=square(w))
    ),
    "view_after_concat": Difficulty(
        lambda w: images(
            lambda n, y: torch.cat([n.f(y), n.g(y)], 1).view(len(y), -1), w, flat(3 * w, 64), **squares(w, g=2)
        )
    ),
    "grouped_after_concat": Difficulty(
        lambda w: images(
            lambda n, y: n.h(torch.cat([n.f(y), n.g(y)], 1)), w, **squares(w, g=3), h=conv(4 * w, w, groups=2)
        ),
        width=8,
    ),
}

PARTS = {
    "split_half": Difficulty(hard_coded(lambda n, y: y.split(n.half, 1))),
    "split_uneven": Difficulty(
        lambda w: WithSizes(
            lambda n, x: [part(y) for part, y in zip((n.f, n.g), n.a(x).relu().split(n.sizes, 1), strict=True)],
            {"a": conv(3, w), "f": conv(w // 4, CLASSES), "g": conv(3 * w // 4, CLASSES)},
            sizes=[w // 4, 3 * w // 4],
        )
    ),
    "chunk_attr_free": Difficulty(ChunksOfFour, stays="", at_least=True),
    "slice_halves": Difficulty(hard_coded(lambda n, y: (y[:, : n.half], y[:, n.half :]))),
    "slice_rel": Difficulty(halved(lambda n, y: (y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]))),
    "slice_strided": Difficulty(halved(lambda n, y: (y[:, ::2], y[:, 1::2]))),
    "glu": Difficulty(lambda w: images(lambda n, y: F.glu(n.f(y), 1), w, f=conv(w, 2 * w))),
}

ORDER = {
    "shuffle_view": Difficulty(layer(square, lambda n, y: n.layer(shuffled(y, 2)))),
    "shuffle_then_group": Difficulty(layer(lambda w: conv(w, w, groups=2), lambda n, y: n.layer(shuffled(y, 2)))),
    "channel_shuffle_module": Difficulty(layer(lambda w: nn.Sequential(nn.ChannelShuffle(4), square(w)))),
    "pixel_shuffle": Difficulty(lambda w: images(lambda n, y: F.pixel_shuffle(y, 2), w, w // 4)),
    "heads_reshape_conv": Difficulty(lambda w: images(heads_in_the_batch, w, 2 * w, f=conv(w // 4, w // 2))),
    "flip_channels": Difficulty(layer(square, lambda n, y: n.layer(y + 2 * y.flip(1)))),
    "index_perm": Difficulty(IndexPermutation, stays="", at_least=True),
    "pad_shortcut": Difficulty(PadShortcut, stays="a fixed number of padded positions"),
}

GROUPED = {
    "grouped": Difficulty(layer(lambda w: conv(w, w, groups=4))),
    "grouped_two_sizes": Difficulty(layer(lambda w: nn.Sequential(conv(w, w, groups=2), conv(w, w, groups=4)))),
    "depthwise": Difficulty(layer(lambda w: nn.Sequential(conv(w, w, groups=w), conv(w, w, 1)))),
    "depthwise_mult2": Difficulty(lambda w: images(lambda n, y: n.f(y), w, 2 * w, f=conv(w, 2 * w, groups=w))),
    "deconv": Difficulty(layer(lambda w: nn.ConvTranspose2d(w, w, 2, 2))),
    "deconv_grouped": Difficulty(layer(lambda w: nn.ConvTranspose2d(w, w, 2, 2, groups=4))),
    "deconv_depthwise": Difficulty(layer(lambda w: nn.ConvTranspose2d(w, w, 2, 2, groups=w))),
}

NORM = {
    "groupnorm": Difficulty(layer(lambda w: nn.GroupNorm(4, w)), normed=True),
    "layernorm_cl": Difficulty(
        layer(nn.LayerNorm, lambda n, y: n.layer(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), normed=True
    ),
    "layernorm_chw": Difficulty(layer(lambda w: nn.LayerNorm([w, 8, 8])), normed=True),
    "ln64_50": Difficulty(normed_patches, width=64, normed=True),
    "ln144_50": Difficulty(normed_patches, width=144, normed=True),
    "ln768_50": Difficulty(normed_patches, width=768, normed=True),
    "ln768_75": Difficulty(normed_patches, width=768, ratio=0.75, normed=True),
    "ln192_75": Difficulty(normed_patches, width=192, ratio=0.75, normed=True),
    "rmsnorm": Difficulty(lambda w: tokens(lambda n, y: n.f(y), w, f=HandMadeRMSNorm(w)), TOKENS, normed=True),
    "instancenorm_stats": Difficulty(layer(lambda w: nn.InstanceNorm2d(w, affine=True, track_running_stats=True))),
    "frozen_bn": Difficulty(layer(lambda w: nn.Sequential(FrozenBatchNorm2d(w), square(w), FrozenBatchNorm2d(w)))),
    "bn_noaffine": Difficulty(layer(lambda w: nn.BatchNorm2d(w, affine=False))),
    "weight_norm": Difficulty(layer(lambda w: weight_norm(square(w))), normed=True),
    "spectral_norm": Difficulty(layer(lambda w: spectral_norm(square(w)))),
    "l2norm_channels": Difficulty(layer(square, lambda n, y: F.normalize(n.layer(y), dim=1))),
}

PARAMETERS = {
    "prelu_c": Difficulty(layer(nn.PReLU)),
    "param_scale_1c11": Difficulty(layer(lambda w: OwnTensors(lambda n, y: y * n.scale, scale=(1, w, 1, 1)))),
    "param_scale_cview": Difficulty(
        layer(lambda w: OwnTensors(lambda n, y: y * n.scale.view(1, -1, 1, 1), scale=(w,)))
    ),
    "param_c2": Difficulty(
        layer(lambda w: OwnTensors(lambda n, y: y * n.pair[:, 0, None, None] + n.pair[:, 1, None, None], pair=(w, 2)))
    ),
    "param_fusion": Difficulty(layer(WeightedFusion)),
    "param_chw": Difficulty(layer(lambda w: OwnTensors(lambda n, y: y + n.place, place=(1, w, 8, 8)))),
    "buffer_scale": Difficulty(layer(lambda w: OwnTensors(lambda n, y: y * n.scale, buffers=True, scale=(1, w, 1, 1)))),
    "functional_conv": Difficulty(layer(lambda w: nn.Sequential(FunctionalConv(w, 2 * w), FunctionalConv(2 * w, w)))),
    "tied": Difficulty(tied, ROWS),
    "shared_twice": Difficulty(layer(square, lambda n, y: n.layer(n.layer(y).relu()))),
    "siamese": Difficulty(
        lambda w: Net(
            lambda n, x: n.head(torch.sub(*(n.b(n.a(half).relu()) for half in x.chunk(2, 1))).abs()),
            **{"a": conv(3, w), "b": square(w), "head": readout(w)},
        ),
        (2, 6, 8, 8),
    ),
}

GATED = {
    "se": Difficulty(lambda w: images(squeeze, w, down=conv(w, w // 4, 1), up=conv(w // 4, w, 1))),
    "se_linear_view": Difficulty(
        lambda w: images(squeeze_by_views, w, down=nn.Linear(w, w // 4), up=nn.Linear(w // 4, w))
    ),
    "gate_1ch": Difficulty(lambda w: images(lambda n, y: y * n.f(y).sigmoid(), w, f=conv(w, 1))),
    "cbam_spatial": Difficulty(lambda w: images(where_to_look, w, f=conv(2, 1, 7)), normed=True),
    "swiglu": Difficulty(swiglu, ROWS),
    "swiglu_3d": Difficulty(swiglu, TOKENS),
    "gram": Difficulty(lambda w: Net(gram, a=conv(3, w), head=nn.Linear(w, CLASSES, bias=False))),
}

SEQUENCES = {
    "attn_fused_qkv": Difficulty(attend(FusedAttention), TOKENS, width=32),
    "attn_fused_minus1": Difficulty(attend(FusedAttentionMinusOne), TOKENS, width=32),
    "attn_sep": Difficulty(attend(lambda w: SeparateAttention(w, size=4)), TOKENS),
    "attn_gqa": Difficulty(attend(GroupedQueryAttention), TOKENS, width=32),
    "attn_einsum": Difficulty(attend(EinsumAttention), TOKENS, width=32),
    "tr_encoder_layer": Difficulty(attend(encoder_layer), TOKENS, width=32, normed=True),
    "mixer": Difficulty(Mixer, normed=True, stays="holds no channels"),
    "lstm": Difficulty(
        lambda w: tokens(lambda n, y: n.f(y)[0], w, 2 * w, f=nn.LSTM(w, 2 * w, batch_first=True)), TOKENS
    ),
    "gru": Difficulty(lambda w: tokens(lambda n, y: n.f(y)[0], w, 2 * w, f=nn.GRU(w, 2 * w, batch_first=True)), TOKENS),
}

GRADIENTS = {
    "detach_branch": Difficulty(layer(square, lambda n, y: y + n.layer(y.detach()))),
    "frozen_stem": Difficulty(frozen_stem),
    "nograd_backbone": Difficulty(lambda w: Net(without_gradients, a=conv(3, w), b=square(w), head=readout(w))),
    "custom_fn": Difficulty(layer(square, lambda n, y: Swish.apply(n.layer(y)))),
    "ckpt": Difficulty(
        layer(
            lambda w: nn.Sequential(square(w), nn.ReLU(), square(w)),
            lambda n, y: checkpoint(n.layer, y, use_reentrant=False),
        )
    ),
    "dyn_flow": Difficulty(layer(square, steered), warns="depends on values"),
}

OUTPUTS = {
    "fpn": Difficulty(
        lambda w: Net(
            pyramid,
            **{"a": conv(3, w), "b": conv(w, 2 * w, stride=2), "fine": conv(w, w, 1), "coarse": conv(2 * w, w, 1)},
            **{"smooth": square(w), "head": readout(w)},
        )
    ),
    "seg": Difficulty(
        lambda w: Net(
            segment,
            **{"a": conv(3, w), "norm": nn.BatchNorm2d(w), "b": conv(w, 2 * w), "c": conv(2 * w, 2 * w)},
            **{"d": conv(3 * w, w), "head": readout(w)},
        )
    ),
    "aux_head": Difficulty(
        lambda w: Net(
            lambda n, x: (n.head(n.b(n.a(x).relu()).relu()), n.aux(n.a(x).mean((2, 3)))),
            **{"a": conv(3, w), "b": square(w), "head": readout(w), "aux": nn.Linear(w, CLASSES)},
        )
    ),
    "dict_out": Difficulty(
        lambda w: Net(
            lambda n, x: {"logits": n.head(n.a(x).relu()), "boxes": {"corners": n.boxes(n.a(x).relu())}},
            **{"a": conv(3, w), "head": readout(w), "boxes": conv(w, 4)},
        )
    ),
}

DIFFICULTIES: dict[str, Difficulty] = (
    PLAIN | CONCAT | PARTS | ORDER | GROUPED | NORM | PARAMETERS | GATED | SEQUENCES | GRADIENTS | OUTPUTS
)
