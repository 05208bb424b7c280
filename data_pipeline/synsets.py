"""Hashtags -> synsets: which sense a tag gets, and how many tags had none or several.

Class = synset, so synonyms merge by themselves: #brownbear and #ursusarctos both give brown_bear.n.01. Synsets that
share an ambiguous tag are never merged: that would glue unrelated classes together.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from data_pipeline.wordnet import WordNet


@dataclass(frozen=True)
class Mapped:
    """Synset rows per image, each once, in the order of the hashtags; the numbers count hashtags, not images."""

    synsets: list[list[int]]
    counts: dict[str, int]


def first_sense(senses: list[int]) -> int | None:
    """Policy `first`: the sense WordNet lists first, the most frequent one in its tagged texts."""
    return senses[0] if senses else None


def map_hashtags(hashtags: Sequence[list[str]], wordnet: WordNet) -> Mapped:
    """Look up each distinct tag of the batch once."""
    tags = pa.array(hashtags, pa.list_(pa.string())).flatten().dictionary_encode()
    senses = [wordnet.senses(tag) for tag in tags.dictionary.to_pylist()]
    chosen = [first_sense(candidates) for candidates in senses]
    used = Counter(tags.indices.to_pylist())
    per_tag = dict(zip(tags.dictionary.to_pylist(), chosen, strict=True))
    synsets = [list(dict.fromkeys(s for tag in row if (s := per_tag[tag]) is not None)) for row in hashtags]
    return Mapped(
        synsets,
        {
            "hashtags": len(tags),
            "mapped_hashtags": sum(n for tag, n in used.items() if chosen[tag] is not None),
            "unmapped_hashtags": sum(n for tag, n in used.items() if chosen[tag] is None),
            "ambiguous_hashtags": sum(n for tag, n in used.items() if len(senses[tag]) > 1),
        },
    )
