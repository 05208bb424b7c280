"""Pictures from strangers: read the header, refuse what is too large, then decode to RGB.

header(data) -> ("jpeg", 640, 480)          decode(data) -> PIL image, RGB, upright, transparent parts white
"""

import contextlib
import io
from collections.abc import Callable
from typing import Final

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

MAX_PIXELS: Final = 100_000_000  # our choice: above any camera picture of a web corpus, 400 MB once decoded to RGBA
MIN_SIDE: Final = 8  # our choice: pixels below which there is nothing to see
MAX_BYTES: Final = 64 << 20  # our choice: one picture must not fill a worker's memory

KEPT_AS_IS: Final = {"jpeg": "jpg", "png": "png", "webp": "webp"}  # format -> extension in the shard

# The plugin classes are called directly, not through Image.open: the pixel limit below replaces Pillow's global one,
# whose warning cannot be caught in one thread without changing the others; and no rarer format is ever tried.
_OPEN: Final[dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "ppm": PpmImagePlugin.PpmImageFile,
}


class BadImage(ValueError):
    """A picture that is left out; `reason` is the word it is counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, str]]:
        return BadImage, (self.reason, self.detail)


def sniff(data: bytes) -> str:
    """Name the format by its first bytes, never by a file name."""
    head = data[:16]
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(b"BM"):
        return "bmp"
    if head.startswith((b"II*\0", b"MM\0*")):
        return "tiff"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "ppm"
    raise BadImage("unsupported_format" if data else "empty_image")


def header(data: bytes) -> tuple[str, int, int]:
    """Format, width and height as stored (before EXIF orientation); nothing is decoded."""
    image = _open(data)
    return sniff(data), image.width, image.height


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB picture: first frame of an animation, EXIF orientation applied, alpha over white."""
    image = _open(data)
    if image.width * image.height > max_pixels:
        raise BadImage("too_many_pixels", f"{image.width} x {image.height} is more than {max_pixels:,}")
    try:
        image.load()
        return _to_rgb(_upright(image))
    except Exception as error:  # codecs raise nearly anything on damaged input
        reason = "truncated" if "truncat" in str(error).lower() else "undecodable"
        raise BadImage(reason, str(error)) from error


def check(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[str, Image.Image]:
    """Format and decoded picture of what may enter a shard; BadImage says why not."""
    if len(data) > MAX_BYTES:
        raise BadImage("too_many_bytes", f"{len(data):,} is more than {MAX_BYTES:,}")
    kind, width, height = header(data)
    if min(width, height) < MIN_SIDE:
        raise BadImage("too_small", f"{width} x {height}")
    return kind, decode(data, max_pixels)


def prepare(data: bytes, short_side: int | None, quality: int) -> tuple[bytes, str]:
    """Bytes and extension as stored in the shard.

    Without `short_side` jpg, png and webp stay the bytes they are and other formats become png. With it, larger
    pictures are resized to that short side and stored as jpg of `quality`; smaller ones are never enlarged.
    """
    kind, image = check(data)
    if short_side is not None and min(image.size) > short_side:
        scale = short_side / min(image.size)
        size = (max(short_side, round(image.width * scale)), max(short_side, round(image.height * scale)))
        return encode(image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0), "jpeg", quality=quality), "jpg"
    if kind in KEPT_AS_IS:
        return data, KEPT_AS_IS[kind]
    return encode(image, "png"), "png"


def encode(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _open(data: bytes) -> ImageFile.ImageFile:
    kind = sniff(data)
    try:
        return _OPEN[kind](io.BytesIO(data))
    except Exception as error:  # codecs raise nearly anything on damaged input
        raise BadImage("undecodable", str(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # damaged EXIF beside a good picture: show it as stored
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy() if isinstance(image, ImageFile.ImageFile) else image
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip instead of scale
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")
