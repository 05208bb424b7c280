"""Where captioned images come from: --input names folders, files, patterns and URLs, in any mixture.

    photos/                        images with .txt or .json beside each (folder.py), and any of the files below
    *.parquet  *.arrow  *.feather  images as bytes (parquet.py, arrow.py)
    *.tar  *.tar.gz                webdataset, img2dataset (webdataset.py, img2dataset.py)
    *.csv  *.tsv  *.jsonl          paths or URLs of images (listing.py)

What a file is, its first bytes say; the ending only where they say nothing. A source is cut into pieces that one task
reads in one pass; a piece yields tables of schema.SOURCE.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from data_pipeline.errors import DataError, UsageError
from data_pipeline.images import BadImage
from data_pipeline.images import sniff as sniff_image
from data_pipeline.sources import arrow, folder, img2dataset, listing, location, parquet, tar, webdataset
from data_pipeline.sources.columns import DamagedFile, NotCaptionedImages
from data_pipeline.sources.location import File, Reading
from data_pipeline.sources.pieces import PIECE_ROWS, Piece, Weighted, cut

__all__ = ["File", "Input", "Piece", "Reading", "Sources", "discover"]

BY_ENDING: Final = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    **dict.fromkeys(webdataset.ENDINGS, "tar"),
    **dict.fromkeys((*listing.LINES, *listing.TABLES), "listing"),
}
READ: Final = {"parquet": parquet.pieces, "arrow": arrow.pieces, "listing": listing.pieces}
_WEIGHT: Final = re.compile(r"(.+)::(\d+\.?\d*|\.\d+)")


@dataclass(frozen=True)
class Input:
    """One line of the manifest: a file, or all loose images of a folder with their captions."""

    name: str  # a folder's ends with /
    files: list[File]
    weight: float = 1.0


@dataclass(frozen=True)
class Sources:
    """Everything found under --input, in input order."""

    pieces: list[Piece] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # file, why

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)


def discover(inputs: Sequence[str | Path], output: Path, reading: Reading | None = None) -> Sources:
    """List what can be read, in an order that depends on names only. Nothing under `output` is taken for input."""
    reading = reading or Reading()
    weighted = [split_weight(os.fspath(text)) for text in inputs]
    places = [(place, weight) for text, weight in weighted for place in location.expand(text, reading)]
    names = _names([place for place, _ in places])
    looked = [_look(place, name, reading) for (place, _), name in zip(places, names, strict=True)]
    several = sum(file is None for file in looked) > 1
    sources = Sources()
    for (place, weight), name, file in zip(places, names, looked, strict=True):
        found = _Found(sources, reading, weight)
        if file is None:
            found.add_folder(place, name, output.resolve(), prefix=f"{name}/" if several else "")
        else:
            found.add_file(file, name, kind_of(file, reading), named=True)
    if not sources.pieces:
        where = ", ".join(location.printable(text) for text, _ in weighted)
        if sources.skipped:
            reasons = "; ".join(f"{name}: {why}" for name, why in sources.skipped[:5])
            raise DataError(f"no captioned images in {where}: every file was skipped ({reasons})")
        raise DataError(
            f"no captioned images in {where}: a folder must hold Parquet files with the columns image and caption, "
            f"Arrow files like them, tars of a webdataset, tables (csv, tsv, jsonl) that name images, or images "
            f"({', '.join(sorted(folder.EXTENSIONS))}) with a .txt or .json caption beside each"
        )
    return sources


def split_weight(text: str) -> tuple[str, float]:
    """PATH::2.5 -> PATH, 2.5."""
    found = _WEIGHT.fullmatch(text)
    if found is None or (not location.is_url(text) and os.path.lexists(text)):
        return text, 1.0
    weight = float(found[2])
    if not 0 < weight < math.inf:
        raise UsageError(f"--input {text}: the weight must be above 0; leave the input out instead")
    return found[1], weight


def kind_of(file: File, reading: Reading) -> str | None:
    """By the first bytes, then by the ending; None for what is no table and no tar."""
    by_ending = next((kind for ending, kind in BY_ENDING.items() if file.name.lower().endswith(ending)), None)
    try:
        with location.open_at(file, reading) as stream:
            head = stream.read(2 * tar.BLOCK)
    except OSError as error:
        where = location.printable(file.url)
        raise DataError(f"cannot read {where} ({error.strerror or error})") from None
    return sniff(head) or by_ending


def sniff(head: bytes) -> str | None:
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((arrow.MAGIC, b"\xff\xff\xff\xff")):  # the file format, the stream
        return "arrow"
    if tar.is_gzip(head) or tar.looks_like_tar(head):
        return "tar"
    try:
        return f"image ({sniff_image(head)})"
    except BadImage:
        return "listing" if listing.looks_like(head) else None


def _look(place: str, name: str, reading: Reading) -> File | None:
    try:
        return location.look(place, name, reading)
    except FileNotFoundError:
        raise DataError(f"--input {location.printable(place)}: no such file or folder") from None
    except (OSError, ValueError) as error:
        raise DataError(f"--input {location.printable(place)}: {error}") from None


def _names(places: Sequence[str]) -> list[str]:
    """The last part of each place, with as many parts before it as it takes to tell all apart."""
    parts = [[location.last_name(place)] for place in places]
    above = list(places)
    for _ in range(16):
        shown = ["/".join(part) for part in parts]
        counts = Counter(shown)
        if len(counts) == len(shown):
            return shown
        for number in (number for number, name in enumerate(shown) if counts[name] > 1):
            above[number] = location.parent(above[number])
            parts[number].insert(0, location.last_name(above[number]))
    return ["/".join(part) for part in parts]  # the same place twice


@dataclass
class _Found:
    """Adds to sources what one input holds."""

    sources: Sources
    reading: Reading
    weight: float

    def add_file(
        self, file: File, name: str, kind: str | None, *, named: bool, stem: str | None = None, hint: int | None = None
    ) -> bool:
        """`name` is the manifest's; `stem` begins keys. Whether it holds captioned images."""
        stem = _stem(name) if stem is None else stem
        try:
            if kind == "tar":
                pieces: Sequence[Piece] = webdataset.pieces(file, stem, _piece_rows(), self.reading, hint)
            elif kind in READ:
                prefix = "" if kind == "listing" and named else stem
                prefix = _folder_of(stem) if kind == "listing" and not named else prefix
                pieces = READ[kind](file, prefix, _piece_rows(), self.reading)
            else:
                what = f"an {kind}" if kind else "no table and no tar"
                raise DataError(
                    f"{location.printable(file.url)} is {what}; give Parquet, Arrow, tar, CSV, TSV or JSON lines, or "
                    "the folder of the images"
                )
        except (NotCaptionedImages, DamagedFile) as error:
            if named:
                raise
            self.sources.skipped.append((name, error.short))
            return False
        if not pieces:
            self.sources.skipped.append((name, "empty"))
            return False
        self.add(name, [file], pieces)
        return True

    def add(self, name: str, files: list[File], pieces: Sequence[Piece]) -> None:
        weigh: Callable[[Piece], Piece] = lambda piece: Weighted(piece, self.weight)  # noqa: E731
        self.sources.pieces.extend(pieces if self.weight == 1 else map(weigh, pieces))
        self.sources.inputs.append(Input(name, files, self.weight))

    def add_folder(self, root: str, folder_name: str, output: Path, prefix: str) -> None:
        files = {file.name: file for file in location.walk(root, self.reading, output)}
        folders = {name.rpartition("/")[0] for name in files}
        listed = False
        for name, file in files.items():
            ending = next((ending for ending in BY_ENDING if name.lower().endswith(ending)), None)
            if ending is None:
                continue
            shown, stem = f"{folder_name}/{name}", prefix + name[: len(name) - len(ending)]
            kind = kind_of(file, self.reading)
            beside = any(_stem(name) + tar_ending in files for tar_ending in webdataset.ENDINGS)
            if kind == "parquet" and (beside or _stem(name) in folders):
                failures = img2dataset.failures(file, stem, self.reading)
                if failures is not None:
                    self.add(shown, [file], failures)
                    continue
            stem = stem if kind in ("tar", "listing") else f"{folder_name}/{name[: len(name) - len(ending)]}"
            hint = self._counted(name, files) if kind == "tar" else None
            if kind not in (*READ, "tar"):
                self.sources.skipped.append((shown, f"it is an {kind}" if kind else "no table and no tar"))
                continue
            added = self.add_file(file, shown, kind, named=False, stem=stem, hint=hint)
            listed = listed or (added and kind == "listing")
        self._add_images(files, folder_name, prefix, listed)

    def _add_images(self, files: dict[str, File], folder_name: str, prefix: str, listed: bool) -> None:
        found = list(folder.pictures(files, prefix))
        if listed:  # a table names them; without one each stands for itself
            loose = [entry for entry in found if entry[1]]
            if len(loose) < len(found):
                number = len(found) - len(loose)
                why = f"{number:,} images without captions beside them: a table of the folder names images"
                self.sources.skipped.append((f"{folder_name}/", why))
            found = loose
        if not found:
            return
        pictures = [picture for picture, _ in found]
        pieces = [
            folder.Piece(tuple(pictures[start:stop]), start, self.reading)
            for start, stop in cut(len(pictures), min(_piece_rows(), max(FEWEST, len(pictures) // TASKS)))
        ]
        images = [replace(files[picture.name.removeprefix(prefix)], name=picture.name) for picture in pictures]
        captions = [replace(file, name=f"{picture.name}#caption") for picture, texts in found for file in texts]
        self.add(f"{folder_name}/", images + captions, pieces)

    def _counted(self, name: str, files: dict[str, File]) -> int | None:
        stats = files.get(_stem(name) + img2dataset.STATS)
        if stats is None or location.local(stats.url) is not None:
            return None
        try:
            return webdataset.counted(location.read_at(stats.url, tar.SKIP, self.reading))
        except OSError:
            return None


FEWEST: Final = 100  # pictures of a folder that are a task of their own, and …
TASKS: Final = 32  # … into how many a small folder is cut, so that all processes end at the same time


def _piece_rows() -> int:
    return PIECE_ROWS


def _stem(name: str) -> str:
    """Without the ending of a table or tar."""
    ending = next((ending for ending in sorted(BY_ENDING, key=len)[::-1] if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def _folder_of(stem: str) -> str:
    return f"{stem.rsplit('/', 1)[0]}/" if "/" in stem else ""
