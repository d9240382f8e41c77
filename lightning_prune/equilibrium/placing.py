"""Which norms get a block: in residual networks those that the paper chose, elsewhere all, or those that are named."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import Literal, TypeAlias

import torch
from torch import nn

from lightning_prune.errors import PruningError
from lightning_prune.graph import read
from lightning_prune.inputs import ExampleInputs
from lightning_prune.layers.norms import Equilibrated, activates, named_norms
from lightning_prune.steps import Run, Seen, Step, seen_in
from lightning_prune.tensors import tensors_of

Where: TypeAlias = Literal["auto", "all"] | Sequence[str]
"""The paper's places in a residual network, and all norms of others; all norms; or patterns of their names."""

log = logging.getLogger(__name__)

aten = torch.ops.aten

_VIEWS = (aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.permute, aten.transpose)
_ADDITIONS = (aten.add, aten.add_)


def check_where(where: object) -> None:
    """Refuse what says no place.

    Raises:
        ValueError: It is neither "auto", "all", nor patterns.
    """
    if where in ("auto", "all") or (isinstance(where, Sequence) and not isinstance(where, str) and len(where)):
        return
    raise ValueError(f"`where` is 'auto', 'all', or patterns of the norms' names as in ['*.bn2']; got {where!r}.")


def places(model: nn.Module, where: Where = "auto", example_inputs: ExampleInputs | None = None) -> list[str]:
    """Name the norms that a block goes behind.

    Shao et al. 2020 put it behind the stem's norm and behind the last norm of every residual block, before the sum,
    but for the last stage, where maps are smallest. "auto" finds these by a run on tensors without memory; a network
    without such norms gets a block behind each norm.

    Args:
        model: Any module.
        where: "auto", "all", or patterns of names (`fnmatch` style).
        example_inputs: What "auto" runs the model with; see `find_groups` for the forms.

    Returns:
        The names, in order.

    Raises:
        PruningError: The model has no norms, has blocks already, or "auto" has no example inputs.
        ValueError: `where` is none of the three, or a pattern matches no norm.
    """
    check_where(where)
    norms = named_norms(model)
    there = [name for name, norm in norms.items() if isinstance(norm, Equilibrated)]
    if there:
        raise PruningError(
            f"{type(model).__name__} has equilibrium blocks already, at {_some(there)}. Go on with them, or take them "
            "off first: lightning_prune.equilibrium.remove(model)."
        )
    inside = [name for name, norm in norms.items() if activates(norm)]
    if inside:
        log.info("%s apply an activation themselves: no block fits between.", _some(inside))
        norms = {name: norm for name, norm in norms.items() if name not in inside}
    if not norms:
        raise PruningError(
            f"{type(model).__name__} has no norms for an equilibrium block to stand behind: it needs BatchNorm, "
            "GroupNorm, LayerNorm, InstanceNorm or RMSNorm layers that do not apply an activation themselves. Layers "
            "that are made in `configure_model`, or lazy ones, come later: call "
            "lightning_prune.equilibrium.equilibrate(model) once they are there."
        )
    if where == "all":
        return list(norms)
    if where == "auto":
        if example_inputs is None:
            raise PruningError(
                "where='auto' looks at a run of the network. Set `example_input_array`, or say where='all' or name "
                "the norms: where=['*.bn2']."
            )
        return _papers(model, norms, example_inputs) or list(norms)
    for pattern in where:
        if not any(fnmatchcase(name, pattern) for name in norms):
            raise ValueError(f"The pattern {pattern!r} in `where` matches none of the norms {_some(list(norms))}.")
    return [name for name in norms if any(fnmatchcase(name, pattern) for pattern in where)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _papers(model: nn.Module, norms: Mapping[str, nn.Module], example_inputs: ExampleInputs) -> list[str]:
    """Name the stem's norm and the last one of each residual branch, but for the last stage."""
    run = next(iter(read(model, example_inputs).runs.values()))
    owners = {tensor: name for name, norm in norms.items() for tensor in tensors_of({name: norm})}
    found, sizes, stem = [], [], None
    made: dict[int, tuple[str, int]] = {}
    for step, depth in _with_depth(run):
        name = next((owners[seen.origin] for seen in seen_in(step.args) if seen.origin in owners), None)
        reads = [made[seen.origin] for seen in seen_in(step.args) if seen.origin in made]
        if name is not None:
            stem = stem or name
            made[step.results[0]] = name, depth
        elif step.op.overloadpacket in _VIEWS and reads:
            made[step.results[0]] = reads[0]
        elif step.op.overloadpacket in _ADDITIONS and reads and _is_of_two(step):
            last, deep = max(reads, key=lambda read: read[1])
            if deep == depth:  # else it is the shortcut's, as where norms are before the branches or behind the sums
                found.append(last)
                sizes.append(prod(step.outputs[0][0][2:]))
    if not found:
        return []
    early = [name for name, size in zip(found, sizes, strict=True) if size > min(sizes)] or found
    return list(dict.fromkeys([*filter(None, [stem]), *early]))


def _with_depth(run: Run) -> list[tuple[Step, int]]:
    """Return each step with the number of contractions on the longest way to it."""
    depths: dict[object, int] = {}
    found = []
    for step in run.steps:
        before = max((depths.get(seen.origin, 0) for seen in seen_in((*step.args, *step.kwargs.values()))), default=0)
        depth = before + (step.work is not None)
        depths.update(dict.fromkeys(step.results, depth))
        found.append((step, depth))
    return found


def _is_of_two(step: Step) -> bool:
    """Tell whether a sum is of two tensors that the run has made, of one shape."""
    parts = [value for value in step.args if isinstance(value, Seen) and isinstance(value.origin, int)]
    return len(parts) == 2 and len(set(step.inputs[:2])) == 1
