"""Channel pruning with reconstruction: group after group, from shallow to deep, one choice and one refit at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TypeAlias

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from lightning_prune.cut import Offsets
from lightning_prune.errors import PruningError
from lightning_prune.graph import Graph
from lightning_prune.inputs import ExampleInputs, Inputs, bind, examples_in
from lightning_prune.moments import Moments, Responses, joined
from lightning_prune.reconstruction.observer import See
from lightning_prune.reconstruction.resuming import Astray, Resuming
from lightning_prune.reconstruction.settings import Reconstruction
from lightning_prune.reconstruction.sites import Site, Sites, find_sites
from lightning_prune.reconstruction.student import Student, channels_of, twin
from lightning_prune.sampling import Layer, draw_points, groups_of, inputs_at, matrix_of, outputs_at, taps_of
from lightning_prune.types import Attributes, PruningPlan

log = logging.getLogger(__name__)

AllReduce: TypeAlias = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""

Choose: TypeAlias = Callable[[Responses, int], Tensor]
"""Takes what the channels of a group contribute and how many stay; returns the indices of those, ascending."""

_STRIDE = 1_000_003
"""Between the seeds of one reconstruction and the next."""

_LEAST_SCALE = 1e-3
"""A norm that multiplies a channel by less passes on nothing that is worth making up for."""


@dataclass(frozen=True)
class Refit:
    """How well a layer reproduces what it returned in the original network, at the sampled points.

    Attributes:
        layer: Its name.
        channels: Channels of its input that are left; of a depthwise layer all, as its own go with its outputs.
        of: Channels of its input before.
        sliced: ||Y - Y'||_F / ||Y||_F with the weights that it had, as far as they are left.
        error: The same after the refit.
    """

    layer: str
    channels: int
    of: int
    sliced: float
    error: float

    def __str__(self) -> str:
        return f"{self.layer}: {self.channels} of {self.of} channels, error {self.error:.3f} (sliced {self.sliced:.3f})"


@dataclass(frozen=True)
class Rebuilt:
    """What a reconstruction has worked out.

    Attributes:
        plan: What goes.
        offsets: What is added to the tensors before they are cut.
        layers: Names of the layers that were refitted.
        refits: How well each reproduces its output, in order.
        nbytes: The most memory that moments have taken.
        kept: The most memory that was taken, beside, by what is kept of one pass over the images for the next.
    """

    plan: PruningPlan
    offsets: Offsets
    refits: tuple[Refit, ...] = ()
    nbytes: int = 0
    kept: int = 0

    @property
    def layers(self) -> set[str]:
        """The names of the layers that were refitted."""
        return {refit.layer for refit in self.refits}


def rebuild(
    model: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    batches: Sequence[ExampleInputs],
    settings: Reconstruction,
    *,
    choose: Choose | None = None,
    mended: Attributes | None = None,
    all_reduce: AllReduce | None = None,
) -> Rebuilt:
    """Refit the layers that read what a plan leaves, each to the output that it had; the model is not changed.

    Args:
        model: The model, ungated.
        graph: A reading of it.
        plan: What goes.
        batches: What forward takes, the same in each pass.
        settings: How it is done.
        choose: Chooses which channels stay of a group whose readers are known; None leaves it to the plan.
        mended: Attributes that the cut needed mending of.
        all_reduce: Sums over processes, each of which has batches of its own.

    Returns:
        The plan as it was chosen, with as many channels of each group, and the new weights as offsets to the old.

    Raises:
        PruningError: There is no batch, a layer reads or returns NaN, there are fewer rows than a layer has columns, or
            a layer's class changes the weight or the result in its forward.
    """
    return _Rebuilding(model, graph, plan, batches, settings, choose, mended or {}, all_reduce).run()


class _Rebuilding:
    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        plan: PruningPlan,
        batches: Sequence[ExampleInputs],
        settings: Reconstruction,
        choose: Choose | None,
        mended: Attributes,
        all_reduce: AllReduce | None,
    ) -> None:
        self._plan, self._batches, self._settings = plan, batches, settings
        self._choose, self._all_reduce = choose, all_reduce
        self._sites: Sites = find_sites(model, graph, [name for name, gone in plan.removed.items() if len(gone)])
        self._sizes = {group.name: group.size for group in graph.groups}
        self._original = Student(model, graph, self._sites, mended).network
        self._student = Student(model, graph, self._sites, mended)
        self._removed: dict[str, Tensor] = {}
        self._before: dict[str, nn.Module] = {}
        self._calls: dict[str, int] = {}
        self._nbytes = 0
        self._resuming = Resuming(self._sites.all)

    def run(self) -> Rebuilt:
        for group, removed in self._plan.removed.items():
            if len(removed) and group not in self._sites.of_group:  # nobody knows who reads it first
                self._drop(group, removed)
        self._look_ahead()
        refits = []
        screen = Console(stderr=True)
        with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
            bar = progress.add_task("Reconstructing", total=len(self._calls))
            for name in self._calls:
                progress.update(bar, description=f"Reconstructing {name}")
                refits.append(self._refit(self._sites.all[name]))
                log.info("%s", refits[-1])
                progress.update(bar, advance=1)
        if self._student.uncut:
            log.warning(
                "layers were refitted as if %s were whole: such groups go only together with others, and the output is "
                "off by more than the errors tell. Put them in `ignore`.",
                ", ".join(self._student.uncut),
            )
        plan = PruningPlan({**self._plan.removed, **self._removed}, self._plan.held_back)
        offsets = Offsets(self._student.offsets(list(self._calls)))
        return Rebuilt(plan, offsets, tuple(refits), self._nbytes, self._resuming.nbytes)

    def _drop(self, group: str, removed: Tensor) -> bool:
        self._removed[group] = removed
        return self._student.drop(group, removed)

    def _look_ahead(self) -> None:
        """Find out in which order the layers are called, and whether there will be rows enough."""
        rows: dict[str, int] = {}

        def see(name: str, call: int, inputs: Tensor, output: Tensor, beside: Tensor | None) -> None:
            layer = self._original.get_submodule(name)
            self._calls[name] = call + 1
            points = draw_points(layer, inputs, self._settings.points, torch.Generator())  # type: ignore[arg-type]
            rows[name] = rows.get(name, 0) + points.numel()

        if self._batches:
            self._resuming.record(self._original, bind(self._original, self._batches[0]), see)
        examples = torch.tensor(float(sum(map(examples_in, self._batches))), dtype=torch.float64)
        if self._all_reduce is not None:
            examples = self._all_reduce(examples)
        if not examples:
            raise PruningError(
                "There was no batch to reconstruct with. Pass a few thousand images, or a loader that yields them."
            )
        share = float(examples) / max(examples_in(self._batches[0]), 1) if self._batches else 0.0
        for name in self._calls:
            self._check_rows(self._sites.all[name], int(rows[name] * share))

    def _check_rows(self, site: Site, rows: int) -> None:
        layer = self._student.layer(site.name)
        columns = matrix_of(layer).shape[2]
        goes = sum(
            len(self._plan.removed[group]) * positions.shape[1] * taps_of(layer)
            for group, positions in site.reads.items()
            if group not in self._removed
        )
        left = columns - (goes + int(self._student.gone(site).sum())) // groups_of(layer)
        if rows < left + 1 and not self._settings.ridge:
            raise PruningError(
                f"{site.name} keeps {left} columns (channels times taps), which takes as many rows and one more; there "
                f"are {rows}. Pass at least {ceil((left + 1) / max(rows, 1))} times the images, take more `points` "
                "of each where its output has them, or allow for a `ridge`, such as 0.1."
            )

    def _refit(self, site: Site) -> Refit:
        """Choose what stays of the groups that a layer is the first to read, and fit its weights anew."""
        coming = [group for group in site.reads if group not in self._removed]
        readers = dict.fromkeys((site.name, *(name for group in coming for name in self._sites.of_group[group])))
        student = self._student.network
        if self._settings.targets == "current":
            now = twin(student)
            self._resuming.follow(student, now)
            self._before.update({name: now for name in readers if name not in self._before})
        seen = self._moments(list(readers)) if coming and self._choose is not None else {}
        felt = [self._drop(group, self._going(group, seen)) for group in coming]
        student = self._followed(student)
        moments = self._moments([site.name])[site.name] if any(felt) or not seen else seen[site.name]
        refit = self._fitted(site, moments)
        self._followed(student)
        self._before.pop(site.name, None)
        self._resuming.forget(but=[self._original, self._student.network, *self._before.values()])
        return refit

    def _followed(self, student: nn.Module) -> nn.Module:
        """Return the student's network as it is now; what was kept of the one before may count for it."""
        if self._student.network is not student:
            self._resuming.follow(student, self._student.network)
        return self._student.network

    def _fitted(self, site: Site, moments: Moments) -> Refit:
        layer, gone = self._student.layer(site.name), self._student.gone(site)
        left = moments.without(gone) if gone.any() else moments
        matrix = torch.stack([part[:, ~out.to(part.device)] for part, out in zip(matrix_of(layer), gone, strict=True)])
        bias = None if layer.bias is None else layer.bias.detach().view(groups_of(layer), -1)
        has_place = bias is not None or site.norm is not None
        fit = left.refit(matrix, intercept=has_place, ridge=self._settings.ridge)
        sliced = left.error(matrix, bias)
        self._student.write(site, fit)
        channels = channels_of(self._original.get_submodule(site.name))
        less = sum(len(self._removed[group]) * positions.shape[1] for group, positions in site.reads.items())
        return Refit(site.name, channels - less, channels, sliced, fit.error)

    def _going(self, group: str, seen: Mapping[str, Moments]) -> Tensor:
        """Return the channels of a group that go: those of the plan, or by what they contribute to all who read it."""
        if self._choose is None:
            return self._plan.removed[group]
        parts: list[tuple[Responses, float]] = []
        for name in self._sites.of_group[group]:
            site, layer = self._sites.all[name], self._student.layer(name)
            found = seen[name].responses(matrix_of(layer), taps_of(layer), self._student.scale(site))
            parts.append((found.of(self._student.positions(site, group)), found.energy))
        total = joined(parts)
        stay = self._choose(total, self._sizes[group] - len(self._plan.removed[group]))
        goes = torch.ones(self._sizes[group], dtype=torch.bool)
        goes[stay] = False
        return torch.nonzero(goes).flatten()

    def _moments(self, names: Sequence[str]) -> dict[str, Moments]:
        """Run both networks over the batches, and sum up what some layers read and are to return."""
        try:
            return self._summed_up(names)
        except Astray:
            return self._summed_up(names)

    def _summed_up(self, names: Sequence[str]) -> dict[str, Moments]:
        found: dict[str, Moments] = {}
        originals = {name: self._before.get(name, self._original) for name in names}
        for number, batch in enumerate(self._batches):
            meeting = _Meeting(self, found, torch.Generator().manual_seed(self._settings.seed * _STRIDE + number))
            inputs = bind(self._original, batch)
            for network in {id(network): network for network in originals.values()}.values():
                there = [name for name in names if originals[name] is network]
                self._observe(network, inputs, number, meeting.see_target, there)
            self._observe(self._student.network, inputs, number, meeting.see_student, names)
        if self._all_reduce is not None:
            for name in names:
                found[name].reduce(self._all_reduce)
        self._nbytes = max(self._nbytes, sum(moments.nbytes for moments in found.values()))
        return found

    def _observe(self, network: nn.Module, inputs: Inputs, batch: int, see: See, names: Sequence[str]) -> None:
        summed = [name for name in names if self._sites.all[name].is_summed and self._settings.shortcuts]
        self._resuming.observe(network, inputs, batch, see, names, summed, sum(self._calls[name] for name in names))


class _Meeting:
    """Brings together what a layer returned in the original network and what it reads now, for one batch."""

    def __init__(self, rebuilding: _Rebuilding, found: dict[str, Moments], generator: torch.Generator) -> None:
        self._of, self._found, self._generator = rebuilding, found, generator
        self._points: dict[tuple[str, int], Tensor] = {}
        self._targets: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = {}

    def see_target(self, name: str, call: int, inputs: Tensor, output: Tensor, beside: Tensor | None) -> None:
        layer: Layer = self._of._original.get_submodule(name)  # type: ignore[assignment]
        points = draw_points(layer, inputs, self._of._settings.points, self._generator)
        self._points[name, call] = points
        self._targets[name, call] = (
            outputs_at(layer, output, points),
            None if beside is None else outputs_at(layer, beside, points),
        )

    def see_student(self, name: str, call: int, inputs: Tensor, output: Tensor, beside: Tensor | None) -> None:
        student, site = self._of._student, self._of._sites.all[name]
        layer, points = student.layer(name), self._points[name, call]
        x = inputs_at(layer, inputs, points)
        target, shortcut = (
            None if rows is None else student.kept_outputs(site, rows) for rows in self._targets.pop((name, call))
        )
        assert target is not None
        if shortcut is not None and beside is not None:
            lost = shortcut - outputs_at(layer, beside, points)
            target = target + lost * _through(student.scale(site)).to(lost)
        if not (x.isfinite().all() and target.isfinite().all()):
            raise PruningError(f"{name} reads or returns NaN or infinite values. Nothing was cut. Look at the inputs.")
        if name not in self._found:
            self._found[name] = Moments(x.shape[1], x.shape[2], target.shape[2], x.device)
        self._found[name].add(x, target)


def _through(scale: Tensor | None) -> Tensor:
    """Return what makes up, before a norm, for 1 behind it."""
    if scale is None:
        return torch.ones(())
    return torch.where(scale.abs() < _LEAST_SCALE, 0.0, 1 / scale)
