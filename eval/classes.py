"""The classes of an evaluation set: what a label number means.

classes.json: [{"label": 0, "name": "joker", "synset": "joker.n.01"}, {"label": 1, "names": ["dog", "hound"]}, …]
"""

import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError

Label = int | str  # as data sets write it: the number of a class, or its name


@dataclass(frozen=True)
class Classes:
    """Names and synset of every class, by label number."""

    names: tuple[tuple[str, ...], ...]
    synsets: tuple[str | None, ...]
    source: str  # where they come from, for messages
    sha256: str
    named: bool = True  # False: labels came without names, and a number stands for each

    def __len__(self) -> int:
        return len(self.names)

    def name(self, label: int) -> str:
        return self.names[label][0]

    def lookup(self) -> dict[str, int]:
        """Every spelling by which a folder or a text label may name a class: a name, else a synset, else its number.

        A spelling that two classes share names neither.
        """
        found: dict[str, int] = {}
        kinds: list[list[tuple[str, int]]] = [
            [(name, label) for label, names in enumerate(self.names) for name in names],
            [(synset, label) for label, synset in enumerate(self.synsets) if synset],
            [(str(label), label) for label in range(len(self))],
        ]
        for spellings in kinds:
            labels: dict[str, set[int]] = {}
            for text, label in spellings:
                labels.setdefault(text, set()).add(label)
            found = {text: min(those) for text, those in labels.items() if len(those) == 1} | found
        return found

    def resolve(self, labels: Iterable[Label], where: str) -> list[int]:
        """Label numbers; DataError for one that no class has."""
        lookup = self.lookup()
        numbers: list[int] = []
        for label in labels:
            if isinstance(label, str):
                if label not in lookup:
                    near = difflib.get_close_matches(label, lookup, 1)
                    hint = f"; the nearest is '{near[0]}'" if near else ""
                    raise DataError(f"{where} has a class '{label}' that {self.source} does not list{hint}")
                numbers.append(lookup[label])
            elif 0 <= label < len(self):
                numbers.append(label)
            else:
                raise DataError(
                    f"{where} has label {label}, outside 0..{len(self) - 1} of {self.source}; "
                    f"give the classes.json that belongs to this data"
                )
        return numbers


def read_classes(path: Path) -> Classes:
    """A classes.json, checked: labels are 0..n-1, each once, and each has a name."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read classes from {path}: {error.strerror}") from None
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); expected a list of {{label, name, synset}}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path} must be a list of {{label, name, synset}}, and not empty")
    names = [_names(entry, f"entry {position} of {path}") for position, entry in enumerate(entries)]
    labels = [entry.get("label") for entry in entries]
    if any(type(label) is not int for label in labels) or sorted(labels) != list(range(len(labels))):
        raise DataError(f"{path}: the labels of its {len(labels)} classes must be 0..{len(labels) - 1}, each once")
    order = sorted(range(len(labels)), key=lambda position: labels[position])
    synsets = tuple(entries[position].get("synset") for position in order)
    return Classes(tuple(names[p] for p in order), synsets, str(path), hashlib.sha256(data).hexdigest())


def _names(entry: dict[str, Any], where: str) -> tuple[str, ...]:
    names = entry.get("names", entry.get("name"))
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"{where} needs a 'name' (text) or 'names' (a list of text)")
    return tuple(names)


def derive_classes(labels: Iterable[Label]) -> Classes:
    """Classes of data that come without a classes.json: sorted names, or 0..largest number."""
    distinct = set(labels)
    text = {label for label in distinct if isinstance(label, str)}
    numbers = {label for label in distinct if not isinstance(label, str)}
    if text and numbers:
        raise DataError("labels are numbers in one place and names in another; give the classes with --classes")
    if numbers and min(numbers) < 0:
        raise DataError(f"labels must be 0 or more, found {min(numbers)}")
    if len(numbers) and max(numbers) >= 100 * len(numbers) + 1000:  # our choice: surely not class numbers
        raise DataError(f"the largest label is {max(numbers)} with {len(numbers)} distinct ones; give --classes")
    names = sorted(text) if text else [str(label) for label in range(max(numbers, default=-1) + 1)]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    return Classes(
        tuple((name,) for name in names), (None,) * len(names), "the labels found in the data", digest, bool(text)
    )
