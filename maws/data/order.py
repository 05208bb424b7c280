"""The order of samples as a function of (seed, epoch, step), never a state (design §5).

    rows of the shard set ─cut─▶ S canonical streams ─per epoch─▶ shuffled segments ─▶ shuffled windows of samples

Every global batch takes batch/S samples from every stream, and rank r of W serves the streams s with s mod W = r. So
what a batch holds does not depend on W, and resuming at step n needs nothing but n.
"""

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.shardset import ShardSet
from maws.config import ConfigError
from maws.data.survey import Among, eligible, survey
from maws.seeding import derive, hash_keys, stream, uniform

MAX_STREAMS = 64
MIN_ROWS_PER_STREAM = 16
MAX_REPLACEMENTS = 100  # in a row, in one stream: then it is not a sample that is broken but the shard set
RECENT = 16  # shards whose rows stay in memory: those of a window are asked for twice, once for their number


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

    def number(self, seed: int, use: str) -> int:
        """What others can seed their own generators with for one use of this visit."""
        return derive(seed, use, self.epoch, self.key, self.copy)


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
    """What a run may visit of a shard; no keys: a shard's tens of thousands of them are asked for one by one."""

    rows: np.ndarray  # row numbers in the shard
    hashes: np.ndarray  # of their keys, uint64; none without resampling
    repeat: np.ndarray  # expected visits an epoch


class Order:
    """Who comes when.

    `labelled` leaves out samples without a synset; `resample` visits each sample as often as its repeat factor says,
    rounded up or down per epoch by a hash of (seed, epoch, key). `among`: the ranks that make this order together, and
    share the survey of a large set.

    Raises ConfigError when the batch does not fit the set or the streams do not fit the batch.
    """

    def __init__(
        self, shards: ShardSet, seed: int, batch_size: int, *, streams: int = 0, window: int = 8,
        resample: bool = True, labelled: bool = False, among: Among | None = None,
    ) -> None:  # fmt: skip
        self.shards, self.seed, self.batch_size, self.window = shards, seed, batch_size, window
        self.resample, self.labelled = resample, labelled
        self._cache: OrderedDict[int, _Rows] = OrderedDict()
        self._epochs: OrderedDict[tuple[int, int], _StreamEpoch] = OrderedDict()
        counts, visits = survey(shards, resample, labelled, among)
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
        shards.keep(window * self.streams)  # an item of any stream may come next

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

    def steps_of(self, shard: int, row: int, epoch: int) -> list[int]:
        """The steps of an epoch that visit one sample, one for each visit."""
        place = int(np.searchsorted(self.rows(shard).rows, row))
        for number, segments in enumerate(self._segments):
            if any(s.shard == shard and s.start <= place < s.stop for s in segments):
                places = self._stream_epoch(number, epoch).places(shard, row, self.steps_per_epoch * self.per_stream)
                return sorted(epoch * self.steps_per_epoch + p // self.per_stream for p in places)
        return []

    @property
    def identity(self) -> str:
        """A hash of everything the order depends on; a checkpoint keeps it, so that no run goes on in another order."""
        facts = (self.shards.sha256, *self.facts.values())
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What makes this order, beside the shard set; RUN/config.json keeps it for the ledger."""
        return {
            "seed": self.seed, "batch_size": self.batch_size, "streams": self.streams, "window": self.window,
            "resample": self.resample, "labelled": self.labelled,
        }  # fmt: skip

    def _stream_epoch(self, stream_number: int, epoch: int) -> "_StreamEpoch":
        at = (stream_number, epoch)
        if at not in self._epochs:
            if len(self._epochs) >= 2 * self.streams:
                self._epochs.popitem(last=False)
            self._epochs[at] = _StreamEpoch(self, stream_number, epoch, self._segments[stream_number])
        return self._epochs[at]

    def rows(self, shard: int) -> _Rows:
        if shard in self._cache:
            self._cache.move_to_end(shard)
            return self._cache[shard]
        index = self.shards.index(shard)
        rows = eligible(index, self.labelled)
        if self.resample:
            keys = index.column("key").to_pylist()
            found = _Rows(rows, hash_keys([keys[i] for i in rows]), index.column("repeat").to_numpy()[rows])
        else:
            found = _Rows(rows, np.empty(0, np.uint64), np.ones(len(rows)))
        if len(self._cache) >= RECENT:
            self._cache.popitem(last=False)
        self._cache[shard] = found
        return found

    def key(self, shard: int, row: int) -> str:
        return self.shards.index(shard).column("key")[row].as_py()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict(), "_epochs": OrderedDict()}


class _StreamEpoch:
    """The visits of one stream in one epoch; windows are counted and expanded when they are reached."""

    def __init__(self, order: Order, stream_number: int, epoch: int, segments: Sequence[Segment]) -> None:
        self.order, self.number, self.epoch = order, stream_number, epoch
        shuffled = [
            segments[i] for i in stream(order.seed, "segments", epoch, stream_number).permutation(len(segments))
        ]
        self.windows = [shuffled[i : i + order.window] for i in range(0, len(shuffled), order.window)]
        self._ends: list[int] = []  # visits up to the end of each window, as far as they were counted
        self._open: tuple[int, np.ndarray] | None = None

    def __getitem__(self, position: int) -> Item:
        """Counted on in a circle: an epoch's draw of repeats may be a few visits shorter than its steps."""
        if (w := self._window(position)) is None:
            position %= self._total()
            w = self._window(position)
        assert w is not None
        if self._open is None or self._open[0] != w:
            self._open = w, self._expand(w)
        shard, row, copy = map(int, self._open[1][position - (self._ends[w - 1] if w else 0)])
        return Item(shard, row, self.order.key(shard, row), self.epoch, copy)

    def places(self, shard: int, row: int, stop: int) -> list[int]:
        """The positions before `stop` at which one sample is visited."""
        found = []
        for w, window in enumerate(self.windows):
            if any(segment.shard == shard for segment in window):
                self._window(stop)  # counts as far as it goes
                visits = self._expand(w)
                start = self._ends[w - 1] if w else 0
                found += [start + int(i) for i in np.flatnonzero((visits[:, 0] == shard) & (visits[:, 1] == row))]
        total = self._total()
        return [p for first in found for p in range(first, stop, total)]

    def _window(self, position: int) -> int | None:
        """The window that a visit lies in; None behind the last."""
        while not self._ends or self._ends[-1] <= position:
            if len(self._ends) == len(self.windows):
                return None
            visits = sum(self._visits(s) for s in self.windows[len(self._ends)])
            self._ends.append((self._ends[-1] if self._ends else 0) + visits)
        return bisect_right(self._ends, position)

    def _total(self) -> int:
        """Visits of the epoch, when all are counted. Raises ConfigError when there is none."""
        if not self._ends or not self._ends[-1]:
            raise ConfigError(
                f"stream {self.number} of {self.order.streams} has no sample in epoch {self.epoch}: "
                f"{self.order.shards.path} is small ({self.order.visits:.0f} visits an epoch) and its repeat factors "
                f"leave samples out; use fewer data.streams"
            )
        return self._ends[-1]

    def _visits(self, segment: Segment) -> int:
        return int(self._copies(segment).sum()) if self.order.resample else segment.stop - segment.start

    def _copies(self, segment: Segment) -> np.ndarray:
        if not self.order.resample:
            return np.ones(segment.stop - segment.start, np.int64)
        rows = self.order.rows(segment.shard)
        repeat = rows.repeat[segment.start : segment.stop]
        draw = uniform(rows.hashes[segment.start : segment.stop], derive(self.order.seed, "repeat", self.epoch))
        return np.floor(repeat + draw).astype(np.int64)  # r rounded up with probability frac(r)

    def _expand(self, w: int) -> np.ndarray:
        """The visits of a window as rows (shard, row, copy), shuffled; int32, a window may have millions."""
        parts = []
        for segment in self.windows[w]:
            copies = self._copies(segment)
            own = self.order.rows(segment.shard).rows[segment.start : segment.stop]
            row = np.repeat(own, copies)
            first = np.repeat(np.cumsum(copies) - copies, copies)
            part = [np.full(len(row), segment.shard), row, np.arange(len(row)) - first]
            parts.append(np.stack(part, axis=1).astype(np.int32))
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
