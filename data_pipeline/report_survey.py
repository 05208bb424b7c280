"""One look through a finished shard set, for the data page: labels, repeats, languages, sources, licences, pictures.

Small sets are read whole. Of large ones some shards and some samples are read, spread evenly, and the page says so.
"""

import base64
import io
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.images import BadImage, decode
from data_pipeline.shardset import ShardSet
from data_pipeline.summary import REPEAT_EDGES

MAX_SHARDS: Final = 2_000  # indexes read: two million samples at the default size
MAX_RECORDS: Final = 20_000  # samples whose text is read: shares are then right to about a percentage point
THUMBNAIL: Final = 112  # pixels of the longer side

Place = tuple[int, int]  # shard, row


@dataclass
class Survey:
    """Numbers over what was read; `samples` of the set's `total`."""

    total: int
    samples: int = 0
    shards: int = 0
    images: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # per label
    seen: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # per label and epoch, after resampling
    labels_per_image: Counter[int] = field(default_factory=Counter)
    repeats: Counter[int] = field(default_factory=Counter)  # number of edges of REPEAT_EDGES below it
    is_repeating: bool = True  # nothing is seen less than once
    repeated: list[float] = field(default_factory=list)  # samples an epoch, by the same bins
    records: int = 0
    texts: dict[str, Counter[str | None]] = field(default_factory=dict)  # language, source, licence

    @property
    def is_whole(self) -> bool:
        return self.samples == self.total


def survey(shards: ShardSet) -> Survey:
    result = Survey(len(shards))
    result.images = np.zeros(len(shards.vocabulary))
    result.seen = np.zeros(len(shards.vocabulary))
    sums = np.zeros(len(REPEAT_EDGES) + 1)
    for shard in spread(shards.num_shards, MAX_SHARDS):
        table = shards.index(shard)
        repeat = table["repeat"].to_numpy()
        lists = pa.concat_arrays(table["labels"].chunks) if table.num_rows else pa.array([], pa.list_(pa.int32()))
        lengths, labels = lists.value_lengths().to_numpy(), lists.flatten().to_numpy()
        result.images += np.bincount(labels, minlength=len(result.images))
        result.seen += np.bincount(labels, weights=np.repeat(repeat, lengths), minlength=len(result.seen))
        result.labels_per_image.update(lengths.tolist())
        result.is_repeating &= bool((repeat >= 1).all())
        bins = np.searchsorted(REPEAT_EDGES, repeat)  # edges below the value
        result.repeats.update(bins.tolist())
        sums += np.bincount(bins, weights=repeat, minlength=len(sums))
        result.samples += table.num_rows
        result.shards += 1
    result.repeated = sums.tolist()
    result.texts = {name: Counter() for name in ("language", "source", "licence")}
    for shard, row in spread_samples(shards, MAX_RECORDS):
        record = shards.record(shard, row)
        for name, counter in result.texts.items():
            counter[text_or_none(record.get(name))] += 1
        result.records += 1
    return result


def text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def spread(total: int, wanted: int) -> list[int]:
    """At most `wanted` of range(total), evenly."""
    number = min(total, wanted)
    return [position * total // number for position in range(number)]


def spread_samples(shards: ShardSet, wanted: int) -> Iterator[Place]:
    yield from _places(shards, spread(len(shards), wanted))


def draw_samples(shards: ShardSet, wanted: int) -> list[Place]:
    """Samples drawn by the identity of the set: the same set shows the same ones."""
    chosen = sorted(random.Random(shards.sha256).sample(range(len(shards)), min(wanted, len(shards))))
    return list(_places(shards, chosen))


def _places(shards: ShardSet, positions: Iterable[int]) -> Iterator[Place]:
    """Shard and row of ascending positions."""
    shard, start = 0, 0
    for position in positions:
        while position >= start + shards.shard_sizes[shard]:
            start += shards.shard_sizes[shard]
            shard += 1
        yield shard, position - start


def find_keys(shards: ShardSet, keys: Iterable[str]) -> dict[str, Place]:
    """Where samples lie, for the data page: looked for in the shards that `survey` reads."""
    wanted = set(keys)
    found: dict[str, Place] = {}
    for shard in spread(shards.num_shards, MAX_SHARDS) if wanted else ():
        for row, key in enumerate(shards.index(shard)["key"].to_pylist()):
            if key in wanted:
                found[key] = (shard, row)
        if len(found) == len(wanted):
            break
    return found


def picture(shards: ShardSet, place: Place) -> str | None:
    """A sample's picture, small, as a data URI; None where it cannot be decoded."""
    try:
        return thumbnail(shards.image_bytes(*place))
    except DataError:
        return None


def thumbnail(data: bytes, side: int = THUMBNAIL) -> str | None:
    """Decoded and encoded anew: nothing of the file but its pixels reaches the page. Small ones keep their pixels."""
    try:
        image = decode(data)
    except BadImage:
        return None
    small = max(image.size) <= side
    if not small:
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = io.BytesIO()
    image.save(buffer, "png") if small else image.save(buffer, "jpeg", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
