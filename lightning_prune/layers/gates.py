"""All gates of a network: put on and taken off, found, cut along with the network, packed and read back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from typing_extensions import override

from lightning_prune.chance import random_state_kept
from lightning_prune.errors import HistoryError, PruningError
from lightning_prune.layers.bernoulli import Bernoulli
from lightning_prune.layers.gate import Gate
from lightning_prune.layers.gated import (
    GATED,
    READING,
    Reading,
    convolution_groups,
    gate_input,
    input_dim,
    stay_in_sight,
    weight_name,
)
from lightning_prune.layers.hard_concrete import HardConcrete
from lightning_prune.tensors import named_modules, named_tensors, unwrapped
from lightning_prune.types import Kept

KEY = "pruning_gates"
"""Under this name the gates are a child of the network, and their layout lies in a checkpoint."""

_ASIDE = "_pruning_gates_aside"
_NESTS = "_pruning_gates_nests"
_KINDS: Mapping[str, type[Gate]] = {"hard_concrete": HardConcrete, "bernoulli": Bernoulli}
_PLAIN = {gated: plain for plain, gated in GATED.items()}


class Gates(nn.Module):
    """The gates of a network, and who reads through them.

    Args:
        gates: Name -> gate.
        readings: Name of a layer -> what the gates let through to it.
        per_example: Whether each example of a batch has a sample of its own.
    """

    def __init__(
        self, gates: Mapping[str, Gate], readings: Mapping[str, Reading], *, per_example: bool = False
    ) -> None:
        super().__init__()
        self.gates = nn.ModuleDict({_key(name): gate for name, gate in gates.items()})
        self.readings = nn.ModuleDict({_key(name): reading for name, reading in readings.items()})
        self.per_example = per_example

    @override
    def forward(self, x: Any) -> Any:
        """Hand on what comes: a `Sequential` takes all of its children for layers."""
        return x

    def named(self) -> dict[str, Gate]:
        """Return the gates by name."""
        return {_name(key): gate for key, gate in self.gates.items() if isinstance(gate, Gate)}

    def read_by(self) -> dict[str, Reading]:
        """Return the readings by the names of the layers."""
        return {_name(key): reading for key, reading in self.readings.items() if isinstance(reading, Reading)}

    def draw(self, generator: torch.Generator, examples: int | None = None) -> None:
        """Draw a new sample of all gates.

        Args:
            generator: On the CPU; the same one gives the same sample on every device.
            examples: The examples of the batch; asked only where each has a sample of its own.
        """
        for gate in self.named().values():
            gate.draw(generator, examples if self.per_example else None)

    def kept(self, model: nn.Module, kept: Kept) -> Kept:
        """Return what stays of the gates' own tensors in a cut of their network.

        Args:
            model: The network, before the cut.
            kept: What stays of its tensors.

        Returns:
            Name of a tensor in the network -> dimension -> positions.

        Raises:
            PruningError: Readers of the same gate keep different channels, as with `trunks="selected"`.
        """
        names = {id(tensor): name for name, tensor in named_tensors(model).items()}
        layers = named_modules(model)
        found: dict[str, Mapping[int, Tensor]] = {}
        left: dict[Gate, Tensor] = {}
        for name, reading in self.read_by().items():
            weight = getattr(layers[name], weight_name(layers[name]))
            dims = kept.get(names[id(weight)], {})
            inputs = _of_all_parts(layers[name], weight.shape, dims)
            if inputs is not None:
                own = () if reading.inputs is None else self._tensors(reading.inputs)
                found.update({tensor: {0: inputs} for tensor in own})
            for gate, channels in _kept_channels(reading, inputs):
                if not torch.equal(left.setdefault(gate, channels), channels):
                    raise PruningError(
                        f"{name} would keep other channels than the layers that read the same gates. Take the gates "
                        'off before (`lightning_prune.gates.fold`), or cut with trunks="whole".'
                    )
            if dims and reading.weights is not None:
                found.update(dict.fromkeys(self._tensors(reading.weights), dims))
        for gate, channels in left.items():
            if len(channels) < gate.log_alpha.numel():
                found.update({tensor: {0: channels} for tensor in self._tensors(gate)})
        return {f"{KEY}.{name}": dims for name, dims in found.items()}

    def check_parted(self, names: Iterable[str]) -> None:
        """See that no layer that reads through gates is to pick its channels by itself.

        Args:
            names: The modules that a cut puts a `ChannelSelect` before.

        Raises:
            PruningError: One of them reads through gates.
        """
        both = self.read_by().keys() & set(names)
        if both:
            raise PruningError(
                f"{min(both)} reads through gates, and a `ChannelSelect` would pick its channels. Take the gates off "
                'before (`lightning_prune.gates.fold`), or cut with trunks="whole".'
            )

    def _tensors(self, gate: Gate) -> list[str]:
        """Name the tensors of a gate that have an entry for each of its places."""
        key = next(key for key, other in self.gates.items() if other is gate)
        saved = gate.state_dict(keep_vars=True)
        return [f"gates.{key}.{name}" for name, value in saved.items() if value.shape == gate.log_alpha.shape]

    def settle(self, model: nn.Module, kept: Kept, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[], None]:
        """Let samples and numbering follow a cut that has been done; return what takes it back.

        Args:
            model: The network, after the cut.
            kept: What has stayed of its tensors.
            shapes: The shapes that these had.
        """
        names = {id(tensor): name for name, tensor in named_tensors(model).items()}
        layers = named_modules(model)
        noise = {gate: gate.noise for gate in self.named().values()}
        indices = {reading: reading.index for reading in self.read_by().values()}
        for gate in noise:
            gate.noise = torch.zeros_like(gate.log_alpha.detach())
        for layer, reading in self.read_by().items():
            weight = names[id(getattr(layers[layer], weight_name(layers[layer])))]
            reading.renumber(_of_all_parts(layers[layer], shapes.get(weight, ()), kept.get(weight, {})))

        def undo() -> None:
            for gate, before in noise.items():
                gate.noise = before
            for reading, index in indices.items():
                reading.restore(index)

        return undo


def gates_of(model: nn.Module) -> Gates | None:
    """Return the gates of a model, also while it is `ungated`; None where it has none."""
    model = unwrapped(model)
    found = model._modules.get(KEY) or model.__dict__.get(_ASIDE)
    return found if isinstance(found, Gates) else None


def attach(model: nn.Module, gates: Gates) -> None:
    """Put gates on a model.

    Layers whose weight can be multiplied become their gated twins; of all others, and with a sample for each example,
    the input is multiplied, by a forward pre-hook. No name and no parameter of the model changes. A
    `TransformerEncoder` packs no padded sequences meanwhile: it does so for a fused kernel that passes layers by.

    Raises:
        PruningError: It has gates already.
    """
    model = unwrapped(model)
    if gates_of(model) is not None:
        raise PruningError("The model is gated already. Let one callback gate it, or close the gates first.")
    layers = named_modules(model)
    model.add_module(KEY, gates)
    for layer in layers.values():
        if isinstance(layer, nn.TransformerEncoder):
            layer.__dict__[_NESTS], layer.use_nested_tensor = layer.use_nested_tensor, False
    for name, reading in gates.read_by().items():
        layer = layers[name]
        layer.__dict__[READING] = reading
        if type(layer) in GATED and not gates.per_example:
            layer.__class__ = GATED[type(layer)]
            layer.register_forward_pre_hook(stay_in_sight)
        else:
            layer.register_forward_pre_hook(gate_input, with_kwargs=True)


def detach(model: nn.Module) -> Gates | None:
    """Take the gates off a model, without a change of its weights, and return them."""
    model = unwrapped(model)
    gates = model._modules.get(KEY)
    if not isinstance(gates, Gates):
        return None
    del model._modules[KEY]
    for layer in named_modules(model).values():
        if READING in layer.__dict__:
            del layer.__dict__[READING]
            if type(layer) in _PLAIN:
                layer.__class__ = _PLAIN[type(layer)]
            _take_off_hooks(layer)
        if _NESTS in layer.__dict__:
            layer.use_nested_tensor = layer.__dict__.pop(_NESTS)
    return gates


def _take_off_hooks(layer: nn.Module) -> None:
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook in (stay_in_sight, gate_input):
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


def exchange(model: nn.Module, gates: Gates | None) -> Callable[[], None]:
    """Put gates on a model in place of those that it has, or none; return what takes it back."""
    before = detach(model)
    if gates is not None:
        weight = next(unwrapped(model).parameters(), None)
        attach(model, gates if weight is None else gates.to(weight.device))

    def undo() -> None:
        detach(model)
        if before is not None:
            attach(model, before)

    return undo


def settle(model: nn.Module, kept: Kept, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[], None]:
    """Let the gates of a model follow a cut that has been done (see `Gates.settle`); return what takes it back."""
    gates = gates_of(model)
    return gates.settle(unwrapped(model), kept, shapes) if gates is not None else lambda: None


@contextmanager
def ungated(model: nn.Module) -> Iterator[None]:
    """Take the gates off for a while; they are still found by `gates_of`."""
    model = unwrapped(model)
    gates = detach(model)
    if gates is None:
        yield
        return
    model.__dict__[_ASIDE] = gates
    try:
        yield
    finally:
        del model.__dict__[_ASIDE]
        attach(model, gates)


def pack(gates: Gates | None) -> dict[str, Any]:
    """Write down which gates there are, in plain data and tensors; their values lie among the model's weights."""
    if gates is None:
        return {}
    names = {gate: name for name, gate in gates.named().items()}
    kinds = {kind: key for key, kind in _KINDS.items()}
    return {
        "gates": {
            name: {"kind": kinds[type(gate)], "shape": list(gate.log_alpha.shape), **gate.settings}
            for gate, name in names.items()
        },
        "readings": {
            layer: {
                "channels": [names[gate] for gate in reading.channels],
                "index": reading.index.cpu(),
                "inputs": names.get(reading.inputs),  # type: ignore[arg-type]
                "weights": names.get(reading.weights),  # type: ignore[arg-type]
            }
            for layer, reading in gates.read_by().items()
        },
        "per_example": gates.per_example,
    }


def unpack(packed: object, model: nn.Module) -> Gates | None:
    """Make the gates that `pack` has written down; every part is looked at.

    Args:
        packed: What a checkpoint holds.
        model: The model that they are for, in the shapes that it had then; it is not changed.

    Raises:
        HistoryError: It is something else, or does not fit the model.
    """
    if packed == {}:
        return None
    try:
        return _unpacked(packed, named_modules(unwrapped(model)))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise HistoryError(
            f"The gates do not fit the model, or are damaged ({type(error).__name__}: {str(error)[:200]}). Build the "
            "model with the arguments that it was trained with, and load a checkpoint of that training."
        ) from error


def _unpacked(packed: Any, layers: Mapping[str, nn.Module]) -> Gates:
    if type(packed) is not dict or packed.keys() != {"gates", "readings", "per_example"}:
        raise TypeError("no gates with readings")
    if type(packed["per_example"]) is not bool:
        raise TypeError("nothing says whether each example has a sample")
    most = max((tensor.numel() for layer in layers.values() for tensor in layer.parameters(False)), default=0)
    gates = {str(name): _gate(most, **plain) for name, plain in packed["gates"].items()}
    readings = {}
    for name, plain in packed["readings"].items():
        channels = [gates[gate] for gate in plain["channels"]]
        own = [None if plain[key] is None else gates[plain[key]] for key in ("inputs", "weights")]
        readings[name] = Reading(channels, _checked_index(plain["index"], channels), *own)
        _check_fit(name, readings[name], layers[name])
    return Gates(gates, readings, per_example=packed["per_example"])


def _gate(most: int, kind: str, shape: Sequence[int], **settings: Any) -> Gate:
    if prod(shape) > most:
        raise ValueError(f"a gate has the shape {shape}, and no weight is as large")
    with random_state_kept():
        return _KINDS[kind](*shape, **settings)


def _checked_index(index: object, channels: Sequence[Gate]) -> Tensor:
    count = sum(gate.log_alpha.numel() for gate in channels)
    if any(len(gate.shape) != 1 for gate in channels):
        raise ValueError("gates of channels stand in no row")
    if type(index) is not Tensor or index.dtype is not torch.int64 or index.dim() != 1:
        raise TypeError("an index is no row of whole numbers")
    if len(index) and not (int(index.min()) >= 0 and int(index.max()) <= count):
        raise ValueError(f"an index points beyond {count} gates")
    return index


def _check_fit(name: str, reading: Reading, layer: nn.Module) -> None:
    """See that a reading is one of a layer's.

    Raises:
        ValueError: It has other sizes.
        TypeError: No input of this layer can be gated.
    """
    if not isinstance(layer, (nn.Linear, _ConvNd, nn.MultiheadAttention)):
        raise TypeError(f"{name!r} is a {type(layer).__name__}, which reads no gated channels")
    weight = getattr(layer, weight_name(layer))
    width = weight.shape[input_dim(layer)] * convolution_groups(layer)
    if len(reading.index) != width:
        raise ValueError(f"there are gates for {len(reading.index)} inputs of {name!r}, which reads {width}")
    for gate, shape in ((reading.inputs, (width,)), (reading.weights, tuple(weight.shape))):
        if gate is not None and tuple(gate.log_alpha.shape) != shape:
            raise ValueError(f"a gate of {name!r} has the shape {tuple(gate.log_alpha.shape)} in place of {shape}")


def _kept_channels(reading: Reading, inputs: Tensor | None) -> Iterator[tuple[Gate, Tensor]]:
    """Yield which channels stay of each gate that a layer reads through, from what stays of its input."""
    index = reading.index.cpu()
    left = (index if inputs is None else index[inputs]).unique()
    start = 1
    for gate in reading.channels:
        size = gate.log_alpha.numel()
        yield gate, left[(left >= start) & (left < start + size)] - start
        start += size


def _of_all_parts(layer: nn.Module, shape: Sequence[int], dims: Mapping[int, Tensor]) -> Tensor | None:
    """Return the channels of a layer's input that stay of a weight of some shape; None for all."""
    inputs = dims.get(input_dim(layer))
    if inputs is None:
        return None
    width = shape[input_dim(layer)]
    return torch.cat([inputs.cpu() + part * width for part in range(convolution_groups(layer))])


def _key(name: str) -> str:
    """Write a name as the key of a `ModuleDict`: without dots, not empty, and no attribute that it has."""
    key = name.replace("~", "~0").replace("/", "~1").replace(".", "/")
    return key if key and not hasattr(nn.ModuleDict(), key) else f"{key}/"


def _name(key: str) -> str:
    return key.removesuffix("/").replace("/", ".").replace("~1", "/").replace("~0", "~")
