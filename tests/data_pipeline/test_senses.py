"""demo/senses is about the demo corpus and this WordNet, and holds as many lines as it says."""

import csv
import hashlib
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline.hashtags import extract
from data_pipeline.wordnet import WordNet

DEMO = Path(__file__).parents[2] / "demo"
VENDORS = ("noto", "noto-v1", "twemoji", "openmoji", "fluent-emoji", "fluent-emoji-flat")


@pytest.fixture(scope="module")
def gold() -> list[dict[str, str]]:
    with (DEMO / "senses" / "senses.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def emoji(key: str) -> str:
    return next(key.removeprefix(f"{v}-") for v in sorted(VENDORS, key=len, reverse=True) if key.startswith(f"{v}-"))


def test_every_line_is_a_caption_of_the_corpus_with_its_hashtag(gold):
    captions = {}
    for vendor in VENDORS:
        table = pq.read_table(DEMO / "emoji" / f"{vendor}.parquet", columns=["key", "caption", "language"])
        captions |= {row["key"]: (row["caption"], row["language"]) for row in table.to_pylist()}
    for line in gold:
        assert captions[line["key"]] == (line["caption"], "en")
        assert line["hashtag"] in extract(line["caption"])


def test_what_is_meant_is_a_candidate_of_an_ambiguous_hashtag_or_the_reason_is_given(gold, nouns: WordNet):
    for line in gold:
        candidates = [nouns.synset(row).name for row in nouns.senses(line["hashtag"])]
        meant = line["synsets"].split()
        assert len(candidates) >= 2, line
        assert set(meant) <= set(candidates), line
        assert len(meant) == len(set(meant)), line
        assert line["note"].startswith("none: ") == (not meant), line


def test_no_emoji_is_in_both_splits_and_the_split_is_a_hash(gold):
    for line in gold:
        digest = hashlib.sha256(emoji(line["key"]).encode()).digest()
        assert line["split"] == ("dev" if digest[0] % 3 == 0 else "test")


def test_at_most_three_lines_of_a_hashtag_each_on_another_emoji(gold):
    pairs = Counter((line["hashtag"], emoji(line["key"])) for line in gold)
    assert max(pairs.values()) == 1
    assert max(Counter(hashtag for hashtag, _ in pairs).values()) <= 3


def test_the_readme_counts_the_lines(gold):
    stated = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|", (DEMO / "senses" / "README.md").read_text("utf-8"), re.M)
    counted = [
        (split, str(sum(line["split"] == split for line in gold)),
         str(sum(line["split"] == split and bool(line["synsets"]) for line in gold)))
        for split in ("dev", "test")
    ]  # fmt: skip
    assert stated == counted
