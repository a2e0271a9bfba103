"""Exponential moving average of the weights."""

import copy

import torch
from torch import nn


class EMA:
    """Keeps `model`, an averaged copy to score, sample and export.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates (as in TensorFlow's ExponentialMovingAverage):
    an average that starts at random weights would remember them for 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def current_decay(self) -> float:
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        weight = 1 - self.current_decay()
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight)
        for averaged, current in zip(self.model.buffers(), model.buffers(), strict=True):
            averaged.copy_(current)
        self.updates += 1
