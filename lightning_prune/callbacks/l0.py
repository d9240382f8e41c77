"""Gates that learn by an L0 penalty which channels, inputs or weights stay; what closes is cut, and no gate is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.allocation import RoundTo, Zeros
from lightning_prune.callbacks.base import PruneCallback, own_example, shows_tables, unwrapped
from lightning_prune.callbacks.closing import Closing, check_start, warn_of_open_end
from lightning_prune.callbacks.gate_costs import dense_cost, examples_of
from lightning_prune.callbacks.gate_report import (
    closed_in_words,
    draw_gates,
    gates_in_words,
    log_gates,
    masked_in_words,
    tell_guarded,
    warn_of_reach,
    warn_of_travel,
)
from lightning_prune.callbacks.gate_training import GateTraining, fresh_gates
from lightning_prune.callbacks.masking import check_alone
from lightning_prune.callbacks.ranks import agreed
from lightning_prune.callbacks.signals import signals_wait
from lightning_prune.callbacks.upkeep import Upkeep
from lightning_prune.criteria import GateValue
from lightning_prune.gates import (
    Constraint,
    Estimator,
    ExpectedL0,
    GateGranularity,
    GateSettings,
    GateUnit,
    by_pattern,
)
from lightning_prune.graph import read
from lightning_prune.inputs import ExampleInputs
from lightning_prune.layers.gates import gates_of, ungated
from lightning_prune.masks.held import masks_of
from lightning_prune.pruner import Draft, Request, draft_cut
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
    is multiplied into the weights. Closed gates on inputs and weights become masks, which are held from then on.

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
    def _check_reach(self, trainer: pl.Trainer, length: float, limit: str) -> None:
        check_start(self.events, self.settings.start, self.timing.unit)
        if trainer.fast_dev_run or not warn_of_open_end(self.events, length, self.timing.unit, limit):  # type: ignore[attr-defined]
            super()._check_reach(trainer, length, limit)

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
            self._examples = examples_of(trainer)
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
        graph = read(pl_module, example, self.request.ignore, self.request.heads)
        gates = fresh_gates(pl_module, graph, self.settings, self.request.ignore).gates
        self.training.try_out(trainer, pl_module, gates)
        cost = ExpectedL0(pl_module, graph, gates, self.settings.of)  # which can refuse
        if self.request.pruning_ratio:
            dense = dense_cost(pl_module, graph, gates, self.settings.of)
            warn_of_reach(cost, self.request.pruning_ratio, dense)
        steps = self.timing.steps_before(max(self.events), trainer, 0)
        started = self.settings.start * (1 if self.timing.unit == "step" else steps / max(self.events))
        warn_of_travel(self.settings, steps - started)

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
        graph = read(pl_module, example, self.request.ignore, self.request.heads)
        choice = fresh_gates(pl_module, graph, self.settings, self.request.ignore)
        steps = self.timing.steps_before(max(self.events), trainer, batch_idx)
        self.training.put_on(trainer, pl_module, choice.gates, self.settings.learning_rate(steps))
        rank_zero_info(f"{type(self).__name__}: {gates_in_words(choice)}")

    def _count(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: ExampleInputs, batch_idx: int
    ) -> None:
        """Work out what open gates cost, as the network is now."""
        gates = self.training.gates
        assert gates is not None
        with ungated(pl_module):
            graph = read(pl_module, example, self.request.ignore, self.request.heads)
            self._cost = ExpectedL0(pl_module, graph, gates, self.settings.of)
            self._dense = dense_cost(pl_module, graph, gates, self.settings.of)
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
        if self.training.gates is None:
            raise MisconfigurationException(
                f"At {self.timing.unit} {moment} gates are to close, and {type(pl_module).__name__} has none: this fit "
                "goes on from one without this callback. Let `begin` and `end` come later, so that gates can learn."
            )
        if self._cost is None:  # a resumed fit
            self._count(trainer, pl_module, example, 0)
        assert self._cost is not None
        draft = None
        if self._cost.has_channels:
            request = self._request_at(pl_module, example, moment)
            draft = agreed(trainer, pl_module, lambda: draft_cut(pl_module, example, request))
        tell_guarded(self._cost.named)
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
        if moment != max(self.events):
            return replace(self.request, pruning_ratio=0.0)
        return replace(self.request, allocation=Zeros(and_lowest=self.settings.pruning_ratio is not None))

    @override
    def _intention(self) -> str:
        moments = [str(moment) for moment in self.events]
        cuts = f"what has closed is cut at {self.timing.unit}s {', '.join(moments)}, and then no gate is left"
        ratio = self.settings.pruning_ratio
        return cuts if ratio is None else f"{ratio:.1%} of {self.settings.of} are to close; {cuts}"

    @override
    def _tell(self, trainer: pl.Trainer, record: PruneRecord) -> None:
        if self.settings.pruning_ratio is not None and self.is_finished:
            super()._tell(trainer, record)
            return
        rank_zero_info(f"{self._now(trainer)}: {closed_in_words(record)}")
        if shows_tables(trainer):
            Console().print(record_table(record, type(self).__name__))

    @override
    def _cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, draft: Draft) -> PruneRecord:
        record = super()._cut(trainer, pl_module, draft)
        self.training.follow(draft.cut)
        return record

    def _close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fold the gates that are left into the weights, and hold what they have closed of inputs and weights at 0."""
        self._masked = self.training.take_off(trainer, pl_module)
        if self._masked:
            own = {name: masks_of(pl_module)[name] for name in self._masked}
            self.upkeep.take(own, pl_module, map(unwrapped, trainer.optimizers))
            rank_zero_info(f"{self._now(trainer)}: weights that are not masked, {masked_in_words(own)}")

    def _now(self, trainer: pl.Trainer) -> str:
        return f"{type(self).__name__}, {self.timing.unit} {self.timing.now(trainer)}"

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._cost is None or trainer.barebones:
            return
        log_gates(pl_module, self._cost, self._dense, self.settings.of)
        if self.constraint is not None:
            pl_module.log("l0/multiplier", self.constraint.multiplier, rank_zero_only=True)
        draw_gates(trainer, self._cost.named)

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
