"""The folder of a run before its first step: whose it is, whether it is continued, and what is written down about it.

RUN/config.json   the whole configuration, versions, revision, hash of the shard set, the order's facts
RUN/lock          held by the one training that may write here
"""

import logging
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, BinaryIO

from maws import __version__, checkpoint, config, dist
from maws.checkpoint import CheckpointError
from maws.config import ConfigError, TrainConfig
from maws.files import try_lock, write_json

log = logging.getLogger(__name__)

LEAVING = 30.0  # seconds that a training which was told to stop is given to be gone


class RunLock:
    """Two trainings never write one folder: a job that is queued again may meet ranks that outlived their launcher.

    A lock of the system on RUN/lock, which goes with the process; on a file system without locks there is none.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._file: BinaryIO | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def take(self, make: bool = True) -> None:
        """All ranks call it; a folder that is not there yet is made, or left to a later call.

        Rank 0 waits a little for a training that is leaving. Raises CheckpointError when it stays.
        """
        mine = dist.rank() == 0 and not self._file and (make or self.run.exists())
        holder = self._wait() if mine else ""
        if holder := dist.broadcast(holder):
            raise CheckpointError(
                f"{self.run} is being trained by {holder}; stop it (SIGTERM lets it save), or choose another --run"
            )

    def _wait(self) -> str:
        self.run.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(self.run / "lock", os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        until, told = time.monotonic() + LEAVING, False
        while not try_lock(file):
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip() or "another process"
            if time.monotonic() > until:
                file.close()
                return holder
            if not told:
                log.warning("waiting for %s, which trains in %s, to leave", holder, self.run)
            told = True
            time.sleep(0.5)
        file.truncate(0)
        file.seek(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        self._file = file
        return ""


def finished(run: Path, cfg: TrainConfig, shards: str) -> bool:
    """Is there a release of just this configuration? Raises ConfigError when there is one of another."""
    if not (run / "release" / "config.json").exists():
        return False
    compare(run, cfg, shards)
    return True


def claim(run: Path, resume: str | None) -> Path | None:
    """The checkpoint to continue from. Raises ConfigError when the folder holds a run that nobody said to continue."""
    checkpoint.recover(run / "checkpoints")
    if resume:
        return checkpoint.find(run, resume)
    if checkpoint.complete(run / "checkpoints"):
        raise ConfigError(
            f"{run} holds a run that is not finished; add --resume auto to continue it, or choose another --run"
        )
    return None


def compare(run: Path, cfg: TrainConfig, shards: str) -> None:
    """Raises ConfigError when the run in the folder is not the one that was asked for."""
    old, new = config.load_json(run / "config.json"), config.to_json(cfg) | {"shards_sha256": shards}
    different = config.differences({k: old.get(k) for k in new}, new)
    if different:
        raise ConfigError(
            f"{run} holds a run with other settings ({'; '.join(different[:5])}); "
            f"repeat its own settings to continue it, or choose another --run"
        )


def remember(
    run: Path, stage: str, preset: str, cfg: TrainConfig, lineage: list[str], shards: str, order: dict[str, Any]
) -> dict[str, Any]:
    """Write RUN/config.json, or check that it is the same as what is being continued."""
    record = {
        "stage": stage,
        "preset": preset,
        "lineage": lineage,
        **config.to_json(cfg),
        "shards_sha256": shards,
        "order": order,  # for the ledger
        "revision": revision(),
        "versions": versions(),
    }
    if dist.rank() == 0 and (run / "checkpoints").exists() and (run / "config.json").exists():
        compare(run, cfg, shards)
    dist.barrier()
    if dist.rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "config.json", record)
    return record


def revision() -> str:
    """The git revision of the code, with `+` when files were changed since; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"maws": __version__, **{n: version(n) for n in ("torch", "deepspeed", "timm", "transformers")}}
