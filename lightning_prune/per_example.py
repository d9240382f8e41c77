"""Gradients of the losses of single examples, with the model in eval mode and as it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.batches import Batch
from lightning_prune.chance import random_state_kept
from lightning_prune.errors import PruningError
from lightning_prune.inputs import tensors_in
from lightning_prune.likelihoods import Labels, Likelihood, Loss, check_labels, likelihood_for
from lightning_prune.tensors import named_parameters, named_tensors, swapped, unwrapped

log = logging.getLogger(__name__)

Tensors: TypeAlias = Mapping[str, Tensor]
"""Name of a parameter -> a tensor that goes with it."""

_AT_ONCE = 2**24
"""So many numbers the gradients of the examples that are taken together may have: 64 MiB."""


_NOT_FINITE = (
    "The network's outputs are not finite, so there are no labels to draw from them. See whether its training "
    "diverged; a penalty whose strength is too large for the learning rate does that."
)


class PerExample:
    """The losses of single examples as functions of the parameters.

    The model runs in eval mode: in train mode BatchNorm lets each example's loss depend on all others, and there are no
    gradients of single examples. Parameters, buffers, modes and gradients of the model are never changed.

    Args:
        model: The model.
        loss: Takes outputs and targets and returns one number for each example; None takes `Categorical()` for
            targets that are whole numbers, `Gaussian()` for real ones.
        labels: "data" takes the targets of the data, "model" draws them from the model's own distribution.

    Raises:
        ValueError: `labels` is unknown, or does not go with the loss.
    """

    def __init__(self, model: nn.Module, loss: Loss | None = None, labels: Labels = "data") -> None:
        check_labels(labels, loss)
        self.model = unwrapped(model)
        self.loss = loss
        self.labels = labels
        parameters = named_parameters(self.model)
        self.parameters = {name: each.detach() for name, each in parameters.items() if each.is_floating_point()}
        self.trained = {name: self.parameters[name] for name in self.parameters if parameters[name].requires_grad}
        self._buffers = {
            name: tensor.clone() for name, tensor in named_tensors(self.model).items() if name not in parameters
        }
        self._together = True

    def gradients(self, batch: Batch, names: Tensors, most: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Yield the gradients of all examples, some examples at a time: name -> (examples, *shape).

        They come from `torch.func.vmap`, or where that fails (an operation without a batching rule, a forward that
        looks at values) one after the other.

        Args:
            batch: The examples.
            names: The parameters, by name.
            most: So many examples at a time at most; None lets their gradients take 64 MiB.

        Raises:
            ValueError: The loss does not return one number for each example, or a tensor has no entry for each.
        """
        _check_sizes(batch)
        self.rule(batch)
        size = sum(parameter.numel() for parameter in names.values())
        most = most or max(_AT_ONCE // max(size, 1), 1)
        for begin in range(0, batch.size, most):
            part = self.with_labels(batch.part(begin, begin + most))
            yield from self._vmapped(part, names) or self._one_by_one(part, names)

    def with_labels(self, batch: Batch) -> Batch:
        """Return a batch with drawn targets, if that is what labels are."""
        if self.labels == "data":
            return batch
        with torch.no_grad():
            outputs = self.run(batch, self.parameters)
        return self.drawn(batch, outputs)

    def drawn(self, batch: Batch, outputs: Any) -> Batch:
        """Return a batch with targets drawn from what the model's outputs stand for.

        Raises:
            PruningError: The outputs are not finite.
        """
        rule = self.rule(batch)
        assert isinstance(rule, Likelihood)
        if not all(bool(each.isfinite().all()) for each in tensors_in(outputs)):
            raise PruningError(_NOT_FINITE)
        return Batch(batch.inputs, rule.draw(outputs), batch.size)

    def rule(self, batch: Batch) -> Loss:
        """Return the loss, or what goes with the targets."""
        return self.loss or likelihood_for(batch.targets)

    def run(self, batch: Batch, parameters: Tensors) -> Any:
        """Return the outputs of the model with other parameters."""
        # not `functional_call`: recurrent layers hold their weights in a list as well
        with swapped(self.model, {**self._buffers, **parameters}):
            return batch.inputs.call(self.model)

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each example, of shape (n,).

        Raises:
            ValueError: The loss returns something else.
        """
        loss = self.rule(batch)
        found: Any = loss(outputs, batch.targets)
        if not isinstance(found, Tensor) or found.shape != (batch.size,):
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(
                f"`loss` returns one number for each example, of shape ({batch.size},) here; got {got} from {loss!r}. "
                "Pass one with reduction='none', summed over all dimensions but the first."
            )
        return found

    def _vmapped(self, batch: Batch, names: Tensors) -> list[dict[str, Tensor]]:
        """Return the gradients of all examples in a list of one; of none where vmap cannot take the model."""
        if not self._together:
            return []
        tensors = list(tensors_in((batch.inputs, batch.targets)))

        def loss(parameters: Tensors, *example: Tensor) -> Tensor:
            left = iter(example)
            one = batch.map(lambda _: next(left).unsqueeze(0))
            return self.losses(self.run(one, parameters), one)[0]

        try:
            over = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(tensors)))
            found: dict[str, Tensor] = over(dict(names), *tensors)
            return [found]
        except Exception as error:  # whatever is wrong with the model itself comes up again, one by one
            self._together = False
            log.info("vmap cannot take %s, one example at a time then: %s", type(self.model).__name__, error)
            return []

    def _one_by_one(self, batch: Batch, names: Tensors) -> Iterator[dict[str, Tensor]]:
        own = {name: parameter.detach().requires_grad_() for name, parameter in names.items()}
        for at in range(batch.size):
            one = batch.part(at, at + 1)
            with torch.enable_grad():
                loss = self.losses(self.run(one, own), one)[0]
                found = _gradients(loss, list(own.values()))
            yield {name: gradient.unsqueeze(0) for name, gradient in zip(own, found, strict=True)}


def _gradients(loss: Tensor, parameters: list[Tensor]) -> Sequence[Tensor]:
    """Return the gradients of a loss; zeros where it does not depend on a parameter."""
    if not loss.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


@contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Let gradients be taken whatever is switched off around, with random numbers of their own."""
    with random_state_kept(), torch.inference_mode(False):
        torch.manual_seed(seed)
        yield


def _check_sizes(batch: Batch) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors_in((batch.inputs, batch.targets))]
    wrong = next((shape for shape in shapes if shape[:1] != (batch.size,)), None)
    if wrong is not None:
        raise ValueError(
            f"A batch of {batch.size} examples holds a tensor of shape {wrong}, which has not an entry for each. Let "
            "all tensors of a batch have the examples along dimension 0."
        )
