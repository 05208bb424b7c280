"""The training loop: steps until the end, a signal, or a fault that cannot be mended. Knows no stage by name."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from maws import dist
from maws.config import OptimConfig, TrainConfig
from maws.data.batch import Losses
from maws.data.feed import Feed
from maws.engine import Engine
from maws.guard import Guard
from maws.guard import check as check_faults
from maws.history import History
from maws.key_log import KeyLog
from maws.log import Metrics
from maws.meter import Meter
from maws.quarantine import Quarantine
from maws.retention import Retention
from maws.saver import Saver
from maws.schedule import Schedule, schedule_of
from maws.seeding import derive, seed_everything
from maws.stop_signal import INTERRUPTED, REQUEUE, Stopped, StopSignal
from maws.watchdog import Watchdog

log = logging.getLogger(__name__)

Probe = Callable[[Engine], dict[str, float]]  # how good the features are now; all ranks take part


@dataclass
class Plan:
    """Derived numbers, made in one place and printed before the first step."""

    total: int
    warmup: int
    milestone: int
    steps_per_epoch: int
    checkpoint_every: int
    snapshot_every: int
    probe_every: int  # 0: never
    keep_every: int  # 0: none

    @classmethod
    def of(cls, cfg: TrainConfig, steps_per_epoch: int) -> "Plan":
        total = max(1, cfg.optim.length.steps(steps_per_epoch))
        plan = cls(
            total=total,
            warmup=cfg.optim.warmup.steps(steps_per_epoch, total),
            milestone=cfg.optim.milestone.steps(steps_per_epoch, total),
            steps_per_epoch=steps_per_epoch,
            checkpoint_every=max(1, cfg.checkpoint.every.steps(steps_per_epoch, total)),
            snapshot_every=max(1, cfg.faults.snapshot_every.steps(steps_per_epoch, total)),
            probe_every=cfg.probe.every.steps(steps_per_epoch, total),
            keep_every=cfg.checkpoint.keep_every.steps(steps_per_epoch, total),
        )
        plan.schedule(cfg.optim)  # an impossible one is refused before anything is built
        check_faults(cfg.faults)
        Retention.of(cfg.checkpoint, plan.keep_every, probed=plan.probe_every > 0)
        return plan

    def schedule(self, optim: OptimConfig) -> Schedule:
        return schedule_of(optim, self.warmup, self.total, self.milestone)


@dataclass
class Watch:
    """What looks after a training while it runs."""

    stop: StopSignal
    history: History
    guard: Guard
    watchdog: Watchdog
    saver: Saver
    meter: Meter
    quarantine: Quarantine
    probe: Probe | None = None


def train(engine: Engine, feed: Feed, cfg: TrainConfig, plan: Plan, run: Path, start: int, watch: Watch) -> None:
    """Steps [start, plan.total).

    Raises Stopped after a signal (saved), NotFinite, or DataError when too many samples are bad.
    """
    schedule = plan.schedule(cfg.optim)
    metrics = Metrics(run, cfg, start) if dist.rank() == 0 else None
    keys = KeyLog(run, start) if cfg.log.keys else None
    values: dict[str, float] = {}
    step = saved = start
    if code := _agree({}, watch.stop.code, 0, engine.device)[1]:  # while the model was built
        watch.history.add("stop", start, code=code)
        watch.watchdog.farewell()
        raise Stopped(code, start, saved=False)
    while step < plan.total:
        watch.watchdog.pulse(step)
        watch.guard.keep(step)
        batch, waited = feed.next()
        losses: Losses = {}
        if skipped := watch.history.skips(step):
            log.info("step %d is left out: its batch has broken the run before", step)
        else:
            seed_everything(derive(cfg.seed, "step", step, dist.rank()))  # dropout, drop path: the same after a resume
            engine.set_lr(lr := cfg.optim.peak_lr * schedule(step) * watch.history.lr_factor(step))
            losses = engine.step(batch, step / plan.total)
        means, code, bad = _agree(losses, watch.stop.code, len(batch["bad"]), engine.device)
        if not skipped:
            if trouble := watch.guard.trouble(step, means, norm := engine.grad_norm()):
                watch.watchdog.pulse(step, "rewind")
                watch.saver.settle()
                step = watch.guard.rewind(step, means, batch["keys"], trouble)
                feed.go_to(step)
                watch.meter.go_to(step)
                for written in (metrics, keys):
                    if written:
                        written.go_to(step)
                continue
            watch.meter.add(means, waited)
        else:
            watch.meter.skip()
        if bad:
            watch.quarantine.add(step, batch["bad"])
        if keys:
            keys.write(step, [] if skipped else batch["keys"])
        step += 1
        if (step % cfg.log.every == 0 or step == plan.total) and (new := watch.meter.report()):
            new |= {"train/lr": lr, "train/grad_norm": norm, "train/epoch": step / plan.steps_per_epoch}
            values |= new
            if metrics:
                metrics.write(step, new | watch.quarantine.report())
            watch.meter.say(step, values)
        if watch.probe and plan.probe_every and (step % plan.probe_every == 0 or step == plan.total):
            watch.watchdog.pulse(step, "probe")
            values |= (found := watch.probe(engine))
            if metrics:
                metrics.write(step, found)
            watch.meter.aside()
        if code:
            watch.stop.agreed(code)
        if code or (step % plan.checkpoint_every == 0 and step < plan.total):
            watch.watchdog.pulse(step, "save")
            watch.saver.save(step, values)
            watch.meter.aside()
            saved = step
        if code and step < plan.total:
            watch.saver.finish()
            watch.history.add("stop", step, code=code)
            if metrics:
                metrics.close()  # other writers than metrics.jsonl have lines of their own to send
            watch.watchdog.farewell()
            raise Stopped(code, step)
    watch.watchdog.pulse(plan.total, "save")
    if saved < plan.total:
        watch.saver.save(plan.total, values)
    watch.saver.finish()
    for closing in (metrics, keys, feed):
        if closing:
            closing.close()


def _agree(losses: Losses, code: int, bad: int, device: torch.device) -> tuple[dict[str, float], int, int]:
    """Means of the losses, whether any rank was told to stop, and bad samples of all: one small message a step."""
    flags = [float(code == REQUEUE), float(code == INTERRUPTED), float(bad)]
    *means, requeue, interrupted, bad_mean = dist.mean([*losses.values(), *map(torch.tensor, flags)], device)
    agreed = INTERRUPTED if interrupted else REQUEUE if requeue else 0
    return dict(zip(losses, means, strict=True)), agreed, round(bad_mean * dist.world_size())
