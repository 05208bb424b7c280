"""Pictures with captions, for retrieval: any file of eval/sources/captions.py joined with its pictures.

data = open_captions(Path("dataset_coco.json"), Path("coco/"), "test")     # Karpathy's 5,000 test pictures
data.captions[i] is said of data.pictures.keys[data.owners[i]]
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_pipeline.errors import DataError, UsageError
from data_pipeline.sources.tar import is_safe
from eval.datasets import Dataset
from eval.sources.captions import Captions, read_captions
from eval.sources.folders import digest, reader
from eval.sources.source import Read, some
from maws.config import nearest

log = logging.getLogger(__name__)

MAX_MISSING: Final = 0.01  # share of pictures that may not be there; ours, as for broken ones
SPLIT: Final = "test"  # where a file has splits and none is asked for


@dataclass(frozen=True)
class Captioned:
    """What one evaluation of retrieval is about."""

    pictures: Dataset
    captions: tuple[str, ...]
    owners: np.ndarray  # int64, one per caption: the position of its picture; in order
    sha256: str  # of the captions and whose they are

    @property
    def test(self) -> Dataset:
        return self.pictures

    @property
    def sets(self) -> dict[str, Dataset]:
        """By the names that results have for them."""
        return {"data": self.pictures}

    @property
    def hashes(self) -> dict[str, str]:
        return {"data": self.pictures.sha256, "captions": self.sha256}

    @property
    def facts(self) -> dict[str, Any]:
        """What a score means nothing without."""
        return {"captions": len(self.captions)}

    def summary(self) -> str:
        count = len(self.captions)
        return f"captions: {count:,}, {count / len(self.pictures):.1f} per picture"


def open_captions(file: Path, images: Path | None = None, split: str | None = None) -> Captioned:
    """`split` names one of the file's, or is a file with names of pictures. DataError says what does not fit."""
    if not file.exists():
        raise DataError(f"no captions at {file}: no such file or folder")
    found = read_captions(file)
    rows = _in_split(found, split)
    rows = _captioned(found, rows)
    rows, read, sha256 = _with_pictures(found, rows, images)
    keys = tuple(found.names[row] for row in rows)
    texts = [found.texts[row] for row in rows]
    if not keys:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.left_out.items()) or "it is empty"
        raise DataError(f"{file} gives no picture with a caption ({reasons})")
    owners = np.repeat(np.arange(len(keys)), [len(own) for own in texts]).astype(np.int64)
    captions = tuple(text for own in texts for text in own)
    said = hashlib.sha256(repr((keys, texts)).encode("utf-8", "surrogatepass")).hexdigest()
    content = hashlib.sha256(repr((sha256, keys)).encode("utf-8", "surrogatepass")).hexdigest()
    left_out = {reason: count for reason, count in found.left_out.items() if count}
    none = np.full(len(keys), -1, dtype=np.int64)
    return Captioned(Dataset("captioned", keys, none, read, content, left_out), captions, owners, said)


def _in_split(found: Captions, split: str | None) -> list[int]:
    """The pictures of the split that was asked for."""
    everything = list(range(len(found.names)))
    if split is not None and split not in found.splits and Path(split).is_file():
        wanted = {line.strip() for line in Path(split).read_text(encoding="utf-8-sig").splitlines() if line.strip()}
        rows = [row for row in everything if found.names[row] in wanted or Path(found.names[row]).name in wanted]
        if not rows:
            raise DataError(f"none of the {len(wanted):,} names in {split} is in {found.where}")
        return rows
    if not found.splits:
        if split is not None:
            raise UsageError(
                f"--split {split}: {found.where} has no splits, and there is no file {split}; leave --split out, or "
                f"give a file with the names of the pictures, one a line"
            )
        return everything
    known = sorted(set(found.splits))
    wanted = split or SPLIT
    if wanted not in known:
        raise UsageError(f"{found.where} has no split '{wanted}'; {nearest(wanted, known)}")
    return [row for row in everything if found.splits[row] == wanted]


def _captioned(found: Captions, rows: Sequence[int]) -> list[int]:
    """Pictures with a caption, each name once."""
    kept: dict[str, int] = {}
    for row in rows:
        if not found.texts[row]:
            found.left_out["no_caption"] += 1
        elif kept.setdefault(found.names[row], row) != row:
            found.left_out["duplicate_key"] += 1
    return list(kept.values())


def _with_pictures(found: Captions, rows: list[int], images: Path | None) -> tuple[list[int], Read, str]:
    """The pictures that are there, how to read them, and the hash of their contents."""
    if found.read is not None and images is None:
        inside = found.read
        return rows, lambda position: inside(rows[position]), found.sha256
    if images is None:
        raise UsageError(f"{found.where} only names its pictures; say where they are with --images FOLDER")
    if not images.is_dir():
        raise DataError(f"--images {images}: no such folder")
    files = [_find(images, found, row) for row in rows]
    missing = [found.names[row] for row, file in zip(rows, files, strict=True) if file is None]
    if len(missing) > MAX_MISSING * len(rows):
        raise DataError(
            f"{len(missing):,} of the {len(rows):,} pictures that {found.where} names are not in {images}: "
            f"{some(missing, 3)}; give the folder they lie in with --images"
        )
    if missing:
        log.warning("warning: %d pictures are not in %s and are left out: %s", len(missing), images, some(missing))
    there = [(row, file) for row, file in zip(rows, files, strict=True) if file is not None]
    paths = [file for _, file in there]
    return [row for row, _ in there], reader(paths), digest(paths)


def _find(images: Path, found: Captions, row: int) -> Path | None:
    """The file of a picture, by its whole name or by the last part of it."""
    name = found.names[row]
    if not is_safe(name.encode("utf-8", "surrogatepass")):
        found.left_out["unsafe_name"] += 1
        return None
    for file in dict.fromkeys((images / name, images / Path(name).name)):
        if name and file.is_file():
            return file
    found.left_out["missing_image"] += 1
    return None
