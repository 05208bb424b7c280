"""Losses that are not finite, or jump: stop with everything needed to look at the step again, or go back and leave it
out (`faults.on_nan=rewind`)."""

import math
from pathlib import Path

from data_pipeline.errors import UserError
from maws import dist
from maws.config import FaultsConfig
from maws.engine import Engine
from maws.files import write_json
from maws.history import History


class NotFinite(UserError):
    """A loss that is not a number: training on would destroy the weights."""


class Guard:
    """Watches the losses of one training."""

    def __init__(self, cfg: FaultsConfig, engine: Engine, history: History, run: Path, snapshot_every: int) -> None:
        self.cfg, self.engine, self.history, self.run, self.snapshot_every = cfg, engine, history, run, snapshot_every

    def keep(self, step: int) -> None:
        """Before step `step` (steps taken so far): take a snapshot when one is due."""

    def trouble(self, step: int, means: dict[str, float], grad_norm: float) -> str | None:
        """What is wrong with a step that was just taken, the same answer on all ranks; None: nothing."""
        if not math.isfinite(means["loss"]):
            return f"loss is {means['loss']}"
        return None

    def rewind(self, step: int, means: dict[str, float], keys: list[str], trouble: str) -> int:
        """Go back before the step; returns the step to go on with. Raises NotFinite when the run is to stop."""
        path = self.run / f"not_finite_step_{step}_rank_{dist.rank()}.json"
        write_json(path, {"step": step, "losses": {k: repr(v) for k, v in means.items()}, "keys": keys})
        raise NotFinite(
            f"{trouble} at step {step} (quantities: {means}); the sample keys are in {path}. The last "
            f"checkpoint is good: lower optim.lr or set optim.clip and continue from it"
        )
