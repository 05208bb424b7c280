"""Steps resolve, gather and remove: which of the pairs that were found costs whom its place, and the tables of that.

Who is preferred: the picture with more pixels, then the one that comes earlier in the input, then by key.
"""

import contextlib
import functools
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from data_pipeline import dedup, hashtags, images, schema
from data_pipeline.dedup import Ints, Pairs
from data_pipeline.evaluation_sets import content_hash
from data_pipeline.job import Counts
from data_pipeline.look import SIZE as LOOK
from data_pipeline.shardset import MAX_JSON, write_table
from data_pipeline.steps import Work
from data_pipeline.steps.duplicates import (
    ITEMS,
    NEAR_LOOK,
    PAIRS,
    Search,
    file_path,
    fixed,
    read_batch,
    write_batches,
)

SHOWN_PAIRS: Final = 100  # with thumbnails
THUMBNAIL: Final = 96  # pixels
THUMBNAIL_QUALITY: Final = 80
ROWS: Final = 10_000  # of a row group of the verdicts
OTHER_CAPTIONS: Final = 32  # that a picture takes over from its copies; with their hashtags they must fit the json
MERGED_TEXT: Final = MAX_JSON // 24  # characters of these captions, six bytes each at worst
MERGED_HASHTAGS: Final = MAX_JSON // 16  # characters

VERDICTS: Final = pa.schema(
    [
        ("id", pa.int64()),
        ("kept_id", pa.int64()),  # null for evaluation images
        ("key", pa.string()),
        ("reason", pa.string()),
        ("kept", pa.string()),
        ("distance", pa.int32()),
    ]
)
TEXTS: Final = pa.schema(
    [
        ("kept_id", pa.int64()),
        ("task", pa.int32()),
        ("row", pa.int64()),
        ("caption", pa.string()),
        ("hashtags", pa.list_(pa.string())),
    ]
)


MERGED: Final = pa.schema(
    [("order", pa.binary()), ("hashtags", pa.list_(pa.string())), ("other_captions", pa.list_(pa.string()))]
)
DUPLICATES: Final = pa.schema(
    [
        ("key", pa.string()),  # removed
        ("kept", pa.string()),
        ("kind", pa.string()),  # exact, near
        ("distance", pa.int32()),
        ("picture", pa.binary()),  # small jpg of the removed and the kept one, for some pairs
        ("kept_picture", pa.binary()),
    ]
)
EVALUATION_COPIES: Final = pa.schema(
    [
        ("set", pa.string()),
        ("set_sha256", pa.string()),  # over the sorted sha256 of its pictures
        ("item", pa.string()),  # each picture of the set, at least once
        ("content_sha256", pa.binary()),
        ("kind", pa.string()),  # exact, near; null: no copy in the training data
        ("training_key", pa.string()),
        ("distance", pa.int32()),
        ("action", pa.string()),  # removed, reported
        ("problem", pa.string()),  # why only exact copies could be looked for, or none
    ]
)


def resolve(work: Work, search: Search) -> Counts:
    """Who is removed, and why; the tables and the summary of that for the shard set."""
    corpus = Corpus(work, search)
    pairs = _alike(corpus, _read_pairs(work, search.blocks))
    matches = _matches(corpus, pairs, search)
    taken = np.unique(matches.record) if search.remove_evaluation else np.empty(0, np.int64)
    copies = _copies(corpus, pairs, taken, search.limits.near) if search.remove_copies else Copies.none()
    keys = _Keys(work, search, np.concatenate([copies.record, copies.kept, matches.record]))
    items = [ITEMS.empty_table(), *(pq.read_table(work.table("evaluation_items", n)) for n in range(search.pieces))]
    sets = _Sets(search, pa.concat_tables(items))
    if search.sets:
        write_table(work.evaluation, _evaluation_table(sets, matches, keys))
    if search.remove_copies:
        write_table(work.duplicates, _duplicates_table(work, search, copies, keys))
    verdicts = [_copy_verdicts(copies, keys)]
    if search.remove_evaluation:
        verdicts.append(_evaluation_verdicts(sets, matches, keys))
    table = pa.concat_tables(verdicts).sort_by("id")
    write_table(work.table("verdicts", 0), table, ROWS)
    reasons = Counter(table["reason"].to_pylist())
    return {"dropped": dict(sorted(reasons.items())), "contamination": sets.summary(matches)}


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Corpus:
    """The groups, a bucket at a time; within a group the members come in the order of preference, training first."""

    work: Work
    search: Search

    def buckets(self, columns: list[str]) -> Iterator[pa.Table]:
        for bucket in range(self.search.buckets):
            yield pq.read_table(self.work.table("groups", bucket), columns=columns)

    def rows(self, columns: list[str], wanted: Callable[[pa.Table], NDArray[np.bool_]]) -> pa.Table:
        found = [table.filter(pa.array(wanted(table))) for table in self.buckets(columns)]
        return pa.concat_tables(found).combine_chunks()

    @functools.cached_property
    def evaluation(self) -> pa.Table:
        """All evaluation pictures that could be read."""
        return self.rows(["id", "group", "content", "set"], lambda table: table["set"].to_numpy() >= 0)


def _read_pairs(work: Work, blocks: int) -> Pairs:
    parts = [PAIRS.empty_table()]
    for number in range(blocks):
        with pa.memory_map(str(file_path(work, "pairs", number))) as file:
            parts.append(pa.ipc.open_file(file).read_all())
    table = pa.concat_tables(parts)
    return Pairs(*(table[name].to_numpy() for name in ("first", "second", "distance")))


def _alike(corpus: Corpus, pairs: Pairs) -> Pairs:
    """The pairs that look alike too."""
    involved = np.unique(np.concatenate([pairs.first, pairs.second]))
    rows = corpus.rows(["id", "look"], lambda table: np.isin(table["id"].to_numpy(), involved))
    order = np.argsort(rows["id"].to_numpy())
    look = fixed(rows["look"], LOOK)[order]
    near = np.zeros(len(pairs.first), bool)
    for start in range(0, len(near), ROWS):
        part = slice(start, start + ROWS)
        first, second = (look[np.searchsorted(involved, ids[part])] for ids in (pairs.first, pairs.second))
        near[part] = dedup.looks_apart(first, second) <= NEAR_LOOK
    return Pairs(pairs.first[near], pairs.second[near], pairs.distance[near])


class _Keys:
    """The keys of some records."""

    def __init__(self, work: Work, search: Search, ids: Ints) -> None:
        self.ids = np.unique(ids)
        self.keys = pa.chunked_array(
            [part["key"].combine_chunks() for part in _pick(work, search, self.ids, ["key"])], pa.string()
        )

    def of(self, ids: Ints) -> pa.ChunkedArray:
        return self.keys.take(pa.array(np.searchsorted(self.ids, ids)))


def _pick(work: Work, search: Search, ids: Ints, columns: list[str]) -> Iterator[pa.Table]:
    """These columns of records, whose numbers ascend."""
    edges = np.searchsorted(ids, search.starts)
    for partition in range(search.partitions):
        inside = ids[edges[partition] : edges[partition + 1]]
        if len(inside):
            table = pq.read_table(work.table("unique", partition), columns=columns)
            yield table.take(pa.array(inside - search.starts[partition]))


# -------------------------------------------------------------------------------------------------- evaluation pictures


@dataclass(frozen=True)
class Matches:
    """Copies of evaluation pictures: per record and set its nearest one, and per picture its nearest record."""

    item: Ints
    record: Ints
    set: Ints
    exact: NDArray[np.bool_]
    distance: Ints

    def __len__(self) -> int:
        return len(self.item)

    def take(self, rows: Ints) -> "Matches":
        return Matches(self.item[rows], self.record[rows], self.set[rows], self.exact[rows], self.distance[rows])

    def best_of(self, *of: Ints) -> Ints:
        """The row of the nearest match for each value of `of`; ~item and record ascend in the order of the input."""
        order = np.lexsort((self.record, ~self.item, self.set, self.distance, ~self.exact, *of))
        changed = [column[order][1:] != column[order][:-1] for column in of]
        return order[np.r_[True, np.any(changed, axis=0)]] if len(order) else order


def _matches(corpus: Corpus, pairs: Pairs, search: Search) -> Matches:
    items = corpus.evaluation
    item_groups = items["group"].to_numpy()
    tested = np.unique(item_groups)
    near = pairs.distance.astype(np.int64) <= search.limits.evaluation
    edges = [(tested[tested >= 0], tested[tested >= 0], np.zeros(np.count_nonzero(tested >= 0), np.int64))]
    for mine, theirs in ((pairs.first, pairs.second), (pairs.second, pairs.first)):
        across = near & np.isin(mine, tested) & (theirs >= 0)
        edges.append((mine[across], theirs[across], pairs.distance[across].astype(np.int64)))
    of_items, of_records, distances = (np.concatenate(column) for column in zip(*edges, strict=True))
    groups = np.unique(of_records)
    records = corpus.rows(
        ["id", "group", "content"],
        lambda table: (table["id"].to_numpy() >= 0) & np.isin(table["group"].to_numpy(), groups),
    )
    left, right, edge = _products(item_groups, of_items, records["group"].to_numpy(), of_records)
    exact = (fixed(items["content"], dedup.BYTES)[left] == fixed(records["content"], dedup.BYTES)[right]).all(axis=1)
    found = Matches(
        items["id"].to_numpy()[left],
        records["id"].to_numpy()[right],
        items["set"].to_numpy()[left].astype(np.int64),
        exact,
        np.where(exact, 0, distances[edge]),
    )
    found = found.take(np.flatnonzero(exact | (found.distance <= search.limits.evaluation)))
    return found.take(np.union1d(found.best_of(found.set, found.record), found.best_of(found.item)))


def _products(left: Ints, of_left: Ints, right: Ints, of_right: Ints) -> tuple[Ints, Ints, Ints]:
    """For each n, all rows of `left` equal to of_left[n] with all of `right` equal to of_right[n]; and that n."""
    order_left, order_right = np.argsort(left, kind="stable"), np.argsort(right, kind="stable")
    low_left, high_left = (np.searchsorted(left[order_left], of_left, side) for side in ("left", "right"))
    low_right, high_right = (np.searchsorted(right[order_right], of_right, side) for side in ("left", "right"))
    width = high_right - low_right
    size = (high_left - low_left) * width
    edge = np.repeat(np.arange(len(size)), size)
    within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    rows_left = order_left[low_left[edge] + within // np.maximum(width[edge], 1)]
    return rows_left, order_right[low_right[edge] + within % np.maximum(width[edge], 1)], edge


@dataclass(frozen=True)
class _Sets:
    """The evaluation sets with all their pictures."""

    search: Search
    items: pa.Table

    @functools.cached_property
    def hashes(self) -> list[str]:
        return [content_hash(self._of(number)["content"].drop_null().to_pylist()) for number in self._numbers]

    @property
    def action(self) -> str:
        return "removed" if self.search.remove_evaluation else "reported"

    @property
    def _numbers(self) -> range:
        return range(len(self.search.sets))

    def _of(self, number: int) -> pa.Table:
        return self.items.filter(pa.array(self.items["set"].to_numpy() == number))

    def summary(self, matches: Matches) -> list[dict[str, Any]]:
        return [self._summary(number, matches) for number in self._numbers]

    def _summary(self, number: int, matches: Matches) -> dict[str, Any]:
        items = self._of(number)
        mine = matches.take(np.flatnonzero(matches.set == number))
        exact = set(mine.item[mine.exact].tolist())
        near = set(mine.item.tolist()) - exact
        return {
            "set": self.search.sets[number],
            "sha256": self.hashes[number],
            "pictures": len(items),
            "unreadable": items["problem"].drop_null().length(),
            "exact": len(exact),
            "near": len(near),
            "training_images": len(np.unique(mine.record)),
            "action": self.action,
            "near_distance": self.search.limits.evaluation if self.search.limits.evaluation >= 0 else None,
        }


def _evaluation_table(sets: _Sets, matches: Matches, keys: _Keys) -> pa.Table:
    """Every picture of the sets in the order they came, with its copies."""
    items = sets.items
    position = {item: row for row, item in enumerate(items["id"].to_pylist())}
    rows = np.array([position[item] for item in matches.item.tolist()], np.int64)
    without = np.setdiff1d(np.arange(len(items)), rows)
    order = np.lexsort((matches.record, matches.distance, ~matches.exact, rows))
    place = np.concatenate([rows[order], without])
    none = pa.nulls(len(without))
    columns = {
        "kind": pa.array(np.where(matches.exact[order], "exact", "near"), pa.string()),
        "training_key": keys.of(matches.record[order]).combine_chunks(),
        "distance": pa.array(matches.distance[order], pa.int32()),
        "action": pa.array([sets.action] * len(order), pa.string()),
    }
    columns = {name: pa.concat_arrays([column, none.cast(column.type)]) for name, column in columns.items()}
    listed = items.take(pa.array(place))
    numbers = listed["set"].to_pylist()
    columns |= {
        "set": pa.array([sets.search.sets[number] for number in numbers], pa.string()),
        "set_sha256": pa.array([sets.hashes[number] for number in numbers], pa.string()),
        "item": listed["name"],
        "content_sha256": listed["content"],
        "problem": listed["problem"],
    }
    table = pa.table([columns[name] for name in EVALUATION_COPIES.names], schema=EVALUATION_COPIES)
    return table.take(pa.array(np.argsort(place, kind="stable")))


def _evaluation_verdicts(sets: _Sets, matches: Matches, keys: _Keys) -> pa.Table:
    nearest = matches.take(matches.best_of(matches.record))
    names = dict(zip(sets.items["id"].to_pylist(), sets.items["name"].to_pylist(), strict=True))
    copied = [
        f"{sets.search.sets[number]}: {names[item]}"
        for number, item in zip(nearest.set.tolist(), nearest.item.tolist(), strict=True)
    ]
    columns = [
        nearest.record,
        pa.nulls(len(nearest), pa.int64()),
        keys.of(nearest.record),
        ["evaluation_image"] * len(nearest),
        copied,
        nearest.distance,
    ]
    return pa.table(columns, schema=VERDICTS)


# -------------------------------------------------------------------------------------------------------------- copies


@dataclass(frozen=True)
class Copies:
    """Records that go because of one that stays."""

    record: Ints
    kept: Ints
    exact: NDArray[np.bool_]
    distance: Ints

    @staticmethod
    def none() -> "Copies":
        nothing = np.empty(0, np.int64)
        return Copies(nothing, nothing, nothing.astype(bool), nothing)


def _copies(corpus: Corpus, pairs: Pairs, taken: Ints, limit: int) -> Copies:
    """`taken` is out already. Without a limit only equal bytes count."""
    training = (pairs.first >= 0) & (pairs.second >= 0) & (pairs.distance.astype(np.int64) <= limit)
    pairs = Pairs(pairs.first[training], pairs.second[training], pairs.distance[training])
    involved = np.unique(np.concatenate([pairs.first, pairs.second]))
    stars, best = _stars(corpus, taken, involved, by_content=limit < 0)
    ranked = best["group"][np.lexsort((best["id"], best["row"], best["task"], -best["pixels"]))]
    places = np.full(len(involved), -1, np.int64)  # in the order of preference
    places[np.searchsorted(involved, ranked)] = np.arange(len(ranked))
    first, second = (places[np.searchsorted(involved, ids)] for ids in (pairs.first, pairs.second))
    there = (first >= 0) & (second >= 0)  # else evaluation images took the whole group
    chosen = dedup.choose(Pairs(first[there], second[there], pairs.distance[there]), len(ranked))
    lost, kept, distance = ranked[chosen[0]], ranked[chosen[1]], chosen[2].astype(np.int64)
    order = np.argsort(lost)
    lost, kept, distance = lost[order], kept[order], distance[order]
    names = dict(zip(best["group"].tolist(), best["id"].tolist(), strict=True))
    kept = np.array([names[number] for number in kept.tolist()], np.int64)
    place = np.minimum(np.searchsorted(lost, stars["group"]), max(0, len(lost) - 1))
    gone = lost[place] == stars["group"] if len(lost) else np.zeros(len(stars["group"]), bool)
    record = np.concatenate([stars["id"], np.array([names[number] for number in lost.tolist()], np.int64)])
    star_kept, star_distance = stars["best"].copy(), np.zeros(len(gone), np.int64)
    star_kept[gone], star_distance[gone] = kept[place[gone]], distance[place[gone]]
    return Copies(
        record,
        np.concatenate([star_kept, kept]),
        np.concatenate([stars["exact"] & ~gone, np.zeros(len(lost), bool)]),
        np.concatenate([star_distance, distance]),
    )


def _stars(
    corpus: Corpus, taken: Ints, involved: Ints, by_content: bool
) -> tuple[dict[str, NDArray[Any]], dict[str, Ints]]:
    """Those who are not the best of their group, and the best of the groups asked for."""
    stars: list[dict[str, Any]] = []
    best: list[dict[str, Any]] = []
    for table in corpus.buckets(["id", "group", "content", "pixels", "task", "row"]):
        ids = table["id"].to_numpy()
        table = table.filter(pa.array((ids >= 0) & ~np.isin(ids, taken)))
        ids, groups = table["id"].to_numpy(), table["group"].to_numpy()
        content = fixed(table["content"], dedup.BYTES)
        first = _first_of(content.view("V32").ravel() if by_content else groups)
        rest = np.flatnonzero(first != np.arange(len(first)))
        at = first[rest]
        exact = (content[rest] == content[at]).all(axis=1)
        stars.append({"id": ids[rest], "group": groups[rest], "best": ids[at], "exact": exact})
        wanted = np.flatnonzero((_first_of(groups) == np.arange(len(groups))) & np.isin(groups, involved))
        best.append({name: table[name].to_numpy()[wanted] for name in ("id", "group", "pixels", "task", "row")})
    return tuple({name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in (stars, best))  # type: ignore[return-value]


def _first_of(values: NDArray[Any]) -> Ints:
    """For each row the first one with its value."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse.ravel()]


def _copy_verdicts(copies: Copies, keys: _Keys) -> pa.Table:
    reasons = np.where(copies.exact, "exact_duplicate", "near_duplicate")
    columns = [copies.record, copies.kept, keys.of(copies.record), reasons, keys.of(copies.kept), copies.distance]
    return pa.table(columns, schema=VERDICTS)


def _duplicates_table(work: Work, search: Search, copies: Copies, keys: _Keys) -> pa.Table:
    """All that were removed, in the order of samples; pictures of some pairs, which their keys choose."""
    order = np.argsort(copies.record)
    record, kept = copies.record[order], copies.kept[order]
    names, kept_names = keys.of(record).to_pylist(), keys.of(kept).to_pylist()
    draws = [
        (hashlib.sha256(f"{name}\n{other}".encode()).digest(), row)
        for row, (name, other) in enumerate(zip(names, kept_names, strict=True))
    ]
    shown = [row for _, row in sorted(draws)[:SHOWN_PAIRS]]
    pictures = _thumbnails(work, search, np.unique(np.concatenate([record[shown], kept[shown]])))
    of = {row: (pictures.get(int(record[row])), pictures.get(int(kept[row]))) for row in shown}
    columns = [
        names,
        kept_names,
        np.where(copies.exact[order], "exact", "near"),
        copies.distance[order],
        [of.get(row, (None, None))[0] for row in range(len(record))],
        [of.get(row, (None, None))[1] for row in range(len(record))],
    ]
    return pa.table(columns, schema=DUPLICATES)


def _thumbnails(work: Work, search: Search, ids: Ints) -> dict[int, bytes]:
    tables = _pick(work, search, ids, ["image_path", "image_offset", "image_size"])
    rows = (row for table in tables for row in table.to_pylist())
    found: dict[int, bytes] = {}
    for number, row in zip(ids.tolist(), rows, strict=True):
        with contextlib.suppress(OSError, images.BadImage), Path(row["image_path"]).open("rb") as file:
            file.seek(row["image_offset"])
            picture = images.decode(file.read(row["image_size"]))
            picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            picture.save(buffer, "jpeg", quality=THUMBNAIL_QUALITY)
            found[number] = buffer.getvalue()
    return found


# ---------------------------------------------------------------------------------------------------- gather and remove


def gather(work: Work, search: Search, partition: int) -> Counts:
    """Texts of the copies of a partition, laid down for the partitions of those that stay."""
    verdicts = _verdicts(work, search, partition)
    verdicts = verdicts.filter(verdicts["kept_id"].is_valid())
    rows = pa.array(verdicts["id"].to_numpy() - search.starts[partition])
    table = pq.read_table(work.table("unique", partition), columns=TEXTS.names[1:]).take(rows)
    texts = pa.table([verdicts["kept_id"], *table.columns], schema=TEXTS)
    kept = np.searchsorted(search.starts, verdicts["kept_id"].to_numpy(), side="right") - 1
    bucket = kept * search.buckets // search.partitions
    parts = (texts.filter(pa.array(bucket == number)) for number in range(search.buckets))
    write_batches(file_path(work, "texts", partition), TEXTS, parts)
    return {}


def remove(work: Work, search: Search, partition: int) -> Counts:
    """What later steps leave out of a partition, and the captions and hashtags of it that changed."""
    verdicts = _verdicts(work, search, partition)
    rows = pa.array(verdicts["id"].to_numpy() - search.starts[partition])
    orders = pq.read_table(work.table("unique", partition), columns=["order"])["order"].take(rows)
    columns = [orders, *(verdicts[name] for name in schema.REMOVED.names[1:])]
    write_table(work.table("removed", partition), pa.table(columns, schema=schema.REMOVED))
    if search.merge_captions:
        write_table(work.table("merged", partition), _merged(work, search, partition))
    return {}


def _verdicts(work: Work, search: Search, partition: int) -> pa.Table:
    start, stop = search.starts[partition : partition + 2]
    with pq.ParquetFile(work.table("verdicts", 0)) as file:
        spans = [file.metadata.row_group(n).column(0).statistics for n in range(file.num_row_groups)]
        groups = [n for n, span in enumerate(spans) if span is not None and span.min < stop and span.max >= start]
        return _between(file.read_row_groups(groups), "id", start, stop)


def _between(table: pa.Table, name: str, start: int, stop: int) -> pa.Table:
    ids = table[name].to_numpy()
    return table.filter(pa.array((ids >= start) & (ids < stop)))


def _merged(work: Work, search: Search, partition: int) -> pa.Table:
    start, stop = search.starts[partition : partition + 2]
    bucket = partition * search.buckets // search.partitions
    batches = [read_batch(file_path(work, "texts", n), bucket) for n in range(search.partitions)]
    texts = _between(pa.Table.from_batches(batches, TEXTS), "kept_id", start, stop)
    texts = texts.sort_by([(name, "ascending") for name in ("kept_id", "task", "row")])
    of: dict[int, list[dict[str, Any]]] = {}
    for text in texts.to_pylist():
        of.setdefault(text["kept_id"], []).append(text)
    kept = pq.read_table(work.table("unique", partition), columns=["order", "caption", "hashtags"])
    kept = kept.take(pa.array([number - start for number in of], pa.int64())).to_pylist()
    rows = [_merge(record, copies) for record, copies in zip(kept, of.values(), strict=True)]
    return pa.Table.from_pylist(rows, schema=MERGED)


def _merge(record: dict[str, Any], copies: list[dict[str, Any]]) -> dict[str, Any]:
    """The union of hashtags, and the other captions, both in the order of the input and each once."""
    tags = hashtags.unique([*record["hashtags"], *(tag for copy in copies for tag in copy["hashtags"])])
    captions = dict.fromkeys(copy["caption"] for copy in copies if copy["caption"])
    captions.pop(record["caption"], None)
    return {
        "order": record["order"],
        "hashtags": record["hashtags"] + _fitting(tags[len(record["hashtags"]) :], MERGED_HASHTAGS),
        "other_captions": _fitting(list(captions)[:OTHER_CAPTIONS], MERGED_TEXT),
    }


def _fitting(texts: list[str], characters: int) -> list[str]:
    """As many from the start as fit."""
    ends = np.cumsum([len(text) for text in texts])
    return texts[: int(np.searchsorted(ends, characters, side="right"))]
