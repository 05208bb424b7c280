"""Published sets by name, and opening one as it lies on disk.

    find("inat2018").split("val")          what is known of it
    open_split(published, "val", folder)   its pictures and labels, as eval.datasets has them
    verify(published, "val", folder)       how many pictures are there, which are missing, whether hashes fit

`imagenet1k=/data/imagenet` and `imagenet1k:val=/data/imagenet` are references: they stand where a path may.
"""

import dataclasses
import importlib
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from data_pipeline.errors import DataError, UsageError
from eval.classes import Classes, plain_classes, read_classes
from eval.published import description
from eval.published.description import Archive, Published, Split
from eval.published.listing import Listing
from eval.published.tree import Hashes, Packed, Tree, hash_file
from eval.sources.source import Source, some
from maws.config import nearest

log = logging.getLogger(__name__)

_REFERENCE: Final = re.compile(r"([A-Za-z0-9][\w.-]*)(?::([^=]+))?=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Reference:
    """NAME=PATH or NAME:SPLIT=PATH."""

    published: Published
    split: str
    folder: Path

    def __str__(self) -> str:
        return f"{self.published.name}:{self.split}={self.folder}"


@dataclass(frozen=True)
class Found:
    """What lies in a folder of one split."""

    images: int  # there
    expected: int | None  # as published
    classes: int
    missing: tuple[str, ...]  # listed or published, and not there
    problems: tuple[str, ...]  # sentences on what is not as published; with none the split is whole
    checked: tuple[str, ...]  # files whose published hash fits

    @property
    def whole(self) -> bool:
        return not self.problems


def names() -> list[str]:
    return list(description.files())


def find(name: str) -> Published:
    """A set by name, whatever its separators and capitals. Raises UsageError with the nearest name."""
    folded = {_folded(own): own for own in names()}
    if _folded(name) not in folded:
        raise UsageError(f"there is no published set '{name}'; {nearest(name, names())}")
    return description.read(folded[_folded(name)])


def reference(path: Path | str, training: bool = False) -> Reference | None:
    """What NAME=PATH or NAME:SPLIT=PATH means; None for a plain path. Raises UsageError for a name that is unknown."""
    text = str(path)
    fits = _REFERENCE.fullmatch(text)
    if fits is None or Path(text).exists():
        return None
    name, split, folder = fits.groups()
    published = find(name)
    if not folder:
        raise UsageError(f"{text}: say where {published.name} lies, as in {published.name}=/data/{published.name}")
    if split is None:
        split = published.train if training else published.evaluate
    if split is None and published.any_split is not None:
        raise UsageError(f"{text}: name the annotations, as in {published.name}:annotations/FILE.json={folder}")
    if split is None:
        kind = "training" if training else "evaluation"
        raise UsageError(
            f"{text}: {published.title} has no {kind} split of its own; name one of {', '.join(published.splits)}"
        )
    # a shell leaves the ~ of NAME=~/data alone
    return Reference(published, published.split(split).name, Path(folder).expanduser())


def classes_of(published: Published) -> Classes | None:
    """What its label numbers mean; None where its files say so."""
    if published.classes is None or isinstance(published.classes, str):
        return read_classes(published.classes) if published.classes else None
    return plain_classes(published.classes, published.name)


# ---------------------------------------------------------------------------------------------------------------- open


def open_split(published: Published, split: str, folder: Path) -> Source:
    """Every picture of the split that is there; what is listed and missing is counted, and `published` tells whether
    the split is whole. Raises DataError where no picture is there.
    """
    part = published.split(split)
    lying = _look(published, part, folder)
    if not lying.there:
        raise DataError(
            f"{folder} holds no picture of {published.name} ({part.name}): {some(lying.found.problems, 3)}; "
            f"see `python -m eval prepare {published.name}`"
        )
    if not lying.found.whole:
        about = f"{published.name} ({part.name}) in {folder}"
        log.warning("warning: %s is not as published: %s", about, "; ".join(lying.found.problems[:5]))
    return _source(published, part, lying)


def verify(published: Published, split: str, folder: Path) -> Found:
    """Counts pictures and classes and checks published hashes of lists and archives; reads no picture."""
    return _look(published, published.split(split), folder).found


@dataclass(frozen=True)
class _Lying:
    """A split as it lies in a folder."""

    tree: Tree
    listing: Listing
    there: list[int]  # positions in the listing of the pictures that are there
    tars: dict[Path, Hashes]
    found: Found


def _look(published: Published, part: Split, folder: Path) -> _Lying:
    tree = Tree(folder, _packed(published, part, folder))
    listing = importlib.import_module(f"eval.published.layouts.{part.layout}").read(tree, part, published)
    there = _there(tree, listing)
    tars = {packed.path: hash_file(packed.path) for packed in tree.packed}
    return _Lying(tree, listing, there, tars, _found(published, part, tree, listing, there, tars))


def _source(published: Published, part: Split, lying: _Lying) -> Source:
    tree, listing, there = lying.tree, lying.listing, lying.there
    keys = listing.keys or listing.files
    read = listing.read or (lambda position: tree.read(listing.files[position]))
    return Source(
        f"{published.name}:{part.name}={tree.root}",
        [keys[row] for row in there],
        [listing.labels[row] for row in there],
        lambda position: read(there[position]),
        tree.digest(list(dict.fromkeys(listing.files[row] for row in there)), lying.tars),
        left_out=listing.left_out + tree.left_out + Counter(missing_image=len(listing.files) - len(there)),
        class_names=listing.class_names,
        published={"name": published.name, "split": part.name, "whole": lying.found.whole},
        classes=published.classes,
    )


def _packed(published: Published, part: Split, folder: Path) -> list[Packed]:
    """The archives of the split that lie in the folder and can be read in place."""
    found: list[Packed] = []
    for archive in published.archives:
        path = folder / archive.name
        needed = not archive.splits or part.name in archive.splits
        if needed and archive.name.endswith(".tar") and path.is_file():
            found.append(Packed(path, archive.into, archive.nested))
    return found


def _there(tree: Tree, listing: Listing) -> list[int]:
    """Positions of the pictures that are there and not empty."""
    sizes = {file: tree.size(file) for file in dict.fromkeys(listing.files)}
    return [row for row, file in enumerate(listing.files) if sizes[file]]


def _found(
    published: Published,
    part: Split,
    tree: Tree,
    listing: Listing,
    there: list[int],
    tars: Mapping[Path, Hashes],
) -> Found:
    problems = list(listing.problems)
    present = set(there)
    missing = tuple(file for row, file in enumerate(listing.files) if row not in present)
    if missing:
        problems.append(f"{len(missing):,} of {len(listing.files):,} listed pictures are not there: {some(missing)}")
    if part.images is not None and len(listing.files) != part.images:
        problems.append(f"{len(listing.files):,} pictures, published are {part.images:,}")
    if part.at_least is not None and len(listing.files) < part.at_least:
        problems.append(f"{len(listing.files):,} pictures, published are at least {part.at_least:,}")
    labels = {label for row in there if (label := listing.labels[row]) is not None}
    expected = part.classes or published.num_classes
    if expected and len(labels) != expected:
        problems.append(f"pictures of {len(labels):,} classes, published are {expected:,}")
    checked: list[str] = []
    wanted = {file: published.lists[file] for file in listing.lists if file in published.lists}
    for file, one in wanted.items():
        _compare(file, one, tree.hashes.get(file) or Hashes(), problems, checked)
    for archive in published.archives:
        if (path := tree.root / archive.name) in tars:
            _compare(archive.name, archive.hashes, tars[path], problems, checked)
    return Found(len(there), part.images, len(labels), missing, tuple(problems), tuple(checked))


# -------------------------------------------------------------------------------------------------------------- hashes


def _compare(name: str, published: Hashes, own: Hashes, problems: list[str], checked: list[str]) -> None:
    """Each hash that is published against the file's."""
    for kind in (field.name for field in dataclasses.fields(Hashes)):
        wanted, is_ = getattr(published, kind), getattr(own, kind)
        if wanted is not None and wanted != is_:
            problems.append(f"{name} has {kind} {is_}, published is {wanted}: copy or download it again")
            return
    if published.md5 or published.sha256:
        checked.append(name)


def lying(published: Published, folder: Path) -> list[tuple[Archive, Path]]:
    """The published archives that lie in the folder."""
    return [(archive, folder / archive.name) for archive in published.archives if (folder / archive.name).is_file()]


def _folded(name: str) -> str:
    return re.sub(r"[-_ .]", "", name).casefold()
