"""Convolutions taken apart into two thinner ones, before channels are pruned."""

from lightning_prune.factorization.factorizing import factorize, lay_out
from lightning_prune.factorization.record import KINDS, Factorization, Kind

__all__ = ["KINDS", "Factorization", "Kind", "factorize", "lay_out"]
