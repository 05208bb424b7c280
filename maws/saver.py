"""When checkpoints are written, and that training does not wait for them.

    save(step)    every rank: wait for the save before this one; copy this rank's state to the host; return
    in a thread   every rank: tmp-step_0000500.TOKEN/rank_00000.safetensors, written, hashed, synced; its entry beside
                  rank 0: waits for all entries; state.json, manifest.json, sync, rename, sync, `latest`, retention
    finish()      every rank: wait for the last save; CheckpointError when it failed

Threads speak through files only: collectives of two threads would meet in another order on every rank. What became of
a save is agreed by the main threads, at the next save or at the end. A save that fails leaves no trace but a warning,
and the checkpoint before it stays: the next interval tries again. Only the last one must not fail.
"""

import logging
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from maws import dist
from maws.checkpoint import CheckpointError, contents
from maws.config import CheckpointConfig
from maws.history import History
from maws.retention import Retention
from maws.save_job import Facts, Job, Outcome

if TYPE_CHECKING:  # only named here: to write files needs no DeepSpeed
    from maws.engine import Engine

log = logging.getLogger(__name__)

PATIENCE = 600.0  # seconds for which rank 0, its own part written, waits for the others' entries to be seen


class Saver:
    """Writes the checkpoints of one training into `folder`; `facts` go into every one.

    `keep_every`: checkpoint.keep_every in steps. Raises ConfigError for a retention that cannot be followed.
    """

    def __init__(
        self, engine: "Engine", folder: Path, cfg: CheckpointConfig, facts: dict[str, Any], keep_every: int = 0,
        history: History | None = None, patience: float = PATIENCE,
    ) -> None:  # fmt: skip
        self.engine, self.folder, self.cfg, self.facts, self.history = engine, folder, cfg, facts, history
        self.retention, self.patience = Retention.of(cfg, keep_every), patience
        self.failure = ""  # why the newest save failed, the same on all ranks; empty: it did not
        self.blocked_seconds = 0.0  # for which this rank's training stood still, over all saves
        self._host: dict[str, Tensor] = {}  # the copy, whose memory serves every save
        self._job: Job | None = None
        self._saves = 0
        self._token: str = dist.broadcast(secrets.token_hex(4) if dist.rank() == 0 else None)

    def save(self, step: int, metrics: dict[str, float]) -> None:
        """Begin to write the state after `step` steps; all ranks take part. `metrics`: the newest values.

        Raises ConfigError when they lack the one that checkpoint.keep_best names; the state is on the disk then.
        """
        self.settle()
        begun = time.perf_counter()
        self._host = self.engine.local_state(self._host)
        facts = Facts(step, dist.rank(), dist.world_size(), contents(self.engine) | self.facts, metrics)
        self._saves += 1
        name = f"{self._token}-{self._saves}"  # no save meets files of another, not even of this step
        self._job = Job(self.folder, name, facts, self._host, self.retention, self.patience)
        self._job.start()
        self.blocked_seconds += time.perf_counter() - begun
        if not self.cfg.asynchronous:
            self.settle()
        try:
            self.retention.check(metrics)
        except Exception:
            self.settle()
            raise

    def finish(self) -> None:
        """Wait until everything is on disk; all ranks take part. Raises CheckpointError when it could not be."""
        self.settle()
        if self.failure:
            raise CheckpointError(f"{self.failure}. Then continue with --resume auto from the checkpoint before it")

    def settle(self) -> None:
        """Wait for the save that is under way, if there is one, and agree on what became of it; all ranks take part.

        Also before a run goes back to an earlier step: else files of a later one would appear behind it.
        """
        if self._job is None:
            return
        begun = time.perf_counter()
        job, self._job = self._job, None
        failed = {rank: why for rank, why in enumerate(dist.gather_objects(job.own_part())) if why}
        outcome: Outcome = dist.broadcast(job.outcome(failed) if dist.rank() == 0 else None)
        self.failure = outcome.failure
        self.blocked_seconds += time.perf_counter() - begun
        if self.history is not None:
            told = {"failure": outcome.failure} if outcome.failure else {"bytes": outcome.bytes}
            event = "save_failed" if outcome.failure else "save"
            self.history.add(event, job.facts.step, seconds=round(outcome.seconds, 3), **told)
