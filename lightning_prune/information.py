"""The Fisher information of a model's parameters, its diagonal, from the gradients of single examples."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.batches import taken_apart
from lightning_prune.errors import PruningError
from lightning_prune.likelihoods import Labels, Loss
from lightning_prune.per_example import PerExample, undisturbed


def fisher_information(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    labels: Labels = "data",
    most: int | None = None,
    at_once: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Estimate the diagonal of the Fisher information matrix.

        F_i = E_n[(d log p(y_n | x_n) / d theta_i)^2]

    The square is taken per example, before the mean: the square of a batch's mean gradient is another thing. With
    labels="data" the y_n are the data's (the empirical Fisher), with labels="model" each is drawn once from the
    model's own distribution (the Fisher itself, by Monte Carlo); van de Ven 2025, "On the Computation of the Fisher
    Information in Continual Learning" (arXiv 2502.11756), where they are called EMPIRICAL and SAMPLE.

    Args:
        model: The model, which runs in eval mode and is not changed; random numbers are where they were afterwards.
        batches: Batches (inputs, targets) as the model is trained on; see `find_groups` for the forms of inputs.
        loss: Takes outputs and targets and returns -log p of each example, of shape (n,); None takes cross-entropy
            for targets that are whole numbers, and half the squared error for real ones.
        labels: "data" or "model".
        most: So many batches are taken at most; None takes all.
        at_once: So many examples are differentiated together at most; None lets their gradients take 64 MiB.
        seed: Of the labels that are drawn.

    Returns:
        Name of each parameter that requires a gradient -> F of its shape, at least in single precision, >= 0.

    Raises:
        ValueError: The loss does not return one number for each example, or an argument is unknown.
        PruningError: There is no batch, or a gradient is not finite.

    Example:
        >>> model, inputs = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> targets = model(inputs).detach() + 1  # residuals of 1: F is the mean of x^2
        >>> fisher_information(model, [(inputs, targets)])["weight"]
        tensor([[ 5., 10.]])
    """
    with undisturbed(seed):
        examples = PerExample(model, loss, labels)
        squares = {name: _zeros_like(parameter) for name, parameter in examples.trained.items()}
        count = 0
        for batch in islice(batches, most):
            parts = taken_apart(examples.model, batch)
            for gradients in examples.gradients(parts, examples.trained, at_once):
                for name, gradient in gradients.items():
                    squares[name] += gradient.to(squares[name].dtype).square().sum(0)
            count += parts.size
    if not count:
        raise PruningError("There was no batch to estimate the Fisher information with; pass the training batches.")
    wrong = next((name for name, square in squares.items() if not square.isfinite().all()), None)
    if wrong is not None:
        raise PruningError(
            f"The Fisher information of {wrong!r} is not finite: the network's losses or gradients are not. See "
            "whether its training diverged, and whether the loss fits the targets."
        )
    return {name: square / count for name, square in squares.items()}


def _zeros_like(parameter: Tensor) -> Tensor:
    """Return zeros in single precision at least."""
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
