"""What the tables beside the shards say, for the data page; None for a table that a set has not (older sets have few).

Tables may be longer than memory: they are read in pieces, and no further than the page has room for.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.report_survey import find_keys, picture, thumbnail
from data_pipeline.report_words import REASONS
from data_pipeline.shardset import ShardSet, verify_tables

EXAMPLES: Final = 6  # of each reason
LOOKED_AT: Final = 2_000_000  # rows of a table; its numbers beyond come from the manifest
TAGS: Final = 30
PAIRS: Final = 18  # of pictures, shown
LINES: Final = 20


@dataclass
class Reason:
    code: str
    words: str
    count: int
    examples: list[dict[str, Any]] = field(default_factory=list)


def check(shards: ShardSet) -> None:
    """Refuse tables that are not the manifest's, before anything is read from them."""
    for problem in verify_tables(shards.path, shards.manifest):
        raise DataError(f"{problem}; build the shard set again")


def read(shards: ShardSet, name: str) -> Iterator[dict[str, list[Any]]] | None:
    """A table in pieces of columns; None if the set has none."""
    return _pieces(shards.path / name) if name in shards.manifest.get("files", {}) else None


def _pieces(path: Path) -> Iterator[dict[str, list[Any]]]:
    rows = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(10_000):
                yield batch.to_pydict()
                rows += len(batch)
                if rows >= LOOKED_AT:
                    return
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path} ({error}); build the shard set again") from None


def _rows(pieces: Iterator[dict[str, list[Any]]]) -> Iterator[dict[str, Any]]:
    for columns in pieces:
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


# --------------------------------------------------------------------------------------------------------------- drops


def drops(shards: ShardSet) -> list[Reason]:
    """Every reason with its number from the manifest, and examples where the set has a list."""
    counts: Mapping[str, int] = shards.manifest["counts"]["dropped"]
    reasons = {
        code: Reason(code, REASONS.get(code, code.replace("_", " ")), number)
        for code, number in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if number
    }
    pieces = read(shards, "dropped.parquet")
    if pieces is not None:
        wanted = {code: min(EXAMPLES, reason.count) for code, reason in reasons.items()}
        for row in _rows(pieces):
            if wanted.get(row["reason"]):
                reasons[row["reason"]].examples.append(row)
                wanted[row["reason"]] -= 1
            elif not any(wanted.values()):
                break
    return list(reasons.values())


# ---------------------------------------------------------------------------------------------------------------- tags


@dataclass(frozen=True)
class Tag:
    """A hashtag with several senses."""

    name: str
    occurrences: int
    senses: list[tuple[str, int]]  # those that were chosen, the most frequent first
    candidates: int
    confidence: float | None
    left_out: int  # occurrences that got none
    at_risk: float  # occurrences that got a wrong sense, as far as one can say


@dataclass
class Tags:
    risky: list[Tag] = field(default_factory=list)
    nameless: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # reason -> tags
    words: dict[str, str] = field(default_factory=dict)
    distinct: Counter[str] = field(default_factory=Counter)
    occurrences: Counter[str] = field(default_factory=Counter)
    measured: bool = False  # whether the risk is the sense model's
    missed: bool = False  # whether the table is longer than what was read


ONE, SEVERAL = "one sense", "several senses"
TAG_REASONS: Final = {
    "unmapped": "no noun of WordNet",
    "forbidden": "forbidden by the overrides",
    "denied_non_visual": "on the deny-list: not to be seen",
    "denied_sensitive": "on the deny-list: sensitive",
    "ambiguous": "several senses, which the policy leaves out",
}


def tags(shards: ShardSet) -> Tags | None:
    pieces = read(shards, "tags.parquet")
    if pieces is None:
        return None
    result, several = Tags(measured=shards.manifest.get("parameters", {}).get("senses") == "evidence"), []
    for row in _rows(pieces):
        kind = row["reason"] or (SEVERAL if len(row["synsets"]) > 1 else ONE)
        result.distinct[kind] += 1
        result.occurrences[kind] += row["occurrences"]
        if row["reason"]:
            listed = result.nameless.setdefault(row["reason"], [])
            if len(listed) < 2 * TAGS:  # the most frequent come first
                listed.append((row["tag"], row["occurrences"]))
        elif kind == SEVERAL:
            several.append(_tag(row, result.measured))
            if len(several) > 100 * TAGS:
                several = _riskiest(several)
    result.risky = _riskiest(several)
    result.words = {ONE: ONE, SEVERAL: SEVERAL} | {
        code: TAG_REASONS.get(code, code.replace("_", " ")) for code in result.distinct if code not in (ONE, SEVERAL)
    }
    result.missed = sum(result.distinct.values()) >= LOOKED_AT
    return result


def _tag(row: dict[str, Any], measured: bool) -> Tag:
    chosen = sorted(zip(row["synsets"], row["chosen"], strict=False), key=lambda item: -item[1])
    confidence = row["confidence"] if measured else None
    doubt = 1 - confidence if confidence is not None else 1 - 1 / len(row["synsets"])
    return Tag(
        row["tag"],
        row["occurrences"],
        [(name, number) for name, number in chosen if number],
        len(row["synsets"]),
        confidence,
        max(0, row["occurrences"] - sum(row["chosen"])),
        doubt * min(row["occurrences"], sum(row["chosen"])),  # what got no sense got no wrong one
    )


def _riskiest(several: list[Tag]) -> list[Tag]:
    return sorted(several, key=lambda tag: (-tag.at_risk, -tag.occurrences, tag.name))[:TAGS]


# ---------------------------------------------------------------------------------------------------------- duplicates


@dataclass(frozen=True)
class Pair:
    removed: str
    kept: str
    kind: str
    distance: int | None
    removed_picture: str | None
    kept_picture: str | None


@dataclass
class Duplicates:
    kinds: Counter[str] = field(default_factory=Counter)
    distances: Counter[int] = field(default_factory=Counter)  # of near copies
    largest: list[tuple[str, int]] = field(default_factory=list)  # pictures with the most copies
    pairs: list[Pair] = field(default_factory=list)


def duplicates(shards: ShardSet) -> Duplicates | None:
    """Removed pictures and what they are copies of; the pairs shown are of all distances."""
    pieces = read(shards, "duplicates.parquet")
    if pieces is None:
        return None
    result = Duplicates()
    copies: Counter[str] = Counter()
    candidates: dict[tuple[bool, int], list[dict[str, Any]]] = {}  # with and without pictures, by distance
    for row in _rows(pieces):
        result.kinds[row["kind"]] += 1
        if row["kind"] == "near":
            result.distances[row["distance"]] += 1
        copies[row["kept"]] += 1
        listed = candidates.setdefault((row["picture"] is None, row["distance"] or 0), [])
        if len(listed) < PAIRS:
            listed.append(row)
    shown = _one_of_each(candidates)
    places = find_keys(shards, [row["kept"] for row in shown if row["kept_picture"] is None])
    for row in sorted(shown, key=lambda row: -(row["distance"] or 0)):
        place = places.get(row["kept"])
        result.pairs.append(
            Pair(
                row["key"],
                row["kept"],
                row["kind"],
                row["distance"],
                thumbnail(row["picture"]) if row["picture"] else None,
                thumbnail(row["kept_picture"]) if row["kept_picture"] else picture(shards, place) if place else None,
            )
        )
    result.largest = [item for item in sorted(copies.items(), key=lambda item: (-item[1], item[0]))[:10] if item[1] > 1]
    return result


def _one_of_each(candidates: Mapping[tuple[bool, int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of every distance in turn, the furthest first; those with pictures before those without."""
    shown: list[dict[str, Any]] = []
    for without in (False, True):
        lists = [candidates[key] for key in sorted(candidates, key=lambda key: -key[1]) if key[0] == without]
        for turn in range(PAIRS):
            shown += [rows[turn] for rows in lists if turn < len(rows)]
    return shown[:PAIRS]


# --------------------------------------------------------------------------------------------------- evaluation sets


@dataclass
class Contamination:
    """What the training pictures share with evaluation sets."""

    sets: list[dict[str, Any]]  # as the manifest counts them
    examples: list[tuple[dict[str, Any], str | None]] = field(default_factory=list)  # row, training picture


def contamination(shards: ShardSet) -> Contamination | None:
    """None where nothing was compared."""
    sets = shards.manifest.get("contamination")
    if not sets:
        return None
    result, shown = Contamination(sets), []
    seen: Counter[str] = Counter()
    for row in _rows(read(shards, "evaluation.parquet") or iter(())):
        if row["kind"] is not None and seen[row["set"]] < EXAMPLES:
            seen[row["set"]] += 1
            shown.append(row)
    places = find_keys(shards, [row["training_key"] for row in shown if row["action"] != "removed"])
    result.examples = [(row, picture(shards, places[key]) if (key := row["training_key"]) in places else None)
                       for row in shown]  # fmt: skip
    return result


# ------------------------------------------------------------------------------------------------------------- others


def lines(shards: ShardSet, name: str) -> tuple[int, list[str]] | None:
    """How many lines a JSONL file has, and the first of them; None without it."""
    path = shards.path / name
    if not path.is_file():
        return None
    first: list[str] = []
    number = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            number += 1
            if len(first) < LINES:
                first.append(_compact(line))
    return number, first


def _compact(line: str) -> str:
    try:
        return json.dumps(json.loads(line), ensure_ascii=False)
    except (ValueError, RecursionError):
        return line.strip()
