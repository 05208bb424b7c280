"""Batches of Arrow columns as tables of schema.SOURCE; what cannot be used marks its row."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import pyarrow as pa
import pyarrow.types as pt

from data_pipeline.errors import DataError
from data_pipeline.images import MAX_BYTES
from data_pipeline.schema import SOURCE
from data_pipeline.sources import fields
from data_pipeline.sources.fields import MAX_TEXT, BadRecord, Columns, find_columns
from data_pipeline.sources.location import Reading

SHOWN: Final = 40  # columns in a message
# What pyarrow raises on damaged files; UnicodeDecodeError for a damaged name of a column is a ValueError.
DAMAGE: Final = (OSError, pa.ArrowException, ValueError, KeyError, IndexError, TypeError, OverflowError)


class DamagedFile(DataError):
    """A table whose beginning or end cannot be read, so that nothing is known of it."""

    def __init__(self, name: str, kind: str, why: object) -> None:
        super().__init__(f"{name} is not a readable {kind} file ({why}); for images in files, name their folder")
        self.short = f"damaged: not a readable {kind} file"


class NotCaptionedImages(DataError):
    """A table of something else: labels, or an evaluation set without captions."""

    def __init__(self, name: str, why: str, columns: list[str]) -> None:
        shown = ", ".join(columns[:SHOWN]) or "none"
        super().__init__(f"{name}: {why}; the columns that are there: {shown}")
        self.short = why


def choose(name: str, schema: pa.Schema, names: list[str], reading: Reading) -> Columns:
    """The columns to read; NotCaptionedImages if they are not there or of another kind."""
    columns = find_columns(tuple(names), reading)
    check_present(name, columns, names, reading, ("image",))
    repeated = [column for column in columns.all if names.count(column) > 1]
    if repeated:
        raise NotCaptionedImages(name, f"column {repeated[0]} is there twice", names)
    for column, fits, wanted in (
        (columns.image, _is_image, "bytes or a struct with bytes"),
        (columns.caption, _is_text, "text"),
        (columns.hashtags, _is_tags, "text or a list of texts"),
    ):
        if column is not None and not fits(schema.field(column).type):
            kind = schema.field(column).type
            raise NotCaptionedImages(name, f"column {column} is {kind}, not {wanted}", names)
    return columns


def check_present(name: str, columns: Columns, names: list[str], reading: Reading, images: tuple[str, ...]) -> None:
    """An image, and a caption or hashtags; by the names that were asked for, where they were."""
    missing = []
    if columns.image is None or reading.image_column not in (None, columns.image):
        missing.append(reading.image_column or images[0])
    if reading.caption_column not in (None, columns.caption):
        missing.append(reading.caption_column)
    elif columns.caption is None and columns.hashtags is None:
        missing.append("caption")
    if missing:
        raise NotCaptionedImages(name, f"no column {' and no column '.join(map(str, missing))}", names)


def to_source(batch: pa.RecordBatch, columns: Columns, row: int, stem: str) -> pa.Table:
    """Rows of SOURCE; those without a key are called after the file and their number."""
    count = len(batch)
    problems: list[str | None] = [None] * count
    found: dict[str, Any] = {"row": range(row, row + count)}

    def each(name: str | None, convert: Callable[[Any], Any]) -> list[Any]:
        return [None] * count if name is None else list(_values(batch[name], convert, problems))

    keys = [f"{stem}-{number:06d}" for number in found["row"]]
    found["key"] = keys if columns.key is None else each(columns.key, _key)
    for name in fields.SHORT_TEXTS:
        found[name] = each(getattr(columns, name), lambda value: fields.text(_decoded(value), "other"))
    if columns.status is not None and columns.url is not None:
        each(columns.status, _status)
    found["caption"] = each(columns.caption, lambda value: fields.text(_decoded(value)))
    found["hashtags"] = each(columns.hashtags, _tags)
    found["image"] = [None] * count if columns.image is None else _images(batch[columns.image], problems)
    found["problem"] = problems
    nothing = [None] * count
    return pa.table([pa.array(found.get(one.name, nothing), one.type) for one in SOURCE], schema=SOURCE)


def damaged(stem: str, row: int, count: int) -> pa.Table:
    """Rows that are there by their number and cannot be read."""
    rows = [{"row": n, "key": f"{stem}-{n:06d}", "problem": "damaged_file"} for n in range(row, row + count)]
    return pa.Table.from_pylist(rows, schema=SOURCE)


def batch_rows(size: int, rows: int) -> int:
    """Rows of a batch such that it stays near the bytes that may be in memory."""
    from data_pipeline.sources.pieces import BATCH_BYTES, BATCH_ROWS

    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(size, 1)))


# -------------------------------------------------------------------------------------------------------------- values


def _values(column: pa.Array, convert: Callable[[Any], Any], problems: list[str | None]) -> Iterator[Any]:
    """Each value; of one that cannot be used null, and its reason unless there is one already."""
    for place, value in enumerate(_as_bytes(column)):
        try:
            yield convert(value)
        except BadRecord as error:
            problems[place] = problems[place] or str(error)
            yield None


def _as_bytes(column: pa.Array) -> list[Any]:
    """Python values, texts as the bytes they are: what is not UTF-8 must not stop the others."""
    column = column.dictionary_decode() if pt.is_dictionary(column.type) else column
    if _is_text(column.type) or _is_bytes(column.type):
        return column.cast(pa.large_binary()).to_pylist()
    if _is_list(column.type):
        sizes = column.value_lengths().to_pylist()
        values = iter(_as_bytes(column.flatten()))  # of the lists that are not null
        return [None if size is None else [next(values) for _ in range(size)] for size in sizes]
    return column.to_pylist() if not pt.is_nested(column.type) else [None] * len(column)


def _decoded(value: Any) -> Any:
    if not isinstance(value, bytes):
        return value if isinstance(value, (int, float, type(None))) else str(value)
    if len(value) > MAX_TEXT:
        raise BadRecord("caption_too_long")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadRecord("caption_not_utf8") from None


def _key(value: Any) -> str:
    try:
        return fields.key(_decoded(value))
    except BadRecord:
        raise BadRecord("bad_key") from None


def _status(value: Any) -> None:
    problem = fields.status_problem(_decoded(value))
    if problem is not None:
        raise BadRecord(problem)


def _tags(value: Any) -> list[str] | None:
    if isinstance(value, list):
        if len(value) > fields.MAX_TAGS:
            raise BadRecord("too_many_hashtags")
        return fields.tags([_decoded(tag) for tag in value if tag is not None])
    return fields.tags(_decoded(value))


def _images(column: pa.Array, problems: list[str | None]) -> list[bytes | None]:
    if pt.is_struct(column.type):
        column = column.flatten()[column.type.get_field_index("bytes")]  # a null struct gives null
    found: list[bytes | None] = []
    for place, value in enumerate(column):
        buffer = value.as_buffer()
        if buffer is not None and buffer.size > MAX_BYTES:
            problems[place] = problems[place] or "too_many_bytes"
        found.append(None if buffer is None or problems[place] else buffer.to_pybytes())
    return found


def _is_image(kind: pa.DataType) -> bool:
    return _is_bytes(kind) or (pt.is_struct(kind) and kind.get_field_index("bytes") >= 0
                               and _is_bytes(kind.field("bytes").type))  # fmt: skip


def _is_tags(kind: pa.DataType) -> bool:
    return _is_text(kind) or (_is_list(kind) and _is_text(kind.value_type))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pt.is_dictionary(kind) else kind
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind) or pt.is_fixed_size_binary(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)
