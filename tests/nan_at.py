"""A training with faults in it: `maws/train.py` with things changed from outside, on one rank, at given steps.

Training([arguments, [["nan", 21, 1]]], ranks=2, target="nan_at:train")      # the loss of rank 1 is nan at step 21
Training([arguments, [["sigterm", "save", 0]]], ranks=2, target=…)           # rank 0 is told to stop as it saves
"""

import os
import signal
import time
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

IN_FORWARD = ("nan", "gradient", "spike", "statistics", "raise", "hang")
AT_PULSE = {"killed": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "sigstop": signal.SIGSTOP}


def train(arguments: list[str], faults: list[tuple[str, int | str, int]]) -> int:
    """Run it. A fault is (what, when, rank): when is a step or what the rank is doing; rank -1 means all."""
    from maws import dist
    from maws.engine import Engine
    from maws.train import main
    from maws.watchdog import Watchdog

    due: list[str] = []
    pulse, step = Watchdog.pulse, Engine.step
    assert all(what in (*IN_FORWARD, *AT_PULSE) for what, _, _ in faults)

    def pulse_with_faults(self: Watchdog, number: int, doing: str = "step") -> None:
        pulse(self, number, doing)
        now = number if doing == "step" else doing
        due[:] = [what for what, when, rank in faults if when == now and rank in (-1, dist.rank())]
        for what in due:
            if what in AT_PULSE:
                os.kill(os.getpid(), AT_PULSE[what])

    def step_with_faults(self: Engine, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        right = self.objective.forward

        def wrong(*a: Any, **k: Any) -> dict[str, Tensor]:
            losses = right(*a, **k)
            for what in due:
                losses = happen(what, losses)
                if what == "statistics":  # as a forward on values that are not finite leaves them
                    for buffer in self.buffers().values():
                        buffer.fill_(torch.nan if buffer.is_floating_point() else 0)
            return losses

        self.objective.forward = wrong  # type: ignore[method-assign]
        try:
            return step(self, *args, **kwargs)
        finally:
            with suppress(AttributeError):
                del self.objective.forward

    Watchdog.pulse, Engine.step = pulse_with_faults, step_with_faults  # type: ignore[method-assign]
    try:
        return main(arguments)
    finally:
        Watchdog.pulse, Engine.step = pulse, step


def happen(what: str, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """What goes wrong in a forward."""
    if what in ("nan", "statistics"):
        return losses | {"loss": losses["loss"] * torch.nan}
    if what == "gradient":
        losses["loss"].register_hook(lambda gradient: gradient * torch.nan)
    if what == "spike":
        return losses | {"loss": losses["loss"] * 50}
    if what == "raise":
        raise ArithmeticError("something went wrong in a forward")
    if what == "hang":
        time.sleep(600)
    return losses
