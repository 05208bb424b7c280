"""Images with a text of the same name beside each: cat.jpg and cat.txt, or cat.json with caption, hashtags, licence ….

The key is the path without its ending, or what the json calls `key`. With both texts the caption is the .txt's. This is
also what img2dataset writes as `files`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Final

import pyarrow as pa

from data_pipeline.images import MAX_BYTES
from data_pipeline.sources import fetch
from data_pipeline.sources.fields import MAX_TEXT, BadRecord, caption_file, find_columns, from_record, parse_json
from data_pipeline.sources.location import File, Reading, TooLargeError, local, read_at
from data_pipeline.sources.pieces import tables

EXTENSIONS: Final = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm"})


@dataclass(frozen=True)
class Picture:
    name: str  # relative to the input folder
    url: str
    text: str | None  # url of the .txt
    record: str | None  # url of the .json


@dataclass(frozen=True)
class Piece:
    pictures: tuple[Picture, ...]
    start: int
    reading: Reading

    @property
    def rows(self) -> int:
        return len(self.pictures)

    def read(self) -> Iterator[pa.Table]:
        example = self.pictures[0].url if self.pictures else ""
        return tables(fetch.in_order(self._row, range(len(self.pictures)), example))

    def part(self, start: int, stop: int) -> "Piece":
        return replace(self, pictures=self.pictures[start:stop], start=self.start + start)

    def _row(self, number: int) -> dict[str, Any]:
        picture = self.pictures[number]
        row: dict[str, Any] = {"row": self.start + number, "key": _name(picture.name.rsplit(".", 1)[0])}
        here = local(picture.url)
        row["path"] = None if here is None else _name(str(here))
        if row["key"] is None or (here is not None and row["path"] is None):
            return row | {"problem": "bad_key"}
        try:
            row |= self._texts(picture)
        except BadRecord as error:
            row["problem"] = str(error)
        except TooLargeError:
            row["problem"] = "caption_too_long"
        except OSError:
            row["problem"] = "unreadable_file"
        return row if row.get("problem") else row | fetch.image(picture.url, MAX_BYTES, self.reading)

    def _texts(self, picture: Picture) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if picture.record is not None:
            record = parse_json(read_at(picture.record, MAX_TEXT, self.reading))
            found = from_record(record, find_columns(tuple(record), self.reading))
        if picture.text is not None and not found.get("problem"):
            found["caption"] = caption_file(read_at(picture.text, MAX_TEXT, self.reading))
        return found


def is_image(name: str) -> bool:
    return _ending(name) in EXTENSIONS


def pictures(files: dict[str, File], prefix: str) -> Iterator[tuple[Picture, list[File]]]:
    """Every image of a folder (its files by name), and the files that say something of it."""
    for name, file in files.items():
        if is_image(name):
            stem = name[: -len(_ending(name)) - 1]
            text, record = (files.get(f"{stem}{ending}") for ending in (".txt", ".json"))
            picture = Picture(prefix + name, file.url, text and text.url, record and record.url)
            yield picture, [one for one in (text, record) if one is not None]


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower().lstrip(".")


def _name(name: str) -> str | None:
    """File names are bytes; those that are not UTF-8 cannot become keys."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return None
    return name
