"""Augmented views of pictures for probes: a random part, mirrored half of the time.

    view = byol_crop(seed, epoch, size=224)
    for batch in decoded(dataset, rows, preprocess, view=view): …          # uint8 B 3 224 224

What a picture shows is a function of (seed, epoch, its position in the data set): not of the order of pictures, nor of
threads, nor of how the pictures are split over ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from PIL import Image
from torch import Tensor

from data_pipeline.errors import UsageError
from maws.data.transforms import crop_box, to_tensor
from maws.seeding import stream

AREA: Final = (0.08, 1.0)  # share of the picture (recipes 9.1)
LOG_ASPECT: Final = (math.log(3 / 4), math.log(4 / 3))  # of width over height
BICUBIC: Final = Image.Resampling.BICUBIC

Cut = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class View:
    """How the pictures look in one epoch: cut, then mirrored with probability 1/2 if `flip`."""

    seed: int
    epoch: int
    cut: Cut = field(repr=False)
    flip: bool = True

    def __call__(self, image: Image.Image, position: int) -> Tensor:
        """An RGB picture and its position in the data set -> uint8 3 H W."""
        rng = stream(self.seed, "view", self.epoch, position)
        shown = self.cut(image, rng)
        if self.flip and rng.random() < 0.5:
            shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(shown)


def byol_crop(seed: int, epoch: int, size: int, flip: bool = True) -> View:
    """The crop of MAE's linear probe, which is BYOL's (recipes 9.1), resized bicubically to size x size."""
    return View(seed, epoch, lambda image, rng: _part(image, byol_box(*image.size, rng), size), flip)


def resized_crop(seed: int, epoch: int, size: int, scale: tuple[float, float] = AREA, flip: bool = True) -> View:
    """torchvision's RandomResizedCrop, bicubic."""
    return View(seed, epoch, lambda image, rng: _part(image, crop_box(*image.size, scale, rng), size), flip)


def random_crop(seed: int, epoch: int, size: int, resize: int, flip: bool = True) -> View:
    """A random size x size square after the short side is resized to `resize`, bicubically: VPT's 256 -> 224."""
    if resize < size:
        raise UsageError(f"a crop of {size} pixels does not fit a short side of {resize}; resize to at least {size}")

    def cut(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        short, long = min(image.size), max(image.size)
        other = int(resize * long / short)  # rounded as torchvision does
        full = image.resize((resize, other) if image.width <= image.height else (other, resize), BICUBIC)
        left, top = (int(rng.integers(side - size + 1)) for side in full.size)
        return full.crop((left, top, left + size, top + size))

    return View(seed, epoch, cut, flip)


def byol_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right, bottom: area and log-aspect uniform, sides clipped to the picture, no second try."""
    area = width * height * rng.uniform(*AREA)
    aspect = math.exp(rng.uniform(*LOG_ASPECT))
    w = min(max(round(math.sqrt(area * aspect)), 1), width)
    h = min(max(round(math.sqrt(area / aspect)), 1), height)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return left, top, left + w, top + h


def _part(image: Image.Image, box: tuple[int, int, int, int], size: int) -> Image.Image:
    """Cut first, then resize: pixels beyond the box have no part in its edge, as in torchvision."""
    return image.crop(box).resize((size, size), BICUBIC)
