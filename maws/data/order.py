"""The order of samples as a function of (seed, epoch, step), never a state (design §5).

    rows of the shard set ─cut─▶ S canonical streams ─per epoch─▶ shuffled segments ─▶ shuffled windows of samples

Every global batch takes batch/S samples from every stream, and rank r of W serves the streams s with s mod W = r. So
what a batch holds does not depend on W, and resuming at step n needs nothing but n.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.shardset import ShardSet
from maws.config import ConfigError
from maws.seeding import derive, hash_keys, stream, uniform

MAX_STREAMS = 64
MIN_ROWS_PER_STREAM = 16


class Item(NamedTuple):
    """One visit to a sample: where it lies, and what its augmentation and mask are drawn from."""

    shard: int
    row: int
    key: str
    epoch: int
    copy: int  # the how-manieth visit of this epoch, from 0: resampling repeats samples

    def stream(self, seed: int, use: str) -> np.random.Generator:
        """The random stream of one use of this visit, the same on any rank of any world."""
        return stream(seed, use, self.epoch, self.key, self.copy)


@dataclass(frozen=True)
class Part:
    """This rank's share of every batch."""

    rank: int = 0
    world: int = 1


class Segment(NamedTuple):
    """Rows [start, stop) of one shard's eligible rows."""

    shard: int
    start: int
    stop: int


class _Rows(NamedTuple):
    rows: np.ndarray  # row numbers in the shard
    keys: list[str]
    hashes: np.ndarray  # uint64
    repeat: np.ndarray  # expected visits an epoch


class Order:
    """Who comes when.

    `labelled` leaves out samples without a synset; `resample` visits each sample as often as its repeat factor says,
    rounded up or down per epoch by a hash of (seed, epoch, key).

    Raises ConfigError when the batch does not fit the set or the streams do not fit the batch.
    """

    def __init__(
        self, shards: ShardSet, seed: int, batch_size: int, *, streams: int = 0, window: int = 8,
        resample: bool = True, labelled: bool = False,
    ) -> None:  # fmt: skip
        self.shards, self.seed, self.batch_size, self.window = shards, seed, batch_size, window
        self.resample, self.labelled = resample, labelled
        self._cache: OrderedDict[int, _Rows] = OrderedDict()
        self._epochs: OrderedDict[tuple[int, int], _StreamEpoch] = OrderedDict()
        counts, visits = self._survey()
        self.samples, self.visits = int(counts.sum()), float(visits.sum())
        if self.samples == 0:
            raise ConfigError(
                f"{shards.path} has {len(shards)} samples, none with a synset of its vocabulary; "
                f"this stage trains on synsets: build the shard set with a lower --min-count"
            )
        self.streams = streams or choose_streams(batch_size, self.samples)
        if batch_size % self.streams:
            raise ConfigError(
                f"optim.batch_size={batch_size} must be a multiple of data.streams={self.streams}; "
                f"try data.streams={choose_streams(batch_size, self.samples)}"
            )
        self.steps_per_epoch = int(self.visits) // batch_size
        if not self.steps_per_epoch:
            raise ConfigError(
                f"optim.batch_size={batch_size} is more than an epoch of {shards.path} ({int(self.visits)} visits to "
                f"{self.samples} samples); try optim.batch_size={1 << (int(self.visits).bit_length() - 1)}"
            )
        self.per_stream = batch_size // self.streams
        self._segments = cut(counts, self.streams)

    def check_world(self, world: int) -> None:
        """Raises ConfigError when `world` ranks cannot share the streams evenly."""
        if self.streams % world:
            raise ConfigError(
                f"{world} ranks cannot share {self.streams} streams evenly; set data.streams to a multiple of {world} "
                f"that divides optim.batch_size={self.batch_size}, or use another number of ranks"
            )

    def items(self, step: int, part: Part = Part()) -> list[Item]:
        """The visits of step `step` (from 0) that `part` serves, stream by stream."""
        own = range(part.rank, self.streams, part.world)
        return [self.item(s, step, i) for s in own for i in range(self.per_stream)]

    def item(self, stream_number: int, step: int, place: int, skip: int = 0) -> Item:
        """Visit number `place` of one stream in one step, or the one `skip` further on (where a sample is broken)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return self._stream_epoch(stream_number, epoch)[step_in_epoch * self.per_stream + place + skip]

    def keys(self, step: int) -> list[str]:
        """The sample keys of a whole step, sorted by stream: the ledger's line."""
        return [item.key for item in self.items(step)]

    @property
    def identity(self) -> str:
        """A hash of everything the order depends on; a checkpoint keeps it, so that no run goes on in another order."""
        facts = (
            self.shards.sha256,
            self.seed,
            self.batch_size,
            self.streams,
            self.window,
            self.resample,
            self.labelled,
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def _stream_epoch(self, stream_number: int, epoch: int) -> "_StreamEpoch":
        at = (stream_number, epoch)
        if at not in self._epochs:
            if len(self._epochs) >= 2 * self.streams:
                self._epochs.popitem(last=False)
            self._epochs[at] = _StreamEpoch(self, stream_number, epoch, self._segments[stream_number])
        return self._epochs[at]

    def _survey(self) -> tuple[np.ndarray, np.ndarray]:
        """Eligible rows and expected visits of every shard; only these two numbers a shard stay in memory."""
        found = [self.rows(i) for i in range(self.shards.num_shards)]
        return np.array([len(r.rows) for r in found]), np.array([r.repeat.sum() for r in found])

    def rows(self, shard: int) -> _Rows:
        if shard in self._cache:
            self._cache.move_to_end(shard)
            return self._cache[shard]
        index = self.shards.index(shard)
        lengths = np.diff(index.column("labels").combine_chunks().offsets.to_numpy())
        chosen = np.flatnonzero(lengths > 0) if self.labelled else np.arange(len(index))
        keys = index.column("key").to_pylist()
        keys = [keys[i] for i in chosen]
        repeat = index.column("repeat").to_numpy()[chosen] if self.resample else np.ones(len(chosen))
        if len(self._cache) >= 64:
            self._cache.popitem(last=False)
        self._cache[shard] = _Rows(chosen, keys, hash_keys(keys), repeat)
        return self._cache[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict(), "_epochs": OrderedDict()}


class _StreamEpoch:
    """The visits of one stream in one epoch; windows are expanded when they are reached."""

    def __init__(self, order: Order, stream_number: int, epoch: int, segments: Sequence[Segment]) -> None:
        self.order, self.number, self.epoch = order, stream_number, epoch
        shuffled = [
            segments[i] for i in stream(order.seed, "segments", epoch, stream_number).permutation(len(segments))
        ]
        self.windows = [shuffled[i : i + order.window] for i in range(0, len(shuffled), order.window)]
        self.ends = np.cumsum([sum(int(self._copies(s).sum()) for s in w) for w in self.windows])
        if not self.windows or not self.ends[-1]:
            raise ConfigError(
                f"stream {stream_number} of {order.streams} has no sample in epoch {epoch}: {order.shards.path} is "
                f"small ({order.visits:.0f} visits an epoch) and its repeat factors leave samples out; "
                f"use fewer data.streams"
            )
        self._open: tuple[int, np.ndarray] | None = None

    def __getitem__(self, position: int) -> Item:
        """Counted on in a circle: an epoch's draw of repeats may be a few visits shorter than its steps."""
        position %= int(self.ends[-1])
        w = int(np.searchsorted(self.ends, position, side="right"))
        if self._open is None or self._open[0] != w:
            self._open = w, self._expand(w)
        shard, place, copy = self._open[1][position - (int(self.ends[w - 1]) if w else 0)]
        rows = self.order.rows(int(shard))
        return Item(int(shard), int(rows.rows[place]), rows.keys[place], self.epoch, int(copy))

    def _copies(self, segment: Segment) -> np.ndarray:
        rows = self.order.rows(segment.shard)
        repeat = rows.repeat[segment.start : segment.stop]
        draw = uniform(rows.hashes[segment.start : segment.stop], derive(self.order.seed, "repeat", self.epoch))
        return np.floor(repeat + draw).astype(np.int64)  # r rounded up with probability frac(r)

    def _expand(self, w: int) -> np.ndarray:
        """The visits of a window as rows (shard, place among the shard's eligible rows, copy), shuffled."""
        parts = []
        for segment in self.windows[w]:
            copies = self._copies(segment)
            place = np.repeat(np.arange(segment.start, segment.stop), copies)
            first = np.repeat(np.cumsum(copies) - copies, copies)
            parts.append(np.stack([np.full(len(place), segment.shard), place, np.arange(len(place)) - first], axis=1))
        visits = np.concatenate(parts)
        return visits[stream(self.order.seed, "window", self.epoch, self.number, w).permutation(len(visits))]


def cut(counts: np.ndarray, streams: int) -> list[list[Segment]]:
    """Share rows between streams: contiguous runs whose sizes differ by at most one, whatever the shards' sizes."""
    ends = np.cumsum(counts)
    bounds = [int(ends[-1]) * s // streams for s in range(streams + 1)]
    return [list(_segments(ends, counts, a, b)) for a, b in pairwise(bounds)]


def _segments(ends: np.ndarray, counts: np.ndarray, start: int, stop: int) -> Iterator[Segment]:
    for shard in range(int(np.searchsorted(ends, start, side="right")), len(ends)):
        first = int(ends[shard] - counts[shard])
        if first >= stop:
            return
        if counts[shard]:
            yield Segment(shard, max(start - first, 0), min(stop - first, int(counts[shard])))


def choose_streams(batch_size: int, samples: int) -> int:
    """The largest power of two, at most 64, that divides the batch and leaves every stream some rows."""
    most = max(1, min(MAX_STREAMS, samples // MIN_ROWS_PER_STREAM))
    streams = 1
    while streams * 2 <= most and batch_size % (streams * 2) == 0:
        streams *= 2
    return streams
