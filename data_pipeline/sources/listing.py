"""Tables that name pictures: CSV, TSV and JSON lines, one record a line, with a path or URL of each picture.

    file_name,caption,licence                 {"path": "cats/1.jpg", "caption": "a #cat", "hashtags": ["pet"]}
    cats/1.jpg,"a #cat, asleep",CC0-1.0

A path is taken from the folder of the table. A table on this machine may name any file of this machine, one in a store
only what lies below itself; both may name objects of stores by URL. What is named over HTTP is dropped as
`url_not_allowed` unless --allow-http is given. Columns: fields.py; the key is the column `key`, or the path without its
ending.

A table of any size is read by pieces: it is looked through once for where records begin.
"""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Final

import pyarrow as pa

from data_pipeline.errors import DataError
from data_pipeline.images import MAX_BYTES
from data_pipeline.sources import fetch
from data_pipeline.sources.columns import NotCaptionedImages, check_present
from data_pipeline.sources.fields import MAX_TEXT, PATH, BadRecord, find_columns, from_record, parse_json
from data_pipeline.sources.location import File, Reading, child, is_url, local, open_at, parent, printable
from data_pipeline.sources.pieces import tables

LINES: Final = (".jsonl", ".ndjson")
TABLES: Final = (".csv", ".tsv")
DELIMITERS: Final = ("\t", ",", ";", "|")
STORES: Final = re.compile(r"(s3a?|gs|gcs|az|abfss?|adl|memory|oss|hdfs|hf)://|(file|local)://", re.IGNORECASE)
HTTP: Final = re.compile(r"https?://", re.IGNORECASE)
SNIFFED: Final = 100  # records of JSON lines whose names are looked at


@dataclass(frozen=True)
class Layout:
    """How a record becomes columns; without names each record is a JSON object."""

    names: tuple[str, ...] = ()
    delimiter: str = ","


@dataclass(frozen=True)
class Piece:
    """Records of a table from a byte on."""

    file: File
    prefix: str  # of keys that are made of paths
    layout: Layout
    offset: int
    row: int
    rows: int
    reading: Reading
    skip: int = 0  # records after the offset that another part reads

    def read(self) -> Iterator[pa.Table]:
        records = list(self._records())
        return tables(fetch.in_order(lambda n: self._row(n, records[n]), range(len(records)), self.file.url))

    def part(self, start: int, stop: int) -> "Piece":
        stop = min(stop, self.rows)  # what comes after is the next piece's
        return replace(self, skip=self.skip + start, row=self.row + start, rows=max(stop - start, 0))

    def _records(self) -> Iterator[bytes | None]:
        try:
            with open_at(self.file, self.reading) as file:
                file.seek(self.offset)
                found = records(file, self.layout)
                for number, (_, record) in enumerate(found):
                    if number >= self.skip + self.rows:
                        return
                    if number >= self.skip:
                        yield record
        except OSError as error:
            raise DataError(f"cannot read {printable(self.file.url)} ({error.strerror or error})") from None

    def _row(self, number: int, record: bytes | None) -> dict[str, Any]:
        row: dict[str, Any] = {"row": self.row + number, "key": f"{self.prefix}{self.row + number:06d}"}
        try:
            if record is None:
                raise BadRecord("record_too_long")
            values = parse(record, self.layout)
            columns = find_columns(tuple(values), self.reading, PATH)
            path = values.get(columns.image or "")
            if isinstance(path, str) and path and _is_encodable(path):
                row["key"] = self.prefix + _without_ending(path)
            row |= from_record(values, columns)
            if row.get("problem"):
                return row
            if not isinstance(path, str) or not path:
                raise BadRecord("missing_image")
            url = self._place(path)
        except BadRecord as error:
            return row | {"problem": str(error)}
        here = local(url)
        row["path"] = str(here) if here is not None and _is_encodable(str(here)) else None
        if is_url(path) and not row.get("url"):
            row["url"] = printable(path)
        return row | fetch.image(url, MAX_BYTES, self.reading)

    def _place(self, path: str) -> str:
        """Where a picture lies; BadRecord if the table may not name that place."""
        at_home = local(self.file.url) is not None
        if "\0" in path or not _is_encodable(path):
            raise BadRecord("unsafe_path")
        if is_url(path):
            allowed = STORES.match(path) or (HTTP.match(path) and self.reading.allow_http)
            if not allowed or "::" in path or (local(path) is not None and not at_home):
                raise BadRecord("url_not_allowed")
            return path
        if at_home:
            return child(parent(self.file.url), path)
        if path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise BadRecord("unsafe_path")
        return child(parent(self.file.url), path)


def pieces(file: File, prefix: str, piece_rows: int, reading: Reading) -> list[Piece]:
    """Cut a table between records; NotCaptionedImages if it names no pictures."""
    found: list[Piece] = []
    try:
        with open_at(file, reading) as stream:
            layout, start = _layout(stream, file, reading)
            stream.seek(start)
            count = row = 0
            for offset, _ in records(stream, layout):
                if count == piece_rows:
                    found.append(Piece(file, prefix, layout, start, row, count, reading))
                    start, row, count = offset, row + count, 0
                count += 1
    except OSError as error:
        raise DataError(f"cannot read {printable(file.url)} ({error.strerror or error})") from None
    return [*found, Piece(file, prefix, layout, start, row, count, reading)] if count else found


# -------------------------------------------------------------------------------------------------------------- layout


def looks_like(head: bytes) -> bool:
    """Text whose first line could be a record or the names of columns."""
    line = head.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n")[0]
    return b"\0" not in head and (line.startswith(b"{") or any(mark.encode() in line for mark in DELIMITERS))


def _layout(stream: BinaryIO, file: File, reading: Reading) -> tuple[Layout, int]:
    """By what the file holds, whatever it is called, and where the records begin."""
    head = stream.read(3)
    start = 3 if head == b"\xef\xbb\xbf" else 0
    stream.seek(start)
    name = printable(file.url)
    first = next((record for _, record in records(stream, Layout()) if record is None or record.strip()), b"")
    if (first or b"").lstrip().startswith(b"{"):
        stream.seek(start)
        _check_lines(stream, name, reading)
        return Layout(), start
    stream.seek(start)
    header, after = next(((r, stream.tell()) for _, r in records(stream, Layout(("",)))), (b"", start))
    try:
        text = (header or b"").decode().strip("\r\n")
    except UnicodeDecodeError:
        raise NotCaptionedImages(name, "the first line is not UTF-8", []) from None
    delimiter = max(DELIMITERS, key=lambda mark: (text.count(mark), -DELIMITERS.index(mark)))
    try:
        names = [name.strip() for name in next(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True), [])]
    except csv.Error:
        names = []
    check_present(name, find_columns(tuple(names), reading, PATH), names, reading, PATH)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise NotCaptionedImages(name, f"column {repeated[0]} is there twice", names)
    return Layout(tuple(names), delimiter), after


def _check_lines(stream: BinaryIO, name: str, reading: Reading) -> None:
    names: dict[str, None] = {}
    for number, (_, record) in enumerate(records(stream, Layout())):
        if number == SNIFFED:
            break
        try:
            names |= dict.fromkeys(parse_json(record or b""))
        except BadRecord:
            continue
    check_present(name, find_columns(tuple(names), reading, PATH), list(names), reading, PATH)


def records(file: BinaryIO, layout: Layout) -> Iterator[tuple[int, bytes | None]]:
    """Offset and bytes of each record, null for one that is too long; empty lines are none.

    In a table a line break inside quotes does not end the record. Where quotes never close, the record is too long, and
    the next one begins on its second line.
    """
    quoted = bool(layout.names)
    offset = file.tell()
    while True:
        start = offset
        file.seek(start)
        first = file.readline(MAX_TEXT + 1)
        if not first:
            return
        lines, size, is_open = [first], len(first), quoted and first.count(b'"') % 2 == 1
        while is_open and size <= MAX_TEXT and lines[-1].endswith(b"\n"):
            lines.append(file.readline(MAX_TEXT + 1))
            size += len(lines[-1])
            is_open ^= lines[-1].count(b'"') % 2 == 1
        if size <= MAX_TEXT and not is_open:
            offset = start + size
            record = b"".join(lines)
            if record.strip():
                yield start, record
        else:
            offset = _next_line(file, start, first)
            yield start, None


def _next_line(file: BinaryIO, start: int, line: bytes) -> int:
    offset = start + len(line)
    file.seek(offset)
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_TEXT)
        offset += len(line)
    return offset


def parse(record: bytes, layout: Layout) -> dict[str, Any]:
    """A record's values by the name of their column."""
    if not layout.names:
        return parse_json(record)
    if b"\0" in record:
        raise BadRecord("nul_byte")
    try:
        text = record.decode()
        found = list(csv.reader(io.StringIO(text, newline=""), delimiter=layout.delimiter, strict=True))
    except UnicodeDecodeError:
        raise BadRecord("caption_not_utf8") from None
    except csv.Error as error:
        raise BadRecord("record_too_long" if "field limit" in str(error) else "bad_csv") from None
    if len(found) != 1 or len(found[0]) != len(layout.names):
        raise BadRecord("bad_csv")
    return {name: value or None for name, value in zip(layout.names, found[0], strict=True)}


def _without_ending(path: str) -> str:
    path = printable(path)
    head, dot, ending = path.rpartition(".")
    return head if dot and "/" not in ending and head else path


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
