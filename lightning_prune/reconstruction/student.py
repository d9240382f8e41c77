"""The network as earlier steps of a reconstruction have left it, beside the original."""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.cut import Cut, prepare
from lightning_prune.fate import channel_roots
from lightning_prune.graph import Graph
from lightning_prune.moments import Fit
from lightning_prune.reconstruction.sites import Site, Sites
from lightning_prune.sampling import Layer, groups_of, matrix_of, taps_of, weight_from
from lightning_prune.steps import Run
from lightning_prune.surgery import apply
from lightning_prune.tensors import named_tensors
from lightning_prune.types import Attributes, PruningPlan
from lightning_prune.verification import verify

aten = torch.ops.aten


class Student:
    """A copy of a network from which channels go, and whose layers are given new weights.

    A channel goes by zeros in the weights of all that read it. Where that is not the same as without it, since a norm
    across channels lies between, or somebody reads it who cannot be told not to, it is cut.

    Args:
        model: The network; it is not changed.
        graph: A reading of it.
        sites: The layers to be refitted.
        mended: Attributes that the cut of the whole plan needed mending of.
    """

    def __init__(self, model: nn.Module, graph: Graph, sites: Sites, mended: Attributes) -> None:
        self._graph, self._sites, self._mended = graph, sites, mended
        self._whole = twin(model).eval()
        self._tensors = named_tensors(self._whole)
        self._before = {name: self._tensors[name].detach().clone() for name in self._changing()}
        self._removed: dict[str, Tensor] = {}
        self._really_cut: dict[str, Tensor] = {}
        self._waiting: dict[str, Tensor] = {}
        self._cut = Cut()
        self._across = normed_across(graph)
        self.network = self._whole

    def _changing(self) -> list[str]:
        parts = [f"{name}.{part}" for name in self._sites.all for part in ("weight", "bias")]
        means = [site.norm.running_mean for site in self._sites.all.values() if site.norm is not None]
        return [name for name in dict.fromkeys((*parts, *means)) if name in self._tensors]

    def layer(self, name: str) -> Layer:
        """Return a layer of the network as it is now."""
        layer: Layer = self.network.get_submodule(name)  # type: ignore[assignment]
        return layer

    def positions(self, site: Site, group: str) -> Tensor:
        """Return where the channels of a group that is still whole lie along a layer's input now."""
        kept = self._kept(site)[1]
        return site.reads[group] if kept is None else torch.searchsorted(kept, site.reads[group])

    def gone(self, site: Site) -> Tensor:
        """Tell which columns of a layer as it is now belong to channels that have gone: (g, p)."""
        layer, kept = self.layer(site.name), self._kept(site)[1]
        gone = torch.zeros(channels_of(self._whole.get_submodule(site.name)), dtype=torch.bool)
        for group in site.reads.keys() & self._removed.keys():
            gone[site.reads[group][self._removed[group]].flatten()] = True
        gone = gone if kept is None else gone[kept]
        return gone.repeat_interleave(taps_of(layer)).view(groups_of(layer), -1)

    def kept_outputs(self, site: Site, values: Tensor) -> Tensor:
        """Return what is left of rows of a layer's outputs, (rows, g, o), in the layer as it is now.

        Args:
            site: The layer.
            values: Of the original, or of a network that has been cut there already.
        """
        kept, layer = self._kept(site)[0], self.layer(site.name)
        if kept is None or values[:1].numel() == len(kept):
            return values
        left: Tensor = values.flatten(1)[:, kept.to(values.device)].unflatten(1, (groups_of(layer), -1))
        return left

    def scale(self, site: Site) -> Tensor | None:
        """Return what the norm behind a layer multiplies its outputs by, (g, o); None without a norm."""
        if site.norm is None:
            return None
        return site.norm.scale(named_tensors(self.network)).view(groups_of(self.layer(site.name)), -1)

    def drop(self, group: str, removed: Tensor) -> bool:
        """Take channels of a group away; tell whether other layers feel that in more than the channels missing."""
        self._removed[group] = removed
        readers = [self._sites.all[name] for name in self._sites.of_group.get(group, ())]
        for site in readers:
            self._silence(site, site.reads[group][removed].flatten())
        if readers and group not in self._across:
            return False
        self._cut_for_real(group)
        return True

    def _silence(self, site: Site, positions: Tensor) -> None:
        """Let a layer read no more of some positions of its input."""
        layer = self._whole.get_submodule(site.name)
        weight = self._tensors[f"{site.name}.weight"]
        dim = 0 if isinstance(layer, _ConvTransposeNd) else 1
        with torch.no_grad():
            weight.index_fill_(dim, (positions % weight.shape[dim]).unique().to(weight.device), 0)
        if self.network is not self._whole:
            self._build()

    def _cut_for_real(self, group: str) -> None:
        """Cut a group, with those that could not be cut without it; what still cannot, waits for others."""
        self._waiting = {**self._waiting, group: self._removed[group]}
        plan = PruningPlan({**self._really_cut, **self._waiting})
        trial = verify(self._whole, self._graph, plan, prepare(self._whole, self._graph, plan), self._mended)
        if not trial.refused:
            self._really_cut, self._waiting = dict(plan.removed), {}
            self._cut = trial.cut
            self._build()

    @property
    def uncut(self) -> tuple[str, ...]:
        """The groups that should have been cut and are whole: they go only together with others."""
        return tuple(self._waiting)

    def _build(self) -> None:
        self.network = twin(self._whole)
        apply(self.network, self._cut)

    def write(self, site: Site, fit: Fit) -> None:
        """Give a layer the weights that were fitted to the columns that are left."""
        layer, stay = self.layer(site.name), ~self.gone(site)
        matrix = torch.zeros_like(matrix_of(layer), dtype=torch.float64)
        for part, new, left in zip(matrix, fit.matrix, stay, strict=True):
            part[:, left.to(part.device)] = new.to(part.device)
        weight = weight_from(layer, matrix)
        self._put(f"{site.name}.weight", weight)
        if fit.intercept is not None:
            offset = fit.intercept.flatten()
            if layer.bias is not None:
                self._put(f"{site.name}.bias", offset)
            elif site.norm is not None:
                mean = named_tensors(self.network)[site.norm.running_mean]
                self._put(site.norm.running_mean, mean.detach() - offset.to(mean))
        if self.network is not self._whole:
            self._build()

    def _put(self, name: str, values: Tensor) -> None:
        """Write into a tensor of the whole network what one of the network as it is now is to be."""
        tensor = self._tensors[name]
        kept = self._cut.kept.get(name, {})
        places = tuple(
            kept.get(dim, torch.arange(size))
            .to(tensor.device)
            .view([-1 if at == dim else 1 for at in range(tensor.dim())])
            for dim, size in enumerate(tensor.shape)
        )
        with torch.no_grad():
            tensor[places] = values.to(tensor)

    def offsets(self, changed: Collection[str]) -> dict[str, Tensor]:
        """Return what has been added to tensors of the original, for some names of layers."""
        names = [f"{name}.{part}" for name in changed for part in ("weight", "bias")]
        norms = [self._sites.all[name].norm for name in changed]
        names += [norm.running_mean for norm in norms if norm is not None]
        return {
            name: self._tensors[name].detach().double() - self._before[name].double()
            for name in dict.fromkeys(names)
            if name in self._before
        }

    def _kept(self, site: Site) -> tuple[Tensor | None, Tensor | None]:
        """Return the outputs and the channels of the input that a layer has kept in a real cut; None is all."""
        layer = self._whole.get_submodule(site.name)
        kept, shape = self._cut.kept.get(f"{site.name}.weight", {}), self._tensors[f"{site.name}.weight"].shape
        groups = layer.groups if isinstance(layer, _ConvNd) else 1
        first, within = kept.get(0), kept.get(1)
        if first is None and within is None:
            return None, None
        parts = torch.arange(groups) if first is None else (first // (shape[0] // groups)).unique()
        within = torch.arange(shape[1]) if within is None else within
        second = (parts.unsqueeze(1) * shape[1] + within).flatten()
        return (second, first) if isinstance(layer, _ConvTransposeNd) else (first, second)


def channels_of(layer: nn.Module) -> int:
    """Return how many channels a layer reads."""
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)  # type: ignore[arg-type]


def twin(model: nn.Module) -> nn.Module:
    """Return a copy that shares what copies go without, such as the Trainer of a LightningModule."""
    copy = deepcopy(model)
    for own, other in zip(model.modules(), copy.modules(), strict=True):
        missing = {key: value for key, value in vars(own).items() if value is not None and vars(other).get(key) is None}
        vars(other).update(missing)
    return copy


def normed_across(graph: Graph) -> set[str]:
    """Name the groups that a norm across channels lies behind: without a channel its statistics are others."""
    run: Run = next(iter(graph.runs.values()))
    seen: set[int] = set()
    for step in run.steps:
        if step.op.overloadpacket in (aten.native_layer_norm, aten.native_group_norm):
            for labels in step.outputs[0][1]:
                if labels is not None:
                    inside = labels[labels < len(graph.roots)]
                    seen.update(graph.roots[inside].tolist())
    return {group.name for group in graph.groups if seen.intersection(channel_roots(graph, group).tolist())}
