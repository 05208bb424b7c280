"""Hashtags -> synsets: which nouns a tag can name, which of them it gets, and how many tags had none or several.

Class = synset, so synonyms merge by themselves: #brownbear and #ursusarctos both give brown_bear.n.01. Synsets that
share an ambiguous tag are never merged: that would glue unrelated classes together.

    candidates = TagTable(wordnet, overrides).candidates(hashtags)      distinct tags, each looked up once
    synsets, counts = choose(candidates, "first")                       or "all", "unambiguous", or one's own choice

A policy is a number per occurrence of a tag: which of its senses is meant, -1 for none. One that looks at more than the
tag itself (evidence.py) hands in its own numbers.
"""

import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.hashtags import first_of_each
from data_pipeline.wordnet import WordNet

Ints = npt.NDArray[np.int64]
Policy = Literal["first", "all", "unambiguous"]

UNMAPPED: Final = "unmapped"  # why a tag has no senses: it is no noun
REMEMBERED: Final = 1 << 18  # tags; a process may see more than fit into its memory


class Overrides(Protocol):
    """What people decided about tags and synsets; see overrides.py."""

    @property
    def force(self) -> Mapping[str, int]: ...

    @property
    def forbidden_tags(self) -> Collection[str]: ...

    @property
    def removed(self) -> Mapping[int, str]: ...

    def apply(self, tag: str, senses: Sequence[int], competing: bool = False) -> tuple[tuple[int, ...], str | None]: ...


@dataclass(frozen=True)
class Candidates:
    """The distinct tags of a batch of images, what each can mean, and where it stands."""

    tags: pa.StringArray
    senses: list[tuple[int, ...]]  # of each tag: rows of the WordNet table, the most usual first
    reasons: list[str | None]  # of each tag: why it has no senses, None if it has some
    occurrences: pa.ListArray  # of each image: numbers of its tags

    def __len__(self) -> int:
        return len(self.occurrences)

    @functools.cached_property
    def tag(self) -> Ints:
        """Of each occurrence, all images one after the other: the number of its tag."""
        return self.occurrences.flatten().to_numpy(zero_copy_only=False).astype(np.int64)

    @functools.cached_property
    def image(self) -> Ints:
        """Of each occurrence: the image it stands at."""
        return np.repeat(np.arange(len(self)), self.occurrences.value_lengths().to_numpy(zero_copy_only=False))

    @functools.cached_property
    def number_of_senses(self) -> Ints:
        """Of each tag."""
        return np.fromiter(map(len, self.senses), np.int64, len(self.senses))

    @functools.cached_property
    def start(self) -> Ints:
        """Of each tag: where its senses begin in `flat`."""
        return np.cumsum(self.number_of_senses) - self.number_of_senses

    @functools.cached_property
    def flat(self) -> Ints:
        """The senses of all tags, one after the other."""
        return np.fromiter(itertools.chain.from_iterable(self.senses), np.int64)


class TagTable:
    """Looks tags up, each once."""

    def __init__(self, wordnet: WordNet, overrides: Overrides | None = None, competing: bool = False) -> None:
        """`competing` keeps senses that are no class beside others, for a policy that reads what is around a tag."""
        self._wordnet = wordnet
        self._overrides = overrides
        self._competing = competing
        decided = () if overrides is None else (*overrides.force, *overrides.forbidden_tags)
        self._decided = pa.array(decided, pa.string())
        self.lookup = functools.lru_cache(maxsize=REMEMBERED)(self._lookup)

    def _lookup(self, tag: str) -> tuple[tuple[int, ...], str | None]:
        """The senses of a tag, and why it has none. An override may give senses to what is no noun."""
        senses, reason = tuple(self._wordnet.senses(tag)), None
        if self._overrides is not None:
            senses, reason = self._overrides.apply(tag, senses, self._competing)
        return senses, None if senses else reason or UNMAPPED

    def leave_out(self, candidates: Candidates, meant: Ints) -> tuple[Ints, int]:
        """The sense that each occurrence means without those that are no class, and how many these were."""
        removed = self._overrides.removed if self._overrides is not None else {}
        allowed = np.array([sense not in removed for senses in candidates.senses for sense in senses], bool)
        found = np.flatnonzero(meant >= 0)
        out = found[~allowed[candidates.start[candidates.tag[found]] + meant[found]]]
        left = meant.copy()
        left[out] = -1
        return left, len(out)

    def candidates(self, hashtags: pa.ListArray | pa.ChunkedArray) -> Candidates:
        """`hashtags`: list<string>, null for an image without any."""
        if isinstance(hashtags, pa.ChunkedArray):
            hashtags = pa.concat_arrays(hashtags.chunks) if hashtags.num_chunks else pa.array([], hashtags.type)
        encoded = hashtags.flatten().dictionary_encode()
        tags = encoded.dictionary
        senses: list[tuple[int, ...]] = [()] * len(tags)
        reasons: list[str | None] = [UNMAPPED] * len(tags)
        decided = pc.call_function("is_in", [tags], pc.SetLookupOptions(self._decided)).to_numpy(zero_copy_only=False)
        worth = np.flatnonzero(self._wordnet.may_name(tags) | decided)  # the others are made up, and without end
        for number, tag in zip(worth.tolist(), tags.take(pa.array(worth)).to_pylist(), strict=True):
            senses[number], reasons[number] = self.lookup(tag)
        lengths = pc.fill_null(hashtags.value_lengths(), 0).to_numpy(zero_copy_only=False)
        occurrences = pa.ListArray.from_arrays(_offsets(lengths), encoded.indices)
        return Candidates(tags, senses, reasons, occurrences)


def choose(candidates: Candidates, policy: Policy | Ints) -> tuple[pa.ListArray, dict[str, int]]:
    """Synsets per image, each once, in the order of the tags; and what became of the hashtags.

    `policy` may be the sense meant by each occurrence: its number among the senses of the tag, -1 for none.
    """
    senses = candidates.number_of_senses[candidates.tag]
    if isinstance(policy, str) and policy == "all":
        meant, image, synset = senses > 0, *_every_sense(candidates)
    else:
        number = _sense_of_tag(candidates, policy) if isinstance(policy, str) else np.asarray(policy, np.int64)
        if len(number) != len(senses) or (number >= senses).any():
            raise ValueError("a sense for each occurrence, within the senses of its tag, is needed")
        meant = number >= 0
        image, synset = candidates.image[meant], candidates.flat[(candidates.start[candidates.tag] + number)[meant]]
    unmapped = np.array([reason == UNMAPPED for reason in candidates.reasons], bool)[candidates.tag]
    counts = {
        "hashtags": len(senses),
        "mapped_hashtags": int(meant.sum()),
        "unmapped_hashtags": int(unmapped.sum()),
        "denied_hashtags": int((senses == 0).sum() - unmapped.sum()),
        "undecided_hashtags": int((senses > 0).sum() - meant.sum()),
        "ambiguous_hashtags": int((senses > 1).sum()),
    }
    return _each_once(image, synset, len(candidates)), counts


def first(candidates: Candidates) -> Ints:
    """The sense WordNet lists first, the most frequent one in its tagged texts."""
    return np.where(candidates.number_of_senses > 0, 0, -1)[candidates.tag]


def unambiguous(candidates: Candidates) -> Ints:
    """The sense of tags that have one only; a guess is never made."""
    return np.where(candidates.number_of_senses == 1, 0, -1)[candidates.tag]


def _sense_of_tag(candidates: Candidates, policy: str) -> Ints:
    return {"first": first, "unambiguous": unambiguous}[policy](candidates)


def _every_sense(candidates: Candidates) -> tuple[Ints, Ints]:
    """Image and synset of each sense of each occurrence."""
    number = candidates.number_of_senses[candidates.tag]
    ends = np.cumsum(number)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - number, number)
    return np.repeat(candidates.image, number), candidates.flat[
        np.repeat(candidates.start[candidates.tag], number) + within
    ]


def _each_once(image: Ints, synset: Ints, images: int) -> pa.ListArray:
    """Lists of what belongs to each image, the first of equal ones; `image` ascends."""
    first = first_of_each(image, synset)
    lengths = np.bincount(image[first], minlength=images)
    return pa.ListArray.from_arrays(_offsets(lengths), pa.array(synset[first].astype(np.int32)))


def _offsets(lengths: npt.NDArray[np.integer]) -> pa.Int32Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
