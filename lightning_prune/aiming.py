"""Aims at measured milliseconds: the network that a plan would leave is put on the clock beside the one there is."""

from __future__ import annotations

import logging
from copy import deepcopy
from math import log
from statistics import median
from time import perf_counter

import torch
from torch import nn

from lightning_prune.cut import Cut
from lightning_prune.inputs import Inputs
from lightning_prune.modes import in_eval_mode
from lightning_prune.surgery import apply

logger = logging.getLogger(__name__)

_NEAR = 0.015
_TRIES = 5
_SECONDS, _LEAST, _MOST = 1.0, 9, 200


class LatencyAim:
    """Finds the predicted ratio to plan for, so that the measured one is what is asked.

    Predictions tell which plan saves more than another, but an operation alone is not quite what it is in a network. So
    the plan that is predicted to do is tried out, and where it saves too much or too little the next one is planned for
    the ratio at which a power law between predicted and measured time would have it right; once one has saved too much
    and one too little, for a ratio between these.

    Args:
        model: The model, which is not changed.
        inputs: What it is timed with.
        asked: Fraction of the dense model's latency to be gone, in [0, 1).
        left: What is left of it before the cut, as predicted, in (0, 1].

    Attributes:
        target: The predicted ratio to plan for.
        reached: The measured one of the last plan; the predicted one where nothing could be measured.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, asked: float, left: float) -> None:
        self._model, self._inputs, self._asked, self._left = model, inputs, asked, left
        self.target = asked
        self.reached = 0.0
        self._tried: dict[float, float] = {}
        self._is_over = False

    def is_met(self, cut: Cut, predicted: float) -> bool:
        """Put what a cut leaves on the clock, and tell whether it will do; if not, `target` has moved.

        Args:
            cut: What would be done.
            predicted: The ratio that is predicted after it.
        """
        if not cut.kept or self._asked <= 1 - self._left:
            self.reached = predicted
            return True
        if self._is_over:
            self.reached = self._tried[self.target]
            return True
        try:
            share = time_left(self._model, cut, self._inputs)
        except Exception as error:
            logger.warning("the network after the cut cannot be timed (%s), so that its latency is predicted", error)
            self.reached = predicted
            return True
        self.reached = self._tried[self.target] = 1 - self._left * share
        if abs(self.reached - self._asked) <= _NEAR:
            return True
        self._move((1 - predicted) / self._left, share)
        return False

    def _move(self, predicted: float, measured: float) -> None:
        """Take the next target; after some tries the best one."""
        best = min(self._tried, key=lambda target: abs(self._tried[target] - self._asked))
        if len(self._tried) >= _TRIES:
            self._is_over, self.target = True, best
            return
        less = [target for target, reached in self._tried.items() if reached < self._asked]
        more = [target for target, reached in self._tried.items() if reached >= self._asked]
        if less and more:
            target = self._between(max(less), min(more))
        elif 0 < predicted < 1 and 0 < measured < 1:
            target = 1 - self._left * ((1 - self._asked) / self._left) ** (log(predicted) / log(measured))
        else:
            target = (1 + self.target) / 2
        target = min(max(target, 0.0), 0.99)
        self._is_over = any(abs(target - tried) < 1e-3 for tried in self._tried)
        self.target = best if self._is_over else target

    def _between(self, low: float, high: float) -> float:
        """Interpolate between a target that gave too little and one that gave enough, and keep away from both."""
        rise = self._tried[high] - self._tried[low]
        share = (self._asked - self._tried[low]) / rise
        return low + (high - low) * min(max(share, 0.2), 0.8)


def time_left(model: nn.Module, cut: Cut, inputs: Inputs) -> float:
    """Return the time of a forward pass in eval mode after a cut, as a fraction of the time before it.

    Both networks take turns for a second or so; it is the median of the turns' ratios.
    """
    small = deepcopy(model)
    apply(small, cut)
    ratios: list[float] = []
    with in_eval_mode(model), torch.inference_mode():
        for network in (model, small.eval()):
            inputs.call(network)
        start = perf_counter()
        while len(ratios) < _LEAST or (perf_counter() - start < _SECONDS and len(ratios) < _MOST):
            before, after = (_seconds(network, inputs) for network in (model, small))
            ratios.append(after / before)
    return median(ratios)


def _seconds(network: nn.Module, inputs: Inputs) -> float:
    start = perf_counter()
    inputs.call(network)
    if any(parameter.is_cuda for parameter in network.parameters()):
        torch.cuda.synchronize()
    return perf_counter() - start
