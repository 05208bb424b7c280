"""Views of a picture: which part is seen, and with what colours, as a function of a random stream alone.

    picture ─crop, flip─▶ region ─resize─▶ size x size ─jitter, three-augment─▶ uint8 3 H W

    crop      what it is                                                                           source
    resized   random area and aspect, resized                                                      MAE's and WSP's
    fixed     short side to 256/224 of the size (ours: as evaluation does), a random square        MAE Table 1e
    centre    the same, the square in the middle; no flip unless asked                             MAE Table 1e, "none"
    simple    short side to the size, a random square of the picture with 4 reflected pixels       DeiT III's SRC
              around it (recipes §4.2)

The colour changes are the functions of torchvision and Pillow on the cropped picture, as LC-MAE applies them; only
the factors are drawn here. So a visit's view depends on its stream and on nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from maws.config import ConfigError, DataConfig, nearest
from maws.data.transforms import Cut, centre_crop, fixed_crop, resized_crop, simple_crop, to_tensor

CROPS = ("resized", "fixed", "centre", "simple")
ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)  # the order of View.jitter
SOLARISE_FROM = 128  # channel values from here on are inverted (Pillow's default, recipes §4.2)
BLUR_RADIUS = 0.1, 2.0  # pixels

Change = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class View:
    """How a picture is shown. Raises ConfigError when it is made with values that cannot be."""

    crop: str = "resized"  # resized, fixed, centre or simple
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the area that crop=resized takes
    flip: bool | None = None  # mirrored half of the time; None: yes, but for crop=centre
    # strengths of brightness, contrast, saturation (factors of 1 - s to 1 + s) and hue (turns of -s to s)
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_probability: float = 0.8
    three_augment: bool = False  # exactly one of grey, solarised, blurred

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ConfigError(f"crop={self.crop} is not known; {nearest(self.crop, CROPS)}")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ConfigError(f"crop_scale={low},{high} must be two shares of the area, 0 < low <= high <= 1")
        if not all(0 <= s < float("inf") for s in self.jitter) or self.jitter[3] > 0.5:
            raise ConfigError(
                f"jitter={','.join(map(str, self.jitter))} must be strengths of brightness, contrast, saturation and "
                f"hue from 0 up, hue at most 0.5 (half a turn); LC-MAE's are 0.4,0.4,0.2,0.1"
            )
        if not 0 <= self.jitter_probability <= 1:
            raise ConfigError(f"jitter_probability={self.jitter_probability} must lie between 0 and 1")

    def __call__(self, image: Image.Image, size: int, rng: np.random.Generator) -> Tensor:
        """An RGB picture of any size as this view shows it: uint8 3 size size."""
        cut = self.cut(image, size, rng)
        return view(cut, size, self.changes(size, rng))

    def with_second(
        self, image: Image.Image, size: int, second_size: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """The view, and the same region, flip and colours at another size, by Lanczos as BEiT makes them for its
        tokenizer (recipes §2.3): uint8 3 size size and 3 second_size second_size. The first is what a plain call gives.
        """
        cut = self.cut(image, size, rng)
        changes = self.changes(size, rng)
        second = cut.at(second_size, Image.Resampling.LANCZOS)
        return view(cut, size, changes), show(second, changes)

    def cut(self, image: Image.Image, size: int, rng: np.random.Generator) -> Cut:
        """The region that is shown, mirrored or not."""
        if self.crop == "resized":
            cut = resized_crop(image, self.crop_scale, rng)
        elif self.crop == "fixed":
            cut = fixed_crop(image, size, rng)
        elif self.crop == "simple":
            cut = simple_crop(image, size, rng)
        else:
            cut = centre_crop(image, size)
        flip = self.crop != "centre" if self.flip is None else self.flip
        return cut.mirrored() if flip and rng.random() < 0.5 else cut

    def changes(self, size: int, rng: np.random.Generator) -> list[Change]:
        """What happens to the colours, in this order; `size` is the side that radii are meant for."""
        changes: list[Change] = []
        if any(self.jitter) and rng.random() < self.jitter_probability:
            changes += colour_jitter(self.jitter, rng)
        if self.three_augment:
            changes.append(three_augment(size, rng))
        return changes


SIMPLE = View(crop="simple")  # LC-MAE's first view (recipes §4.2)
DISTORTED = View(crop="simple", jitter=(0.4, 0.4, 0.2, 0.1), jitter_probability=0.8, three_augment=True)  # its second


def view_of(cfg: DataConfig) -> View:
    """The view that a run's `data.` settings describe. Raises ConfigError for values that cannot be."""
    try:
        return View(cfg.crop, cfg.crop_scale, cfg.flip, cfg.jitter, cfg.jitter_probability, cfg.three_augment)
    except ConfigError as e:
        raise ConfigError(f"data.{e}") from None


def view(cut: Cut, size: int, changes: list[Change]) -> Tensor:
    """A part of a picture with its colours changed, as uint8 3 size size."""
    return show(cut.at(size), changes) if changes else cut.tensor(size)


def show(image: Image.Image, changes: list[Change]) -> Tensor:
    """A picture with its colours changed, as uint8 3 H W."""
    for change in changes:
        image = change(image)
    return to_tensor(image)


def colour_jitter(strengths: tuple[float, ...], rng: np.random.Generator) -> list[Change]:
    """torchvision's ColorJitter: brightness, contrast, saturation and hue in random order, each by its own factor."""
    changes: list[Change] = []
    for i in rng.permutation(len(ADJUST)):
        strength, middle = strengths[i], 0.0 if ADJUST[i] is tv.adjust_hue else 1.0
        low = middle - strength if middle == 0 else max(0.0, middle - strength)
        factor = rng.uniform(low, middle + strength)  # drawn even when it is not used: strengths are independent
        if strength:
            changes.append(partial(_adjust, ADJUST[i], factor))
    return changes


def _adjust(adjust: Callable[..., Image.Image], factor: float, image: Image.Image) -> Image.Image:
    return adjust(image, factor)


def three_augment(size: int, rng: np.random.Generator) -> Change:
    """One of three changes, each as likely (DeiT III): no colours, bright values inverted, or a Gaussian blur."""
    which = int(rng.integers(3))
    if which == 0:
        return _grey
    if which == 1:
        return partial(ImageOps.solarize, threshold=SOLARISE_FROM)
    return partial(_blur, rng.uniform(*BLUR_RADIUS) / size)


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def _blur(radius: float, image: Image.Image) -> Image.Image:
    """`radius` is a share of the side, so that a second size is blurred alike."""
    return image.filter(ImageFilter.GaussianBlur(radius * image.width))
