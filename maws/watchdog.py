"""Ranks watch each other: one that dies or hangs is named, and nobody waits half an hour for it."""

from pathlib import Path

from maws.config import FaultsConfig


class Watchdog:
    """Started on all ranks once the process group stands; ends the process when another rank is gone."""

    def __init__(self, run: Path, cfg: FaultsConfig) -> None:
        self.run, self.cfg = run, cfg

    def pulse(self, step: int, doing: str = "step") -> None:
        """This rank is alive and begins this step."""

    def farewell(self, why: str = "") -> None:
        """This rank is about to leave: because it is done, or (`why`) because it failed, which the others are told."""
