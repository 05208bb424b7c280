"""Initial values of parameters: a table of (pattern, formula), filled per parameter from its own random stream.

Under `deepspeed.zero.Init` a constructor's own initialisation is silently lost (timm, transformers), because the
tensors it writes to have no elements. So no constructor's initialisation is used at all: networks are built empty and
`fill` gives every parameter the value its formula, name and seed determine, whatever the number of ranks.
`check` then compares what is really there with the formula, and refuses to go on when they differ.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from maws.seeding import generator


class Init(Protocol):
    """How a parameter of a given shape starts."""

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor: ...

    def std(self, shape: torch.Size) -> float:
        """The standard deviation that `draw` gives for many elements."""
        ...


@dataclass(frozen=True)
class Constant:
    value: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.full(shape, self.value)

    def std(self, shape: torch.Size) -> float:
        return 0.0


@dataclass(frozen=True)
class Normal:
    sigma: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator) * self.sigma

    def std(self, shape: torch.Size) -> float:
        return self.sigma


@dataclass(frozen=True)
class Uniform:
    bound: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.empty(shape).uniform_(-self.bound, self.bound, generator=generator)

    def std(self, shape: torch.Size) -> float:
        return self.bound / math.sqrt(3)


@dataclass(frozen=True)
class FanInNormal:
    """Normal with standard deviation fan_in^-1/2, cut at two of them, where the last axes are the fan-in."""

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        sigma = self._sigma(shape)
        return nn.init.trunc_normal_(torch.empty(shape), std=sigma, a=-2 * sigma, b=2 * sigma, generator=generator)

    def std(self, shape: torch.Size) -> float:
        return 0.8796 * self._sigma(shape)  # of a normal cut at two standard deviations

    @staticmethod
    def _sigma(shape: torch.Size) -> float:
        return math.prod(shape[1:]) ** -0.5


@dataclass(frozen=True)
class WidthNormal:
    """Normal with standard deviation width^-1/2 for a bias-free projection applied as x @ W (recipes §8.1)."""

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator) * self.std(shape)

    def std(self, shape: torch.Size) -> float:
        return shape[0] ** -0.5


@dataclass(frozen=True)
class XavierUniform:
    """Glorot's uniform; axes after the first count as one: a patch convolution is treated as the linear map it is."""

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        bound = self._bound(shape)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def std(self, shape: torch.Size) -> float:
        return self._bound(shape) / math.sqrt(3)

    @staticmethod
    def _bound(shape: torch.Size) -> float:
        return math.sqrt(6 / (shape[0] + math.prod(shape[1:])))


@dataclass(frozen=True)
class Table:
    """A computed value, such as a sine-cosine position table."""

    value: Callable[[], Tensor]

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return self.value().reshape(shape)

    def std(self, shape: torch.Size) -> float:
        return float(self.value().std())


InitRules = Sequence[tuple[str, Init]]
Gather = Callable[[list[nn.Parameter]], AbstractContextManager[object]]


def formula(name: str, rules: InitRules) -> Init:
    """The first rule whose pattern matches the whole name. Raises KeyError when none does."""
    for pattern, init in rules:
        if re.fullmatch(pattern, name):
            return init
    raise KeyError(f"no initial value is defined for parameter {name}")


def _dense(params: list[nn.Parameter]) -> AbstractContextManager[object]:
    return nullcontext()


@torch.no_grad()
def fill(module: nn.Module, rules: InitRules, seed: int, gather: Gather = _dense, writer: bool = True) -> None:
    """Give every parameter its initial value.

    `gather` makes partitioned parameters whole while inside; `writer` is true on the one rank whose values count.
    """
    for name, param in module.named_parameters():
        init = formula(name, rules)
        with gather([param]):
            if writer:
                param.copy_(init.draw(param.shape, generator(seed, "init", name)))


@torch.no_grad()
def check(module: nn.Module, rules: InitRules, gather: Gather = _dense, at_most: int = 64) -> None:
    """Compare mean and spread of a sample of parameters with their formula.

    Raises RuntimeError naming the first parameter that does not have the statistics its rule promises.
    """
    for name, param in _spread(list(module.named_parameters()), at_most):
        with gather([param]):
            value, want = param.detach().float(), formula(name, rules)
            std = float(value.std()) if value.numel() > 1 else 0.0
            expected = want.std(param.shape)
            tolerance = 0.02 * expected + 6 * expected / math.sqrt(max(1, value.numel())) + 1e-6
            if not math.isfinite(std) or abs(std - expected) > tolerance:
                raise RuntimeError(
                    f"parameter {name} has standard deviation {std:.4g}, its initialisation gives {expected:.4g}: "
                    f"initialisation was skipped or lost, refusing to train from it"
                )


def _spread(items: list[tuple[str, nn.Parameter]], at_most: int) -> Iterable[tuple[str, nn.Parameter]]:
    step = max(1, len(items) // at_most)
    return items[::step]
