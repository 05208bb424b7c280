"""Steps senses, vocabulary and label: hashtags -> synsets -> classes -> label indices."""

from collections import Counter
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import evidence, schema, tag_counts, vocabulary
from data_pipeline.compute import pc
from data_pipeline.job import Counts
from data_pipeline.resample import signature
from data_pipeline.shardset import write_table
from data_pipeline.steps import (
    ROW_GROUP,
    Settings,
    Work,
    read_evidence,
    read_tag_table,
    read_unique,
    read_wordnet,
    sum_counts,
    write_counts,
    write_dropped,
)
from data_pipeline.steps.read import why_unlabelled
from data_pipeline.synsets import choose, first, unambiguous

HISTOGRAM: Final = pa.schema([("counts", pa.list_(pa.int64())), ("weight", pa.float64()), ("images", pa.int64())])
CLASSES: Final = pa.schema([("row", pa.int32()), ("index", pa.int32()), ("count", pa.int64())])


def weigh(work: Work, settings: Settings, partitions: int) -> Counts:
    """Evidence for the senses of hashtags, from the first images in the order of the shards: that order is random."""
    images: list[tuple[str | None, list[str]]] = []
    for partition in range(partitions):
        table = read_unique(work, partition, ["caption", "hashtags"]).slice(0, evidence.SAMPLE - len(images))
        images.extend(zip(table["caption"].to_pylist(), table["hashtags"].to_pylist(), strict=True))
        if len(images) == evidence.SAMPLE:
            break
    evidence.fit(images, read_tag_table(work, settings), read_wordnet(work.wordnet)).save(work.evidence)
    return {"images_of_evidence": len(images)}


def senses(work: Work, settings: Settings, partition: int) -> Counts:
    """The synsets of each image, images per synset, and what became of each hashtag."""
    unique = read_unique(work, partition)
    table = read_tag_table(work, settings)
    candidates = table.candidates(unique["hashtags"])
    meant, probability, denied = None, None, 0
    if settings.senses == "evidence":
        meant, probability = read_evidence(work).choose(candidates, unique["caption"].to_pylist())
        meant, denied = table.leave_out(candidates, meant)
    elif settings.senses != "all":
        meant = {"first": first, "unambiguous": unambiguous}[settings.senses](candidates)
    mapped, counts = choose(candidates, "all" if meant is None else meant)
    counts |= {
        "denied_hashtags": counts["denied_hashtags"] + denied,
        "undecided_hashtags": counts["undecided_hashtags"] - denied,
    }
    write_table(
        work.table("mapped", partition), unique.append_column(schema.MAPPED.field("synsets"), mapped), ROW_GROUP
    )
    used, images = np.unique(mapped.flatten().to_numpy(), return_counts=True)
    write_counts(work.table("synsets", partition), Counter(dict(zip(used.tolist(), images.tolist(), strict=True))))
    write_table(work.table("tags", partition), tag_counts.count(candidates, meant, probability))
    return {**counts, "named_by_wordnet": int((mapped.value_lengths().to_numpy(zero_copy_only=False) > 0).sum())}


def count_tags(work: Work, partitions: int) -> Counts:
    """tags.parquet of the shard set."""
    tables = (pq.read_table(work.table("tags", partition)) for partition in range(partitions))
    names = read_wordnet(work.wordnet).synsets["synset"].combine_chunks()
    write_table(work.tags, tag_counts.add(tables, names))
    return {}


def choose_vocabulary(work: Work, settings: Settings, partitions: int, named: int) -> Counts:
    """The vocabulary file, and the table synset row -> (label index, images)."""
    counts, wordnet = sum_counts(work, "synsets", partitions), read_wordnet(work.wordnet)
    if settings.vocabulary is not None:
        classes = vocabulary.reuse(work.frozen, counts, wordnet)
    else:
        minimum = vocabulary.choose_minimum(counts, named, settings.min_count, settings.vocabulary_size)
        classes = vocabulary.choose(counts, minimum, wordnet)
    vocabulary.write(work.vocabulary, classes.entries, wordnet)
    images = [entry.count for entry in classes.entries]
    columns = {"row": classes.rows, "index": list(range(len(images))), "count": images}
    write_table(work.classes, pa.table(columns, schema=CLASSES))
    chosen = sum(map(bool, images))
    return {
        "min_count": classes.minimum,
        "classes": len(images),
        "classes_without_images": len(images) - chosen,
        "synsets": len(counts),
        "synsets_outside": len(counts) - chosen,
    }


def label(work: Work, settings: Settings, partition: int) -> Counts:
    """Label indices of each image and the counts that decide its repeat factor; what is without is dropped or kept."""
    classes = pq.read_table(work.classes)
    index, count = (
        dict(zip(classes["row"].to_pylist(), classes[name].to_pylist(), strict=True)) for name in ("index", "count")
    )
    mapped = pq.read_table(work.table("mapped", partition), schema=schema.MAPPED)
    known = [[synset for synset in row if synset in index] for row in mapped["synsets"].to_pylist()]
    signatures = [signature(settings.resample, [count[synset] for synset in row]) for row in known]
    labels = [sorted(index[synset] for synset in row) for row in known]
    labelled = mapped.append_column(schema.LABELLED.field("labels"), pa.array(labels, pa.list_(pa.int32())))
    labelled = labelled.append_column(schema.LABELLED.field("counts"), pa.array(signatures, pa.list_(pa.int64())))
    has_labels = pc.list_value_length(labelled["labels"]).to_numpy() > 0
    without = labelled.filter(pa.array(~has_labels)).select(["key", "source", "synsets", "hashtags", "caption"])
    outside = "below_min_count" if settings.vocabulary is None else "not_in_vocabulary"
    unlabelled = [(row, outside if row["synsets"] else why_unlabelled(row)) for row in without.to_pylist()]
    dropped: list[dict[str, str | None]] = []
    if not settings.keep_unlabelled:
        labelled = labelled.filter(pa.array(has_labels))
        dropped = [
            {"key": row["key"], "reason": reason, "detail": None, "source": row["source"]} for row, reason in unlabelled
        ]
    write_table(work.table("labelled", partition), labelled, ROW_GROUP)
    _write_histogram(work.table("rarest", partition), labelled)
    write_dropped(work.table("dropped_label", partition), dropped)
    return {
        "kept": len(labelled),
        "labelled": len(mapped) - len(without),
        "labels": sum(map(len, labels)),
        "unlabelled" if settings.keep_unlabelled else "dropped": dict(Counter(reason for _, reason in unlabelled)),
    }


def _write_histogram(path: Path, labelled: pa.Table) -> None:
    """Images by what their repeat factors depend on: the counts of their labels and the weight of their source."""
    signatures = map(tuple, labelled["counts"].to_pylist())
    images = sorted(Counter(zip(signatures, labelled["weight"].to_pylist(), strict=True)).items())
    rows = [{"counts": list(counts), "weight": weight, "images": number} for (counts, weight), number in images]
    write_table(path, pa.Table.from_pylist(rows, schema=HISTOGRAM))
