"""Pictures from strangers: read the header, refuse what is too large, decode once, and say what goes into a shard.

header(data) -> ("jpeg", 640, 480)          decode(data) -> PIL image, RGB, upright, sRGB, transparent parts white
prepare(data, Options(resize=256)) -> bytes and extension for the shard, size as it came, perceptual hash

A file stays the bytes it is only if every reader sees the same picture in it, also one that knows nothing of EXIF, ICC
profiles and transparency. What is written anew carries no EXIF (so no GPS position), no profile and no comments.
"""

import io
import logging
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from data_pipeline import srgb
from data_pipeline.look import look
from data_pipeline.phash import SIDE, perceptual_hash

__all__ = [
    "BadImage",
    "Limits",
    "Options",
    "Prepared",
    "check",
    "decode",
    "encode",
    "header",
    "perceptual_hash",
    "prepare",
]

MAX_PIXELS: Final = 100_000_000  # our choice: above any camera picture of a web corpus, 400 MB once decoded to RGBA
MAX_BYTES: Final = 64 << 20  # our choice: one picture must not fill a worker's memory; sources read no larger files
MAX_SCANS: Final = 64  # our choice: progressive JPEGs have about ten; thousands keep a decoder busy for hours
# Our choice: a JPEG that is to shrink is decoded at 1/2, 1/4 or 1/8 of its size while that leaves 1.1 pixels for each
# one wanted. It saves up to five sixths of the time, and changes a picture no more than the choice of a filter does:
# 28 dB and more to full decoding, 37 as a rule (benchmarks/README.md).
DECODE_MARGIN: Final = 1.1
BICUBIC_BELOW: Final = 1.3  # pixels for each one wanted; from there on Hamming is as sharp and takes half of the time
HASH_SIDE: Final = 128  # pixels that are enough for the perceptual hash, twice the side it works with

KEPT_AS_IS: Final = {"jpeg": "jpg", "png": "png", "webp": "webp"}  # format -> extension in the shard


@dataclass(frozen=True)
class Limits:
    """What is refused before anything is decoded. Each has its reason: too_small, too_many_pixels, …"""

    min_side: int = 8  # our choice: pixels below which there is nothing to see
    max_pixels: int = MAX_PIXELS
    # Our choice: the longest banner formats and stitched panoramas are about 11 to 1. Beyond 20 a picture is a rule, a
    # divider or a strip of texture, and a square crop shows less than a twentieth of it.
    max_aspect: float = 20.0
    max_bytes: int = MAX_BYTES


@dataclass(frozen=True)
class Options:
    """What `prepare` shall do."""

    limits: Limits = field(default_factory=Limits)
    resize: int | None = None  # pixels of the short or long side; smaller pictures are never enlarged
    side: str = "short"  # or "long"
    quality: int = 90  # of a JPEG that is written anew
    hash: bool = True


@dataclass(frozen=True)
class Prepared:
    data: bytes  # the very object that was given, if it stays as it is
    extension: str
    width: int  # as it came, upright
    height: int
    perceptual_hash: bytes | None
    look: bytes | None  # where there is a hash
    changes: tuple[str, ...]  # why it is not the bytes it was, and what was wrong with it; words to count under


class BadImage(ValueError):
    """A picture that is left out; `reason` is the word it is counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, str]]:
        return BadImage, (self.reason, self.detail)


# -------------------------------------------------------------------------------------------------------------- header

# Pillow logs what it thinks of some damaged files; here each of them gets a reason.
logging.getLogger("PIL").setLevel(logging.CRITICAL)


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
    kind, image = _open(data, Limits(min_side=0, max_aspect=float("inf"), max_bytes=len(data)))
    return kind, image.width, image.height


# The plugin classes are called directly, not through Image.open: the pixel limit replaces Pillow's global one, whose
# warning cannot be caught in one thread without changing the others; and no rarer format is ever tried.
_OPEN: Final[dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "ppm": PpmImagePlugin.PpmImageFile,
}


def _open(data: bytes, limits: Limits) -> tuple[str, ImageFile.ImageFile]:
    """Format and picture whose header is read and within the limits."""
    if len(data) > limits.max_bytes:
        raise BadImage("too_many_bytes", f"{len(data):,} is more than {limits.max_bytes:,}")
    kind = sniff(data)
    if kind in ("png", "webp"):  # opening these unpacks texts and profiles, or makes room for all pixels
        _check_size(*_declared_size(kind, data), limits)
    with _translated():
        image = _OPEN[kind](io.BytesIO(data))
    _check_size(image.width, image.height, limits)
    if kind == "jpeg" and len(_SCAN.findall(data)) > MAX_SCANS and (scans := _scans(data)) > MAX_SCANS:
        raise BadImage("too_many_scans", f"{scans} is more than {MAX_SCANS}")
    return kind, image


def _declared_size(kind: str, data: bytes) -> tuple[int, int]:
    """Width and height by the first chunk."""
    chunk = data[12:16]
    try:
        if kind == "png" and chunk == b"IHDR":
            return struct.unpack_from(">II", data, 16)
        if chunk == b"VP8X":
            width, height = struct.unpack_from("<I", data, 24)[0], struct.unpack_from("<I", data, 26)[0] >> 8
            return (width & 0xFFFFFF) + 1, height + 1
        if chunk == b"VP8L":
            (bits,) = struct.unpack_from("<I", data, 21)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if chunk == b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
    except struct.error:
        raise BadImage("truncated", "the header is cut off") from None
    raise BadImage("undecodable", "no header")


def _check_size(width: int, height: int, limits: Limits) -> None:
    short, long = sorted((width, height))
    if short < limits.min_side:
        raise BadImage("too_small", f"{width} x {height}: a side below {limits.min_side}")
    if width * height > limits.max_pixels:
        raise BadImage("too_many_pixels", f"{width} x {height} is more than {limits.max_pixels:,}")
    if long > limits.max_aspect * short:
        raise BadImage("too_elongated", f"{width} x {height} is more than {limits.max_aspect:g} to 1")


_SCAN: Final = re.compile(rb"\xff\xda\0")  # and the first byte of a length that is below 256


def _scans(data: bytes) -> int:
    """Scans of a JPEG up to its end; the same two bytes inside a thumbnail, or behind the end, do not count."""
    at, scans = 2, 0
    marker = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in a scan, all but stuffed zeros, fill bytes and restarts
    while found := marker.search(data, at):
        kind, at = data[found.start() + 1], found.end()
        if kind == 0xD9:
            break
        at += int.from_bytes(data[at : at + 2], "big")
        scans += kind == 0xDA
    return scans


# -------------------------------------------------------------------------------------------------------------- decode


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB picture in sRGB: first frame of an animation, EXIF orientation applied, alpha over white."""
    _, image = _open(data, Limits(0, max_pixels, float("inf"), len(data)))
    with _translated():
        image.load()
        return _Pixels(image).finish(copy=False)


def upright(image: Image.Image) -> Image.Image:
    """An opened picture as `decode` gives it: RGB in sRGB, EXIF orientation applied, alpha over white."""
    return _Pixels(image).finish()


def check(data: bytes, limits: Limits | None = None) -> tuple[str, Image.Image]:
    """Format and decoded picture of what may enter a shard; BadImage says why not."""
    kind, image = _open(data, limits or Limits())
    with _translated():
        image.load()
        return kind, _Pixels(image).finish()


class _Pixels:
    """A loaded picture on its way to an upright, opaque sRGB one, and what the way changes."""

    def __init__(self, image: Image.Image) -> None:
        self.bad_profile = False
        self.orientation = orientation(image.info.get("exif", b""))
        self.image = srgb.to_eight_bits(image)
        self.transform: srgb.Transform | None = None
        if profile := image.info.get("icc_profile"):
            try:
                self.transform = srgb.to_srgb(profile, self.image.mode)
            except srgb.BadProfile:
                self.bad_profile = True

    def finish(self, size: tuple[int, int] | None = None, copy: bool = True) -> Image.Image:
        """The picture and nothing but it; `size` is upright. Shrinking comes first: the rest then has less to do.

        Without `copy` a picture that needs no change stays the (closed) file it was read from."""
        image = self.image
        if size is not None:
            stored = size if self.orientation < 5 else (size[1], size[0])
            few = image.width < BICUBIC_BELOW * stored[0]
            kind = Image.Resampling.BICUBIC if few else Image.Resampling.HAMMING
            image = image.resize(stored, kind, reducing_gap=3.0)
        image = srgb.to_rgb(image, self.transform)
        if self.orientation > 1:
            image = image.transpose(_TURNS[self.orientation])
        elif copy and isinstance(image, ImageFile.ImageFile):
            image = image.copy()
        image.info = {}  # comments and profiles, which Pillow would write into the next file
        return image


_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what undoes it


def orientation(exif: bytes) -> int:
    """EXIF orientation, 1 to 8; 1 where nothing is said, or nothing that can be read."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    try:
        if order is not None:
            (start,) = struct.unpack_from(order + "I", exif, 4)
            (entries,) = struct.unpack_from(order + "H", exif, start)
            for at in range(start + 2, start + 2 + 12 * entries, 12):
                tag, kind = struct.unpack_from(order + "HH", exif, at)
                if tag == 0x0112:
                    (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), exif, at + 8)
                    return value if value in _TURNS else 1
    except struct.error:
        pass
    return 1


# ------------------------------------------------------------------------------------------------------------- prepare


def prepare(data: bytes, options: Options) -> Prepared:
    """What a shard holds of a picture; BadImage says why nothing.

    Pictures larger than `options.resize` become a jpg. Others stay the bytes they are where every reader sees the same
    picture in them; where not, a JPEG becomes a jpg of `options.quality` and all other formats a png.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files; it is decided here what is wrong with them
        kind, image = _open(data, options.limits)
        with _translated():
            return _prepare(data, kind, image, options)


def _prepare(data: bytes, kind: str, image: ImageFile.ImageFile, options: Options) -> Prepared:
    stored_size = image.size
    if kind == "jpeg":
        _decode_small(image, options)
    image.load()
    pixels = _Pixels(image)
    width, height = stored_size if pixels.orientation < 5 else (stored_size[1], stored_size[0])
    size = _shrunk(width, height, options)
    changes = _changes(data, kind, image, pixels)
    if size is not None:
        changes = ["resized", *changes]
    ignored = ("profile_ignored",) if pixels.bad_profile else ()
    extension = "jpg" if size is not None else KEPT_AS_IS.get(kind, "png") if not changes or kind == "jpeg" else "png"
    picture = pixels.finish(size) if changes or options.hash else None
    if picture is None or not changes:
        stored = data
    elif extension == "jpg":
        stored = encode(picture, "jpeg", quality=options.quality)
    else:
        stored = encode(picture, "png")
    hashed = looks = None
    if picture is not None and options.hash:
        cells = picture if min(picture.size) < SIDE else picture.resize((SIDE, SIDE), Image.Resampling.BOX)
        hashed = perceptual_hash(cells)
        looks = look(cells) if hashed is not None else None
    return Prepared(stored, extension, width, height, hashed, looks, (*changes, *ignored))


def _shrunk(width: int, height: int, options: Options) -> tuple[int, int] | None:
    """Width and height after resizing; None for what is small enough."""
    if options.resize is None:
        return None
    side = min(width, height) if options.side == "short" else max(width, height)
    if side <= options.resize:
        return None
    scale = options.resize / side
    return max(1, round(width * scale)), max(1, round(height * scale))


def _decode_small(image: ImageFile.ImageFile, options: Options) -> None:
    """Let a JPEG be decoded at a fraction of its size if nothing larger is needed of it."""
    size = _shrunk(*image.size, options)
    if size is not None:
        image.draft(None, (round(size[0] * DECODE_MARGIN), round(size[1] * DECODE_MARGIN)))
    elif not _changes(b"", "jpeg", image, _Pixels(image)):
        image.draft(None, (HASH_SIDE, HASH_SIDE))  # decoded all the same, to know that the file is whole


def _changes(data: bytes, kind: str, image: ImageFile.ImageFile, pixels: _Pixels) -> list[str]:
    """Why a file cannot stay as it is."""
    found = {
        "other_format": kind not in KEPT_AS_IS,
        "first_frame": getattr(image, "is_animated", False),
        "turned": pixels.orientation > 1,
        "colours_converted": pixels.transform is not None or pixels.image.mode == "CMYK",
        "made_opaque": srgb.is_see_through(pixels.image),
        "eight_bits": image.mode.startswith("I") or (kind == "png" and data[24] > 8),
    }
    return [word for word, holds in found.items() if holds]


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@contextmanager
def _translated() -> Iterator[None]:
    """Codecs raise nearly anything on damaged input."""
    try:
        yield
    except (BadImage, MemoryError):  # memory is the matter of who runs this
        raise
    except Image.DecompressionBombError as error:  # a frame larger than the header says
        raise BadImage("too_many_pixels", str(error)) from error
    except srgb.UnknownPixels as error:
        raise BadImage("unsupported_pixels", str(error)) from error
    except Exception as error:
        reason = "truncated" if "truncat" in str(error).lower() else "undecodable"
        raise BadImage(reason, str(error)) from error
