"""Arrow files (.arrow, .feather: the file format, or the stream that Hugging Face datasets keep) with the same columns
as Parquet files.

A buffer of strangers may say that a text begins outside of it: every batch is checked before a value is looked at.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.types as pt

from data_pipeline.errors import DataError
from data_pipeline.sources.columns import DAMAGE, DamagedFile, batch_rows, choose, damaged, to_source
from data_pipeline.sources.fields import Columns
from data_pipeline.sources.location import File, Reading, local, open_at, printable
from data_pipeline.sources.pieces import GUESSED_BYTES, Slice

MAGIC: Final = b"ARROW1"


@dataclass(frozen=True)
class Piece:
    """Some batches of a file, or the whole of a stream."""

    file: File
    stem: str
    columns: Columns
    first: int  # batch
    stop: int | None
    start: int  # row
    rows: int
    reading: Reading

    def read(self) -> Iterator[pa.Table]:
        row = self.start
        for batch in _batches(self.file, self.reading, self.first, self.stop):
            if batch is None:
                yield damaged(self.stem, row, max(1, self.start + self.rows - row))
                return
            if not _is_sound(batch, self.columns):
                yield damaged(self.stem, row, len(batch))
                row += len(batch)
                continue
            step = batch_rows(batch.get_total_buffer_size(), len(batch))
            for place in range(0, len(batch), step):
                part = batch.slice(place, step)
                yield to_source(part, self.columns, row + place, self.stem)
            row += len(batch)

    def part(self, start: int, stop: int) -> Slice:
        return Slice(self, start, stop)


def pieces(file: File, stem: str, piece_rows: int, reading: Reading) -> list[Piece]:
    name = printable(file.url)
    try:
        with open_at(file, reading) as stream:
            schema = _open(stream).schema
            names = schema.names  # here, where a damaged one is noticed
    except DAMAGE as error:
        raise DamagedFile(name, "Arrow", error) from None
    columns = choose(name, schema, names, reading)
    if local(file.url) is None:
        return [Piece(file, stem, columns, 0, None, 0, max(1, file.size // GUESSED_BYTES), reading)]
    found: list[Piece] = []
    first = start = rows = 0
    number = -1
    for number, batch in enumerate(_batches(file, reading, 0, None)):
        if batch is None:
            rows += 1  # one row that says so
            break
        rows += len(batch)
        if rows >= piece_rows:
            found.append(Piece(file, stem, columns, first, number + 1, start, rows, reading))
            first, start, rows = number + 1, start + rows, 0
    return [*found, Piece(file, stem, columns, first, None, start, rows, reading)] if rows else found


def _batches(file: File, reading: Reading, first: int, stop: int | None) -> Iterator[pa.RecordBatch | None]:
    """Batches by their number; null where the file is damaged, and nothing after it. Locally nothing is copied."""
    here = local(file.url)
    source: Any = pa.memory_map(str(here)) if here is not None else open_at(file, reading)
    try:
        with source:
            reader = _open(source)
            if isinstance(reader, pa.RecordBatchFileReader):
                last = reader.num_record_batches if stop is None else stop
                for number in range(first, last):
                    yield reader.get_batch(number)
            else:
                for number, batch in enumerate(reader):
                    if stop is not None and number >= stop:
                        return
                    if number >= first:
                        yield batch
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot read {printable(file.url)} ({error.strerror or error})") from None
        yield None


def _open(source: BinaryIO | pa.NativeFile) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    head = source.read(len(MAGIC))
    source.seek(0)
    return pa.ipc.open_file(source) if head == MAGIC else pa.ipc.open_stream(source)


def _is_sound(batch: pa.RecordBatch, columns: Columns) -> bool:
    """Whether all offsets lie inside their buffers. Texts are looked at as bytes: bad UTF-8 costs only its row."""
    try:
        for name in columns.all:
            column = batch[name]
            column.validate()
            as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
            column = column.view(as_bytes) if as_bytes is not None else column
            if not (pt.is_list(column.type) or pt.is_large_list(column.type)):
                column.validate(full=True)
            else:
                column.validate()
                lists = column.offsets
                lists.validate(full=True)
                ends = lists.to_numpy(zero_copy_only=False)
                if len(ends) and (ends[0] < 0 or (ends[1:] < ends[:-1]).any() or ends[-1] > len(column.values)):
                    return False
                values = column.values
                kind = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(values.type)
                (values.view(kind) if kind is not None else values).validate(full=True)
    except DAMAGE:
        return False
    return True
