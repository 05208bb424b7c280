"""Any pixels to sRGB: 16 bits, palettes, CMYK, ICC profiles, transparency over white.

to_eight_bits(image) -> L, LA, RGB, RGBA or CMYK          to_rgb(image, transform) -> RGB, opaque
"""

import functools
import io
from typing import Final

from PIL import Image, ImageCms

MAX_PROFILE: Final = 4 << 20  # bytes; our choice: the profiles of presses, the largest there are, have two to three MB
TOLERANCE: Final = 2  # of 255: a profile that moves no colour further is sRGB under another name
# What image editors do unless told otherwise. Most profiles of cameras and screens hold nothing but this intent.
INTENT: Final = ImageCms.Intent.RELATIVE_COLORIMETRIC
FLAGS: Final = ImageCms.Flags.BLACKPOINTCOMPENSATION

Transform = ImageCms.ImageCmsTransform
_SPACES: Final = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}  # colour space in a profile -> mode of the pixels
_SAME: Final = frozenset({"L", "LA", "RGB", "RGBA", "CMYK"})
_EIGHT_BITS: Final = {
    "1": "L", "P": "RGB", "PA": "RGBA", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB",
}  # fmt: skip


class UnknownPixels(ValueError):
    """Numbers whose range no file says: floats, 32-bit integers, Lab."""


class BadProfile(ValueError):
    """An ICC profile that cannot be read, or is for other pixels than it came with."""


def to_eight_bits(image: Image.Image) -> Image.Image:
    """The picture in one of the modes L, LA, RGB, RGBA, CMYK, its colours as they are; or UnknownPixels."""
    if image.mode == "I" and image.format == "TIFF":
        raise UnknownPixels("32-bit integers")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip instead of scale
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if "transparency" in image.info or (image.palette is not None and image.palette.mode == "RGBA"):
        return image.convert("RGBA")
    if image.mode in _SAME:
        return image
    if image.mode in _EIGHT_BITS:
        return image.convert(_EIGHT_BITS[image.mode])
    raise UnknownPixels(f"mode {image.mode}")


def to_rgb(image: Image.Image, transform: Transform | None) -> Image.Image:
    """An eight-bit picture in sRGB. Without a profile grey and RGB are sRGB already, and of CMYK nobody knows."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if alpha is not None:
        image = image.convert(image.mode[:-1])
    if transform is not None:
        image = ImageCms.applyTransform(image, transform) or image
    elif image.mode != "RGB":
        image = image.convert("RGB")
    if alpha is None:
        return image
    ground = Image.new("RGB", image.size, "white")
    ground.paste(image, mask=alpha)
    return ground


def is_see_through(image: Image.Image) -> bool:
    """Whether any pixel of an eight-bit picture is."""
    return image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema()[0] != 255


def to_srgb(profile: bytes, mode: str) -> Transform | None:
    """How pixels of `mode` with this ICC profile become sRGB; None if they are sRGB to the eye. BadProfile."""
    if len(profile) > MAX_PROFILE:
        raise BadProfile(f"{len(profile):,} bytes")
    transform = _transform(profile, {"LA": "L", "RGBA": "RGB"}.get(mode, mode))
    if isinstance(transform, str):
        raise BadProfile(transform)
    return transform


@functools.lru_cache(maxsize=16)  # few profiles are behind nearly all pictures of the web
def _transform(profile: bytes, mode: str) -> Transform | str | None:
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _SPACES.get(profile[16:20]) != mode:
            return f"a profile for {profile[16:20]!r} on {mode} pixels"
        transform = ImageCms.buildTransform(opened, _srgb(), mode, "RGB", INTENT, FLAGS)
        if mode == "CMYK":
            return transform
        return None if _error(transform, mode) <= TOLERANCE else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return str(error)


@functools.lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _error(transform: Transform, mode: str) -> int:
    """The furthest that the transform moves a channel of a colour, over a grid of colours."""
    if mode == "L":
        colours = Image.frombytes("L", (256, 1), bytes(range(256)))
    else:
        steps = range(0, 256, 15)
        grid = bytes(value for r in steps for g in steps for b in steps for value in (r, g, b))
        colours = Image.frombytes("RGB", (len(grid) // 3, 1), grid)
    there = (ImageCms.applyTransform(colours, transform) or colours).tobytes()
    return max(abs(a - b) for a, b in zip(there, colours.convert("RGB").tobytes(), strict=True))
