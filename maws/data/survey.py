"""How many samples of each shard a run may visit, and how often: two numbers a shard, from which the order is cut.

    manifest ─▶ samples of a shard          enough where neither labels nor repeat factors count
    index    ─▶ labels, repeat              two columns of every shard otherwise, read by 16 threads and shared by ranks

A large set's survey is kept under ~/.cache/maws/survey (or $XDG_CACHE_HOME), named by the hash of what it says.
"""

import hashlib
import io
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.shardset import ShardSet
from maws.files import write_whole

log = logging.getLogger(__name__)

THREADS = 16  # reading waits for the disk or the network
KEEP_FROM = 100  # shards; fewer are read again in less than a second
VERSION = 1  # of what is kept


class Among(Protocol):
    """The ranks of a run, as maws.dist has them."""

    def rank(self) -> int: ...
    def world_size(self) -> int: ...
    def broadcast(self, value: Any, /) -> Any: ...
    def gather_objects(self, value: Any, /) -> list[Any]: ...


def survey(
    shards: ShardSet, resample: bool, labelled: bool, among: Among | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Eligible rows (int64) and expected visits an epoch (float64) of every shard. Raises DataError as reading does.

    With `among`, all ranks call it, and each reads its share of a large set.
    """
    sizes = np.array(shards.shard_sizes, np.int64)
    if not resample and not labelled:
        return sizes, sizes.astype(np.float64)
    if len(sizes) < KEEP_FROM:
        found = _read(shards, range(len(sizes)), resample, labelled)
    else:
        found = _large(shards, sizes, resample, labelled, among)
    return found[0].astype(np.int64), found[1]


def _large(shards: ShardSet, sizes: np.ndarray, resample: bool, labelled: bool, among: Among | None) -> np.ndarray:
    """What was kept, or else read by all ranks and kept by the first."""
    place = _place(shards, resample, labelled)
    first = among is None or among.rank() == 0
    found = _kept(place, sizes) if first else None
    found = among.broadcast(found) if among else found
    if found is not None:
        return found
    parts = _shares(shards, resample, labelled, among) if among else [_read_all(shards, 0, 1, resample, labelled)]
    found = np.empty((2, len(sizes)))
    for i, part in enumerate(parts):
        if isinstance(part, str):
            raise DataError(part)
        found[:, i :: len(parts)] = part
    if first:
        _keep(place, found)
    return found


def _shares(shards: ShardSet, resample: bool, labelled: bool, among: Among) -> list[Any]:
    """Every rank's share, or what it could not read, in words."""
    try:
        own: Any = _read_all(shards, among.rank(), among.world_size(), resample, labelled)
    except DataError as error:
        own = str(error)
    return among.gather_objects(own)


def _read_all(shards: ShardSet, rank: int, ranks: int, resample: bool, labelled: bool) -> np.ndarray:
    numbers = range(rank, shards.num_shards, ranks)
    log.info("reading the labels and repeat factors of %d shards, once for this set", len(numbers))
    return _read(shards, numbers, resample, labelled)


def _read(shards: ShardSet, numbers: Sequence[int], resample: bool, labelled: bool) -> np.ndarray:
    """2 x shards, float64 (exact for numbers of rows)."""
    with ThreadPoolExecutor(THREADS, "survey") as pool:
        found = list(pool.map(lambda number: one(shards, number, resample, labelled), numbers))
    return np.array(found, np.float64).reshape(len(found), 2).T


def one(shards: ShardSet, number: int, resample: bool, labelled: bool) -> tuple[int, float]:
    """Eligible rows and expected visits of one shard."""
    path = shards.tar_path(number).with_suffix(".parquet")
    wanted = [name for name, needed in (("labels", labelled), ("repeat", resample)) if needed]
    try:
        table = pq.read_table(path, columns=wanted, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read the index {path} ({error}); build the shard set again") from None
    if table.num_rows != shards.shard_sizes[number]:
        raise DataError(f"{path} has {table.num_rows} rows, the manifest says {shards.shard_sizes[number]}")
    chosen = eligible(table, labelled)
    repeat = table.column("repeat").to_numpy()[chosen] if resample else np.ones(len(chosen))
    return len(chosen), float(repeat.sum())


def eligible(table: pa.Table, labelled: bool) -> np.ndarray:
    """The rows of a shard that a run may visit, in stored order."""
    if not labelled:
        return np.arange(table.num_rows)
    return np.flatnonzero(np.diff(table.column("labels").combine_chunks().offsets.to_numpy()) > 0)


def _place(shards: ShardSet, resample: bool, labelled: bool) -> Path:
    """Where this survey is kept: the manifest's hash covers the hashes of all indexes."""
    name = hashlib.sha256(repr((VERSION, shards.sha256, resample, labelled)).encode()).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "maws" / "survey" / f"{name}.npy"


def _kept(path: Path, sizes: np.ndarray) -> np.ndarray | None:
    """What was kept, if it is there and can be true."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = found.dtype == np.float64 and found.shape == (2, len(sizes)) and bool(np.isfinite(found).all())
    return found if fits and bool(((found[0] >= 0) & (found[0] <= sizes) & (found[1] >= 0)).all()) else None


def _keep(path: Path, found: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, found)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, buffer.getvalue())
    except OSError as error:  # a home that cannot be written to: it is read again next time
        log.info("the survey of %d shards is not kept (%s)", found.shape[1], error)
