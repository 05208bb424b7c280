"""Counts per synset -> the classes: synsets frequent enough, the most frequent first; or those of a frozen vocabulary.

    --min-count 50                 synsets of at least 50 images
    --vocabulary-size 28000        the threshold whose number of synsets is nearest to 28,000
    --vocabulary SHARDS|FILE       the classes of another set, index by index, whatever this corpus holds of them

A vocabulary file names itself: its schema carries a format number, a hash of all synsets of the WordNet it was made
with and a hash of its rows, so that a label index never changes its meaning unseen.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import shardset
from data_pipeline.errors import DataError, UsageError
from data_pipeline.files import sha256_file
from data_pipeline.shardset import VOCABULARY_SCHEMA, VocabularyEntry
from data_pipeline.wordnet import WordNet

FORMAT: Final = 1
AUTO_SHARE: Final = 1000  # "auto" keeps synsets that one image in a thousand has …
AUTO_RANGE: Final = (1, 50)  # … within these counts; 50 is the suggestion of recipes §5.2 for small corpora


@dataclass(frozen=True)
class Classes:
    """The classes of a shard set, by index, and the rows of the WordNet table they stand for."""

    entries: list[VocabularyEntry]
    rows: list[int]
    minimum: int  # images that a synset had to have; 0 for a frozen vocabulary


def minimum_count(asked: str, images: int) -> int:
    """Images a synset needs: a number, or `auto` from the number of images that have a synset at all."""
    if asked == "auto":
        low, high = AUTO_RANGE
        return min(high, max(low, images // AUTO_SHARE))
    try:
        number = int(asked)
    except ValueError:
        number = 0
    if number < 1:
        raise UsageError(f"--min-count must be `auto` or a whole number from 1, not {asked!r}")
    return number


def minimum_for_size(counts: Mapping[int, int], size: int) -> int:
    """The count from which synsets are classes, so that their number is as near to `size` as it can be.

    Synsets with equal counts are all classes or none is. Of two thresholds equally far off, the higher one: fewer
    classes with more images each. At least the most frequent synsets remain.
    """
    if size < 1:
        raise UsageError(f"--vocabulary-size must be a whole number from 1, not {size}")
    best, classes = 1, 0
    for count, synsets in sorted(Counter(counts.values()).items(), reverse=True):
        if count < 1:
            break
        if classes and abs(classes + synsets - size) >= abs(classes - size):
            break
        best, classes = count, classes + synsets
    return best


def choose_minimum(counts: Mapping[int, int], images: int, min_count: str, size: int | None) -> int:
    """With a target size, a minimum count given as a number is the least; `auto` leaves all to the size."""
    if size is None:
        return minimum_count(min_count, images)
    least = 1 if min_count == "auto" else minimum_count(min_count, images)
    return max(least, minimum_for_size(counts, size))


def choose(counts: Mapping[int, int], minimum: int, wordnet: WordNet) -> Classes:
    """Synsets of at least `minimum` images; equal counts are ordered by wnid."""
    frequent = [(count, wordnet.synset(row), row) for row, count in counts.items() if count >= minimum]
    frequent.sort(key=lambda item: (-item[0], item[1].wnid))
    entries = [
        VocabularyEntry(index, synset.name, synset.wnid, synset.lemmas, synset.gloss, count)
        for index, (count, synset, _) in enumerate(frequent)
    ]
    return Classes(entries, [row for _, _, row in frequent], minimum)


def reuse(frozen: Path, counts: Mapping[int, int], wordnet: WordNet) -> Classes:
    """The classes of another set, with the images of this corpus; a class without images stays."""
    entries = read(frozen, wordnet)
    rows = wordnet.synsets["synset"].to_pylist()
    position = {name: row for row, name in enumerate(rows)}
    found = [position[entry.synset] for entry in entries]
    return Classes(
        [
            VocabularyEntry(
                entry.index, entry.synset, entry.wnid, entry.lemmas, entry.gloss, counts.get(row, 0),
                entry.count if entry.frozen_count is None else entry.frozen_count,
            )
            for entry, row in zip(entries, found, strict=True)
        ],
        found,
        0,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- file


def write(path: Path, entries: Iterable[VocabularyEntry], wordnet: WordNet) -> str:
    """Write the file and return its sha256."""
    rows = [asdict(entry) for entry in entries]
    facts = {"format": str(FORMAT), "wordnet": identity(wordnet), "digest": _digest(rows)}
    shardset.write_table(path, pa.Table.from_pylist(rows, schema=VOCABULARY_SCHEMA.with_metadata(facts)))
    return sha256_file(path)


def locate(path: Path) -> Path:
    """The vocabulary file of a shard set, or the file itself."""
    file = path / "vocabulary.parquet" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"--vocabulary {path}: no such file; name a shard set or a vocabulary.parquet of one")
    return file


def read(path: Path, wordnet: WordNet) -> list[VocabularyEntry]:
    """The classes of a vocabulary file. Raises DataError if it is damaged or of another WordNet."""
    file = locate(path)
    try:
        table = pq.read_table(file)
        facts = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
        rows: list[dict[str, Any]] = table.cast(_schema_of(table), safe=True).to_pylist()
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise DataError(f"--vocabulary {file} cannot be read ({error}); name a vocabulary.parquet") from None
    if "digest" not in facts:
        raise DataError(
            f"--vocabulary {file} does not say which WordNet it was made with: it is no vocabulary or one of an older "
            "version; build its shard set again"
        )
    if not facts.get("format", "").isdecimal() or int(facts["format"]) > FORMAT:
        raise DataError(f"--vocabulary {file} has format {facts.get('format')!r}, this version reads up to {FORMAT}")
    if _digest(rows) != facts["digest"]:
        raise DataError(f"--vocabulary {file} was changed after it was written: its digest does not fit")
    if facts.get("wordnet") != identity(wordnet):
        raise DataError(
            f"--vocabulary {file} was made with another WordNet than the one of this installation: synsets have other "
            "names there; use the version of the software that made it"
        )
    return [VocabularyEntry(**row) for row in rows]


def recount(path: Path, target: Path, fewer: Mapping[int, int]) -> None:
    """The same classes with so many images less each, by index."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row in rows:
        row["count"] -= fewer.get(row["index"], 0)
    facts = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
    if "digest" in facts:
        facts["digest"] = _digest(rows)
    shardset.write_table(target, pa.Table.from_pylist(rows, schema=table.schema.with_metadata(facts or None)))


def identity(wordnet: WordNet) -> str:
    """A hash of all synsets by name and id: glosses and translations may differ, meanings of names may not."""
    digest = hashlib.sha256()
    for name, wnid in zip(wordnet.synsets["synset"].to_pylist(), wordnet.synsets["wnid"].to_pylist(), strict=True):
        digest.update(f"{wnid} {name}\n".encode())
    return digest.hexdigest()


def _schema_of(table: pa.Table) -> pa.Schema:
    if table.schema.names != VOCABULARY_SCHEMA.names:
        raise ValueError(f"its columns are {', '.join(table.schema.names)}")
    return VOCABULARY_SCHEMA


def _digest(rows: list[dict[str, Any]]) -> str:
    text = json.dumps([[row[name] for name in VOCABULARY_SCHEMA.names] for row in rows], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
