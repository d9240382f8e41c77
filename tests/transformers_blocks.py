"""Transformers as the transformers library and timm write them, in today's style and in older ones, small.

Two layers, 64 channels wide, 4 heads of 16, MLPs of 128. Every model keeps the quirks that a pruning library trips
over: sizes in attributes, fused projections, transposed weights, buffers that depend on the width of a head, ties
between layers, outputs in dataclasses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, MELS, PIXELS = 5, 20, 16


@dataclass(frozen=True)
class Config:
    """Named as transformers names them."""

    vocab_size: int = 40
    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    rotary_ndims: int = 16
    projection_dim: int = 24
    max_position_embeddings: int = 16
    qk_norm: bool = False
    attention: str = "sdpa"


# Attention functions: they get the module that calls them, as in transformers since 2025.


def repeat_kv(states: Tensor, n_rep: int) -> Tensor:
    batch, num_key_value_heads, length, head_dim = states.shape
    if n_rep == 1:
        return states
    states = states[:, :, None, :, :].expand(batch, num_key_value_heads, n_rep, length, head_dim)
    return states.reshape(batch, num_key_value_heads * n_rep, length, head_dim)


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    key = repeat_kv(key, getattr(module, "num_key_value_groups", 1))
    value = repeat_kv(value, getattr(module, "num_key_value_groups", 1))
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if bias is None and module.is_causal:
        bias = causal_bias(query)
    if bias is not None:
        weights = weights + bias
    weights = F.softmax(weights, dim=-1).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous()


def sdpa_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    if hasattr(module, "num_key_value_groups"):
        key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    is_causal = query.shape[2] > 1 and bias is None and module.is_causal
    result = F.scaled_dot_product_attention(query, key, value, bias, scale=scaling, is_causal=is_causal)
    return result.transpose(1, 2).contiguous()


def grouped_sdpa_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    is_causal = query.shape[2] > 1 and bias is None and module.is_causal
    result = F.scaled_dot_product_attention(
        query, key, value, bias, scale=scaling, is_causal=is_causal, enable_gqa=True
    )
    return result.transpose(1, 2).contiguous()


ATTENTION_FUNCTIONS = {"eager": eager_attention, "sdpa": sdpa_attention, "grouped": grouped_sdpa_attention}


def causal_bias(states: Tensor) -> Tensor:
    length = states.shape[-2]
    return torch.full((length, length), torch.finfo(states.dtype).min, dtype=states.dtype).triu(1)


def padding_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return (1.0 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min


# BERT


class BertSelfAttention(nn.Module):
    is_causal = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = int(config.hidden_size / config.num_attention_heads)
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.scaling = self.attention_head_size**-0.5
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)

    def forward(self, hidden_states: Tensor, bias: Tensor | None) -> Tensor:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.attention_head_size)
        query = self.query(hidden_states).view(*hidden_shape).transpose(1, 2)
        key = self.key(hidden_states).view(*hidden_shape).transpose(1, 2)
        value = self.value(hidden_states).view(*hidden_shape).transpose(1, 2)
        interface = ATTENTION_FUNCTIONS[self.config.attention]
        return interface(self, query, key, value, bias, self.scaling).reshape(*input_shape, -1).contiguous()


class OldBertSelfAttention(BertSelfAttention):
    """Until 2025: `transpose_for_scores` with both sizes, and a scale worked out in forward."""

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        new_x_shape = (*x.size()[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(new_x_shape).permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor, bias: Tensor | None) -> Tensor:
        query = self.transpose_for_scores(self.query(hidden_states))
        key = self.transpose_for_scores(self.key(hidden_states))
        value = self.transpose_for_scores(self.value(hidden_states))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        context = torch.matmul(F.softmax(scores + bias, dim=-1), value).permute(0, 2, 1, 3).contiguous()
        return context.view((*context.size()[:-2], self.all_head_size))


class BertLayer(nn.Module):
    def __init__(self, config: Config, attention: type[BertSelfAttention]) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention = attention(config)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.intermediate = nn.Linear(width, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, width)
        self.output_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = self.attention_norm(self.dropout(self.attention_output(self.attention(x, bias))) + x)
        return self.output_norm(self.dropout(self.output(F.gelu(self.intermediate(x)))) + x)


class BertEmbeddings(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(2, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings).expand((1, -1)))

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        positions = self.position_ids[:, : input_ids.shape[1]]
        words = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.LayerNorm(words + self.position_embeddings(positions))


@dataclass
class ClassifierOutput:
    """What transformers returns: an object of its own class, with parts that are None."""

    logits: Tensor
    loss: Tensor | None = None


class Bert(nn.Module):
    def __init__(self, config: Config, attention: type[BertSelfAttention] = BertSelfAttention) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.layer = nn.ModuleList(BertLayer(config, attention) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> ClassifierOutput:
        x = self.embeddings(input_ids, token_type_ids)
        bias = padding_bias(attention_mask, x.dtype)
        for layer in self.layer:
            x = layer(x, bias)
        return ClassifierOutput(logits=self.classifier(torch.tanh(self.pooler(x[:, 0]))))


# GPT-2


class Conv1D(nn.Module):
    """A Linear whose weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.2)
        self.bias = nn.Parameter(torch.randn(nf) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class GPT2Attention(nn.Module):
    is_causal = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.embed_dim // self.num_heads
        self.split_size = self.embed_dim
        self.scaling = self.head_dim**-0.5
        self.c_attn = Conv1D(3 * self.embed_dim, self.embed_dim)
        self.c_proj = Conv1D(self.embed_dim, self.embed_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.c_attn(hidden_states).split(self.split_size, dim=2)
        shape = (*key.shape[:-1], -1, self.head_dim)
        query, key, value = (states.view(shape).transpose(1, 2) for states in (query, key, value))
        result = ATTENTION_FUNCTIONS[self.config.attention](self, query, key, value, None, self.scaling)
        return self.c_proj(result.reshape(*result.shape[:-2], -1).contiguous())


class OldGPT2Attention(GPT2Attention):
    """Until 2025: a causal mask in a buffer, heads split and merged with both sizes."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        size = config.max_position_embeddings
        mask = torch.tril(torch.ones((size, size), dtype=torch.bool)).view(1, 1, size, size)
        self.register_buffer("bias", mask, persistent=False)

    def _split_heads(self, tensor: Tensor, num_heads: int, attn_head_size: int) -> Tensor:
        return tensor.view((*tensor.size()[:-1], num_heads, attn_head_size)).permute(0, 2, 1, 3)

    def _merge_heads(self, tensor: Tensor, num_heads: int, attn_head_size: int) -> Tensor:
        tensor = tensor.permute(0, 2, 1, 3).contiguous()
        return tensor.view((*tensor.size()[:-2], num_heads * attn_head_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.c_attn(hidden_states).split(self.split_size, dim=2)
        query = self._split_heads(query, self.num_heads, self.head_dim)
        key = self._split_heads(key, self.num_heads, self.head_dim)
        value = self._split_heads(value, self.num_heads, self.head_dim)
        weights = torch.matmul(query, key.transpose(-1, -2))
        weights = weights / torch.full([], value.size(-1) ** 0.5, dtype=weights.dtype)
        length = key.size(-2)
        causal_mask = self.bias[:, :, :length, :length]
        least = torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype)
        weights = F.softmax(torch.where(causal_mask, weights, least), dim=-1)
        return self.c_proj(self._merge_heads(torch.matmul(weights, value), self.num_heads, self.head_dim))


class GPT2Block(nn.Module):
    def __init__(self, config: Config, attention: type[GPT2Attention]) -> None:
        super().__init__()
        width = config.hidden_size
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = attention(config)
        self.c_fc = Conv1D(config.intermediate_size, width)
        self.c_proj = Conv1D(width, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """The embedding is the head too."""

    def __init__(self, config: Config, attention: type[GPT2Attention] = GPT2Attention) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList(GPT2Block(config, attention) for _ in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor) -> ClassifierOutput:
        input_ids = input_ids.view(-1, input_ids.size(-1))
        position_ids = torch.arange(0, input_ids.size(-1), dtype=torch.long).unsqueeze(0)
        x = self.wte(input_ids) + self.wpe(position_ids)
        output_shape = (*input_ids.shape, x.size(-1))
        for block in self.h:
            x = block(x)
        return ClassifierOutput(logits=self.lm_head(self.ln_f(x).view(output_shape)))


class MaskedGPT2(GPT2):
    """A mask that masks nothing is left out, as transformers does, so that the forward pass depends on values."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> ClassifierOutput:
        if not attention_mask.all():
            raise NotImplementedError("Padding is not what this model is for.")
        return super().forward(input_ids)


# Llama, and its relatives with one key for all heads (MQA), normalised queries (Qwen 3) and partial rotation (GPT-NeoX)


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


class RotaryEmbedding(nn.Module):
    """Angles from an outer product of positions and frequencies, written as a product of matrices."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        frequencies = 1.0 / (10000.0 ** (torch.arange(0, config.rotary_ndims, 2).float() / config.rotary_ndims))
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        expanded = self.inv_freq[None, :, None].expand(position_ids.shape[0], -1, 1)
        freqs = (expanded @ position_ids[:, None, :].to(expanded.dtype)).transpose(1, 2)
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos().to(x.dtype), emb.sin().to(x.dtype)


class NewRotaryEmbedding(RotaryEmbedding):
    """The same as a broadcast multiplication."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        freqs = position_ids[..., None].to(self.inv_freq.dtype) * self.inv_freq
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos().to(x.dtype), emb.sin().to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


class LlamaAttention(nn.Module):
    is_causal = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        width, inner = config.hidden_size, config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        result = ATTENTION_FUNCTIONS[self.config.attention](self, query, key, value, None, self.scaling)
        return self.o_proj(result.reshape(*input_shape, -1).contiguous())


class OldLlamaAttention(LlamaAttention):
    """Until 2024: all sizes written out, and checked."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        bsz, q_len, _ = hidden_states.size()
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        query = query.view(bsz, q_len, self.num_heads, self.head_dim).transpose(1, 2)
        key = key.view(bsz, q_len, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        value = value.view(bsz, q_len, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = (repeat_kv(states, self.num_key_value_groups) for states in (key, value))
        weights = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(self.head_dim)
        result = torch.matmul(F.softmax(weights + causal_bias(query), dim=-1), value)
        if result.size() != (bsz, self.num_heads, q_len, self.head_dim):
            raise ValueError(f"`attn_output` should be of size {(bsz, self.num_heads, q_len, self.head_dim)}")
        return self.o_proj(result.transpose(1, 2).contiguous().reshape(bsz, q_len, self.hidden_size))


class NeoXAttention(nn.Module):
    """Query, key and value in one projection, head by head; only the first channels of a head are rotated."""

    is_causal = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.rotary_ndims = config.rotary_ndims
        self.scaling = self.head_size**-0.5
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, 3 * self.head_size)
        query, key, value = self.query_key_value(hidden_states).view(hidden_shape).transpose(1, 2).chunk(3, dim=-1)
        q_rot, q_pass = query[..., : self.rotary_ndims], query[..., self.rotary_ndims :]
        k_rot, k_pass = key[..., : self.rotary_ndims], key[..., self.rotary_ndims :]
        q_rot, k_rot = apply_rotary_pos_emb(q_rot, k_rot, *position_embeddings)
        query, key = torch.cat([q_rot, q_pass], dim=-1), torch.cat([k_rot, k_pass], dim=-1)
        result = ATTENTION_FUNCTIONS[self.config.attention](self, query, key, value, None, self.scaling)
        return self.dense(result.reshape(*input_shape, -1).contiguous())


class LlamaLayer(nn.Module):
    def __init__(self, config: Config, attention: Callable[[Config], nn.Module]) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.self_attn = attention(config)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width), RMSNorm(width)

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), position_embeddings)
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    def __init__(
        self,
        config: Config,
        attention: Callable[[Config], nn.Module] = LlamaAttention,
        rotary: type[RotaryEmbedding] = RotaryEmbedding,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config, attention) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.rotary_emb = rotary(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> ClassifierOutput:
        x = self.embed_tokens(input_ids)
        position_ids = torch.arange(x.shape[1]).unsqueeze(0)
        position_embeddings = self.rotary_emb(x, position_ids)
        for layer in self.layers:
            x = layer(x, position_embeddings)
        return ClassifierOutput(logits=self.lm_head(self.norm(x)[:, slice(None), :]))


# ViT, as timm writes it


class ViTAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.attn_dim = self.num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * self.attn_dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(self.attn_dim, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape  # noqa: N806
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, scale=self.scale)
        return self.proj(x.transpose(1, 2).reshape(B, N, self.attn_dim))


class OldViTAttention(ViTAttention):
    """Until 2025: the width of a head is worked out from that of the input."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape  # noqa: N806
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.1 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ViTBlock(nn.Module):
    def __init__(self, config: Config, attention: type[ViTAttention]) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = attention(config)
        self.fc1, self.fc2 = nn.Linear(dim, config.intermediate_size), nn.Linear(config.intermediate_size, dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class ViT(nn.Module):
    def __init__(self, config: Config, attention: type[ViTAttention] = ViTAttention) -> None:
        super().__init__()
        self.num_features = self.embed_dim = dim = config.hidden_size
        self.patch_embed = nn.Conv2d(3, dim, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.2)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (PIXELS // 4) ** 2, dim) * 0.2)
        self.blocks = nn.Sequential(*(ViTBlock(config, attention) for _ in range(config.num_hidden_layers)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


# T5


class T5Attention(nn.Module):
    """Unscaled; a table of biases by distance in the first layer, handed on to the others."""

    def __init__(self, config: Config, *, has_relative_attention_bias: bool, is_decoder: bool) -> None:
        super().__init__()
        self.config = config
        self.is_causal = self.is_decoder = is_decoder
        self.has_relative_attention_bias = has_relative_attention_bias
        self.relative_attention_num_buckets, self.relative_attention_max_distance = 8, 16
        self.d_model = config.hidden_size
        self.key_value_proj_dim = config.head_dim
        self.n_heads = config.num_attention_heads
        self.inner_dim = self.n_heads * self.key_value_proj_dim
        self.q = nn.Linear(self.d_model, self.inner_dim, bias=False)
        self.k = nn.Linear(self.d_model, self.inner_dim, bias=False)
        self.v = nn.Linear(self.d_model, self.inner_dim, bias=False)
        self.o = nn.Linear(self.inner_dim, self.d_model, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(self.relative_attention_num_buckets, self.n_heads)

    def _bucket(self, relative_position: Tensor) -> Tensor:
        num_buckets = self.relative_attention_num_buckets
        buckets = torch.zeros_like(relative_position)
        if self.is_decoder:
            relative_position = -torch.min(relative_position, torch.zeros_like(relative_position))
        else:
            num_buckets //= 2
            buckets = buckets + (relative_position > 0).to(torch.long) * num_buckets
            relative_position = torch.abs(relative_position)
        max_exact = num_buckets // 2
        share = torch.log(relative_position.float().clamp_min(1) / max_exact) / math.log(
            self.relative_attention_max_distance / max_exact
        )
        large = max_exact + (share * (num_buckets - max_exact)).to(torch.long)
        large = torch.min(large, torch.full_like(large, num_buckets - 1))
        return buckets + torch.where(relative_position < max_exact, relative_position, large)

    def compute_bias(self, query_length: int, key_length: int) -> Tensor:
        context_position = torch.arange(query_length, dtype=torch.long)[:, None]
        memory_position = torch.arange(key_length, dtype=torch.long)[None, :]
        values = self.relative_attention_bias(self._bucket(memory_position - context_position))
        return values.permute([2, 0, 1]).unsqueeze(0)

    def position_bias(self, query: Tensor, key: Tensor) -> Tensor:
        lengths = query.shape[2], key.shape[2]
        if self.has_relative_attention_bias:
            bias = self.compute_bias(*lengths)
        else:
            bias = torch.zeros((1, self.n_heads, *lengths), dtype=query.dtype)
        return bias + causal_bias(query) if self.is_decoder else bias

    def forward(self, hidden_states: Tensor, memory: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        input_shape = hidden_states.shape[:-1]
        current = hidden_states if memory is None else memory
        hidden_shape = (*input_shape, -1, self.key_value_proj_dim)
        kv_shape = (*current.shape[:-1], -1, self.key_value_proj_dim)
        query = self.q(hidden_states).view(hidden_shape).transpose(1, 2)
        key = self.k(current).view(kv_shape).transpose(1, 2)
        value = self.v(current).view(kv_shape).transpose(1, 2)
        bias = self.position_bias(query, key) if bias is None else bias
        result = ATTENTION_FUNCTIONS[self.config.attention](self, query, key, value, bias, 1.0)
        return self.o(result.reshape(*input_shape, -1).contiguous()), bias


class OldT5Attention(T5Attention):
    """Until 2025: heads split and merged with all sizes, scores by a matmul that is added to in place."""

    def forward(self, hidden_states: Tensor, memory: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        batch_size = hidden_states.shape[0]

        def shape(states: Tensor) -> Tensor:
            return states.view(batch_size, -1, self.n_heads, self.key_value_proj_dim).transpose(1, 2)

        current = hidden_states if memory is None else memory
        query, key, value = shape(self.q(hidden_states)), shape(self.k(current)), shape(self.v(current))
        scores = torch.matmul(query, key.transpose(3, 2))
        bias = self.position_bias(query, key) if bias is None else bias
        scores += bias
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        result = torch.matmul(weights, value).transpose(1, 2).contiguous().view(batch_size, -1, self.inner_dim)
        return self.o(result), bias


class T5Block(nn.Module):
    def __init__(self, config: Config, attention: type[T5Attention], *, first: bool, is_decoder: bool) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.self_attn = attention(config, has_relative_attention_bias=first, is_decoder=is_decoder)
        self.self_norm = RMSNorm(width)
        if is_decoder:
            self.cross_attn = attention(config, has_relative_attention_bias=False, is_decoder=False)
            self.cross_norm = RMSNorm(width)
        self.wi_0, self.wi_1 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.wo = nn.Linear(inner, width, bias=False)
        self.ff_norm = RMSNorm(width)

    def forward(self, x: Tensor, memory: Tensor | None, biases: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        y, self_bias = self.self_attn(self.self_norm(x), None, biases[0])
        x, biases = x + y, [self_bias, *biases[1:]]
        if memory is not None:
            y, biases[1] = self.cross_attn(self.cross_norm(x), memory, biases[1])
            x = x + y
        y = self.ff_norm(x)
        return x + self.wo(F.gelu(self.wi_0(y)) * self.wi_1(y)), biases


class T5Stack(nn.Module):
    def __init__(self, config: Config, attention: type[T5Attention], *, is_decoder: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            T5Block(config, attention, first=place == 0, is_decoder=is_decoder)
            for place in range(config.num_hidden_layers)
        )
        self.final_layer_norm = RMSNorm(config.hidden_size)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        biases: list[Tensor | None] = [None, None]
        for block in self.block:
            x, biases = block(x, memory, biases)
        return self.final_layer_norm(x)


class T5(nn.Module):
    """Encoder, decoder and head share one embedding."""

    def __init__(self, config: Config, attention: type[T5Attention] = T5Attention) -> None:
        super().__init__()
        self.model_dim = config.hidden_size
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = T5Stack(config, attention, is_decoder=False)
        self.decoder = T5Stack(config, attention, is_decoder=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.shared.weight

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> tuple[Tensor, ...]:
        memory = self.encoder(self.shared(input_ids))
        sequence_output = self.decoder(self.shared(decoder_input_ids), memory)
        return (self.lm_head(sequence_output * 0.125),)


# Whisper's encoder with its head for audio classification


class WhisperAttention(nn.Module):
    is_causal = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.embed_dim // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.k_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=False)
        self.v_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.q_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query = (self.q_proj(hidden_states) * self.scaling).view(hidden_shape).transpose(1, 2).contiguous()
        kv_shape = (input_shape[0], -1, self.num_heads, self.head_dim)
        key = self.k_proj(hidden_states).view(kv_shape).transpose(1, 2).contiguous()
        value = self.v_proj(hidden_states).view(kv_shape).transpose(1, 2).contiguous()
        result = ATTENTION_FUNCTIONS[self.config.attention](self, query, key, value, None, 1.0)
        return self.out_proj(result.reshape(*input_shape, -1).contiguous())


class OldWhisperAttention(WhisperAttention):
    """As in BART: batch and heads become one dimension for `bmm`, and every size is checked."""

    def _shape(self, tensor: Tensor, seq_len: int, bsz: int) -> Tensor:
        return tensor.view(bsz, seq_len, self.num_heads, self.head_dim).transpose(1, 2).contiguous()

    def forward(self, hidden_states: Tensor) -> Tensor:
        bsz, tgt_len, _ = hidden_states.size()
        proj_shape = (bsz * self.num_heads, -1, self.head_dim)
        query = self._shape(self.q_proj(hidden_states) * self.scaling, tgt_len, bsz).view(*proj_shape)
        key = self._shape(self.k_proj(hidden_states), -1, bsz).reshape(*proj_shape)
        value = self._shape(self.v_proj(hidden_states), -1, bsz).reshape(*proj_shape)
        weights = torch.bmm(query, key.transpose(1, 2))
        if weights.size() != (bsz * self.num_heads, tgt_len, key.size(1)):
            raise ValueError(f"Attention weights should be of size {(bsz * self.num_heads, tgt_len, key.size(1))}")
        result = torch.bmm(F.softmax(weights, dim=-1), value).view(bsz, self.num_heads, tgt_len, self.head_dim)
        return self.out_proj(result.transpose(1, 2).reshape(bsz, tgt_len, self.embed_dim))


class WhisperLayer(nn.Module):
    def __init__(self, config: Config, attention: type[WhisperAttention]) -> None:
        super().__init__()
        self.embed_dim = config.hidden_size
        self.self_attn = attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(self.embed_dim)
        self.fc1 = nn.Linear(self.embed_dim, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, self.embed_dim)
        self.final_layer_norm = nn.LayerNorm(self.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Whisper(nn.Module):
    def __init__(self, config: Config, attention: type[WhisperAttention] = WhisperAttention) -> None:
        super().__init__()
        width = config.hidden_size
        self.conv1 = nn.Conv1d(MELS, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, width)
        self.layers = nn.ModuleList(WhisperLayer(config, attention) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(width)
        self.projector = nn.Linear(width, config.projection_dim)
        self.classifier = nn.Linear(config.projection_dim, CLASSES)

    def forward(self, input_features: Tensor) -> ClassifierOutput:
        x = F.gelu(self.conv2(F.gelu(self.conv1(input_features)))).permute(0, 2, 1)
        x = x + self.embed_positions.weight
        for layer in self.layers:
            x = layer(x)
        return ClassifierOutput(logits=self.classifier(self.projector(self.layer_norm(x)).mean(dim=1)))


# CLIP


class CLIPAttention(nn.Module):
    def __init__(self, config: Config, *, is_causal: bool) -> None:
        super().__init__()
        self.config = config
        self.is_causal = is_causal
        self.embed_dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.embed_dim // self.num_heads
        self.scale = self.head_dim**-0.5
        self.k_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.v_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.q_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        queries = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        keys = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        values = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        result = ATTENTION_FUNCTIONS[self.config.attention](self, queries, keys, values, None, self.scale)
        return self.out_proj(result.reshape(*input_shape, -1).contiguous())


class CLIPLayer(nn.Module):
    def __init__(self, config: Config, *, is_causal: bool) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.self_attn = CLIPAttention(config, is_causal=is_causal)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        y = self.fc1(self.layer_norm2(x))
        return x + self.fc2(y * torch.sigmoid(1.702 * y))


class CLIPTextTower(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings).expand((1, -1)))
        self.layers = nn.ModuleList(CLIPLayer(config, is_causal=True) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.token_embedding(input_ids) + self.position_embedding(self.position_ids[:, : input_ids.shape[-1]])
        for layer in self.layers:
            x = layer(x)
        return self.final_layer_norm(x)[torch.arange(x.shape[0]), input_ids.to(torch.int).argmax(dim=-1)]


class CLIPVisionTower(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_dim = config.hidden_size
        self.class_embedding = nn.Parameter(torch.randn(self.embed_dim) * 0.2)
        self.patch_embedding = nn.Conv2d(3, self.embed_dim, kernel_size=4, stride=4, bias=False)
        self.num_positions = (PIXELS // 4) ** 2 + 1
        self.position_embedding = nn.Embedding(self.num_positions, self.embed_dim)
        self.register_buffer("position_ids", torch.arange(self.num_positions).expand((1, -1)), persistent=False)
        self.pre_layrnorm = nn.LayerNorm(self.embed_dim)
        self.layers = nn.ModuleList(CLIPLayer(config, is_causal=False) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(self.embed_dim)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        classes = self.class_embedding.expand(pixel_values.shape[0], 1, -1)
        x = self.pre_layrnorm(torch.cat([classes, patches], dim=1) + self.position_embedding(self.position_ids))
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x[:, 0, :])


@dataclass
class CLIPOutput:
    """A dataclass with tensors, None and a nested dict."""

    logits_per_image: Tensor
    logits_per_text: Tensor
    loss: Tensor | None = None
    embeds: dict[str, Tensor] = field(default_factory=dict)


class CLIP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.text_model, self.vision_model = CLIPTextTower(config), CLIPVisionTower(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> CLIPOutput:
        image = self.visual_projection(self.vision_model(pixel_values))
        text = self.text_projection(self.text_model(input_ids))
        image = image / torch.pow(torch.sum(torch.pow(image, 2), dim=-1, keepdim=True), 0.5)
        text = text / torch.pow(torch.sum(torch.pow(text, 2), dim=-1, keepdim=True), 0.5)
        logits = torch.matmul(text, image.t()) * self.logit_scale.exp()
        return CLIPOutput(logits_per_image=logits.t(), logits_per_text=logits, embeds={"text": text, "image": image})


BASE = Config()

MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: Bert(BASE),
    "bert, eager": lambda: Bert(replace(BASE, attention="eager")),
    "bert, old": lambda: Bert(BASE, OldBertSelfAttention),
    "gpt2": lambda: GPT2(BASE),
    "gpt2, old": lambda: GPT2(BASE, OldGPT2Attention),
    "llama": lambda: Llama(BASE),
    "llama, eager": lambda: Llama(replace(BASE, attention="eager"), rotary=NewRotaryEmbedding),
    "llama, old": lambda: Llama(BASE, OldLlamaAttention),
    "llama, enable_gqa": lambda: Llama(replace(BASE, attention="grouped")),
    "llama, a key for each head": lambda: Llama(replace(BASE, num_key_value_heads=4)),
    "llama, a key for two of eight heads": lambda: Llama(
        replace(BASE, num_attention_heads=8, num_key_value_heads=4, head_dim=8, rotary_ndims=8)
    ),
    "llama, a key for four of eight heads": lambda: Llama(
        replace(BASE, num_attention_heads=8, num_key_value_heads=2, head_dim=8, rotary_ndims=8)
    ),
    "llama, a key for all heads": lambda: Llama(replace(BASE, num_key_value_heads=1)),
    "qwen3": lambda: Llama(replace(BASE, qk_norm=True, head_dim=32, rotary_ndims=32)),
    "neox": lambda: Llama(replace(BASE, rotary_ndims=4), NeoXAttention),
    "vit": lambda: ViT(BASE),
    "vit, qk_norm": lambda: ViT(replace(BASE, qk_norm=True)),
    "vit, old": lambda: ViT(BASE, OldViTAttention),
    "t5": lambda: T5(BASE),
    "t5, old": lambda: T5(BASE, OldT5Attention),
    "whisper": lambda: Whisper(replace(BASE, max_position_embeddings=8)),
    "whisper, old": lambda: Whisper(replace(BASE, max_position_embeddings=8), OldWhisperAttention),
    "clip": lambda: CLIP(BASE),
}


def example(name: str, batch: int = 2, length: int = 7) -> dict[str, Tensor]:
    """Return keyword inputs: token ids, a mask with padding, pixels or a spectrogram."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, BASE.vocab_size, (batch, length), generator=generator)
    pixels = torch.rand(batch + 1, 3, PIXELS, PIXELS, generator=generator) - 0.5
    mask = torch.ones_like(ids)
    mask[1:, -2:] = 0
    inputs = {
        "bert": {"input_ids": ids, "attention_mask": mask, "token_type_ids": 1 - mask},
        "t5": {"input_ids": ids, "decoder_input_ids": ids[:, :-1].flip(1)},
        "vit": {"pixels": pixels},
        "whisper": {"input_features": torch.rand(batch, MELS, 16, generator=generator) - 0.5},
        "clip": {"input_ids": ids, "pixel_values": pixels},
    }
    return inputs.get(name.partition(",")[0], {"input_ids": ids})
