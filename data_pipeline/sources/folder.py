"""Images with a text file of the same name beside each: cat.jpg and cat.txt. The key is the path without its ending."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from data_pipeline.images import MAX_BYTES
from data_pipeline.schema import SOURCE

EXTENSIONS: Final = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm"})
MAX_CAPTION_BYTES: Final = 1 << 20  # of the file; --max-caption is far below
BATCH: Final = 32  # images in memory at a time


@dataclass(frozen=True)
class Picture:
    name: str  # relative to the input folder
    path: str


@dataclass(frozen=True)
class Piece:
    pictures: tuple[Picture, ...]
    start: int

    @property
    def rows(self) -> int:
        return len(self.pictures)

    def read(self) -> Iterator[pa.Table]:
        for first in range(0, len(self.pictures), BATCH):
            batch = self.pictures[first : first + BATCH]
            rows = [_row(picture, self.start + first + offset) for offset, picture in enumerate(batch)]
            yield pa.Table.from_pylist(rows, schema=SOURCE)


def caption_path(image: Path) -> Path:
    return image.with_suffix(".txt")


def _row(picture: Picture, number: int) -> dict[str, Any]:
    path = Path(picture.path)
    row: dict[str, Any] = {"row": number, "key": _text(picture.name.rsplit(".", 1)[0]), "path": _text(picture.path)}
    if row["key"] is None or row["path"] is None:
        return row | {"problem": "bad_key"}
    try:
        if path.stat().st_size > MAX_BYTES:
            return row | {"problem": "too_many_bytes"}
        row["image"] = path.read_bytes()
        text = caption_path(path)
        if text.is_file():
            if text.stat().st_size > MAX_CAPTION_BYTES:
                return row | {"problem": "caption_too_long"}
            row["caption"] = text.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return row | {"problem": "caption_not_utf8"}
    except OSError:
        return row | {"problem": "unreadable_file"}
    return row


def _text(name: str) -> str | None:
    """File names are bytes; those that are not UTF-8 cannot become keys."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return None
    return name
