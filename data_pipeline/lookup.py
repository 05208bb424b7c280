"""Where a key lies in a shard set, without reading all of it.

Shards follow each other in the order of sha256(key), and inside a shard samples are sorted by key: so a binary search
over the shards, which reads one index each step, finds the shard, and another one the row. Copies (KEY+2, …) lie beside
their first.
"""

import bisect
import difflib
import functools
import hashlib
import heapq
from collections.abc import Collection, Iterator

import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.shardset import ShardSet

Place = tuple[int, int]  # shard, row


def base_key(key: str) -> str:
    """The key that a copy was made from; `+` is in no other key."""
    return key.partition("+")[0]


class Lookup:
    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self._filled = [number for number, size in enumerate(shards.shard_sizes) if size]
        self._range = functools.lru_cache(maxsize=1 << 16)(self._read_range)

    def find(self, key: str) -> list[Place]:
        """The sample of that key and its copies, or the one copy that is named; nothing if there is none."""
        order = _order(base_key(key))
        at = bisect.bisect_left(self._filled, order, key=lambda shard: self._range(shard)[1])
        if at == len(self._filled) or order < self._range(self._filled[at])[0]:
            return []
        shard = self._filled[at]
        keys = self.keys(shard)
        row = bisect.bisect_left(keys, key)
        found = []
        while row < len(keys) and (keys[row] == key or keys[row].startswith(f"{key}+")):
            found.append((shard, row))
            row += 1
        return found

    def scan(self, wanted: Collection[str]) -> dict[str, list[Place]]:
        """The same for many keys, by reading the keys of all shards."""
        found: dict[str, list[Place]] = {}
        for shard in self._filled:
            for row, key in enumerate(self.keys(shard)):
                if (base := base_key(key)) in wanted:
                    found.setdefault(base, []).append((shard, row))
        return found

    def nearest(self, key: str, number: int = 3) -> list[str]:
        """Keys that look like it, from all shards: for a typing error."""

        def alike() -> Iterator[tuple[float, str]]:
            matcher = difflib.SequenceMatcher(b=key[:100], autojunk=False)
            for shard in self._filled:
                for other in self.keys(shard):
                    matcher.set_seq1(other)
                    if matcher.real_quick_ratio() > 0.6 and matcher.quick_ratio() > 0.6:
                        yield matcher.ratio(), other

        return [other for ratio, other in heapq.nlargest(number, alike()) if ratio > 0.6]

    def keys(self, shard: int) -> list[str]:
        path = self.shards.tar_path(shard).with_suffix(".parquet")
        try:
            return pq.read_table(path, columns=["key"])["key"].to_pylist()
        except OSError as error:
            raise DataError(f"cannot read the index {path} ({error}); build the shard set again") from None

    def _read_range(self, shard: int) -> tuple[bytes, bytes]:
        orders = [_order(base_key(key)) for key in self.keys(shard)]
        return min(orders), max(orders)


def _order(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
