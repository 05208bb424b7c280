"""Pictures on their way to an encoder: read, decoded and preprocessed in threads, some batches ahead, in order.

    for batch in decoded(dataset, range(len(dataset)), preprocess): encode(batch.images)     # uint8 B 3 H W

Pictures are decoded at their full size: a JPEG can be decoded at 1/2 or 1/4 of it for less (Pillow's draft), but then
has other pixels, and the pixels are part of a score.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.images import BadImage, decode
from eval.datasets import Dataset
from maws.data.transforms import Preprocess

View = Callable[[Image.Image, int], Tensor]  # RGB picture and its position in the data set -> uint8 3 H W

BATCH: Final = 128
# Pictures that one thread decodes in a go: few enough that all threads work on the first batch, and enough that handing
# them out costs nothing.
CHUNK: Final = 8
MOST_THREADS: Final = 32  # a Python thread's share of the interpreter lock is about 3 % of decoding a photograph


@dataclass(frozen=True)
class Broken:
    key: str
    reason: str


@dataclass(frozen=True)
class Decoded:
    """A batch of pictures as the encoder takes them."""

    images: Tensor  # uint8 B 3 H W
    rows: list[int]  # positions of the readable ones
    broken: list[Broken]


def decoded(
    dataset: Dataset, rows: Sequence[int], preprocess: Preprocess, batch: int | None = None, view: View | None = None
) -> Iterator[Decoded]:
    """Decode batches in threads (codecs let go of the interpreter lock), a few ahead, in order.

    A `view` shows the pictures in another way than `preprocess`, such as the random crops of training.
    """
    yield from decoded_batches(dataset, batches_of(rows, batch or BATCH), preprocess, view)


def batches_of(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def decoded_batches(
    dataset: Dataset, batches: Sequence[Sequence[int]], preprocess: Preprocess, view: View | None = None,
    pin: bool = False, threads: int | None = None,
) -> Generator[Decoded, None, None]:  # fmt: skip
    """`decoded` for batches that are chosen already; with `pin` in memory that a GPU copies from by itself."""
    threads = threads or workers()
    largest = max(map(len, batches), default=1)
    ahead = 2 + -(-2 * threads * CHUNK // largest)  # batches: two, and enough that no thread is without work
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        begun = (_Begun(pool, dataset, rows, preprocess, view, pin) for rows in batches)
        for one in _ahead(begun, ahead):
            yield one.wait()


def pictures(dataset: Dataset, rows: Sequence[int], preprocess: Preprocess) -> Tensor:
    """uint8 N 3 H W of positions that are known to be readable."""
    return torch.cat([readable(batch) for batch in decoded(dataset, rows, preprocess)])


def readable(batch: Decoded) -> Tensor:
    """uint8 B 3 H W of a batch whose pictures were readable before. Raises DataError for one that is not any more."""
    if batch.broken:
        lost = batch.broken[0]
        raise DataError(f"'{lost.key}' was readable before and is not now ({lost.reason}); is the disk failing?")
    return batch.images


def workers() -> int:
    """Threads: this process's cores, which the ranks of one machine share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_SIZE", "1"))
    return max(1, min(MOST_THREADS, cores // ranks))


class _Begun:
    """A batch in the making: its chunks write into one tensor, which is made when the first picture has a size."""

    def __init__(
        self, pool: ThreadPoolExecutor, dataset: Dataset, rows: Sequence[int], preprocess: Preprocess,
        view: View | None, pin: bool,
    ) -> None:  # fmt: skip
        self.dataset, self.rows, self.preprocess, self.view, self.pin = dataset, rows, preprocess, view, pin
        self.images: Tensor | None = None
        self.lock = threading.Lock()
        self.chunks: list[Future[list[Broken | None]]] = [
            pool.submit(self._load, start) for start in range(0, len(rows), CHUNK)
        ]

    def _load(self, start: int) -> list[Broken | None]:
        """What is wrong with each picture of a chunk; the others are in their places."""
        found: list[Broken | None] = []
        for place, position in enumerate(self.rows[start : start + CHUNK], start):
            try:
                image = decode(self.dataset.read(position))
                self._put(place, self.view(image, position) if self.view else self.preprocess(image))
                found.append(None)
            except BadImage as error:
                found.append(Broken(self.dataset.keys[position], error.reason))
        return found

    def _put(self, place: int, image: Tensor) -> None:
        with self.lock:
            if self.images is None:
                self.images = torch.empty((len(self.rows), *image.shape), dtype=image.dtype, pin_memory=self.pin)
        self.images[place] = image

    def wait(self) -> Decoded:
        bad = [one for chunk in self.chunks for one in chunk.result()]
        good = [place for place, one in enumerate(bad) if one is None]
        if self.images is None:
            size = self.preprocess.image_size
            self.images = torch.empty(0, 3, size, size, dtype=torch.uint8)
        images = self.images if len(good) == len(bad) else self.images[good]
        return Decoded(images, [self.rows[place] for place in good], [one for one in bad if one is not None])

    def cancel(self) -> None:
        for chunk in self.chunks:
            chunk.cancel()


def _ahead(items: Iterable[_Begun], number: int) -> Iterator[_Begun]:
    """The items, so many of them begun before they are asked for."""
    waiting: deque[_Begun] = deque()
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) >= number:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        for item in waiting:
            item.cancel()
