"""The Fisher-Rao norm: how much a network's loss feels it when all parameters grow by the same factor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_prune.batches import Batch, taken_apart
from lightning_prune.inputs import ExampleInputs
from lightning_prune.likelihoods import Labels, Loss, check_labels
from lightning_prune.per_example import PerExample, undisturbed


class FisherRaoNorm(Metric):
    """The squared Fisher-Rao norm of a network.

        ||theta||_fr^2 = theta^T I(theta) theta = E_n[<theta, grad_theta l_n>^2]

    Liang et al. 2017, "Fisher-Rao Metric, Geometry, and Complexity of Neural Networks" (arXiv 1711.01530). The square
    is taken per example. In a ReLU net without biases of L weight layers it is L^2 E_n[<dl_n/df, f>^2]: weights that
    make the same function have the same norm, which is not so for the diagonal of I alone.

    The inner product is the loss's derivative in the direction theta, by one forward pass in forward mode; where an
    operation has none, from the gradients of single examples. The network runs in eval mode and is not changed.

    Args:
        loss: Takes outputs and targets and returns -log p of each example, of shape (n,); None takes cross-entropy
            for targets that are whole numbers, and half the squared error for real ones.
        labels: "data" takes the targets of the data (the empirical Fisher), "model" draws them from the network's own
            distribution (the Fisher itself).
        seed: Of the labels that are drawn.
        **settings: Those of `torchmetrics.Metric`.

    Raises:
        ValueError: `labels` is unknown, or does not go with the loss.

    Example:
        >>> model, inputs = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> _ = model.weight.data.fill_(1.0)  # outputs 3 and 7, residuals 1
        >>> metric = FisherRaoNorm()
        >>> metric.update(model, inputs, torch.tensor([[2.0], [6.0]]))
        >>> metric.compute()
        tensor(29.)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    total: Tensor
    count: Tensor

    def __init__(self, loss: Loss | None = None, *, labels: Labels = "data", seed: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        check_labels(labels, loss)
        self.loss = loss
        self.labels = labels
        self.seed = seed
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @override
    def update(self, model: nn.Module, inputs: ExampleInputs, targets: Any) -> None:
        """See a batch.

        Args:
            model: The network.
            inputs: What its forward is called with; see `find_groups` for the forms.
            targets: What the loss compares its outputs with; shape (n, ...).
        """
        with undisturbed(self.seed + int(self.count)):
            examples = PerExample(model, self.loss, self.labels)
            batch = taken_apart(examples.model, (inputs, targets))
            products = _along_parameters(examples, batch)
        self.total = self.total + products.square().sum().to(self.total.device)
        self.count = self.count + batch.size

    @override
    def compute(self) -> Tensor:
        """Return the mean over all examples, >= 0."""
        return self.total / self.count


def _along_parameters(examples: PerExample, batch: Batch) -> Tensor:
    """Return <theta, grad_theta l_n> of each example, of shape (n,)."""
    theta = examples.parameters
    try:
        outputs, slopes = _jvp(lambda moved: examples.run(batch, moved), theta, theta)
    except (RuntimeError, NotImplementedError, TypeError):  # no rule for the forward mode
        return torch.cat([_product(each, theta) for each in examples.gradients(batch, theta)])
    if examples.labels == "model":
        batch = examples.drawn(batch, outputs)
    products: Tensor = _jvp(lambda moved: examples.losses(moved, batch), outputs, slopes)[1]
    return products


def _jvp(function: Callable[[Any], Any], place: Any, direction: Any) -> tuple[Any, Any]:
    """Return a function's value and its derivative in a direction."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch.jit.script` is deprecated")  # torch calls it at the first jvp
        value, slope, *_ = torch.func.jvp(function, (place,), (direction,))
    return value, slope


def _product(gradients: dict[str, Tensor], theta: dict[str, Tensor]) -> Tensor:
    each = [(gradient * theta[name]).reshape(len(gradient), -1).sum(1) for name, gradient in gradients.items()]
    return torch.stack(each).sum(0)
