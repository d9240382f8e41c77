"""Channel Equilibrium on two processes: the statistics are those of the whole batch, however it is shared out.

python test_channel_equilibrium_ddp.py <folder> <rank>
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from lightning_prune.layers import ChannelEquilibrium, Equilibrated
from lightning_prune.layers.whitening import Moments

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed"),
]

FIRST = 3
"""Examples on the first rank, of 8."""


def whole() -> tuple[Tensor, Tensor]:
    """The batch, whose halves are unlike, and weights of its outputs in the loss."""
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(2, 8, 8, 3, 3, dtype=torch.float64, generator=generator).unbind()
    return x * torch.linspace(0.5, 2, 8).view(-1, 1, 1, 1) + torch.linspace(-2, 2, 8).view(-1, 1, 1, 1), weights


def covariance(x: Tensor, *, over_ranks: bool) -> Tensor:
    return Moments.of(x.flatten(2).unflatten(1, (2, 4))).covariance(over_ranks=over_ranks)


def balanced(over_ranks: bool, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(2)
    block, x = ChannelEquilibrium(8, group_size=4, over_ranks=over_ranks).double(), x.clone().requires_grad_()
    out = block(x)
    (out * weights).sum().backward()
    found = {"covariance": covariance(x.detach(), over_ranks=over_ranks)}
    found |= {"whitening": block.decorrelation.running_whitening, "scale": block.reweighting.running_scale}
    return found | {"out": out.detach(), "gradient": x.grad}  # type: ignore[dict-item]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    norms = [Equilibrated(nn.GroupNorm(2, 8), ChannelEquilibrium(8, group_size=4)) for _ in range(3)]
    convolutions = nn.Conv2d(8, 8, 3, padding=1), norms[0], nn.ReLU(), nn.Conv2d(8, 8, 1), norms[1]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), norms[2]).double()  # the last gate has nothing to do


def fitted(x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Two steps of a network under DDP."""
    net = nn.parallel.DistributedDataParallel(network())
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        (net(x) * weights.sum((2, 3), keepdim=True)).sum().backward()
        optimizer.step()
    return dict(net.module.state_dict())


def run(folder: Path, rank: int) -> None:
    meeting = (folder / "meeting").as_uri()
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    own = slice(FIRST) if rank == 0 else slice(FIRST, None)
    x, weights = (tensor[own] for tensor in whole())
    found: dict[str, Any] = {str(over): balanced(over, x, weights) for over in (True, False)}
    torch.save(found | {"fitted": fitted(x, weights)}, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks have found; they run once, for the processes take long to start."""
    folder, here = tmp_path_factory.mktemp("ddp"), Path(__file__).parent
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "MASTER", "LOCAL_RANK"))}
    paths = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank)],
            env={**clean, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(each[-2000:] for each in said)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def together(ranks: list[dict[str, Any]], over: bool, name: str) -> Tensor:
    return torch.cat([rank[str(over)][name] for rank in ranks])


@pytest.mark.parametrize("name", ["out", "gradient"])
def test_two_ranks_are_one_process_with_the_whole_batch(ranks: list[dict[str, Any]], name: str) -> None:
    alone = balanced(True, *whole())
    assert torch.allclose(together(ranks, True, name), alone[name], rtol=0, atol=1e-10)
    assert not torch.allclose(together(ranks, False, name), alone[name], rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["covariance", "whitening", "scale"])
def test_both_have_the_same_statistics(ranks: list[dict[str, Any]], name: str) -> None:
    alone = balanced(True, *whole())
    for rank in ranks:
        assert torch.allclose(rank["True"][name], alone[name], rtol=0, atol=1e-12)
    assert torch.equal(*(rank["True"][name] for rank in ranks))
    assert not torch.allclose(*(rank["False"][name] for rank in ranks), rtol=0, atol=1e-2)


def test_each_for_itself_is_what_it_is_alone(ranks: list[dict[str, Any]]) -> None:
    for rank, own in zip(ranks, (slice(FIRST), slice(FIRST, None)), strict=True):
        alone = balanced(False, *(tensor[own] for tensor in whole()))
        for name, tensor in alone.items():
            assert torch.allclose(rank["False"][name], tensor, rtol=0, atol=1e-12)


def test_a_network_stays_the_same_on_both(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["fitted"] for rank in ranks)
    before = copy.deepcopy(network().state_dict())
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=0, atol=1e-12), name
        is_idle = name.startswith("6.equilibrium.") and "whitening" not in name
        assert is_idle == torch.equal(tensor, before[name]), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
