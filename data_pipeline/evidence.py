"""Which sense of a hashtag is meant: #crane beside #bird is the bird, beside #construction the machine.

A sense s of a tag is judged by the terms c around it, the other hashtags of the image and the words of its caption:

    score(s) = log prior(s) + DAMPING * sum over c of clip( log( P(c | s) / P(c) ) )

P(c | s) is a count smoothed along the hypernyms of s, from the root down: P(c | a) = (N(c, a) + m P(c | above a)) /
(N(a) + m), as Yarowsky (1992) does with the categories of a thesaurus. N counts the terms around tags that have one
sense only, over the corpus, for that sense and all above it: what stands beside #flamingo and #parrot speaks for the
bird among the senses of #crane. To these come occurrences that WordNet is worth by itself: a term that is a noun counts
for its own senses, the words of a gloss, of its examples and of the lemmas for the synset they describe.
prior(s) is made of how often the makers of WordNet met that sense in texts, of its rank, and of how much the corpus
speaks of that kind of thing (noun.animal, noun.artifact, …): pictures show other things than texts tell.

    evidence = fit(images, table, wordnet)        chosen, probability = evidence.choose(candidates, captions)

Numbers were chosen on the `dev` part of demo/senses, by benchmarks/senses.py, which also reports the `test` part.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import hashtags
from data_pipeline.compute import pc
from data_pipeline.errors import DataError
from data_pipeline.shardset import write_table
from data_pipeline.synsets import Candidates, TagTable
from data_pipeline.wordnet import WordNet, squash

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Weights = defaultdict[tuple[int, int], float]  # (term, row of the WordNet table) -> occurrences

SAMPLE: Final = 100_000  # images that are counted: memory does not grow with the corpus; ours
BATCH: Final = 10_000  # images whose tags are judged at once
MAX_DEPTH: Final = 32  # of hypernyms; WordNet's longest way is 20
MAX_TERMS: Final = 48  # around one tag: captions without end must not cost time without end
MAX_HYPONYMS: Final = 200  # whose glosses describe a synset too

DAMPING: Final = 0.3  # the terms of an image are not independent of each other
SMOOTHING: Final = 10.0  # m: occurrences that the distribution above a synset is worth
CLIP: Final = (-1.0, 4.0)  # log ratio of one term: an absent word says less than a present one
NOUN: Final = 20.0  # occurrences that a term which is a noun counts for its senses
GLOSS: Final = 5.0  # … that a word of the gloss counts for,
LEMMAS: Final = 5.0  # … of the other lemmas,
EXAMPLES: Final = 2.0  # … of the examples,
HYPONYMS: Final = 1.0  # … of the glosses directly below
PRIOR_POWER: Final = 0.75  # prior ~ (uses in texts + UNSEEN / rank) ** PRIOR_POWER …
UNSEEN: Final = 2.0
PROPER: Final = -1.5  # … added to the logarithm for names of one person or place
KIND_POWER: Final = 0.25  # … * (share of its kind in the corpus / share in WordNet) ** KIND_POWER

SCHEMA: Final = pa.schema(
    [
        ("kind", pa.string()),  # term: images that have it; pair: occurrences of a term at a synset; lexname: share
        ("term", pa.string()),  # … or the lexname
        ("synset", pa.string()),  # of a pair; else null
        ("value", pa.float64()),
    ]
)
_WORDS: Final = re.compile(r"\w+")


class Terms:
    """Spellings -> terms: a noun in its singular, squashed form, so that #Birds, bird and #bird are one."""

    def __init__(self, wordnet: WordNet) -> None:
        self._wordnet = wordnet
        self.of = functools.lru_cache(maxsize=1 << 18)(self._of)

    def _of(self, word: str) -> str:
        return self._wordnet.lemma(word) or squash(word)

    def around(self, caption: str | None, tags: Iterable[str]) -> list[str]:
        """The distinct terms of an image, at most MAX_TERMS."""
        words = _WORDS.findall(hashtags.normalise(caption)) if caption else []
        usable = (self.of(word) for word in (*tags, *words) if len(word) > 1 and not word.isdecimal())
        return list(dict.fromkeys(usable))[:MAX_TERMS]


class Tree:
    """The way from each synset up to its root, along the first hypernym of each."""

    def __init__(self, wordnet: WordNet) -> None:
        hypernyms = wordnet.synsets["hypernyms"].combine_chunks()
        offsets, flat = hypernyms.offsets.to_numpy(), hypernyms.values.to_numpy()
        parent = np.full(len(wordnet), -1, np.int64)
        has = offsets[1:] > offsets[:-1]
        parent[has] = flat[offsets[:-1][has]]
        way = [np.arange(len(wordnet), dtype=np.int64)]
        while (way[-1] >= 0).any() and len(way) < MAX_DEPTH:
            way.append(np.where(way[-1] >= 0, parent[way[-1]], -1))
        self.up: Ints = np.stack(way)  # steps up x synsets; -1 above the root

    def __len__(self) -> int:
        return self.up.shape[1]


@dataclass(frozen=True)
class Pairs:
    """Occurrences of terms at synsets, without what is above them."""

    terms: Ints
    rows: Ints
    values: Floats


@dataclass(frozen=True)
class Seen:
    """Occurrences of tags, flat: occurrence o has the senses rows[begin[o]:begin[o + 1]]."""

    begin: Ints
    rows: Ints
    pair_of: Ints  # of each (sense, term around it): which entry of `rows`
    pair_terms: Ints

    @staticmethod
    def of(occurrences: Iterable[tuple[Sequence[int], Sequence[int]]]) -> "Seen":
        """From (senses, terms around) of each occurrence."""
        begin, rows, numbers, around = [0], [], [], []
        for senses, terms in occurrences:
            for sense in senses:
                numbers.append(len(terms))
                around.extend(terms)
                rows.append(sense)
            begin.append(len(rows))
        pair_of = np.repeat(np.arange(len(rows)), np.array(numbers, np.int64))
        return Seen(np.array(begin, np.int64), np.array(rows, np.int64), pair_of, np.array(around, np.int64))


class Evidence:
    """What a corpus and WordNet say about the terms around a tag."""

    def __init__(self, wordnet: WordNet, terms: Mapping[str, float], pairs: Pairs, kinds: Mapping[str, float]) -> None:
        """`terms`: images that have each, in the order that `pairs` numbers them; `kinds`: shares of the lexnames."""
        self._wordnet, self._terms, self._pairs, self._kinds = wordnet, terms, pairs, kinds
        self._number = {term: number for number, term in enumerate(terms)}
        self._reader, self._tree = Terms(wordnet), Tree(wordnet)
        images = np.array(list(terms.values()), np.float64)
        self._share = np.maximum(images, 0.5) / max(1.0, images.sum())
        size = len(self._tree)
        above = self._tree.up[:, pairs.rows]  # steps x pairs
        there = above >= 0
        keys = (pairs.terms * size + above)[there]
        self._keys, place = np.unique(keys, return_inverse=True)  # term * synsets + row
        values = np.broadcast_to(pairs.values, above.shape)[there]
        self._values = np.bincount(place, weights=values, minlength=len(self._keys))
        self._totals = np.bincount(self._keys % size, weights=self._values, minlength=size)
        self._kind_factor = self._factors(kinds)
        self._log_prior = functools.lru_cache(maxsize=1 << 16)(self._prior)

    def choose(self, candidates: Candidates, captions: Sequence[str | None]) -> tuple[Ints, Floats]:
        """The number of the sense that each occurrence of a tag means, -1 where it has none, and how probable it is.

        `captions` has one entry per image of the batch. Tags with one sense have it with probability 1.
        """
        senses = candidates.number_of_senses[candidates.tag]
        chosen = np.where(senses > 0, 0, -1)
        probability = np.where(senses > 0, 1.0, 0.0)
        ambiguous = np.flatnonzero(senses > 1)
        tags: list[str] = candidates.tags.to_pylist()
        ends = candidates.occurrences.offsets.to_numpy()
        for start in range(0, len(ambiguous), BATCH):
            part = ambiguous[start : start + BATCH]
            known: dict[int, list[int]] = {}
            for image in np.unique(candidates.image[part]).tolist():
                row = [tags[tag] for tag in candidates.tag[ends[image] - ends[0] : ends[image + 1] - ends[0]].tolist()]
                known[image] = self._known(captions[image], row)
            numbers = candidates.tag[part].tolist()
            around = [
                self._others(known[image], tags[tag])
                for image, tag in zip(candidates.image[part].tolist(), numbers, strict=True)
            ]
            options = [candidates.senses[tag] for tag in numbers]
            seen = Seen.of(zip(options, around, strict=True))
            prior = [self._log_prior(tags[tag], senses) for tag, senses in zip(numbers, options, strict=True)]
            likely = self._probabilities(seen, np.concatenate(prior))
            for occurrence, begin, end in zip(part.tolist(), seen.begin[:-1], seen.begin[1:], strict=True):
                best = int(likely[begin:end].argmax())
                chosen[occurrence], probability[occurrence] = best, likely[begin + best]
        return chosen, probability

    def explain(
        self, tag: str, senses: Sequence[int], caption: str | None, tags: Sequence[str]
    ) -> tuple[Floats, Floats, dict[str, Floats]]:
        """Probabilities of the senses, prior probabilities, and what each term around adds to the score of each."""
        terms = self._others(self._known(caption, tags), tag)
        log_prior = self._log_prior(tag, tuple(senses))
        prior = np.exp(log_prior - log_prior.max())
        names = list(self._terms)
        shares = {
            names[term]: DAMPING * self._log_ratio(np.full(len(senses), term), np.array(senses, np.int64))
            for term in terms
        }
        score = np.exp(log_prior + sum(shares.values(), np.zeros(len(senses))) - log_prior.max())
        return score / score.sum(), prior / prior.sum(), shares

    def _known(self, caption: str | None, tags: Iterable[str]) -> list[int]:
        found = map(self._number.get, self._reader.around(caption, tags))
        return [number for number in found if number is not None]

    def _others(self, terms: Sequence[int], tag: str) -> list[int]:
        """A tag is no evidence for itself."""
        own = self._number.get(self._reader.of(tag))
        return [term for term in terms if term != own]

    def _prior(self, tag: str, senses: tuple[int, ...]) -> Floats:
        """Logarithms, not normalised."""
        uses = self._wordnet.uses(tag)
        found = [uses.get(sense, 0) + UNSEEN / rank for rank, sense in enumerate(senses, 1)]
        own = self._reader.of(tag)
        names = [PROPER if self._is_name(sense, own) else 0.0 for sense in senses]
        return PRIOR_POWER * np.log(found) + KIND_POWER * self._kind_factor[list(senses)] + names

    def _is_name(self, sense: int, term: str) -> bool:
        """Whether WordNet writes it with a capital: Crane, the writer."""
        lemmas = self._wordnet.synsets["lemmas"][sense].as_py()
        own = [lemma for lemma in lemmas if squash(lemma) == term]
        return bool(own) and all(lemma[:1].isupper() for lemma in own)

    def _factors(self, kinds: Mapping[str, float]) -> Floats:
        """log( share of its kind in the corpus / in WordNet ) of each synset."""
        encoded = self._wordnet.synsets["lexname"].combine_chunks().dictionary_encode()
        number = encoded.indices.to_numpy()
        base = np.bincount(number) / len(number)
        share = np.array([kinds.get(name, 0.0) for name in encoded.dictionary.to_pylist()])
        ratio = np.divide(share, base, out=np.ones(len(base)), where=share > 0)
        return np.log(ratio)[number]

    def _probabilities(self, seen: Seen, log_prior: Floats) -> Floats:
        pairs, place = np.unique(seen.pair_terms * len(self._tree) + seen.rows[seen.pair_of], return_inverse=True)
        ratio = self._log_ratio(pairs // len(self._tree), pairs % len(self._tree))[place]
        score = log_prior + DAMPING * np.bincount(seen.pair_of, weights=ratio, minlength=len(seen.rows))
        top = np.maximum.reduceat(score, seen.begin[:-1])
        sizes = np.diff(seen.begin)
        weight = np.exp(score - np.repeat(top, sizes))
        return weight / np.repeat(np.add.reduceat(weight, seen.begin[:-1]), sizes)

    def _log_ratio(self, terms: Ints, rows: Ints) -> Floats:
        """log( P(term | synset) / P(term) ), clipped."""
        share = self._share[terms]
        p = share
        for step in reversed(self._tree.up):  # from the root down
            node = step[rows]
            found = self._count(terms * len(self._tree) + node)
            p = np.where(node >= 0, (found + SMOOTHING * p) / (self._totals[node] + SMOOTHING), p)
        return np.clip(np.log(p / share), *CLIP)

    def _count(self, keys: Ints) -> Floats:
        if not len(self._keys):
            return np.zeros(len(keys))
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._values[at], 0.0)

    # ----------------------------------------------------------------------------------------------------------- file

    def save(self, path: Path) -> None:
        names, kinds = list(self._terms), list(self._kinds)
        pairs = self._pairs
        sizes = (len(names), len(pairs.terms), len(kinds))
        synsets = self._wordnet.synsets["synset"].take(pa.array(pairs.rows)).combine_chunks()
        none = [pa.nulls(sizes[0], pa.string()), pa.nulls(sizes[2], pa.string())]
        table = pa.table(
            [
                pa.array(np.repeat(["term", "pair", "lexname"], sizes)),
                pa.array([*names, *(names[term] for term in pairs.terms.tolist()), *kinds], pa.string()),
                pa.concat_arrays([none[0], synsets, none[1]]),
                pa.array([*self._terms.values(), *pairs.values.tolist(), *self._kinds.values()], pa.float64()),
            ],
            schema=SCHEMA,
        )
        write_table(path, table)

    @staticmethod
    def load(path: Path, wordnet: WordNet) -> "Evidence":
        """Raises DataError if the file is damaged or was made with another WordNet."""
        try:
            table = pq.read_table(path, schema=SCHEMA)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot read the evidence {path} ({error}); build the shard set again") from None
        kind = table["kind"].combine_chunks().dictionary_encode()
        parts = {name: table.filter(pc.equal(kind, name)) for name in ("term", "pair", "lexname")}
        terms = dict(zip(parts["term"]["term"].to_pylist(), parts["term"]["value"].to_pylist(), strict=True))
        kinds = dict(zip(parts["lexname"]["term"].to_pylist(), parts["lexname"]["value"].to_pylist(), strict=True))
        numbers = pc.index_in(parts["pair"]["term"], pa.array(list(terms), pa.string()))
        rows = pc.index_in(parts["pair"]["synset"], wordnet.synsets["synset"].combine_chunks())
        if numbers.null_count or rows.null_count:
            raise DataError(f"{path} names synsets that this WordNet does not have; build the shard set again")
        place, row = (column.to_numpy().astype(np.int64) for column in (numbers, rows))
        return Evidence(wordnet, terms, Pairs(place, row, parts["pair"]["value"].to_numpy()), kinds)


def fit(images: Iterable[tuple[str | None, Sequence[str]]], table: TagTable, wordnet: WordNet) -> Evidence:
    """Count captions with their hashtags."""
    reader = Terms(wordnet)
    number: dict[str, int] = {}
    having: Counter[int] = Counter()
    beside: Counter[tuple[int, int]] = Counter()  # (term, the only sense of a tag) -> images
    kinds: Counter[str] = Counter()
    asked: set[int] = set()  # senses among which will have to be chosen
    lexnames: list[str] = wordnet.synsets["lexname"].to_pylist()
    for caption, tags in images:
        terms = [number.setdefault(term, len(number)) for term in reader.around(caption, tags)]
        having.update(terms)
        for tag in tags:
            senses, _ = table.lookup(tag)
            if len(senses) == 1:
                own = number.get(reader.of(tag))
                beside.update((term, senses[0]) for term in terms if term != own)
                kinds[lexnames[senses[0]]] += 1
            else:
                asked.update(senses)
    pairs: Weights = defaultdict(float, beside)
    _add_nouns(pairs, number, table)
    _add_descriptions(pairs, number, asked, wordnet, reader)
    total = sum(kinds.values()) + len(set(lexnames))
    shares = {name: (kinds[name] + 1) / total for name in sorted(set(lexnames))}
    ordered = sorted(pairs)
    terms, rows = (np.array([pair[n] for pair in ordered], np.int64) for n in (0, 1))
    values = np.array([pairs[pair] for pair in ordered], np.float64)
    return Evidence(wordnet, {term: float(having[n]) for term, n in number.items()}, Pairs(terms, rows, values), shares)


def _add_nouns(pairs: Weights, number: Mapping[str, int], table: TagTable) -> None:
    """A term that is a noun speaks for its own senses, the most usual most."""
    for term, place in number.items():
        senses, _ = table.lookup(term)
        whole = sum(1 / rank for rank in range(1, len(senses) + 1))
        for rank, row in enumerate(senses, 1):
            pairs[place, row] += NOUN / rank / whole


def _add_descriptions(
    pairs: Weights, number: Mapping[str, int], asked: set[int], wordnet: WordNet, reader: Terms
) -> None:
    """What WordNet writes about the senses in question and what is above them."""
    tree = Tree(wordnet)
    nodes = np.unique(tree.up[:, sorted(asked)]) if asked else np.zeros(0, np.int64)
    texts = wordnet.synsets.select(["gloss", "examples", "lemmas"])
    below = _hyponyms(wordnet, nodes)

    @functools.lru_cache(maxsize=1 << 16)
    def words(row: int, column: str) -> frozenset[int]:
        text = texts[column][row].as_py()
        text = text if isinstance(text, str) else " ".join(text).replace("_", " ")
        return frozenset(number[term] for term in reader.around(text, ()) if term in number)

    for row in nodes[nodes >= 0].tolist():
        for column, weight in (("gloss", GLOSS), ("examples", EXAMPLES), ("lemmas", LEMMAS)):
            for term in words(row, column):
                pairs[term, row] += weight
        for term in frozenset().union(*(words(child, "gloss") for child in below.get(row, ())[:MAX_HYPONYMS])):
            pairs[term, row] += HYPONYMS


def _hyponyms(wordnet: WordNet, nodes: Ints) -> dict[int, list[int]]:
    hypernyms = wordnet.synsets["hypernyms"].combine_chunks()
    parents = hypernyms.values.to_numpy()
    children = np.repeat(np.arange(len(wordnet)), hypernyms.value_lengths().to_numpy(zero_copy_only=False))
    wanted = np.isin(parents, nodes)
    found: dict[int, list[int]] = {}
    for parent, child in zip(parents[wanted].tolist(), children[wanted].tolist(), strict=True):
        found.setdefault(parent, []).append(child)
    return found
