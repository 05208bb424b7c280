"""Evaluation data behind one interface, whatever the files are.

    Parquet with image, label (and key) · Parquet with key, image + a labels file (key, label) · a folder of either
    a folder of class folders with pictures · WebDataset tars (a file, a folder, braces)
    a shard set (classes by synset, or a labels file)
    NAME=PATH or NAME:SPLIT=PATH: a published set as it is published (eval/published/)

Pictures stay on disk until they are asked for; labels and keys are read at once, and checked. What each form is, and
what it refuses: eval/sources/. Pictures with captions: captions.py.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shardset import safe_key
from eval.classes import Classes, Label, derive_classes, plain_classes, read_classes
from eval.sources.folders import class_folders, is_picture, read_folders
from eval.sources.parquet import parquet_files, read_labels, read_parquet, split_parquet
from eval.sources.shards import read_shards
from eval.sources.source import UNLABELLED, Read, Source, some
from eval.sources.tars import expand, read_tar

log = logging.getLogger(__name__)

LABELS_FILE = "train-labels.parquet"


@dataclass(frozen=True)
class Dataset:
    """Pictures in a fixed order, with their labels."""

    name: str
    keys: tuple[str, ...]
    labels: np.ndarray  # int64, one per key; -1 where pictures come with captions instead
    read: Read = field(repr=False)  # position -> the picture's bytes; safe in threads
    sha256: str  # of the files, the keys and the labels
    left_out: dict[str, int]  # pictures without a class, by reason
    published: dict[str, Any] | None = None  # which published set this is: name, split, whether it is whole
    part_of: int = 0  # pictures of the set that this is a part of: a share of those may be broken

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, rows: Sequence[int], **changes: Any) -> "Dataset":
        """The pictures at `rows`, in that order, with a hash of their own: the cache of features knows them apart."""
        rows = [int(row) for row in rows]
        digest = hashlib.sha256(repr((self.sha256, rows)).encode()).hexdigest()
        keys = tuple(self.keys[row] for row in rows)
        own: dict[str, Any] = {"keys": keys, "labels": self.labels[rows], "sha256": digest}
        own["part_of"] = self.part_of or len(self)
        return replace(self, read=lambda position: self.read(rows[position]), **own | changes)


@dataclass(frozen=True)
class Data:
    """What one evaluation by classes is about."""

    classes: Classes
    test: Dataset
    train: Dataset | None = None

    @property
    def sets(self) -> dict[str, Dataset]:
        """By the names that results have for them."""
        return ({"train": self.train} if self.train else {}) | {"data": self.test}

    @property
    def hashes(self) -> dict[str, str]:
        return {"data": self.test.sha256, "classes": self.classes.sha256}

    @property
    def facts(self) -> dict[str, Any]:
        """What a score means nothing without."""
        published = {name: dataset.published for name, dataset in self.sets.items() if dataset.published}
        facts: dict[str, Any] = {"chance": 1 / len(self.classes), "num_classes": len(self.classes)}
        return facts | ({"published": published} if published else {})

    def summary(self) -> str:
        return (
            f"classes: {len(self.classes)} from {self.classes.source}; chance top-1 is {100 / len(self.classes):.2f} %"
        )


def open_data(
    test: Sequence[Path],
    train: Sequence[Path] = (),
    classes: Path | str | Classes | None = None,
    train_labels: Path | None = None,
) -> Data:
    """Open both sets and make their labels mean the same classes; DataError says what does not fit."""
    listed = classes if isinstance(classes, Classes) or classes is None else read_classes(classes)
    test_sources = _every_source(test, listed, None, training=False)
    train_sources = _every_source(train, listed, train_labels, training=True)
    listed = _classes([*test_sources, *train_sources], listed)
    data = Data(listed, join("evaluation", test_sources, listed), None)
    if train:
        data = Data(listed, data.test, join("training", train_sources, listed))
    check_classes(data, data.test.labels, data.train.labels if data.train else None)
    return data


def open_training(
    paths: Sequence[Path], classes: Path | str | Classes | None = None, labels: Path | None = None
) -> tuple[Classes, Dataset]:
    """Labelled pictures alone, with what their numbers mean; a published set gives its training split if none is named.

    Raises DataError for what does not fit.
    """
    listed = classes if isinstance(classes, Classes) or classes is None else read_classes(classes)
    sources = _every_source(paths, listed, labels, training=True)
    found = _classes(sources, listed)
    return found, join("training", sources, found)


def check_classes(data: Data, test_labels: np.ndarray, train_labels: np.ndarray | None) -> None:
    """Refuse a class that is asked for but cannot be learnt; say which classes are not asked for."""
    tested = np.bincount(test_labels, minlength=len(data.classes)) > 0
    if train_labels is not None:
        taught = np.bincount(train_labels, minlength=len(data.classes)) > 0
        if missing := np.flatnonzero(tested & ~taught).tolist():
            raise DataError(
                f"{len(missing)} of {int(tested.sum())} classes in the evaluation data have no training image: "
                f"{some(data.classes.name(label) for label in missing)}; "
                f"training and evaluation data must have the same classes"
            )
        assert data.train is not None
        if both := set(data.train.keys) & set(data.test.keys):
            log.warning("warning: %d keys are in the training and in the evaluation data: %s", len(both), some(both))
    if not tested.all():
        log.warning(
            "warning: %d of %d classes have no evaluation image; mean_per_class is over the others",
            int((~tested).sum()),
            len(tested),
        )


# ------------------------------------------------------------------------------------------------------------- sources


def _every_source(paths: Sequence[Path], classes: Classes | None, labels: Path | None, training: bool) -> list[Source]:
    """Published sets, and what lies at plain paths."""
    from eval.published import registry  # it reads forms of data too

    references = [registry.reference(path, training) for path in paths]
    plain = [path for path, reference in zip(paths, references, strict=True) if reference is None]
    opened = [registry.open_split(one.published, one.split, one.folder) for one in references if one is not None]
    if opened and labels is not None and not plain:
        raise DataError(f"{labels}: published sets bring their own labels; leave --train-labels out, or give a path")
    return opened + (_sources(plain, classes, labels, search=training) if plain else [])


def _sources(paths: Sequence[Path], classes: Classes | None, labels: Path | None, search: bool) -> list[Source]:
    """A source per shard set and per class folder, and one per tar and per Parquet file with pictures."""
    kinds = [(path, _kind(path)) for path in expanded(paths)]
    parquet = [
        f for path, kind in kinds if kind == "parquet" for f in ([path] if path.is_file() else parquet_files(path))
    ]
    tars = [
        f for path, kind in kinds if kind == "tars" for f in ([path] if path.is_file() else sorted(path.glob("*.tar")))
    ]
    others = [(path, kind) for path, kind in kinds if kind in ("shards", "folders")]
    tables, found = split_parquet(parquet)
    given = bool(labels or found)  # one that is only found near by does not overrule labels the pictures bring along
    if labels is not None:
        found = [labels]
    elif not found and search:
        found = [near for path in paths for near in _labels_near(path)]
    known = read_labels(list(dict.fromkeys(path.resolve() for path in found)))
    if known is not None and not tables and not tars and not others:
        raise DataError(f"{some(map(str, found))} holds labels but no pictures; give the files with the pictures too")
    sources = [read_parquet(path) for path in tables]
    sources += [read_tar(path, prefix=len(tars) > 1) for path in dict.fromkeys(tars)]
    for path, kind in others:
        if kind == "shards":
            sources.append(read_shards(path, None if known is not None else classes, known is not None))
        else:
            sources.append(read_folders(path, prefix=len(paths) > 1))
    if known is not None:
        bare = [source for source in sources if not any(label is not None for label in source.labels)]
        _apply_labels(sources if given else bare, known, found)
    for source in sources:
        if not any(label is not None for label in source.labels) and not source.left_out:
            raise DataError(
                f"{source.where} has no 'label' column, and no labels file goes with it; "
                f"give a Parquet file of key, label" + (" with --train-labels" if search else "")
            )
    return sources


def expanded(paths: Sequence[Path]) -> list[Path]:
    """The paths that braces stand for, where the path with them is not there itself."""
    return [Path(name) for path in paths for name in ([str(path)] if path.exists() else expand(str(path)))]


def _kind(path: Path) -> str:
    if path.is_file():
        if path.suffix == ".parquet":
            return "parquet"
        if path.name.endswith((".tar", ".tar.gz", ".tgz")):
            return "tars"
        raise DataError(f"{path} is not a Parquet file or a tar; give these, a folder of class folders or a shard set")
    if not path.is_dir():
        raise DataError(f"no evaluation data at {path}: no such file or folder")
    if (path / "manifest.json").is_file() or (path / ".work").is_dir():
        return "shards"
    if parquet_files(path):
        return "parquet"
    if any(path.glob("*.tar")):
        return "tars"
    if class_folders(path):
        return "folders"
    if any(is_picture(file) for file in path.iterdir()):
        raise DataError(f"{path} holds pictures but no classes; put each into a folder that has the name of its class")
    raise DataError(
        f"{path} holds neither Parquet files, nor tars, nor class folders with pictures, nor a shard set"
        + ("" if any(path.iterdir()) else ": it is empty")
    )


def _labels_near(path: Path) -> list[Path]:
    return [near for near in (path / LABELS_FILE, path.parent / LABELS_FILE) if near.is_file()][:1]


def _apply_labels(sources: Sequence[Source], known: dict[str, Label], files: Sequence[Path]) -> None:
    """Keep the pictures that the labels file names, and report labels that no picture has."""
    used: set[str] = set()
    for source in sources:
        names = {safe_key(key): key for key in known} if source.escaped else {key: key for key in known}
        keys = source.own_keys or source.keys
        labels = [known[names[key]] if key in names else None for key in keys]
        used.update(names[key] for key in keys if key in names)
        source.left_out = Counter({why: n for why, n in source.left_out.items() if why not in UNLABELLED})
        source.left_out["not_in_labels_file"] += sum(label is None for label in labels)
        source.labels = labels
    if sources and not used:
        raise DataError(
            f"none of the {sum(len(source.keys) for source in sources):,} picture keys (such as "
            f"'{next((key for source in sources for key in source.keys), '')}') is in {some(map(str, files))}"
        )
    if sources and (unused := known.keys() - used):
        log.warning("warning: %d labels of %s have no picture: %s", len(unused), some(map(str, files)), some(unused))


# -------------------------------------------------------------------------------------------------------------- classes


def _classes(sources: Sequence[Source], listed: Classes | None) -> Classes:
    """Those that are listed, if the sources agree with them; else the sources' own."""
    if listed is None:
        return own_classes(sources)
    _agree(sources, listed)
    return listed


def own_classes(sources: Sequence[Source]) -> Classes:
    """The class set that all of it belongs to, else classes that the data itself names, else as its labels are."""
    told = {source.class_names: source.where for source in sources if source.class_names}
    belongs = {source.classes: source.where for source in sources if source.classes is not None}
    whole = all(source.classes is not None for source in sources)
    if len(belongs) == 1 and (whole or told):  # a shard set of the same classes numbers them, and knows no folders
        ((own, where),) = belongs.items()
        found = read_classes(own) if isinstance(own, str) else plain_classes(own, where)
        _agree([source for source in sources if source.classes is None], found)
        return found
    if len(told) > 1:
        raise DataError(f"{' and '.join(list(told.values())[:2])} number their classes differently; give --classes")
    if not told:
        return derive_classes(label for source in sources for label in source.labels if label is not None)
    ((names, where),) = told.items()
    return plain_classes(names, where)


def _agree(sources: Sequence[Source], classes: Classes) -> None:
    """Where a file says what its label numbers mean: by name if every name is listed; else by number, if there are as
    many and no name that is listed has another number.
    """
    for source in sources:
        if not source.class_names:
            continue
        names = source.class_names
        numbers = classes.numbers(names)
        if None not in numbers and len(set(numbers)) == len(names):
            source.labels = [
                numbers[label] if isinstance(label, int) and label in range(len(names)) else label
                for label in source.labels
            ]
        elif len(names) != len(classes):
            raise DataError(
                f"{source.where} has {len(names)} classes ({some(names, 3)}), and {classes.source} {len(classes)}; "
                f"give the classes that belong to this data"
            )
        elif moved := [place for place, number in enumerate(numbers) if number not in (None, place)]:
            strangers = [name for name, number in zip(names, numbers, strict=True) if number is None]
            raise DataError(
                f"label {moved[0]} is '{names[moved[0]]}' in {source.where}, and {numbers[moved[0]]} in "
                f"{classes.source}; to go by the names all must be listed, and these are not, or twice: "
                f"{some(strangers or names)}; give a class file that has them as 'name' or 'folder'"
            )


# ---------------------------------------------------------------------------------------------------------------- join


def join(name: str, sources: Sequence[Source], classes: Classes) -> Dataset:
    """One data set of all sources: pictures with a label, each key once."""
    places: list[tuple[int, int]] = []
    labels: list[int] = []
    keys: dict[str, None] = {}
    left_out: Counter[str] = sum((source.left_out for source in sources), Counter[str]())
    for number, source in enumerate(sources):
        rows = [row for row, label in enumerate(source.labels) if label is not None]
        numbers = classes.resolve((label for label in source.labels if label is not None), source.where)
        for row, label in zip(rows, numbers, strict=True):
            if source.keys[row] in keys:
                left_out["duplicate_key"] += 1
                continue
            keys[source.keys[row]] = None
            places.append((number, row))
            labels.append(label)
    left_out = Counter({reason: count for reason, count in left_out.items() if count})
    if not keys:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "it is empty"
        raise DataError(f"the {name} data has no picture with a class ({reasons})")
    content: list[Any] = [source.sha256 for source in sources]
    digest = hashlib.sha256(repr((content, list(keys), labels)).encode()).hexdigest()
    reads = [source.read for source in sources]

    def read(position: int) -> bytes:
        number, row = places[position]
        return reads[number](row)

    published = sources[0].published if len(sources) == 1 else None
    return Dataset(name, tuple(keys), np.asarray(labels, dtype=np.int64), read, digest, dict(left_out), published)
