"""Sweeps from outside: runs that fail, sweeps that were killed, and the launchers that people have."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from sweeping import COMMAND, ENVIRONMENT, SWEEP, left, sweep

from lightning_prune.cli.names import fingerprint, run_name
from lightning_prune.cli.outcome import finished

pytestmark = pytest.mark.slow


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    done = sweep(tmp_path, "method.pruning_ratio=1.5,0.3")
    assert done.returncode == 1
    assert "1 runs are done, 1 failed" in done.stderr + done.stdout
    (failure,) = left(tmp_path, "failure.json").values()
    assert failure["error"].startswith("ValueError: method: `pruning_ratio` is the fraction of channels to remove")
    assert failure["overrides"] == ["experiment=smoke", "dense_twin=False", "method.pruning_ratio=1.5"]
    assert "__post_init__" in failure["traceback"]
    (summary,) = left(tmp_path, "summary.json").values()
    assert summary["command"] == "lightning-prune experiment=smoke dense_twin=False method.pruning_ratio=0.3"


def test_a_sweep_started_again_repeats_nothing_that_is_done(tmp_path: Path) -> None:
    sweep(tmp_path, "method.pruning_ratio=0.3,1.5")
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/*/summary.json")}
    again = sweep(tmp_path, "method.pruning_ratio=0.3,0.6,1.5")
    assert len(first) == 1
    assert all(path.stat().st_mtime_ns == when for path, when in first.items())
    assert (again.stdout + again.stderr).count("done before") == 1
    assert len(left(tmp_path, "summary.json")) == 2
    assert len(left(tmp_path, "failure.json")) == 1


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    ratios = "method.pruning_ratio=0.3,0.4,0.5"
    with subprocess.Popen(
        [*COMMAND, *SWEEP, ratios], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as running:
        deadline = time.monotonic() + 120
        while not left(tmp_path, "summary.json") and time.monotonic() < deadline:
            time.sleep(0.05)
        while len(list(tmp_path.glob("sweep/*/.hydra"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        running.kill()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/*/summary.json")}
    assert 1 <= len(before) < 3
    killed = next(path for path in tmp_path.glob("sweep/*/") if not (path / "summary.json").exists())
    (killed / "csv").mkdir(exist_ok=True)
    (killed / "csv" / "leftover").touch()
    done = sweep(tmp_path, ratios)
    assert done.returncode == 0, done.stderr
    assert not (killed / "csv" / "leftover").exists(), "logs of two runs in one folder mean nothing"
    assert (done.stdout + done.stderr).count("done before") == len(before)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert len(left(tmp_path, "summary.json")) == 3


@pytest.mark.parametrize("launcher", ["parallel", "slurm_trial"])
def test_launchers(tmp_path: Path, launcher: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = sweep(tmp_path, f"hydra/launcher={launcher}", "method.pruning_ratio=0.3,1.5,0.5")
    assert done.returncode == 1, done.stderr
    assert sorted(summary["events"][0]["asked"] for summary in left(tmp_path, "summary.json").values()) == [0.3, 0.5]
    assert len(left(tmp_path, "failure.json")) == 1


def test_slurm_is_asked_for_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no SLURM here: an sbatch that only keeps what it is handed stands in for it."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    commands = {"srun": "exit 0", "sbatch": f'cp "$1" {tmp_path}/handed; exit 1'}
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{tmp_path}:{ENVIRONMENT['PATH']}")
    done = sweep(tmp_path, "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "seed=0,1")
    assert done.returncode != 0
    handed = (tmp_path / "handed").read_text()
    assert "#SBATCH --partition=gpu" in handed
    assert "#SBATCH --array=0-1" in handed


@pytest.mark.parametrize(
    ("sweeper", "objectives"), [("tpe", "[accuracy.end]"), ("nsga2", "[accuracy.end,macs.pruned]")]
)
def test_optuna_steers_and_goes_on_where_it_was(tmp_path: Path, sweeper: str, objectives: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    given = [f"hydra/sweeper={sweeper}", f"objectives={objectives}", "method.pruning_ratio=interval(0.2, 1.4)"]
    first = sweep(tmp_path, *given, "hydra.sweeper.n_trials=3")
    assert first.returncode == 1, "some of these ratios are too large"
    done, failed = left(tmp_path, "summary.json"), left(tmp_path, "failure.json")
    assert len(done) + len(failed) == 3
    assert len(done) >= 1
    assert len(failed) >= 1
    again = sweep(tmp_path, *given, "hydra.sweeper.n_trials=4")
    assert (again.stdout + again.stderr).count("done before") == len(done)
    assert len(left(tmp_path, "summary.json")) + len(left(tmp_path, "failure.json")) == 4


def test_long_names_end_in_a_hash_and_differ() -> None:
    long = ",".join(f"method.ignore.{number}=layer{number}" for number in range(30))
    names = {run_name(long), run_name(long + "0")}
    assert len(names) == 2
    assert all(len(name) <= 120 for name in names)
    assert run_name("") == "defaults"


def test_another_run_in_the_folder_is_not_taken_for_this_one(tmp_path: Path) -> None:
    config = OmegaConf.create({"seed": 0, "data": {"root": "here"}, "threads": 1})
    (tmp_path / "summary.json").write_text(f'{{"fingerprint": "{fingerprint(config)}"}}')
    assert finished(tmp_path, OmegaConf.merge(config, {"threads": 2})) is not None
    assert finished(tmp_path, OmegaConf.merge(config, {"data": {"root": "there"}})) is None
    (tmp_path / "summary.json").write_text('{"fingerprint": "')
    assert finished(tmp_path, config) is None
