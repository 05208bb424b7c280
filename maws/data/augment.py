"""What finetuning does to a picture, beside cropping and flipping, as a function of the visit: seed, epoch, key, copy.

view (data/views.py) ─▶ RandAugment ─▶ uint8 3 H W ─▶ random erasing        one picture: LoadAugmented
─▶ mixup or cutmix with the neighbour of the same stream                    the batch: data/mix.py
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.shardset import ShardSet
from maws.config import ConfigError, DataConfig
from maws.data.loader import Sample
from maws.data.order import Item
from maws.data.photo import read
from maws.data.rand_augment import RandAugment
from maws.data.views import show, view_of

ERASED = 0.02, 1 / 3  # share of the area, as timm's
ASPECT = 0.3, 1 / 0.3  # of what is erased, as timm's
TRIES = 10


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """MAE's finetuning (recipes §9.4)."""

    rand_augment: str = "rand-m9-mstd0.5-inc1"  # timm's policy; empty: none
    erase: float = 0.25  # share of pictures in which a rectangle becomes noise
    mixup: float = 0.8  # alpha of Beta(alpha, alpha); 0: none
    cutmix: float = 1.0  # the same; with both, each batch has one of them
    mix_probability: float = 1.0  # share of batches that are mixed
    switch_probability: float = 0.5  # share of those that get cutmix, where there are both

    def check(self) -> None:
        """Raises ConfigError for values that cannot be."""
        for name in ("erase", "mix_probability", "switch_probability"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ConfigError(f"augment.{name}={value} must lie between 0 and 1")
        for name in ("mixup", "cutmix"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise ConfigError(f"augment.{name}={value} must be 0 (none) or the alpha of a Beta distribution")

    @property
    def mixes(self) -> bool:
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)


class LoadAugmented:
    """`image`, uint8 3 H W: a view of the picture as `data.` says, RandAugment, and a rectangle of noise."""

    def __init__(self, cfg: DataConfig, augment: AugmentConfig, shards: ShardSet, seed: int, image_size: int) -> None:
        if cfg.features != "images":
            raise ConfigError(
                f"data.features={cfg.features}: finetuning trains the tower, so it needs data.features=images"
            )
        augment.check()
        self.view, self.shards, self.seed, self.image_size = view_of(cfg), shards, seed, image_size
        self.rand_augment = RandAugment(augment.rand_augment, image_size, cfg.mean)
        self.erase, self.mean, self.std = augment.erase, cfg.mean, cfg.std

    def __call__(self, item: Item) -> Sample:
        image, rng = read(self.shards.image_bytes(item.shard, item.row)), item.stream(self.seed, "augment")
        cut = self.view.cut(image, self.image_size, rng)
        changes = self.view.changes(self.image_size, rng)
        seen = self.rand_augment(cut.at(self.image_size), item.number(self.seed, "rand augment"))
        pixels = show(seen, changes)
        draw = item.stream(self.seed, "erase")
        if draw.random() < self.erase:
            erase(pixels, draw, self.mean, self.std)
        return {"image": pixels}


def erase(pixels: Tensor, rng: np.random.Generator, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Fill a random rectangle of a picture (uint8 3 H W) with noise, in place (Zhong et al., 2020; timm's `pixel`).

    timm draws normal noise for normalised values; here it is brought back to 8 bits, so it is rounded, and cut where no
    picture can be: 3 to 5 % of the values, which lie beyond black and white.
    """
    box = erased_box(pixels.shape[1], pixels.shape[2], rng)
    if box is None:
        return
    top, left, height, width = box
    noise = rng.standard_normal((3, height, width), np.float32)
    m, s = (np.array(v, np.float32)[:, None, None] for v in (mean, std))
    values = 255 * (noise * s + m)
    pixels[:, top : top + height, left : left + width] = torch.from_numpy(values.round().clip(0, 255).astype(np.uint8))


def erased_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    """Top, left, height and width of a rectangle, as timm's RandomErasing draws them; None when ten do not fit."""
    for _ in range(TRIES):
        area = rng.uniform(*ERASED) * height * width
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return None
