"""Estimates of how an expected loss changes with the probabilities of binary gates.

A gate b is 1 with probability sigmoid(log_alpha). Wanted is d E_b[f(b)] / d log_alpha for any f, also one that knows no
derivative. Throughout, the gates lie along the last dimension, and f maps (..., gates) to (...).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

EPS = 1e-6
"""Uniform noise is drawn from [EPS, 1 - EPS], so that its logits are finite."""

Loss: TypeAlias = Callable[[Tensor], Tensor]
"""Maps gates (..., gates) to losses (...)."""

_MOST_GATES = 20


def logistic_noise(*shape: int, generator: Generator | None = None) -> Tensor:
    """Draw log u - log(1 - u) with u uniform in [EPS, 1 - EPS]; always on the CPU, in float32.

    Args:
        shape: Of the noise.
        generator: A CPU generator; None takes torch's own.
    """
    uniform = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(EPS, 1 - EPS, generator=generator)
    return uniform.log() - (-uniform).log1p()


def reinforce(
    f: Loss,
    log_alpha: Tensor,
    *,
    baseline: float = 0.0,
    noise: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Estimate by (f(b) - baseline) d log p(b) / d log_alpha, with d log p(b) / d log_alpha = b - sigmoid(log_alpha).

    Williams 1992. Unbiased for any baseline that does not depend on b.

    Args:
        f: The loss.
        log_alpha: Logits of P(b = 1), (gates,) or of the noise's shape.
        baseline: What is taken off the loss.
        noise: As `logistic_noise` draws it, (..., gates): one estimate for each draw. None draws one.
        generator: Draws the noise.

    Returns:
        Of the noise's shape.
    """
    if noise is None:
        noise = logistic_noise(*log_alpha.shape, generator=generator).to(log_alpha)
    with torch.no_grad():
        gates = (log_alpha + noise > 0).to(log_alpha)
        return (f(gates) - baseline).unsqueeze(-1) * (gates - log_alpha.sigmoid())


def rebar(
    f: Loss,
    log_alpha: Tensor,
    *,
    eta: float = 1.0,
    temperature: float = 0.5,
    noises: tuple[Tensor, Tensor] | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Estimate by RELAX, with c(z) = eta f(sigmoid(z / temperature)) as control variate.

    Tucker et al. 2017 ("REBAR", arXiv 1703.07370, section 3.1). Unbiased for any eta and temperature.

    Args:
        f: The loss; differentiable, also between 0 and 1.
        log_alpha: Logits of P(b = 1), (gates,) or of the noises' shape.
        eta: Strength of the control variate; 0 is REINFORCE.
        temperature: Above 0; the lower, the closer the relaxed gates come to 0 and 1.
        noises: Two, as `relax` takes them.
        generator: Draws the noises.

    Returns:
        Of the noises' shape.

    Raises:
        ValueError: `temperature` is not positive.
    """
    check_temperature(temperature)

    def control(z: Tensor) -> Tensor:
        return eta * f((z / temperature).sigmoid())

    return relax(f, control, log_alpha, noises=noises, generator=generator)


def relax(
    f: Loss,
    control: Loss,
    log_alpha: Tensor,
    *,
    noises: tuple[Tensor, Tensor] | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Estimate by (f(b) - c(z~)) d log p(b) / d log_alpha + d c(z) / d log_alpha - d c(z~) / d log_alpha.

    z = log_alpha + noise, b = 1[z > 0], and z~ is drawn anew from what z can be given b. Grathwohl et al. 2018
    ("RELAX", arXiv 1711.00123, section 3.2). Unbiased for any c that does not depend on the noises; the closer c(z~) is
    to f(b), the lower the variance.

    Args:
        f: The loss. Only f(b) is asked for, without gradient.
        control: c, the control variate: maps relaxed logits z (..., gates) to (...), differentiable in z.
        log_alpha: Logits of P(b = 1), (gates,) or of the noises' shape.
        noises: Two independent ones as `logistic_noise` draws them, (..., gates), the second for z~; one estimate for
            each draw. None draws one.
        generator: Draws the noises.

    Returns:
        Of the noises' shape.
    """
    if noises is None:
        noise, second = (logistic_noise(*log_alpha.shape, generator=generator).to(log_alpha) for _ in range(2))
    else:
        noise, second = noises
    with torch.enable_grad():
        logits = log_alpha.detach().expand_as(noise).clone().requires_grad_()
        relaxed = logits + noise
        gates = (relaxed.detach() > 0).to(logits)
        at_relaxed, at_given = control(relaxed), control(relaxed_given(gates, logits, second))
        (through_control,) = torch.autograd.grad((at_relaxed - at_given).sum(), logits)
    with torch.no_grad():
        return (f(gates) - at_given).unsqueeze(-1) * (gates - logits.sigmoid()) + through_control


def relaxed_given(gates: Tensor, log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Draw z~ from what z = log_alpha + log u - log(1 - u) can be where 1[z > 0] is known.

    With theta = sigmoid(log_alpha) and v uniform, u~ = v theta + 1 - theta where the gate is 1, and v (1 - theta) where
    it is 0 (Tucker et al. 2017, appendix). In logits, which lose nothing where theta is near 0 or 1, with s = +1 or -1:
    z~ = s softplus(s noise + softplus(s log_alpha)).

    Args:
        gates: b, 0 or 1.
        log_alpha: Logits of P(b = 1).
        noise: log v - log(1 - v).
    """
    sign = 2 * gates - 1
    return sign * F.softplus(sign * noise + F.softplus(sign * log_alpha))


def enumerated(f: Loss, log_alpha: Tensor) -> Tensor:
    """Return the gradient itself, sum_b f(b) p(b) (b - sigmoid(log_alpha)), over all 2^gates settings.

    Args:
        f: The loss.
        log_alpha: Logits of P(b = 1), (gates,), at most 20 of them.

    Raises:
        ValueError: `log_alpha` is no vector, or too long.

    >>> enumerated(lambda gates: 3 * gates.sum(-1), torch.zeros(2))
    tensor([0.7500, 0.7500])
    """
    if log_alpha.ndim != 1 or len(log_alpha) > _MOST_GATES:
        raise ValueError(
            f"`log_alpha` is a vector of at most {_MOST_GATES} gates, as all 2^gates settings are gone through; got "
            f"shape {tuple(log_alpha.shape)}. `relax` estimates the gradient of more."
        )
    with torch.no_grad():
        gates = torch.tensor(list(product((0.0, 1.0), repeat=len(log_alpha)))).to(log_alpha)
        log_probability = -F.softplus((1 - 2 * gates) * log_alpha).sum(-1)
        return ((f(gates) * log_probability.exp()).unsqueeze(-1) * (gates - log_alpha.sigmoid())).sum(0)


def check_temperature(temperature: float) -> None:
    """Raise ValueError where a temperature is not positive."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` of the relaxed gates is above 0; got {temperature}. REBAR starts from 0.5.")
