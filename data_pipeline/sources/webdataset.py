"""Tars in the layout of the webdataset library: members with the same name up to the first dot are one sample.

    dog1.jpg  dog1.txt             the caption is the .txt's, or `caption`, `text`, … of the .json, as fields.py says
    dog2.png  dog2.json            the key is what the json calls `key`, else names of tar and member: 00017/dog2

The shards of img2dataset and those that this package writes are such tars. Nothing is unpacked; members that cannot be
trusted are dropped one by one (tar.py).
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa

from data_pipeline.errors import DataError
from data_pipeline.images import MAX_BYTES
from data_pipeline.sources import tar
from data_pipeline.sources.fields import MAX_TEXT, BadRecord, caption_file, find_columns, from_record, parse_json
from data_pipeline.sources.folder import EXTENSIONS
from data_pipeline.sources.location import File, Reading, local, open_at, printable
from data_pipeline.sources.pieces import GUESSED_BYTES, Slice, tables

ENDINGS: Final = (".tar", ".tar.gz", ".tgz")
CAPTIONS: Final = ("txt", "caption", "text")  # endings of members that hold nothing but the caption
_KEY_AND_ENDING: Final = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
_META: Final = re.compile(r"__[^/]*__(/|$)")  # what writers of shards keep for themselves


@dataclass
class Sample:
    """Neighbouring members of one key."""

    key: str
    offset: int
    members: dict[str, bytes | None] = field(default_factory=dict)  # by ending, the first of each
    bad: list[tuple[str, str]] = field(default_factory=list)  # name and reason

    @property
    def image(self) -> str | None:
        return next((ending for ending in self.members if ending in EXTENSIONS), None)

    @property
    def rows(self) -> int:
        """One for the sample, and one for each member that was dropped; a sample that lost its image so is one."""
        return len(self.bad) + (1 if self.image or (self.members and not self.bad) else 0)


@dataclass(frozen=True)
class Piece:
    """Samples of a tar between two offsets."""

    file: File
    stem: str  # begins the keys
    start: int
    stop: int | None
    row: int
    rows: int
    reading: Reading

    def read(self) -> Iterator[pa.Table]:
        return tables(self._rows())

    def part(self, start: int, stop: int) -> Slice:
        return Slice(self, start, stop)

    def _rows(self) -> Iterator[dict[str, Any]]:
        number = self.row
        try:
            with open_at(self.file, self.reading) as file:
                for sample in samples(tar.members(file, MAX_BYTES, self.start, self.stop)):
                    for row in self._of(sample):
                        yield {"row": number} | row
                        number += 1
        except OSError as error:
            raise DataError(f"cannot read {printable(self.file.url)} ({error.strerror or error})") from None

    def _of(self, sample: Sample) -> Iterator[dict[str, Any]]:
        bad = [{"key": f"{self.stem}/{name}", "problem": reason} for name, reason in sample.bad]
        if sample.image is not None:
            yield self._row(sample)
        elif sample.members and not bad:
            yield {"key": f"{self.stem}/{sample.key}", "problem": "missing_image"}
        yield from bad

    def _row(self, sample: Sample) -> dict[str, Any]:
        row: dict[str, Any] = {"key": f"{self.stem}/{sample.key}"}
        try:
            if (data := sample.members.get("json")) is not None:
                if len(data) > MAX_TEXT:
                    raise BadRecord("record_too_long")
                record = parse_json(data)
                row |= from_record(record, find_columns(tuple(record), self.reading))
            ending = next((ending for ending in CAPTIONS if sample.members.get(ending) is not None), None)
            if ending is not None and not row.get("problem"):
                row["caption"] = caption_file(sample.members[ending] or b"")
        except BadRecord as error:
            row["problem"] = str(error)
        return row if row.get("problem") else row | {"image": sample.members[sample.image or ""]}


def samples(members: Iterable[tar.Member]) -> Iterator[Sample]:
    current: Sample | None = None
    for member in members:
        if member.problem is None and _META.match(member.name):
            continue
        fits = _KEY_AND_ENDING.fullmatch(member.name)
        if fits is None and member.problem is None:
            continue  # no ending, or hidden: no part of a sample
        key, ending = (fits[1], fits[2].lower()) if fits else (member.name or f"@{member.offset}", "")
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = Sample(key, member.offset)
        if member.problem is not None:
            current.bad.append((member.name or key, member.problem))
        elif ending in current.members:
            current.bad.append((member.name, "duplicate_member"))
        else:
            current.members[ending] = member.data
    if current is not None:
        yield current


def pieces(file: File, stem: str, piece_rows: int, reading: Reading, hint: int | None = None) -> list[Piece]:
    """Cut between samples where the headers can be looked at; far away a tar is one piece."""
    if local(file.url) is None:
        return [Piece(file, stem, 0, None, 0, hint or max(1, file.size // GUESSED_BYTES), reading)]
    found: list[Piece] = []
    start = row = count = 0
    try:
        with open_at(file, reading) as stream:
            packed = tar.is_gzip(stream.read(2))
            for sample in samples(tar.members(stream, MAX_BYTES, data=False)):
                if count >= piece_rows and not packed:
                    found.append(Piece(file, stem, start, sample.offset, row, count, reading))
                    start, row, count = sample.offset, row + count, 0
                count += sample.rows
    except OSError as error:
        raise DataError(f"cannot read {file.url} ({error.strerror or error})") from None
    return [*found, Piece(file, stem, start, None, row, count, reading)] if count else found


def stem(name: str) -> str:
    ending = next((ending for ending in (".tar.gz", ".tgz", ".tar") if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def counted(data: bytes) -> int | None:
    """Samples, by the KEY_stats.json that img2dataset leaves beside a tar."""
    try:
        number = json.loads(data)["successes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return number if isinstance(number, int) and number > 0 else None
