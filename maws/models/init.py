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

    @property
    def mean(self) -> float:
        """Their mean."""
        ...


@dataclass(frozen=True)
class Constant:
    value: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.full(shape, self.value)

    def std(self, shape: torch.Size) -> float:
        return 0.0

    @property
    def mean(self) -> float:
        return self.value


class Centred:
    """Formulas whose values have mean 0."""

    @property
    def mean(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Normal(Centred):
    sigma: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator) * self.sigma

    def std(self, shape: torch.Size) -> float:
        return self.sigma


@dataclass(frozen=True)
class Uniform(Centred):
    bound: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.empty(shape).uniform_(-self.bound, self.bound, generator=generator)

    def std(self, shape: torch.Size) -> float:
        return self.bound / math.sqrt(3)


@dataclass(frozen=True)
class FanInNormal(Centred):
    """Normal with standard deviation fan_in^-1/2, where the last axes are the fan-in, as SWAG starts its layers.

    Its code cuts with torch's `trunc_normal_`, whose bounds are the numbers -2 and 2, not two deviations: far outside.
    """

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return nn.init.trunc_normal_(torch.empty(shape), std=self._sigma(shape), generator=generator)

    def std(self, shape: torch.Size) -> float:
        return self._sigma(shape)

    @staticmethod
    def _sigma(shape: torch.Size) -> float:
        return math.prod(shape[1:]) ** -0.5


@dataclass(frozen=True)
class WidthNormal(Centred):
    """Normal with standard deviation width^-1/2 for a bias-free projection applied as x @ W (recipes §8.1)."""

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator) * self.std(shape)

    def std(self, shape: torch.Size) -> float:
        return shape[0] ** -0.5


@dataclass(frozen=True)
class XavierUniform(Centred):
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

    @property
    def mean(self) -> float:
        return float(self.value().mean())


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
            std, n = float(value.std()) if value.numel() > 1 else 0.0, max(1, value.numel())
            expected = want.std(param.shape)
            for word, is_, should, noise in (  # noise: the deviation that n draws leave
                ("mean", float(value.mean()), want.mean, expected / math.sqrt(n)),
                ("standard deviation", std, expected, expected / math.sqrt(2 * n)),
            ):
                if not abs(is_ - should) <= 0.02 * abs(should) + 6 * noise + 1e-6:  # also when it is not a number
                    raise RuntimeError(
                        f"parameter {name} has {word} {is_:.4g}, its initialisation gives {should:.4g}: "
                        f"initialisation was skipped or lost, refusing to train from it"
                    )


def _spread(items: list[tuple[str, nn.Parameter]], at_most: int) -> Iterable[tuple[str, nn.Parameter]]:
    step = max(1, len(items) // at_most)
    return items[::step]
