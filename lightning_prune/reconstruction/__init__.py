"""Least-squares reconstruction: after a cut, layers are refitted to return what they returned before."""

from lightning_prune.reconstruction.rebuilding import AllReduce, Choose, Rebuilt, Refit, rebuild
from lightning_prune.reconstruction.settings import Reconstruction

__all__ = ["AllReduce", "Choose", "Rebuilt", "Reconstruction", "Refit", "rebuild"]
