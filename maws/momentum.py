"""Weights that follow other weights as an exponential mean, each rank on the partition it owns.

An objective with a target branch (LC-MAE's) says which names follow which:

    def follows(self):            return {"target.": "online."}      # target.norm.weight follows online.norm.weight
    def momentum(self, progress): return cosine_to_one(0.996, progress)

And the mean of all that is trained (`optim.ema`), which no forward reads: it is kept, saved and released.

The means are kept in float32 beside the weights that forward reads: in bfloat16 a step of less than 1/256 of a value
would be rounded away, and all steps of a momentum of 0.996 are. Nothing is sent between ranks: source and target have
the same shapes, so ZeRO-3 cuts them at the same places.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class HasTarget(Protocol):
    """An objective of which a part is not trained but follows another part."""

    def follows(self) -> dict[str, str]:
        """Prefix of what follows -> prefix of what it follows; every name under the first exists under the second."""
        ...

    def momentum(self, progress: float) -> float:
        """How much of the mean stays in one step, when `progress` (0 to 1) of the training is done."""
        ...


def cosine_to_one(base: float, progress: float) -> float:
    """From `base` at the start of training along half a cosine to 1 at its end (BYOL, Grill et al., 2020, §3.3)."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * progress)) / 2


class Pair(NamedTuple):
    """A parameter that follows, and the one it follows."""

    name: str  # of the target
    target: nn.Parameter
    source: nn.Parameter


class MomentumTarget:
    """The parameters and buffers of an objective that follow others, and this rank's part of their means.

    `values` gives this rank's float32 values of a source parameter: of its optimizer's master copy where there is one.
    """

    def __init__(self, objective: nn.Module, values: Callable[[nn.Parameter], Tensor]) -> None:
        follows = objective.follows() if isinstance(objective, HasTarget) else {}
        params, buffers = dict(objective.named_parameters()), dict(objective.named_buffers())
        self.params = [Pair(n, params[n], params[s]) for n, s in _pairs(params, follows)]
        self.buffers = [(buffers[n], buffers[s]) for n, s in _pairs(buffers, follows)]
        for pair in self.params:
            assert not pair.target.requires_grad, f"{pair.name} follows {follows}, so a rule must freeze it"
        for buffer, _ in self.buffers:  # they have no second copy, so they must be float32 themselves
            assert not buffer.is_floating_point() or buffer.dtype == torch.float32
        self._sources = WeightMeans([(name, source) for name, _, source in self.params], values)
        self.means = self._sources.means

    @torch.no_grad()
    def start(self) -> None:
        """Begin as a copy of the source."""
        self._sources.start()
        self._write()
        for target, source in self.buffers:
            target.copy_(source)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """mean = momentum * mean + (1 - momentum) * source; counters are copied (recipes §4.4)."""
        self._sources.follow(momentum)
        self._write()
        for target, source in self.buffers:
            target.lerp_(source, 1 - momentum) if target.is_floating_point() else target.copy_(source)

    @torch.no_grad()
    def load(self, means: dict[str, Tensor]) -> None:
        """Put back this rank's part of the means."""
        self._sources.load(means)
        self._write()

    def _write(self) -> None:
        for name, target, _ in self.params:
            write(target, self.means[name])


class WeightMeans:
    """mean = decay * mean + (1 - decay) * weight, of this rank's part of some parameters, after every step.

    It begins as a copy of the weights and has no correction for that: a decay of 0.9999 forgets them in some 10,000
    steps. `on_host` keeps it where an optimizer is that was moved there.
    """

    def __init__(
        self, params: list[tuple[str, nn.Parameter]], values: Callable[[nn.Parameter], Tensor], on_host: bool = False
    ) -> None:
        self.params, self.values, self.on_host = params, values, on_host
        self.means: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self) -> None:
        for name, p in self.params:
            own = self.values(p).detach()
            self.means[name] = own.to("cpu" if self.on_host else own.device, torch.float32, copy=True)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        for name, p in self.params:
            mean = self.means[name]
            mean.lerp_(self.values(p).to(mean.device), 1 - decay)

    @torch.no_grad()
    def load(self, means: dict[str, Tensor]) -> None:
        """Put back this rank's part of the means."""
        for name, mean in self.means.items():
            mean.copy_(means[name])


def _pairs(names: Iterable[str], follows: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(name, name of what it follows)."""
    for prefix, source in follows.items():
        yield from ((name, source + name.removeprefix(prefix)) for name in names if name.startswith(prefix))


def write(param: nn.Parameter, values: Tensor) -> None:
    """Give a parameter (or the partition of it that this rank owns) its values, in its own precision."""
    getattr(param, "ds_tensor", param.data).copy_(values)
    if getattr(param, "ds_secondary_tensor", None) is not None:
        param.ds_secondary_tensor = None  # type: ignore[attr-defined]  # a copy of it within the node (ZeRO++), now old
