"""The LASSO of channel pruning: its whole path on moments against bisection over scikit-learn's Lasso on rows.

    python benchmarks/lasso_path.py [--channels 512] [--keep 256] [--images 5000] [--out lasso_path.json]

A 1x1 convolution with 64 outputs reads 512 channels after a ReLU, at 10 points of each of 5000 images. All rows, one
for each point and output, are 3 200 000, 13 GB in float64; their moments are 2 MB. Bisection is given what fits:

    code     what the authors' code takes: min(400, points / 20) points with all 64 outputs, 25 600 rows
    spread   one output, drawn at random, at each of the 50 000 points

    wide     eight outputs, drawn at random, at each of the 50 000 points: 400 000 rows, 1.6 GB

There are two such layers, one whose channels and filters are mixtures of as many factors as channels, and one of 16:
channels that are different, and channels that are alike. The bisection is that of the authors' code: alpha doubles from
0.001 until fewer than `keep` channels are left, then the interval from 0 to there is halved until `keep` to 1.1 `keep`
are left, 60 times at most; scikit-learn's settings, from 0 each time, without the intercept. "exact" is the same until
`keep` are left, which is what `choose` gives; "precomputed" the same as the first where scikit-learn is handed the Gram
matrix, beside the rows, which it needs all the same. The path is timed on the moments of the same rows, and on those of
all. One thread; CPU seconds, as other programs disturb them less. Objectives are compared where bisection ends.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso
from torch import Tensor

from lightning_prune.lasso import choose, lasso_path

OUTPUTS, POINTS = 64, 10
Moments = tuple[Tensor, Tensor]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def layer(channels: int, images: int, kinds: int) -> Moments:
    """What the layer reads at all points, (points, c), correlated within an image, and its weight, (c, outputs)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    factors = (normal(images, 1, kinds) + normal(images, POINTS, kinds)).flatten(0, 1)
    read = (factors @ normal(kinds, channels) / kinds**0.5 - 0.5 + 0.3 * normal(len(factors), channels)).relu_()
    filters = normal(channels, kinds) @ normal(kinds, OUTPUTS) / kinds**0.5 + 0.3 * normal(channels, OUTPUTS)
    return read * normal(channels).exp(), filters / channels**0.5


def all_moments(read: Tensor, weight: Tensor) -> Moments:
    """Those of all rows, without a row: z_i' z_j = (x_i' x_j) (w_i' w_j), and y = sum_j z_j."""
    gram = torch.zeros(len(weight), len(weight), dtype=torch.float64)
    for batch in read.split(1000):
        batch = batch.double()
        gram.addmm_(batch.T, batch)
    gram *= weight.double() @ weight.double().T
    gram /= len(read) * OUTPUTS
    return gram, gram.sum(1)


def code_rows(read: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(len(read), (min(400, len(read) // 20),), generator=generator)
    return (read[drawn].unsqueeze(1) * weight.T).flatten(0, 1).double()


def spread_rows(read: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    return (read * weight.T[torch.randint(OUTPUTS, (len(read),), generator=generator)]).double()


def wide_rows(read: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    return torch.cat([spread_rows(read, weight, generator) for _ in range(8)])


def bisect(
    z: np.ndarray, y: np.ndarray, keep: int, *, more: float = 0.1, precompute: Any = False
) -> tuple[np.ndarray, float, int]:
    """Return the coefficients, their alpha and how many problems were solved."""

    def solved(alpha: float) -> np.ndarray:
        nonlocal fits
        fits += 1
        return Lasso(alpha=alpha, fit_intercept=False, precompute=precompute).fit(z, y).coef_

    fits, left, right = 0, 0.0, 1e-3
    while np.count_nonzero(solved(right)) >= keep:
        right *= 2
    for _ in range(60):
        alpha = (left + right) / 2
        coefficients = solved(alpha)
        count = np.count_nonzero(coefficients)
        if keep <= count <= (1 + more) * keep:
            break
        left, right = (alpha, right) if count > keep else (left, alpha)
    return coefficients, alpha, fits


def compared(rows: Tensor, keep: int) -> dict[str, float]:
    y = rows.sum(1)
    (gram, target), summing = timed(lambda: (rows.T @ rows / len(rows), rows.T @ y / len(rows)))
    path, walking = timed(lambda: lasso_path(gram, target))
    chosen, choosing = timed(lambda: choose(gram, target, keep))
    z, t = np.asfortranarray(rows.numpy()), y.numpy()
    (theirs, alpha, fits), bisecting = timed(lambda: bisect(z, t, keep))
    (exactly, _, exact_fits), exact = timed(lambda: bisect(z, t, keep, more=0.0))
    _, handed = timed(lambda: bisect(z, t, keep, precompute=gram.numpy() * len(rows)))

    def objective(b: Tensor) -> float:
        return float((rows @ b - y).square().mean() / 2 + alpha * b.abs().sum())

    return {
        "rows": len(rows),
        "rows_mb": rows.numel() * 8 / 1e6,
        "moments_mb": (gram.numel() + target.numel()) * 8 / 1e6,
        "moments_s": summing,
        "path_s": walking,
        "choose_s": choosing,
        "bisection_s": bisecting,
        "precomputed_s": handed,
        "exact_s": exact,
        "fits": fits,
        "exact_fits": exact_fits,
        "knots": len(path.alphas),
        "ratio_path": bisecting / walking,
        "ratio_path_and_moments": bisecting / (walking + summing),
        "ratio_choose": bisecting / choosing,
        "ratio_exact_choose": exact / choosing,
        "ratio_precomputed": handed / walking,
        "ratio_precomputed_choose": handed / choosing,
        "alpha": alpha,
        "objective": objective(path.at(alpha)),
        "objective_of_bisection": objective(torch.from_numpy(theirs)),
        "count": len(chosen),
        "count_of_bisection": int(np.count_nonzero(theirs)),
        "count_of_exact": int(np.count_nonzero(exactly)),
    }


def walked(read: Tensor, weight: Tensor, keep: int) -> dict[str, float]:
    """The path alone, on the moments of all rows."""
    (gram, target), summing = timed(lambda: all_moments(read, weight))
    path, walking = timed(lambda: lasso_path(gram, target))
    chosen, choosing = timed(lambda: choose(gram, target, keep))
    return {
        "rows": len(read) * OUTPUTS,
        "rows_mb": read.numel() * OUTPUTS * 8 / 1e6,
        "moments_mb": (gram.numel() + target.numel()) * 8 / 1e6,
        "moments_s": summing,
        "path_s": walking,
        "choose_s": choosing,
        "knots": len(path.alphas),
        "count": len(chosen),
    }


def told(name: str, found: dict[str, float], keep: int) -> str:
    return (
        f"{name}: {found['rows']:,} rows, {found['rows_mb']:.0f} MB; moments {found['moments_mb']:.1f} MB in "
        f"{found['moments_s']:.2f} s\n"
        f"  path {found['path_s']:.2f} s ({found['knots']} knots), choose {found['choose_s']:.2f} s; bisection "
        f"{found['bisection_s']:.1f} s ({found['fits']} fits), exact {found['exact_s']:.1f} s "
        f"({found['exact_fits']} fits), precomputed {found['precomputed_s']:.1f} s\n"
        f"  bisection / path {found['ratio_path']:.1f}, / (path and moments) {found['ratio_path_and_moments']:.1f}, "
        f"/ choose {found['ratio_choose']:.1f}; exact / choose {found['ratio_exact_choose']:.1f}\n"
        f"  precomputed / path {found['ratio_precomputed']:.1f}, / choose {found['ratio_precomputed_choose']:.1f}\n"
        f"  objective at alpha {found['alpha']:.3g}: {found['objective']:.9g} against "
        f"{found['objective_of_bisection']:.9g}; channels {found['count']} against {found['count_of_bisection']} "
        f"and {found['count_of_exact']}, {keep} asked"
    )


def main() -> None:
    """Measure, and print what each took and found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--keep", type=int, default=256)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)  # its 1000 sweeps are what the authors' code would take
    results = {}
    for name, kinds in (("different", given.channels), ("alike", 16)):
        read, weight = layer(given.channels, given.images, kinds)
        generator = torch.Generator().manual_seed(1)
        for rows in (code_rows, spread_rows, wide_rows):
            found = results[f"{name}, {rows.__name__}"] = compared(rows(read, weight, generator), given.keep)
            print(told(f"{name}, {rows.__name__}", found, given.keep), flush=True)
        found = results[f"{name}, all"] = walked(read, weight, given.keep)
        print(
            f"{name}, all: {found['rows']:,} rows, {found['rows_mb']:.0f} MB, never made; moments "
            f"{found['moments_mb']:.1f} MB in {found['moments_s']:.2f} s; path {found['path_s']:.2f} s "
            f"({found['knots']} knots), choose {found['choose_s']:.2f} s, {found['count']} channels",
            flush=True,
        )
        if given.out:
            given.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
