"""Low-shot splits: at most K training images of every class, written down and read back.

    splits/3f2a91c4-5shot-seed0.json      {"k": 5, "seed": 0, "keys": ["a.jpg", …]}, the keys sorted
    given/5shot-seed0.txt                 a key a line: the form in which other codes list images

A class with fewer than K images gives all it has (recipes 9.2).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import DataError, UsageError
from eval.base import File
from eval.classes import Classes
from eval.datasets import Dataset
from eval.held_out import positions_in_class
from eval.sources.source import some
from maws.seeding import generator

Which = tuple[int, int]  # K, seed
NAMED = re.compile(r"(\d+)-?shot\D*seed-?(\d+)", re.IGNORECASE)  # how a text file says which split it is


@dataclass(frozen=True)
class Split:
    """The images of one split, by key."""

    k: int
    seed: int
    keys: tuple[str, ...]  # sorted
    path: Path

    @property
    def which(self) -> Which:
        return self.k, self.seed


class Pool:
    """The images of a training set that can be drawn; those at positions `broken` cannot be read."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.by_key = torch.tensor(sorted(range(len(dataset)), key=dataset.keys.__getitem__))
        self.labels = torch.from_numpy(dataset.labels)

    def draw(self, k: int, seed: int, broken: Iterable[int] = ()) -> list[int]:
        """Positions of at most `k` random images of every class, sorted by key.

        Depends on the keys, the labels and the seed alone, not on the order of the files; 1-shot is part of 5-shot. In
        place of a broken picture comes the next of its class, if there is one.
        """
        order = self.by_key[torch.randperm(len(self.by_key), generator=generator(seed, "lowshot"))]
        if lost := list(broken):
            order = order[~torch.isin(order, torch.tensor(lost))]
        kept = order[positions_in_class(self.labels[order]) < k]
        return sorted(kept.tolist(), key=self.dataset.keys.__getitem__)


def text_of(dataset: Dataset, positions: Sequence[int], k: int, seed: int) -> str:
    """What a split file says; equal for equal splits, wherever they come from."""
    return json.dumps({"k": k, "seed": seed, "keys": [dataset.keys[p] for p in positions]}, indent=0)


def file_of(dataset: Dataset, positions: Sequence[int], k: int, seed: int) -> File:
    """The images of a split, to compare with other codes. Its name begins with that of the training data."""
    return File(f"splits/{name_of(dataset.keys)}-{k}shot-seed{seed}.json", text_of(dataset, positions, k, seed))


def name_of(keys: Sequence[str]) -> str:
    """A short name for a set of training images."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:8]


# ---------------------------------------------------------------------------------------------------------------- given


def read(folder: Path, wanted: Iterable[Which], train: Dataset, classes: Classes) -> dict[Which, list[int]]:
    """Positions of the splits asked for from a folder of split files, checked against the training data.

    Files of several sets of images may lie there: those that bear the name of this one come first.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".txt")) if folder.is_dir() else []
    if not paths:
        raise UsageError(f"lowshot.splits={folder}: no such folder, or no split files (.json, .txt) in it")
    ours = [path for path in paths if path.name.startswith(f"{name_of(train.keys)}-")]
    found: dict[Which, list[Split]] = {}
    for path in ours or paths:
        one = _read(path)
        found.setdefault(one.which, []).append(one)
    chosen = {which: _only(which, found, folder) for which in wanted}
    return {which: check(split, train, classes) for which, split in chosen.items()}


def _only(which: Which, found: dict[Which, list[Split]], folder: Path) -> Split:
    k, seed = which
    if which not in found:
        there = ", ".join(f"{k}-shot seed {seed}" for k, seed in sorted(found)) or "none"
        raise UsageError(
            f"lowshot.splits={folder} has no {k}-shot split of seed {seed}; there are: {there}; "
            f"choose with --seed and --set lowshot.k=… lowshot.seeds=…"
        )
    if len(found[which]) > 1:
        both = " and ".join(str(split.path.name) for split in found[which][:2])
        raise UsageError(f"lowshot.splits={folder}: {both} are both {k}-shot of seed {seed}; keep one")
    return found[which][0]


def _read(path: Path) -> Split:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if path.suffix == ".json":
        return _from_json(text, path)
    named = NAMED.search(path.name)
    if named is None:
        raise DataError(f"{path} does not say which split it is; name it like 5shot-seed0.txt")
    return _split(int(named[1]), int(named[2]), text.split("\n"), path)


def _from_json(text: str, path: Path) -> Split:
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    match content:
        case {"k": int(k), "seed": int(seed), "keys": list(keys)} if k >= 1 and all(
            isinstance(key, str) for key in keys
        ):
            return _split(k, seed, keys, path)
    raise DataError(f'{path} is not a split file: expected {{"k": 5, "seed": 0, "keys": ["a key", …]}}')


def _split(k: int, seed: int, keys: Iterable[str], path: Path) -> Split:
    present = sorted(key.strip() for key in keys if key.strip())
    if twice := [key for key, count in Counter(present).items() if count > 1]:
        raise DataError(f"{path} names images twice: {some(twice)}")
    return Split(k, seed, tuple(present), path)


def check(split: Split, dataset: Dataset, classes: Classes) -> list[int]:
    """Positions of a split's images in the training data, sorted by key.

    Raises DataError unless it has min(K, what there is) images of every class.
    """
    places = {key: position for position, key in enumerate(dataset.keys)}
    if unknown := [key for key in split.keys if key not in places]:
        raise DataError(
            f"{split.path}: {len(unknown):,} of its {len(split.keys):,} images are not in the training data, such as "
            f"'{unknown[0]}'; keys there look like '{dataset.keys[0]}'"
        )
    positions = [places[key] for key in split.keys]
    there = np.bincount(dataset.labels, minlength=len(classes))
    given = np.bincount(dataset.labels[positions], minlength=len(classes))
    if missing := np.flatnonzero((there > 0) & (given == 0)).tolist():
        names = some(classes.name(label) for label in missing)
        raise DataError(f"{split.path}: no image of {len(missing):,} of {int((there > 0).sum()):,} classes: {names}")
    if wrong := np.flatnonzero(given != np.minimum(there, split.k)).tolist():
        first = wrong[0]
        raise DataError(
            f"{split.path}: {len(wrong):,} classes have a wrong number of images, such as {classes.name(first)} with "
            f"{given[first]}; {split.k}-shot takes {min(split.k, there[first])} of its {there[first]}"
        )
    return positions
