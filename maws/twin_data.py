"""A shard set made on the spot, for a rehearsal where no data is at hand: coloured squares with fitting captions."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.shardset import Sample, VocabularyEntry, write_manifest, write_shard, write_vocabulary

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200), "yellow": (220, 200, 40)}
SIDE, PER_SHARD = 64, 32


def make_shards(folder: Path, samples: int = 96) -> Path:
    """Write a shard set of `samples` pictures; the synset of a picture is the colour of its shape."""
    (folder / "shards").mkdir(parents=True)
    names = list(COLOURS)
    shards = [
        write_shard(folder / "shards", f"{i:05}", _pictures(start, min(start + PER_SHARD, samples)))
        for i, start in enumerate(range(0, samples, PER_SHARD))
    ]
    counts = [len(range(i, samples, len(names))) for i in range(len(names))]
    vocabulary = [
        VocabularyEntry(i, f"{name}.n.01", f"n{i:08}", [name], f"the colour {name}", counts[i])
        for i, name in enumerate(names)
    ]
    digest = write_vocabulary(folder / "vocabulary.parquet", vocabulary)
    write_manifest(folder, {"shards": shards, "vocabulary_sha256": digest, "made_by": "maws/twin_data.py"})
    return folder


def _pictures(start: int, stop: int) -> Iterator[Sample]:
    for number in range(start, stop):
        rng, label = np.random.default_rng(number), number % len(COLOURS)
        name, colour = list(COLOURS.items())[label]
        pixels = np.full((SIDE, SIDE, 3), rng.integers(90, 160), np.uint8)
        top, left = rng.integers(4, SIDE // 2, 2)
        pixels[top : top + SIDE // 2, left : left + SIDE // 2] = colour
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "png")
        key, record = f"twin{number:05}", {"caption": f"a {name} square on grey", "labels": [label], "repeat": 1.0}
        yield Sample(key, data.getvalue(), "png", {"key": key, **record}, [label], 1.0)
