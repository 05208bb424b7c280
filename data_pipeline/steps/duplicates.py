"""Steps between merge and senses: which records are copies of others, or of evaluation pictures, over the whole corpus.

    fingerprint ─▶ group ─▶ pair ─▶ resolve ─▶ gather ─▶ remove      the last three in verdicts.py

`group` brings equal hashes together, so that a placeholder with 100,000 copies is one group and not all their pairs;
`pair` compares the groups (dedup.py); `resolve` decides who stays, the same however the work was cut; `remove` writes
what later steps leave out. A record has the number of its place in the order of samples, an evaluation picture
a negative one. Only `resolve` holds something of the whole corpus in memory: the pairs.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline import dedup, images
from data_pipeline.dedup import EVALUATION, TRAINING, Hashes, Ints, Limits, Pairs
from data_pipeline.evaluation_sets import Piece
from data_pipeline.files import atomic_write
from data_pipeline.job import Counts, merge_counts
from data_pipeline.look import SIZE as LOOK
from data_pipeline.shardset import write_table
from data_pipeline.steps import Work

MAX_BUCKETS: Final = 256
BLOCK_HASHES: Final = 1 << 20  # that a `pair` task holds at a time, 41 bytes each
SAME_LOOK: Final = 4  # levels of 255 in a cell: so much alike, equal hashes are one picture
NEAR_LOOK: Final = 28  # between such pictures, so that a copy is at most 32 from the one that stays

FINGERPRINTS: Final = pa.schema(
    [
        ("id", pa.int64()),
        ("content", pa.binary(dedup.BYTES)),  # sha256
        ("hash", pa.binary(dedup.BYTES)),  # null where the picture says nothing
        ("look", pa.binary(LOOK)),
        ("pixels", pa.int64()),
        ("task", pa.int32()),
        ("row", pa.int64()),
        ("set", pa.int32()),  # of evaluation pictures; -1 for training
    ]
)
BANDS: Final = pa.schema([("id", pa.int64()), ("hash", pa.binary(dedup.BYTES)), ("kind", pa.uint8())])
PAIRS: Final = pa.schema([("first", pa.int64()), ("second", pa.int64()), ("distance", pa.uint8())])
ITEMS: Final = pa.schema(
    [("id", pa.int64()), ("set", pa.int32()), ("name", pa.string()), ("content", pa.binary()), ("problem", pa.string())]
)


@dataclass(frozen=True)
class Search:
    """What is looked for, and how the work is cut; the cut does not change what is found."""

    limits: Limits
    remove_copies: bool
    remove_evaluation: bool
    merge_captions: bool
    starts: tuple[int, ...]  # the number of the first record of each partition, and of the end
    sets: tuple[str, ...]  # names of the evaluation sets
    pieces: int  # of evaluation pictures

    @property
    def partitions(self) -> int:
        return len(self.starts) - 1

    @property
    def buckets(self) -> int:
        return min(MAX_BUCKETS, self.partitions)

    @property
    def prefix_bits(self) -> int:
        """Bits of a band that part its hashes into blocks."""
        blocks = -(-self.starts[-1] // BLOCK_HASHES)
        return min(dedup.BAND_BITS, max(0, blocks - 1).bit_length())

    @property
    def blocks(self) -> int:
        return (dedup.BANDS if self.by_hash else 0) << self.prefix_bits

    @property
    def by_hash(self) -> bool:
        return max(self.limits) >= 0


# --------------------------------------------------------------------------------------------------------- fingerprint


def fingerprint(work: Work, search: Search, partition: int) -> Counts:
    """Hashes of the records of a partition, laid down by bucket."""
    columns = ["content_sha256", "perceptual_hash", "look", "width", "height", "task", "row"]
    table = pq.read_table(work.table("unique", partition), columns=columns)
    start = search.starts[partition]
    found = pa.table(
        [
            pa.array(range(start, start + len(table)), pa.int64()),
            table["content_sha256"].cast(pa.binary(dedup.BYTES)),
            table["perceptual_hash"].cast(pa.binary(dedup.BYTES)),
            table["look"].cast(pa.binary(LOOK)),
            table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy(),
            table["task"],
            table["row"],
            pa.array(np.full(len(table), -1, np.int32)),
        ],
        schema=FINGERPRINTS,
    )
    _lay_by_bucket(file_path(work, "fingerprints", partition), found, search)
    return {}


def fingerprint_evaluation(work: Work, search: Search, number: int, set_number: int, piece: Piece) -> Counts:
    """The same for pictures of an evaluation set, and their list."""
    rows: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    for position, (name, data) in enumerate(piece.read()):
        item = {"id": ~(number << 32 | position), "set": set_number, "name": name, "content": None, "problem": None}
        items.append(item)
        if data is None:
            item["problem"] = "unreadable"
            continue
        content = item["content"] = hashlib.sha256(data).digest()
        hashed, look, item["problem"] = _look_at(data) if search.by_hash else (None, None, None)
        place = {"id": item["id"], "pixels": 0, "task": number, "row": position, "set": set_number}
        rows.append(place | {"content": content, "hash": hashed, "look": look})
    _lay_by_bucket(
        file_path(work, "fingerprints_eval", number), pa.Table.from_pylist(rows, schema=FINGERPRINTS), search
    )
    write_table(work.table("evaluation_items", number), pa.Table.from_pylist(items, schema=ITEMS))
    return {}


def _look_at(data: bytes) -> tuple[bytes | None, bytes | None, str | None]:
    """Hash and look of a picture, just as `read` makes them; the problem if it is bad."""
    try:
        prepared = images.prepare(data, images.Options())
    except images.BadImage as error:
        return None, None, error.reason
    return prepared.perceptual_hash, prepared.look, None


def _lay_by_bucket(path: Path, table: pa.Table, search: Search) -> None:
    bucket = _keys(table, search.by_hash)[0].view(np.uint64)[:, 0] % np.uint64(search.buckets)
    write_batches(path, FINGERPRINTS, (table.filter(pa.array(bucket == n)) for n in range(search.buckets)))


def _keys(table: pa.Table, by_hash: bool) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """What must be equal in a group (the hash, or the content where there is none), and whether it is the hash."""
    content = fixed(table["content"], dedup.BYTES)
    hashed = table["hash"].is_valid().to_numpy() & by_hash
    return np.where(hashed[:, None], fixed(table["hash"], dedup.BYTES), content), hashed


# --------------------------------------------------------------------------------------------------------------- group


def group(work: Work, search: Search, bucket: int) -> Counts:
    """Pictures of equal hash that look the same, under the number of the best; the hash of each group for `pair`."""
    paths = [file_path(work, "fingerprints", partition) for partition in range(search.partitions)]
    paths += [file_path(work, "fingerprints_eval", number) for number in range(search.pieces)]
    table = pa.Table.from_batches([read_batch(path, bucket) for path in paths], FINGERPRINTS).combine_chunks()
    keys, hashed = _keys(table, search.by_hash)
    words = keys.view(np.uint64)
    tie = [table[name].to_numpy() for name in ("id", "row", "task")]
    order = np.lexsort((*tie, -table["pixels"].to_numpy(), table["set"].to_numpy(), hashed, *words.T))
    table, words, hashed = table.take(order), words[order], hashed[order]
    leaders = _leaders(table, words, hashed)
    ids = table["id"].to_numpy()
    grouped = table.append_column("group", pa.array(ids[leaders])).take(np.argsort(leaders, kind="stable"))
    write_table(work.table("groups", bucket), grouped)
    kinds = np.zeros(len(table), np.uint8)
    training = table["set"].to_numpy() < 0
    np.bitwise_or.at(kinds, leaders, np.where(training, TRAINING, EVALUATION).astype(np.uint8))
    lead = np.flatnonzero((leaders == np.arange(len(table))) & hashed)
    _write_bands(file_path(work, "bands", bucket), Hashes(ids[lead], words[lead], kinds[lead]), search)
    return {}


def _leaders(table: pa.Table, words: NDArray[np.uint64], hashed: NDArray[np.bool_]) -> Ints:
    """For each row, in the order of preference within a hash, the row of its group's best."""
    found = np.arange(len(table))
    if len(table) < 2:
        return found
    content, look = fixed(table["content"], dedup.BYTES), fixed(table["look"], LOOK)
    begins = np.flatnonzero(np.r_[True, (words[1:] != words[:-1]).any(axis=1) | (hashed[1:] != hashed[:-1])])
    for start, stop in zip(begins, np.r_[begins[1:], len(table)], strict=True):
        if stop - start > 1:
            if (content[start:stop] == content[start]).all():  # as all without a hash
                found[start:stop] = start
            else:
                found[start:stop] = start + dedup.leaders(look[start:stop], SAME_LOOK)
    return found


def _write_bands(path: Path, hashes: Hashes, search: Search) -> None:
    def blocks() -> Iterator[pa.Table]:
        for band in range(dedup.BANDS):
            prefix = hashes.bands[:, band] >> (dedup.BAND_BITS - search.prefix_bits)
            for number in range(1 << search.prefix_bits):
                inside = prefix == number
                rows = pa.py_buffer(np.ascontiguousarray(hashes.words[inside]))
                packed = pa.FixedSizeBinaryArray.from_buffers(BANDS.field("hash").type, int(inside.sum()), [None, rows])
                yield pa.table([hashes.ids[inside], packed, hashes.kinds[inside]], schema=BANDS)

    write_batches(path, BANDS, blocks())


# ---------------------------------------------------------------------------------------------------------------- pair


def pair(work: Work, search: Search, number: int) -> Counts:
    """Pairs of groups that this block of hashes (a band, and the first bits of its value) is the first to find."""
    band, prefix = divmod(number, 1 << search.prefix_bits)
    block = _block(work, search, number)
    counts = Counter(pairs=0)
    with (
        atomic_write(file_path(work, "pairs", number)) as file,
        pa.ipc.new_file(file, PAIRS) as writer,
    ):

        def write(found: Iterable[Pairs]) -> None:
            for pairs in found:
                writer.write_batch(pa.record_batch([pa.array(column) for column in pairs], schema=PAIRS))
                counts["pairs"] += len(pairs.first)

        write(dedup.pairs_within(block, band, search.limits))
        for high in range(search.prefix_bits if search.limits.radius else 0):
            if not prefix >> high & 1:  # each two blocks once
                other = _block(work, search, number | 1 << high)
                bit = dedup.BAND_BITS - search.prefix_bits + high
                write(dedup.pairs_between(block, other, band, bit, search.limits))
    return dict(counts)


def pair_all(work: Work, search: Search) -> Counts:
    """All blocks one after the other: of few records, that takes less time than to hand them out."""
    return merge_counts([pair(work, search, number) for number in range(search.blocks)])


def _block(work: Work, search: Search, number: int) -> Hashes:
    batches = [read_batch(file_path(work, "bands", bucket), number) for bucket in range(search.buckets)]
    table = pa.Table.from_batches(batches, BANDS).combine_chunks()
    words = fixed(table["hash"], dedup.BYTES).view(np.uint64)
    return Hashes(table["id"].to_numpy(), words, table["kind"].to_numpy())


# -------------------------------------------------------------------------------------------------------------- shared


def fixed(column: pa.ChunkedArray, width: int) -> NDArray[np.uint8]:
    """N width; zeros where it is null."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.null_count:
        array = pc.fill_null(array, pa.scalar(bytes(width), pa.binary(width)))
    data = np.frombuffer(array.buffers()[1], np.uint8) if len(array) else np.empty(0, np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)


def file_path(work: Work, step: str, number: int) -> Path:
    return work.table(step, number).with_suffix(".arrow")


def write_batches(path: Path, kind: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """A file whose n-th part can be read without the others."""
    with atomic_write(path) as file, pa.ipc.new_file(file, kind) as writer:
        for table in tables:
            batches = table.combine_chunks().to_batches()
            writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], schema=kind))


def read_batch(path: Path, number: int) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(number)
