"""Learning-rate schedules: step -> multiplier of the peak rate, pure functions."""

import math
from collections.abc import Callable

from maws.config import ConfigError, OptimConfig, nearest

Schedule = Callable[[int], float]


def warmup_cosine(warmup: int, total: int) -> Schedule:
    """Linear from 0 over `warmup` steps, then half a cosine to 0 at `total` (MAE, recipes §2.5)."""
    return lambda step: (
        _warm(step, warmup) if step < warmup else 0.5 * (1 + math.cos(math.pi * _past(step, warmup, total)))
    )


def warmup_linear(warmup: int, total: int) -> Schedule:
    """Linear from 0 over `warmup` steps, then linear to 0 at `total` (WSP, recipes §6.3)."""
    return lambda step: _warm(step, warmup) if step < warmup else 1 - _past(step, warmup, total)


def constant(warmup: int, total: int) -> Schedule:
    """Linear from 0 over `warmup` steps, then 1."""
    return lambda step: _warm(step, warmup) if step < warmup else 1.0


def multistep(warmup: int, total: int, milestone: int | None = None, gamma: float = 0.1) -> Schedule:
    """Linear from 0 over `warmup` steps, then 1, and `gamma` from step `milestone` on (SimMIM, recipes §4.7)."""
    change = total if milestone is None else milestone
    return lambda step: _warm(step, warmup) if step < warmup else gamma if step >= change else 1.0


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "cosine": warmup_cosine,
    "linear": warmup_linear,
    "constant": constant,
    "multistep": multistep,
}


def schedule_of(cfg: OptimConfig, warmup: int, total: int, milestone: int) -> Schedule:
    """The schedule of a run. Raises ConfigError for an unknown one, a rate that is not above 0, and a milestone within
    the warm-up.
    """
    if not cfg.lr > 0:
        raise ConfigError(f"optim.lr={cfg.lr:g} trains nothing; give a learning rate above 0")
    if cfg.schedule not in SCHEDULES:
        raise ConfigError(f"optim.schedule={cfg.schedule} is not known; {nearest(cfg.schedule, list(SCHEDULES))}")
    if not 0 <= cfg.min_lr < cfg.peak_lr:
        raise ConfigError(
            f"optim.min_lr={cfg.min_lr:g} must be at least 0 and less than the learning rate, which is "
            f"{cfg.peak_lr:.3g} at batch {cfg.batch_size}"
        )
    if cfg.min_lr and cfg.schedule not in ("cosine", "linear"):
        raise ConfigError(f"optim.min_lr={cfg.min_lr:g} is where cosine and linear end; {cfg.schedule} has no such end")
    if cfg.schedule != "multistep":
        falling = _ending_at(cfg.min_lr / cfg.peak_lr, warmup, SCHEDULES[cfg.schedule](warmup, total))
        return _starting_at(cfg.warmup_lr / cfg.lr, warmup, falling)
    if milestone < warmup:
        raise ConfigError(
            f"optim.milestone={cfg.milestone} is step {milestone}, within the {warmup} steps of warm-up; "
            f"set it later, or shorten optim.warmup"
        )
    return _starting_at(cfg.warmup_lr / cfg.lr, warmup, multistep(warmup, total, milestone))


def _starting_at(start: float, warmup: int, schedule: Schedule) -> Schedule:
    """The same with a warm-up from `start` instead of 0."""
    return lambda step: start + (1 - start) * schedule(step) if step < warmup else schedule(step)


def _ending_at(end: float, warmup: int, schedule: Schedule) -> Schedule:
    """The same with a fall to `end` instead of 0 (MAE's fine-tuning, recipes §9.4)."""
    return lambda step: schedule(step) if step < warmup else end + (1 - end) * schedule(step)


def _warm(step: int, warmup: int) -> float:
    return step / warmup  # as in MAE's code the first step is taken with just the value it begins at, which is 0


def _past(step: int, warmup: int, total: int) -> float:
    return min(1.0, (step - warmup) / max(1, total - warmup))
