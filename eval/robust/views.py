"""Pictures seen in another way than the release's own pre-processing, which the cache of features keeps apart.

Bordered     ObjectNet: the border is cut off first (its pictures have a red frame)
Occluded     centre occlusion: a square in the middle of what the model would see is painted over
"""

from dataclasses import asdict, dataclass
from typing import Final

from PIL import Image
from torch import Tensor

from maws.data.transforms import Preprocess

FILLS: Final = ("black", "mean")
REFERENCE: Final = 224  # pixels; the size of a square is given for a picture of that side


@dataclass(frozen=True)
class Bordered(Preprocess):
    """Without `border` pixels on each side."""

    border: int = 2

    def __call__(self, image: Image.Image) -> Tensor:
        b = self.border
        if min(image.size) > 2 * b:
            image = image.crop((b, b, image.width - b, image.height - b))
        return super().__call__(image)


@dataclass(frozen=True)
class Occluded(Preprocess):
    """With a square of `side` pixels in the centre painted over, after resize and crop."""

    side: int = 112
    fill: str = "black"  # pixels of 0; or mean: what is 0 after the mean is taken out, to the nearest of 256 levels

    def __call__(self, image: Image.Image) -> Tensor:
        seen = super().__call__(image)  # uint8 3 H W
        start = (self.image_size - self.side) // 2
        inside = slice(start, start + self.side)
        for channel, mean in enumerate(self.mean):
            seen[channel, inside, inside] = 0 if self.fill == "black" else round(255 * mean)
        return seen


def bordered(preprocess: Preprocess, border: int) -> Bordered:
    return Bordered(**asdict(preprocess), border=border)


def occluded(preprocess: Preprocess, side: int, fill: str) -> Occluded:
    """`side` is for a picture of 224 pixels and grows with the model's."""
    return Occluded(**asdict(preprocess), side=round(side * preprocess.image_size / REFERENCE), fill=fill)
