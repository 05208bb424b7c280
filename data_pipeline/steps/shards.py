"""Steps plan, shard, verify and collect: which sample goes where, the tars, reading them back, and what was dropped."""

import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import resample, schema, shardset
from data_pipeline.errors import DataError
from data_pipeline.files import atomic_write
from data_pipeline.job import Counts
from data_pipeline.shardset import Sample, write_table
from data_pipeline.steps import ROW_GROUP, Settings, Work, read_wordnet

PLAN: Final = pa.schema([(name, pa.int64()) for name in ("shard", "partition", "start", "stop")])


def plan(work: Work, settings: Settings, partitions: int) -> Counts:
    """Which rows of which partitions each shard takes, and the threshold of resampling."""
    histogram, labelled = _histogram(work, partitions)
    threshold = settings.threshold
    if threshold is None:
        factor = 1.0 if settings.resample == "none" else settings.epoch_factor or resample.EPOCH_FACTOR
        threshold = resample.solve_threshold(
            histogram, labelled, samples=settings.epoch_samples, factor=factor, method=settings.resample
        )
    repeats = resample.Repeats(threshold, labelled, settings.resample)
    sizes = [pq.read_metadata(work.table("labelled", partition)).num_rows for partition in range(partitions)]
    slices = cut(sizes, settings.samples_per_shard)
    write_table(work.plan, pa.Table.from_pylist(slices, schema=PLAN))
    unlabelled = histogram.pop((), 0.0)
    once, again = math.fsum(histogram.values()), repeats.samples(histogram)
    return {
        "threshold": threshold,
        "labelled": labelled,
        "mean_repeat": again / once if once else 1.0,
        "samples_per_epoch": again + unlabelled,
    }


def _histogram(work: Work, partitions: int) -> tuple[dict[resample.Signature, float], int]:
    """Sum of weights by what the repeat factor depends on, and the number of images with labels. Images are counted by
    weight first: numbers add up to the same however the work was cut."""
    images: Counter[tuple[resample.Signature, float]] = Counter()
    for partition in range(partitions):
        for row in pq.read_table(work.table("rarest", partition)).to_pylist():
            images[tuple(row["counts"]), row["weight"]] += row["images"]
    weights: dict[resample.Signature, list[float]] = {}
    for (counts, weight), number in sorted(images.items()):
        weights.setdefault(counts, []).append(weight * number)
    labelled = sum(number for (counts, _), number in images.items() if counts)
    return {counts: math.fsum(parts) for counts, parts in weights.items()}, labelled


def cut(sizes: list[int], samples_per_shard: int) -> list[dict[str, int]]:
    """Cut the partitions, laid end to end, into shards of at most that size whose sizes differ by one at most."""
    total = sum(sizes)
    shards = math.ceil(total / samples_per_shard)
    edges = [total * shard // shards for shard in range(shards + 1)] if shards else [0]
    begins = [0, *itertools.accumulate(sizes)]
    slices: list[dict[str, int]] = []
    number = part = 0
    for low, high in itertools.pairwise(sorted({*edges, *begins})):  # neither a shard nor a partition ends inside
        while edges[number + 1] <= low:
            number += 1
        while begins[part + 1] <= low:
            part += 1
        slices.append({"shard": number, "partition": part, "start": low - begins[part], "stop": high - begins[part]})
    return slices


def shard(
    work: Work, folder: Path, name: str, slices: list[dict[str, int]], repeats: resample.Repeats, materialise: bool
) -> Counts:
    """One tar and its index."""
    rows = pa.concat_tables([_rows(work.table("labelled", s["partition"]), s["start"], s["stop"]) for s in slices])
    rows = rows.sort_by("key")
    names = read_wordnet(work.wordnet).synsets["synset"]
    samples = (_sample(row, names, repeats) for row in _each(rows))
    return dict(shardset.write_shard(folder, name, _copies(samples) if materialise else samples))


def _copies(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Each sample as often as its repeat factor says, rounded up or down by its key; to be seen once each."""
    for sample in samples:
        for key in resample.copy_keys(sample.key, resample.copies(sample.key, sample.repeat)):
            record = sample.record | {"key": key, "repeat": 1.0}
            yield dataclasses.replace(sample, key=key, record=record, repeat=1.0)


def _sample(row: dict[str, Any], names: pa.ChunkedArray, repeats: resample.Repeats) -> Sample:
    repeat = repeats.of(row["counts"]) * row["weight"]
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
    if row["url"] is not None:
        record["url"] = row["url"]
    if row["other_captions"]:
        record["other_captions"] = row["other_captions"]
    hashes = (row["content_sha256"], row["perceptual_hash"])
    return Sample(row["key"], _image(row), row["extension"], record, row["labels"], repeat, *hashes)


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


def verify(folder: Path, entry: shardset.ShardEntry) -> Counts:
    """Read a shard back."""
    problems = shardset.verify_shard(folder, entry)
    if problems:
        raise DataError(f"{problems[0]}, right after it was written: check the disk, then build again with --overwrite")
    return {"verified": entry["samples"]}


def collect(work: Work, tasks: int, partitions: int) -> Counts:
    """dropped.parquet: one list of all that was left out. It does not depend on how the work was cut."""
    paths = [work.table("dropped_read", task) for task in range(tasks)]
    paths += [work.table("dropped_merge", partition) for partition in range(partitions)]
    removed = [work.table("removed", partition) for partition in range(partitions)]
    labels = [work.table("dropped_label", partition) for partition in range(partitions)]
    with atomic_write(work.dropped) as file, pq.ParquetWriter(file, schema.DROPPED, compression="zstd") as writer:
        buffered = schema.DROPPED.empty_table()
        for path in [*paths, *filter(Path.is_file, removed), *labels]:
            buffered = pa.concat_tables([buffered, _dropped(pq.read_table(path))])
            while len(buffered) >= DROPPED_ROWS:
                writer.write_table(buffered.slice(0, DROPPED_ROWS), DROPPED_ROWS)
                buffered = buffered.slice(DROPPED_ROWS)
        writer.write_table(buffered)
    return {}


DROPPED_ROWS: Final = 10_000  # in a row group: fixed, so that the file has the same bytes however the work was cut


def _dropped(table: pa.Table) -> pa.Table:
    """Rows of schema.REMOVED as rows of schema.DROPPED; the latter stay as they are."""
    if table.schema.names == schema.DROPPED.names:
        return table
    sources = pa.nulls(len(table), pa.string())
    return pa.table([table["key"], table["reason"], table["kept"], sources], schema=schema.DROPPED)
