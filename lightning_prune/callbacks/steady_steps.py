"""Steps whose length does not depend on the scale of the gradients, under any optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks.param_groups import at_last_moment, stand_in
from lightning_prune.cut import cut_tensor
from lightning_prune.errors import PruningError
from lightning_prune.surgery import Undo

_TRIED = 16
"""So many steps are tried out: RAdam rescales from its sixth step on."""

_LR = 1e-3
"""Learning rate of the steps that are tried out."""

_BETWEEN = 2**0.5
"""Between 1 and 2: an optimizer whose step grows by less with twice the gradient is one that rescales it."""


class SteadySteps:
    """Makes the steps of some parameters independent of the scale of their gradients.

    An optimizer that rescales gradients itself (Adam and its kin) is left alone. Under any other (SGD) the gradient g
    is replaced, right before each step and after clipping, by

        g / (sqrt(v / w) + eps),  v <- beta v + (1 - beta) g^2,  w <- beta w + (1 - beta),

    which is the denominator of Adam (Kingma and Ba, 2015): w is its bias correction, 1 - beta^t. Both are kept per
    element, so that they are cut with their parameter.

    Args:
        beta: Share of the running mean that a step keeps, in [0, 1).
        eps: What keeps the denominator from 0, above 0.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(self, beta: float = 0.999, eps: float = 1e-8) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"`beta` is the share of the running mean that a step keeps, in [0, 1); got {beta}.")
        if not eps > 0:
            raise ValueError(f"`eps` keeps the denominator from 0 and is above 0; got {eps}.")
        self.beta, self.eps = beta, eps
        self._parameters: list[Parameter] = []
        self._squares: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._handle: RemovableHandle | None = None

    def attach(self, optimizer: Optimizer, parameters: Sequence[Parameter]) -> None:
        """Look after the steps of parameters; what was loaded before is theirs.

        Args:
            optimizer: The optimizer, which has just these parameters in a param group; not a wrapper of Lightning's.
            parameters: Those whose steps are to be steady.

        Raises:
            ValueError: The optimizer has no such param group.
            PruningError: What was loaded belongs to other parameters.
            MisconfigurationException: The optimizer makes no steps on them that could be compared.
        """
        group = _group_of(optimizer, parameters)
        loaded = self._squares, self._weights
        self.detach()
        if is_adaptive(optimizer, group):
            return
        self._parameters = list(parameters)
        self._squares, self._weights = ([_zeros(each) for each in self._parameters] for _ in loaded)
        if loaded[0]:
            self.load_state_dict({"squares": loaded[0], "weights": loaded[1]})
        self._handle = at_last_moment(optimizer, self._before_step)

    def detach(self) -> None:
        """Leave steps as they are from now on, and forget the gradients."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self._parameters, self._squares, self._weights = [], [], []

    def follow(self, parameter: Parameter, kept: Mapping[int, Tensor]) -> Undo:
        """Cut what is known of a parameter that has just been cut.

        Args:
            parameter: The parameter, with its new shape. One that is not looked after is passed over.
            kept: Dimension -> the positions that stayed, of shape (k,).

        Returns:
            What takes it back.

        Raises:
            PruningError: The parameter does not have the shape that this gives.
        """
        place = next((place for place, each in enumerate(self._parameters) if each is parameter), None)
        if place is None:
            return lambda: None
        before = self._squares[place], self._weights[place]
        squares, weights = (cut_tensor(tensor, kept) for tensor in before)
        _check_shape(squares, parameter)
        self._squares[place], self._weights[place] = squares, weights

        def undo() -> None:
            self._squares[place], self._weights[place] = before

        return undo

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return v and w of each parameter, in the order in which they were attached."""
        kept = {"squares": self._squares, "weights": self._weights}
        return {key: [tensor.clone() for tensor in tensors] for key, tensors in kept.items()}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Take over v and w, for the parameters that are attached or else for those that will be.

        Raises:
            PruningError: They belong to other parameters.
        """
        squares, weights = ([tensor.clone() for tensor in state[key]] for key in ("squares", "weights"))
        if self._parameters:
            if not len(squares) == len(weights) == len(self._parameters):
                raise PruningError(
                    f"The state is one of {len(squares)} parameters, but {len(self._parameters)} are attached; load "
                    "it into the fit that it comes from."
                )
            for place, parameter in enumerate(self._parameters):
                _check_shape(squares[place], parameter)
                squares[place], weights[place] = (each[place].to(parameter.device) for each in (squares, weights))
        self._squares, self._weights = squares, weights

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        group = _group_of(optimizer, self._parameters)
        if "dampening" in group:
            # SGD sums gradients up to steps of lr / (1 - momentum); so damped, it takes their mean, and lr means the
            # same with any momentum. Schedulers may change the momentum, and Nesterov's wants no dampening.
            group.update(dampening=group["momentum"], nesterov=False)
        places = [place for place, parameter in enumerate(self._parameters) if parameter.grad is not None]
        gradients = [_gradient(self._parameters[place], self._squares[place]) for place in places]
        if not places:
            return
        # A GradScaler leaves it to fused optimizers to divide by its scale and to skip a step.
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if scale is not None:
            torch._foreach_div_(gradients, scale)
        self._observe(places, gradients, overflow)
        self._rescale(places, gradients)
        if scale is not None:
            torch._foreach_mul_(gradients, scale)
        for place, gradient in zip(places, gradients, strict=True):
            self._parameters[place].grad.copy_(gradient)  # type: ignore[union-attr]

    def _observe(self, places: Sequence[int], gradients: list[Tensor], overflow: Tensor | None) -> None:
        """Update v and w, but not where a step will be skipped."""
        means = [self._squares[place] for place in places] + [self._weights[place] for place in places]
        before = means if overflow is None else [mean.clone() for mean in means]
        seen = [*torch._foreach_mul(gradients, gradients), *map(torch.ones_like, gradients)]
        torch._foreach_lerp_(means, seen, 1 - self.beta)
        if overflow is not None:
            for mean, last in zip(means, before, strict=True):
                mean.copy_(torch.where(overflow > 0, last, mean))

    def _rescale(self, places: Sequence[int], gradients: list[Tensor]) -> None:
        squares, weights = ([kept[place] for place in places] for kept in (self._squares, self._weights))
        roots = torch._foreach_div(squares, weights)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, self.eps)
        torch._foreach_div_(gradients, roots)


def is_adaptive(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Tell whether an optimizer's steps are as long with twice the gradient, as Adam's are.

    A copy with one small parameter and no memory tries both; a learning rate of 0 (warm-up) is replaced.

    Args:
        optimizer: Not changed.
        group: Its param group whose options are used.

    Raises:
        MisconfigurationException: The optimizer does not step on a vector, or not without its closure.
    """
    try:
        once, twice = (_last_step(optimizer, group, gradient) for gradient in (0.01, 0.02))
    except Exception as error:  # whatever a foreign class does not allow
        raise MisconfigurationException(
            f"{type(optimizer).__name__} could not be tried out on a vector of parameters ({error}). Use an optimizer "
            "that takes vectors and needs no closure, such as SGD or AdamW."
        ) from error
    if not (isfinite(once) and isfinite(twice) and once > 0):
        raise MisconfigurationException(
            f"{type(optimizer).__name__} did not move a vector of parameters when it was tried out ({once}, {twice}), "
            "so it cannot be told whether it rescales gradients. Use SGD or AdamW."
        )
    return twice / once < _BETWEEN


def _last_step(optimizer: Optimizer, group: dict[str, Any], gradient: float) -> float:
    """Return how far the last step goes of some with a constant gradient."""
    twin = stand_in(optimizer, [group])
    lr, (parameter,) = twin.param_groups[0]["lr"], twin.param_groups[0]["params"]
    twin.param_groups[0]["lr"] = torch.full_like(lr, _LR) if isinstance(lr, Tensor) else _LR
    before = parameter.detach().clone()
    for _ in range(_TRIED):
        before.copy_(parameter.detach())
        parameter.grad = torch.full_like(parameter, gradient)
        twin.step()
    return float((parameter.detach() - before).abs().max())


def _group_of(optimizer: Optimizer, parameters: Sequence[Parameter]) -> dict[str, Any]:
    """Return the param group that holds just these parameters."""
    wanted = set(map(id, parameters))
    for group in optimizer.param_groups:
        if wanted and set(map(id, group["params"])) == wanted:
            return group
    raise ValueError(
        f"{type(optimizer).__name__} has no param group of just these {len(wanted)} parameters, whose options could be "
        "set; let them `join` it first."
    )


def _zeros(parameter: Tensor) -> Tensor:
    """Return zeros for a running mean, in float32 at least: bfloat16 cannot hold a thousandth of a change."""
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32), requires_grad=False)


def _gradient(parameter: Parameter, known: Tensor) -> Tensor:
    """Return a copy of a gradient in the precision of its running mean."""
    _check_shape(known, parameter)
    return torch.zeros_like(known) if parameter.grad is None else parameter.grad.to(known.dtype, copy=True)


def _check_shape(known: Tensor, parameter: Tensor) -> None:
    if known.shape != parameter.shape:
        raise PruningError(
            f"The mean squares of the gradients have the shape {tuple(known.shape)}, their parameter "
            f"{tuple(parameter.shape)}; tell `follow` of each cut, and load only the state of the same fit."
        )
