"""What a network's outputs say about targets: -log p(target | input) of each example, and targets drawn from p."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.inputs import tensors_in

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""Takes outputs and targets of n examples and returns one number for each, of shape (n,)."""

Labels: TypeAlias = Literal["data", "model"]
"""Where targets come from: the data (the empirical Fisher), or the model's own distribution (the Fisher itself)."""


def check_labels(labels: Labels, loss: Loss | None) -> None:
    """See that labels can be had.

    Raises:
        ValueError: `labels` is unknown, or asks to draw targets of a loss that is no distribution.
    """
    if labels not in get_args(Labels):
        raise ValueError(f"`labels` is one of {', '.join(map(repr, get_args(Labels)))}; got {labels!r}.")
    if labels == "model" and loss is not None and not isinstance(loss, Likelihood):
        raise ValueError(
            f"labels='model' draws targets from the model, and the loss {loss!r} does not say how. Pass Categorical() "
            "or Gaussian(), derive your own from lightning_prune.likelihoods.Likelihood, or take labels='data'."
        )


def likelihood_for(targets: Any) -> Likelihood:
    """Return what goes with targets: `Categorical` with whole numbers, `Gaussian` with floating-point ones.

    Raises:
        ValueError: They are neither.
    """
    found = list(tensors_in(targets))
    if isinstance(targets, Tensor) or len(found) == 1:
        kind = found[0].dtype
        if kind.is_floating_point:
            return Gaussian()
        if kind is not torch.bool and not kind.is_complex:
            return Categorical()
    raise ValueError(
        "`loss` None is for pairs (inputs, targets) whose targets are numbers of classes or real numbers; got targets "
        f"{_in_words(targets)}. Pass a function of (outputs, targets) that returns one number for each example."
    )


class Likelihood(ABC):
    """The distribution of targets that a network's outputs stand for."""

    @abstractmethod
    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Return -log p(target) of each example, of shape (n,)."""

    @abstractmethod
    def draw(self, outputs: Any) -> Any:
        """Draw targets from p with torch's global random numbers."""


class Categorical(Likelihood):
    """Cross-entropy: -log p = logsumexp(f) - f_y for logits (n, classes, ...) and classes (n, ...), summed over "...".

    Targets of -100 do not count, as in `torch.nn.functional.cross_entropy`.
    """

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Return the cross-entropy of each example.

        Raises:
            ValueError: The shapes do not go together.
        """
        _check_tensors(outputs, targets, "class logits (n, classes, ...) and classes (n, ...)")
        if outputs.shape[:1] + outputs.shape[2:] != targets.shape:
            raise ValueError(
                f"Categorical takes class logits (n, classes, ...) and classes (n, ...); got {_in_words(outputs)} and "
                f"{_in_words(targets)}. Let `forward` return logits in that order, or pass a `loss` of your own."
            )
        return _sums(F.cross_entropy(outputs, targets.long(), reduction="none"))

    def draw(self, outputs: Any) -> Tensor:
        """Draw a class for each row of logits."""
        chances = outputs.detach().movedim(1, -1).softmax(-1)
        drawn = torch.multinomial(chances.flatten(0, -2), 1)
        return drawn.view(chances.shape[:-1])


class Gaussian(Likelihood):
    """Half the squared error: -log p = 1/2 sum_k (f_k - y_k)^2 + const for outputs and targets (n, ...), variance 1."""

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Return half the squared error of each example.

        Raises:
            ValueError: The shapes differ.
        """
        _check_tensors(outputs, targets, "outputs and targets of one shape (n, ...)")
        if outputs.shape != targets.shape:
            raise ValueError(
                f"Gaussian takes outputs and targets of one shape; got {_in_words(outputs)} and {_in_words(targets)}. "
                "Reshape one of them, or pass a `loss` of your own."
            )
        return 0.5 * _sums((outputs - targets).square())

    def draw(self, outputs: Any) -> Tensor:
        """Draw around the outputs."""
        mean: Tensor = outputs.detach()
        return mean + torch.randn_like(mean)


def _sums(values: Tensor) -> Tensor:
    """Sum all dimensions but the first."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def _check_tensors(outputs: Any, targets: Any, what: str) -> None:
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.dim() and targets.dim()):
        raise ValueError(
            f"`loss` None takes {what}; got {_in_words(outputs)} and {_in_words(targets)}. Pass a function of "
            "(outputs, targets) that returns one number for each example."
        )


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"of type {type(value).__name__}"
