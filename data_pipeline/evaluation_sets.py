"""Pictures that a model will be tested on, as --exclude-eval names them; captions and labels play no part.

    a folder of pictures, class folders or not · Parquet with a column image · a shard set · webdataset tars · mixtures

A set is known by its pictures alone: `content_hash` is the same whatever they are called and whatever they lie in.
"""

import hashlib
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from data_pipeline.errors import DataError
from data_pipeline.images import MAX_BYTES

EXTENSIONS: Final = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)
KEYS: Final = ("key", "__key__", "id", "file_name", "filename", "name")  # columns that name a picture, first wins
PIECE_PICTURES: Final = 1000  # files that one task reads
BATCH: Final = 32  # pictures of a Parquet file in memory at a time


class Piece(Protocol):
    """What one task reads: name and bytes of each picture; no bytes where they cannot be had."""

    def read(self) -> Iterator[tuple[str, bytes | None]]: ...


@dataclass(frozen=True)
class EvaluationSet:
    name: str
    pieces: tuple[Piece, ...]
    files: tuple[tuple[str, Path], ...]  # name, path


def content_hash(contents: Iterable[bytes]) -> str:
    """Of the sha256 of every picture's bytes; their order does not matter."""
    return hashlib.sha256(b"".join(sorted(contents))).hexdigest()


def find(paths: Sequence[Path]) -> list[EvaluationSet]:
    """One set per path; DataError for a path without pictures."""
    names = [path.resolve().stem if path.is_file() else path.resolve().name for path in paths]
    return [_find(path, name, names.count(name) > 1) for path, name in zip(paths, names, strict=True)]


def _find(path: Path, name: str, ambiguous: bool) -> EvaluationSet:
    if not path.exists():
        raise DataError(f"--exclude-eval {path}: no such file or folder")
    if ambiguous:
        name = f"{path.resolve().parent.name}/{name}"
    root = path if path.is_dir() else path.parent
    pieces: list[Piece] = []
    files: list[tuple[str, Path]] = []
    pictures: list[tuple[str, str]] = []
    for file in _walk(path) if path.is_dir() else [path]:
        found = _pieces(file)
        if found or file.suffix.lower() in EXTENSIONS:
            label = file.relative_to(root).as_posix()
            files.append((label, file.resolve()))
            pieces += found
            if not found:
                pictures.append((label, str(file.resolve())))
    pieces += [
        Files(tuple(pictures[start : start + PIECE_PICTURES])) for start in range(0, len(pictures), PIECE_PICTURES)
    ]
    if not pieces:
        raise DataError(
            f"--exclude-eval {path} holds no pictures: give a folder of pictures ({', '.join(sorted(EXTENSIONS))}), "
            "Parquet with a column image, a shard set, or tars"
        )
    return EvaluationSet(name, tuple(pieces), tuple(files))


def _walk(folder: Path) -> Iterator[Path]:
    """Files below, in the order of names, without hidden ones."""
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror})") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        elif entry.is_file():
            yield entry


def _pieces(file: Path) -> list[Piece]:
    if file.suffix == ".tar":
        return [Tar(str(file.resolve()))]
    return _parquet_pieces(file) if file.suffix == ".parquet" else []


# -------------------------------------------------------------------------------------------------------------- pieces


@dataclass(frozen=True)
class Files:
    pictures: tuple[tuple[str, str], ...]  # name, path

    def read(self) -> Iterator[tuple[str, bytes | None]]:
        for name, path in self.pictures:
            try:
                too_large = Path(path).stat().st_size > MAX_BYTES
                yield name, None if too_large else Path(path).read_bytes()
            except OSError:
                yield name, None


@dataclass(frozen=True)
class Tar:
    """Every picture of a tar: a webdataset, or the shards of a shard set."""

    path: str

    def read(self) -> Iterator[tuple[str, bytes | None]]:
        try:
            with tarfile.open(self.path, "r:") as archive:
                for member in archive:
                    if member.isfile() and Path(member.name).suffix.lower() in EXTENSIONS:
                        file = archive.extractfile(member) if member.size <= MAX_BYTES else None
                        yield member.name, file.read() if file else None
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{self.path} is damaged or cannot be read: {error}") from None


@dataclass(frozen=True)
class Rows:
    """Row groups of a Parquet file."""

    path: str
    row_groups: tuple[int, ...]
    start: int
    column: str | None  # with the names

    def read(self) -> Iterator[tuple[str, bytes | None]]:
        columns = ["image", *([self.column] if self.column else [])]
        row = self.start
        try:
            with pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
                for batch in file.iter_batches(BATCH, row_groups=list(self.row_groups), columns=columns):
                    names = batch[self.column].to_pylist() if self.column else [None] * len(batch)
                    for name, data in zip(names, _bytes(batch["image"]), strict=True):
                        usable = data is not None and len(data) <= MAX_BYTES
                        yield f"row {row}" if name is None else str(name), data if usable else None
                        row += 1
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.path} is damaged or cannot be read: {error}") from None


def _parquet_pieces(path: Path) -> list[Piece]:
    """None for a table of something else, such as the index of a shard or a file of labels."""
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is not a readable Parquet file ({error})") from None
    if "image" not in schema.names or not _holds_bytes(schema.field("image").type):
        return []
    column = next((name for name in KEYS if name in schema.names and pt.is_string(schema.field(name).type)), None)
    found: list[Piece] = []
    groups: list[int] = []
    start = rows = 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        rows += metadata.row_group(group).num_rows
        if rows >= PIECE_PICTURES or group == metadata.num_row_groups - 1:
            found.append(Rows(str(path.resolve()), tuple(groups), start, column))
            groups, start, rows = [], start + rows, 0
    return found


def _holds_bytes(kind: pa.DataType) -> bool:
    if pt.is_struct(kind):  # as written by Hugging Face datasets
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_fixed_size_binary(kind)


def _bytes(column: pa.Array) -> list[bytes | None]:
    if pt.is_struct(column.type):
        column = column.flatten()[column.type.get_field_index("bytes")]
    return column.to_pylist()
