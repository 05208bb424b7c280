"""How a sample, or a hashtag, got its labels: every step from the caption to the repeat factor, and every reason.

    python -m data_pipeline explain SHARDS photo17            python -m data_pipeline explain SHARDS '#crane'

Decisions are made again, from what the shard set keeps (its evidence, overrides and deny-list), and compared with what
it says. Nothing but a few indexes is read to find a key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq

from data_pipeline import hashtags
from data_pipeline.decisions import read_again
from data_pipeline.errors import DataError, UsageError
from data_pipeline.evidence import Evidence
from data_pipeline.lookup import Lookup, Place, base_key
from data_pipeline.overrides import Overrides
from data_pipeline.resample import Repeats
from data_pipeline.shardset import ShardSet, VocabularyEntry
from data_pipeline.summary import Printer
from data_pipeline.synsets import TagTable
from data_pipeline.tombstones import NAME, read_lines
from data_pipeline.wordnet import WordNet, open_wordnet, squash

TERMS: Final = 3  # that say most for a sense
WORDS: Final = {  # reasons of drops, for people; reasons without an entry stand as they are
    "no_caption": "it has no caption and no hashtags",
    "no_hashtags": "its caption has no hashtags",
    "no_synset": "none of its hashtags names a noun that may be a class",
    "below_min_count": "its synsets have too few images to be classes",
    "not_in_vocabulary": "its synsets are not in the frozen vocabulary",
    "duplicate_key": "an earlier picture has the same key",
    "exact_duplicate": "another picture has the same bytes",
    "near_duplicate": "another picture looks the same",
    "evaluation_image": "it looks like a picture of an evaluation set",
    "taken_down": "it was taken down",
    "denied_non_visual": "no picture shows it (deny-list)",
    "denied_sensitive": "it must not be read off a picture (deny-list)",
    "forbidden": "forbidden by the overrides",
    "unmapped": "no noun of WordNet",
}


def explain(path: Path, what: str, printer: Printer) -> None:
    """Raises UsageError for a key that the set never saw, with keys that look like it."""
    shards = ShardSet.open(path)
    if what.startswith("#"):
        Words(shards, printer).tag(what)
        return
    places = Lookup(shards).find(what)
    if places:
        Words(shards, printer).sample(places)
    elif not (_taken_down(path, what, printer) | _dropped(path, what, printer)):
        near = Lookup(shards).nearest(what)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"{path} has no sample {what!r}, and none was dropped{hint} (hashtags begin with #)")


def _taken_down(path: Path, key: str, printer: Printer) -> bool:
    file = path / NAME
    if not file.is_file():
        return False
    found = [line for line in read_lines(file, file.read_bytes()) if line.get("key") == base_key(key)]
    for line in found:
        why = f": {line['reason']}" if line.get("reason") else ""
        printer.line(f"{key} was taken down{why}")
    return bool(found)


def _dropped(path: Path, key: str, printer: Printer) -> bool:
    file = path / "dropped.parquet"
    if not file.is_file():
        return False
    found = pq.read_table(file, filters=[("key", "==", key)]).to_pylist()
    for row in found:
        detail = f" ({row['detail']})" if row["detail"] else ""
        source = f", of {row['source']}" if row["source"] else ""
        why = f": {WORDS[row['reason']]}" if row["reason"] in WORDS else ""
        printer.line(f"{key}{source} was dropped, {row['reason']}{why}{detail}")
    return bool(found)


@dataclass(frozen=True)
class _Sense:
    """A candidate of a tag."""

    row: int
    probability: float | None
    prior: float | None
    speaking: str  # terms around that say most for it
    chosen: bool


class Words:
    """A shard set with all that decided about its labels."""

    def __init__(self, shards: ShardSet, printer: Printer) -> None:
        self.shards, self.printer = shards, printer
        self.parameters: Mapping[str, Any] = shards.manifest.get("parameters", {})
        self.wordnet: WordNet = open_wordnet(tuple(self.parameters.get("languages", ())))
        self.policy: str = self.parameters.get("senses", "first")
        self.overrides: Overrides = read_again(shards.path, self.parameters.get("deny_list", "none"), self.wordnet)
        self.table = TagTable(self.wordnet, self.overrides, competing=self.policy == "evidence")
        file = shards.path / "evidence.parquet"
        self.evidence = Evidence.load(file, self.wordnet) if self.policy == "evidence" and file.is_file() else None
        self.classes: dict[str, VocabularyEntry] = {entry.synset: entry for entry in shards.vocabulary}

    # ------------------------------------------------------------------------------------------------------- a sample

    def sample(self, places: Sequence[Place]) -> None:
        shard, row = places[0]
        record = self.shards.record(shard, row)
        index = self.shards.index(shard).slice(row, 1).to_pylist()[0]
        facts: list[tuple[str, object]] = [
            ("caption", record["caption"]),
            *((name, record[name]) for name in ("language", "source", "licence", "url") if record.get(name)),
            *(("caption of a copy", text) for text in record.get("other_captions", ())),
            (
                "picture",
                f"{index['member']}, {index['image_size']:,} bytes, row {row} of {self.shards.tar_path(shard)}",
            ),
        ]
        if len(places) > 1 or "+" in index["key"]:
            facts.append(("copies", ", ".join(self.shards.index(s)["key"][r].as_py() for s, r in places)))
        self.printer.table(f"Sample {index['key']}", ("", ""), facts)
        meant = self._hashtags(record)
        self._labels(record, meant)
        self._repeat(record, index)

    def _hashtags(self, record: Mapping[str, Any]) -> list[int]:
        """Print what became of each tag; the synsets they give, each once."""
        tags: list[str] = record["hashtags"]
        rows, meant, ambiguous = [], [], []
        for tag in tags:
            senses, reason = self.table.lookup(tag)
            found = self._weigh(tag, senses, record["caption"], tags)
            chosen = [sense for sense in found if sense.chosen and sense.row not in self.overrides.removed]
            denied = [self.overrides.removed[s.row] for s in found if s.chosen and s.row in self.overrides.removed]
            meant += [sense.row for sense in chosen]
            rows.append((f"#{tag}", *self._verdict(tag, senses, reason, chosen, denied)))
            if len(found) > 1:
                ambiguous.append((tag, found))
        if not tags:
            self.printer.line("It has no hashtags.\n")
            return []
        self.printer.table("Hashtags", ("hashtag", "synset", "why"), rows)
        for tag, found in ambiguous:
            self._senses(f"Senses of #{tag}", found)
        return list(dict.fromkeys(meant))

    def _verdict(
        self, tag: str, senses: Sequence[int], reason: str | None, chosen: Sequence[_Sense], denied: Sequence[str]
    ) -> tuple[str, str]:
        if not senses:
            return "-", f"dropped, {reason}: {WORDS.get(reason or '', '')}"
        if denied:
            return "-", f"dropped, {denied[0]}: its likeliest sense is no class: {WORDS[denied[0]]}"
        if not chosen:
            return "-", f"dropped, undecided: {len(senses)} senses, and the policy is {self.policy}"
        names = ", ".join(self._name(sense.row) for sense in chosen)
        raw = self.wordnet.senses(tag)
        notes = []
        if self.overrides.is_forced(tag):
            notes.append("forced by the overrides")
        elif into := [sense for sense in chosen if sense.row not in raw]:
            notes.append(f"merged into {self._name(into[0].row)} by the overrides")
        if len(raw) == 1:
            notes.append("its only sense")
        elif len(senses) == 1:
            notes.append("the only sense left" if not self.overrides.is_forced(tag) else "")
        elif self.policy == "evidence" and chosen[0].probability is not None:
            notes.append(f"the likeliest of {len(senses)} senses, {chosen[0].probability:.0%}")
        elif self.policy == "first":
            notes.append(f"WordNet's first of {len(senses)} senses")
        if gone := [self._name(sense) for sense in raw if sense in self.overrides.removed and sense not in senses]:
            notes.append(f"denied: {', '.join(gone)}")
        return names, "; ".join(filter(None, notes))

    def _weigh(self, tag: str, senses: Sequence[int], caption: str | None, tags: Sequence[str]) -> list[_Sense]:
        """The candidates, and which of them the policy takes."""
        if not senses:
            return []
        probability: Sequence[float | None] = [None] * len(senses)
        prior: Sequence[float | None] = probability
        speaking = [""] * len(senses)
        taken = {"first": {0}, "all": set(range(len(senses)))}.get(self.policy, {0} if len(senses) == 1 else set())
        if self.evidence is not None and len(senses) > 1:
            likely, before, shares = self.evidence.explain(tag, senses, caption, tags)
            probability, prior, taken = likely.tolist(), before.tolist(), {int(np.argmax(likely))}
            speaking = [_speaking(shares, number) for number in range(len(senses))]
        columns = zip(senses, probability, prior, speaking, strict=True)
        return [_Sense(row, p, q, terms, number in taken) for number, (row, p, q, terms) in enumerate(columns)]

    def _senses(self, title: str, found: Sequence[_Sense]) -> None:
        weighed = found[0].probability is not None
        columns = ["", "sense", "meaning", *(["before", "here", "because of"] if weighed else [])]
        rows = []
        for sense in found:
            why = self.overrides.removed.get(sense.row)
            gloss = self.wordnet.synset(sense.row).gloss + (f" [{why}]" if why else "")
            numbers = [f"{sense.prior:.0%}", f"{sense.probability:.0%}", sense.speaking] if weighed else []
            rows.append((">" if sense.chosen else "", self._name(sense.row), gloss, *numbers))
        self.printer.table(title, columns, rows, right=(3, 4) if weighed else ())

    def _labels(self, record: Mapping[str, Any], meant: Sequence[int]) -> None:
        names: list[str] = record["synsets"]
        if again := sorted(set(names) ^ {self._name(row) for row in meant}):
            self.printer.line(
                f"The set differs about {', '.join(again)}: other software made it, or copies of "
                "this picture gave it more hashtags.\n"
            )
        if not names:
            self.printer.line("It has no labels: none of its hashtags names a noun that may be a class.\n")
            return
        images, repeats = self._repeats()
        rows = []
        for name in names:
            entry = self.classes.get(name)
            if entry is None:
                rows.append((name, "-", "-", "-", "-", self._no_class()))
            else:
                share = entry.count / images if images else 0.0
                factor = repeats.of([entry.count]) if entry.count else 1.0
                rows.append((name, entry.index, entry.count, f"{share:.3g}", f"{factor:.3f}", ""))
        self.printer.table("Labels", ("synset", "label", "images", "f(h)", "r(h)", ""), rows, right=(1, 2, 3, 4))

    def _repeat(self, record: Mapping[str, Any], index: Mapping[str, Any]) -> None:
        resampling = self.shards.manifest["resampling"]
        counts = [self.shards.vocabulary[label].count for label in record["labels"]]
        factor = self._repeats()[1].of([count for count in counts if count])
        stored = index["repeat"]
        if resampling.get("materialised"):
            words = f"seen once an epoch; copies stand for its repeat factor {factor:.3f}"
        else:
            weight = stored / factor if factor else 1.0
            words = f"seen {stored:.3f} times an epoch on average: r(I) = {factor:.3f}"
            if abs(weight - 1) > 1e-6:
                words += f", times {weight:.4g} (the weight of its source, or counts that a takedown has changed)"
        self.printer.line(f"{words} ({resampling['method']}, t = {resampling['threshold']:.3g})")

    def _repeats(self) -> tuple[int, Repeats]:
        resampling = self.shards.manifest["resampling"]
        images = resampling.get("images", self.shards.manifest["counts"]["labelled"])
        return images, Repeats(resampling["threshold"], images, resampling["method"], resampling["cap"])

    def _no_class(self) -> str:
        if self.parameters.get("vocabulary"):
            return "no class of the frozen vocabulary"
        return f"no class: fewer than {self.shards.manifest['counts']['min_count']:,} images"

    # ------------------------------------------------------------------------------------------------------ a hashtag

    def tag(self, text: str) -> None:
        found = hashtags.extract(text) or hashtags.from_column([text])
        if not found:
            raise UsageError(f"{text!r} is no hashtag: it needs a letter")
        tag = found[0]
        statistics = self._statistics(tag)
        senses, reason = self.table.lookup(tag)
        used = statistics["occurrences"] if statistics else 0
        facts: list[tuple[str, object]] = [
            ("uses", f"{used:,} in this corpus"),
            ("policy", self.policy),
        ]
        if (lemma := self.wordnet.lemma(tag)) is not None and lemma != squash(tag):
            facts.append(("read as", f"the plural of {lemma}"))
        if not senses:
            facts.append(("dropped", f"{reason}: {WORDS.get(reason or '', '')}"))
        elif self.overrides.is_forced(tag):
            facts.append(("forced", f"to {self._name(senses[0])} by the overrides"))
        if statistics and senses and (left := used - sum(statistics["chosen"])) and self.policy != "all":
            facts.append(("left out", f"{left:,} uses where a sense that is no class is the likeliest, or none"))
        if statistics and statistics["confidence"] is not None:
            facts.append(("confidence", f"{statistics['confidence']:.0%}, mean probability of the chosen sense"))
        self.printer.table(f"Hashtag #{tag}", ("", ""), facts)
        chosen = dict(zip(statistics["synsets"], statistics["chosen"], strict=True)) if statistics else {}
        rows = []
        for row in dict.fromkeys([*self.wordnet.senses(tag), *senses]):
            name = self._name(row)
            rows.append((name, self.wordnet.synset(row).gloss, chosen.get(name, 0), self._fate(row, senses)))
        if rows:
            self.printer.table("Senses", ("sense", "meaning", "chosen", "label"), rows, right=(2,))

    def _statistics(self, tag: str) -> dict[str, Any] | None:
        file = self.shards.path / "tags.parquet"
        if not file.is_file():
            return None
        try:
            found = pq.read_table(file, filters=[("tag", "==", tag)]).to_pylist()
        except OSError as error:
            raise DataError(f"cannot read {file} ({error}); build the shard set again") from None
        return found[0] if found else None

    def _fate(self, row: int, senses: Sequence[int]) -> str:
        if why := self.overrides.removed.get(row):
            return f"{why}: {WORDS[why]}"
        if (into := self.overrides.merge.get(row)) is not None:
            return f"merged into {self._name(into)}"
        if row not in senses:
            return "left out: see above"
        entry = self.classes.get(self._name(row))
        return f"{entry.index} ({entry.count:,} images)" if entry else self._no_class()

    def _name(self, row: int) -> str:
        return self.wordnet.synsets["synset"][row].as_py()


def _speaking(shares: Mapping[str, Any], number: int) -> str:
    """The terms that say most for a sense, compared with what they say for the others."""
    lead = {term: share[number] - np.delete(share, number).max() for term, share in shares.items()}
    best = sorted((term for term in lead if lead[term] > 0.005), key=lambda term: (-lead[term], term))[:TERMS]
    return ", ".join(f"{term} {lead[term]:+.2f}" for term in best)
