"""The training loop: step after step until the end, a signal, or a loss that is not finite. Knows no stage by name."""

import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from data_pipeline.errors import DataError, UserError
from maws import checkpoint, dist
from maws.config import OptimConfig, TrainConfig
from maws.data.batch import BadSample, Batch
from maws.engine import Engine
from maws.files import write_json
from maws.log import Metrics, duration
from maws.schedule import Schedule, schedule_of
from maws.seeding import derive, seed_everything

log = logging.getLogger(__name__)

REQUEUE, INTERRUPTED = 75, 130


class Stopped(Exception):
    """The run was asked to stop, has saved, and leaves with this exit code."""

    def __init__(self, code: int, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.code, self.step = code, step


class NotFinite(UserError):
    """A loss that is not a number: training on would destroy the weights."""


class StopSignal:
    """SIGTERM and SIGUSR1 mean 'requeue me', Ctrl-C means 'stop'; a second Ctrl-C does not wait for the save."""

    def __init__(self) -> None:
        self.code = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.code == INTERRUPTED:
            raise KeyboardInterrupt
        self.code = INTERRUPTED if number == signal.SIGINT else REQUEUE


@dataclass
class Plan:
    """Derived numbers, made in one place and printed before the first step."""

    total: int
    warmup: int
    milestone: int
    steps_per_epoch: int
    checkpoint_every: int

    @classmethod
    def of(cls, cfg: TrainConfig, steps_per_epoch: int) -> "Plan":
        total = max(1, cfg.optim.length.steps(steps_per_epoch))
        plan = cls(
            total=total,
            warmup=cfg.optim.warmup.steps(steps_per_epoch, total),
            milestone=cfg.optim.milestone.steps(steps_per_epoch, total),
            steps_per_epoch=steps_per_epoch,
            checkpoint_every=max(1, cfg.checkpoint.every.steps(steps_per_epoch, total)),
        )
        plan.schedule(cfg.optim)  # an impossible one is refused before anything is built
        return plan

    def schedule(self, optim: OptimConfig) -> Schedule:
        return schedule_of(optim, self.warmup, self.total, self.milestone)


@dataclass
class Progress:
    """What happened since the last logged step."""

    since: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, losses: dict[str, float], waited: float) -> None:
        self.steps += 1
        self.waited += waited
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def report(self, batch_size: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.since
        return {f"train/{k}": v / self.steps for k, v in self.sums.items()} | {
            "train/images_per_second": round(self.steps * batch_size / seconds, 1),
            "data/wait_ms": round(1000 * self.waited / self.steps, 1),
        }


def train(
    engine: Engine, batches: Iterator[Batch], cfg: TrainConfig, plan: Plan, run: Path, start: int,
    facts: dict[str, Any], samples: int, stop: StopSignal,
) -> None:  # fmt: skip
    """Steps [start, plan.total). `facts` go into every checkpoint, `samples` is what the budget of bad ones is of.

    Raises Stopped after a signal (saved), NotFinite, or DataError when too many samples are bad.
    """
    schedule = plan.schedule(cfg.optim)
    metrics = Metrics(run / "metrics.jsonl", start) if dist.rank() == 0 else None
    quarantine = Quarantine(run / "quarantine.jsonl", cfg.data.max_bad, samples)
    progress, begun, spoke = Progress(), time.perf_counter(), 0.0
    saved = start
    for step in range(start, plan.total):
        asked = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - asked
        seed_everything(derive(cfg.seed, "step", step, dist.rank()))  # dropout and drop path, the same after a resume
        lr = cfg.optim.peak_lr * schedule(step)
        engine.set_lr(lr)
        losses = engine.step(batch, step / plan.total)
        means, code, bad = _agree(losses, stop.code, len(batch["bad"]), engine.device)
        if not math.isfinite(means["loss"]):
            raise NotFinite(_not_finite(means, step, batch, run))
        if bad:
            quarantine.add(step, batch["bad"])
        progress.add(means, waited)
        done = step + 1
        if done % cfg.log.every == 0 or done == plan.total:
            values = progress.report(cfg.optim.batch_size)
            values |= {
                "train/lr": lr,
                "train/grad_norm": engine.grad_norm(),
                "train/epoch": done / plan.steps_per_epoch,
            }
            if metrics:
                metrics.write(done, values | quarantine.report())
            progress = Progress()
            if time.perf_counter() - spoke > 2 or done == plan.total:
                spoke = time.perf_counter()
                _say(done, plan.total, values, (spoke - begun) / (done - start) * (plan.total - done))
        if code or (done % plan.checkpoint_every == 0 and done < plan.total):
            checkpoint.save(engine, run / "checkpoints", done, facts, cfg.checkpoint.keep)
            saved = done
        if code and done < plan.total:
            raise Stopped(code, done)
    if saved < plan.total:
        checkpoint.save(engine, run / "checkpoints", plan.total, facts, cfg.checkpoint.keep)
    if metrics:
        metrics.close()


def _agree(
    losses: dict[str, torch.Tensor], code: int, bad: int, device: torch.device
) -> tuple[dict[str, float], int, int]:
    """Means of the losses, and whether any rank was told to stop or met a bad sample: one small message a step."""
    flags = [float(code == REQUEUE), float(code == INTERRUPTED), float(bad)]
    *means, requeue, interrupted, bad_mean = dist.mean([*losses.values(), *map(torch.tensor, flags)], device)
    agreed = INTERRUPTED if interrupted else REQUEUE if requeue else 0
    return dict(zip(losses, means, strict=True)), agreed, round(bad_mean * dist.world_size())


def _not_finite(means: dict[str, float], step: int, batch: Batch, run: Path) -> str:
    """Write down what is needed to look at the step again, and say where."""
    path = run / f"not_finite_step_{step}_rank_{dist.rank()}.json"
    write_json(path, {"step": step, "losses": {k: repr(v) for k, v in means.items()}, "keys": batch["keys"]})
    return (
        f"loss is {means['loss']} at step {step} (quantities: {means}); the sample keys are in {path}. The last "
        f"checkpoint is good: lower optim.lr or set optim.clip and continue from it"
    )


def _say(done: int, total: int, values: dict[str, float], left: float) -> None:
    log.info(
        "step %d/%d (%d%%)  loss %.4f  lr %.2e  %.0f images/s  data wait %.0f ms  %s left",
        done, total, 100 * done // total, values["train/loss"], values["train/lr"],
        values["train/images_per_second"], values["data/wait_ms"], duration(left),
    )  # fmt: skip


class Quarantine:
    """Samples that could not be read: listed once each, and too many of them end the run."""

    def __init__(self, path: Path, max_bad: float, samples: int) -> None:
        self.path, self.samples = path, samples
        self.allowed = max(1, math.floor(max_bad * samples))
        self.keys: set[str] = set()
        if path.exists():
            self.keys = {json.loads(line)["key"] for line in path.read_text().splitlines() if line.endswith("}")}

    def add(self, step: int, bad: list[BadSample]) -> None:
        """All ranks call this in the step in which any of them met one. Raises DataError above the budget."""
        for entries in dist.gather_objects(bad):
            for entry in entries:
                if entry["key"] in self.keys:
                    continue
                self.keys.add(entry["key"])
                log.warning("sample %s of shard %s left out: %s", entry["key"], entry["shard"], entry["reason"])
                if dist.rank() == 0:
                    with self.path.open("a") as f:
                        f.write(json.dumps({"step": step, **entry}) + "\n")
        if len(self.keys) > self.allowed:
            raise DataError(
                f"{len(self.keys)} of {self.samples} samples could not be read, more than data.max_bad allows "
                f"({self.allowed}); they are listed in {self.path}. Check the shard set, or raise data.max_bad"
            )

    def report(self) -> dict[str, int]:
        return {"data/bad_samples": len(self.keys)} if self.keys else {}
