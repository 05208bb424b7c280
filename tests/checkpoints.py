"""Checkpoints without a training: an engine that only has a state, and folders as a run leaves them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from maws import dist
from maws.config import CheckpointConfig
from maws.host_copy import copy_to_host
from maws.saver import Saver

SIZES = {"a.weight": (5, 7), "b.bias": (3,), "c.weight": (16, 4)}


class StateOnly:
    """The part of maws.engine.Engine that checkpoints use: every parameter cut into equal parts, one a rank."""

    def __init__(self, seed: int = 0, sizes: dict[str, tuple[int, ...]] = SIZES, kinds: Sequence[str] = ("weight",)):
        generator = torch.Generator().manual_seed(seed)
        self.whole = {
            f"{kind}/{name}": torch.randn(shape, generator=generator) for kind in kinds for name, shape in sizes.items()
        }
        self.counter = torch.tensor(seed)
        self.steps = 0

    def partitions(self) -> dict[str, Tensor]:
        return self.whole

    def partition(self, p: Tensor) -> tuple[int, int]:
        return p.numel(), -(-p.numel() // dist.world_size())

    def buffers(self) -> dict[str, Tensor]:
        return {"buffer/counter": self.counter}

    def local_state(self, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        return copy_to_host({k: self.part(p) for k, p in self.whole.items()} | self.buffers(), into)

    def part(self, p: Tensor) -> Tensor:
        elements, size = self.partition(p)
        padded = torch.cat([p.flatten(), torch.zeros(dist.world_size() * size - elements)])
        return padded.split(size)[dist.rank()]

    def load_local_state(self, state: dict[str, Tensor], steps: int) -> None:
        self.loaded, self.steps = state, steps

    def step(self) -> None:
        for p in self.whole.values():
            p += 1
        self.counter += 1

    def has(self, state: dict[str, Tensor]) -> bool:
        """Is it this rank's part of what is here now?"""
        return all(torch.equal(state[k], v) for k, v in self.local_state().items())


def make_saver(engine: StateOnly, run: Path, keep: int = 2, patience: float = 20.0, **settings: object) -> Saver:
    cfg = CheckpointConfig(keep=keep, **settings)  # type: ignore[arg-type]
    return Saver(engine, run / "checkpoints", cfg, {"order": "same"}, patience=patience)  # type: ignore[arg-type]


def save_steps(run: Path, *steps: int, seed: int = 0, keep: int = 9) -> StateOnly:
    """Checkpoints at these steps; the state is the last one's."""
    engine = StateOnly(seed)
    saver = make_saver(engine, run, keep=keep)
    for step in steps:
        engine.step()
        saver.save(step, {"train/loss": 1 / step})
    saver.finish()
    return engine


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())
