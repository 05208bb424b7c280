"""Batches of a step: read the samples the order names, in this process or in workers, and replace broken ones.

A batch is a function of its step, so the loader has no state either: a worker is handed step numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.images import BadImage
from data_pipeline.shardset import ShardSet
from maws import dist
from maws.config import ConfigError, DataConfig
from maws.data.batch import BadSample, Batch
from maws.data.masks import Grid, Masking, make_mask
from maws.data.order import MAX_REPLACEMENTS, Item, Order, Part
from maws.data.photo import read
from maws.data.views import View, view, view_of

Sample = dict[str, Any]
Load = Callable[[Item], Sample]  # one visit to what one row of the batch holds; BadImage or DataError: use the next one


def open_shards(cfg: DataConfig) -> ShardSet:
    """The shard set of a run. Raises ConfigError when none was named, DataError when it is not one."""
    if not cfg.shards:
        raise ConfigError("no shard set given; add data.shards=FOLDER, made by `python -m data_pipeline build`")
    return ShardSet.open(cfg.shards)


def make_order(cfg: DataConfig, shards: ShardSet, seed: int, batch_size: int, labelled: bool = False) -> Order:
    return Order(
        shards, seed, batch_size,
        streams=cfg.streams, window=cfg.window, resample=cfg.resample, labelled=labelled, among=dist,
    )  # fmt: skip


class LoadImage:
    """The part of a sample that every stage has: a view of its picture, uint8 3 H W.

    With `second_size` also `image_second`, the same region at that size, for tokenizers.
    """

    def __init__(self, cfg: DataConfig, shards: ShardSet, seed: int, image_size: int, second_size: int = 0) -> None:
        _needs_images(cfg)
        self.view, self.shards, self.seed = view_of(cfg), shards, seed
        self.image_size, self.second_size = image_size, second_size

    def __call__(self, item: Item) -> Sample:
        image = read(self.shards.image_bytes(item.shard, item.row))
        rng = item.stream(self.seed, "augment")
        if not self.second_size:
            return {"image": self.view(image, self.image_size, rng)}
        first, second = self.view.with_second(image, self.image_size, self.second_size, rng)
        return {"image": first, "image_second": second}


class LoadTwoViews:
    """Two views of a picture, drawn independently: `image` and `image_other`, uint8 3 H W.

    With `same_crop` the second shows the region of the first, mirrored alike, so that their patches correspond; its
    colours are its own. A view that is None is the one of the run's `data.` settings.
    """

    def __init__(
        self, cfg: DataConfig, first: View | None, second: View | None, shards: ShardSet, seed: int, image_size: int,
        same_crop: bool = False,
    ) -> None:  # fmt: skip
        _needs_images(cfg)
        self.first, self.second = first or view_of(cfg), second or view_of(cfg)
        self.shards, self.seed, self.image_size, self.same_crop = shards, seed, image_size, same_crop

    def __call__(self, item: Item) -> Sample:
        image = read(self.shards.image_bytes(item.shard, item.row))
        size, rng, other = self.image_size, item.stream(self.seed, "augment"), item.stream(self.seed, "augment other")
        cut = self.first.cut(image, size, rng)
        cut_other = cut if self.same_crop else self.second.cut(image, size, other)
        return {
            "image": view(cut, size, self.first.changes(size, rng)),
            "image_other": view(cut_other, size, self.second.changes(size, other)),
        }


def _needs_images(cfg: DataConfig) -> None:
    if cfg.features != "images":
        raise ConfigError(
            f"data.features={cfg.features}: this reads images, and features are what a locked image tower made of "
            f"them; leave it at images, or train stage lit with lock=image"
        )


@dataclass
class LoadMasked:
    """What `load` gives, and `ids_shuffle` (N, int64): a permutation of the patches whose first ones are visible.

    Drawn from (seed, epoch, key), so it is the same on any number of ranks. Raises ConfigError for a masking that the
    grid (rows, columns of patches) cannot have.
    """

    load: Load
    masking: Masking
    grid: Grid
    seed: int

    def __post_init__(self) -> None:
        self.masking.check(self.grid)

    def __call__(self, item: Item) -> Sample:
        mask = make_mask(self.masking, item.stream(self.seed, "mask"), self.grid)
        return self.load(item) | {"ids_shuffle": torch.from_numpy(mask)}


class StepDataset:
    """Step number to batch."""

    def __init__(self, order: Order, part: Part, load: Load, finish: Callable[[Any, int], Batch] | None = None) -> None:
        order.check_world(part.world)
        self.order, self.part, self.load, self.finish = order, part, load, finish

    def reach(self, step: int) -> None:
        """Count the order up to a step in this process, so that none of those forked from it has to."""
        self.order.items(step, self.part)

    def __getitem__(self, step: int) -> Batch:
        samples: list[Sample] = []
        keys: list[str] = []
        bad: list[BadSample] = []
        for s in range(self.part.rank, self.order.streams, self.part.world):
            for place in range(self.order.per_stream):
                item, sample = self._good_sample(s, step, place, bad)
                keys.append(item.key)
                samples.append(sample)
        batch = cast(Batch, {"keys": keys, "bad": bad, **collate(samples)})
        return self.finish(batch, step) if self.finish else batch

    def _good_sample(self, s: int, step: int, place: int, bad: list[BadSample]) -> tuple[Item, Sample]:
        for skip in range(MAX_REPLACEMENTS):
            item = self.order.item(s, step, place, skip)
            try:
                return item, self.load(item)
            except (BadImage, DataError) as e:
                shard = self.order.shards.manifest["shards"][item.shard]["name"]
                bad.append({"key": item.key, "shard": shard, "reason": getattr(e, "reason", None) or str(e)})
        raise DataError(
            f"{MAX_REPLACEMENTS} samples in a row could not be read, the last one {bad[-1]['key']} of shard "
            f"{bad[-1]['shard']} ({bad[-1]['reason']}); check the set with `python -m data_pipeline inspect "
            f"{self.order.shards.path}`"
        )


def collate(samples: list[Sample]) -> dict[str, Tensor]:
    """Stack what the samples hold; one-axis integer tensors of unequal length are padded with -1."""
    out = {}
    for name in samples[0]:
        values = [s[name] for s in samples]
        if len({v.shape for v in values}) > 1:
            out[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=-1)
        else:
            out[name] = torch.stack(values)
    return out
