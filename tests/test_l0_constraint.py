"""The multiplier that holds gates to a target, on gates that are plain numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_prune.gates import Constraint

WAY, CLOSES = 3.8, -2.4


class Plant:
    """Gates that follow what pulls at them, as Adam would let them: by about `lr` a step, whatever the gradient is.

    Each resists with a gain of its own, which stands for the loss; the expected cost is the mean of sigmoids.
    """

    def __init__(self, gates: int, lr: float, spread: float = 0.1, seed: int = 0, start: float = 1.4) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.alpha = start + 0.01 * torch.randn(gates, generator=generator, dtype=torch.float64)
        self.gain = spread * torch.rand(gates, generator=generator, dtype=torch.float64) / gates
        self.lr, self.square = lr, torch.zeros(gates, dtype=torch.float64)

    def gone(self, margin: float = 0.0) -> Tensor:
        return (self.alpha <= CLOSES + margin).double().mean()

    def step(self, pull: Tensor) -> None:
        chance = torch.sigmoid(self.alpha + 1.6)
        slope = chance * (1 - chance)
        gradient = pull * slope / len(slope) - self.gain * slope
        self.square = 0.9 * self.square + 0.1 * gradient**2
        self.alpha = (self.alpha - self.lr * gradient / (self.square.sqrt() + 1e-12)).clamp(-4.6, 4.6)


def led(plant: Plant, constraint: Constraint, steps: int) -> list[float]:
    """Lead a plant for some steps; return what is gone after each."""
    found = []
    for _ in range(steps):
        plant.step(constraint.pull(plant.gone(constraint.margin)))
        found.append(float(plant.gone()))
    return found


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize(
    ("steps", "lr", "spread"), [(150, 0.1, 0.5), (400, 0.04, 0.5), (2000, 0.0076, 0.5), (2000, 0.0076, 0.02)]
)
def test_gates_end_where_they_were_asked_to(ratio: float, steps: int, lr: float, spread: float) -> None:
    plant, constraint = Plant(200, lr, spread), Constraint(ratio, steps, WAY)
    led(plant, constraint, steps)
    assert float(plant.gone()) == pytest.approx(ratio, abs=0.06)


def test_what_resists_least_goes() -> None:
    plant, constraint = Plant(200, 0.04, spread=0.5), Constraint(0.5, 400, WAY)
    led(plant, constraint, 400)
    closed = plant.alpha <= CLOSES
    assert plant.gain[closed].mean() < 0.7 * plant.gain[~closed].mean()


def test_what_has_closed_too_much_is_opened_again() -> None:
    plant, constraint = Plant(50, 0.1, start=-3.0), Constraint(0.4, 400, WAY)
    constraint.done = 200
    assert float(plant.gone()) == 1.0
    led(plant, constraint, 100)
    assert float(constraint.multiplier) < 0 or float(plant.gone()) < 0.7
    led(plant, constraint, 100)
    assert float(plant.gone()) < 0.6


def test_all_of_it_by_hand() -> None:
    """100 / steps of the gap is added each time, and 20 of it pulls at once; asked in full from half of the steps."""
    constraint = Constraint(0.5, 10, 4.0)
    assert (constraint.asked, constraint.margin) == (0.0, 2.0)
    assert float(constraint.pull(torch.tensor(0.0))) == 0.0
    assert constraint.asked == pytest.approx(0.1)
    assert constraint.margin == pytest.approx(2 * (1 - 1 / 9))
    assert float(constraint.pull(torch.tensor(0.0))) == pytest.approx(10 * 0.1 + 20 * 0.1)
    assert float(constraint.multiplier) == pytest.approx(1.0)
    assert float(constraint.pull(torch.tensor(0.3))) == pytest.approx(1.0 - 1.0 - 20 * 0.1)
    assert float(constraint.multiplier) == pytest.approx(0.0, abs=1e-6)
    constraint.done = 5
    assert constraint.asked == 0.5
    constraint.done = 9
    assert constraint.margin == 0.0
    constraint.done = 30
    assert (constraint.asked, constraint.margin) == (0.5, 0.0)


def test_gates_that_start_closed_have_no_margin() -> None:
    assert Constraint(0.5, 10, -1.0).margin == 0.0


def test_steps_that_nobody_knows_are_one() -> None:
    constraint = Constraint(0.5, 0, WAY)
    assert constraint.steps == 1
    assert torch.isfinite(constraint.pull(torch.tensor(0.2)))


def test_an_interrupted_training_goes_on() -> None:
    whole, plant = Constraint(0.5, 200, WAY), Plant(50, 0.1)
    led(plant, whole, 80)
    other = Constraint(0.5, 1, WAY)
    other.load_state_dict(whole.state_dict())
    alpha, square = plant.alpha.clone(), plant.square.clone()
    one = led(plant, whole, 120)
    plant.alpha, plant.square = alpha, square
    assert led(plant, other, 120) == one
    assert torch.equal(other.multiplier, whole.multiplier)
    assert other.state_dict().keys() == {"multiplier", "done", "steps"}
