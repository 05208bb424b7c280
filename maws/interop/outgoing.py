"""Our weights on their way into the folder of another library: which of our tensors makes which of theirs.

    tensors = {"layernorm.weight": same(files, "norm.weight")}       # theirs: how it is made
    write_weights(folder, "model", values(tensors, files, torch.float32))

Every value is made when its turn comes, so that no more than one is in memory.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.interop.converted import pattern, times
from maws.release import ENCODER, Release
from maws.tensor_file import Spec
from maws.weight_files import WeightFiles, Weights


@dataclass(frozen=True)
class Made:
    """One of their tensors: its shape, those of ours that it is made of, and how."""

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[..., Tensor]


@dataclass(frozen=True)
class Outgoing:
    """What is to be written.

    `weights` are the tensors of each file by its name without .safetensors. `documents` gives the other files, text or
    JSON, for the place where the folder will lie. `dropped` are our tensors that have no place there, with the reason.
    """

    weights: dict[str, dict[str, Made]]
    documents: Callable[[Path], dict[str, Any]]
    dropped: dict[str, str]
    notes: tuple[str, ...] = ()  # what else a user has to know
    tokenizer: str | None = None  # the folder inside that gets the tokenizer's files; "" for the folder itself
    splits: bool = True  # does the library read weights in several files?


@dataclass(frozen=True)
class Inputs:
    """Fixed inputs that both models get, our own and the one that the library has read back."""

    pixels: Tensor  # B 3 H W, normalised
    noise: Tensor  # B N: its order is the one in which patches are shown to an autoencoder
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.int64))  # B T, padded on the right
    mask: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.int64))  # B T, 1 = a token


def same(files: WeightFiles, name: str) -> Made:
    return Made(files.shape(name), (name,), lambda value: value)


def transposed(files: WeightFiles, name: str, scale: float = 1.0) -> Made:
    """A matrix that we apply as x @ W, as the weight of a linear layer."""
    rows, columns = files.shape(name)
    return Made((columns, rows), (name,), lambda value: value.float().T * scale)


def third(files: WeightFiles, name: str, part: int) -> Made:
    """Queries (0), keys (1) or values (2) out of a tensor with all three below each other."""
    rows, *others = files.shape(name)
    return Made((rows // 3, *others), (name,), lambda value: value.chunk(3)[part])


def scalar(files: WeightFiles, name: str, most: float = float("inf")) -> Made:
    """A number that we keep with one axis, without it."""
    assert files.shape(name) == (1,)
    return Made((), (name,), lambda value: value.clamp(max=most).reshape(()))


def constant(value: Tensor) -> Made:
    """A tensor that the library wants and we have not."""
    return Made(tuple(value.shape), (), lambda: value)


def values(tensors: Mapping[str, Made], files: WeightFiles, dtype: torch.dtype) -> Weights:
    """Their tensors on the way to the disk."""

    def made() -> Iterator[tuple[str, Tensor]]:
        for name, one in tensors.items():
            yield name, one.make(*(files.read(source) for source in one.sources))

    return Weights({name: Spec(dtype, one.shape) for name, one in tensors.items()}, made())


def image_tower(release: Release, files: WeightFiles) -> dict[str, str]:
    """Names of the image tower's tensors as in models/vit.py -> their names in the file."""
    prefix = "image." if release.stage == "lit" else ""
    own = [name for name in files.names if re.fullmatch(re.escape(prefix) + ENCODER, name)]
    return {name.removeprefix(prefix): name for name in own}


def linear_head(release: Release, files: WeightFiles) -> dict[str, str]:
    """`weight` and `bias` of a classifier of one layer -> their names in the file; {} when there is none such.

    A wsp run's `linear` head is the first layer of a sequence; what was imported is a plain layer.
    """
    if release.config.get("head", "linear") != "linear":
        return {}
    for prefix in ("head.0.", "head."):
        if {f"{prefix}weight", f"{prefix}bias"} <= set(files.names):
            return {part: prefix + part for part in ("weight", "bias")}
    return {}


def left_out(
    files: WeightFiles, weights: Mapping[str, Mapping[str, Made]], reasons: Mapping[str, str]
) -> dict[str, str]:
    """Those of our tensors that nothing is made of, each with the reason of the first pattern that it matches."""
    used = {source for tensors in weights.values() for one in tensors.values() for source in one.sources}
    return {
        name: next((reason for pattern, reason in reasons.items() if re.match(pattern, name)), "it has no place there")
        for name in files.names
        if name not in used
    }


def summary(outgoing: Outgoing, files: WeightFiles) -> list[str]:
    """The key report: what was taken and what it became, what was dropped and why.

    Names are shown as far as they change: `*` is the number of a block, and at the end the rest of a name.
    """
    became: dict[str, list[str]] = {}
    for tensors in outgoing.weights.values():
        for theirs, one in tensors.items():
            for source in one.sources:
                became.setdefault(source, []).append(theirs)
    changes = Counter(_change(ours, theirs) for ours, theirs in became.items())
    dropped = Counter((_group(name), reason) for name, reason in outgoing.dropped.items())
    return [
        f"taken: {len(became)} of {len(files.names)} tensors",
        *(f"  {change}: {count}" for change, count in changes.items()),
        *(f"dropped: {name}{times(count)}: {reason}" for (name, reason), count in dropped.items()),
        *(f"note: {note}" for note in outgoing.notes),
    ]


def _change(ours: str, theirs: Sequence[str]) -> str:
    if list(theirs) == [ours]:
        return "names kept"
    names = [pattern(name).split(".") for name in (ours, *theirs)]
    alike = 0  # parts at the end that all have
    while alike < min(map(len, names)) and len({name[-1 - alike] for name in names}) == 1:
        alike += 1
    old, *new = (".".join([*name[: len(name) - alike], *["*"][:alike]]) for name in names)
    return f"{old} -> {', '.join(new)}"


def _group(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{first}.*" if rest else first


def refuse(release: Release, library: str, reasons: Sequence[str]) -> None:
    """Raises CheckpointError when there are reasons."""
    if reasons:
        raise CheckpointError(
            f"{release.folder} cannot be written for {library}: {'; '.join(reasons)}. The release form "
            f"(--to safetensors) holds every model"
        )
