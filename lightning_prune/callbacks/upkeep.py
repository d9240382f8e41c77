"""Upkeep of masks: a pruned weight is exactly 0 after every optimizer step, whatever the optimizer remembers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)
from torch.utils.hooks import RemovableHandle

from lightning_prune.masks.held import Masks
from lightning_prune.tensors import named_parameters, unwrapped

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the size of a number: a mask of such bits clears the number whatever it was, NaN too, in one pass."""


_APART = {SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta, ASGD, Rprop}
"""Optimizers that treat each weight by itself: where gradient and memory are 0, a weight of 0 stays so."""


class Upkeep:
    """Keeps masked weights at exactly 0 while optimizers step.

    Gradients are masked before each step, so that clipping does not see what they were, and the optimizer's memory
    once, when masks change: with that, torch's optimizers that treat each weight by itself leave a 0 at 0, with
    momentum and weight decay too, and after their first step it is looked whether they did. All others (such as those
    that mix the weights of a matrix, perhaps not from the first step on) have their weights masked after each step,
    and so has every step of whose gradients nobody has told.
    """

    def __init__(self) -> None:
        self._bits: dict[Tensor, Tensor] = {}
        self._of: dict[int, tuple[int, list[tuple[Tensor, Tensor]]]] = {}
        self._trusted: dict[int, bool] = {}
        self._prepared: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def follow(self, masks: Masks, model: nn.Module) -> None:
        """Take over masks that a model holds, of which optimizers remember nothing any more."""
        weights = named_parameters(unwrapped(model))
        self._bits = {weights[name]: _bits(mask, weights[name]) for name, mask in masks.items()}
        self._of, self._trusted = {}, {}
        self._prepared.clear()

    def take(self, masks: Masks, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Take over masks that a model holds, and let its optimizers forget what they know of pruned weights."""
        self.follow(masks, model)
        weights = named_parameters(unwrapped(model))
        gone: dict[Tensor, Tensor] = {weights[name]: ~mask.to(weights[name].device) for name, mask in masks.items()}
        for optimizer in optimizers:
            for weight, state in optimizer.state.items():
                if isinstance(optimizer, LBFGS):
                    state.clear()  # one flat history of all parameters
                for value in state.values() if weight in gone else ():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        value.masked_fill_(gone[weight], 0)

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Look after each step of these optimizers."""
        self._handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]

    def leave(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._bits, self._of, self._trusted = {}, {}, {}
        self._prepared.clear()

    def before_step(self, optimizer: Optimizer) -> None:
        """Mask the gradients that an optimizer is about to use."""
        for weight, bits in self._masked_by(optimizer):
            if weight.grad is not None:
                _clear(weight.grad, bits)
        self._prepared.add(id(optimizer))

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        prepared = id(optimizer) in self._prepared
        self._prepared.discard(id(optimizer))
        if prepared and self._leaves_zeros(optimizer):
            return
        for weight, bits in self._masked_by(optimizer):
            _clear(weight.data, bits)  # unseen by autograd: a step that moved nothing must not spoil a graph

    def _leaves_zeros(self, optimizer: Optimizer) -> bool:
        """Tell whether an optimizer leaves a 0 at 0; looked at after the first step with these masks."""
        if id(optimizer) not in self._trusted:
            left = type(optimizer) not in _APART or any(_left(*masked) for masked in self._masked_by(optimizer))
            self._trusted[id(optimizer)] = not left
        return self._trusted[id(optimizer)]

    def _masked_by(self, optimizer: Optimizer) -> Sequence[tuple[Tensor, Tensor]]:
        """Return the masked weights that an optimizer holds, with their bits."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known, masked = self._of.get(id(optimizer), (-1, []))
        if known != size:
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            masked = [(weight, self._bits[weight]) for weight in held if weight in self._bits]
            self._of[id(optimizer)] = (size, masked)
        return masked


def _bits(mask: Tensor, weight: Tensor) -> Tensor:
    """Return ones in every bit of what stays, and zeros in what goes, in words of the weight's size."""
    numbers = _numbers(weight)
    mask = mask.to(weight.device)
    spread = mask.unsqueeze(-1).expand_as(numbers) if weight.is_complex() else mask
    return spread.to(_WORDS[numbers.itemsize]).neg_()


def _numbers(tensor: Tensor) -> Tensor:
    """Return a view of real numbers: two of each complex one."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()


def _clear(tensor: Tensor, bits: Tensor) -> None:
    _numbers(tensor).view(bits.dtype).bitwise_and_(bits)


def _left(weight: Tensor, bits: Tensor) -> bool:
    """Tell whether a pruned weight is not 0."""
    return bool((_numbers(weight) != 0).logical_and_(bits == 0).any())
