"""A folder of class folders with pictures, as torchvision's ImageFolder reads it: FOLDER/CLASS/…/picture.jpg.

The key of a picture is its path below FOLDER.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.files import sha256_file
from eval.classes import Label
from eval.sources.source import PICTURES, Read, Source, some

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


def class_folders(path: Path) -> list[Path]:
    """Every folder in `path` that is not hidden, sorted."""
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def read_folders(path: Path, prefix: bool) -> Source:
    """All pictures of all class folders; with `prefix` the keys begin with the folder's own name."""
    folders = class_folders(path)
    if {folder.name.lower() for folder in folders} <= SPLITS and any(class_folders(folder) for folder in folders):
        names = some(f"{path}/{folder.name}" for folder in folders)
        raise DataError(f"{path} holds the parts of a data set, not classes; give one of them: {names}")
    files: list[Path] = []
    labels: list[Label | None] = []
    for folder in folders:
        pictures = sorted(file for file in folder.rglob("*") if is_picture(file))
        if not pictures:
            raise DataError(f"the class folder {folder} holds no pictures; fill it or remove it")
        files += pictures
        labels += [folder.name] * len(pictures)
    start = f"{path.name}/" if prefix else ""
    keys = [start + file.relative_to(path).as_posix() for file in files]
    return Source(str(path), keys, labels, reader(files), digest(files))


def is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURES and file.is_file()


def reader(files: list[Path]) -> Read:
    """Reads the file at a position."""

    def read(position: int) -> bytes:
        try:
            return files[position].read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {files[position]}: {error.strerror}") from None

    return read


def digest(files: list[Path]) -> str:
    """One sha256 of the contents of all files, in their order; reading lets go of the interpreter lock."""
    try:
        with ThreadPoolExecutor(8) as pool:
            return hashlib.sha256("\n".join(pool.map(sha256_file, files)).encode()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
