"""What cannot be exchanged is refused, with the way out and before anything has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fits import Module, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from test_rigl import sparse
from torch.optim import Optimizer

from lightning_prune.callbacks import RigLCallback
from lightning_prune.masks.growing import random_masks
from lightning_prune.masks.held import hold, masks_of


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"sparsity": 1.0}, ValueError, r"`sparsity` is .* in \[0, 1\); got 1.0. Try 0.9"),
        ({"sparsity": -0.5}, ValueError, r"`sparsity` .* got -0.5"),
        ({"grow": "momentum"}, ValueError, r"`grow` is \"gradient\" \(RigL\) or \"random\" \(SET\); got 'momentum'"),
        ({"drop_fraction": 1.0}, ValueError, r"`drop_fraction` is .* in \[0, 1\); got 1.0. The paper has 0.3"),
        ({"drop_fraction": -0.1}, ValueError, r"`drop_fraction` .* got -0.1"),
        ({"decay": lambda t: 1 + t}, ValueError, r"`decay` is a function .* it gives \[1.0, .*, 2.0\]. Use"),
        ({"every_n_steps": 0}, ValueError, r"`every_n_steps` is .* 1 or more; got 0. The paper has 100"),
        ({"end": 0}, ValueError, r"`end` is a step \(int, 1 or more\), or a fraction .*; got 0. The paper has 0.75"),
        ({"end": 0.0}, ValueError, r"`end` is a step .*; got 0.0"),
        ({"end": 25000.0}, ValueError, r"`end` is a step .*; got 25000.0"),
        ({"allocation": "2:4"}, TypeError, r"`allocation` says .* got '2:4'. Use ERK\(\), Uniform\(\)"),
        ({"granularity": "2:4"}, TypeError, "granularity"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        RigLCallback(**arguments)


class LBFGSModule(Module):
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("callback", "module", "settings", "match"),
    [
        (
            RigLCallback(0.8),
            Module,
            {},
            r"never exchange a weight: every_n_steps=100, .*before step 18.* drop_fraction=0",
        ),
        (sparse(end=4), Module, {}, "never exchange a weight: every_n_steps=4, and with end=4 .*before step 4"),
        (
            sparse(end=0.75),
            Module,
            {"max_epochs": -1},
            r"end=0.75 of the fit, and nobody knows .*Set Trainer\(max_steps=",
        ),
        (sparse(), LBFGSModule, {}, "LBFGS keeps one flat history of all of them, which cannot follow. Use SGD"),
    ],
    ids=["never", "never before a step", "endless", "lbfgs"],
)
def test_fits_that_are_refused(
    callback: RigLCallback, module: type[Module], settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        trainer(callback, **settings).fit(module())


def test_masks_of_another_sparsity_are_refused() -> None:
    module = Module()
    masks = random_masks(module, 0.5)
    hold(module, masks)
    with pytest.raises(MisconfigurationException, match=r"would prune 80.0% .*already holds masks that prune 50.0%"):
        trainer(sparse()).fit(module)
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(module).items())


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        trainer(sparse(ignore=["nowhere"])).fit(Module())
