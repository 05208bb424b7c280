"""Parts of pictures as uint8 tensors: the crops of training (data/views.py), a resize and centre crop in evaluation."""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maws.config import IMAGENET_MEAN, IMAGENET_STD
from maws.data.photo import Box, is_photo, resized
from maws.models import vit

SIMPLE_PADDING = 4  # pixels (recipes §4.2)


@dataclass(frozen=True)
class Preprocess:
    """How a released model wants its evaluation images; saved as release/preprocess.json (recipes §11.4)."""

    image_size: int
    resize: int = 0  # short side before the centre crop; 0: image_size
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"
    squash: bool = False  # both sides to `resize`, without keeping the aspect: MAWS's finetuned classifiers

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize, cut the centre, with torchvision's roundings: uint8 3 H W."""
        target = self.resize or self.image_size
        size = (target, target) if self.squash else _short_side(image, target)
        if size != image.size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        left, top = round((size[0] - self.image_size) / 2), round((size[1] - self.image_size) / 2)
        return to_tensor(image.crop((left, top, left + self.image_size, top + self.image_size)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Preprocess":
        values = values | {k: tuple(values[k]) for k in ("mean", "std")}
        return cls(**values)


def normalise(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 B 3 H W to float32 with the model's mean and deviation taken out."""
    return vit.normalise(images, preprocess.mean, preprocess.std)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 3 H W."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


class Cut(NamedTuple):
    """A part of a picture; `box` is left, top, right, bottom in its pixels."""

    image: Image.Image
    box: tuple[float, float, float, float]
    mirror: bool = False  # the part is still to be mirrored

    def mirrored(self) -> "Cut":
        if is_photo(self.image):
            return self._replace(mirror=not self.mirror)  # when it is small
        left, top, right, bottom = self.box
        width = self.image.width
        return Cut(self.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (width - right, top, width - left, bottom))

    def at(self, size: int, resampling: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
        """Resized to size x size. Shrinking more than six times takes a first step by whole pixels, for speed."""
        if (quick := self._quick(size, resampling)) is not None:
            return Image.fromarray(quick.permute(1, 2, 0).numpy())
        image = self.image.resize((size, size), resampling, box=self.box, reducing_gap=3.0)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirror else image

    def tensor(self, size: int) -> Tensor:
        """The same as uint8 3 size size."""
        quick = self._quick(size)
        return to_tensor(self.at(size)) if quick is None else quick

    def _quick(self, size: int, resampling: Image.Resampling = Image.Resampling.BICUBIC) -> Tensor | None:
        """The region of a photograph, where its edges are whole pixels."""
        box = tuple(map(int, self.box))
        if resampling == Image.Resampling.BICUBIC and is_photo(self.image) and box == self.box:
            return resized(self.image, cast(Box, box), size, self.mirror)
        return None


def resized_crop(image: Image.Image, scale: tuple[float, float], rng: np.random.Generator) -> Cut:
    """A part of random area (`scale`, shares of the whole) and aspect, as torchvision's RandomResizedCrop takes it."""
    return Cut(image, crop_box(image.width, image.height, scale, rng))


def crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random resized crop: ten tries at an aspect of 3/4 to 4/3, then the centre."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def fixed_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Cut:
    """A random square of size x size after resizing the short side to 256/224 of it.

    MAE Table 1e's "crop, fixed size"; the paper does not say how much larger the picture is than the crop: that is
    the usual evaluation's.
    """
    width, height = _short_side(image, _margin(size))
    left, top = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
    return _square(image, (width, height), left, top, size)


def centre_crop(image: Image.Image, size: int) -> Cut:
    """The square of size x size in the middle, after resizing as `fixed_crop` does (MAE Table 1e, "none")."""
    width, height = _short_side(image, _margin(size))
    return _square(image, (width, height), (width - size) // 2, (height - size) // 2, size)


def simple_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Cut:
    """DeiT III's simple random crop (recipes §4.2).

    The short side is resized to `size`, 4 pixels are reflected at every edge, and a random square is taken. Only what
    the square shows is resized, so a long strip costs no more than a photo. The cut is the whole square: its reflected
    edge exists at this size alone.
    """
    full = _short_side(image, size)
    starts = (int(rng.integers(-SIMPLE_PADDING, side + SIMPLE_PADDING - size + 1)) for side in full)
    columns, rows = (_reflect(start + np.arange(size), side) for start, side in zip(starts, full, strict=True))
    left, top, right, bottom = map(int, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    shown = _window(image, full, (left, top, right, bottom))
    part = np.asarray(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC, box=shown, reducing_gap=3.0))
    square = Image.fromarray(part.take(rows - top, axis=0).take(columns - left, axis=1))
    return Cut(square, (0, 0, size, size))


def _margin(size: int) -> int:
    return round(size * 256 / 224)


def _short_side(image: Image.Image, side: int) -> tuple[int, int]:
    """Width and height after resizing the short side to `side`, rounded as torchvision's Resize does."""
    short, long = min(image.size), max(image.size)
    resized = int(side * long / short)
    return (side, resized) if image.width <= image.height else (resized, side)


def _square(image: Image.Image, full: tuple[int, int], left: int, top: int, size: int) -> Cut:
    return Cut(image, _window(image, full, (left, top, left + size, top + size)))


def _window(
    image: Image.Image, full: tuple[int, int], box: tuple[int, int, int, int]
) -> tuple[float, float, float, float]:
    """A box of the picture resized to `full` (width, height), in the picture's own pixels."""
    x, y = image.width / full[0], image.height / full[1]
    left, top, right, bottom = box
    return left * x, top * y, min(right * x, image.width), min(bottom * y, image.height)


def _reflect(places: np.ndarray, length: int) -> np.ndarray:
    """Places outside of 0 .. length - 1 as a mirror at the first and last pixel shows them, as often as it takes."""
    if length == 1:
        return np.zeros_like(places)
    places = np.abs(places) % (2 * length - 2)
    return np.minimum(places, 2 * length - 2 - places)
