"""Blocks come behind the norms of a network, and go again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_prune.equilibrium.placing import Where, places
from lightning_prune.equilibrium.settings import Equilibrium
from lightning_prune.inputs import ExampleInputs
from lightning_prune.layers.norms import Equilibrated, named_norms


def equilibrate(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    where: Where = "auto",
    equilibrium: Equilibrium | None = None,
) -> list[str]:
    """Put Channel Equilibrium blocks behind the norms of a network, in place; do it before its optimizer is made.

    A norm "bn" becomes `Equilibrated`: its own tensors are called "bn.norm.weight" and so on from then on, those of
    the block "bn.equilibrium...". The norm's activation must come after it, and not inside of it.

    Args:
        model: Any module with norms.
        example_inputs: What where="auto" runs the model with; see `find_groups` for the forms.
        where: "auto" takes the places of Shao et al. 2020 in a residual network, and all norms of others; "all" takes
            all; patterns of names (`fnmatch` style) take those.
        equilibrium: What the blocks are like.

    Returns:
        The names of the norms.

    Raises:
        PruningError: The model has no norms, has blocks already, or "auto" has no example inputs.
        ValueError: A pattern matches no norm.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> equilibrate(model, where="all")
        ['1']
        >>> model[1].equilibrium
        ChannelEquilibrium(
          (decorrelation): BatchDecorrelation(1 x 8 channels, iterations=3)
          (reweighting): InstanceReweighting(
            (gate): Sequential(
              (0): Linear(in_features=8, out_features=4, bias=False)
              (1): LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
              (2): ReLU()
              (3): Linear(in_features=4, out_features=8, bias=False)
              (4): Sigmoid()
            )
          )
        )
    """
    names = places(model, where, example_inputs)
    put_behind(model, names, equilibrium or Equilibrium())
    return names


def put_behind(model: nn.Module, names: Sequence[str], equilibrium: Equilibrium) -> None:
    """Put a block behind each of these norms."""
    norms = named_norms(model)
    for name in names:
        norm = norms[name]
        exchange(model, norm, Equilibrated(norm, equilibrium.block(norm)).train(norm.training))


def blocks_of(model: nn.Module) -> dict[str, Equilibrated]:
    """Name the norms that have a block."""
    return {name: norm for name, norm in named_norms(model).items() if isinstance(norm, Equilibrated)}


def remove(model: nn.Module) -> list[str]:
    """Take all blocks off: the norms stand alone again, and what the blocks have learned is lost.

    Returns:
        The names of the norms.
    """
    found = blocks_of(model)
    for block in found.values():
        exchange(model, block, block.norm)
    return list(found)


def exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in all places of another."""
    for parent in list(model.modules()):
        if parent is not new:
            for child, module in list(parent._modules.items()):
                if module is old:
                    setattr(parent, child, new)
