"""The tables that travel between steps. Only the first carries image bytes, and it never leaves the task that reads it.

source file ─▶ SOURCE ─▶ RECORDS ─▶ MAPPED ─▶ LABELLED ─▶ shards
               read        merge      senses     label
"""

from typing import Final

import pyarrow as pa

# What a source gives. An image that is missing is null; so is a caption, or any text nobody wrote.
SOURCE: Final = pa.schema(
    [
        ("row", pa.int64()),  # position in the source, for the order of duplicates
        ("key", pa.string()),
        ("image", pa.large_binary()),
        ("path", pa.string()),  # of the local file that holds just these bytes; null inside a Parquet file or a tar
        ("caption", pa.string()),
        ("language", pa.string()),
        ("source", pa.string()),
        ("licence", pa.string()),
        ("url", pa.string()),  # where the picture came from
        ("weight", pa.float64()),  # of its source: multiplies the repeat factor; null is 1
        ("hashtags", pa.list_(pa.string())),  # of a column of their own, as written; null without one
        ("problem", pa.string()),  # why the row cannot be used, null if it can
    ]
)

# One row per usable image: everything of the sample but the pixels, and where these lie.
RECORDS: Final = pa.schema(
    [
        ("partition", pa.int32()),  # by the first bits of `order`
        ("order", pa.binary()),  # sha256 of the key: samples are sorted by it
        ("key", pa.string()),
        ("task", pa.int32()),  # (task, row) is the input order
        ("row", pa.int64()),
        ("caption", pa.string()),
        ("language", pa.string()),
        ("source", pa.string()),
        ("licence", pa.string()),
        ("url", pa.string()),
        ("weight", pa.float64()),
        ("hashtags", pa.list_(pa.string())),
        ("other_captions", pa.list_(pa.string())),  # of removed copies, where they are merged; else empty
        ("extension", pa.string()),
        ("image_path", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("image_sha256", pa.binary()),  # of the bytes as stored
        ("content_sha256", pa.binary()),  # of the bytes as they came
        ("perceptual_hash", pa.binary()),  # 32 bytes; null where it is off or the picture says nothing
        ("look", pa.binary()),  # 448 bytes, see look.py; null where there is no hash
        ("width", pa.int32()),  # as it came, upright
        ("height", pa.int32()),
    ]
)

MAPPED: Final = RECORDS.append(pa.field("synsets", pa.list_(pa.int32())))  # rows of the WordNet table, each once

LABELLED: Final = MAPPED.append(pa.field("labels", pa.list_(pa.int32()))).append(
    pa.field("counts", pa.list_(pa.int64()))  # of the labels, as far as the repeat factor depends on them
)

# Records that later steps leave out: copies of others and evaluation images. One file per partition, sorted by `order`.
REMOVED: Final = pa.schema(
    [
        ("order", pa.binary()),
        ("key", pa.string()),
        ("reason", pa.string()),  # exact_duplicate, near_duplicate, evaluation_image
        ("kept", pa.string()),  # the key that stays, or evaluation set and name
        ("distance", pa.int32()),  # bits between the perceptual hashes; 0 for equal bytes
    ]
)

# dropped.parquet of a shard set: every record that was read and is not in it, in the order of the steps.
DROPPED: Final = pa.schema(
    [
        ("key", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("source", pa.string()),
    ]
)

# tags.parquet of a shard set: what became of every hashtag, the most frequent first.
TAGS: Final = pa.schema(
    [
        ("tag", pa.string()),
        ("occurrences", pa.int64()),  # on images that were left after removing duplicates
        ("synsets", pa.list_(pa.string())),  # candidate senses, the most usual first; empty: see `reason`
        ("chosen", pa.list_(pa.int64())),  # occurrences that got each of them
        ("confidence", pa.float64()),  # mean probability of what was chosen; null where there was nothing to choose
        ("reason", pa.string()),  # why the tag names nothing: unmapped, forbidden, denied_…; null if it does
    ]
)
