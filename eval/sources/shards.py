"""A shard set as evaluation data; the class of a sample is the one class whose synset is among its synsets.

A set that `python -m eval shards` wrote has its classes in its vocabulary, one a sample.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from data_pipeline.errors import DataError
from data_pipeline.shardset import ShardSet
from eval.classes import Classes, Label
from eval.sources.source import Source

CLASSES: Final = "classes"  # the kind of a set with one class a sample, in its manifest


def open_shards(path: Path) -> tuple[ShardSet, Source]:
    """Every sample of the set, without labels."""
    shards = ShardSet.open(path)
    places = [(shard, row) for shard, size in enumerate(shards.shard_sizes) for row in range(size)]
    keys = [key for shard in range(shards.num_shards) for key in shards.index(shard)["key"].to_pylist()]
    source = Source(
        str(path), keys, [None] * len(keys), lambda position: shards.image_bytes(*places[position]), shards.sha256
    )
    source.escaped = True
    return shards, source


def read_shards(path: Path, classes: Classes | None, labelled: bool) -> Source:
    """With `labelled` a labels file brings the classes, else `classes` says which synsets they are."""
    shards, source = open_shards(path)
    if shards.manifest.get("kind") == CLASSES and not labelled:
        source.labels = [labels[0] for labels in _every_label(shards)]
        source.class_names = tuple(entry.lemmas[0] for entry in shards.vocabulary)
        return source
    if classes is None and not labelled:
        raise DataError(f"{path} is a shard set: say which synsets are classes with --classes, or give a labels file")
    if classes is not None:
        source.labels = _labels(path, shards, classes, source)
    return source


def _labels(path: Path, shards: ShardSet, classes: Classes, source: Source) -> list[Label | None]:
    of_synset = {synset: label for label, synset in enumerate(classes.synsets) if synset}
    of_index = {e.index: of_synset[s] for e in shards.vocabulary for s in (e.wnid, e.synset) if s in of_synset}
    if not of_index:
        raise DataError(f"no class of {classes.source} has a synset in the vocabulary of {path}")
    labels: list[Label | None] = []
    for indices in _every_label(shards):
        matches = {of_index[index] for index in indices if index in of_index}
        labels.append(matches.pop() if len(matches) == 1 else None)
        if labels[-1] is None:
            source.left_out["several_classes" if matches else "no_class"] += 1
    return labels


def _every_label(shards: ShardSet) -> Iterator[list[int]]:
    """The labels of each sample, in order."""
    for shard in range(shards.num_shards):
        yield from shards.index(shard)["labels"].to_pylist()
