"""What one task reads: a piece is plain data that can be sent to another process and read again, with the same rows."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import pyarrow as pa

from data_pipeline.schema import SOURCE

PIECE_ROWS: Final = 1000  # a task of about a second for small pictures, so that a kill loses little
BATCH_ROWS: Final = 32  # images in memory at a time
BATCH_BYTES: Final = 64 << 20  # and their bytes, but for the last one
GUESSED_BYTES: Final = 64 << 10  # of one sample, where counting would mean to fetch everything


class Piece(Protocol):
    @property
    def rows(self) -> int:
        """How many; of a tar or an Arrow stream far away a guess, since these do not say."""
        ...

    def read(self) -> Iterator[pa.Table]:
        """Tables of schema.SOURCE, the same each time."""
        ...

    def part(self, start: int, stop: int) -> "Piece":
        """Some of the rows, by their position in the piece, all that are left if `stop` is behind the last; the images
        of others reach nobody."""
        ...


@dataclass(frozen=True)
class Slice:
    """Rows of a piece that can only be read in order."""

    piece: Piece
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def read(self) -> Iterator[pa.Table]:
        position = 0
        for table in self.piece.read():
            begin, end = max(self.start - position, 0), self.stop - position
            if begin < min(end, len(table)):
                yield table.slice(begin, end - begin)
            position += len(table)
            if position >= self.stop:
                return

    def part(self, start: int, stop: int) -> "Slice":
        return Slice(self.piece, self.start + start, min(self.start + stop, self.stop))


@dataclass(frozen=True)
class Weighted:
    """A piece of a source that counts for more or less than others."""

    piece: Piece
    weight: float

    @property
    def rows(self) -> int:
        return self.piece.rows

    def read(self) -> Iterator[pa.Table]:
        place = SOURCE.get_field_index("weight")
        for table in self.piece.read():
            weights = pa.array([self.weight] * len(table), SOURCE.field("weight").type)
            yield table.set_column(place, SOURCE.field("weight"), weights)

    def part(self, start: int, stop: int) -> "Weighted":
        return Weighted(self.piece.part(start, stop), self.weight)


def tables(rows: Iterable[dict[str, Any]]) -> Iterator[pa.Table]:
    """A few rows at a time, fewer of large images."""
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.get("image") or b"")
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            yield pa.Table.from_pylist(batch, schema=SOURCE)
            batch, size = [], 0
    if batch:
        yield pa.Table.from_pylist(batch, schema=SOURCE)


def cut(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of stretches of at most that size."""
    return ((start, min(start + size, count)) for start in range(0, count, size))
