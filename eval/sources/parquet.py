"""Parquet files with pictures and labels, and labels files (key, label) without pictures.

    key, image, label            image: bytes of a picture file, or a struct with them as Hugging Face writes it
    image, label                 no key: the name of the file, eight digits of its hash, and the row

Hugging Face's files say in their schema what the label numbers mean. Column names: IMAGE, LABEL.
"""

import json
import re
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.files import sha256_file
from eval.classes import Label
from eval.sources.source import Source, some

IMAGE: Final = ("image", "img", "jpg", "png", "webp")  # the first that is there
LABEL: Final = ("label", "labels", "fine_label", "cls")
_SPLIT: Final = re.compile(r"(\w+)-\d{5}-of-\d{5}")  # the names Hugging Face gives


def parquet_files(path: Path) -> list[Path]:
    """The Parquet files of a folder, or of the data/ in it (as on Hugging Face); they must be of one split."""
    found = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    splits = {fits[1]: file for file in found if (fits := _SPLIT.match(file.name))}
    if len(splits) > 1:
        example = min(splits)
        raise DataError(
            f"{path} holds several splits: {some(splits)}; give the files of one, such as "
            f"{splits[example].parent}/{example}-*.parquet"
        )
    return found


def split_parquet(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files with pictures, and labels files (key and label but no image)."""
    tables: list[Path] = []
    labels: list[Path] = []
    for path in dict.fromkeys(paths):
        names = schema(path).names
        if column(names, IMAGE):
            tables.append(path)
        elif {"key", "label"} <= set(names):
            labels.append(path)
        else:
            raise DataError(
                f"{path} has no 'image' column, only {some(names)}; expected key, image, label (or key, label "
                f"in a labels file)"
            )
    return tables, labels


def schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def column(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted names that is there."""
    return next((name for name in wanted if name in names), None)


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(names))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def read_labels(paths: Sequence[Path]) -> dict[str, Label] | None:
    """What labels files say of each key; None without any."""
    if not paths:
        return None
    known: dict[str, Label] = {}
    for path in paths:
        if not path.is_file():
            raise DataError(f"no labels file at {path}")
        if missing := {"key", "label"} - set(schema(path).names):
            raise DataError(f"{path} has no '{min(missing)}' column; a labels file has key and label")
        table = read_columns(path, ["key", "label"])
        for key, label in zip(table["key"].to_pylist(), _label_column(table["label"], path), strict=True):
            if label is not None and known.setdefault(key, label) != label:
                raise DataError(f"{path} gives '{key}' two labels, {known[key]} and {label}")
    return known


def _label_column(values: pa.ChunkedArray, path: Path) -> list[Label | None]:
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"the 'label' column of {path} is {values.type}; expected class numbers or class names")
    return values.to_pylist()


def read_parquet(path: Path) -> Source:
    """One file with pictures."""
    found = schema(path)
    image, label = column(found.names, IMAGE), column(found.names, LABEL)
    assert image is not None
    table = read_columns(path, [name for name in ("key", label) if name and name in found.names])
    sha256 = sha256_file(path)
    images = ParquetImages(path, image)
    keys = read_keys(table, path, sha256, len(images))
    labels = _label_column(table[label], path) if label else [None] * len(keys)
    names = class_names(found, label) if label else ()
    if names:
        labels = [None if value == -1 else value for value in labels]  # Hugging Face's mark of a hidden label
    left_out = Counter(no_label=sum(value is None for value in labels)) if label else Counter[str]()
    return Source(str(path), keys, labels, images, sha256, left_out=left_out, class_names=names)


def read_keys(table: pa.Table, path: Path, sha256: str, rows: int) -> list[str]:
    """The key column; else file and row: the hash keeps files of the same name apart, wherever they lie."""
    if "key" not in table.column_names:
        return [f"{path.stem}-{sha256[:8]}/{row}" for row in range(rows)]
    keys = table["key"].to_pylist()
    if any(not isinstance(key, str) for key in keys):
        raise DataError(f"the 'key' column of {path} must be text, without nulls")
    return keys


def class_names(found: pa.Schema, label: str) -> tuple[str, ...]:
    """What Hugging Face's ClassLabel says the numbers mean; nothing where there is none."""
    try:
        features = json.loads((found.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    whole = isinstance(names, list) and all(isinstance(name, str) and name.strip() for name in names)
    return tuple(names) if whole and len(set(names)) == len(names) else ()


class ParquetImages:
    """Pictures of a Parquet file, a row group at a time; the ones used last are kept."""

    KEPT = 4

    def __init__(self, path: Path, image: str = "image") -> None:
        self.path, self.image = path, image
        metadata = pq.read_metadata(path)
        rows = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self.starts = [0, *accumulate(rows)]
        self.groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return self.starts[-1]

    def __call__(self, row: int) -> bytes:
        group = bisect_right(self.starts, row) - 1
        with self.lock:
            if group not in self.groups:
                self.groups[group] = self._load(group)
                while len(self.groups) > self.KEPT:
                    self.groups.popitem(last=False)
            self.groups.move_to_end(group)
            images = self.groups[group]
        return images[row - self.starts[group]].as_py() or b""

    def _load(self, group: int) -> pa.ChunkedArray:
        try:
            with pq.ParquetFile(self.path) as file:
                images = file.read_row_group(group, columns=[self.image])[self.image]
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot read the pictures of {self.path}: {error}") from None
        place = images.type.get_field_index("bytes") if pa.types.is_struct(images.type) else -1
        if place >= 0:
            images = pc.call_function(
                "struct_field", [images], pc.StructFieldOptions([place])
            )  # as written by Hugging Face datasets
        if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
            raise DataError(
                f"the '{self.image}' column of {self.path} is {images.type}; expected the bytes of picture files"
            )
        return images
