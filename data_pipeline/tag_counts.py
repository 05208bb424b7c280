"""What became of every hashtag: counted per partition, added up into the tags.parquet of a shard set (schema.TAGS)."""

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline import schema
from data_pipeline.compute import pc
from data_pipeline.synsets import Candidates

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

UNIT: Final = 1 << 20  # probabilities are rounded to one part of it: sums of billions of them are then exact
MOST_UNMAPPED: Final = 20_000  # tags that name nothing and are listed: people invent them without end

PART: Final = pa.schema(
    [
        ("tag", pa.string()),
        ("occurrences", pa.int64()),
        ("senses", pa.list_(pa.int32())),  # rows of the WordNet table, the most usual first
        ("chosen", pa.list_(pa.int64())),  # occurrences that got each
        ("certainty", pa.float64()),  # sum of the probabilities of what was chosen
        ("reason", pa.string()),
    ]
)


def count(candidates: Candidates, chosen: Ints | None, probability: Floats | None) -> pa.Table:
    """PART of a batch. `chosen` is the number of the sense per occurrence, -1 for none; None if all senses count."""
    used = np.bincount(candidates.tag, minlength=len(candidates.tags))
    sizes = candidates.number_of_senses
    if chosen is None:
        per_sense = np.repeat(used, sizes)
    else:
        meant = chosen >= 0
        per_sense = np.bincount(candidates.start[candidates.tag[meant]] + chosen[meant], minlength=int(sizes.sum()))
    certainty = np.zeros(len(used))
    if probability is not None:
        exact = np.rint(probability * UNIT) / UNIT  # adds up to the same however the corpus was cut
        certainty = np.bincount(candidates.tag, weights=exact, minlength=len(used))
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    columns = [
        candidates.tags,
        pa.array(used, pa.int64()),
        pa.ListArray.from_arrays(offsets, pa.array(candidates.flat, pa.int32())),
        pa.ListArray.from_arrays(offsets, pa.array(per_sense, pa.int64())),
        pa.array(certainty, pa.float64()),
        pa.array(candidates.reasons, pa.string()),
    ]
    return pa.table(columns, schema=PART)


def add(parts: Iterable[pa.Table], names: pa.StringArray) -> pa.Table:
    """schema.TAGS of several batches, frequent tags first. `names` are those of the WordNet table's rows."""
    total: pa.Table = PART.empty_table()
    for part in parts:
        total = _sum(pa.concat_tables([total, part]))
    unmapped = pc.and_(pc.is_valid(total["reason"]), pc.equal(pc.list_value_length(total["senses"]), 0))
    order = [("occurrences", "descending"), ("tag", "ascending")]
    rare = total.filter(unmapped).sort_by(order).slice(0, MOST_UNMAPPED)
    kept = pa.concat_tables([total.filter(pc.invert(unmapped)), rare]).sort_by(order).combine_chunks()
    senses = kept["senses"].combine_chunks()
    several = pc.greater(pc.list_value_length(senses), 1)
    mean = pc.divide(kept["certainty"], pc.cast(kept["occurrences"], pa.float64()))
    synsets = pa.ListArray.from_arrays(senses.offsets, names.take(senses.values))
    confidence = pc.if_else(several, mean, pa.scalar(None, pa.float64()))
    columns = [kept["tag"], kept["occurrences"], synsets, kept["chosen"], confidence, kept["reason"]]
    return pa.table(columns, schema=schema.TAGS)


def _sum(table: pa.Table) -> pa.Table:
    """One row per tag; its senses are the same in all."""
    table = table.combine_chunks()
    number = table["tag"].combine_chunks().dictionary_encode().indices.to_numpy()
    _, first = np.unique(number, return_index=True)
    rows = table.take(pa.array(first))
    sizes = pc.list_value_length(table["senses"]).to_numpy()
    starts = np.cumsum(sizes[first]) - sizes[first]  # of each tag among all senses
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    slot = np.repeat(starts[number], sizes) + within
    values = table["chosen"].combine_chunks().flatten().to_numpy()
    chosen = np.bincount(slot, weights=values, minlength=int(sizes[first].sum())).astype(np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes[first])]), pa.int32())
    sums = {
        name: np.bincount(number, weights=table[name].to_numpy(), minlength=len(first))
        for name in ("occurrences", "certainty")
    }
    columns = [
        rows["tag"],
        pa.array(sums["occurrences"].astype(np.int64)),
        rows["senses"],
        pa.ListArray.from_arrays(offsets, pa.array(chosen, pa.int64())),
        pa.array(sums["certainty"], pa.float64()),
        rows["reason"],
    ]
    return pa.table(columns, schema=PART)
