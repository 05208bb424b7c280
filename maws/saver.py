"""When checkpoints are written, and which are kept."""

from pathlib import Path
from typing import Any

from maws import checkpoint
from maws.config import CheckpointConfig
from maws.engine import Engine


class Saver:
    """Writes the checkpoints of one training into `folder`; `facts` go into every one."""

    def __init__(self, engine: Engine, folder: Path, cfg: CheckpointConfig, facts: dict[str, Any]) -> None:
        self.engine, self.folder, self.cfg, self.facts = engine, folder, cfg, facts
        self.failure = ""  # why the last save of this rank failed; empty: it did not

    def save(self, step: int, metrics: dict[str, float]) -> None:
        """Begin to write the state after `step` steps; all ranks take part. `metrics`: the newest values."""
        checkpoint.save(self.engine, self.folder, step, self.facts, self.cfg.keep)

    def finish(self) -> None:
        """Wait until everything is on disk; all ranks take part. Raises CheckpointError when it could not be."""
