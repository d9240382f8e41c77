"""A gate that is 0 or 1, and learns its probability without a derivative of the gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from typing_extensions import Self, override

from lightning_prune.errors import PruningError
from lightning_prune.estimators import check_temperature, logistic_noise, relax
from lightning_prune.layers.gate import Gate


class Bernoulli(Gate):
    """The gate b = 1[log_alpha + noise > 0], with P(b = 1) = sigmoid(log_alpha); test gate: 1[log_alpha >= 0].

    No gradient passes through such a step. After the backward pass, `take` adds the RELAX estimate (Grathwohl et al.
    2018, arXiv 1711.00123) of the gradient of the expected loss to log_alpha.grad. Its control variate is
    c(z) = offset + sum_i slope_i sigmoid(z_i / temperature). Slope follows d loss / d b and offset what slope leaves of
    the loss, as running means over earlier draws: whatever they are, the estimate is unbiased.

        gate.draw()
        loss = ...  # multiplies by gate.values()
        loss.backward()
        gate.take(loss)

    Where all gates are shut at test time, a guard leaves the best one E[b] = sigmoid(log_alpha), which is not 0 or 1.

    Args:
        shape: See `Gate`.
        drop_rate: See `Gate`; P(b = 0) at first.
        guarded: See `Gate`.
        temperature: Of the control variate, above 0.
        momentum: Of slope and offset, in [0, 1).

    Raises:
        ValueError: An argument is out of range.
    """

    second_noise: Tensor
    slope: Tensor
    offset: Tensor

    def __init__(
        self,
        *shape: int,
        drop_rate: float = 0.5,
        guarded: bool = True,
        temperature: float = 0.5,
        momentum: float = 0.9,
    ) -> None:
        check_temperature(temperature)
        if not 0 <= momentum < 1:
            raise ValueError(
                f"`momentum` of the control variate's running means is in [0, 1); got {momentum}. Try 0.9 to 0.99."
            )
        super().__init__(*shape, drop_rate=drop_rate, guarded=guarded)
        self.temperature = temperature
        self.momentum = momentum
        self.second_noise = torch.zeros(shape, dtype=torch.float32)
        self.register_buffer("slope", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("offset", torch.zeros((), dtype=torch.float32))
        self._drawn: Tensor | None = None
        self._drawn_from = self.noise

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.second_noise = fn(self.second_noise)
        return self

    @property
    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "temperature": self.temperature, "momentum": self.momentum}

    @property
    def sample(self) -> Tensor:
        """The current draw b, 0 or 1, of `shape`: a leaf, whose grad a backward pass fills."""
        if self._drawn is None or self._drawn_from is not self.noise:
            # noise is another tensor after a draw, a move to another device, or a cut
            drawn = (self.log_alpha.detach().float() + self.noise.float() > 0).float()
            self._drawn, self._drawn_from = drawn.requires_grad_(), self.noise
        return self._drawn

    @override
    def draw(self, generator: Generator | None = None, examples: int | None = None) -> None:
        """Draw both noises, and with them a new sample.

        Raises:
            ValueError: `examples` is not None: `take` needs one loss for each sample.
        """
        if examples is not None:
            raise ValueError(
                f"`examples` must be None, as a loss of the whole batch cannot tell one example's 0/1 gates from "
                f"another's; got {examples}. Share one sample in the batch, or take HardConcrete gates."
            )
        super().draw(generator)
        self.second_noise = logistic_noise(*self.shape, generator=generator).to(self.log_alpha.device)

    @torch.no_grad()
    def take(self, loss: Tensor) -> None:
        """Add the estimate of d E[loss] / d log_alpha to log_alpha.grad; once for each draw, after the backward pass.

        Slope and offset move afterwards, so that they do not depend on the sample that they correct. On several ranks
        that draw alike, average the loss and `sample.grad` before, and every rank adds the same; where ranks draw on
        their own, average log_alpha.grad after. Of a scaled loss (GradScaler), unscale `sample.grad` before.

        Args:
            loss: What was backpropagated, one number; of several backward passes, their sum.

        Raises:
            ValueError: `loss` is not one number.
            PruningError: No gradient has reached the sample.
        """
        if loss.numel() != 1:
            raise ValueError(f"`loss` is one number; got shape {tuple(loss.shape)}. Give what was backpropagated.")
        sample = self.sample
        if sample.grad is None:
            raise PruningError(
                "No gradient has reached this draw of the gates. Call `draw`, multiply by `values(training=True)`, "
                "call `loss.backward()`, and then `take(loss)`, once for each draw."
            )
        loss = loss.detach().reshape(()).to(self.log_alpha.device, torch.float32)
        self._add_to_gradient(self._estimate(loss))
        self._follow(loss, sample.detach(), sample.grad)
        sample.grad = None

    def _estimate(self, loss: Tensor) -> Tensor:
        slope, offset = self.slope.float().flatten(), self.offset.float()

        def control(z: Tensor) -> Tensor:
            return offset + (slope * (z / self.temperature).sigmoid()).sum(-1)

        noises = (self.noise.float().flatten(), self.second_noise.float().flatten())
        return relax(lambda _: loss, control, self.log_alpha.float().flatten(), noises=noises).view(self.shape)

    def _add_to_gradient(self, estimate: Tensor) -> None:
        estimate = estimate.to(self.log_alpha.dtype)
        if self.log_alpha.grad is None:
            self.log_alpha.grad = estimate
        else:
            self.log_alpha.grad += estimate

    def _follow(self, loss: Tensor, sample: Tensor, gradient: Tensor) -> None:
        left = loss - (self.slope * sample).sum()
        for mean, value in ((self.offset, left), (self.slope, gradient)):
            # a loss that overflows once must not stay in the running means
            target = torch.where(value.isfinite(), value.to(mean.dtype), mean)
            mean.lerp_(target, 1 - self.momentum)

    @property
    @override
    def closes_at(self) -> float:
        return 0.0

    @override
    def open_probability(self) -> Tensor:
        """Return P(b != 0) = sigmoid(log_alpha), of `shape`."""
        return self.mean()

    @override
    def full_probability(self) -> Tensor:
        """Return P(b = 1) = sigmoid(log_alpha), of `shape`."""
        return self.mean()

    @override
    def _sample(self, log_alpha: Tensor, noise: Tensor) -> Tensor:
        # DDP waits for a gradient of each parameter
        return self.sample + 0 * log_alpha

    @override
    def _test_values(self, log_alpha: Tensor) -> Tensor:
        return (log_alpha >= 0).float()

    @override
    def _mean(self, log_alpha: Tensor) -> Tensor:
        return log_alpha.sigmoid()
