"""Checkpoints of a run: written whole or not at all, checked by hash, readable on any number of ranks.

    RUN/checkpoints/step_0000500/rank_00000.safetensors   each rank's part of weights, moments, means; buffers
                                 state.json               step, ranks, the order's identity, the newest metrics
                                 manifest.json            size and sha256 of the above
    RUN/checkpoints/latest                                moved last

The tensors are safetensors under parameter names, not DeepSpeed's pickles: nothing is executed when a checkpoint is
read, a parameter's flat partitions can be cut anew for another number of ranks, and DeepSpeed's universal form with its
two faults in 0.19.8 (hyper-parameters of group 0 everywhere, one shared step count) is not needed. Frozen parameters
are not saved: they come from the release a stage starts from, which the run's config names with its hash. A momentum
target's are: as float32 means, under `average/`; and a mean of all trained weights (`optim.ema`), under `ema/`.

saver.py writes them, retention.py deletes them, manifest.py says whether one is whole.
"""

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from maws import dist, manifest
from maws.tensor_file import TensorFile

if TYPE_CHECKING:  # only named here: an export reads checkpoints without DeepSpeed
    from maws.engine import Engine

log = logging.getLogger(__name__)

FORMAT = 1


class CheckpointError(DataError):
    """A checkpoint or release that is missing, damaged or of another run."""


def name_of(step: int) -> str:
    return f"step_{step:07}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def complete(folder: Path) -> list[Path]:
    """The checkpoints that were finished, oldest first; what a kill left behind has another name."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and (p / manifest.NAME).exists()]
    return sorted(found, key=step_of)


def recover(folder: Path) -> None:
    """Finish saves that were killed after their last file was on the disk and before they had their name.

    All ranks call this before a run starts; never while a save may be under way.
    """
    if dist.rank() == 0:
        for left in sorted(folder.glob("tmp-step_*")):
            final = folder / left.name.removeprefix("tmp-").partition(".")[0]
            if re.fullmatch(r"step_\d+", final.name) and (left / manifest.NAME).exists() and not final.exists():
                left.rename(final)
                log.info("%s had been written whole before the run was killed, and has its name now", final)
    dist.barrier()


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose hashes hold; a damaged one is named and passed over. All ranks take part."""
    found = dist.broadcast([str(p) for p in reversed(complete(folder))] if dist.rank() == 0 else None)
    if dist.rank() == 0 and (odd := _odd_latest(folder)):
        log.warning("%s; taking the newest whole checkpoint", odd)
    for checkpoint in map(Path, found):
        wrong = manifest.problems(checkpoint)
        if not wrong:
            return checkpoint
        if dist.rank() == 0:
            log.warning("checkpoint refused: %s; falling back to an older one", "; ".join(wrong[:5]))
    return None


def _odd_latest(folder: Path) -> str:
    """What is wrong with the file that says which checkpoint was finished last; it is for people, nothing relies on
    it."""
    path = folder / "latest"
    if not path.is_file():
        return ""
    name = path.read_bytes()[:100].decode(errors="replace").strip()
    if not re.fullmatch(r"step_\d+", name):
        return f"{path} does not hold the name of a checkpoint: {name!r}"
    return "" if (folder / name / manifest.NAME).is_file() else f"{path} names {name}, which is not there"


def find(run: Path, resume: str, option: str = "--resume") -> Path | None:
    """The checkpoint that `--resume` means: `auto` may find none, `latest` and a path may not. All ranks take part.

    `option` is what errors call it.

    Raises CheckpointError when there is none, or the one that was named is damaged.
    """
    folder = run / "checkpoints"
    if resume in ("auto", "latest"):
        found = newest_whole(folder)
        if found is None and resume == "latest":
            raise CheckpointError(f"{folder} holds no whole checkpoint; --resume auto starts the run from step 0")
        return found
    path = Path(resume)
    if not (path / manifest.NAME).is_file():
        raise CheckpointError(f"{option} {resume}: no checkpoint there; expected a folder like {folder}/step_0000500")
    if wrong := manifest.problems(path):
        raise CheckpointError(
            f"{option} {resume}: {'; '.join(wrong[:5])}; use {option} latest for the newest whole one"
        )
    return path


def load(engine: "Engine", checkpoint: Path, identity: str, updates: Callable[[int], int] = int) -> int:
    """Continue from a checkpoint, on the same or another number of ranks; returns how many steps had been taken.

    `updates` says in how many of these the optimizer ran (History.updates); all of them in a run without rewinds.
    Raises CheckpointError when it belongs to a run with other samples or other parameters.
    """
    with manifest.reading(checkpoint):
        state = read_state(checkpoint)
        if state["order"] != identity:
            raise CheckpointError(
                f"{checkpoint} was written by a run with another sample order (shard set, seed, batch size, streams or "
                f"window); continuing would not be the same run. Start a new one with another --run"
            )
        _same_contents(contents(engine), state, checkpoint)
        engine.load_local_state(_local_part(engine, RankFiles(checkpoint, state["ranks"])), updates(state["step"]))
    return state["step"]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json. Raises CheckpointError when it is not one, or of a later format."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text())
        if state["format"] > FORMAT:
            raise CheckpointError(f"{path} has format {state['format']}, this version reads up to {FORMAT}")
        if not isinstance(state["ranks"], int) or not 0 < state["ranks"] <= manifest.MAX_RANKS:
            raise CheckpointError(f"{path} has {state['ranks']!r} as the number of its ranks")
        return {"buffers": [], **state} | {k: state[k] for k in ("step", "ranks", "order", "elements")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{path} cannot be used: {e!r}; use --resume auto for the newest whole one") from None


def contents(engine: "Engine") -> dict[str, Any]:
    """Which parameters (and of how many elements) and which buffers a checkpoint holds, and what of each parameter."""
    keys = engine.partitions()
    sizes = {key.partition("/")[2]: engine.partition(p)[0] for key, p in keys.items()}
    return {
        "elements": sizes,
        "buffers": sorted(engine.buffers()),
        "kinds": sorted({k.partition("/")[0] for k in keys}),
    }


def _same_contents(here: dict[str, Any], there: dict[str, Any], checkpoint: Path) -> None:
    """Raises CheckpointError when a checkpoint is not of this model, or lacks the mean of its weights."""
    ours, theirs = (c["elements"] | dict.fromkeys(c["buffers"], 0) for c in (here, there))
    if ours != theirs:
        wrong = sorted(k for k in set(ours) | set(theirs) if ours.get(k) != theirs.get(k))
        raise CheckpointError(f"{checkpoint} holds other parameters than this model: {', '.join(wrong[:5])}")
    mean_here, mean_there = ("ema" in c.get("kinds", []) for c in (here, there))
    if mean_here and not mean_there:
        raise CheckpointError(
            f"{checkpoint} holds no mean of the weights, because the run that wrote it had optim.ema=0; the mean of "
            f"earlier steps cannot be made up now. Continue with optim.ema=0, or start a new run with another --run"
        )
    if mean_there and not mean_here and dist.rank() == 0:
        log.warning("%s holds a mean of the weights, which optim.ema=0 leaves behind", checkpoint)


class RankFiles:
    """The files of a checkpoint that `ranks` ranks wrote, each opened when something of it is read."""

    def __init__(self, checkpoint: Path, ranks: int) -> None:
        self.checkpoint, self.ranks = checkpoint, ranks
        self._files: dict[int, TensorFile] = {}

    def __getitem__(self, rank: int) -> TensorFile:
        if rank not in self._files:
            self._files[rank] = TensorFile(self.checkpoint / f"rank_{rank:05}.safetensors")
        return self._files[rank]

    def keys(self) -> set[str]:
        """The same in all files. Raises CheckpointError for a damaged one, as the functions below do."""
        try:
            return self[0].keys()
        except (OSError, ValueError) as e:
            raise self._damaged(e) from None

    def whole(self, key: str) -> Tensor:
        """What all ranks have alike: a buffer."""
        try:
            return self[0].read(key)
        except (OSError, ValueError, KeyError) as e:
            raise self._damaged(e) from None

    def cut(self, key: str, start: int, size: int, elements: int) -> Tensor:
        """Elements [start, start + size) of a flat parameter of `elements`, zeros behind its end.

        Every rank has an equal part of it, so only the files that overlap are opened, and only those bytes are read.
        """
        part = torch.zeros(size)
        try:
            (length,) = self[0].spec(key).shape
            if length * self.ranks < elements:
                raise CheckpointError(
                    f"{self.checkpoint} has {length * self.ranks} elements of {key}, {elements} are needed"
                )
            for rank in range(start // length, min(self.ranks, math.ceil(min(start + size, elements) / length))):
                offset = rank * length
                a, b = max(start, offset), min(start + size, offset + length, elements)
                part[a - start : b - start] = self[rank].read_flat(key, a - offset, b - offset)
        except (OSError, ValueError, KeyError, RuntimeError) as e:
            raise self._damaged(e) from None
        return part

    def _damaged(self, why: Exception) -> CheckpointError:
        return CheckpointError(f"{self.checkpoint} cannot be read: {why}; use --resume auto for the newest whole one")


def _local_part(engine: "Engine", files: RankFiles) -> dict[str, Tensor]:
    """This rank's partitions, cut out of those that other ranks may have written, and the buffers."""
    out: dict[str, Tensor] = {}
    for key, p in engine.partitions().items():
        elements, size = engine.partition(p)
        out[key] = files.cut(key, dist.rank() * size, size, elements)
    return out | {key: files.whole(key) for key in engine.buffers()}
