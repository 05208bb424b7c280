"""What every form of evaluation data is read into before labels and classes are joined."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from eval.classes import Label

PICTURES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
# Reasons why a picture has no class of its own; a labels file does away with them.
UNLABELLED: Final = frozenset({"no_label", "bad_label", "bad_json", "empty_label", "label_too_long", "label_not_utf8"})

Read = Callable[[int], bytes]


@dataclass
class Source:
    """One path the user gave, read but not yet joined with labels."""

    where: str
    keys: list[str]
    labels: Sequence[Label | None]  # None: no class of its own
    read: Read
    sha256: str
    escaped: bool = False  # keys are written as in a tar: a user's key must be escaped before it is looked up
    left_out: Counter[str] = field(default_factory=Counter)
    own_keys: list[str] | None = (
        None  # as the file has them, where `keys` also says which file; a labels file has these
    )
    class_names: tuple[str, ...] = ()  # what its label numbers mean, where the file says so
    published: dict[str, Any] | None = None  # name, split and whether it is whole, of a set opened as NAME=PATH
    classes: str | tuple[str, ...] | None = None  # the class set that its labels belong to, where it has one


def some(items: Iterable[str], limit: int = 5) -> str:
    """A few of many, for a message."""
    items = sorted(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
