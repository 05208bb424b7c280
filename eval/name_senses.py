"""What the names of classes mean in WordNet: boxer among dogs is the dog, among athletes the sportsman.

    senses = NameSenses(classes)
    senses.best(label, preferred)        # a row of WordNet's nouns, and how it was found: name, ending or none

A name is a lemma, or ends in one: `carrot cake` is a cake. Of several senses, the one that most of the class's names
share is taken; then the one that is usual and lies beneath rare hypernyms that other classes lie beneath too; then one
that is preferred. Ours and simple, not a disambiguation of the literature; the weights were chosen on sets that come
with synsets. `Persian` stays a person among the cats: give classes a synset where it matters.
"""

import functools
import re
from collections.abc import Container, Sequence

import numpy as np

from eval.classes import Classes
from eval.hierarchy import nouns, wordnet_hypernyms
from eval.languages import ENGLISH


class NameSenses:
    """Only English names are looked up: an Italian `cane` is no English cane. Others need synsets."""

    def __init__(self, classes: Classes) -> None:
        self._hypernyms, self._wordnet = wordnet_hypernyms(), nouns()
        self._hypernyms_of: dict[int, frozenset[int]] = {}
        self._senses: list[
            dict[int, tuple[int, float]]
        ] = []  # by class: a row's votes and weight; the weights sum to 1
        self._found: list[str] = []
        self._mass: dict[int, float] = {}  # a row's classes, each by the weight of its senses beneath
        for synset, names in zip(classes.synsets, classes.names, strict=True):
            row = self._hypernyms.row(synset) if synset else None
            senses, found = self._look_up(names) if row is None and classes.language == ENGLISH else ({}, "name")
            self._senses.append(senses)
            self._found.append(found)
            for above, weight in self._beneath({row: (1, 1.0)} if row is not None else senses).items():
                self._mass[above] = self._mass.get(above, 0.0) + weight

    def best(self, label: int, preferred: Container[int]) -> tuple[int | None, str]:
        """A row and `name` or `ending`; None and `none` for names that mean nothing here."""
        senses = self._senses[label]
        if not senses:
            return None, "none"
        own = self._beneath(senses)

        def order(row: int) -> tuple[object, ...]:
            votes, weight = senses[row]
            return -votes, -round(weight * self._support(row, own), 6), row not in preferred, -weight

        return min(senses, key=order), self._found[label]

    def _support(self, row: int, own: dict[int, float]) -> float:
        """Other classes beneath one of its hypernyms, times the squared information in that: rare ones say more."""
        information = information_content()
        return max((self._mass[above] - own[above]) * information[above] ** 2 for above in self._above(row))

    def _beneath(self, senses: dict[int, tuple[int, float]]) -> dict[int, float]:
        """Of every hypernym, the weight of the senses beneath it."""
        found: dict[int, float] = {}
        for row, (_, weight) in senses.items():
            for above in self._above(row):
                found[above] = found.get(above, 0.0) + weight
        return found

    def _look_up(self, names: Sequence[str]) -> tuple[dict[int, tuple[int, float]], str]:
        """How many names have a sense, and its weight: 1, 1/2, 1/3, … in the order of use."""
        names = [re.sub(r"\s*\([^)]*\)", "", name) for name in names]  # kite (bird of prey)
        lists, found = [self._wordnet.senses(name) for name in names], "name"
        if not any(lists):
            lists, found = [self._ending(name) for name in names], "ending"
        senses: dict[int, tuple[int, float]] = {}
        for rows in lists:
            for place, row in enumerate(rows, 1):
                votes, weight = senses.get(row, (0, 0.0))
                senses[row] = votes + 1, weight + 1 / place
        total = sum(weight for _, weight in senses.values())
        return {row: (votes, weight / total) for row, (votes, weight) in senses.items()}, found

    def _ending(self, name: str) -> list[int]:
        """Senses of the most last words that are a lemma together."""
        words = name.replace("_", " ").replace("-", " ").split()
        endings = (self._wordnet.senses(" ".join(words[at:])) for at in range(1, len(words)))
        return next(filter(None, endings), [])

    def _above(self, row: int) -> frozenset[int]:
        """The synset and all its hypernyms."""
        if row not in self._hypernyms_of:
            parents = map(self._above, self._hypernyms.parents[row])
            self._hypernyms_of[row] = frozenset({row}).union(*parents)
        return self._hypernyms_of[row]


@functools.cache
def information_content() -> list[float]:
    """-log of the share of WordNet's nouns at or beneath each: Resnik's (1995) with synsets in place of words in use.

    A synset counts once for each way it has up to a hypernym.
    """
    parents = wordnet_hypernyms().parents
    lengths = np.array([len(row) for row in parents])
    flat = np.array([parent for row in parents for parent in row])
    ways = np.ones(len(parents))
    count = ways.copy()
    while ways.any():  # one edge further up
        ways = np.bincount(flat, np.repeat(ways, lengths), len(parents))
        count += ways
    return np.maximum(0.0, -np.log(count / len(parents))).tolist()
