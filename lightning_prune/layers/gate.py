"""A gate that is open with a probability that is learned, one for each channel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Generator, Tensor, nn
from typing_extensions import Self, override

from lightning_prune.estimators import logistic_noise

SPREAD = 0.01
"""Standard deviation of log_alpha at first, which breaks ties between the gates (Louizos et al. 2018)."""

LOWEST, HIGHEST = log(1e-2), log(1e2)
"""Where log_alpha is held, so that no gate goes where its gradient vanishes (the code of Louizos et al. 2018)."""


class Gate(nn.Module, ABC):
    """Stochastic gates z, each with a logit log_alpha of its own; E[z] rises with it.

    In training they are sampled; otherwise `test_values` takes their place, which are the same each time. A sample is a
    function of log_alpha and of noise that `draw` renews, so all passes of a step share one sample. Everything is
    computed in float32, also under autocast and where log_alpha was turned to half.

    As a layer of its own it multiplies (batch, *shape, ...) by the gates, and draws anew each time in training. A layer
    that normalizes (BatchNorm) behind it would undo the scale: put the gate after that layer.

    Args:
        shape: Of the gates, most often the number of channels.
        drop_rate: p, in (0, 1): log_alpha starts from N(log((1 - p) / p), 0.01^2). For gates with mass between 0 and
            1, this is not P(z = 0).
        guarded: Whether the best gate stays open at test time where all would be shut: it takes E[z]. Without it a
            layer can collapse.

    Raises:
        ValueError: `shape` is empty or not positive, or `drop_rate` is out of range.
    """

    log_alpha: nn.Parameter
    noise: Tensor

    def __init__(self, *shape: int, drop_rate: float = 0.5, guarded: bool = True) -> None:
        super().__init__()
        if not shape or min(shape) < 1:
            raise ValueError(f"`shape` is one or more sizes, each 1 or more; got {shape}. Give the number of channels.")
        if not 0 < drop_rate < 1:
            raise ValueError(
                f"`drop_rate` is how much of the gates is dropped at first, in (0, 1); got {drop_rate}. 0.5 is usual."
            )
        self.drop_rate = drop_rate
        self.guarded = guarded
        self.log_alpha = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.noise = torch.zeros(shape, dtype=torch.float32)  # no buffer: averaged copies (EMA) must not average it
        self.reset_parameters()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the noise along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.noise = fn(self.noise)
        return self

    def reset_parameters(self) -> None:
        """Draw log_alpha from N(log((1 - p) / p), 0.01^2), by torch's own generator."""
        nn.init.normal_(self.log_alpha, log((1 - self.drop_rate) / self.drop_rate), SPREAD)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the gates."""
        return tuple(self.log_alpha.shape)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes such a gate again: `type(gate)(*gate.shape, **gate.settings)`. Plain numbers."""
        return {"drop_rate": self.drop_rate, "guarded": self.guarded}

    def draw(self, generator: Generator | None = None, examples: int | None = None) -> None:
        """Draw new noise: on the CPU, so that all devices and ranks can draw alike, and then moved.

        Args:
            generator: A CPU generator; None takes torch's own.
            examples: Size of the batch for one sample per example, (examples, *shape); None for one that all share.

        Raises:
            ValueError: `examples` is less than 1.
        """
        if examples is not None and examples < 1:
            raise ValueError(f"`examples` is the size of the batch, 1 or more; got {examples}. None shares one sample.")
        batch = () if examples is None else (examples,)
        self.noise = logistic_noise(*batch, *self.shape, generator=generator).to(self.log_alpha.device)

    def values(self, training: bool | None = None) -> Tensor:
        """Return what to multiply by: in training the sample of the current noise, of its shape; else the test gates.

        Args:
            training: None means as the module is.
        """
        if self.training if training is None else training:
            return self._sample(self.log_alpha.float(), self.noise.float())
        return self.test_values()

    def test_values(self) -> Tensor:
        """Return the gates outside of training, of `shape`: deterministic."""
        log_alpha = self.log_alpha.float()
        values = self._test_values(log_alpha)
        if not self.guarded:
            return values
        flat = log_alpha.flatten()
        # no `if`: that would wait for the device, and could not be exported
        is_best = (torch.arange(len(flat), device=flat.device) == flat.argmax()).view_as(values)
        return torch.where(is_best & self._all_shut(values), self._mean(flat.max()), values)

    def is_open(self) -> Tensor:
        """Tell which gates are not 0 at test time, of `shape`."""
        return self.test_values().detach() != 0

    def only_guard_holds(self) -> Tensor:
        """Tell, as a scalar, whether all gates would be shut at test time were it not for the guard."""
        if not self.guarded:
            return torch.zeros((), dtype=torch.bool, device=self.log_alpha.device)
        return self._all_shut(self._test_values(self.log_alpha.detach().float()))

    @property
    @abstractmethod
    def closes_at(self) -> float:
        """The log_alpha at and below which a test gate is 0."""

    @abstractmethod
    def open_probability(self) -> Tensor:
        """Return P(z != 0), of `shape`, differentiable in log_alpha."""

    @abstractmethod
    def full_probability(self) -> Tensor:
        """Return P(z = 1), of `shape`, differentiable in log_alpha."""

    def mean(self) -> Tensor:
        """Return E[z], of `shape`, differentiable in log_alpha."""
        return self._mean(self.log_alpha.float())

    @torch.no_grad()
    def clamp_(self) -> None:
        """Hold log_alpha in [log 1e-2, log 1e2]; to be called after each step."""
        self.log_alpha.clamp_(LOWEST, HIGHEST)

    @override
    def forward(self, x: Tensor, *, per_example: bool = False) -> Tensor:
        """Multiply by the gates, in the type of `x`.

        Args:
            x: (batch, *shape, ...).
            per_example: In training, whether each example gets a sample of its own.

        Raises:
            ValueError: `x` has another shape.
        """
        if tuple(x.shape[1 : 1 + len(self.shape)]) != self.shape:
            raise ValueError(
                f"`x` has the gates' shape {self.shape} behind its batch dimension; got {tuple(x.shape)}. Build the "
                f"gate with {type(self).__name__}(*x.shape[1:]), or with fewer of its dimensions."
            )
        if self.training:
            self.draw(examples=len(x) if per_example else None)
        values = self.values().to(x.dtype)
        return x * values.reshape(*values.shape, *[1] * (x.ndim - 1 - len(self.shape)))

    @override
    def extra_repr(self) -> str:
        """Tell the shape and the settings."""
        return ", ".join([*map(str, self.shape), *(f"{name}={value:.4g}" for name, value in self.settings.items())])

    @abstractmethod
    def _sample(self, log_alpha: Tensor, noise: Tensor) -> Tensor:
        """Return the sample of some noise, of its shape; float32 in and out."""

    @abstractmethod
    def _test_values(self, log_alpha: Tensor) -> Tensor:
        """Return the test gates without a guard; float32 in and out."""

    @abstractmethod
    def _mean(self, log_alpha: Tensor) -> Tensor:
        """Return E[z]; float32 in and out."""

    @staticmethod
    def _all_shut(values: Tensor) -> Tensor:
        return (values == 0).all()
