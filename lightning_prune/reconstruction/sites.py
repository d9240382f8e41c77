"""The layers that a cut lets be refitted: what each of them reads, and what lies behind it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_prune.behind import Behind, Norm
from lightning_prune.criteria.readers import readers_of
from lightning_prune.graph import Graph
from lightning_prune.sampling import is_product
from lightning_prune.tensors import named_modules, named_tensors


@dataclass(frozen=True)
class Site:
    """A layer to be refitted.

    Attributes:
        name: The layer's name.
        reads: Name of a group that is cut -> integer tensor (size, k): where its channels lie along the layer's input.
        norm: The BatchNorm behind it, if that alone reads its output.
        is_summed: Whether its output, or the norm's, goes into a sum.
    """

    name: str
    reads: Mapping[str, Tensor] = field(default_factory=dict)
    norm: Norm | None = None
    is_summed: bool = False


@dataclass(frozen=True)
class Sites:
    """The layers to be refitted, and who reads whom.

    Attributes:
        all: Layer name -> what is known of it.
        of_group: Group name -> the names of the layers that read it, where all of them can be refitted.
    """

    all: Mapping[str, Site]
    of_group: Mapping[str, tuple[str, ...]]


def find_sites(model: nn.Module, graph: Graph, groups: Collection[str]) -> Sites:
    """Find the layers that read some groups, and the depthwise convolutions that these go through.

    Left out is a layer whose weight is computed, or is another layer's, too.

    Args:
        model: The model.
        graph: A reading of it.
        groups: Names of the groups that will be cut.
    """
    modules, tensors = named_modules(model), named_tensors(model)
    own = {name for name, module in modules.items() if is_product(module) and f"{name}.weight" in tensors}
    own -= _sharing(modules)
    readers = {name: found for name, found in readers_of(model, graph).items() if name in groups}
    reads: dict[str, dict[str, Tensor]] = {}
    for group, found in readers.items():
        for reader in found:
            if reader.module in own:
                known = reads.setdefault(reader.module, {})
                known[group] = reader.positions
    through = {
        name
        for group in graph.groups
        if group.name in groups
        for member in group.members
        for name in [member.tensor.removesuffix(".weight")]
        if name in own and _is_depthwise(modules[name])
    }
    behind = Behind(next(iter(graph.runs.values())), tensors)
    every = {name: _site(name, reads.get(name, {}), behind) for name in (*reads, *sorted(through - reads.keys()))}
    of_group = {
        group: tuple(dict.fromkeys(reader.module for reader in found))
        for group, found in readers.items()
        if all(reader.module in own for reader in found)
    }
    return Sites(every, of_group)


def _sharing(modules: Mapping[str, nn.Module]) -> set[str]:
    """Name the modules whose weight another one has as well."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for part in module._parameters.values():
            if part is not None:
                owners.setdefault(id(part), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


def _site(name: str, reads: Mapping[str, Tensor], behind: Behind) -> Site:
    results = [step.results[0] for step in behind.products(f"{name}.weight")]
    norms = [behind.norm(result) for result in results]
    norm = norms[0] if len(norms) == 1 else None
    is_summed = len(results) == 1 and behind.is_summed(results[0] if norm is None else norm.result)
    return Site(name, reads, norm, is_summed)
