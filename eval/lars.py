"""LARS (You et al., 2017) as MAE's linear probe has it (recipes 9.1).

g = gradient + weight_decay * w       these two of parameters with more than one dimension alone
g = g * trust * |w| / |g|             not where a norm is 0
buffer = momentum * buffer + g
w = w - lr * buffer
"""

from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Lars(Optimizer):
    """Steps whose length goes by the length of the weights; biases take plain steps with momentum."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.9,
        trust: float = 0.001,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    buffer = self.state[weight].setdefault("buffer", torch.zeros_like(weight))
                    update = _update(weight, weight.grad, group["trust"], group["weight_decay"])
                    weight -= group["lr"] * buffer.mul_(group["momentum"]).add_(update)
        return loss


def _update(weight: Tensor, gradient: Tensor, trust: float, weight_decay: float) -> Tensor:
    if weight.ndim < 2:
        return gradient
    update = gradient + weight_decay * weight
    own, step = weight.norm(), update.norm()
    return update * torch.where((own > 0) & (step > 0), trust * own / step, 1.0)
