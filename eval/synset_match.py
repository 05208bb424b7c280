"""The classes of an evaluation set as synsets of a vocabulary: which outputs of a WSP head speak of which class.

    class            its synset in WordNet, found by          matched with the vocabulary's
    dog, dog.n.01    synset   given by name or id             same    dog.n.01
    golden retriever name     lemma golden_retriever          same    golden_retriever.n.01
    my old dog       ending   lemma dog                       same    dog.n.01
    dog, dog.n.01    synset                                   below   poodle.n.01, corgi.n.01     no dog.n.01 there
    corgi            name                                     above   dog.n.01                    the nearest one
    zzz              none                                     none

A class that shares its synset above with others cannot be told from them: `above` is the weakest match, and is flagged.
What a name means that has several senses: name_senses.py.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.shardset import VOCABULARY_SCHEMA, VocabularyEntry
from eval.classes import Classes
from eval.hierarchy import wordnet_hypernyms
from eval.name_senses import NameSenses

FOUND = ("synset", "name", "ending", "none")  # how a class got its synset
MATCHED = ("same", "below", "above", "none")  # how that met the vocabulary
FILE = "vocabulary.parquet"


@dataclass(frozen=True)
class Match:
    """One class."""

    label: int
    name: str
    synset: str | None  # what the class means in WordNet
    found: str  # one of FOUND
    matched: str  # one of MATCHED
    synsets: tuple[str, ...]  # of the vocabulary
    indices: tuple[int, ...]  # of these: outputs of the head


def read_vocabulary(path: Path) -> list[VocabularyEntry]:
    """What the outputs of a head mean, by index; older files lack `frozen_count`. Raises DataError."""
    try:
        table = pq.read_table(path)
        rows = table.to_pylist()
        entries = [
            VocabularyEntry(**{name: row[name] for name in VOCABULARY_SCHEMA.names if name in row}) for row in rows
        ]
    except (OSError, pa.ArrowException, TypeError) as error:
        raise DataError(
            f"cannot read the vocabulary {path} ({error}); copy it from the shard set of that run"
        ) from None
    if [entry.index for entry in entries] != list(range(len(entries))):
        raise DataError(f"{path} is damaged: its indices are not 0..{len(entries) - 1} in order")
    return entries


def match_classes(classes: Classes, vocabulary: Sequence[VocabularyEntry], below: bool = False) -> list[Match]:
    """A match for every class, by label. `below`: also the vocabulary's hyponyms of a class that is in it itself."""
    matcher = _Matcher(classes, vocabulary, below)
    return [matcher.match(label) for label in range(len(classes))]


class _Matcher:
    def __init__(self, classes: Classes, vocabulary: Sequence[VocabularyEntry], below: bool) -> None:
        self.classes, self.vocabulary, self.below = classes, vocabulary, below
        self.hypernyms, self.senses = wordnet_hypernyms(), NameSenses(classes)
        self.index = {entry.synset: entry.index for entry in vocabulary}
        self.index_of_wnid = {entry.wnid: entry.index for entry in vocabulary}
        rows = [(self.hypernyms.row(entry.synset), entry.index) for entry in vocabulary]
        self.rows = {row: index for row, index in rows if row is not None}
        self.hyponyms: dict[int, set[int]] = {}  # row -> outputs whose synset lies below it
        for row, index in self.rows.items():
            for above in self._levels(row)[1:]:
                for parent in above:
                    self.hyponyms.setdefault(parent, set()).add(index)

    def match(self, label: int) -> Match:
        given = self.classes.synsets[label]
        own = self._own(given)
        if own is not None:
            row = self.hypernyms.row(self.vocabulary[own].synset)
            return self._made(label, self.vocabulary[own].synset, "synset", "same", self._with_below(own, row))
        row, found = self.hypernyms.row(given) if given else None, "synset"
        if row is None:
            row, found = self.senses.best(label, self.rows)
        if row is None:
            return self._made(label, None, "none", "none", ())
        return self._made(label, self.hypernyms.names[row], found, *self._outputs(row))

    def _own(self, given: str | None) -> int | None:
        """The output of exactly this synset, also where the bundled WordNet does not know it."""
        return self.index.get(given, self.index_of_wnid.get(given)) if given else None

    def _outputs(self, row: int) -> tuple[str, Iterable[int]]:
        if row in self.rows:
            return "same", self._with_below(self.rows[row], row)
        if row in self.hyponyms:
            return "below", self.hyponyms[row]
        for level in self._levels(row)[1:]:
            if known := [self.rows[parent] for parent in level if parent in self.rows]:
                return "above", known
        return "none", ()

    def _with_below(self, own: int, row: int | None) -> set[int]:
        return {own} | (self.hyponyms.get(row, set()) if self.below and row is not None else set())

    def _levels(self, row: int) -> list[list[int]]:
        """The synset, its hypernyms, theirs, …: each once, at its nearest."""
        levels, seen = [[row]], {row}
        while levels[-1]:
            above = dict.fromkeys(parent for child in levels[-1] for parent in self.hypernyms.parents[child])
            levels.append([parent for parent in above if parent not in seen])
            seen.update(levels[-1])
        return levels

    def _made(self, label: int, synset: str | None, found: str, matched: str, outputs: Iterable[int]) -> Match:
        indices = tuple(sorted(outputs))
        named = tuple(self.vocabulary[index].synset for index in indices)
        return Match(label, self.classes.name(label), synset, found, matched, named, indices)


def counts(matches: Iterable[Match]) -> dict[str, int]:
    """Classes by the way they were matched."""
    found = Counter(match.matched for match in matches)
    return {matched: found[matched] for matched in MATCHED}


def as_text(matches: Sequence[Match]) -> str:
    """JSON to keep beside the results: counts, then a class a line."""
    lines = ",\n".join(json.dumps(asdict(match), ensure_ascii=False) for match in matches)
    return f'{{\n"matched": {json.dumps(counts(matches))},\n"classes": [\n{lines}\n]\n}}\n'
