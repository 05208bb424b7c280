"""What is known of a published set: eval/published/data/NAME.json, checked.

name, title, classes, num_classes    classes: a bundled class set (eval/prompts), a list of the set's own names, or
                                     null: its files say so
url, licence, paper, note            where it is published and under which terms
evaluate, train                      the splits that the field evaluates and trains on
splits     {NAME: {images, classes, layout, options}}    as published; `at_least` for `images` where only that is known
any_split  {layout, options}: a form rather than a set; its splits are names of files (COCO's annotations)
archives   [{name, bytes, md5 or sha256, splits, into, nested, unpack}]
lists      {FILE: {md5 or sha256, bytes}}                files in the set whose hashes are known
lay_out    lines that say how the folder is to look
sources    [{fact, from, licence}]                       where these figures come from
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from data_pipeline.errors import UsageError
from eval.published.tree import Hashes
from maws.config import nearest

DATA: Final = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Archive:
    """A file that is published."""

    name: str
    hashes: Hashes
    splits: tuple[str, ...] = ()  # that need it; none: all
    into: str = ""  # the folder that its members belong in, below the set's own
    nested: bool = False  # a tar of one tar per class
    unpack: str = ""  # the command that unpacks it, where it cannot be read in place


@dataclass(frozen=True)
class Split:
    """One part of a set."""

    name: str
    layout: str
    images: int | None = None
    at_least: int | None = None  # pictures, where sources disagree about how many there are
    classes: int | None = None  # with pictures in it, where that is not all of the set's
    options: Mapping[str, Any] = field(default_factory=dict)  # of the layout


@dataclass(frozen=True)
class Published:
    """One published set."""

    name: str
    title: str
    num_classes: int  # 0: a form of data rather than one set
    classes: str | tuple[str, ...] | None  # a bundled set, its own; None: its files say so
    splits: Mapping[str, Split]
    source: str  # address
    licence: str
    evaluate: str | None
    train: str | None = None
    paper: str = ""
    note: str = ""
    lay_out: tuple[str, ...] = ()
    archives: tuple[Archive, ...] = ()
    lists: Mapping[str, Hashes] = field(default_factory=dict)
    sources: tuple[Mapping[str, str], ...] = ()
    any_split: Mapping[str, Any] | None = None

    def split(self, name: str) -> Split:
        """Raises UsageError for one it does not have."""
        if self.any_split is not None:
            if not name.endswith(".json"):
                raise UsageError(
                    f"{self.name}:{name}: name the annotations, as in {self.name}:annotations/FILE.json=FOLDER"
                )
            options = {**self.any_split["options"], "annotations": name}
            return Split(name, self.any_split["layout"], options=options)
        if name not in self.splits:
            raise UsageError(f"{self.name} has no split '{name}'; {nearest(name, list(self.splits))}")
        return self.splits[name]


@cache
def files() -> dict[str, Path]:
    """The descriptions by name."""
    return {file.stem: file for file in sorted(DATA.glob("*.json"))}


@cache
def read(name: str) -> Published:
    """The description of a set that is there; a mistake in one is ours, so it is no UserError."""
    about = json.loads(files()[name].read_text(encoding="utf-8"))
    classes = about.get("classes")
    return Published(
        name=about["name"],
        title=about["title"],
        num_classes=about.get("num_classes", 0),
        classes=tuple(classes) if isinstance(classes, list) else classes,
        splits={split: Split(split, **rest) for split, rest in about.get("splits", {}).items()},
        source=about["url"],
        licence=about["licence"],
        evaluate=about.get("evaluate"),
        train=about.get("train"),
        paper=about.get("paper", ""),
        note=about.get("note", ""),
        any_split=about.get("any_split"),
        lay_out=tuple(about.get("lay_out", ())),
        archives=tuple(_archive(archive) for archive in about.get("archives", ())),
        lists={file: Hashes(**hashes) for file, hashes in about.get("lists", {}).items()},
        sources=tuple(about.get("sources", ())),
    )


def _archive(about: Mapping[str, Any]) -> Archive:
    rest = dict(about)
    hashes = Hashes(**{key: rest.pop(key) for key in ("bytes", "md5", "sha256") if key in rest})
    return Archive(rest.pop("name"), hashes, tuple(rest.pop("splits", ())), **rest)
