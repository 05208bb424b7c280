"""One checkpoint on its way to the disk, in a thread of every rank; rank 0's thread makes it a checkpoint."""

import contextlib
import errno
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from maws import manifest
from maws.checkpoint import FORMAT, name_of
from maws.files import sha256, sync, write_json, write_whole
from maws.manifest import Entry
from maws.retention import Retention
from maws.tensor_file import specs_of, write_tensors

log = logging.getLogger(__name__)


class Facts(NamedTuple):
    """What state.json says, and which rank this is."""

    step: int
    rank: int
    ranks: int
    about: dict[str, Any]
    metrics: dict[str, float]

    def state(self) -> dict[str, Any]:
        finite = {name: value for name, value in self.metrics.items() if math.isfinite(value)}
        return {"format": FORMAT, "step": self.step, "ranks": self.ranks, **self.about, "metrics": finite}


@dataclass
class Outcome:
    """What became of a save."""

    failure: str = ""  # empty: the checkpoint stands
    bytes: int = 0
    seconds: float = 0.0


class PartFailed(Exception):
    """A rank could not write its part."""


class Job(threading.Thread):
    """Write `state` as this rank's part of a checkpoint in `folder`; on rank 0 also put the checkpoint together."""

    def __init__(
        self, folder: Path, token: str, facts: Facts, state: dict[str, Tensor], retention: Retention, patience: float
    ) -> None:
        super().__init__(name=f"save-{facts.step}", daemon=True)
        self.folder, self.facts, self.tensors, self.retention, self.patience = folder, facts, state, retention, patience
        self.tmp = folder / f"tmp-{name_of(facts.step)}.{token}"
        self._written, self._own_failure = threading.Event(), ""
        self._told: dict[int, str] = {}  # ranks that are known to have failed, and why
        self._result = Outcome()

    def own_part(self) -> str:
        """Wait until this rank's part is written; why it could not be, or nothing."""
        self._written.wait()
        return self._own_failure

    def outcome(self, failed: dict[int, str]) -> Outcome:
        """Rank 0: wait for the whole, knowing from the others which ranks have failed."""
        self._told |= failed
        self.join()
        if self._result.failure:
            shutil.rmtree(self.tmp, ignore_errors=True)  # again: another rank may have come late
        return self._result

    def run(self) -> None:
        begun = time.perf_counter()
        try:
            entry = self._write_part()
            if self.facts.rank == 0:
                self._result.bytes = self._put_together(entry)
        except Exception as error:  # whatever it is, it must not pass for a checkpoint
            self._result.failure = self._explain(error)
            if self.facts.rank == 0:
                shutil.rmtree(self.tmp, ignore_errors=True)
                log.warning("%s. The run goes on and tries again at the next checkpoint", self._result.failure)
        finally:
            self._result.seconds = time.perf_counter() - begun
            self._written.set()

    def _write_part(self) -> Entry:
        """Rank 0's comes back to it, the others' is left beside the file: its entry, or why there is none."""
        path, note = self._paths(self.facts.rank)
        try:
            if self.facts.rank == 0:
                self._remove_leftovers()
            self.tmp.mkdir(parents=True, exist_ok=True)
            specs = specs_of(self.tensors)
            entry = Entry(path.name, *write_tensors(path, specs, ((name, self.tensors[name]) for name in specs)))
        except Exception as error:
            self._own_failure = _words(error)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # makes room for the note
                write_json(note, {"error": self._own_failure})
            raise
        else:
            if self.facts.rank:
                write_json(note, entry._asdict())
            return entry
        finally:
            self._written.set()

    def _paths(self, rank: int) -> tuple[Path, Path]:
        return self.tmp / f"rank_{rank:05}.safetensors", self.tmp / f"rank_{rank:05}.json"

    def _remove_leftovers(self) -> None:
        """What killed and failed saves left behind: a run that is killed often must not fill the disk."""
        for left in [*self.folder.glob("tmp-step_*"), *self.folder.glob("tmp-old-*")]:
            if left != self.tmp:
                shutil.rmtree(left, ignore_errors=True)

    def _put_together(self, own: Entry) -> int:
        files = [own, *self._entries()]
        state = self.tmp / "state.json"
        write_json(state, self.facts.state())
        files.append(Entry(state.name, state.stat().st_size, sha256(state)))
        manifest.write(self.tmp, files)
        sync(self.tmp)
        self._rename()
        try:
            write_whole(self.folder / "latest", name_of(self.facts.step) + "\n")
            self.retention.prune(self.folder, self.facts.step)
        except OSError as error:  # the checkpoint stands all the same
            log.warning("%s: %s", self.folder, _words(error))
        return sum(file.bytes for file in files)

    def _entries(self) -> Iterator[Entry]:
        """The others' entries. Raises PartFailed naming the first rank without one."""
        until, pause = time.monotonic() + self.patience, 0.01
        for rank in range(1, self.facts.ranks):
            _, note = self._paths(rank)
            while not note.exists():
                if self._told:
                    raise PartFailed("rank {}: {}".format(*min(self._told.items())))
                if time.monotonic() > until:
                    raise PartFailed(f"rank {rank} has not said within {self.patience:g} s that its part is written")
                time.sleep(pause)
                pause = min(1.0, 1.5 * pause)
            told = json.loads(note.read_text())
            if "error" in told:
                raise PartFailed(f"rank {rank}: {told['error']}")
            note.unlink()
            yield Entry(**told)

    def _rename(self) -> None:
        """One of the same step, from before the run went back, makes place first: if this is killed in between, the new
        one is whole under its temporary name, and `checkpoint.recover` finishes the renaming."""
        final, old = self.folder / name_of(self.facts.step), self.folder / f"tmp-old-{name_of(self.facts.step)}"
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        try:
            self.tmp.rename(final)
        except OSError:
            if old.exists():
                old.rename(final)
            raise
        sync(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _explain(self, error: Exception) -> str:
        """What failed, what stands, and the way out."""
        why = str(error) if isinstance(error, PartFailed) else f"rank {self.facts.rank}: {_words(error)}"
        return (
            f"the checkpoint of step {self.facts.step} could not be written ({why}); the one before it stays whole. "
            f"{_way_out(why)}"
        )


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        where = f" at {error.filename}" if error.filename else ""
        return f"{errno.errorcode.get(error.errno, error.errno)}, {error.strerror}{where}"
    return repr(error)


def _way_out(why: str) -> str:
    if "ENOSPC" in why or "EDQUOT" in why or "EFBIG" in why:
        return "Make room on the disk of the run, or lower checkpoint.keep"
    if "EACCES" in why or "EPERM" in why or "EROFS" in why:
        return "Make the run's folder writable for this user on every machine"
    if "has not said" in why:
        return "See whether that rank's machine still writes to the run's folder"
    return "See to the disk of the run"
