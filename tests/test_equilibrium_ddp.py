"""Fits with blocks on two processes: one network on both, and the statistics of one process with the whole batch.

python test_equilibrium_ddp.py <folder>
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import Module, images, network, trainer, widths
from torch import Tensor, distributed, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune.callbacks import ChannelEquilibriumCallback, MagnitudePruneCallback
from lightning_prune.equilibrium import blocks_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed"),
]

sgd = partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01)


class Shared(Module):
    """Both ranks' batches together are those of one process, in the same steps."""

    def __init__(self, batch_size: int, norm: type[nn.Module] = nn.GroupNorm) -> None:
        net = network()
        if norm is nn.GroupNorm:  # what does not look at the batch itself
            net[1], net[4] = nn.GroupNorm(2, 8), nn.GroupNorm(2, 8)
        super().__init__(sgd, net=net)
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        data, ranks = images().dataset, self.trainer.world_size
        sampler = DistributedSampler(data, ranks, self.global_rank, shuffle=False)
        return DataLoader(data, batch_size=self.batch_size, sampler=sampler)


FITS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "both branches": (nn.GroupNorm, {}),
    "decorrelation": (nn.GroupNorm, {"branches": "decorrelation"}),
    "folded": (nn.BatchNorm2d, {"branches": "decorrelation", "at_end": "fold"}),
    "cut": (nn.BatchNorm2d, {}),
}


def fitted(name: str, batch_size: int, **settings: Any) -> dict[str, Any]:
    norm, arguments = FITS[name]
    module = Shared(batch_size, norm)
    own = ChannelEquilibriumCallback(group_size=4, **arguments)
    cuts: list[pl.Callback] = [MagnitudePruneCallback(0.5, begin=1, end=1)] if name == "cut" else []
    options: dict[str, Any] = {
        "max_epochs": 2,
        "limit_val_batches": 0,
        "precision": "64-true",
        "use_distributed_sampler": False,
    }
    trainer(own, *cuts, **options, **settings).fit(module)
    return {"state": dict(module.state_dict()), "widths": widths(module), "blocks": list(blocks_of(module))}


def run(folder: Path) -> None:
    from lightning.pytorch.strategies import DDPStrategy

    for number, name in enumerate(FITS):
        found = fitted(name, 4, devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
        torch.save(found, folder / f"{number}of{distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks have left what they found; they run once, for the processes take long to start."""
    there, here = tmp_path_factory.mktemp("ddp"), Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "MASTER", "LOCAL_RANK"))}
    ran = subprocess.run(
        [sys.executable, __file__, str(there)],
        env={**clean, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=there,
        timeout=200,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return there


def ranks(folder: Path, name: str) -> list[dict[str, Any]]:
    number = list(FITS).index(name)
    return [torch.load(folder / f"{number}of{rank}.pt", weights_only=True) for rank in (0, 1)]


OF_THE_RANK = ("running_scale", "running_mean", "running_var")
"""Of its own examples, until DDP hands the first rank's on before the next step."""


@pytest.mark.parametrize("name", FITS)
def test_both_ranks_end_with_the_same_network(folder: Path, name: str) -> None:
    first, second = ranks(folder, name)
    assert first["state"].keys() == second["state"].keys()
    for key, tensor in first["state"].items():
        if not key.endswith(OF_THE_RANK):
            assert torch.allclose(tensor, second["state"][key], rtol=0, atol=1e-12), key
            assert tensor.isfinite().all()
    assert first["widths"] == second["widths"]
    assert sum(first["widths"]) == (8 if name == "cut" else 16)
    assert first["blocks"] == second["blocks"] == ([] if name == "folded" else ["net.1", "net.4"])


def test_they_end_as_one_process_with_the_whole_batch(folder: Path) -> None:
    alone: dict[str, Tensor] = fitted("decorrelation", 8)["state"]
    untrained = Shared(8).state_dict()
    for found in ranks(folder, "decorrelation"):
        assert found["state"].keys() == alone.keys()
        for key, tensor in alone.items():
            assert torch.allclose(found["state"][key], tensor, rtol=0, atol=1e-9), key
    assert not torch.allclose(alone["net.0.weight"], untrained["net.0.weight"].double(), atol=1e-2)
    identity = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    assert not torch.allclose(alone["net.1.equilibrium.running_whitening"], identity, atol=0.1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
