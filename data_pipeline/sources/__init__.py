"""Where captioned images come from: --input names folders and Parquet files, in any mixture.

A source is cut into pieces that one task reads in one pass; a piece yields tables of schema.SOURCE.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import pyarrow as pa

from data_pipeline.errors import DataError
from data_pipeline.sources import folder, parquet

PIECE_ROWS: Final = 1000  # a task of about a second for small pictures, so that a kill loses little


class Piece(Protocol):
    """What one task reads; plain data, so that it can be sent to another process."""

    @property
    def rows(self) -> int: ...

    def read(self) -> Iterator[pa.Table]: ...


@dataclass(frozen=True)
class Sources:
    """Everything found under --input, in input order."""

    pieces: list[Piece]
    files: list[tuple[str, list[tuple[str, Path]]]]  # input as the manifest names it, its files as (name, path)
    skipped: list[tuple[str, str]]  # file, why

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)


def discover(inputs: Sequence[Path], output: Path) -> Sources:
    """List what can be read, in an order that depends on names only. Nothing under `output` is taken for input."""
    sources = Sources([], [], [])
    folders = sum(path.is_dir() for path in inputs)
    for path in inputs:
        if path.is_dir():
            _add_folder(sources, path, output, prefix=f"{path.resolve().name}/" if folders > 1 else "")
        elif path.is_file():
            _add_parquet(sources, path, path.name, named=True)
        else:
            raise DataError(f"--input {path}: no such file or folder")
    if not sources.pieces:
        where = ", ".join(map(str, inputs))
        if sources.skipped:
            reasons = "; ".join(f"{name}: {why}" for name, why in sources.skipped[:5])
            raise DataError(f"no captioned images in {where}: every file was skipped ({reasons})")
        raise DataError(
            f"no captioned images in {where}: a folder must hold Parquet files with the columns image and caption, "
            f"or images ({', '.join(sorted(folder.EXTENSIONS))}) with a .txt caption beside each"
        )
    return sources


def _add_folder(sources: Sources, root: Path, output: Path, prefix: str) -> None:
    images: list[folder.Picture] = []
    for path in walk(root, output.resolve()):
        name = path.relative_to(root).as_posix()
        if path.suffix.lower() == ".parquet":
            _add_parquet(sources, path, f"{root.resolve().name}/{name}", named=False)
        elif path.suffix.lower().lstrip(".") in folder.EXTENSIONS:
            images.append(folder.Picture(prefix + name, str(path.resolve())))
    if images:
        sources.pieces.extend(
            folder.Piece(tuple(images[start : start + PIECE_ROWS]), start)
            for start in range(0, len(images), PIECE_ROWS)
        )
        files = [(picture.name, Path(picture.path)) for picture in images]
        captions = [(f"{name}#caption", text) for name, path in files if (text := folder.caption_path(path)).is_file()]
        sources.files.append((f"{root.resolve().name}/", files + captions))


def _add_parquet(sources: Sources, path: Path, name: str, *, named: bool) -> None:
    try:
        pieces = parquet.pieces(path, name, PIECE_ROWS)
    except parquet.NotCaptionedImages as error:
        if named:
            raise
        sources.skipped.append((name, error.short))
        return
    sources.pieces.extend(pieces)
    sources.files.append((name, [(name, path.resolve())]))


def walk(root: Path, output: Path) -> Iterator[Path]:
    """Files below `root` sorted by name; hidden ones, links to folders and the output are passed over."""
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {root} ({error.strerror})") from None
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if path.resolve() != output:
                yield from walk(path, output)
        elif path.is_file():  # a link that points at itself is none; os.DirEntry raises here
            yield path
