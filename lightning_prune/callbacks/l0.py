"""Gates that learn by an L0 penalty which channels, inputs or weights stay; what closes is cut, and no gate is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import IterableDataset
from typing_extensions import override

from lightning_prune.allocation import RoundTo, Zeros
from lightning_prune.baseline import Baseline
from lightning_prune.callbacks.base import PruneCallback, own_example, shows_tables, unwrapped
from lightning_prune.callbacks.calibration import training_data
from lightning_prune.callbacks.gate_training import GateTraining
from lightning_prune.callbacks.masking import check_alone, put_on
from lightning_prune.callbacks.monitor import drawing_boards
from lightning_prune.callbacks.ranks import agreed
from lightning_prune.callbacks.signals import signals_wait
from lightning_prune.callbacks.timing import Timing
from lightning_prune.callbacks.upkeep import Upkeep
from lightning_prune.chance import random_state_kept
from lightning_prune.criteria import GateValue, score_groups
from lightning_prune.gates import (
    Choice,
    Constraint,
    Estimator,
    ExpectedL0,
    GateGranularity,
    GateSettings,
    GateUnit,
    by_pattern,
    choose,
)
from lightning_prune.graph import Graph, ignored_tensors
from lightning_prune.inputs import ExampleInputs
from lightning_prune.layers import Gate
from lightning_prune.layers.gates import gates_of, ungated
from lightning_prune.masks.held import masks_of
from lightning_prune.pruner import Draft, Request, draft_cut, reading
from lightning_prune.report import record_table
from lightning_prune.schedules import one_shot
from lightning_prune.types import Heads, PruneRecord


class L0PruneCallback(PruneCallback):
    """Puts a stochastic gate on each channel, lets training choose which stay open, and cuts out the others.

    Louizos, Welling, Kingma 2018, "Learning sparse neural networks through L0 regularization" (arXiv 1712.01312). The
    gates multiply what is read of each channel: behind norms, residual sums and depthwise layers. In training they are
    sampled; in validation and in files the deterministic test gates count. Their log alpha are parameters of the
    network, in the optimizer as a param group of their own without weight decay. Added to the loss is

        strength / N * E[L0],  E[L0] = sum over weights of the probability that all of its gates are open,

    N being the examples in the training data, or, with a ratio, multiplier * (asked - gone), whose multiplier is
    learned such that the test gates leave what is asked. At each event channels whose test gate is 0 are cut; at the
    last one, if these are too few for the ratio, the lowest of the others as well, and then what is left of the gates
    is multiplied into the weights. Closed gates on inputs and weights become
    masks, which are held from then on.

    Args:
        pruning_ratio: Fraction to be gone in the end, counted against the dense model, in (0, 1); or give `strength`.
        strength: lambda, above 0: what an open weight (or MAC, or channel) costs, in units of the loss times N; the
            paper has 0.1. Pattern -> lambda gives groups or layers their own; the first that matches counts.
        of: What ratio and strength count: "params", "macs" (for one example) or "channels".
        granularity: "channels"; "inputs" or "weights" of linear layers; or pattern of group or layer names -> one of
            the three. A layer can have several kinds.
        gate_lr: Learning rate of the gates, above 0: about as far as a log alpha goes in a step, under every optimizer.
            None: such that it can go four times the way to where it closes before the last event, in [0.001, 0.1].
        drop_rate: Gates start at P(z > 0) of 0.95 for the paper's 0.2, and 0.83 for 0.5; in (0, 1).
        weight_decay: Of weights behind gates, weighted with P(z > 0): the paper's L2 term; >= 0. Leave it out of the
            optimizer then.
        estimator: "hard_concrete", or "bernoulli": true 0/1 gates, unbiased, with a higher variance (RELAX).
        per_example: Whether each example has a sample of its own; it costs more.
        seed: Of the samples; all ranks draw alike.
        start: Epoch, or step, from which there are gates.
        begin: First event; two thirds of the fit if None.
        end: Last event, where the gates vanish; `begin` if None.

    The other arguments are those of `PruneCallback`.

    Raises:
        ValueError: An argument is out of its range, or does not go with another.

    Example:
        >>> callback = L0PruneCallback(0.6, of="macs", begin=20)
        >>> callback = L0PruneCallback(strength=0.1, granularity={"conv*": "channels", "fc*": "inputs"})
    """

    def __init__(
        self,
        pruning_ratio: float | None = None,
        *,
        strength: float | Mapping[str, float] | None = None,
        of: GateUnit = "params",
        granularity: GateGranularity | Mapping[str, GateGranularity] = "channels",
        gate_lr: float | None = None,
        drop_rate: float = 0.2,
        weight_decay: float = 0.0,
        estimator: Estimator = "hard_concrete",
        per_example: bool = False,
        seed: int = 0,
        start: int = 0,
        begin: int | None = None,
        end: int | None = None,
        every: int = 1,
        every_n_steps: int | None = None,
        ignore: Sequence[str] = (),
        heads: Heads = "whole",
        min_channels: int = 1,
        round_to: RoundTo = None,
        recalibrate: int = 0,
    ) -> None:
        self.settings = GateSettings(
            pruning_ratio=pruning_ratio,
            strength=None if strength is None else by_pattern("strength", strength),
            of=of,
            granularity=by_pattern("granularity", granularity),
            gate_lr=gate_lr,
            drop_rate=drop_rate,
            weight_decay=weight_decay,
            estimator=estimator,
            per_example=per_example,
            seed=seed,
            start=start,
        )
        super().__init__(
            pruning_ratio or 0.0,
            of=of,
            criterion=GateValue(),
            allocation=Zeros(),
            begin=begin,
            end=end,
            every=every,
            every_n_steps=every_n_steps,
            ignore=ignore,
            heads=heads,
            min_channels=min_channels,
            round_to=round_to,
            constants="drop",  # behind a closed gate there are none
            recalibrate=recalibrate,
        )
        self.timing = Closing(one_shot, begin, end, every, every_n_steps)
        if begin is not None and begin <= start:
            raise ValueError(f"`begin` comes after `start`={start}, so that gates can learn; got {begin}.")
        self.training = GateTraining(weight_decay, seed)
        self.upkeep = Upkeep()
        self.constraint: Constraint | None = None
        self._cost: ExpectedL0 | None = None
        self._dense = 0.0
        self._examples = 0
        self._masked: list[str] = []

    @override
    def _settings(self) -> Sequence[object]:
        return (self.settings,)

    def masked_weights(self, pl_module: pl.LightningModule) -> set[str]:
        """Return the names of the weights that this callback masks."""
        return set(self._masked)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        others = [each for each in trainer.callbacks if isinstance(each, L0PruneCallback)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise MisconfigurationException(
                "Two L0PruneCallback would gate the same model. Give all to one of them: `granularity` and `strength` "
                "take patterns."
            )
        if stage == "fit" and trainer.current_epoch == 0:
            self.constraint, self._masked = None, []

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if gates_of(pl_module) is not None:
            if trainer.ckpt_path is None and trainer.current_epoch == 0:
                raise MisconfigurationException(
                    f"{type(pl_module).__name__} is gated already, by a fit that did not come to its last event. "
                    "Resume that one (`ckpt_path`), or take the gates off: `lightning_prune.gates.fold(model)`."
                )
            self.training.take_up(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.settings.strength is not None:
            self._examples = _examples_of(trainer)
        super().on_train_start(trainer, pl_module)
        check_alone(self, trainer, pl_module)
        own = {name: mask for name, mask in masks_of(pl_module).items() if name in self._masked}
        self.upkeep.follow(own, pl_module)
        self.upkeep.watch(map(unwrapped, trainer.optimizers))

    @override
    def _rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: ExampleInputs) -> None:
        """Try out whether there is something to gate, and whether what is asked can be reached."""
        if self.training.gates is not None:
            return
        graph = reading(pl_module, example, self.request)
        choice = self._chosen(pl_module, graph)
        if self.request.pruning_ratio:
            _warn_of_reach(ExpectedL0(pl_module, graph, choice.gates, self.settings.of), self.request.pruning_ratio)
        steps = self.timing.steps_before(max(self.events), trainer, 0)
        started = self.settings.start * (1 if self.timing.unit == "step" else steps / max(self.events))
        _warn_of_travel(self.settings, steps - started)

    def _chosen(self, pl_module: pl.LightningModule, graph: Graph) -> Choice:
        ignored = ignored_tensors(pl_module, self.request.ignore)
        with random_state_kept():
            torch.manual_seed(self.settings.seed)
            choice = choose(
                pl_module,
                graph,
                self.settings.granularity,
                self.settings.maker,
                ignored=ignored,
                per_example=self.settings.per_example,
            )
        self.settings.strengths_of(choice.gates.named())
        return choice

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.is_finished or trainer.sanity_checking:
            return
        example = batch if pl_module.example_input_array is None else own_example(trainer, pl_module)
        if self.training.gates is None and batch_idx % trainer.accumulate_grad_batches == 0:
            self._put_on(trainer, pl_module, example, batch_idx)
        if self.training.gates is not None:
            if self._cost is None:
                self._count(trainer, pl_module, example, batch_idx)
            self.training.draw(trainer, batch, batch_idx)

    def _put_on(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: ExampleInputs, batch_idx: int
    ) -> None:
        """Put the gates on, if it is time."""
        if self.timing.now(trainer) < self.settings.start:
            return
        choice = self._chosen(pl_module, reading(pl_module, example, self.request))
        steps = self.timing.steps_before(max(self.events), trainer, batch_idx)
        self.training.put_on(trainer, pl_module, choice.gates, self.settings.learning_rate(steps))
        gates = choice.gates.named()
        count = sum(gate.log_alpha.numel() for gate in gates.values())
        left = "".join(f"; {name} has none: {reason}" for name, reason in list(choice.left.items())[:4])
        rank_zero_info(f"{type(self).__name__}: {count:,} gates on {', '.join(gates)}{left}")

    def _count(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: ExampleInputs, batch_idx: int
    ) -> None:
        """Work out what open gates cost, as the network is now."""
        gates = self.training.gates
        assert gates is not None
        with ungated(pl_module):
            graph = reading(pl_module, example, self.request)
            self._cost = ExpectedL0(pl_module, graph, gates, self.settings.of)
            baseline = Baseline.of(pl_module, graph, score_groups(GateValue(), pl_module, graph.groups))
        dense = {"params": baseline.params, "macs": baseline.macs, "channels": sum(baseline.channels.values())}
        self._dense = float(dense[self.settings.of])
        if self.request.pruning_ratio and self.constraint is None:
            steps = self.timing.steps_before(max(self.events), trainer, batch_idx)
            self.constraint = Constraint(self.request.pruning_ratio, steps, self.settings.way)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        self.training.see_loss(loss)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_after_backward(trainer, pl_module)
        self.training.after_backward()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        optimizer = unwrapped(optimizer)
        self.upkeep.before_step(optimizer)
        if self._cost is not None and self.training.is_moved_by(optimizer):
            self.training.before_step(trainer)
            self._cost.add_to_gradients(self._strengths(self._cost))

    def _strengths(self, cost: ExpectedL0) -> Mapping[str, float | Tensor]:
        """Return for each gate what a unit of cost is worth, in units of the loss."""
        if self.constraint is None:
            strengths = self.settings.strengths_of(cost.named)
            return {name: strength / self._examples for name, strength in strengths.items()}
        left = cost.tested(self.constraint.margin) / self._dense
        pull = self.constraint.pull(1 - left) / self._dense
        return dict.fromkeys(cost.named, pull)

    @override
    def _event(self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: ExampleInputs, moment: int) -> None:
        assert self._cost is not None
        draft = None
        if self._cost.has_channels:
            request = self._request_at(pl_module, example, moment)
            draft = agreed(trainer, pl_module, lambda: draft_cut(pl_module, example, request))
        _tell_guarded(self._cost.named)
        with signals_wait():
            record = None if draft is None else self._cut(trainer, pl_module, draft)
            if moment == max(self.events):
                self._close(trainer, pl_module)
            self._cost = None
            self._done = moment
        if record is not None:
            self._tell(trainer, record)

    @override
    def _request_at(self, pl_module: pl.LightningModule, example: ExampleInputs, moment: int) -> Request:
        """Ask for what has closed; at the last event, where a ratio is asked, for the lowest of the others too."""
        is_last = moment == max(self.events)
        return replace(self.request, allocation=Zeros(and_lowest=is_last and self.settings.pruning_ratio is not None))

    @override
    def _intention(self) -> str:
        moments = [str(moment) for moment in self.events]
        cuts = f"what has closed is cut at {self.timing.unit}s {', '.join(moments)}, and then no gate is left"
        ratio = self.settings.pruning_ratio
        return cuts if ratio is None else f"{ratio:.1%} of {self.settings.of} are to close; {cuts}"

    @override
    def _tell(self, trainer: pl.Trainer, record: PruneRecord) -> None:
        if self.settings.pruning_ratio is not None:
            super()._tell(trainer, record)
            return
        widths = ", ".join(
            f"{name} {change.before} -> {change.after}"
            for name, change in record.channels.items()
            if change.after < change.before
        )
        rank_zero_info(
            f"{type(self).__name__}, {self.timing.unit} {self.timing.now(trainer)}: {widths or 'no gate has closed'}; "
            f"parameters {record.params.before:,} -> {record.params.after:,}, MACs {record.macs.before:,} -> "
            f"{record.macs.after:,}"
        )
        if shows_tables(trainer):
            Console().print(record_table(record, type(self).__name__))

    @override
    def _cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, draft: Draft) -> PruneRecord:
        record = super()._cut(trainer, pl_module, draft)
        self.training.follow(draft.cut)
        return record

    def _close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fold the gates that are left into the weights, and hold what they have closed of inputs and weights at 0."""
        masks = self.training.take_off(trainer, pl_module)
        if masks:
            self._masked = list(masks)
            known = masks_of(pl_module)
            joined = {
                name: mask & known[name].to(mask.device) if name in known else mask for name, mask in masks.items()
            }
            put_on({**known, **joined}, trainer, pl_module)
            own = {name: masks_of(pl_module)[name] for name in masks}
            self.upkeep.take(own, pl_module, map(unwrapped, trainer.optimizers))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._cost is None or trainer.barebones:
            return
        gates = self._cost.named
        for name, gate in gates.items():
            pl_module.log(f"l0/open/{name}", gate.is_open().float().sum(), rank_zero_only=True)
        pl_module.log(f"l0/expected_{self.settings.of}", self._cost.expected(), rank_zero_only=True)
        pl_module.log("l0/pruning_ratio", 1 - self._cost.tested() / self._dense, rank_zero_only=True)
        if self.constraint is not None:
            pl_module.log("l0/multiplier", self.constraint.multiplier, rank_zero_only=True)
        alphas = torch.cat([gate.log_alpha.detach().float().flatten().cpu() for gate in gates.values()])
        for board in drawing_boards(trainer):
            board.add_histogram("l0/log_alpha", alphas, trainer.global_step)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._leave()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._leave()

    def _leave(self) -> None:
        self.training.leave()
        self.upkeep.leave()
        self._cost = None

    @override
    def state_dict(self) -> dict[str, Any]:
        constraint = {} if self.constraint is None else {"constraint": self.constraint.state_dict()}
        return {**super().state_dict(), **self.training.state_dict(), **constraint, "masked": self._masked}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.training.load_state_dict(state_dict)
        self._masked = list(state_dict["masked"])
        if "constraint" in state_dict:
            self.constraint = Constraint(self.request.pruning_ratio, 1, self.settings.way)
            self.constraint.load_state_dict(state_dict["constraint"])


@dataclass(frozen=True)
class Closing(Timing):
    """Events from `begin` to `end`, where the gates vanish; in between what has closed is cut. One at 2/3 if None."""

    @override
    def lay_out(self, length: float, who: str) -> dict[int, float]:
        known = isfinite(length) and self.begin is None and self.end is None
        last = max(2 * int(length) // 3, 1) if known else self.end if self.end is not None else self.begin
        first = last if self.begin is None else self.begin
        if first is None or last is None:
            return Timing.lay_out(self, length, who)  # which says what is missing
        interval = self.every if self.every_n_steps is None else self.every_n_steps
        return dict.fromkeys([*range(first, last, interval), last], 1.0)


def _examples_of(trainer: pl.Trainer) -> int:
    """Return how many examples the training data have.

    Raises:
        MisconfigurationException: Nobody knows.
    """
    loader = training_data(trainer, "L0PruneCallback(strength=...)", "L0PruneCallback(pruning_ratio=...)")
    assert not isinstance(loader.dataset, IterableDataset)
    seen = int(trainer.num_training_batches) * (loader.batch_size or 1) * trainer.world_size
    return max(1, min(len(loader.dataset), seen))  # type: ignore[arg-type]


def _warn_of_reach(cost: ExpectedL0, ratio: float) -> None:
    """Warn where even the closing of all gates but the best of each group is not enough."""
    least = {}
    for name, gate in cost.named.items():
        least[name] = torch.zeros_like(gate.log_alpha.detach())
        if gate.guarded:
            least[name].flatten()[0] = 1.0
    reach = 1 - float(cost.of(least)) / cost.present
    if reach < ratio:
        rank_zero_warn(
            f"pruning_ratio={ratio} cannot be reached: with all gates closed but one of each group, {reach:.1%} would "
            "be gone, since the rest is not gated. Ask for less, or gate more (`granularity`, `ignore`)."
        )


def _warn_of_travel(settings: GateSettings, steps: float) -> None:
    """Warn where gates cannot close in the steps that there are."""
    gate_lr, way = settings.learning_rate(steps), settings.way
    if 0 < steps * gate_lr < way:
        rank_zero_warn(
            f"Gates cannot close in time: a log alpha goes about gate_lr={gate_lr:g} in a step, which makes "
            f"{steps * gate_lr:.2g} in the {steps:.0f} steps before the last event, and it has {way:.2g} to go. Raise "
            f"`gate_lr` to {2 * way / steps:.2g} or more, let the last event come later, or raise `drop_rate`."
        )


def _tell_guarded(gates: Mapping[str, Gate]) -> None:
    """Tell which groups only their guard holds open."""
    held = [name for name, gate in gates.items() if bool(gate.only_guard_holds())]
    if held:
        rank_zero_info(
            f"L0PruneCallback: all gates of {', '.join(held)} would be closed; the best of each stays open, so that "
            "the network does. A smaller `strength` leaves more."
        )
