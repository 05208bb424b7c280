"""Checkpoints of a run: written whole or not at all, checked by hash, readable on any number of ranks.

    RUN/checkpoints/step_0000500/rank_00000.safetensors   each rank's part of weights, moments, means; buffers
                                 state.json               step, ranks, the order's identity
                                 manifest.json            size and sha256 of the above
    RUN/checkpoints/latest                                moved last

The tensors are safetensors under parameter names, not DeepSpeed's pickles: nothing is executed when a checkpoint is
read, a parameter's flat partitions can be cut anew for another number of ranks, and DeepSpeed's universal form with its
two faults in 0.19.8 (hyper-parameters of group 0 everywhere, one shared step count) is not needed. Frozen parameters
are not saved: they come from the release a stage starts from, which the run's config names with its hash. A momentum
target's are: as float32 means, under `average/`.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.errors import DataError
from maws import dist
from maws.engine import Engine
from maws.files import sha256, sync, write_json, write_whole

log = logging.getLogger(__name__)

FORMAT = 1


class CheckpointError(DataError):
    """A checkpoint or release that is missing, damaged or of another run."""


def save(engine: Engine, folder: Path, step: int, facts: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint of step `step`; all ranks take part. A kill at any moment leaves the previous one whole."""
    name = f"step_{step:07}"
    tmp, final = folder / f"tmp-{name}", folder / name
    if dist.rank() == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    dist.barrier()
    mine = tmp / f"rank_{dist.rank():05}.safetensors"
    save_file(engine.local_state(), mine)
    sync(mine)
    entry = {"name": mine.name, "bytes": mine.stat().st_size, "sha256": sha256(mine)}
    files = dist.gather_objects(entry)  # after this every rank has written and synced
    if dist.rank() == 0:
        state = {"format": FORMAT, "step": step, "ranks": dist.world_size(), **_contents(engine), **facts}
        write_json(tmp / "state.json", state)
        path = tmp / "state.json"
        files.append({"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)})
        write_json(tmp / "manifest.json", {"format": FORMAT, "files": files})
        sync(tmp)
        if final.exists():  # the same step again, after a resume that began before it
            shutil.rmtree(final)
        tmp.rename(final)
        sync(folder)
        write_whole(folder / "latest", name + "\n")
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def complete(folder: Path) -> list[Path]:
    """The checkpoints that were finished, oldest first; what a kill left behind has another name."""
    return sorted(
        p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and (p / "manifest.json").exists()
    )


def problems(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint's files, one line each; reads all of them."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as e:
        return [f"{checkpoint / 'manifest.json'} cannot be read: {e}"]
    found = []
    for entry in files:
        path = checkpoint / entry["name"]
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size != entry["bytes"]:
            found.append(f"{path} has {path.stat().st_size} bytes, {entry['bytes']} were written")
        elif sha256(path) != entry["sha256"]:
            found.append(f"{path} does not have the hash it was written with")
    return found


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose hashes hold, decided on rank 0; a damaged one is named and passed over."""
    chosen: str | None = None
    if dist.rank() == 0:
        for checkpoint in reversed(complete(folder)):
            wrong = problems(checkpoint)
            if not wrong:
                chosen = str(checkpoint)
                break
            log.warning("checkpoint refused: %s; falling back to an older one", "; ".join(wrong))
    chosen = dist.broadcast(chosen)
    return Path(chosen) if chosen else None


def find(run: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` means: `auto` may find none, `latest` and a path may not.

    Raises CheckpointError when there is none, or the one that was named is damaged.
    """
    folder = run / "checkpoints"
    if resume in ("auto", "latest"):
        found = newest_whole(folder)
        if found is None and resume == "latest":
            raise CheckpointError(f"{folder} holds no whole checkpoint; --resume auto would start the run from step 0")
        return found
    path = Path(resume)
    if not (path / "manifest.json").is_file():
        raise CheckpointError(f"--resume {resume}: no checkpoint there; expected a folder like {folder}/step_0000500")
    wrong = dist.broadcast(problems(path) if dist.rank() == 0 else None)
    if wrong:
        raise CheckpointError(f"--resume {resume}: {'; '.join(wrong)}; use --resume auto for the newest whole one")
    return path


def load(engine: Engine, checkpoint: Path, identity: str) -> int:
    """Continue from a checkpoint, on the same or another number of ranks; returns how many steps had been taken.

    Raises CheckpointError when it belongs to a run with other samples or other parameters.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    if state["order"] != identity:
        raise CheckpointError(
            f"{checkpoint} was written by a run with another sample order (shard set, seed, batch size, streams or "
            f"window); continuing would not be the same run. Start a new one with another --run"
        )
    here, there = (c["elements"] | dict.fromkeys(c.get("buffers", []), 0) for c in (_contents(engine), state))
    if here != there:
        wrong = sorted(k for k in set(here) | set(there) if here.get(k) != there.get(k))
        raise CheckpointError(f"{checkpoint} holds other parameters than this model: {', '.join(wrong[:5])}")
    engine.load_local_state(_local_part(engine, checkpoint, state["ranks"]), state["step"])
    return state["step"]


def _contents(engine: Engine) -> dict[str, Any]:
    """Which parameters (and of how many elements) and which buffers a checkpoint holds."""
    sizes = {key.partition("/")[2]: engine.partition(p)[0] for key, p in engine.partitions().items()}
    return {"elements": sizes, "buffers": sorted(engine.buffers())}


def _local_part(engine: Engine, checkpoint: Path, ranks: int) -> dict[str, Tensor]:
    """This rank's partitions, cut out of those that `ranks` ranks wrote (only the overlapping bytes are read), and the
    buffers, which all ranks have alike."""
    out: dict[str, Tensor] = {}
    try:
        files = [safe_open(checkpoint / f"rank_{r:05}.safetensors", "pt") for r in range(ranks)]
        for key, p in engine.partitions().items():
            elements, size = engine.partition(p)
            out[key] = _cut(files, key, dist.rank() * size, size, elements)
        out |= {key: files[0].get_tensor(key) for key in engine.buffers()}
    except (OSError, SafetensorError, KeyError) as e:
        raise CheckpointError(f"{checkpoint} cannot be read: {e}") from None
    return out


def _cut(files: list[Any], key: str, start: int, size: int, elements: int) -> Tensor:
    """Elements [start, start + size) of a parameter that is spread over files in order, zeros behind its end."""
    part, offset = torch.zeros(size), 0
    for file in files:
        piece = file.get_slice(key)
        (length,) = piece.get_shape()
        a, b = max(start, offset), min(start + size, offset + length, elements)
        if a < b:
            part[a - start : b - start] = piece[a - offset : b - offset]
        offset += length
    return part
