"""Frozen features of a run's encoder, extracted once and cached.

    encoder = open_encoder(Path("runs/demo/mae_wsp"))          # decode -> preprocess -> tower -> a vector, float32
    bank = extract(encoder, data.train)                        # bank.features N D, bank.labels N
    mean = extract(encoder, data.train, "mean")                # from the same pass over the pictures

The cache is RUN/features/*.safetensors, one file for everything that features depend on (feature_file.py); a picture
that cannot be decoded is dropped, counted and reported, and more than 1 % of them stop the evaluation. Under several
ranks each computes its share of the batches, and all have all features afterwards (distributed.py).
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from eval import distributed, feature_file
from eval.datasets import Dataset
from eval.decode import BATCH as BATCH
from eval.decode import Broken as Broken
from eval.decode import Decoded as Decoded
from eval.decode import View as View
from eval.decode import batches_of, decoded_batches
from eval.decode import decoded as decoded
from eval.decode import pictures as pictures
from eval.encoder import Encoder as Encoder
from eval.encoder import Kind as Kind
from eval.encoder import home as home
from eval.encoder import open_encoder as open_encoder
from eval.encoder import pick_device as pick_device
from eval.feature_file import Table
from eval.progress import Progress

log = logging.getLogger(__name__)

MAX_BAD: Final = 0.01  # share of pictures that may be broken
CHECK: Final = 64  # batches after which the ranks ask each other whether it is worth going on


@dataclass(frozen=True)
class Features:
    """Features of the readable pictures of a data set, in its order."""

    features: Tensor  # N D, float32, on the encoder's device
    labels: Tensor  # N
    rows: Tensor  # N, positions in the data set
    keys: tuple[str, ...]
    broken: dict[str, int]  # dropped pictures by reason

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.features.split(size), self.labels.split(size), strict=True)


def extract(encode: Encoder, dataset: Dataset, kind: Kind = "pooled") -> Features:
    """Features of `dataset`, from the cache when nothing that they depend on has changed."""
    kind = encode.own(kind)
    source = "joint" if kind == "joint" else "tower"
    identity = feature_file.identity_of(encode, dataset, source)
    keep = encode.cache if encode.sha256 else None
    file = feature_file.place(keep, source, dataset, identity) if keep else None
    table = _cached(file, identity, kind) if file else None
    if table is None:
        table = _compute(encode, dataset, ("joint",) if kind == "joint" else encode.kinds)
        if file and distributed.is_first():
            feature_file.write(file, identity, table)
    if table.broken:
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(table.broken.items()))
        log.warning(
            "warning: %d of %d pictures of the %s data cannot be read and are left out: %s",
            sum(table.broken.values()),
            len(dataset),
            dataset.name,
            listed,
        )
    positions = table.rows.tolist()
    return Features(
        table.features[kind].to(encode.device),
        torch.from_numpy(dataset.labels)[table.rows].to(encode.device),
        table.rows,
        tuple(dataset.keys[position] for position in positions),
        table.broken,
    )


def allowed_broken(dataset: Dataset) -> float:
    """How many pictures may be broken; of a part, how many in the whole."""
    return MAX_BAD * max(len(dataset), dataset.part_of)


def too_many_broken(dataset: Dataset, such_as: str) -> str:
    return (
        f"more than {MAX_BAD:.0%} of the {max(len(dataset), dataset.part_of):,} pictures of the {dataset.name} data "
        f"cannot be read, such as {such_as}; repair or remove them"
    )


def _cached(file: Path, identity: str, kind: Kind) -> Table | None:
    """Rank 0 looks and tells the others: they must not disagree about who computes, nor read a file in the making."""
    found = feature_file.read(file, identity, kind) if distributed.is_first() else None
    broken = distributed.from_first(lambda: found.broken if found else None)
    if broken is None:
        return None
    features = distributed.send_from_first(found.features[kind] if found else None)
    return Table({kind: features}, distributed.send_from_first(found.rows if found else None), broken)


def _compute(encode: Encoder, dataset: Dataset, kinds: Sequence[Kind]) -> Table:
    """One pass over the pictures, shared out over the ranks."""
    batches = batches_of(range(len(dataset)), encode.batch or BATCH)
    own, steps = distributed.own_share(batches), distributed.steps(batches)
    sink = _Sink(dataset, kinds)
    with Progress(f"features of the {dataset.name} data", len(dataset)) as progress:
        source = _Timed(decoded_batches(dataset, own, encode.preprocess, pin=encode.device.type == "cuda"), encode)
        for step in range(steps):
            distributed.pulse(step, f"features of the {dataset.name} data")
            batch = source.next()
            sink.count(batch.broken)
            sink.add(_forward(encode, batch.images, kinds), batch.rows)
            if step % CHECK == CHECK - 1 and any(distributed.gather(bool(sink.wrong))):
                break
            progress.more = f", {source.share:.1%} of the time waiting for pictures"
            progress.add(distributed.world_size() * (len(batch.rows) + len(batch.broken)))
        sink.flush()
        source.end()
    return sink.table()


def _forward(encode: Encoder, images: Tensor, kinds: Sequence[Kind]) -> dict[Kind, Tensor]:
    """Every rank does as many forwards as any other: one without pictures looks at a black one, for nobody."""
    real = len(images)
    if not real:
        size = encode.preprocess.image_size
        images = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    found = {"joint": encode(images, "joint")} if "joint" in kinds else encode.all(images)
    return {kind: found[kind][:real] for kind in kinds}


class _Timed:
    """Batches, and the share of the time in which there was none for the encoder; empty ones at the end.

    On a GPU waiting counts only if the GPU had done all it was given by the time that pictures came: an upper bound.
    """

    def __init__(self, batches: Generator[Decoded, None, None], encode: Encoder) -> None:
        self.batches, self.cuda = batches, encode.device.type == "cuda"
        size = encode.preprocess.image_size
        self.nothing = Decoded(torch.empty(0, 3, size, size, dtype=torch.uint8), [], [])
        self.begin, self.waited = time.monotonic(), 0.0

    def next(self) -> Decoded:
        start = time.monotonic()
        batch = next(self.batches, self.nothing)
        if not self.cuda or torch.cuda.current_stream().query():
            self.waited += time.monotonic() - start
        return batch

    @property
    def share(self) -> float:
        return self.waited / max(time.monotonic() - self.begin, 1e-9)

    def end(self) -> None:
        """Ends the threads, also when the ranks have agreed to stop."""
        self.batches.close()


class _Sink:
    """Where features go: tables N D with a row for each picture of the data set, made once and at their full size.

    What the device computes is fetched one step later, so that it has work while this process waits. What is wrong with
    the features of one rank stops all of them together: it is kept until the ranks ask each other.
    """

    def __init__(self, dataset: Dataset, kinds: Sequence[Kind]) -> None:
        self.dataset, self.kinds = dataset, kinds
        self.tables: dict[Kind, Tensor] = {}
        self.rows: list[int] = []
        self.broken: list[Broken] = []
        self.waiting: deque[tuple[dict[Kind, Tensor], list[int]]] = deque()
        self.wrong = ""

    def count(self, broken: list[Broken]) -> None:
        self.broken += broken
        self._say(self._too_many(self.broken))

    def _say(self, wrong: str) -> None:
        """One process ends at once, several together. Raises DataError."""
        self.wrong = self.wrong or wrong
        if self.wrong and distributed.world_size() == 1:
            raise DataError(self.wrong)

    def _too_many(self, broken: Sequence[Broken]) -> str:
        if len(broken) <= allowed_broken(self.dataset):
            return ""
        return too_many_broken(self.dataset, f"'{broken[0].key}' ({broken[0].reason})")

    def add(self, found: dict[Kind, Tensor], rows: list[int]) -> None:
        self.waiting.append((found, rows))
        if len(self.waiting) > 1:
            self._fetch()

    def flush(self) -> None:
        while self.waiting:
            self._fetch()

    def _fetch(self) -> None:
        found, rows = self.waiting.popleft()
        for kind, features in found.items():
            if kind not in self.tables:
                self.tables[kind] = torch.empty(len(self.dataset), features.shape[1])
            if not rows:
                continue
            features = features.cpu()
            if not torch.isfinite(features).all():
                bad = int((~torch.isfinite(features)).any(dim=1).nonzero()[0])
                self._say(
                    f"the encoder gives nan or infinity on the {self.dataset.name} data, first for "
                    f"'{self.dataset.keys[rows[bad]]}' ({kind} features); its weights are damaged, or too large for "
                    f"--precision bf16"
                )
            self.tables[kind][rows[0] : rows[-1] + 1][_within(rows)] = features
        self.rows += rows

    def table(self) -> Table:
        """Of all ranks, which take part together. Raises DataError."""
        everybody = distributed.gather((self.wrong, self.broken))
        broken = [one for _, own in everybody for one in own]
        if wrong := next((wrong for wrong, _ in everybody if wrong), self._too_many(broken)):
            raise DataError(wrong)
        rows = distributed.exchange(self.tables, torch.tensor(self.rows, dtype=torch.int64))
        tables = {kind: _compact(self.tables.pop(kind), rows) for kind in self.kinds}
        return Table(dict(tables), rows, dict(Counter(one.reason for one in broken)))


def _within(rows: list[int]) -> Any:
    """Rows of a batch, as places in the stretch from the first to the last."""
    whole = rows[-1] - rows[0] + 1 == len(rows)
    return slice(None) if whole else torch.tensor(rows) - rows[0]


def _compact(table: Tensor, rows: Tensor) -> Tensor:
    """The rows, moved up in place: a second table would be as large as the first."""
    if len(rows) == len(table):
        return table
    start = 0
    for part in rows.split(1 << 16):  # in order: what is read lies at or after what is written
        table[start : start + len(part)] = table[part]
        start += len(part)
    return table[:start]
