"""How far a wrong guess is from the truth in WordNet: poodle for corgi is a smaller mistake than poodle for lamp.

    scores = hierarchy_scores(scores, labels, classes)     # {"hierarchy/mistake_height": 4.2, …}

The hierarchy is what the classes span: their synsets and all hypernyms of these. The height of a synset is the longest
way down from it to a class; of two classes' common hypernyms the lowest one stands for what they have in common, and
its height is the hierarchical distance of Deng et al. (2010, "What does classifying more than 10,000 image categories
tell us?", §7). `mistake_height` is its mean over mistakes, `height` over all pictures with 0 for a right guess
(Bertinetto et al., 2020, "Making better mistakes", §4). `distance` counts edges instead: the shortest way from one
class up to a common hypernym and down to the other. Both numbers depend on the set of classes: compare within one, and
with `chance_height`, what guesses at random that are wrong would give.

Letters: B images, S classes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.wordnet import WordNet, open_wordnet
from eval.classes import Classes

WITHIN = (2, 4, 8)  # edges; ours: siblings are 2 apart, cousins 4
PREFIX = "hierarchy/"
CHANCE_PAIRS = 2**14  # pairs of classes looked at for what guessing gives: all of 128 classes, a sample of more; ours


@dataclass(frozen=True)
class Common:
    """What two classes have in common."""

    synset: str  # the lowest common hypernym
    height: int  # of it
    distance: int  # edges between the classes, over a common hypernym


class Hierarchy:
    """The classes' synsets with all their hypernyms; a class without a synset of WordNet has no place in it."""

    def __init__(self, synsets: Sequence[str | None]) -> None:
        table = wordnet_hypernyms()
        self._names, self._parents = table.names, table.parents
        self.rows = [table.row(synset) if synset else None for synset in synsets]
        self._above = {row: self._ways_up(row) for row in set(self.rows) if row is not None}
        self._children: dict[int, set[int]] = {}
        for row in set().union(*self._above.values()):
            for parent in self._parents[row]:
                self._children.setdefault(parent, set()).add(row)
        self._heights: dict[int, int] = {}

    def _ways_up(self, row: int) -> dict[int, int]:
        """Every hypernym and the edges of the shortest way to it; the synset itself at 0."""
        found, edge = {row: 0}, [row]
        while edge:
            edge = list(dict.fromkeys(parent for child in edge for parent in self._parents[child]))
            edge = [parent for parent in edge if parent not in found]
            length = max(found.values()) + 1
            found |= dict.fromkeys(edge, length)
        return found

    def _height(self, row: int) -> int:
        """The longest way down to a class."""
        if row not in self._heights:
            self._heights[row] = max((1 + self._height(child) for child in self._children.get(row, ())), default=0)
        return self._heights[row]

    @functools.lru_cache(maxsize=1 << 20)  # noqa: B019  a hierarchy lives as long as one evaluation
    def common(self, a: int, b: int) -> Common | None:
        """Of two classes by number; None where one of them has no place."""
        first, second = self.rows[a], self.rows[b]
        if first is None or second is None:
            return None
        if first == second:  # two classes of one synset
            return Common(self._names[first], 0, 0)
        ways, others = self._above[first], self._above[second]
        shared = ways.keys() & others.keys()
        if not shared:
            return None
        lowest = min(shared, key=lambda row: (self._height(row), ways[row] + others[row], self._names[row]))
        return Common(self._names[lowest], self._height(lowest), min(ways[row] + others[row] for row in shared))


@dataclass(frozen=True)
class Hypernyms:
    """WordNet's nouns by row: names and parents."""

    names: list[str]
    parents: list[list[int]]
    by_name: dict[str, int]
    by_wnid: dict[str, int]

    def row(self, synset: str) -> int | None:
        """Of a name (dog.n.01) or an id (n02084071)."""
        return self.by_name.get(synset, self.by_wnid.get(synset))


@functools.cache
def nouns() -> WordNet:
    """WordNet, opened once."""
    return open_wordnet()


@functools.cache
def wordnet_hypernyms() -> Hypernyms:
    table = nouns().synsets
    names, wnids, parents = (table[column].to_pylist() for column in ("synset", "wnid", "hypernyms"))
    by_name, by_wnid = ({text: row for row, text in enumerate(column)} for column in (names, wnids))
    return Hypernyms(names, parents, by_name, by_wnid)


def hierarchy_scores(scores: Tensor, labels: Tensor, classes: Classes) -> dict[str, float]:
    """Metrics by whole name: `height`, `distance`, the same over mistakes alone (`mistake_…`) and over random mistakes
    (`chance_height`), in edges; and as shares, `within_k` of the mistakes that are at most k edges off, and `compared`,
    the pictures where both the right class and the guess have a synset: the others are left out. Nothing when none has.
    scores B S, labels B.
    """
    pairs, counts = torch.unique(torch.stack([labels, scores.argmax(dim=1)], dim=1), dim=0, return_counts=True)
    hierarchy = Hierarchy(classes.synsets)
    found: list[tuple[Common, bool, int]] = []  # what a pair has in common, is it a mistake, how many pictures
    for (truth, guess), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        common = hierarchy.common(truth, guess)
        if common is not None:
            found.append((common, truth != guess, count))
    compared = sum(count for _, _, count in found)
    if not compared:
        return {}
    wrong = [(common, count) for common, mistake, count in found if mistake]
    mistakes = sum(count for _, count in wrong)
    height = sum(common.height * count for common, count in wrong)
    distance = sum(common.distance * count for common, count in wrong)
    values = {"compared": compared / len(labels), "height": height / compared, "distance": distance / compared}
    if mistakes:
        values |= {"mistake_height": height / mistakes, "mistake_distance": distance / mistakes}
        for k in WITHIN:
            values[f"within_{k}"] = sum(count for common, count in wrong if common.distance <= k) / mistakes
    if (guessed := chance_height(hierarchy, labels)) is not None:
        values["chance_height"] = guessed
    return {PREFIX + name: value for name, value in values.items()}


def chance_height(hierarchy: Hierarchy, labels: Tensor) -> float | None:
    """Mean height of what a wrong guess, each wrong class alike, has in common with the truth; None without mistakes.

    Over all pairs of classes, weighted by the pictures of the true one, or over a sample that is always the same.
    """
    classes = len(hierarchy.rows)
    images = torch.bincount(labels.cpu(), minlength=classes)
    if classes**2 <= CHANCE_PAIRS:
        pairs = torch.cartesian_prod(images.nonzero()[:, 0], torch.arange(classes))
        weights = images[pairs[:, 0]].tolist()
    else:
        generator = torch.Generator().manual_seed(0)
        truth = torch.multinomial(images.double(), CHANCE_PAIRS, replacement=True, generator=generator)
        pairs = torch.stack([truth, torch.randint(classes, (CHANCE_PAIRS,), generator=generator)], dim=1)
        weights = [1] * CHANCE_PAIRS
    total = mass = 0
    for (truth, guess), weight in zip(pairs.tolist(), weights, strict=True):
        if truth != guess and (common := hierarchy.common(truth, guess)) is not None:
            total, mass = total + weight * common.height, mass + weight
    return total / mass if mass else None
