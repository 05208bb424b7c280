"""Counts per synset -> the classes: synsets frequent enough, the most frequent first."""

from collections import Counter
from typing import Final

from data_pipeline.errors import UsageError
from data_pipeline.shardset import VocabularyEntry
from data_pipeline.wordnet import WordNet

AUTO_SHARE: Final = 1000  # "auto" keeps synsets that one image in a thousand has …
AUTO_RANGE: Final = (1, 50)  # … within these counts; 50 is the suggestion of recipes §5.2 for small corpora


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


def build_vocabulary(
    counts: Counter[int], minimum: int, wordnet: WordNet
) -> tuple[list[VocabularyEntry], dict[int, int]]:
    """The entries, and synset row -> index; equal counts are ordered by wnid."""
    frequent = [(count, wordnet.synset(row), row) for row, count in counts.items() if count >= minimum]
    frequent.sort(key=lambda item: (-item[0], item[1].wnid))
    entries = [
        VocabularyEntry(index, synset.name, synset.wnid, synset.lemmas, synset.gloss, count)
        for index, (count, synset, _) in enumerate(frequent)
    ]
    return entries, {row: index for index, (_, _, row) in enumerate(frequent)}
