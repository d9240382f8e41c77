"""Transformers written out by hand: heads, MLPs and the embedding's width are found, proven and cut exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Literal, TypeAlias

import pytest
import torch
from proof import permute_channels, randomise, relative_error, summary
from torch import Tensor, nn
from transformers_blocks import BASE, MODELS, MaskedGPT2, example

from lightning_prune import ChannelGroup, PruneRecord, find_groups, history, load_pruned, prune, save_pruned
from lightning_prune.inputs import tensors_in
from lightning_prune.tensors import named_tensors, tensor_at

Heads: TypeAlias = Literal["whole", "inside", "keep"]
Sizes: TypeAlias = dict[str, int]
Attributes: TypeAlias = dict[str, Sizes]

HEADS: tuple[Heads, ...] = ("whole", "inside", "keep")
CUTTING: tuple[Heads, ...] = ("whole", "inside")

OUT = "reaches the model's output"
ROWS = "is picked by number in aten.embedding.default"


@dataclass(frozen=True)
class Projection:
    """How the channels of a projection lie: in a box, of which one axis are the heads, another what is inside them.

    Attributes:
        tensor: The weight.
        box: The sizes that its dimension is split into, outermost first.
        whole: The axis of the heads.
        inside: The axis of what can go inside of all heads.
        dim: The dimension of the weight.
    """

    tensor: str
    box: tuple[int, ...]
    whole: int = 0
    inside: int = -1
    dim: int = 0

    def positions(self, heads: Heads) -> Tensor:
        """Return for each channel the positions that it owns, ascending."""
        axis = self.whole if heads == "whole" else self.inside
        return torch.arange(prod(self.box)).view(self.box).movedim(axis, 0).flatten(1)


@dataclass(frozen=True)
class Expected:
    """What is in a model, worked out by hand.

    Attributes:
        rest: The groups that have nothing to do with heads, by name, with their channels.
        heads: The same for groups of whole heads.
        inside: The same for what is inside the heads.
        frozen: Frozen groups, each with a part of the reason.
        projections: Where heads lie.
        shapes: The shapes of some tensors when half of the channels are gone, whichever part of the heads that is.
        sizes: The attributes that must follow whichever part of the heads goes.
        whole_sizes: Those that must follow when whole heads go.
        inside_sizes: Those that must follow when the heads get narrower.
        embedding: A pattern of modules that hold the embedding's width.
    """

    rest: Sizes
    heads: Sizes
    inside: Sizes
    frozen: Mapping[str, str]
    projections: tuple[Projection, ...]
    shapes: Mapping[str, tuple[int, ...]]
    embedding: str
    sizes: Attributes = field(default_factory=dict)
    whole_sizes: Attributes = field(default_factory=dict)
    inside_sizes: Attributes = field(default_factory=dict)

    def free(self, heads: Heads) -> Sizes:
        """Return the groups that can be cut."""
        return self.rest | {"whole": self.heads, "inside": self.inside, "keep": {}}[heads]

    def attributes(self, heads: Heads) -> Attributes:
        """Return all attributes that must follow."""
        further = {"whole": self.whole_sizes, "inside": self.inside_sizes}[heads]
        return {name: self.sizes.get(name, {}) | further.get(name, {}) for name in {**self.sizes, **further}}


def both(pattern: str, *values: object) -> dict[str, object]:
    """Return the same for both layers."""
    return {pattern.format(layer): value for layer in range(2) for value in values}


def bert(whole_sizes: Attributes, inside_sizes: Attributes) -> Expected:
    return Expected(
        rest={"embeddings.word_embeddings": 64, **both("layer.{}.intermediate", 128), "pooler": 64},
        heads=both("layer.{}.attention.query", 4),
        inside=both("layer.{}.attention.query", 16) | both("layer.{}.attention.value", 16),
        frozen={"classifier": OUT},
        projections=(
            *(Projection(f"layer.1.attention.{part}.weight", (4, 16)) for part in ("query", "key", "value")),
            Projection("layer.1.attention.query.bias", (4, 16)),
            Projection("layer.1.attention_output.weight", (4, 16), dim=1),
        ),
        shapes={
            "embeddings.word_embeddings.weight": (40, 32),
            "embeddings.token_type_embeddings.weight": (2, 32),
            "layer.0.attention.query.weight": (32, 32),
            "layer.1.attention.value.bias": (32,),
            "layer.1.attention_output.weight": (32, 32),
            "layer.1.attention_norm.weight": (32,),
            "layer.0.intermediate.weight": (64, 32),
            "layer.0.output.weight": (32, 64),
            "pooler.weight": (32, 32),
            "classifier.weight": (5, 32),
        },
        embedding="embeddings",
        whole_sizes=both("layer.{}.attention", whole_sizes),
        inside_sizes=both("layer.{}.attention", inside_sizes),
    )


def gpt2(whole_sizes: Sizes) -> Expected:
    fused = {"box": (3, 4, 16), "whole": 1, "inside": 2}
    return Expected(
        rest={"wte": 64, **both("h.{}.c_fc", 128)},
        heads=both("h.{}.attn.c_attn", 4),
        inside=both("h.{}.attn.c_attn", 16),
        frozen={"wte#2": ROWS},
        projections=(
            Projection("h.0.attn.c_attn.weight", **fused, dim=1),
            Projection("h.0.attn.c_attn.bias", **fused),
            Projection("h.0.attn.c_proj.weight", (4, 16)),
        ),
        shapes={
            "wte.weight": (40, 32),
            "wpe.weight": (16, 32),
            "h.0.attn.c_attn.weight": (32, 96),
            "h.1.attn.c_attn.bias": (96,),
            "h.1.attn.c_proj.weight": (32, 32),
            "h.0.c_fc.weight": (32, 64),
            "h.1.c_proj.weight": (64, 32),
            "ln_f.weight": (32,),
        },
        embedding="wte",
        sizes={
            **both("h.{}.attn", {"split_size": 32}),
            **both("h.{}.attn.c_attn", {"nf": 96}),
            **both("h.{}.attn.c_proj", {"nf": 32}),
            **both("h.{}.c_fc", {"nf": 64}),
            **both("h.{}.c_proj", {"nf": 32}),
        },
        whole_sizes=both("h.{}.attn", whole_sizes),
        inside_sizes=both("h.{}.attn", {"head_dim": 8}),
    )


def llama(
    heads: int = 4,
    keys: int = 2,
    width: int = 16,
    rotary: str = "rotary_emb",
    sizes: Sizes | None = None,
    whole_sizes: Sizes | None = None,
    inside_sizes: Sizes | None = None,
) -> Expected:
    """`heads` queries of `width` share `keys` keys; rotation ties the two halves of each head, in all layers."""
    inner, shared, half = heads * width, keys * width, width // 2
    repeated = (keys, heads // keys)
    if keys == 1:
        repeated = (heads,)
    queries, key_heads = (*repeated, 2, half), (keys, 2, half)
    of_keys = () if keys == 1 else (Projection("layers.1.self_attn.k_proj.weight", key_heads),)
    of_values = () if keys == 1 else (Projection("layers.1.self_attn.v_proj.weight", (keys, width)),)
    narrow = {"k": shared // 2, "v": shared // 2}
    return Expected(
        rest={"embed_tokens": 64, **both("layers.{}.gate_proj", 128)},
        heads=both("layers.{}.self_attn.q_proj", heads if keys == 1 else keys),
        inside={rotary: half, **both("layers.{}.self_attn.v_proj", width)},
        frozen={"lm_head": OUT},
        projections=(
            Projection("layers.1.self_attn.q_proj.weight", queries),
            *of_keys,
            *of_values,
            Projection("layers.1.self_attn.o_proj.weight", (*repeated, width), dim=1),
        ),
        shapes={
            "embed_tokens.weight": (40, 32),
            "layers.0.self_attn.q_proj.weight": (inner // 2, 32),
            **({} if keys == 1 else {f"layers.1.self_attn.{k}_proj.weight": (n, 32) for k, n in narrow.items()}),
            "layers.1.self_attn.o_proj.weight": (32, inner // 2),
            "layers.0.input_layernorm.weight": (32,),
            "layers.0.up_proj.weight": (64, 32),
            "layers.1.down_proj.weight": (32, 64),
            "lm_head.weight": (40, 32),
        },
        embedding="embed_tokens",
        sizes=both("layers.{}.self_attn", sizes or {}),
        whole_sizes=both("layers.{}.self_attn", whole_sizes or {}),
        inside_sizes=both("layers.{}.self_attn", inside_sizes or {"head_dim": width // 2}),
    )


NEOX = Expected(
    rest={"embed_tokens": 64, **both("layers.{}.gate_proj", 128)},
    heads=both("layers.{}.self_attn.query_key_value", 4),
    inside={"rotary_emb": 2},
    frozen={"lm_head": OUT},
    projections=(
        Projection("layers.0.self_attn.query_key_value.weight", (4, 3, 4, 2, 2)),
        Projection("layers.0.self_attn.dense.weight", (4, 4, 2, 2), dim=1),
    ),
    shapes={
        "layers.0.self_attn.query_key_value.weight": (96, 32),
        "layers.1.self_attn.dense.weight": (32, 32),
        "layers.1.gate_proj.weight": (64, 32),
    },
    embedding="embed_tokens",
    inside_sizes=both("layers.{}.self_attn", {"head_size": 8, "rotary_ndims": 2}),
)


def vit(sizes: Sizes, inside_sizes: Sizes) -> Expected:
    fused = {"box": (3, 4, 16), "whole": 1, "inside": 2}
    return Expected(
        rest={"patch_embed": 64, **both("blocks.{}.fc1", 128)},
        heads=both("blocks.{}.attn.qkv", 4),
        inside=both("blocks.{}.attn.qkv", 16),
        frozen={"head": OUT},
        projections=(
            Projection("blocks.0.attn.qkv.weight", **fused),
            Projection("blocks.0.attn.qkv.bias", **fused),
            Projection("blocks.0.attn.proj.weight", (4, 16), dim=1),
        ),
        shapes={
            "patch_embed.weight": (32, 3, 4, 4),
            "cls_token": (1, 1, 32),
            "pos_embed": (1, 17, 32),
            "blocks.0.attn.qkv.weight": (96, 32),
            "blocks.0.attn.qkv.bias": (96,),
            "blocks.1.attn.proj.weight": (32, 32),
            "blocks.1.ls1.gamma": (32,),
            "blocks.0.fc1.weight": (64, 32),
            "head.weight": (5, 32),
        },
        embedding="patch_embed",
        sizes=both("blocks.{}.attn", sizes),
        whole_sizes=both("blocks.{}.attn", {"num_heads": 2}),
        inside_sizes=both("blocks.{}.attn", inside_sizes),
    )


T5_ATTENTION = (*both("encoder.block.{}.self_attn", 0), *both("decoder.block.{}.self_attn", 0))
T5_CROSS = tuple(both("decoder.block.{}.cross_attn", 0))


def t5(sizes: Attributes, whole_sizes: Attributes) -> Expected:
    """The table of biases ties the heads of all layers of a stack, and so do the zeros in cross attention."""
    return Expected(
        rest={"shared": 64, **both("encoder.block.{}.wi_0", 128), **both("decoder.block.{}.wi_0", 128)},
        heads={
            "encoder.block.0.self_attn.q": 4,
            "decoder.block.0.self_attn.q": 4,
            "decoder.block.0.cross_attn.q": 4,
        },
        inside={f"{name}.{part}": 16 for name in (*T5_ATTENTION, *T5_CROSS) for part in "qv"},
        frozen={"shared#2": ROWS},
        projections=(
            *(Projection(f"{name}.{part}.weight", (4, 16)) for name in (*T5_ATTENTION, *T5_CROSS) for part in "qkv"),
            *(Projection(f"{name}.o.weight", (4, 16), dim=1) for name in T5_CROSS),
        ),
        shapes={
            "shared.weight": (40, 32),
            "encoder.block.0.self_attn.k.weight": (32, 32),
            "decoder.block.1.cross_attn.o.weight": (32, 32),
            "decoder.block.1.wi_1.weight": (64, 32),
            "decoder.block.0.wo.weight": (32, 64),
            "decoder.final_layer_norm.weight": (32,),
        },
        embedding="shared",
        sizes=sizes,
        whole_sizes=whole_sizes,
        inside_sizes={name: {"key_value_proj_dim": 8} for name in (*T5_ATTENTION, *T5_CROSS)},
    )


def whisper(sizes: Sizes) -> Expected:
    parts = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_proj.bias")
    return Expected(
        rest={"conv1": 64, "conv2": 64, **both("layers.{}.fc1", 128), "projector": 24},
        heads=both("layers.{}.self_attn.q_proj", 4),
        inside=both("layers.{}.self_attn.q_proj", 16) | both("layers.{}.self_attn.v_proj", 16),
        frozen={"classifier": OUT},
        projections=(
            *(Projection(f"layers.0.self_attn.{part}", (4, 16)) for part in parts),
            Projection("layers.0.self_attn.out_proj.weight", (4, 16), dim=1),
        ),
        shapes={
            "conv1.weight": (32, 20, 3),
            "conv2.weight": (32, 32, 3),
            "embed_positions.weight": (8, 32),
            "layers.0.self_attn.k_proj.weight": (32, 32),
            "layers.1.fc2.weight": (32, 64),
            "projector.weight": (12, 32),
            "classifier.weight": (5, 12),
        },
        embedding="conv2",
        sizes=both("layers.{}.self_attn", sizes),
        whole_sizes=both("layers.{}.self_attn", {"num_heads": 2}),
        inside_sizes=both("layers.{}.self_attn", {"head_dim": 8}),
    )


def _towers(pattern: str, value: object) -> dict[str, object]:
    return both(f"text_model.layers.{pattern}", value) | both(f"vision_model.layers.{pattern}", value)


CLIP = Expected(
    rest={"vision_model.patch_embedding": 64, "text_model.token_embedding": 64, **_towers("{}.fc1", 128)},
    heads=_towers("{}.self_attn.q_proj", 4),
    inside=_towers("{}.self_attn.q_proj", 16) | _towers("{}.self_attn.v_proj", 16),
    frozen={"visual_projection": OUT},
    projections=(
        *(Projection(f"text_model.layers.0.self_attn.{part}_proj.weight", (4, 16)) for part in "qkv"),
        *(Projection(f"vision_model.layers.0.self_attn.{part}_proj.bias", (4, 16)) for part in "qkv"),
    ),
    shapes={
        "text_model.token_embedding.weight": (40, 32),
        "vision_model.class_embedding": (32,),
        "vision_model.position_embedding.weight": (17, 32),
        "vision_model.layers.0.self_attn.out_proj.weight": (32, 32),
        "text_model.layers.1.fc1.weight": (64, 32),
        "visual_projection.weight": (24, 32),
        "text_projection.weight": (24, 32),
    },
    embedding="*_embedding",
    inside_sizes=_towers("{}.self_attn", {"head_dim": 8}),
)

EXPECTED: dict[str, Expected] = {
    "bert": bert({}, {"attention_head_size": 8}),
    "bert, eager": bert({}, {"attention_head_size": 8}),
    "bert, old": bert({"num_attention_heads": 2, "all_head_size": 32}, {"attention_head_size": 8, "all_head_size": 32}),
    "gpt2": gpt2({}),
    "gpt2, old": gpt2({"num_heads": 2}),
    "llama": llama(),
    "llama, eager": llama(rotary="layers.0.self_attn.q_proj"),
    "llama, old": llama(sizes={"hidden_size": 32}, whole_sizes={"num_heads": 2, "num_key_value_heads": 1}),
    "llama, enable_gqa": llama(),
    "llama, a key for each head": llama(keys=4),
    "llama, a key for two of eight heads": llama(heads=8, keys=4, width=8),
    "llama, a key for four of eight heads": llama(heads=8, keys=2, width=8),
    "llama, a key for all heads": llama(keys=1, whole_sizes={"num_key_value_groups": 2}),
    "qwen3": llama(width=32),
    "neox": NEOX,
    "vit": vit({"attn_dim": 32}, {"head_dim": 8}),
    "vit, qk_norm": vit({"attn_dim": 32}, {"head_dim": 8}),
    "vit, old": vit({}, {}),
    "t5": t5({}, {"decoder.block.0.cross_attn": {"n_heads": 2}}),
    "t5, old": t5(
        {name: {"inner_dim": 32} for name in (*T5_ATTENTION, *T5_CROSS)},
        {name: {"n_heads": 2} for name in (*T5_ATTENTION, *T5_CROSS)},
    ),
    "whisper": whisper({}),
    "whisper, old": whisper({"embed_dim": 32}),
    "clip": CLIP,
}

ONLY_TOGETHER = {"vit, old": "patch_embed"}
"""A head's width is worked out from the embedding's: neither can go without the other."""

FOLLOWS_WIDTH = {"bert, old", "gpt2, old", "llama, old", "qwen3", "vit, qk_norm", "vit, old"}
"""The scale, or a norm, follows the width of the heads: narrower ones are not the same as partly zeroed ones."""


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def results(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors_in(model(**inputs)))


def double(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def owned(groups: Iterable[ChannelGroup], projection: Projection) -> Tensor:
    """Return the positions that the channels of the free group on a projection own."""
    found = [
        member.positions
        for group in groups
        for member in group.members
        if not group.frozen and (member.tensor, member.dim) == (projection.tensor, projection.dim)
    ]
    return torch.cat(found).sort(dim=1).values if found else torch.empty(0)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", MODELS)
def test_groups_are_found_and_proven(name: str, heads: Heads) -> None:
    model, expected = model_of(name), EXPECTED[name]
    groups = find_groups(model, example(name), heads=heads)
    found = summary(groups)
    assert {group: size for group, size in found.items() if isinstance(size, int)} == expected.free(heads)
    frozen = {group: str(found.get(group)) for group in expected.frozen}
    assert all(reason in frozen[group] for group, reason in expected.frozen.items()), frozen
    for projection in expected.projections:
        want = torch.empty(0) if heads == "keep" else projection.positions(heads)
        assert torch.equal(owned(groups, projection), want), projection
    prove(model, name, groups)


def prove(model: nn.Module, name: str, groups: Iterable[ChannelGroup]) -> None:
    """Assert that permuting every group that is not frozen leaves the outputs unchanged."""
    model, inputs = randomise(copy.deepcopy(model).double()).eval(), double(example(name))
    before = results(model, inputs)
    permute_channels(model, [group for group in groups if not group.frozen])
    assert all(part.isfinite().all() and part.std() > 1e-3 for part in before)
    assert relative_error(results(model, inputs), before) < 1e-10


@cache
def pruned(name: str, heads: Heads) -> tuple[nn.Module, PruneRecord]:
    """Return a model in eval mode without half of its channels, and what was done; tests leave it as it is."""
    model = model_of(name).eval()
    return model, prune(model, example(name), pruning_ratio=0.5, heads=heads)


@pytest.mark.parametrize("heads", CUTTING)
@pytest.mark.parametrize("name", MODELS)
def test_half_of_everything_is_cut_exactly(name: str, heads: Heads) -> None:
    expected, (model, record) = EXPECTED[name], pruned(name, heads)
    free = expected.free(heads)
    assert not set(record.held_back) & set(free), record.held_back
    assert record.reached == 0.5
    assert {group: record.channels[group].after for group in free} == {group: size // 2 for group, size in free.items()}
    assert {tensor: tuple(tensor_at(model, tensor).shape) for tensor in expected.shapes} == expected.shapes
    attributes_follow(model, record, expected.attributes(heads))
    assert record.params.after == sum(parameter.numel() for parameter in model.parameters()) < 0.6 * record.params.dense
    assert 0 < record.macs.after < 0.5 * record.macs.dense


@pytest.mark.parametrize("heads", CUTTING)
@pytest.mark.parametrize("name", MODELS)
def test_the_cut_model_trains_on_inputs_of_other_sizes(name: str, heads: Heads) -> None:
    inputs = example(name, batch=3, length=9)
    model = copy.deepcopy(pruned(name, heads)[0]).train()
    parts = list(tensors_in(model(**inputs)))
    assert [part.shape for part in parts] == [part.shape for part in results(model_of(name), inputs)]
    sum(part.square().sum() for part in parts).backward()
    for tensor, parameter in model.named_parameters():
        assert parameter.grad is not None, tensor
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.isfinite().all()


def attributes_follow(model: nn.Module, record: PruneRecord, expected: Attributes) -> None:
    """Assert that sizes in attributes have followed the cut, and stand in the record."""
    for module, sizes in expected.items():
        held = {attribute: getattr(model.get_submodule(module), attribute) for attribute in sizes}
        recorded = {attribute: record.attributes.get(module, {}).get(attribute) for attribute in sizes}
        assert held == recorded == sizes, module


@pytest.mark.parametrize("name", MODELS)
def test_heads_that_are_to_be_kept_are_kept(name: str) -> None:
    model, expected = model_of(name), EXPECTED[name]
    record = prune(model, example(name), pruning_ratio=0.5, heads="keep")
    for projection in expected.projections:
        assert tensor_at(model, projection.tensor).shape[projection.dim] == prod(projection.box)
        assert projection.dim not in record.kept.get(projection.tensor, {})
    cut = {group: size for group, size in expected.rest.items() if group != ONLY_TOGETHER.get(name)}
    assert set(expected.rest) & set(record.held_back) == set(expected.rest) - set(cut)
    assert {group: record.channels[group].after for group in cut} == {group: size // 2 for group, size in cut.items()}
    sum(part.square().sum() for part in tensors_in(model(**example(name)))).backward()


@pytest.mark.parametrize(("name", "heads"), [(name, heads) for name in MODELS for heads in CUTTING])
def test_removing_heads_and_mlps_is_the_same_as_zeroing_them(name: str, heads: Heads) -> None:
    if heads == "inside" and name in FOLLOWS_WIDTH:
        return
    model, inputs, expected = randomise(model_of(name).double()).eval(), double(example(name)), EXPECTED[name]
    dense = copy.deepcopy(model)
    record = prune(model, inputs, pruning_ratio=0.5, heads=heads, ignore=[expected.embedding])
    cut = {(p.tensor, p.dim): tensor_at(model, p.tensor).shape[p.dim] for p in expected.projections}
    left = 1.0 if name in ONLY_TOGETHER else 0.5
    assert cut == {(p.tensor, p.dim): prod(p.box) * left for p in expected.projections}
    assert bool(set(record.held_back) & (set(expected.free(heads)) - set(expected.rest))) == (name in ONLY_TOGETHER)
    zero(dense, record)
    assert relative_error(results(model, inputs), results(dense, inputs)) < 1e-10


def zero(model: nn.Module, record: PruneRecord) -> None:
    """Set to zero what a record has removed."""
    tensors = named_tensors(model)
    for name, dims in record.kept.items():
        for dim, kept in dims.items():
            gone = sorted(set(range(tensors[name].shape[dim])) - set(kept))
            tensors[name].data.index_fill_(dim, torch.tensor(gone), 0)


@pytest.mark.parametrize("heads", CUTTING)
@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_dense_model_is_cut_to_fit(name: str, heads: Heads, tmp_path: Path) -> None:
    loads(name, pruned(name, heads)[0], tmp_path / "pruned.pt")


@pytest.mark.parametrize("name", ["bert, old", "gpt2, old", "t5, old"])
def test_two_cuts_are_done_again(name: str, tmp_path: Path) -> None:
    model = model_of(name).eval()
    cuts = [prune(model, example(name), pruning_ratio=ratio, heads="whole") for ratio in (0.25, 0.5)]
    heads = [record.channels[group].after for record in cuts for group in EXPECTED[name].heads]
    assert heads == [3] * (len(heads) // 2) + [2] * (len(heads) // 2)
    loads(name, model, tmp_path / "pruned.pt")


@pytest.mark.parametrize("heads", CUTTING)
def test_a_branch_on_the_values_of_a_mask_is_followed_without_memory(heads: Heads) -> None:
    ids, expected = example("gpt2")["input_ids"], EXPECTED["gpt2"]
    model, inputs = MaskedGPT2(BASE), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = summary(find_groups(model, inputs, heads=heads))
    assert {group: size for group, size in found.items() if isinstance(size, int)} == expected.free(heads)
    record = prune(model, inputs, pruning_ratio=0.5, heads=heads)
    assert {tensor: tuple(tensor_at(model, tensor).shape) for tensor in expected.shapes} == expected.shapes
    attributes_follow(model, record, expected.attributes(heads))
    sum(part.square().sum() for part in tensors_in(model(**inputs))).backward()


def loads(name: str, model: nn.Module, path: Path) -> None:
    """Assert that a fresh dense model becomes the cut one, with all its numbers, and computes the same bit for bit."""
    save_pruned(model, path)
    loaded = load_pruned(MODELS[name](), path).eval()
    assert numbers(loaded) == numbers(model)
    assert history.history_of(loaded) == history.history_of(model)
    for inputs in (example(name), example(name, batch=3, length=9)):
        assert all(map(torch.equal, results(loaded, inputs), results(model, inputs)))


def numbers(model: nn.Module) -> dict[str, dict[str, object]]:
    """Return every number that a module of the model holds in an attribute."""
    return {
        name: {key: value for key, value in vars(module).items() if isinstance(value, (int, float, tuple))}
        for name, module in model.named_modules()
    }
