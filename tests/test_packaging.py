"""What is on the disk is what is installed."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed() -> None:
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listed is not None
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "lightning_prune").rglob("__init__.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"lightning_prune.conf"}
    assert set(re.findall(r'"([^"]+)"', listed.group(1))) == expected
