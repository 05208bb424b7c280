"""timm's RandAugment as a function of a seed: the same picture and the same seed give the same result, anywhere.

    augment = RandAugment("rand-m9-mstd0.5-inc1", size=224)      # magnitude 9 +- 0.5, harder with the magnitude
    image = augment(image, seed)

timm draws from the global generators of Python and numpy, which depend on everything that was drawn before. They are
seeded around each call and put back, so nothing else notices. Not for threads, which share those generators.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform

from maws.config import IMAGENET_MEAN, ConfigError


class RandAugment:
    """Cubuk et al., 2020, in timm's form. `policy` is timm's; empty changes nothing.

    The numbers around it are those of timm's `create_transform`, which MAE finetunes with: translations of at most 0.45
    of the side, the mean colour where a picture is moved away, and bicubic resampling.
    """

    def __init__(self, policy: str, size: int, mean: tuple[float, ...] = IMAGENET_MEAN) -> None:
        """Raises ConfigError for a policy that timm does not understand."""
        self.policy, self.size, self.mean = policy, size, mean
        self._ops: Any = self._made() if policy else None

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        """An RGB picture, changed; of the same size."""
        if self._ops is None:
            return image
        with drawing_from(seed):
            return self._ops(image)

    def _made(self) -> Any:
        colour = tuple(min(255, round(255 * value)) for value in self.mean)
        around = {
            "translate_const": int(0.45 * self.size), "img_mean": colour, "interpolation": Image.Resampling.BICUBIC,
        }  # fmt: skip
        try:
            made: Any = rand_augment_transform(self.policy, around)
        except (AssertionError, ValueError, KeyError) as e:
            raise ConfigError(
                f"augment.rand_augment={self.policy} is no policy of timm's RandAugment ({e or 'it begins with rand'})"
                f"; MAE's is rand-m9-mstd0.5-inc1, and an empty one changes nothing"
            ) from None
        for op in made.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize
        return made


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """The first `bits` of every value. timm asks for none at its greatest magnitude, which is black; Pillow, from some
    version on, refuses that."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Inside, Python's and numpy's global generators start from `seed`; afterwards they are as they were."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)
