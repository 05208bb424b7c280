"""Losses that are not finite, or jump: stop with everything needed to look at the step again, or go back and leave it
out (`faults.on_nan=rewind`).

    step   400 ──────────────── 480 ✗              loss or gradient not finite, or a spike
           snapshot ◀─── rewind ──┘                RUN/quarantine_batches.jsonl gets the batch's keys
           400 ── 401 ── … ── 479 ── (480) ── 481  with lr x faults.lr_factor up to 400 + faults.lr_steps

What follows from a rewind is a function of RUN/events.jsonl, so a run that is killed after one goes on alike. All ranks
see the same means and the same norm and so decide alike. DeepSpeed (0.19.8, ZeRO-3, fp32 and bf16) leaves the weights
as they are when a gradient is not finite, and gives inf as its norm; what forward changed (running statistics) is put
back here.
"""

import logging
import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from data_pipeline.errors import UserError
from maws import checkpoint, dist, manifest
from maws.config import ConfigError, FaultsConfig
from maws.engine import Engine
from maws.files import append, end_line, json_lines, write_json
from maws.history import History

log = logging.getLogger(__name__)

WINDOW = 100  # losses whose median a spike is measured against
ENOUGH = 20  # of them, before anything counts as a spike


class NotFinite(UserError):
    """A loss that is not a number: training on would destroy the weights."""


def check(cfg: FaultsConfig) -> None:
    """Raises ConfigError for settings that cannot be followed, before anything is built."""
    rules = [
        (cfg.on_nan in ("stop", "rewind"), f"on_nan={cfg.on_nan}", "stop or rewind"),
        (cfg.snapshot in ("memory", "disk"), f"snapshot={cfg.snapshot}", "memory or disk"),
        (cfg.spike == 0 or cfg.spike > 1, f"spike={cfg.spike}", "0 (none) or more than 1; 3 is a start"),
        (0 < cfg.lr_factor <= 1, f"lr_factor={cfg.lr_factor}", "more than 0 and at most 1"),
        (cfg.lr_steps >= 0, f"lr_steps={cfg.lr_steps}", "a number of steps from 0 up"),
        (cfg.max_rewinds >= 0, f"max_rewinds={cfg.max_rewinds}", "a number from 0 up"),
        (cfg.hang_seconds >= 0, f"hang_seconds={cfg.hang_seconds}", "a time in seconds, or 0 for never"),
        (
            cfg.peer_seconds == 0 or cfg.peer_seconds >= 5, f"peer_seconds={cfg.peer_seconds}",
            "at least 5 (a rank speaks once a second), or 0 for never",
        ),
        (cfg.stop_seconds > 0, f"stop_seconds={cfg.stop_seconds}", "a time in seconds"),
    ]  # fmt: skip
    for holds, setting, rule in rules:
        if not holds:
            raise ConfigError(f"faults.{setting} cannot be used; it must be {rule}")


@dataclass
class Snapshot:
    """This rank's part of the state before a step."""

    step: int
    state: dict[str, Tensor]
    used: bool = False  # the run went back to it before: the damage may have begun earlier


class Guard:
    """Watches the losses of one training."""

    def __init__(self, cfg: FaultsConfig, engine: Engine, history: History, run: Path, snapshot_every: int) -> None:
        self.cfg, self.engine, self.history, self.run, self.snapshot_every = cfg, engine, history, run, snapshot_every
        self.snapshots: list[Snapshot] = []  # the newest last; at most two
        self.losses: deque[float] | None = None  # of the last steps that were good; read when the first one is known
        self.grad_norm = math.nan

    def keep(self, step: int) -> None:
        """Before step `step` (steps taken so far): take a snapshot when one is due."""
        if self.cfg.on_nan != "rewind" or self.cfg.snapshot != "memory":
            return
        newest = self.snapshots[-1].step if self.snapshots else -1
        if newest >= 0 and (step <= newest or step % self.snapshot_every):
            return
        memory = self.snapshots.pop(0).state if len(self.snapshots) == 2 else None
        self.snapshots.append(Snapshot(step, self.engine.local_state(memory)))

    def trouble(self, step: int, means: dict[str, float], grad_norm: float) -> str | None:
        """What is wrong with a step that was just taken, the same answer on all ranks; None: nothing."""
        loss, self.grad_norm = means["loss"], grad_norm
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient's norm is {grad_norm}"
        if not self.cfg.spike:
            return None
        if self.losses is None:
            self.losses = self._recall(step)
        median = statistics.median(self.losses) if len(self.losses) >= ENOUGH else math.inf
        if loss > self.cfg.spike * median:
            return f"loss is {loss:.4g}, more than {self.cfg.spike:g} times the median {median:.4g} before it"
        self.losses.append(loss)
        if dist.rank() == 0:
            with (self.run / "losses.jsonl").open("a") as f:
                f.write(f'{{"step": {step}, "loss": {loss!r}}}\n')
        return None

    def rewind(self, step: int, means: dict[str, float], keys: list[str], trouble: str) -> int:
        """Go back before the step; returns the step to go on with. No save may be under way.

        Raises NotFinite when the run is to stop: because of faults.on_nan, after too many rewinds, or when there is
        nothing to go back to.
        """
        made = len(self.history.rewinds())
        if self.cfg.on_nan == "stop":
            self._stop(step, means, keys, trouble, "lower optim.lr, set optim.clip or faults.on_nan=rewind, and")
        if made >= self.cfg.max_rewinds:
            self._stop(
                step, means, keys, f"{trouble}, after {made} rewinds (faults.max_rewinds),", "lower optim.lr and"
            )
        source = self._snapshot() if self.cfg.snapshot == "memory" else self._whole_checkpoint()
        if source is None:
            self._stop(
                step, means, keys, trouble, "there is no checkpoint to rewind to yet; set faults.snapshot=memory"
            )
        to = source.step if isinstance(source, Snapshot) else checkpoint.step_of(source)
        self._forget(to)
        self._record(step, to, [key for part in dist.gather_objects(keys) for key in part], trouble)
        if isinstance(source, Snapshot):
            source.used = True
            self.engine.load_local_state(source.state, self.history.updates(to))
        else:
            checkpoint.load(self.engine, source, checkpoint.read_state(source)["order"], self.history.updates)
        return to

    def _snapshot(self) -> Snapshot:
        """The newest one that was not gone back to before, or the oldest there is."""
        fresh = [s for s in self.snapshots if not s.used]
        chosen = fresh[-1] if fresh else self.snapshots[0]
        self.snapshots = [s for s in self.snapshots if s.step <= chosen.step]
        return chosen

    def _whole_checkpoint(self) -> Path | None:
        """The same of the checkpoints of this run."""
        folder, found = self.run / "checkpoints", None
        names = [(str(p), self._used(p)) for p in checkpoint.complete(folder)] if dist.rank() == 0 else None
        for name, used in reversed(dist.broadcast(names)):
            if wrong := manifest.problems(Path(name)):
                log.warning("checkpoint refused: %s; looking at an older one", "; ".join(wrong[:5]))
                continue
            found = Path(name)
            if not used:
                break
        return found

    def _used(self, path: Path) -> bool:
        written = (path / manifest.NAME).stat().st_mtime
        return any(e["to"] == checkpoint.step_of(path) and e["time"] > written for e in self.history.rewinds())

    def _forget(self, to: int) -> None:
        """What was saved after the snapshot belongs to a course that is given up: a later start must not take it."""
        if dist.rank() == 0:
            for path in checkpoint.complete(self.run / "checkpoints"):
                if checkpoint.step_of(path) > to:
                    gone = manifest.delete(path)
                    log.info("%s was written after step %d, which the run goes back to", path, to)
                    if not gone:
                        log.warning("%s is being read and stays; delete it before the run is started again", path)
        dist.barrier()
        self.losses = None

    def _record(self, step: int, to: int, keys: list[str], why: str) -> None:
        if dist.rank() == 0:
            path = self.run / "quarantine_batches.jsonl"
            end_line(path)
            append(path, {"step": step, "keys": keys, "why": why})
            log.warning(
                "%s at step %d: back to step %d; its batch of %d is left out from now on (%s), and the learning rate "
                "is multiplied by %g up to step %d",
                why, step, to, len(keys), path, self.cfg.lr_factor, to + self.cfg.lr_steps,
            )  # fmt: skip
        lower = {"lr_factor": self.cfg.lr_factor, "lr_until": to + self.cfg.lr_steps}
        self.history.add("rewind", step, to=to, keys=keys, why=why, **lower)

    def _stop(self, step: int, means: dict[str, float], keys: list[str], trouble: str, way_out: str) -> NoReturn:
        path = self.run / f"not_finite_step_{step}_rank_{dist.rank()}.json"
        quantities = {**means, "grad_norm": self.grad_norm}
        write_json(path, {"step": step, "losses": {k: repr(v) for k, v in quantities.items()}, "keys": keys})
        raise NotFinite(
            f"{trouble} at step {step} (quantities: {quantities}); the sample keys are in {path}. The last "
            f"checkpoint is good: {way_out} continue from it"
        )

    def _recall(self, step: int) -> "deque[float]":
        """The losses before `step`, also those of earlier starts: a spike is the same one with and without a kill."""
        past: list[float] = []
        if dist.rank() == 0:
            end_line(path := self.run / "losses.jsonl")
            known = {line["step"]: line["loss"] for line in json_lines(path)}  # the last one counts
            past = [known[s] for s in sorted(known) if s < step and not self.history.skips(s)][-WINDOW:]
        return deque(dist.broadcast(past), WINDOW)
