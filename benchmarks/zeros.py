"""What zeros do for speed on a CPU: dense kernels with zeros in their weights, and torch's sparse CSR kernels.

    python benchmarks/zeros.py [--threads 1] [--seconds 1.0]

Prints the time of a linear layer (4096 x 4096, batch 64), of a convolution (256 x 256 x 3 x 3 on 28 x 28, batch 8), as
a ratio to the dense weights, for shares of zeros, and of a layer with that share of its output channels cut.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring for each figure")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {arguments.threads} threads; time as a ratio to the dense weights")
    print(f"{'zeros':>6} {'linear':>8} {'CSR':>8} {'cut':>8} | {'conv':>8} {'cut':>8}")
    rows, images = torch.randn(64, 4096), torch.randn(8, 256, 28, 28)
    matrix, kernel = torch.randn(4096, 4096), torch.randn(256, 256, 3, 3)
    for share in (0.0, 0.5, 0.9, 0.95, 0.99):
        thin, bored = masked(matrix, share), masked(kernel, share)
        sparse = thin.to_sparse_csr()
        left = {name: weight[: round(len(weight) * (1 - share))] for name, weight in (("m", matrix), ("k", kernel))}
        linear = ratios(
            lambda: F.linear(rows, matrix),
            [
                lambda weight=thin: F.linear(rows, weight),
                lambda weight=sparse: weight @ rows.t(),
                lambda weight=left["m"]: F.linear(rows, weight),
            ],
            arguments.seconds,
        )
        conv = ratios(
            lambda: F.conv2d(images, kernel, padding=1),
            [
                lambda weight=bored: F.conv2d(images, weight, padding=1),
                lambda weight=left["k"]: F.conv2d(images, weight, padding=1),
            ],
            arguments.seconds,
        )
        print(f"{share:6.0%} " + " ".join(f"{ratio:8.2f}" for ratio in linear), "|", end=" ")
        print(" ".join(f"{ratio:8.2f}" for ratio in conv))


def masked(weight: Tensor, share: float) -> Tensor:
    """Set a share of the weights, drawn at random, to zero."""
    return weight * (torch.rand_like(weight) >= share)


def ratios(base: Callable[[], object], others: list[Callable[[], object]], seconds: float) -> list[float]:
    """Time all in turn, and return the medians as ratios to the first."""
    times: list[list[float]] = [[] for _ in (base, *others)]
    with torch.inference_mode():
        while len(times[0]) < 5 or sum(times[0]) < seconds:
            for kept, run in zip(times, (base, *others), strict=True):
                start = perf_counter()
                run()
                kept.append(perf_counter() - start)
    first, *rest = map(median, times)
    return [one / first for one in rest]


if __name__ == "__main__":
    main()
