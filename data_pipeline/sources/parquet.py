"""Parquet files with images as bytes and captions; columns under any of the names in fields.py.

`image` is bytes or the struct {bytes, path} of Hugging Face datasets; a path in it is never followed. Without a key it
is the file's name and the row number. img2dataset's `parquet` output is such a file: rows whose `status` is not success
are dropped under that word.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.sources.columns import DAMAGE, DamagedFile, batch_rows, choose, damaged, to_source
from data_pipeline.sources.fields import Columns
from data_pipeline.sources.location import File, Reading, open_at, printable
from data_pipeline.sources.pieces import Slice

BUFFER = 1 << 20  # bytes read ahead per column, instead of a whole row group


@dataclass(frozen=True)
class Piece:
    """Some row groups of a file; small ones are read together."""

    file: File
    stem: str
    columns: Columns
    row_groups: tuple[tuple[int, int, int], ...]  # number, rows, bytes of the columns unpacked
    start: int
    rows: int
    reading: Reading

    def read(self) -> Iterator[pa.Table]:
        row = self.start
        for number, rows, size in self.row_groups:
            done = 0
            for table in self._group(number, rows, size, row):
                yield table
                done += len(table)
            if done < rows:
                yield damaged(self.stem, row + done, rows - done)
            row += rows

    def part(self, start: int, stop: int) -> Slice:
        return Slice(self, start, stop)

    def _group(self, number: int, rows: int, size: int, row: int) -> Iterator[pa.Table]:
        """Of a damaged row group what comes before the damage; each has its own reader, so the others are not lost."""
        try:
            with (
                open_at(self.file, self.reading) as stream,
                pq.ParquetFile(stream, buffer_size=BUFFER, pre_buffer=False) as file,
            ):
                batch_size, done = batch_rows(size, rows), 0
                for batch in file.iter_batches(batch_size, row_groups=[number], columns=self.columns.all):
                    if done + len(batch) > rows:
                        return
                    yield to_source(batch, self.columns, row + done, self.stem)
                    done += len(batch)
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:  # the system's, not Arrow's about the content
                raise DataError(f"cannot read {printable(self.file.url)} ({error.strerror or error})") from None


def pieces(file: File, stem: str, piece_rows: int, reading: Reading) -> list[Piece]:
    """Cut a file between row groups; DataError if it does not hold captioned images."""
    name = printable(file.url)
    try:
        with open_at(file, reading) as stream, pq.ParquetFile(stream) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
            names = schema.names  # here, where a damaged one is noticed
    except DAMAGE as error:
        raise DamagedFile(name, "Parquet", error) from None
    columns = choose(name, schema, names, reading)
    found: list[Piece] = []
    groups: list[tuple[int, int, int]] = []
    start = rows = 0
    for group in range(metadata.num_row_groups):
        one = metadata.row_group(group)
        groups.append((group, one.num_rows, one.total_byte_size))
        rows += one.num_rows
        if rows >= piece_rows or group == metadata.num_row_groups - 1:
            if rows:
                found.append(Piece(file, stem, columns, tuple(groups), start, rows, reading))
            groups, start, rows = [], start + rows, 0
    return found
