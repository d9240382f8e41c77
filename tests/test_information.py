"""The Fisher information is the mean of squared gradients of single examples, and nothing of the model changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.batches import taken_apart
from lightning_prune.errors import PruningError
from lightning_prune.information import fisher_information
from lightning_prune.likelihoods import Categorical, Gaussian
from lightning_prune.per_example import PerExample

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


class Recurrent(nn.Module):
    """Holds its weights in a list as well, and has no batching rule."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(inputs)[0][:, -1])


class Looking(nn.Module):
    """Looks at values, which vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 5), nn.Linear(3, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.one(inputs) if inputs.sum().item() > 0 else self.other(inputs)


class Counting(nn.Module):
    """Writes to a buffer in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 5), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += 1
        self.calls += 1
        return self.layer(inputs)


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(64, 5))


def attention() -> nn.Sequential:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(24, 5))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (convolutional, (1, 6, 6)),
    "attention": (attention, (3, 8)),
    "recurrent": (Recurrent, (7, 3)),
    "looking": (Looking, (3,)),
}


def data(shape: tuple[int, ...], count: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(count, *shape, dtype=torch.float64), torch.randint(5, (count,))


def by_hand(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The definition, one example after the other."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    squares = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for one, target in zip(inputs.split(1), targets.split(1), strict=True):
        found = torch.autograd.grad(loss(model(one), target).sum(), list(model.parameters()), allow_unused=True)
        for name, gradient in zip(squares, found, strict=True):
            squares[name] += 0 if gradient is None else gradient.square() / len(inputs)
    for module, mode in modes.items():
        module.training = mode
    return squares


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> bool:
    return found.keys() == expected.keys() and all(
        bool((found[name] - expected[name]).abs().max() <= tolerance) for name in expected
    )


@pytest.mark.parametrize("at_once", [None, 3])
@pytest.mark.parametrize(("make", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_it_is_that_of_the_loop(make: Callable[[], nn.Module], shape: tuple[int, ...], at_once: int | None) -> None:
    model = make().double()
    batches = [data(shape), data(shape, 3)]
    found = fisher_information(model, batches, at_once=at_once)
    whole = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    assert close(found, by_hand(model, *whole, F.cross_entropy))
    assert all(bool(each.any()) for each in found.values())


def test_it_is_that_of_torch_func() -> None:
    model, (inputs, targets) = convolutional().double().eval(), data((1, 6, 6))
    parameters = dict(model.named_parameters())

    def loss(own: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, own, (one[None],)), target[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, inputs, targets)
    expected = {name: gradient.square().mean(0).detach() for name, gradient in each.items()}
    assert close(fisher_information(model, [(inputs, targets)]), expected)


def test_it_is_no_square_of_a_mean() -> None:
    """Two examples whose gradients cancel have information, and the square of their mean has none."""
    model = nn.Linear(1, 1, bias=False).double()
    inputs = torch.ones(2, 1, dtype=torch.float64)
    targets = model(inputs).detach() + torch.tensor([[2.0], [-2.0]])
    assert float(fisher_information(model, [(inputs, targets)])["weight"]) == pytest.approx(4.0, abs=1e-12)


def test_vmap_and_loop_take_what_they_can(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lightning_prune")
    fisher_information(convolutional().double(), [data((1, 6, 6))])
    assert not caplog.messages
    fisher_information(Looking().double(), [data((3,)), data((3,))])
    assert len(caplog.messages) == 1
    assert "vmap cannot take Looking" in caplog.messages[0]


def test_several_inputs_positions_and_other_losses() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.layer(left + right).movedim(-1, 1)  # (n, classes, positions)

    model = Two().double()
    left, right = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    targets = torch.randint(4, (6, 5))
    targets[0, 0] = -100
    found = fisher_information(model, [(left, right, targets)])
    squares = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for at in range(6):
        loss = F.cross_entropy(model(left[at : at + 1], right[at : at + 1]), targets[at : at + 1], reduction="sum")
        for name, gradient in zip(squares, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            squares[name] += gradient.square() / 6
    assert close(found, squares)


def test_a_gaussian_model_has_the_mean_of_squares() -> None:
    """With labels of the model E[(r x)^2] = x^2; the more draws, the nearer."""
    model = nn.Linear(3, 1, bias=False).double()
    inputs = torch.randn(40, 3, dtype=torch.float64)
    many = inputs.repeat(2000, 1)
    targets = torch.zeros(len(many), 1, dtype=torch.float64)  # not looked at
    found = fisher_information(model, [(many, targets)], labels="model")["weight"][0]
    assert torch.allclose(found, inputs.square().mean(0), rtol=0.03)


def test_labels_of_the_model_are_drawn_from_its_softmax() -> None:
    """F of the logits' biases is p (1 - p)."""
    model = nn.Linear(2, 3).double()
    inputs = torch.zeros(60_000, 2, dtype=torch.float64)
    found = fisher_information(model, [(inputs, torch.zeros(60_000, dtype=torch.long))], labels="model")["bias"]
    chances = model.bias.detach().softmax(0)
    assert torch.allclose(found, chances * (1 - chances), rtol=0.03)
    again = fisher_information(model, [(inputs, torch.ones(60_000, dtype=torch.long))], labels="model")["bias"]
    assert torch.equal(found, again)
    other = fisher_information(model, [(inputs, torch.ones(60_000).long())], labels="model", seed=1)["bias"]
    assert not torch.equal(found, other)


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize(("make", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_nothing_changes(make: Callable[[], nn.Module], shape: tuple[int, ...], labels: Any) -> None:
    model, batch = make().double(), data(shape)
    part = next(model.children())
    model.train()
    part.eval()
    part.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    found = fisher_information(model, [batch], labels=labels)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not part.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("labels", ["data", "model"])
def test_what_a_forward_writes_down_is_undone(labels: Any) -> None:
    model = Counting().double()
    fisher_information(model, [data((3,))], labels=labels)
    assert float(model.seen) == model.calls == 0


def test_it_is_taken_without_gradients_around_too() -> None:
    model, batch = convolutional().double(), data((1, 6, 6))
    expected = fisher_information(model, [batch])
    with torch.no_grad():
        assert close(fisher_information(model, [batch]), expected, 0.0)
    with torch.inference_mode():
        assert close(fisher_information(model, [batch]), expected, 0.0)


def test_some_batches_are_enough() -> None:
    model, batches = Looking().double(), [data((3,)) for _ in range(3)]
    assert close(fisher_information(model, batches, most=2), fisher_information(model, batches[:2]), 0.0)


def test_half_precision_is_summed_in_single() -> None:
    model = nn.Linear(3, 5).bfloat16()
    found = fisher_information(model, [(torch.randn(4, 3).bfloat16(), torch.randint(5, (4,)))])
    assert {each.dtype for each in found.values()} == {torch.float32}


LOSSES = {
    "mean": F.cross_entropy,
    "positions": lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none")[:, None],
    "number": lambda outputs, targets: 1.0,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_has_one_number_for_each_example(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"`loss` returns one number for each example.*got.*reduction='none'"):
        fisher_information(Looking().double(), [data((3,))], loss=loss)


def test_bad_input() -> None:
    model, (inputs, targets) = Looking().double(), data((3,))
    with pytest.raises(ValueError, match=r"`labels` is one of 'data', 'model'; got 'all'"):
        fisher_information(model, [(inputs, targets)], labels="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels='model' draws targets.*take labels='data'"):
        fisher_information(model, [(inputs, targets)], loss=F.cross_entropy, labels="model")
    with pytest.raises(PruningError, match="There was no batch"):
        fisher_information(model, [])
    with pytest.raises(ValueError, match=r"`loss` None is for pairs .*got targets bool of shape \(7,\)"):
        fisher_information(model, [(inputs, targets > 2)])
    with pytest.raises(ValueError, match=r"batch of 4 examples holds a tensor of shape \(7, 3\)"):
        fisher_information(model, [(inputs, targets[:4])])


@pytest.mark.parametrize(("labels", "message"), [("data", "of 'one.weight' is not finite"), ("model", "no labels to")])
def test_a_network_that_diverged(labels: Any, message: str) -> None:
    model, (inputs, targets) = Looking().double(), data((3,))
    model.one.weight.data.fill_(float("nan"))
    with pytest.raises(PruningError, match=message):
        fisher_information(model, [(inputs.abs(), targets)], labels=labels)


def test_shapes_must_go_together() -> None:
    logits = torch.randn(4, 5)
    with pytest.raises(ValueError, match=r"Categorical takes class logits.*\(4, 5\) and int64 of shape \(4, 5\)"):
        Categorical()(logits, torch.zeros(4, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"Gaussian takes outputs and targets of one shape.*\(4, 5\) and float32"):
        Gaussian()(logits, torch.zeros(4))
    with pytest.raises(ValueError, match="got of type tuple"):
        Categorical()((logits,), torch.zeros(4))


def test_gradients_come_in_chunks() -> None:
    model, batch = Looking().double(), data((3,))
    examples = PerExample(nn.Linear(3, 5).double())
    sizes = [len(each["weight"]) for each in examples.gradients(taken_apart(model, batch), examples.trained, 3)]
    assert sizes == [3, 3, 1]
