"""What importing lightning_prune costs beside lightning: seconds, each in a process of its own.

python benchmarks/import_time.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from statistics import median

CASES = {
    "lightning_prune": "import lightning.pytorch; import lightning_prune",
    "lightning_prune.callbacks": "import lightning.pytorch; import lightning_prune.callbacks",
}


def seconds(code: str, module: str) -> float:
    """Return the time that a module and all that comes with it took to import, as Python counts it."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    lines = re.findall(r"\|\s+(\d+) \| (\s*)(\S+)$", done.stderr, re.MULTILINE)
    top = [
        (int(total), name) for total, indent, name in lines if not indent and name.split(".")[0] == "lightning_prune"
    ]
    return sum(total for total, name in top if name == "lightning_prune" or module.startswith(name)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    for module, code in CASES.items():
        times = [seconds(code, module) for _ in range(given.rounds)]
        print(f"{module}: {median(times):.3f} s ({min(times):.3f} to {max(times):.3f}) on top of lightning")


if __name__ == "__main__":
    main()
