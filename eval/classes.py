"""The classes of an evaluation set: what a label number means.

    read_classes("imagenet1k")  read_classes("food101", "fr")  read_classes("demo/emoji/classes.json")

Bundled sets are named by their file in eval/prompts/; what a file of one's own may look like: class_files.py.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.errors import DataError, UserError
from eval import class_files, languages
from eval.class_files import ClassFile

Label = int | str  # as data sets write it: the number of a class, or its name


@dataclass(frozen=True)
class Classes:
    """Names and synset of every class, by label number."""

    names: tuple[tuple[str, ...], ...]
    synsets: tuple[str | None, ...]
    source: str  # where they come from, for messages
    sha256: str
    named: bool = True  # False: labels came without names, and a number stands for each
    folders: tuple[tuple[str, ...], ...] = ()  # other spellings by which data means a class: folders, wnid
    language: str = languages.ENGLISH
    templates: tuple[str, ...] = ()  # sentences that come with the classes

    def __len__(self) -> int:
        return len(self.names)

    def name(self, label: int) -> str:
        return self.names[label][0]

    def lookup(self) -> dict[str, int]:
        """Every spelling by which a folder or a text label may name a class: a name, else a folder or wnid of its own,
        else a synset, else its number.

        A spelling that two classes share names neither.
        """
        kinds: list[list[tuple[str, int]]] = [
            [(name, label) for label, names in enumerate(self.names) for name in names],
            [(folder, label) for label, folders in enumerate(self.folders) for folder in folders],
            [(synset, label) for label, synset in enumerate(self.synsets) if synset],
            [(str(label), label) for label in range(len(self))],
        ]
        found: dict[str, int] = {}
        for spellings in kinds:
            found = _unshared(spellings) | found
        return found

    def folded(self) -> dict[str, int]:
        """The same without numbers, separators and capitals: AnnualCrop, annual_crop and annual crop are one."""
        numbers = {str(label) for label in range(len(self))}
        return _unshared((_fold(text), label) for text, label in self.lookup().items() if text not in numbers)

    def numbers(self, names: Iterable[str]) -> list[int | None]:
        """The label of each name or other spelling; None where no class has it."""
        lookup, folded = self.lookup(), self.folded()
        return [lookup.get(name, folded.get(_fold(name))) for name in names]

    def resolve(self, labels: Iterable[Label], where: str) -> list[int]:
        """Label numbers; DataError for one that no class has."""
        lookup, folded = self.lookup(), self.folded()
        numbers: list[int] = []
        for label in labels:
            if isinstance(label, str):
                if label not in lookup and (number := folded.get(_fold(label))) is not None:
                    lookup[label] = number
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


def _unshared(spellings: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Those that mean one class only."""
    labels: dict[str, set[int]] = {}
    for text, label in spellings:
        labels.setdefault(text, set()).add(label)
    return {text: min(those) for text, those in labels.items() if len(those) == 1}


def _fold(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).casefold()


def read_classes(name: str | Path, language: str | None = None) -> Classes:
    """A bundled set by name, or a file; with their names in `language`, if it is not their own.

    Raises UsageError for a name that is unknown or not to be had in the language, DataError for a file that is none.
    """
    path = class_files.find(name)
    file = class_files.read_class_file(path)
    classes = _as_classes(file)
    wanted = languages.canonical(language or file.language)
    if wanted == file.language:
        return classes
    beside = class_files.language_file(path, wanted)
    if beside is not None:
        return _with_names(classes, _as_classes(class_files.read_class_file(beside)), wanted)
    try:
        names = languages.translate(classes.names, classes.synsets, wanted, classes.source)
    except UserError as error:
        spoken = ", ".join([file.language, *class_files.languages(path)])
        raise type(error)(f"{error}; {classes.source} is there in: {spoken}") from None
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    return _with_names(classes, replace(classes, names=names, sha256=digest, templates=()), wanted)


def _as_classes(file: ClassFile) -> Classes:
    entries = file.entries
    is_bundled = file.path.parent == class_files.PROMPTS
    return Classes(
        tuple(entry.names for entry in entries),
        tuple(entry.synset or entry.wnid for entry in entries),
        file.path.stem if is_bundled else str(file.path),
        file.sha256,
        folders=tuple((*entry.folders, *([entry.wnid] if entry.wnid else [])) for entry in entries),
        language=file.language,
        templates=file.templates,
    )


def _with_names(classes: Classes, other: Classes, language: str) -> Classes:
    """`other`'s names for the same classes; folders may still bear the first ones."""
    if len(classes) != len(other):
        raise DataError(f"{other.source} has {len(other)} classes and {classes.source} {len(classes)}; both must agree")
    folders = zip(classes.folders, classes.names, strict=True)
    return replace(
        other,
        synsets=classes.synsets,
        folders=tuple((*folder, *names) for folder, names in folders),
        language=language,
    )


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
    return plain_classes(names, "the labels found in the data", named=bool(text))


def plain_classes(names: Sequence[str], source: str, named: bool = True) -> Classes:
    """Classes of one name each; ids of WordNet (n02084071) say nothing to a text tower, no more than numbers do."""
    if strange := [name for name in names if not class_files.is_utf8(name)]:
        raise DataError(f"the class {strange[0]!a} of {source} is not UTF-8 text; give it another name")
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    named = named and not all(re.fullmatch(r"n\d{8}", name) for name in names)
    return Classes(tuple((name,) for name in names), (None,) * len(names), source, digest, named)
