"""All of resnet50 cut 2x with 1,000 images of 64 x 64: how long it takes, and how much memory.

    python benchmarks/lasso_resnet50.py [--images 1000] [--threads 2] [--out lasso_resnet50.json]

The weights are fresh and the images noise: neither the work nor the memory depends on what they show. The last stages
have 2 x 2 positions there, and the head one, so that there are fewer rows than columns and a ridge is asked for.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from time import perf_counter

import torch
from circumstances import circumstances
from torchvision.models import resnet50

from lightning_prune import reconstruct
from lightning_prune.reconstruction import Reconstruction


def main() -> None:
    """Cut, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("lasso_resnet50.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    net = resnet50().eval()
    batches = list(torch.randn(given.images, 3, 64, 64).split(50))
    start = perf_counter()
    done = reconstruct(net, batches, speed_up=2, reconstruction=Reconstruction(given.images, ridge=1e-3))
    result = {
        "images": given.images,
        "seconds": round(perf_counter() - start, 1),
        "layers": len(done.refits),
        "MACs gone": round(done.record.macs.removed, 4),
        "moments MiB": round(done.nbytes / 2**20, 1),
        "peak GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        **circumstances(),
    }
    print(done)
    print(result)
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
