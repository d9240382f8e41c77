"""What is said of gates: which there are, whether they can do what is asked, how they stand, what they have closed."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_prune.callbacks.monitor import drawing_boards
from lightning_prune.gates import Choice, ExpectedL0, GateSettings, GateUnit
from lightning_prune.layers import Gate
from lightning_prune.masks.held import Masks
from lightning_prune.types import PruneRecord


def gates_in_words(choice: Choice) -> str:
    """Tell how many gates there are, and what has none."""
    gates = choice.gates.named()
    count = sum(gate.log_alpha.numel() for gate in gates.values())
    left = "".join(f"; {name} has none: {reason}" for name, reason in list(choice.left.items())[:4])
    return f"{count:,} gates on {', '.join(gates)}{left}"


def closed_in_words(record: PruneRecord) -> str:
    """Tell what has closed and was cut."""
    widths = ", ".join(
        f"{name} {change.before} -> {change.after}"
        for name, change in record.channels.items()
        if change.after < change.before
    )
    return (
        f"{widths or 'no gate has closed'}; parameters {record.params.before:,} -> {record.params.after:,}, MACs "
        f"{record.macs.before:,} -> {record.macs.after:,}"
    )


def masked_in_words(masks: Masks) -> str:
    """Tell how many weights gates of their own, or on their inputs, have left."""
    return ", ".join(f"{name} {mask.numel():,} -> {int(mask.count_nonzero()):,}" for name, mask in masks.items())


def log_gates(pl_module: pl.LightningModule, cost: ExpectedL0, dense: float, unit: GateUnit) -> None:
    """Log how many gates are open, what the network costs on average, and the fraction that is gone.

    Args:
        pl_module: Logs them.
        cost: What open gates cost.
        dense: What the dense network costs.
        unit: What is counted.
    """
    for name, gate in cost.named.items():
        pl_module.log(f"l0/open/{name}", gate.is_open().float().sum(), rank_zero_only=True)
    pl_module.log(f"l0/expected_{unit}", cost.expected(), rank_zero_only=True)
    pl_module.log("l0/pruning_ratio", 1 - cost.tested() / dense, rank_zero_only=True)


def draw_gates(trainer: pl.Trainer, gates: Mapping[str, Gate]) -> None:
    """Draw the histogram of all log alphas, where a logger can."""
    alphas = torch.cat([gate.log_alpha.detach().float().flatten().cpu() for gate in gates.values()])
    for board in drawing_boards(trainer):
        board.add_histogram("l0/log_alpha", alphas, trainer.global_step)


def warn_of_reach(cost: ExpectedL0, ratio: float, dense: float) -> None:
    """Warn where even the closing of all gates but the best of each group is not enough.

    Args:
        cost: What open gates cost.
        ratio: The fraction of `dense` that is to be gone.
        dense: What the dense network costs.
    """
    least = {}
    for name, gate in cost.named.items():
        least[name] = torch.zeros_like(gate.log_alpha.detach())
        if gate.guarded:
            least[name].flatten()[0] = 1.0
    reach = 1 - float(cost.of(least)) / dense
    if reach < ratio:
        rank_zero_warn(
            f"pruning_ratio={ratio} cannot be reached: with all gates closed but one of each group, {reach:.1%} would "
            "be gone, since the rest is not gated. Ask for less, or gate more (`granularity`, `ignore`)."
        )


def warn_of_travel(settings: GateSettings, steps: float) -> None:
    """Warn where gates cannot close in the steps that there are."""
    gate_lr, way = settings.learning_rate(steps), settings.way
    if 0 < steps * gate_lr < way:
        rank_zero_warn(
            f"Gates cannot close in time: a log alpha goes about gate_lr={gate_lr:g} in a step, which makes "
            f"{steps * gate_lr:.2g} in the {steps:.0f} steps before the last event, and it has {way:.2g} to go. Raise "
            f"`gate_lr` to {2 * way / steps:.2g} or more, let the last event come later, or raise `drop_rate`."
        )


def tell_guarded(gates: Mapping[str, Gate]) -> None:
    """Tell which groups only their guard holds open."""
    held = [name for name, gate in gates.items() if bool(gate.only_guard_holds())]
    if held:
        rank_zero_info(
            f"L0PruneCallback: all gates of {', '.join(held)} would be closed; the best of each stays open, so that "
            "the network does. A smaller `strength`, or `pruning_ratio`, leaves more."
        )
