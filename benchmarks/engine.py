"""What ZeRO-3 costs on one CPU core: the same steps through our engine and through plain torch, taking turns.

    OMP_NUM_THREADS=1 python benchmarks/engine.py runs/demo/shards

Prints images per second of both and their ratio, over several rounds, because the machine's speed varies.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.ending import leave
from data_pipeline.shardset import ShardSet
from maws import config, optim, stages
from maws.data.batch import Batch
from maws.data.loader import open_shards
from maws.data.order import Part
from maws.engine import Engine, Runtime
from maws.models import init

ROUNDS, STEPS = 5, 6
Step = Callable[[Batch], object]


@dataclass
class PlainTorch:
    """The same objective and optimizer without DeepSpeed."""

    objective: torch.nn.Module
    adamw: torch.optim.AdamW
    clip: float

    def step(self, batch: Batch) -> None:
        self.objective(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.clip or float("inf"))
        self.adamw.step()
        self.adamw.zero_grad()


def main(shards_path: str) -> None:
    torch.set_num_threads(1)
    for name, settings in (("mae", ["optim.batch_size=64"]), ("wsp", [])):
        stage = stages.load(name)
        cfg = config.override(stages.preset(name, "demo"), [f"data.shards={shards_path}", *settings])
        shards = open_shards(cfg.data)
        cfg = stage.prepare(cfg, shards, Path())
        data = stage.dataset(cfg, shards, Path(), Part())
        plain, engine = make_plain(stage, cfg, shards), make_engine(stage, cfg, shards)
        compare(name, plain.step, engine.step, [data[step] for step in range(STEPS)])


def make_plain(stage: stages.Stage, cfg: Any, shards: ShardSet) -> PlainTorch:
    objective: Any = stage.objective(cfg, shards)
    init.fill(objective, objective.init_rules(), cfg.seed)
    groups = optim.groups(objective, stage.param_rules(cfg), cfg.optim.peak_lr, cfg.optim.weight_decay)
    return PlainTorch(objective, torch.optim.AdamW(groups, betas=cfg.optim.betas), cfg.optim.clip)


def make_engine(stage: stages.Stage, cfg: Any, shards: ShardSet) -> Engine:
    runtime = Runtime(cfg.engine, cfg.optim)
    with runtime.partitioned():
        objective: Any = stage.objective(cfg, shards)
    init.fill(objective, objective.init_rules(), cfg.seed, runtime.gather)
    groups = optim.groups(objective, stage.param_rules(cfg), cfg.optim.peak_lr, cfg.optim.weight_decay)
    return runtime.build(objective, groups, cfg.optim)


def compare(name: str, plain: Step, engine: Step, batches: list[Batch]) -> None:
    rounds = [(images_per_second(plain, batches), images_per_second(engine, batches)) for _ in range(ROUNDS + 1)][1:]
    ratios = [b / a for a, b in rounds]
    say(
        f"{name}: plain torch {statistics.median(a for a, _ in rounds):.0f}, engine "
        f"{statistics.median(b for _, b in rounds):.0f} images/s; engine / plain torch {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f} in {ROUNDS} rounds)"
    )


def images_per_second(step: Step, batches: list[Batch]) -> float:
    begun = time.perf_counter()
    for batch in batches:
        step(batch)
    return sum(len(batch["keys"]) for batch in batches) / (time.perf_counter() - begun)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
    leave(0)
