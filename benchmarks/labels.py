"""Captions -> synset ids: the data pipeline against a plain loop over nltk, in one process and on one core.

    OMP_NUM_THREADS=1 python benchmarks/labels.py [--captions 1000000] [--rounds 5]

Captions are made of those of the demo corpus: a text with the hashtags of two others in its language, so that few come
twice. In `invented` every second hashtag gets a number of its own, so that most tags are seen once and dictionaries
help little. Rates are medians of rounds in which both sides take turns. nltk reads a sample, as it would take minutes
for all: twice with the same reader, first with nothing in its memory, then with every synset of the sample in it.
"""

import argparse
import functools
import random
import re
import statistics
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nltk.data
import pyarrow as pa
import pyarrow.parquet as pq
from nltk.corpus.reader.wordnet import WordNetCorpusReader

from data_pipeline import hashtags, wordnet
from data_pipeline.synsets import TagTable, choose

DEMO = Path(__file__).parent.parent / "demo" / "emoji"
BATCH = 100_000  # captions, as in a partition of a build
SAMPLE = 3000  # captions that nltk reads in a round
TAG = re.compile(r"#\w+")


def demo_captions() -> dict[str, list[str]]:
    """By language."""
    captions: dict[str, list[str]] = {}
    for path in sorted(DEMO.glob("*.parquet")):
        if "caption" in pq.read_schema(path).names:
            for row in pq.read_table(path, columns=["caption", "language"]).to_pylist():
                captions.setdefault(row["language"], []).append(row["caption"])
    return captions


def recombined(number: int, invented: bool) -> list[str]:
    """As long as those of the demo on average, with as many hashtags, and in as many languages."""
    rng = random.Random(0)
    captions = demo_captions()
    every = [(language, caption) for language, texts in captions.items() for caption in texts]
    made = []
    for n in range(number):
        language, caption = rng.choice(every)
        one, other = (TAG.findall(rng.choice(captions[language])) for _ in range(2))
        tags = [*one[::2], *other[1::2]]
        if invented:
            tags = [f"{tag}{n}" if place % 2 else tag for place, tag in enumerate(tags)]
        made.append(caption.partition("#")[0] + " ".join(tags))
    return made


def ours(captions: pa.Array, table: TagTable) -> list[pa.ListArray]:
    """Rows of the WordNet table per caption, the first sense of each tag."""
    return [
        choose(table.candidates(hashtags.extract_batch(captions.slice(start, BATCH))), "first")[0]
        for start in range(0, len(captions), BATCH)
    ]


def plain_loop(captions: list[str], reader: Any) -> list[list[int]]:
    """What one writes first; `synsets` reduces plurals by itself."""
    found = []
    for caption in captions:
        ids: list[int] = []
        for tag in hashtags.extract(caption):
            synsets = reader.synsets(tag, "n")
            if synsets and synsets[0].offset() not in ids:
                ids.append(synsets[0].offset())
        found.append(ids)
    return found


def open_reader(folder: Path) -> Any:
    root = folder / "corpora" / "wordnet"
    root.mkdir(parents=True, mode=0o700)
    with zipfile.ZipFile(wordnet.ARCHIVE) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                (root / Path(member.filename).name).write_bytes(archive.read(member))
    nltk.data.path.insert(0, str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return WordNetCorpusReader(str(root), None)


def close(reader: Any, folder: str) -> None:
    nltk.data.path.remove(folder)
    for file in reader._data_file_map.values():  # nltk leaves them open
        file.close()


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Of this process alone, whatever else the machine does."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--captions", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    words = wordnet.open_wordnet()
    offsets = [int(wnid[1:]) for wnid in words.synsets["wnid"].to_pylist()]
    for invented in (False, True):
        captions = recombined(options.captions, invented)
        array = pa.array(captions)
        rates: list[tuple[float, ...]] = []
        for number in range(options.rounds):
            table = TagTable(words)  # remembers nothing yet
            sample = slice(number * SAMPLE, (number + 1) * SAMPLE)
            took, mapped = seconds(functools.partial(ours, array, table))
            extraction, _ = seconds(functools.partial(hashtags.extract_batch, array))
            with tempfile.TemporaryDirectory() as folder:
                reader = open_reader(Path(folder))
                loop = functools.partial(plain_loop, captions[sample], reader)
                passes = [seconds(loop) for _ in range(2)]
                close(reader, folder)
            expected = passes[0][1]
            rates.append((len(captions) / took, len(captions) / extraction, *(len(expected) / t for t, _ in passes)))
            every = [[offsets[row] for row in rows] for rows in pa.concat_arrays(mapped)[sample].to_pylist()]
            same = sum(rows == ids for rows, ids in zip(every, expected, strict=True))
            missed = sum(len(set(ids) - set(rows)) for rows, ids in zip(every, expected, strict=True))
            more = sum(len(set(rows) - set(ids)) for rows, ids in zip(every, expected, strict=True))
        size = sum(map(len, captions)) / len(captions)
        we, extract, first, second = (statistics.median(column) for column in zip(*rates, strict=True))
        print(f"{'invented' if invented else 'demo'}: {len(captions):,} captions of {size:.0f} characters")
        print(f"  captions -> synsets   {we:9,.0f} captions/s   (captions -> hashtags alone {extract:,.0f})")
        for name, rate, column in (("first", first, 2), ("second", second, 3)):
            ratios = sorted(row[0] / row[column] for row in rates)
            spread = f"{statistics.median(ratios):.0f} ({ratios[0]:.0f} to {ratios[-1]:.0f})"
            print(f"  nltk, {name:6} pass    {rate:9,.0f} captions/s   ratio {spread}")
        print(f"  same synsets for {same / len(expected):.1%} of the sample; ours has {more} others, nltk {missed}")


if __name__ == "__main__":
    main()
