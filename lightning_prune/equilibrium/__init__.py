"""Channel Equilibrium in a network: where its blocks go, how they come and go, and how they fold away."""

from lightning_prune.equilibrium.folding import Folded, fold
from lightning_prune.equilibrium.inserting import blocks_of, equilibrate, remove
from lightning_prune.equilibrium.placing import Where, places
from lightning_prune.equilibrium.settings import Branches, Equilibrium

__all__ = [
    "Branches",
    "Equilibrium",
    "Folded",
    "Where",
    "blocks_of",
    "equilibrate",
    "fold",
    "places",
    "remove",
]
