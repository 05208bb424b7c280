"""Step read: one pass over the sources. Texts become hashtags, images are checked and laid down."""

import hashlib
import itertools
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.ipc

from data_pipeline import hashtags, images, schema, shardset, watch
from data_pipeline.files import atomic_write, sha256_file
from data_pipeline.job import Counts, LeftOut
from data_pipeline.shardset import safe_key
from data_pipeline.sources import Piece
from data_pipeline.steps import Settings, Work, read_tag_table, read_tombstones, write_dropped
from data_pipeline.synsets import TagTable

MAX_TEXT: Final = 1000  # characters of language, source, licence and url; ours
TO_THE_END: Final = 1 << 60  # the number of rows of a piece far away is a guess
TEXTS: Final = ("language", "source", "licence", "url")


def read(
    work: Work, settings: Settings, task: int, piece: Piece, partitions: int, skip: LeftOut | None = None
) -> Counts:
    """Records of all usable rows of a piece, grouped by partition. Rows in `skip` (positions in the piece) killed a
    worker before and are not touched."""
    counts: Counter[str] = Counter(read=0)
    changed: Counter[str] = Counter()
    dropped: list[dict[str, str | None]] = []
    rows: list[dict[str, Any]] = []
    with atomic_write(work.images(task)) as laid:
        for row, reason, detail in examine(work, settings, task, piece, laid, (0, piece.rows), skip or {}):
            counts["read"] += 1
            if reason is None:
                changed.update(row["changes"])
                order = hashlib.sha256(row["key"].encode()).digest()
                rows.append(row | {"task": task, "order": order, "partition": partition_of(order, partitions)})
            else:
                dropped.append({"key": row["key"], "reason": reason, "detail": detail, "source": row["source"]})
    _write_records(work.records(task), rows, partitions)
    write_dropped(work.table("dropped_read", task), dropped)
    return {**counts, "changed": dict(changed), "dropped": dict(Counter(row["reason"] for row in dropped))}


def _write_records(path: Path, rows: list[dict[str, Any]], partitions: int) -> None:
    """One batch per partition, so that `merge` reads only its own. As Arrow's file and not as Parquet: with a hundred
    partitions, finding one batch takes a twentieth of the time."""
    rows.sort(key=lambda row: row["partition"])  # stable: the order of the rows stays
    edges = [bisect_left(rows, partition, key=lambda row: row["partition"]) for partition in range(partitions + 1)]
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with atomic_write(path) as file, pa.ipc.new_file(file, schema.RECORDS, options=options) as writer:
        for start, stop in itertools.pairwise(edges):
            writer.write_batch(pa.RecordBatch.from_pylist(rows[start:stop], schema=schema.RECORDS))


def examine(
    work: Work,
    settings: Settings,
    task: int,
    piece: Piece,
    laid: BinaryIO,
    span: tuple[int, int],
    skip: LeftOut,
) -> Iterator[tuple[dict[str, Any], str | None, str | None]]:
    """Each row between two positions of a piece, and reason and detail if it is dropped; its image goes to `laid`."""
    position = span[0]
    for stop in (*sorted(skip), None):  # what is left out may lie behind the end, where that is a guess
        end = span[1] if stop is None else stop
        if stop is None and end == piece.rows:
            end = TO_THE_END
        if position < end:
            part = piece if (position, end) == (0, TO_THE_END) else piece.part(position, end)
            for table in part.read():
                for row, reason, detail in _records(table, settings, read_tag_table(work, settings), position):
                    if reason is None and read_tombstones(work.tombstones).hold(row["image"]):
                        reason = "taken_down"
                    if reason is None:
                        reason, detail = _place_image(row, settings, laid, work.images(task))
                    if reason is None and read_tombstones(work.tombstones).look_like(row["perceptual_hash"]):
                        reason = "taken_down"
                    yield row, reason, detail
                position += len(table)
                watch.between_records()
        if stop is not None:
            yield {"key": None, "source": None} | skip[stop], skip[stop]["reason"], skip[stop]["detail"]
            position = stop + 1


def probe(work: Work, settings: Settings, task: int, piece: Piece, partitions: int, start: int, stop: int) -> None:
    """All that `read` does to these rows, and no files."""
    with Path(os.devnull).open("wb") as nowhere:
        for _ in examine(work, settings, task, piece, nowhere, (start, stop), {}):
            pass


def describe(work: Work, settings: Settings, task: int, piece: Piece, partitions: int, position: int) -> dict[str, Any]:
    """What a row that is left out is called."""
    for table in piece.part(position, position + 1).read():
        for row in table.select(["key", "source", "row", "problem"]).to_pylist():
            key = row["key"] if row["problem"] is not None else safe_key(row["key"])
            return {"key": key, "source": row["source"], "row": row["row"]}
    return {}


def partition_of(order: bytes, partitions: int) -> int:
    """Partitions follow each other in the order of the samples."""
    return int.from_bytes(order[:2], "big") * partitions >> 16


def _records(
    table: pa.Table, settings: Settings, tags: TagTable, position: int
) -> Iterator[tuple[dict[str, Any], str | None, str | None]]:
    """Each row of a source with its hashtags, why it cannot be used, and the details of that."""
    watch.record(position)
    found = hashtags.extract_batch(table["caption"], table["hashtags"]).to_pylist()
    for number, (row, row_tags) in enumerate(zip(table.to_pylist(), found, strict=True)):
        watch.record(position + number)
        reason = _text_problem(row, settings)
        row["hashtags"] = [] if reason else row_tags
        row |= {"other_captions": [], "weight": 1.0 if row["weight"] is None else row["weight"]}
        if reason is None and 4 * sum(map(len, row["hashtags"])) > shardset.MAX_JSON // 4:
            reason = "too_many_hashtags"
        if reason is None and not settings.keep_unlabelled and not any(tags.lookup(tag)[0] for tag in row["hashtags"]):
            reason = why_unlabelled(row)  # before the image is decoded for nothing
        yield row, reason, None


def _text_problem(row: dict[str, Any], settings: Settings) -> str | None:
    if row["problem"] is not None:
        return row["problem"]
    row["key"] = safe_key(row["key"])
    if len(row["caption"] or "") > settings.max_caption:
        return "caption_too_long"
    if any(len(row[name] or "") > MAX_TEXT for name in TEXTS):
        return "text_too_long"
    return None if row["image"] is not None else "missing_image"


def why_unlabelled(row: dict[str, Any]) -> str:
    """The reason for an image without labels."""
    if row.get("synsets"):
        return "below_min_count"
    if row["hashtags"]:
        return "no_synset"
    return "no_caption" if row["caption"] is None else "no_hashtags"


def _place_image(
    row: dict[str, Any], settings: Settings, laid: BinaryIO, laid_path: Path
) -> tuple[str | None, str | None]:
    """Check the image and say where its bytes are; reason and detail if it is bad."""
    original: bytes = row["image"]
    try:
        prepared = images.prepare(original, settings.pictures())
    except images.BadImage as error:
        return error.reason, error.detail
    stored, row["extension"] = prepared.data, prepared.extension
    row |= {"width": prepared.width, "height": prepared.height, "perceptual_hash": prepared.perceptual_hash}
    row["look"] = prepared.look
    row["changes"] = prepared.changes
    row["image_size"], row["image_sha256"] = len(stored), hashlib.sha256(stored).digest()
    row["content_sha256"] = row["image_sha256"] if stored is original else hashlib.sha256(original).digest()
    if stored is original and row["path"] is not None:
        row["image_path"], row["image_offset"] = row["path"], 0
    else:
        row["image_path"], row["image_offset"] = str(laid_path), laid.tell()
        laid.write(stored)
    return None, None


def hash_files(files: list[tuple[str, Path]]) -> list[tuple[str, int, str]]:
    """Name, size and sha256 of input files; of one that cannot be read, "unreadable"."""
    return [(name, path.stat().st_size, _sha256(path)) for name, path in files]


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError:  # its record will be dropped for it
        return "unreadable"
