"""How often each policy finds the sense that was read into a hashtag: `python benchmarks/senses.py [--wrong]`.

The gold standard is demo/senses/senses.tsv (its README says how it was made): `dev` was used to choose the numbers in
data_pipeline/evidence.py, `test` was not. Right means: the sense the policy gives is among those the reader gave.
Hashtags for which the reader found no sense among the candidates are left out. No deny-list is in force here, as the
question is which sense is meant, not whether it may be a class.
"""

import argparse
import csv
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import evidence, hashtags, synsets
from data_pipeline.wordnet import open_wordnet

ROOT = Path(__file__).resolve().parents[1]


def corpus() -> dict[str, tuple[str, list[str]]]:
    """Captions and hashtags of the demo corpus by key."""
    files = sorted(
        path for path in (ROOT / "demo/emoji").glob("*.parquet") if not path.name.startswith(("eval", "train"))
    )
    rows = [row for path in files for row in pq.read_table(path, columns=["key", "caption"]).to_pylist()]
    return {row["key"]: (row["caption"] or "", hashtags.extract(row["caption"] or "")) for row in rows}


def gold() -> list[dict[str, Any]]:
    with (ROOT / "demo/senses/senses.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [row | {"synsets": row["synsets"].split()} for row in rows if row["synsets"]]


def judge(
    images: dict[str, tuple[str, list[str]]], rows: list[dict[str, Any]]
) -> Iterator[tuple[str, list[list[str]]]]:
    """Each policy and the synsets it gives each row."""
    wordnet = open_wordnet()
    table = synsets.TagTable(wordnet)
    names = wordnet.synsets["synset"].to_pylist()
    start = time.perf_counter()
    learned = evidence.fit(images.values(), table, wordnet)
    print(f"counted {len(images):,} images in {time.perf_counter() - start:.1f} s")
    candidates = table.candidates(pa.array([images[row["key"]][1] for row in rows], pa.list_(pa.string())))
    where = [  # of each row: its occurrence
        int(offset) + images[row["key"]][1].index(row["hashtag"])
        for offset, row in zip(candidates.occurrences.offsets.to_numpy(), rows, strict=False)
    ]
    chosen = {
        "first": synsets.first(candidates),
        "unambiguous": synsets.unambiguous(candidates),
        "evidence": learned.choose(candidates, [images[row["key"]][0] for row in rows])[0],
    }
    for policy, numbers in chosen.items():
        senses = [(candidates.senses[candidates.tag[place]], numbers[place]) for place in where]
        yield policy, [[names[options[number]]] if number >= 0 else [] for options, number in senses]
    yield "all", [[names[sense] for sense in candidates.senses[candidates.tag[place]]] for place in where]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wrong", action="store_true", help="list what `evidence` gets wrong on dev")
    options = parser.parse_args()
    images, rows = corpus(), gold()
    answers = dict(judge(images, rows))
    for split in ("dev", "test"):
        here = [number for number, row in enumerate(rows) if row["split"] == split]
        print(f"{split}: {len(here)} hashtags")
        right = {
            policy: [not {*given[number]}.isdisjoint(rows[number]["synsets"]) for number in here]
            for policy, given in answers.items()
        }
        for policy, hits in right.items():
            labels = sum(len(answers[policy][number]) for number in here)
            share = sum(hits) / len(hits)
            half = 1.96 * math.sqrt(share * (1 - share) / len(hits))
            print(f"  {policy:12} {100 * share:5.1f} % ± {100 * half:.1f} have the right sense; {labels} labels given")
        better = sum(e > f for e, f in zip(right["evidence"], right["first"], strict=True))
        worse = sum(e < f for e, f in zip(right["evidence"], right["first"], strict=True))
        print(f"  evidence right where first is wrong: {better}; the other way round: {worse}")
    if options.wrong:
        for row, given in zip(rows, answers["evidence"], strict=True):
            if row["split"] == "dev" and given[0] not in row["synsets"]:
                print(f"#{row['hashtag']}: {given[0]}, read as {' or '.join(row['synsets'])} | {images[row['key']][0]}")


if __name__ == "__main__":
    main()
