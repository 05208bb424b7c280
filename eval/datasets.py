"""Evaluation data behind one interface, whatever the files are.

    Parquet with key, image, label · Parquet with key, image + a labels file (key, label) · a folder of either
    a folder of class folders with pictures · a shard set (classes by synset, or a labels file)

Pictures stay on disk until they are asked for; labels and keys are read at once, and checked.
"""

import hashlib
import logging
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.files import sha256_file
from data_pipeline.shardset import ShardSet, safe_key
from eval.classes import Classes, Label, derive_classes, read_classes

log = logging.getLogger(__name__)

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
LABELS_FILE = "train-labels.parquet"

Read = Callable[[int], bytes]


@dataclass(frozen=True)
class Dataset:
    """Labelled pictures in a fixed order."""

    name: str
    keys: tuple[str, ...]
    labels: np.ndarray  # int64, one per key
    read: Read = field(repr=False)  # position -> the picture's bytes; safe in threads
    sha256: str  # of the files, the keys and the labels
    left_out: dict[str, int]  # pictures without a class, by reason

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Data:
    """What one evaluation is about."""

    classes: Classes
    test: Dataset
    train: Dataset | None = None


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


def open_data(
    test: Sequence[Path],
    train: Sequence[Path] = (),
    classes: Path | None = None,
    train_labels: Path | None = None,
) -> Data:
    """Open both sets and make their labels mean the same classes; DataError says what does not fit."""
    listed = read_classes(classes) if classes else None
    test_sources = _sources(test, listed, None, search=False)
    train_sources = _sources(train, listed, train_labels, search=True)
    if listed is None:
        found = (label for source in (*test_sources, *train_sources) for label in source.labels if label is not None)
        listed = derive_classes(found)
    data = Data(listed, _join("evaluation", test_sources, listed), None)
    if train:
        data = Data(listed, data.test, _join("training", train_sources, listed))
    check_classes(data, data.test.labels, data.train.labels if data.train else None)
    return data


def check_classes(data: Data, test_labels: np.ndarray, train_labels: np.ndarray | None) -> None:
    """Refuse a class that is asked for but cannot be learnt; say which classes are not asked for."""
    tested = np.bincount(test_labels, minlength=len(data.classes)) > 0
    if train_labels is not None:
        taught = np.bincount(train_labels, minlength=len(data.classes)) > 0
        if missing := np.flatnonzero(tested & ~taught).tolist():
            raise DataError(
                f"{len(missing)} of {int(tested.sum())} classes in the evaluation data have no training image: "
                f"{_some(data.classes.name(label) for label in missing)}; "
                f"training and evaluation data must have the same classes"
            )
        assert data.train is not None
        if both := set(data.train.keys) & set(data.test.keys):
            log.warning("warning: %d keys are in the training and in the evaluation data: %s", len(both), _some(both))
    if not tested.all():
        log.warning(
            "warning: %d of %d classes have no evaluation image; mean_per_class is over the others",
            int((~tested).sum()),
            len(tested),
        )


def _some(items: Iterable[str], limit: int = 5) -> str:
    items = sorted(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


# ------------------------------------------------------------------------------------------------------------- sources


def _sources(paths: Sequence[Path], classes: Classes | None, labels: Path | None, search: bool) -> list[Source]:
    """A source per shard set and per class folder, and one per Parquet file with pictures."""
    parquet: list[Path] = []
    others: list[tuple[Path, str]] = []
    for path in paths:
        kind = _kind(path)
        if kind == "parquet":
            parquet += [path] if path.is_file() else sorted(path.glob("*.parquet"))
        else:
            others.append((path, kind))
    tables, found = _split_parquet(parquet)
    given = bool(labels or found)  # one that is only found near by does not overrule labels the pictures bring along
    if labels is not None:
        found = [labels]
    elif not found and search:
        found = [near for path in paths for near in _labels_near(path)]
    known = _read_labels(list(dict.fromkeys(path.resolve() for path in found)))
    if known is not None and not tables and not others:
        raise DataError(f"{_some(map(str, found))} holds labels but no pictures; give the files with the pictures too")
    sources = [_from_parquet(path) for path in tables]
    for path, kind in others:
        if kind == "shards":
            sources.append(_from_shards(path, None if known is not None else classes, known is not None))
        else:
            sources.append(_from_folders(path, prefix=len(paths) > 1))
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


def _kind(path: Path) -> str:
    if path.is_file():
        if path.suffix != ".parquet":
            raise DataError(f"{path} is not a Parquet file; give Parquet, a folder of class folders or a shard set")
        return "parquet"
    if not path.is_dir():
        raise DataError(f"no evaluation data at {path}: no such file or folder")
    if (path / "manifest.json").is_file() or (path / ".work").is_dir():
        return "shards"
    if any(path.glob("*.parquet")):
        return "parquet"
    if any(child.is_dir() and not child.name.startswith(".") for child in path.iterdir()):
        return "folders"
    raise DataError(f"{path} holds neither Parquet files, nor class folders with pictures, nor a shard set")


def _labels_near(path: Path) -> list[Path]:
    return [near for near in (path / LABELS_FILE, path.parent / LABELS_FILE) if near.is_file()][:1]


def _split_parquet(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files with pictures, and labels files (key and label but no image)."""
    tables: list[Path] = []
    labels: list[Path] = []
    for path in dict.fromkeys(paths):
        names = set(_schema(path).names)
        if "key" not in names:
            raise DataError(f"{path} has no 'key' column, only {_some(names)}; expected key, image, label")
        if "image" in names:
            tables.append(path)
        elif "label" in names:
            labels.append(path)
        else:
            raise DataError(f"{path} has no 'image' column, only {_some(names)}; expected key, image, label")
    return tables, labels


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def _read_labels(paths: Sequence[Path]) -> dict[str, Label] | None:
    if not paths:
        return None
    known: dict[str, Label] = {}
    for path in paths:
        if not path.is_file():
            raise DataError(f"no labels file at {path}")
        if missing := {"key", "label"} - set(_schema(path).names):
            raise DataError(f"{path} has no '{min(missing)}' column; a labels file has key and label")
        table = pq.read_table(path, columns=["key", "label"])
        for key, label in zip(table["key"].to_pylist(), _label_column(table["label"], path), strict=True):
            if label is not None and known.setdefault(key, label) != label:
                raise DataError(f"{path} gives '{key}' two labels, {known[key]} and {label}")
    return known


def _label_column(column: pa.ChunkedArray, path: Path) -> list[Label | None]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"the 'label' column of {path} is {column.type}; expected class numbers or class names")
    return column.to_pylist()


def _apply_labels(sources: Sequence[Source], known: dict[str, Label], files: Sequence[Path]) -> None:
    """Keep the pictures that the labels file names, and report labels that no picture has."""
    used: set[str] = set()
    for source in sources:
        names = {safe_key(key): key for key in known} if source.escaped else {key: key for key in known}
        labels = [known[names[key]] if key in names else None for key in source.keys]
        used.update(names[key] for key in source.keys if key in names)
        source.left_out["not_in_labels_file"] += sum(label is None for label in labels)
        source.labels = labels
    if sources and not used:
        raise DataError(
            f"none of the {sum(len(source.keys) for source in sources):,} picture keys (such as "
            f"'{next((key for source in sources for key in source.keys), '')}') is in {_some(map(str, files))}"
        )
    if sources and (unused := known.keys() - used):
        log.warning("warning: %d labels of %s have no picture: %s", len(unused), _some(map(str, files)), _some(unused))


def _from_parquet(path: Path) -> Source:
    names = set(_schema(path).names)
    table = pq.read_table(path, columns=["key", "label"] if "label" in names else ["key"])
    keys = table["key"].to_pylist()
    if any(not isinstance(key, str) for key in keys):
        raise DataError(f"the 'key' column of {path} must be text, without nulls")
    labels = _label_column(table["label"], path) if "label" in names else [None] * len(keys)
    left_out = Counter(no_label=sum(label is None for label in labels)) if "label" in names else Counter[str]()
    return Source(str(path), keys, labels, _ParquetImages(path), sha256_file(path), left_out=left_out)


class _ParquetImages:
    """Pictures of a Parquet file, a row group at a time; the ones used last are kept."""

    KEPT = 4

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = pq.read_metadata(path)
        rows = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self.starts = [0, *accumulate(rows)]
        self.groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self.lock = threading.Lock()

    def __call__(self, row: int) -> bytes:
        group = bisect_right(self.starts, row) - 1
        with self.lock:
            if group not in self.groups:
                self.groups[group] = self._load(group)
                while len(self.groups) > self.KEPT:
                    self.groups.popitem(last=False)
            self.groups.move_to_end(group)
            column = self.groups[group]
        return column[row - self.starts[group]].as_py() or b""

    def _load(self, group: int) -> pa.ChunkedArray:
        try:
            with pq.ParquetFile(self.path) as file:
                column = file.read_row_group(group, columns=["image"])["image"]
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot read the pictures of {self.path}: {error}") from None
        place = column.type.get_field_index("bytes") if pa.types.is_struct(column.type) else -1
        if place >= 0:
            column = pc.call_function(
                "struct_field", [column], pc.StructFieldOptions([place])
            )  # as written by Hugging Face datasets
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            raise DataError(f"the 'image' column of {self.path} is {column.type}; expected the bytes of picture files")
        return column


def _from_folders(path: Path, prefix: bool) -> Source:
    """A folder of class folders; the key of a picture is its path."""
    files: list[Path] = []
    labels: list[Label | None] = []
    for folder in sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")):
        pictures = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
        if not pictures:
            raise DataError(f"the class folder {folder} holds no pictures; fill it or remove it")
        files += pictures
        labels += [folder.name] * len(pictures)
    start = f"{path.name}/" if prefix else ""
    keys = [start + file.relative_to(path).as_posix() for file in files]

    def read(position: int) -> bytes:
        try:
            return files[position].read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {files[position]}: {error.strerror}") from None

    with ThreadPoolExecutor(8) as pool:
        digest = hashlib.sha256("\n".join(pool.map(sha256_file, files)).encode()).hexdigest()
    return Source(str(path), keys, labels, read, digest)


def _from_shards(path: Path, classes: Classes | None, labelled: bool) -> Source:
    """A shard set; the class of a sample is the one class whose synset is among its synsets."""
    shards = ShardSet.open(path)
    if classes is None and not labelled:
        raise DataError(f"{path} is a shard set: say which synsets are classes with --classes, or give a labels file")
    places = [(shard, row) for shard, size in enumerate(shards.shard_sizes) for row in range(size)]
    keys = [key for shard in range(shards.num_shards) for key in shards.index(shard)["key"].to_pylist()]
    source = Source(
        str(path), keys, [None] * len(keys), lambda position: shards.image_bytes(*places[position]), shards.sha256
    )
    source.escaped = True
    if classes is not None:
        of_synset = {synset: label for label, synset in enumerate(classes.synsets) if synset}
        of_index = {e.index: of_synset[e.synset] for e in shards.vocabulary if e.synset in of_synset}
        if not of_index:
            raise DataError(f"no class of {classes.source} has a synset in the vocabulary of {path}")
        labels: list[Label | None] = []
        for shard in range(shards.num_shards):
            for indices in shards.index(shard)["labels"].to_pylist():
                matches = {of_index[index] for index in indices if index in of_index}
                labels.append(matches.pop() if len(matches) == 1 else None)
                if labels[-1] is None:
                    source.left_out["several_classes" if matches else "no_class"] += 1
        source.labels = labels
    return source


# ---------------------------------------------------------------------------------------------------------------- join


def _join(name: str, sources: Sequence[Source], classes: Classes) -> Dataset:
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

    return Dataset(name, tuple(keys), np.asarray(labels, dtype=np.int64), read, digest, dict(left_out))
