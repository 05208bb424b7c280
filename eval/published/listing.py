"""What a layout finds of one split."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from eval.classes import Label
from eval.sources.source import Read


@dataclass
class Listing:
    """Every picture that belongs to a split, whether it is there or not."""

    files: list[str]  # in the tree; the files that hold the pictures, one per picture
    labels: Sequence[Label | None]  # one per picture; None: no class, counted in `left_out`
    keys: list[str] | None = None  # one per picture, where the names of the files are not to be the keys
    class_names: tuple[str, ...] = ()  # what label numbers mean, where the set's own files say so
    lists: tuple[str, ...] = ()  # files of the tree that say so; checked against published hashes
    read: Read | None = None  # for pictures that are no files of their own, by position in `files`
    left_out: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)  # sentences on what is not as published
