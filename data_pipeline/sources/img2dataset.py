"""What img2dataset leaves behind, as it is: shards or folders of pictures, and beside each a table of what it tried.

    00000.tar  or  00000/          the pictures it has, with .txt and .json: webdataset.py, folder.py
    00000.parquet                  every url with its status; the failures are counted from here
    00000_stats.json               its counts

Its `parquet` output holds the pictures in that table itself and is read by parquet.py alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.schema import SOURCE
from data_pipeline.sources.columns import DAMAGE
from data_pipeline.sources.fields import SUCCESS, BadRecord, key, status_problem, text
from data_pipeline.sources.location import File, Reading, open_at, printable
from data_pipeline.sources.pieces import Slice

COLUMNS = ("key", "url", "caption", "status")
STATS = "_stats.json"


@dataclass(frozen=True)
class Failures:
    """Pictures that could not be had, as rows that are dropped under the word of their status."""

    file: File
    stem: str
    rows: int
    reading: Reading

    def read(self) -> Iterator[pa.Table]:
        try:
            with open_at(self.file, self.reading) as stream, pq.ParquetFile(stream) as file:
                columns = [name for name in COLUMNS if name in file.schema_arrow.names]
                number = 0
                for batch in file.iter_batches(1000, columns=columns):
                    rows = [self._row(row) for row in batch.to_pylist() if row["status"] != SUCCESS]
                    rows = [{"row": number + offset} | row for offset, row in enumerate(rows)]
                    number += len(rows)
                    if rows:
                        yield pa.Table.from_pylist(rows, schema=SOURCE)
        except DAMAGE as error:
            raise DataError(f"{printable(self.file.url)} is damaged or cannot be read: {error}") from None

    def part(self, start: int, stop: int) -> Slice:
        return Slice(self, start, stop)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"key": self.stem, "problem": status_problem(row["status"]) or "failed"}
        try:
            found["key"] = key(row.get("key"))
            found["url"] = text(row.get("url"), "url")
        except BadRecord:
            pass
        return found


def failures(file: File, stem: str, reading: Reading) -> list[Failures] | None:
    """None if the table is not one of img2dataset's beside pictures."""
    try:
        with open_at(file, reading) as stream, pq.ParquetFile(stream) as opened:
            names = opened.schema_arrow.names
            if not {"url", "status"} <= set(names) or {"jpg", "png", "webp", "image"} & set(names):
                return None
            status = opened.read(["status"])["status"].to_pylist()
    except DAMAGE:
        return None
    count = sum(value != SUCCESS for value in status)
    return [Failures(file, stem, count, reading)] if count else []
