"""Pictures to uint8 tensors: random resized crops in training, a fixed resize and centre crop in evaluation."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maws.config import IMAGENET_MEAN, IMAGENET_STD
from maws.models import vit


@dataclass(frozen=True)
class Preprocess:
    """How a released model wants its evaluation images; saved as release/preprocess.json (recipes §11.4)."""

    image_size: int
    resize: int = 0  # short side before the centre crop; 0: image_size
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize the short side, cut the centre: uint8 3 H W."""
        target, (w, h) = self.resize or self.image_size, image.size
        scale = target / min(w, h)
        size = max(target, round(w * scale)), max(target, round(h * scale))
        if size != image.size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        left, top = (size[0] - self.image_size) // 2, (size[1] - self.image_size) // 2
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
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def random_resized_crop(
    image: Image.Image, size: int, scale: tuple[float, float], flip: bool, rng: np.random.Generator
) -> Tensor:
    """A crop of random area and aspect (3/4 to 4/3), resized to size x size bicubically, mirrored half the time.

    torchvision's RandomResizedCrop (ten tries, then the centre), drawn from `rng` so that a visit's crop depends on
    nothing else; uint8 3 H W.
    """
    box = crop_box(image.width, image.height, scale, rng)
    if flip and rng.random() < 0.5:
        image, box = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), _mirror(box, image.width)
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random resized crop."""
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


def _mirror(box: tuple[int, int, int, int], width: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    return width - right, top, width - left, bottom
