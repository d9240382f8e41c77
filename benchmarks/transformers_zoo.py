"""The models of transformers, small and with random weights: `python benchmarks/transformers_zoo.py [model ...]`.

Prints for each whether its channel groups are right (the largest relative difference of the outputs when their channels
are permuted, in float64), which share of its parameters can be pruned, what a 50 % cut removes, and how long all took.
"""

import copy
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_prune import ChannelGroup, find_groups, prune
from lightning_prune.inputs import tensors_in
from lightning_prune.tensors import named_tensors

try:
    import transformers
except ImportError:
    sys.exit("transformers is not installed, and lightning_prune does not need it. For this: pip install transformers")

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from proof import permute_channels, randomise, relative_error

Case = tuple[Callable[[], nn.Module], Mapping[str, Tensor]]

WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCABULARY = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ENCODER_DECODER = {
    **{f"{side}_{part}": size for side in ("encoder", "decoder") for part, size in (("layers", 2), ("ffn_dim", 128))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "d_model": 64,
}
IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) - 0.5
SOUND = torch.rand(2, 20, 64, generator=torch.Generator().manual_seed(2)) - 0.5
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
PIXELS = {"image_size": 32, "patch_size": 8}


def case(name: str, inputs: Mapping[str, Tensor], config: str, further: Mapping[str, Any] | None = None) -> Case:
    """Return a builder of a model with a small config, and its inputs."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        settings = getattr(transformers, f"{config}Config")(**{**WIDTHS, **VOCABULARY, **(further or {})})
        return getattr(transformers, name)(settings).eval()

    return build, inputs


MODELS: dict[str, Case] = {
    "BERT": case("BertForSequenceClassification", TEXT, "Bert"),
    "BERT, eager": case("BertForMaskedLM", TEXT, "Bert", {"attn_implementation": "eager"}),
    "GPT-2": case("GPT2LMHeadModel", TEXT, "GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "Llama": case("LlamaForCausalLM", TEXT, "Llama", {"num_key_value_heads": 2}),
    "Llama, no cache": case("LlamaForCausalLM", TEXT, "Llama", {"num_key_value_heads": 2, "use_cache": False}),
    "Mistral": case("MistralForCausalLM", TEXT, "Mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
    "Qwen 3": case("Qwen3ForCausalLM", TEXT, "Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "GPT-NeoX": case("GPTNeoXForCausalLM", TEXT, "GPTNeoX"),
    "ViT": case("ViTForImageClassification", {"pixel_values": IMAGES}, "ViT", PIXELS),
    "T5": case(
        "T5ForConditionalGeneration",
        {**TEXT, "decoder_input_ids": IDS[:, :7]},
        "T5",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    ),
    "BART": case("BartForConditionalGeneration", {**TEXT, "decoder_input_ids": IDS[:, :7]}, "Bart", ENCODER_DECODER),
    "Whisper": case(
        "WhisperForConditionalGeneration",
        {"input_features": SOUND, "decoder_input_ids": IDS[:, :7]},
        "Whisper",
        {**ENCODER_DECODER, "num_mel_bins": 20, "max_source_positions": 32, "decoder_start_token_id": 1},
    ),
    "CLIP": case(
        "CLIPModel",
        {**TEXT, "pixel_values": IMAGES},
        "CLIP",
        {
            "text_config": {**WIDTHS, **VOCABULARY},
            "vision_config": {**WIDTHS, **PIXELS},
            "projection_dim": 32,
        },
    ),
}


def double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def proof_error(model: nn.Module, inputs: Mapping[str, Tensor], groups: tuple[ChannelGroup, ...]) -> float:
    """Return by how much a permutation of all free groups changes the outputs."""
    model = randomise(copy.deepcopy(model).double()).eval()
    given = {name: double(value) for name, value in inputs.items()}
    with torch.no_grad():
        before = list(tensors_in(model(**given)))
        permute_channels(model, [group for group in groups if not group.frozen])
        return relative_error(tensors_in(model(**given)), before)


def prunable(model: nn.Module, groups: tuple[ChannelGroup, ...]) -> float:
    """Return the share of the parameters that belong to a channel of a free group."""
    tensors = {name: list(tensor.shape) for name, tensor in model.named_parameters()}
    total, fixed = sum(map(prod, tensors.values())), copy.deepcopy(tensors)
    for group in groups:
        for member in group.members:
            if not group.frozen and member.tensor in fixed:
                fixed[member.tensor][member.dim] -= member.positions.numel()
    return 1 - sum(map(prod, fixed.values())) / total


def row(name: str) -> list[str]:
    """Read, prove and cut one model."""
    build, inputs = MODELS[name]
    model = build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.process_time()
        groups = find_groups(model, dict(inputs))
        reading = time.process_time() - start
        error, share = proof_error(build(), inputs, groups), prunable(model, groups)
        start = time.process_time()
        record = prune(model, dict(inputs), pruning_ratio=0.5)
        cutting = time.process_time() - start
    sum(part.sum() for part in tensors_in(model.train()(**inputs))).backward()
    refused = sorted({reason for reason in record.held_back.values() if not reason.startswith("frozen")})
    for note in (*refused, *dict.fromkeys(str(warning.message) for warning in caught)):
        Console(stderr=True).print(f"{name}: {note}", style="yellow")
    return [
        name,
        f"{sum(tensor.numel() for tensor in named_tensors(build()).values()):,}",
        f"{sum(not group.frozen for group in groups)} / {len(groups)}",
        f"{error:.0e}",
        f"{share:.0%}",
        f"{record.reached:.0%}",
        f"{record.params.removed:.0%}",
        f"{record.macs.removed:.0%}",
        f"{reading:.2f}",
        f"{cutting:.2f}",
    ]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    columns = "model, parameters, free / groups, proof error, prunable, channels gone, parameters gone, MACs gone"
    table = Table(*columns.split(", "), "reading [s]", "cutting [s]", title=f"transformers {transformers.__version__}")
    for name in sys.argv[1:] or MODELS:
        try:
            table.add_row(*row(name))
        except Exception as error:
            table.add_row(name, f"[red]{type(error).__name__}: {str(error)[:200]}")
    Console().print(table)


if __name__ == "__main__":
    main()
