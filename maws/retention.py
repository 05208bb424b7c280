"""Which checkpoints a run keeps: the newest, those of round numbers of steps, and the best by a metric.

checkpoint.keep=3  checkpoint.keep_every="10000 steps"  checkpoint.keep_best=probe/knn_top1
"""

import math
from dataclasses import dataclass
from pathlib import Path

from maws import manifest
from maws.checkpoint import CheckpointError, complete, read_state, step_of
from maws.config import CheckpointConfig, ConfigError, nearest

LOWEST, HIGHEST = "train/", "probe/"  # which end of a group's metrics is good


@dataclass(frozen=True)
class Retention:
    """Rules; raises ConfigError for those that cannot be followed."""

    keep: int  # the newest ones
    every: int = 0  # steps; multiples are kept for ever; 0: none
    best: str = ""  # a metric, lowest of train/…, highest of probe/…; empty: none

    @classmethod
    def of(cls, cfg: CheckpointConfig, every: int, probed: bool = True) -> "Retention":
        if cfg.keep < 1:
            raise ConfigError(
                f"checkpoint.keep={cfg.keep} must be at least 1: a run goes on from its newest checkpoint"
            )
        if cfg.keep_best and not cfg.keep_best.startswith((LOWEST, HIGHEST)):
            raise ConfigError(
                f"checkpoint.keep_best={cfg.keep_best} must be a metric train/… (the lowest is best) or probe/… (the "
                f"highest is); metrics.jsonl of a run has their names"
            )
        if cfg.keep_best.startswith(HIGHEST) and not probed:
            raise ConfigError(f"checkpoint.keep_best={cfg.keep_best} needs a probe: set probe.every")
        return cls(cfg.keep, every, cfg.keep_best)

    def check(self, metrics: dict[str, float]) -> None:
        """Raises ConfigError when metrics of the group are there and not the one that says which is best."""
        known = sorted(name for name in metrics if name.partition("/")[0] == self.best.partition("/")[0])
        if self.best and known and self.best not in known:
            raise ConfigError(
                f"checkpoint.keep_best={self.best} is not measured by this run; {nearest(self.best, known)}"
            )

    def kept(self, values: dict[int, float], step: int) -> set[int]:
        """Of checkpoints at these steps (`values`: each with its metric, nan: none), those to keep after a save of
        `step`.

        Newer ones than that were written before the run went back to an older one: they neither count nor go.
        """
        past = sorted(s for s in values if s <= step)
        kept = {*past[-self.keep :], step, *(s for s in values if s > step)}
        if self.every:
            kept |= {s for s in past if s % self.every == 0}
        measured = [s for s in past if math.isfinite(values[s])]
        if self.best and measured:
            sign = 1 if self.best.startswith(HIGHEST) else -1
            kept.add(max(measured, key=lambda s: (sign * values[s], s)))
        return kept

    def prune(self, folder: Path, step: int) -> list[Path]:
        """Delete what is not kept after a save of `step`, but nothing that is being read; what was deleted."""
        found = {step_of(p): p for p in complete(folder)}
        kept = self.kept({s: self._value(p) for s, p in found.items()}, step)
        return [p for s, p in found.items() if s not in kept and manifest.delete(p)]

    def _value(self, checkpoint: Path) -> float:
        if not self.best:
            return math.nan
        try:
            return float(read_state(checkpoint).get("metrics", {}).get(self.best, math.nan))
        except (CheckpointError, TypeError, ValueError, AttributeError):
            return math.nan
