"""Parquet files with the columns image and caption, and where known key, language, source, licence, hashtags.

`image` is bytes or the struct {bytes, path} of Hugging Face datasets; a path in it is never followed. `hashtags` is a
list, or one string with spaces, commas or semicolons between. Without `key` it is the file's name and the row number.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from data_pipeline.errors import DataError
from data_pipeline.schema import SOURCE

NEEDED: Final = ("image", "caption")
TEXTS: Final = ("key", "caption", "language", "source", "licence")
BATCH: Final = 32  # images in memory at a time
BUFFER: Final = 1 << 20  # bytes read ahead per column, instead of a whole row group


class NotCaptionedImages(DataError):
    """A Parquet file of something else: labels, or an evaluation set without captions."""

    def __init__(self, path: Path, why: str, columns: list[str]) -> None:
        super().__init__(f"{path}: {why}; the columns that are there: {', '.join(columns) or 'none'}")
        self.short = why


@dataclass(frozen=True)
class Piece:
    """Some row groups of a file; small ones are read together."""

    path: str
    name: str
    row_groups: tuple[int, ...]
    start: int
    rows: int

    def read(self) -> Iterator[pa.Table]:
        path = Path(self.path)
        row = self.start
        try:
            with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
                columns = [name for name in (*NEEDED, "key", "language", "source", "licence", "hashtags")
                           if name in file.schema_arrow.names]  # fmt: skip
                for batch in file.iter_batches(BATCH, row_groups=list(self.row_groups), columns=columns):
                    yield _table(batch, row, self.name)
                    row += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} is damaged or cannot be read: {error}") from None


def pieces(path: Path, name: str, piece_rows: int) -> list[Piece]:
    """Cut a file between row groups; DataError if it does not hold captioned images."""
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} is not a readable Parquet file ({error}); for images in files, name their folder"
        ) from None
    _check_columns(path, schema)
    found: list[Piece] = []
    groups: list[int] = []
    start = rows = 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        rows += metadata.row_group(group).num_rows
        if rows >= piece_rows or group == metadata.num_row_groups - 1:
            found.append(Piece(str(path.resolve()), name, tuple(groups), start, rows))
            groups, start, rows = [], start + rows, 0
    return found


def _check_columns(path: Path, schema: pa.Schema) -> None:
    missing = [name for name in NEEDED if name not in schema.names]
    if missing:
        raise NotCaptionedImages(path, f"no column {' and no column '.join(missing)}", schema.names)
    for name in schema.names:
        kind = schema.field(name).type
        if name == "image" and not (_is_bytes(kind) or (pt.is_struct(kind) and kind.get_field_index("bytes") >= 0)):
            raise NotCaptionedImages(path, f"column image is {kind}, not bytes or a struct with bytes", schema.names)
        if name == "caption" and not _is_text(kind):
            raise NotCaptionedImages(path, f"column caption is {kind}, not text", schema.names)
        if name == "hashtags" and not (_is_text(kind) or (_is_list(kind) and _is_text(kind.value_type))):
            raise NotCaptionedImages(path, f"column hashtags is {kind}, not text or a list of texts", schema.names)


def _table(batch: pa.RecordBatch, start: int, name: str) -> pa.Table:
    count = len(batch)
    problems: list[str | None] = [None] * count
    columns: dict[str, Any] = {
        "row": range(start, start + count),
        "path": [None] * count,
        "image": _images(batch["image"]),
    }
    for column in TEXTS:
        if column in batch.schema.names:
            columns[column] = _texts(batch[column], column, problems)
    stem = name.removesuffix(".parquet")
    keys = columns.setdefault("key", [f"{stem}-{row:06d}" for row in columns["row"]])
    for offset, key in enumerate(keys):
        if not key:
            problems[offset] = "bad_key"
    if "hashtags" in batch.schema.names:
        columns["hashtags"] = _hashtags(batch["hashtags"], problems)
    columns["problem"] = problems
    return pa.table([pa.array(columns.get(f.name, [None] * count), f.type) for f in SOURCE], schema=SOURCE)


def _images(column: pa.Array) -> list[bytes | None]:
    if pt.is_struct(column.type):
        column = column.flatten()[column.type.get_field_index("bytes")]  # a null struct gives null
    return column.to_pylist()


def _texts(column: pa.Array, name: str, problems: list[str | None]) -> list[str | None]:
    """Values as text; what is not UTF-8 marks its row instead of stopping the file."""
    column = column.dictionary_decode() if pt.is_dictionary(column.type) else column
    if not (_is_text(column.type) or _is_bytes(column.type)):
        column = column.cast(pa.string()) if not pt.is_nested(column.type) else pa.nulls(len(column), pa.string())
    values: list[str | None] = []
    for offset, value in enumerate(column.cast(pa.large_binary()).to_pylist()):
        try:
            values.append(None if value is None else value.decode())
        except UnicodeDecodeError:
            values.append(None)
            problems[offset] = "bad_key" if name == "key" else "caption_not_utf8"
    return values


def _hashtags(column: pa.Array, problems: list[str | None]) -> list[list[str] | None]:
    found: list[list[str] | None] = []
    for offset, value in enumerate(column):
        try:
            tags = value.as_py()
            found.append(None if tags is None else [tag for tag in _split(tags) if tag])
        except UnicodeDecodeError:
            found.append(None)
            problems[offset] = "caption_not_utf8"
    return found


def _split(tags: str | list[str | None]) -> list[str | None]:
    return list(re.split(r"[\s,;]+", tags)) if isinstance(tags, str) else tags


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pt.is_dictionary(kind) else kind
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind) or pt.is_fixed_size_binary(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)
