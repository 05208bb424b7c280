"""The tasks of a build: read -> merge -> duplicates -> senses -> vocabulary -> label -> plan -> shard -> verify.

Files in, files out; what travels between steps are the small tables of schema.py. `read` is the only pass over the
sources: images are checked there, and the bytes that are not in a file of their own yet are laid down in one file per
task, so that a shard, whose samples come from everywhere, reads each by its offset. (Reading them from Parquet would
read every row group again for every shard.)
"""

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline import schema
from data_pipeline.evidence import Evidence
from data_pipeline.images import Limits, Options
from data_pipeline.overrides import Overrides
from data_pipeline.shardset import write_table
from data_pipeline.synsets import TagTable
from data_pipeline.tombstones import Tombstones
from data_pipeline.wordnet import WordNet

ROW_GROUP: Final = 2000  # rows of the labelled table that a shard reads at once


@dataclass(frozen=True)
class Settings:
    """What decides the content of a shard set, as asked for; written into the manifest."""

    # sources
    caption_column: str | None = None
    image_column: str | None = None
    allow_http: bool = False
    # captions and labels
    max_caption: int = 10_000  # characters
    keep_unlabelled: bool = False
    senses: str = "evidence"  # evidence, first, all, unambiguous
    languages: tuple[str, ...] = ()  # whose nouns are looked up after the English ones
    overrides: str | None = None  # file of the user
    deny_list: str = "all"  # none, non-visual, sensitive, all, or a file
    # classes
    min_count: str = "auto"
    vocabulary_size: int | None = None
    vocabulary: str | None = None  # a frozen one: shard set or file
    tombstones: str | None = None  # images that were taken down
    # resampling
    resample: str = "sqrt"
    epoch_factor: float | None = None  # None: the papers' 5/3, unless a threshold or a number of samples is given
    epoch_samples: int | None = None
    threshold: float | None = None
    materialise: bool = False  # copies instead of factors
    # pictures
    resize: int | None = None  # pixels
    resize_side: str = "short"  # or long
    quality: int = 90  # of pictures that are stored as a new JPEG
    min_side: int = Limits.min_side
    max_pixels: int = Limits.max_pixels
    max_aspect: float = Limits.max_aspect
    max_bytes: int = Limits.max_bytes
    # duplicates
    keep_duplicates: bool = False
    near_duplicates: int | None = 14  # bits between hashes; None: only equal bytes are duplicates
    merge_captions: bool = False
    eval_near: int | None = 14  # the same for copies of evaluation images
    eval_action: str = "remove"  # or report
    # shards
    samples_per_shard: int = 1000

    def pictures(self) -> Options:
        """What is asked of `images.prepare`."""
        limits = Limits(self.min_side, self.max_pixels, self.max_aspect, self.max_bytes)
        return Options(limits, self.resize, self.resize_side, self.quality)


@dataclass(frozen=True)
class Work:
    """Where tasks put their files."""

    folder: Path

    @property
    def wordnet(self) -> Path:
        return self.folder / "wordnet"

    @property
    def evidence(self) -> Path:
        return self.folder / "evidence.parquet"

    @property
    def vocabulary(self) -> Path:
        return self.folder / "vocabulary.parquet"

    @property
    def overrides(self) -> Path:
        return self.folder / "overrides.json"

    @property
    def tombstones(self) -> Path:
        return self.folder / "tombstones.jsonl"

    @property
    def frozen(self) -> Path:
        """A copy of the vocabulary that is used again."""
        return self.folder / "frozen.parquet"

    @property
    def classes(self) -> Path:
        return self.folder / "classes.parquet"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.parquet"

    @property
    def tags(self) -> Path:
        return self.folder / "tags.parquet"

    @property
    def duplicates(self) -> Path:
        return self.folder / "duplicates.parquet"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation.parquet"

    @property
    def dropped(self) -> Path:
        return self.folder / "dropped.parquet"

    def records(self, task: int) -> Path:
        return self.folder / "records" / f"{task:06d}.arrow"

    @property
    def quarantine(self) -> Path:
        """Records that killed the process that read them, one line of JSON each."""
        return self.folder / "quarantine.jsonl"

    def images(self, task: int) -> Path:
        return self.folder / "images" / f"{task:06d}.bin"

    def table(self, step: str, number: int) -> Path:
        return self.folder / step / f"{number:06d}.parquet"


@functools.lru_cache(maxsize=1)
def read_wordnet(folder: Path) -> WordNet:
    return WordNet.load(folder)


@functools.lru_cache(maxsize=1)
def read_tag_table(work: Work, settings: Settings) -> TagTable:
    """Lookups after overrides and deny-list; `evidence` also weighs senses that are no class when they win."""
    overrides = Overrides.open(work.overrides)
    return TagTable(read_wordnet(work.wordnet), overrides, competing=settings.senses == "evidence")


@functools.lru_cache(maxsize=1)
def read_evidence(work: Work) -> Evidence:
    return Evidence.load(work.evidence, read_wordnet(work.wordnet))


@functools.lru_cache(maxsize=1)
def read_tombstones(path: Path) -> Tombstones:
    return Tombstones.open(path)


def read_unique(work: Work, partition: int, columns: list[str] | None = None) -> pa.Table:
    """The records of a partition that are neither copies nor evaluation images, sorted by `order`."""
    table = pq.read_table(work.table("unique", partition), columns=columns)
    orders = pq.read_table(work.table("unique", partition), columns=["order"])["order"].combine_chunks()
    path = work.table("merged", partition)
    if path.is_file():  # from copies
        merged = pq.read_table(path)
        place = pc.index_in(orders, value_set=merged["order"].combine_chunks())  # pyright: ignore
        place = pc.coalesce(pc.add(place, len(table)), pa.array(range(len(table)), pa.int32()))  # pyright: ignore
        for name in set(table.column_names) & {"hashtags", "other_captions"}:
            both = pa.concat_arrays([table[name].combine_chunks(), merged[name].combine_chunks()])
            table = table.set_column(table.column_names.index(name), name, both.take(place))
    path = work.table("removed", partition)
    if path.is_file():
        removed = pq.read_table(path, columns=["order"])["order"].combine_chunks()
        table = table.filter(pc.invert(pc.is_in(orders, value_set=removed)))  # pyright: ignore
    return table


def write_dropped(path: Path, rows: list[dict[str, str | None]]) -> None:
    write_table(path, pa.Table.from_pylist(rows, schema=schema.DROPPED))


def write_counts(path: Path, counts: Counter[int]) -> None:
    kind = pa.schema([("value", pa.int64()), ("count", pa.int64())])
    write_table(path, pa.table({"value": sorted(counts), "count": [counts[v] for v in sorted(counts)]}, schema=kind))


def sum_counts(work: Work, step: str, partitions: int) -> Counter[int]:
    total: Counter[int] = Counter()
    for partition in range(partitions):
        table = pq.read_table(work.table(step, partition))
        total.update(dict(zip(table["value"].to_pylist(), table["count"].to_pylist(), strict=True)))
    return total
