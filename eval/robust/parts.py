"""Parts of a data set, each with a hash of its own, so that the cache of features knows them apart."""

import dataclasses
import hashlib
from collections.abc import Sequence

from eval.datasets import Dataset


def part(dataset: Dataset, rows: Sequence[int], name: str) -> Dataset:
    """The pictures at `rows`, in that order."""
    keys = tuple(dataset.keys[row] for row in rows)
    digest = hashlib.sha256(repr((dataset.sha256, keys)).encode()).hexdigest()
    return dataclasses.replace(
        dataset,
        name=name,
        keys=keys,
        labels=dataset.labels[list(rows)],
        read=lambda position: dataset.read(rows[position]),
        sha256=digest,
        left_out={},
    )


def grouped(dataset: Dataset, depth: int) -> dict[str, list[int]]:
    """Rows by the first `depth` folders of their keys, in the order in which they come."""
    found: dict[str, list[int]] = {}
    for row, key in enumerate(dataset.keys):
        found.setdefault("/".join(key.split("/")[:depth]), []).append(row)
    return found
