"""Mixup and cutmix of a batch: pairs, weight and box are a function of (seed, step), on any number of ranks.

    batch = Mix(cfg, seed, order, part)(batch, step)       # image, label, label_other, mix_weight

Each sample is mixed with its neighbour of the same canonical stream (data/order.py), which the same rank has. One
weight and one box serve a whole batch, as timm's `batch` mode does. Pixels are mixed as they are, 8 bits deep, so that
a batch can be cut into micro-batches anywhere; the mean of two pictures is rounded once, as timm's FastCollateMixup has
it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maws.config import ConfigError
from maws.data.augment import AugmentConfig
from maws.data.batch import ClassBatch
from maws.data.order import Order, Part
from maws.seeding import stream


class Draw(NamedTuple):
    """What happens to a batch."""

    weight: float  # of a sample's own pixels and label
    box: tuple[int, int, int, int] | None  # cutmix: top, bottom, left, right of what comes from the other picture


@dataclass
class Mix:
    """For StepDataset's `finish`. Raises ConfigError for streams with one sample a batch, which has no neighbour."""

    cfg: AugmentConfig
    seed: int
    order: Order
    part: Part

    def __post_init__(self) -> None:
        if self.cfg.mixes and self.order.per_stream < 2:
            raise ConfigError(
                f"mixup and cutmix need two samples of a stream in a batch; lower data.streams below "
                f"{self.order.streams}, or set augment.mixup=0 augment.cutmix=0"
            )

    def __call__(self, batch: ClassBatch, step: int) -> ClassBatch:
        images, labels = batch["image"], batch["label"]
        rng = stream(self.seed, "mix", step)
        draw = drawn(self.cfg, images.shape[-2], images.shape[-1], rng)
        other = neighbours(len(images), self.order.per_stream)
        batch["image"] = mixed(images, images[other], draw)
        batch["label_other"], batch["mix_weight"] = labels[other], torch.full((len(labels),), draw.weight)
        return batch


def neighbours(samples: int, per_stream: int) -> Tensor:
    """The next one of the same stream, for each sample of a batch; after the last comes the first."""
    place = torch.arange(samples)
    return place - place % per_stream + (place + 1) % per_stream


def drawn(cfg: AugmentConfig, height: int, width: int, rng: np.random.Generator) -> Draw:
    """Mixup (Zhang et al., 2018) or cutmix (Yun et al., 2019), and how much of it."""
    if not cfg.mixes or rng.random() >= cfg.mix_probability:
        return Draw(1.0, None)
    if cfg.cutmix and (not cfg.mixup or rng.random() < cfg.switch_probability):
        return cut_out(height, width, rng.beta(cfg.cutmix, cfg.cutmix), rng)
    return Draw(rng.beta(cfg.mixup, cfg.mixup), None)


def cut_out(height: int, width: int, weight: float, rng: np.random.Generator) -> Draw:
    """A box of 1 - weight of the area around a random place, cut at the edges; the weight is what is left in truth."""
    share = np.sqrt(1 - weight)
    h, w = int(height * share), int(width * share)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = (min(max(v, 0), height) for v in (y - h // 2, y + (h + 1) // 2))
    left, right = (min(max(v, 0), width) for v in (x - w // 2, x + (w + 1) // 2))
    return Draw(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mixed(images: Tensor, others: Tensor, draw: Draw) -> Tensor:
    """Pictures (uint8 B 3 H W) with a part of others: of every value, or of the box."""
    if draw.box is None:
        if draw.weight == 1:
            return images
        return (draw.weight * images.float() + (1 - draw.weight) * others.float()).round().to(torch.uint8)
    top, bottom, left, right = draw.box
    images = images.clone()
    images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return images
