"""Exponential moving average (EMA) of a model's weights, which generalises better than the last weights."""

import copy

import torch
from torch import Tensor, nn


class AveragedModel:
    """A model with the averaged weights: average = decay · average + (1 - decay) · weights, after every step.

    The decay starts small, (1 + updates) / (10 + updates), so that the initial random weights are forgotten even in
    short runs (as in TensorFlow's ExponentialMovingAverage). Running statistics of batch norms are averaged like
    weights; counters are copied.

    Args:
        model: the model; `self.model` is a copy of it for evaluation.
        decay: in 0..1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average by the current weights of `model`."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        new: dict[str, Tensor] = model.state_dict()
        old: dict[str, Tensor] = self.model.state_dict()
        floating = [name for name, tensor in old.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([old[name] for name in floating], [new[name] for name in floating], 1 - decay)
        for name in old.keys() - set(floating):
            old[name].copy_(new[name])
