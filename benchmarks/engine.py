"""What ZeRO-3 costs on one CPU: the same steps through our engine and through a plain PyTorch loop, taking turns.

    OMP_NUM_THREADS=1 python benchmarks/engine.py runs/demo/shards
    OMP_NUM_THREADS=2 python benchmarks/engine.py SHARDS --stages mae --preset vit_b16 --batch 16 \
        --precision fp32 bf16 --threads 2 --rounds 3 --steps 2 --workers 1

Prints images per second of both and their ratio over several rounds, because the machine's speed varies; with --workers
also the share of the steps' time that the engine waits for batches of the real loader. The plain loop has the same
objective, a fused AdamW, and in bf16 the same float32 master weights that DeepSpeed keeps.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_pipeline.ending import leave
from data_pipeline.shardset import ShardSet
from maws import config, optim, stages
from maws.data.batch import Batch
from maws.data.feed import Feed
from maws.data.loader import StepDataset, open_shards
from maws.data.order import Part
from maws.engine import Engine, Runtime
from maws.models import init

Step = Callable[[Batch], object]


@dataclass
class PlainTorch:
    """The same objective and optimizer without DeepSpeed. `master`: float32 copies of weights in bf16."""

    objective: torch.nn.Module
    adamw: torch.optim.AdamW
    clip: float
    master: list[tuple[torch.nn.Parameter, torch.Tensor]] = field(default_factory=list)

    def step(self, batch: Batch) -> None:
        self.objective(batch)["loss"].backward()
        for weight, copy in self.master:
            copy.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        trained = [copy for _, copy in self.master] or self.objective.parameters()
        torch.nn.utils.clip_grad_norm_(trained, self.clip or float("inf"))
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            for weight, copy in self.master:
                weight.copy_(copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="a shard set")
    parser.add_argument("--stages", nargs="+", default=["mae", "wsp"])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--batch", type=int, help="images a step (default: 64)", default=64)
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of one way in a round")
    parser.add_argument("--workers", type=int, default=0, help="loader processes, for the share of waiting")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.stages:
        for precision in options.precision:
            measure(name, precision, options)


def measure(name: str, precision: str, options: argparse.Namespace) -> None:
    stage = stages.load(name)
    settings = [f"data.shards={options.shards}", f"optim.batch_size={options.batch}", f"engine.precision={precision}"]
    cfg = config.override(stages.preset(name, options.preset), [*settings, "optim.micro_batch=0"])
    shards = open_shards(cfg.data)
    cfg = stage.prepare(cfg, shards, Path())
    data = stage.dataset(cfg, shards, Path(), Part())
    plain, engine = make_plain(stage, cfg, shards), make_engine(stage, cfg, shards)
    torch.set_num_threads(options.threads)  # the engine's start shares cores between ranks
    batches = [data[step] for step in range(options.steps)]
    compare(f"{name} {options.preset} {precision}", plain.step, engine.step, batches, options.rounds)
    if options.workers:
        wait(engine, data, options.steps * options.rounds, options.workers)


def make_plain(stage: stages.Stage, cfg: Any, shards: ShardSet) -> PlainTorch:
    objective: Any = stage.objective(cfg, shards)
    init.fill(objective, objective.init_rules(), cfg.seed)
    groups = optim.groups(objective, stage.param_rules(cfg), cfg.optim.peak_lr, cfg.optim.weight_decay)
    master = []
    if cfg.engine.precision == "bf16":
        for group in groups:
            pairs = [(p, p.detach().clone()) for p in group["params"]]
            group["params"] = [copy for _, copy in pairs]
            master += pairs
        objective.bfloat16()
    return PlainTorch(objective, torch.optim.AdamW(groups, betas=cfg.optim.betas, fused=True), cfg.optim.clip, master)


def make_engine(stage: stages.Stage, cfg: Any, shards: ShardSet) -> Engine:
    runtime = Runtime(cfg.engine, cfg.optim, stages.shape_of(cfg.model).width)
    with runtime.partitioned():
        objective: Any = stage.objective(cfg, shards)
    init.fill(objective, objective.init_rules(), cfg.seed, runtime.gather)
    groups = optim.groups(objective, stage.param_rules(cfg), cfg.optim.peak_lr, cfg.optim.weight_decay)
    return runtime.build(objective, groups, cfg.optim)


def compare(name: str, plain: Step, engine: Step, batches: list[Batch], rounds: int) -> None:
    each = [(images_per_second(plain, batches), images_per_second(engine, batches)) for _ in range(rounds + 1)][1:]
    ratios = [b / a for a, b in each]
    say(
        f"{name}: plain torch {statistics.median(a for a, _ in each):.2f}, engine "
        f"{statistics.median(b for _, b in each):.2f} images/s; engine / plain torch {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f} in {rounds} rounds)"
    )


def images_per_second(step: Step, batches: list[Batch]) -> float:
    begun = time.perf_counter()
    for batch in batches:
        step(batch)
    return sum(len(batch["keys"]) for batch in batches) / (time.perf_counter() - begun)


def wait(engine: Engine, data: StepDataset, steps: int, workers: int) -> None:
    """How long a training stands still for its batches, but for the first one."""
    feed = Feed(data, 0, steps + 1, workers)
    first, waited = feed.next()
    engine.step(first)
    begun, total = time.perf_counter(), 0.0
    for _ in range(steps):
        batch, seconds = feed.next()
        total += seconds
        engine.step(batch)
    say(
        f"  waiting for batches, {workers} loader process(es): {1000 * total / steps:.1f} ms a step, "
        f"{total / (time.perf_counter() - begun):.2%} of its time (the first batch: {1000 * waited:.0f} ms)"
    )
    feed.close()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
    leave(0)
