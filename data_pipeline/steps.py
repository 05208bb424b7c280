"""The tasks of a build: read -> merge -> vocabulary -> label -> plan -> shard -> verify. Files in, files out.

`read` is the only pass over the sources: texts become hashtags and synsets, images are checked, and the bytes that are
not in a file of their own yet are laid down in one file per task, so that a shard, whose samples come from everywhere,
reads each by its offset. (Reading them from Parquet would read every row group again for every shard.) What travels
between steps are the small tables of schema.py.
"""

import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline import hashtags, images, resample, schema, shardset, vocabulary
from data_pipeline.errors import DataError
from data_pipeline.files import atomic_write, sha256_file
from data_pipeline.job import Counts
from data_pipeline.shardset import Sample, safe_key, write_table
from data_pipeline.sources import Piece
from data_pipeline.synsets import map_hashtags
from data_pipeline.wordnet import WordNet

MAX_TEXT: Final = 1000  # characters of language, source and licence; ours
ROW_GROUP: Final = 2000  # rows of the labelled table that a shard reads at once


@dataclass(frozen=True)
class Settings:
    """What decides the content of a shard set, as asked for; written into the manifest."""

    min_count: str = "auto"
    keep_unlabelled: bool = False
    resample: str = "sqrt"
    epoch_factor: float | None = None  # None: the papers' 5/3, unless a threshold is given
    threshold: float | None = None
    samples_per_shard: int = 1000
    resize: int | None = None  # short side in pixels
    quality: int = 90  # of resized pictures, JPEG
    max_caption: int = 10_000  # characters


@dataclass(frozen=True)
class Work:
    """Where tasks put their files."""

    folder: Path

    @property
    def wordnet(self) -> Path:
        return self.folder / "wordnet"

    @property
    def vocabulary(self) -> Path:
        return self.folder / "vocabulary.parquet"

    @property
    def classes(self) -> Path:
        return self.folder / "classes.parquet"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.parquet"

    def images(self, task: int) -> Path:
        return self.folder / "images" / f"{task:06d}.bin"

    def table(self, step: str, number: int) -> Path:
        return self.folder / step / f"{number:06d}.parquet"


# ---------------------------------------------------------------------------------------------------------------- read


def read(work: Work, settings: Settings, task: int, piece: Piece, partitions: int) -> Counts:
    """Records of all usable rows of a piece, grouped by partition."""
    counts: Counter[str] = Counter(read=0)
    dropped: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    with atomic_write(work.images(task)) as laid:
        for table in piece.read():
            for row, reason in _records(table, settings, _wordnet(work.wordnet), counts):
                counts["read"] += 1
                if reason is None:
                    reason = _place_image(row, settings, laid, work.images(task))
                if reason is None:
                    order = hashlib.sha256(row["key"].encode()).digest()
                    rows.append(row | {"task": task, "order": order, "partition": order[0] * partitions // 256})
                else:
                    dropped[reason] += 1
    records = pa.Table.from_pylist(rows, schema=schema.RECORDS).sort_by("partition")
    with atomic_write(work.table("records", task)) as file, pq.ParquetWriter(file, schema.RECORDS) as writer:
        for partition in range(partitions):  # a row group each, so that `merge` reads only its own
            writer.write_table(records.filter(pc.field("partition") == partition))
    return {**counts, "dropped": dict(dropped)}


def _records(
    table: pa.Table, settings: Settings, wordnet: WordNet, counts: Counter[str]
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each row of a source with its hashtags and synsets, and why it cannot be used."""
    rows = table.to_pylist()
    reasons = [_text_problem(row, settings) for row in rows]
    tags = [[] if reason else _hashtags(row) for row, reason in zip(rows, reasons, strict=True)]
    mapped = map_hashtags(tags, wordnet)
    counts.update(mapped.counts)
    for row, reason, row_tags, synsets in zip(rows, reasons, tags, mapped.synsets, strict=True):
        row |= {"hashtags": row_tags, "synsets": synsets}
        if reason is None and 4 * sum(map(len, row_tags)) > shardset.MAX_JSON // 4:
            reason = "too_many_hashtags"
        if reason is None and not synsets and not settings.keep_unlabelled:
            reason = why_unlabelled(row)
        yield row, reason


def _text_problem(row: dict[str, Any], settings: Settings) -> str | None:
    if row["problem"] is not None:
        return row["problem"]
    row["key"] = safe_key(row["key"])
    if len(row["caption"] or "") > settings.max_caption:
        return "caption_too_long"
    if any(len(row[name] or "") > MAX_TEXT for name in ("language", "source", "licence")):
        return "text_too_long"
    return None if row["image"] is not None else "missing_image"


def _hashtags(row: dict[str, Any]) -> list[str]:
    return hashtags.unique([*hashtags.extract(row["caption"] or ""), *hashtags.from_column(row["hashtags"] or ())])


def why_unlabelled(row: dict[str, Any]) -> str:
    """The reason for an image without labels."""
    if row["synsets"]:
        return "below_min_count"
    if row["hashtags"]:
        return "no_synset"
    return "no_caption" if row["caption"] is None else "no_hashtags"


def _place_image(row: dict[str, Any], settings: Settings, laid: BinaryIO, laid_path: Path) -> str | None:
    """Check the image and say where its bytes are; the reason if it is bad."""
    original: bytes = row["image"]
    try:
        stored, row["extension"] = images.prepare(original, settings.resize, settings.quality)
    except images.BadImage as error:
        return error.reason
    row["image_size"], row["image_sha256"] = len(stored), hashlib.sha256(stored).digest()
    if stored is original and row["path"] is not None:
        row["image_path"], row["image_offset"] = row["path"], 0
    else:
        row["image_path"], row["image_offset"] = str(laid_path), laid.tell()
        laid.write(stored)
    return None


# --------------------------------------------------------------------------------------------------------------- merge


def merge(work: Work, partition: int, tasks: int) -> Counts:
    """All records of a partition in the order of the shards, the first of each key, and images per synset."""
    parts = [
        pq.read_table(work.table("records", task), schema=schema.RECORDS, filters=[("partition", "==", partition)])
        for task in range(tasks)
    ]
    table = pa.concat_tables(parts).sort_by([(name, "ascending") for name in ("order", "task", "row")]).combine_chunks()
    orders = table["order"].to_pylist()
    first = [position == 0 or order != orders[position - 1] for position, order in enumerate(orders)]
    unique = table.filter(pa.array(first, pa.bool_()))
    write_table(work.table("unique", partition), unique, ROW_GROUP)
    synsets = unique["synsets"].to_pylist()
    _write_counts(work.table("synsets", partition), Counter(itertools.chain.from_iterable(synsets)))
    return {"dropped": {"duplicate_key": len(table) - len(unique)}, "named_by_wordnet": sum(map(bool, synsets))}


# ---------------------------------------------------------------------------------------------------------- vocabulary


def choose_vocabulary(work: Work, min_count: str, partitions: int, named: int) -> Counts:
    """The vocabulary file, and the table synset row -> (label index, images)."""
    counts = _sum_counts(work, "synsets", partitions)
    minimum = vocabulary.minimum_count(min_count, named)
    entries, indexes = vocabulary.build_vocabulary(counts, minimum, _wordnet(work.wordnet))
    shardset.write_vocabulary(work.vocabulary, entries)
    write_table(
        work.classes,
        pa.table(
            {"row": list(indexes), "index": list(indexes.values()), "count": [entry.count for entry in entries]},
            schema=pa.schema([("row", pa.int32()), ("index", pa.int32()), ("count", pa.int64())]),
        ),
    )
    return {"min_count": minimum, "classes": len(entries), "synsets": len(counts)}


# --------------------------------------------------------------------------------------------------------------- label


def label(work: Work, settings: Settings, partition: int) -> Counts:
    """Label indices of each image and the count of its rarest one; what is without is dropped or kept as asked."""
    classes = pq.read_table(work.classes)
    index, count = (
        dict(zip(classes["row"].to_pylist(), classes[name].to_pylist(), strict=True)) for name in ("index", "count")
    )
    unique = pq.read_table(work.table("unique", partition), schema=schema.UNIQUE)
    known = [[synset for synset in row if synset in index] for row in unique["synsets"].to_pylist()]
    rarest = [min((count[synset] for synset in row), default=0) for row in known]
    labels = [sorted(index[synset] for synset in row) for row in known]
    labelled = unique.append_column(schema.LABELLED.field("labels"), pa.array(labels, pa.list_(pa.int32())))
    labelled = labelled.append_column(schema.LABELLED.field("rarest"), pa.array(rarest, pa.int64()))
    without = labelled.filter(pc.field("rarest") == 0).select(["synsets", "hashtags", "caption"])
    reasons = dict(Counter(why_unlabelled(row) for row in without.to_pylist()))
    if not settings.keep_unlabelled:
        labelled = labelled.filter(pc.field("rarest") > 0)
    write_table(work.table("labelled", partition), labelled, ROW_GROUP)
    _write_counts(work.table("rarest", partition), Counter(labelled["rarest"].to_pylist()))
    return {
        "kept": len(labelled),
        "labelled": len(unique) - len(without),
        "labels": sum(map(len, labels)),
        "unlabelled" if settings.keep_unlabelled else "dropped": reasons,
    }


# ---------------------------------------------------------------------------------------------------------------- plan


def plan(work: Work, settings: Settings, partitions: int) -> Counts:
    """Which rows of which partitions each shard takes, and the threshold of resampling."""
    histogram = _sum_counts(work, "rarest", partitions)
    histogram.pop(0, None)
    labelled = sum(histogram.values())
    threshold = 0.0
    if settings.resample == "sqrt":
        asked = settings.epoch_factor if settings.epoch_factor is not None else resample.EPOCH_FACTOR
        threshold = settings.threshold if settings.threshold is not None else resample.solve_threshold(histogram, asked)
    repeats = resample.Repeats(threshold, labelled)
    sizes = [pq.read_metadata(work.table("labelled", partition)).num_rows for partition in range(partitions)]
    slices = cut(sizes, settings.samples_per_shard)
    write_table(work.plan, pa.Table.from_pylist(slices, schema=PLAN))
    return {"threshold": threshold, "labelled": labelled, "mean_repeat": repeats.mean(histogram)}


PLAN: Final = pa.schema([(name, pa.int64()) for name in ("shard", "partition", "start", "stop")])


def cut(sizes: list[int], samples_per_shard: int) -> list[dict[str, int]]:
    """Cut the partitions, laid end to end, into shards of at most that size whose sizes differ by one at most."""
    total = sum(sizes)
    shards = math.ceil(total / samples_per_shard)
    edges = [total * shard // shards for shard in range(shards + 1)] if shards else [0]
    begins = [0, *itertools.accumulate(sizes)]
    slices = []
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        for part, (begin, end) in enumerate(itertools.pairwise(begins)):
            start, stop = max(low, begin), min(high, end)
            if start < stop:
                slices.append({"shard": number, "partition": part, "start": start - begin, "stop": stop - begin})
    return slices


# --------------------------------------------------------------------------------------------------------------- shard


def shard(work: Work, folder: Path, name: str, slices: list[dict[str, int]], repeats: resample.Repeats) -> Counts:
    """One tar and its index."""
    rows = pa.concat_tables([_rows(work.table("labelled", s["partition"]), s["start"], s["stop"]) for s in slices])
    rows = rows.sort_by("key")
    names = _wordnet(work.wordnet).synsets["synset"]
    return dict(shardset.write_shard(folder, name, (_sample(row, names, repeats) for row in _each(rows))))


def _sample(row: dict[str, Any], names: pa.ChunkedArray, repeats: resample.Repeats) -> Sample:
    repeat = repeats.of(row["rarest"])
    record = {
        "key": row["key"],
        "caption": row["caption"] or "",
        "language": row["language"],
        "hashtags": row["hashtags"],
        "synsets": [names[synset].as_py() for synset in row["synsets"]],
        "labels": row["labels"],
        "repeat": repeat,
        "source": row["source"],
        "licence": row["licence"],
    }
    return Sample(row["key"], _image(row), row["extension"], record, row["labels"], repeat)


def _image(row: dict[str, Any]) -> bytes:
    path = Path(row["image_path"])
    try:
        with path.open("rb") as file:
            file.seek(row["image_offset"])
            data = file.read(row["image_size"])
    except OSError as error:
        raise DataError(
            f"cannot read {path} ({error.strerror}), which was there when the build began; start over with --overwrite"
        ) from None
    if hashlib.sha256(data).digest() != row["image_sha256"]:
        raise DataError(f"{path} changed while the build was running; start over with --overwrite")
    return data


def _rows(path: Path, start: int, stop: int) -> pa.Table:
    """A slice of a file, reading only the row groups it touches."""
    with pq.ParquetFile(path) as file:
        groups = list(range(start // ROW_GROUP, math.ceil(stop / ROW_GROUP)))
        return file.read_row_groups(groups).slice(start - groups[0] * ROW_GROUP, stop - start)


def _each(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(256):
        yield from batch.to_pylist()


# -------------------------------------------------------------------------------------------------------------- verify


def verify(folder: Path, entry: shardset.ShardEntry) -> Counts:
    """Read a shard back."""
    problems = shardset.verify_shard(folder, entry)
    if problems:
        raise DataError(f"{problems[0]}, right after it was written: check the disk, then build again with --overwrite")
    return {"verified": entry["samples"]}


def hash_files(files: list[tuple[str, Path]]) -> list[tuple[str, int, str]]:
    """Name, size and sha256 of input files."""
    try:
        return [(name, path.stat().st_size, sha256_file(path)) for name, path in files]
    except OSError as error:
        raise DataError(f"cannot read {error.filename} ({error.strerror})") from None


# -------------------------------------------------------------------------------------------------------------- shared


@functools.lru_cache(maxsize=1)
def _wordnet(folder: Path) -> WordNet:
    return WordNet.load(folder)


def _write_counts(path: Path, counts: Counter[int]) -> None:
    kind = pa.schema([("value", pa.int64()), ("count", pa.int64())])
    write_table(path, pa.table({"value": sorted(counts), "count": [counts[v] for v in sorted(counts)]}, schema=kind))


def _sum_counts(work: Work, step: str, partitions: int) -> Counter[int]:
    total: Counter[int] = Counter()
    for partition in range(partitions):
        table = pq.read_table(work.table(step, partition))
        total.update(dict(zip(table["value"].to_pylist(), table["count"].to_pylist(), strict=True)))
    return total
