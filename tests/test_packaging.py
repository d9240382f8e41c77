"""What is on the disk is what is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import lightning_prune

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed() -> None:
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listed is not None
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "lightning_prune").rglob("__init__.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"lightning_prune.conf"}
    assert set(re.findall(r'"([^"]+)"', listed.group(1))) == expected


HEAVY = ("matplotlib", "plotly", "jinja2", "hydra", "onnx", "onnxruntime", "sklearn", "torchvision", "timm", "optuna")


def test_importing_brings_nothing_heavy_along() -> None:
    """What lightning itself does not import, and people may not have, is imported where it is needed."""
    code = (
        "import sys, lightning.pytorch; before = set(sys.modules); import lightning_prune, lightning_prune.callbacks; "
        f"print(sorted(({{name.partition('.')[0] for name in set(sys.modules) - before}}) & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert listed is not None
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed.group(1)))
    tried = dict(
        re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "oldest_versions.txt").read_text(), re.MULTILINE)
    )
    assert tried.keys() - {"omegaconf"} == bounds.keys()
    assert all(f"{version}.0".startswith(f"{bounds[name]}.") for name, version in tried.items() if name in bounds)


def test_the_version_stands_in_one_place() -> None:
    assert version("lightning-prune") == lightning_prune.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel and an sdist, built from a copy: a build leaves files beside the code."""
    pytest.importorskip("build", reason="`build` is not installed")
    folder = tmp_path_factory.mktemp("distributions")
    files = subprocess.run(
        ["git", "ls-files", "-z", "-c", "-o", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    if not files:
        pytest.skip("the code is no git checkout")
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / "code" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "code" / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "code")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_is_needed(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_prune").rglob("*.*")}
    wanted = {name for name in package if not name.endswith((".pyc", ".unfinished"))}
    wanted |= {f"lightning_prune/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert wanted <= names
    assert not [name for name in names if name.startswith(("tests", "docs", "conf", "benchmarks"))]
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", "conf/config.yaml"} <= inside


@pytest.mark.slow
def test_an_installed_wheel_runs(distributions: Path, tmp_path: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    place = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(place), str(wheel)]
    subprocess.run(command, capture_output=True, check=True)
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    for arguments in (
        ["-c", "import lightning_prune, pathlib; print(pathlib.Path(lightning_prune.__file__).parent)"],
        ["-m", "lightning_prune", "experiment=smoke", "dense_twin=false", "hydra.run.dir=out"],
    ):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        if arguments[0] == "-c":
            assert Path(done.stdout.strip()) == place / "lightning_prune"
    assert (tmp_path / "out" / "summary.json").exists()
