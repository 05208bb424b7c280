"""The tables that travel between steps. Only the first carries image bytes, and it never leaves the task that reads it.

source file ─▶ SOURCE ─▶ RECORDS ─▶ UNIQUE ─▶ LABELLED ─▶ shards
               read        read     merge      label
"""

from typing import Final

import pyarrow as pa

# What a source gives. An image that is missing is null; so is a caption, or any text nobody wrote.
SOURCE: Final = pa.schema(
    [
        ("row", pa.int64()),  # position in the source, for the order of duplicates
        ("key", pa.string()),
        ("image", pa.large_binary()),
        ("path", pa.string()),  # of the file that holds just these bytes; null inside a Parquet file
        ("caption", pa.string()),
        ("language", pa.string()),
        ("source", pa.string()),
        ("licence", pa.string()),
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
        ("hashtags", pa.list_(pa.string())),
        ("synsets", pa.list_(pa.int32())),  # rows of the WordNet table
        ("extension", pa.string()),
        ("image_path", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("image_sha256", pa.binary()),
    ]
)

UNIQUE: Final = RECORDS  # sorted by `order`, each key once

LABELLED: Final = UNIQUE.append(pa.field("labels", pa.list_(pa.int32()))).append(
    pa.field("rarest", pa.int64())  # images that have the rarest of the labels; 0 without labels
)
