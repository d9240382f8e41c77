"""Knowledge distillation while pruning: the network as it was before the first cut teaches what is left of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial, update_wrapper
from math import inf
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_prune import history
from lightning_prune.records import from_plain, to_plain

_STEP = "training_step"


class DistillationCallback(pl.Callback):
    """Trains on what a teacher says as well as on the labels, with any prune callback and no change of the module.

    What `training_step` returns becomes

        (1 - alpha) * loss + alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)),

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), and Theis et al. 2018,
    "Faster gaze prediction with dense networks and Fisher pruning" (arXiv 1801.05787; alpha = 0.9, T = 1,
    where KL and their cross-entropy have the same gradient). KL is summed over the classes and averaged over all else;
    where the network is called several times in a step, over the calls too.

    The teacher is the network as the fit begins, before any cut, frozen and in eval mode; or a module that you give.
    It is called with what the student is called with. It is no part of the module: neither its `state_dict` nor its
    optimizer knows it, and no cut touches it. Every checkpoint holds the network's own former self, so that a resumed
    fit ends as the unbroken one; a teacher of your own you build again. `distillation/divergence` is logged.

    Args:
        alpha: Weight of the teacher, in [0, 1].
        temperature: T, > 0.
        teacher: What teaches; None takes the network as the fit begins.
        outputs_of: Name of the submodule whose outputs are the logits, such as "net" where `training_step` calls
            `self.net(x)`; "" is the LightningModule, where it calls `self(x)`.
        dim: The dimension of the logits along which the classes lie; -1 in language models.

    Raises:
        ValueError: `alpha` or `temperature` is out of its range.

    Example:
        >>> callbacks = [DistillationCallback(alpha=0.9, temperature=2.0)]  # and any prune callback
    """

    def __init__(
        self,
        alpha: float = 0.9,
        temperature: float = 1.0,
        *,
        teacher: nn.Module | None = None,
        outputs_of: str = "",
        dim: int = 1,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` is the weight of the teacher, in [0, 1]; got {alpha}. The paper has 0.9.")
        if not 0 < temperature < inf:
            raise ValueError(f"`temperature` divides the logits, above 0; got {temperature}. 1 leaves them.")
        self.alpha = alpha
        self.temperature = temperature
        self.outputs_of = outputs_of
        self.dim = dim
        self._given = teacher
        self._former: nn.Module | None = None
        self._restored: dict[str, Any] | None = None
        self._handle: RemovableHandle | None = None
        self._step: Callable[..., Any] | None = None
        self._terms: list[Tensor] | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__} changes the loss that `training_step` returns, and under manual optimization "
                f"nobody uses it. Use automatic optimization, or add the term of "
                "`lightning_prune.callbacks.distillation.divergence` to your loss."
            )
        if trainer.current_epoch == 0:
            self._former, self._restored = None, None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._student(pl_module)
        if self._given is None and self._former is None:
            self._former, self._restored = _former_self(pl_module, self._restored), None
        for teacher in (self._given, self._former):
            if teacher is not None:
                teacher.to(pl_module.device)

    def _student(self, network: nn.Module) -> nn.Module:
        """Return the module whose outputs are the logits."""
        try:
            return network.get_submodule(self.outputs_of)
        except AttributeError as error:
            raise MisconfigurationException(
                f"`outputs_of` names a submodule of {type(network).__name__}; got {self.outputs_of!r}. Its "
                f"children are {', '.join(repr(name) for name, _ in network.named_children())}."
            ) from error

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._handle = self._student(pl_module).register_forward_hook(self._listen, with_kwargs=True)
        self._step = pl_module.__dict__.get(_STEP)
        step = pl_module.training_step
        pl_module.__dict__[_STEP] = update_wrapper(partial(self._distilled, pl_module, step), step)

    def _distilled(self, pl_module: pl.LightningModule, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Take a training step and change its loss."""
        self._terms = []
        try:
            returned, terms = step(*args, **kwargs), self._terms
        finally:
            self._terms = None
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        if loss is None:
            return returned
        if not terms:
            raise MisconfigurationException(
                f"{type(self).__name__} heard no outputs: `training_step` did not call {self._called()}. Name the "
                "submodule that it calls, as in outputs_of='net'."
            )
        term = torch.stack(terms).mean()
        pl_module.log("distillation/divergence", term.detach())
        mixed = (1 - self.alpha) * loss + self.alpha * self.temperature**2 * term
        return {**returned, "loss": mixed} if isinstance(returned, Mapping) else mixed

    def _called(self) -> str:
        return f"`self.{self.outputs_of}(...)`" if self.outputs_of else "`self(...)`"

    def _listen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        """Let the teacher say what it thinks of what the student was asked."""
        if self._terms is not None:
            with torch.no_grad():
                said = self._teacher()(*args, **kwargs)
            self._terms.append(divergence(outputs, said, self.temperature, self.dim))

    def _teacher(self) -> nn.Module:
        if self._given is not None:
            return self._given.eval() if self._given.training else self._given
        assert self._former is not None
        return self._student(self._former)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave(pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave(pl_module)

    def _leave(self, pl_module: pl.LightningModule) -> None:
        """Give the module its own training step back."""
        if self._handle is None:
            return
        self._handle.remove()
        del pl_module.__dict__[_STEP]
        if self._step is not None:
            pl_module.__dict__[_STEP] = self._step
        self._handle, self._step = None, None

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._former is None:
            return self._restored or {}
        return {"weights": self._former.state_dict(), history.KEY: to_plain(history.history_of(self._former))}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._former, self._restored = None, state_dict or None


def _former_self(pl_module: pl.LightningModule, state: Mapping[str, Any] | None) -> nn.Module:
    """Return a frozen copy of a network, as it is now or was when a state was written."""
    former = deepcopy(pl_module)
    if state is not None:
        history.reach(former, from_plain(state[history.KEY]))
        former.load_state_dict(state["weights"])
    return former.requires_grad_(False).eval()


def divergence(student: Any, teacher: Any, temperature: float = 1.0, dim: int = 1) -> Tensor:
    """Return KL(softmax(teacher / T) || softmax(student / T)), summed over the classes and averaged over all else.

    Args:
        student: Logits of shape (n, ..., classes, ...).
        teacher: Logits of the same shape.
        temperature: T, > 0.
        dim: The dimension along which the classes lie.

    Raises:
        ValueError: They are no tensors of one shape with that dimension.
    """
    shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in (student, teacher)]
    if shapes[0] != shapes[1] or not isinstance(student, Tensor) or not -student.dim() <= dim < student.dim():
        raise ValueError(
            f"Student and teacher give logits of one shape, with classes along dimension {dim}; got {shapes[0]} and "
            f"{shapes[1]}. Take a teacher with the same outputs, or name what gives the logits with `outputs_of`."
        )
    said, heard = (F.log_softmax(each / temperature, dim) for each in (teacher, student))
    return F.kl_div(heard, said, reduction="none", log_target=True).sum(dim).mean()
