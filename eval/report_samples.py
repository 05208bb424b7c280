"""Pictures of the training set with what people said of them and what was made of that. No torch.

report_samples.draw(ShardSet.open("runs/demo/shards"), 15)
"""

from dataclasses import dataclass

import numpy as np

from data_pipeline.images import BadImage, decode
from data_pipeline.shardset import ShardSet
from eval.figures import thumbnail


@dataclass(frozen=True)
class Sample:
    """A training picture with what people said of it and what was made of that."""

    image: str
    caption: str
    hashtags: list[str]
    synsets: list[tuple[str, str]]  # name, gloss
    repeat: float
    source: str


def draw(shards: ShardSet, number: int) -> list[Sample]:
    """Labelled pictures spread evenly over the set (whose order is by hash of the key, so this is a fair draw)."""
    labelled = [
        (shard, row)
        for shard in range(shards.num_shards)
        for row, labels in enumerate(shards.index(shard)["labels"].to_pylist())
        if labels
    ]
    glosses = {entry.synset: entry.gloss for entry in shards.vocabulary}
    found: list[Sample] = []
    for position in np.linspace(0, len(labelled) - 1, min(number, len(labelled))).astype(int):
        shard, row = labelled[position]
        try:
            image = decode(shards.image_bytes(shard, row))
        except BadImage:
            continue
        record = shards.record(shard, row)
        synsets = [(name, glosses.get(name, "")) for name in record.get("synsets", [])]
        caption = " ".join(word for word in str(record.get("caption", "")).split() if not word.startswith("#"))
        hashtags = list(dict.fromkeys(record.get("hashtags", [])))
        source = str(record.get("source") or "")
        found.append(Sample(thumbnail(image), caption, hashtags, synsets, float(record.get("repeat", 1)), source))
    return found
