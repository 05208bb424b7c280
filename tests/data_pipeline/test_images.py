"""What is refused and why, what stays as it is, and what every reader sees in what was written anew."""

import io
import math
import pickle
import random
import struct
import subprocess
import sys
import zlib

import pytest
from PIL import Image, ImageChops, ImageOps

from data_pipeline import images
from data_pipeline.images import BadImage, Limits, Options, encode
from data_pipeline.phash import distance

ANY = Options()


def photo(size: tuple[int, int] = (400, 300), seed: int = 0) -> Image.Image:
    """Soft at large scales, noisy at small ones: compresses and shrinks like a photograph."""
    rng = random.Random(seed)
    picture = Image.new("RGB", size, "grey")
    for cells in (3, 7, 15, 40, 100):
        noise = Image.frombytes("RGB", (cells, cells), rng.randbytes(3 * cells * cells)).resize(size)
        picture = ImageChops.overlay(picture, noise)
    return picture


def psnr(left: Image.Image, right: Image.Image) -> float:
    assert left.size == right.size
    histogram = ImageChops.difference(left, right).histogram()
    square = sum((n % 256) ** 2 * count for n, count in enumerate(histogram)) / sum(histogram)
    return math.inf if square == 0 else 10 * math.log10(255**2 / square)


def plain_reader(data: bytes) -> Image.Image:
    """What those see who know nothing of orientation, profiles and transparency."""
    return Image.open(io.BytesIO(data)).convert("RGB")


# -------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm"])
def test_header_and_decode_agree_for_every_format(make, kind):
    data = make.picture(1, (20, 30), kind)
    assert images.header(data) == (kind, 20, 30)
    image = images.decode(data)
    assert (image.mode, image.size) == ("RGB", (20, 30))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "jpeg", "bmp", "gif"])
def test_every_mode_becomes_rgb(mode, kind):
    try:
        data = encode(Image.new(mode, (9, 8)), kind)
    except (OSError, ValueError):
        pytest.skip("the format has no such mode")
    assert images.decode(data).mode == "RGB"


@pytest.mark.parametrize(("kind", "extension"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
def test_common_formats_stay_the_bytes_they_are(make, kind, extension):
    data = make.picture(1, (20, 30), kind)
    prepared = images.prepare(data, ANY)
    assert prepared.data is data
    assert (prepared.extension, prepared.changes) == (extension, ())


@pytest.mark.parametrize("kind", ["bmp", "gif", "tiff", "ppm"])
def test_other_formats_become_png_with_the_same_pixels(make, kind):
    data = make.picture(1, (20, 30), kind)
    prepared = images.prepare(data, ANY)
    assert (prepared.extension, prepared.changes) == ("png", ("other_format",))
    assert plain_reader(prepared.data).tobytes() == images.decode(data).tobytes()


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_an_animation_becomes_its_first_frame(kind):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "webp" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    stored = images.prepare(data, ANY)
    assert stored.extension == "png"
    assert not getattr(Image.open(io.BytesIO(stored.data)), "is_animated", False)
    assert plain_reader(stored.data).getpixel((9, 9)) == pytest.approx((255, 0, 0), abs=1)


def test_a_sixteen_bit_colour_png_becomes_one_of_eight_bits():
    data = png(20, 20, rows=b"\0" + b"\x80\x12" * 60, depth=16, colour=2)
    prepared = images.prepare(data, ANY)
    assert prepared.changes == ("eight_bits",)
    assert plain_reader(prepared.data).getpixel((9, 9)) == (128, 128, 128)


@pytest.mark.parametrize("tail", [b"PK\3\4 a zip file", b"<script>alert(1)</script>", b"\xff\xda" * 1000])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_what_is_behind_a_picture_changes_nothing(make, kind, tail):
    data = make.picture(1, (40, 30), kind)
    assert images.decode(data + tail).tobytes() == images.decode(data).tobytes()
    assert images.prepare(data + tail, ANY).width == 40


def test_the_content_decides_and_no_name():
    """There is no name to ask: a gif in a file called .jpg is a gif."""
    assert images.prepare(encode(photo(), "gif"), ANY).extension == "png"


# --------------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_a_turned_picture_is_upright_for_every_reader(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored_as = photo((60, 40))
    data = encode(stored_as, kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    prepared = images.prepare(data, Options(quality=98))
    assert (prepared.width, prepared.height) == expected.size == ((60, 40) if orientation < 5 else (40, 60))
    assert ("turned" in prepared.changes) == (orientation > 1 and kind != "tiff")  # a tiff is written anew anyway
    assert psnr(plain_reader(prepared.data), expected) > 28
    assert images.decode(data).tobytes() == expected.tobytes()
    assert images.decode(prepared.data).size == expected.size


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "value"), [("H", 6), ("I", 6)])
def test_orientation_is_read_in_either_byte_order_and_length(order, kind, value):
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHI" + kind, 0x0112, 4 if kind == "I" else 3, 1, value).ljust(12, b"\0")
    exif = b"Exif\0\0" + mark + struct.pack(order + "IH", 8, 1) + entry
    assert images.orientation(exif) == 6


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\0\0\0\0",
        random.Random(1).randbytes(100),
    ],
)
def test_damaged_exif_beside_a_good_picture_turns_nothing(exif):
    data = encode(photo(), "jpeg", exif=exif) if exif else encode(photo(), "jpeg")
    prepared = images.prepare(data, ANY)
    assert prepared.data is data


# ------------------------------------------------------------------------------------------------------------- privacy


@pytest.mark.parametrize("resize", [None, 40])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_what_is_written_anew_carries_no_metadata(kind, resize):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x0110] = 6, "SECRET title", "SECRET camera"
    exif.get_ifd(0x8825)[29] = "SECRET place"
    options: dict = {"exif": exif}
    if kind == "png":
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("Comment", "SECRET words")
    else:
        options["xmp"] = b"<x:xmpmeta>SECRET words</x:xmpmeta>"
    if kind == "jpeg":
        options["comment"] = b"SECRET comment"
    data = encode(photo(), kind, **options)
    assert b"SECRET" in data
    prepared = images.prepare(data, Options(resize=resize))
    assert "turned" in prepared.changes
    for word in (b"SECRET", b"Exif", b"eXIf", b"EXIF", b"xmp"):
        assert word not in prepared.data


# -------------------------------------------------------------------------------------------------------------- resize


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((600, 900), Options(resize=300), (300, 450)),
        ((900, 600), Options(resize=300), (450, 300)),
        ((600, 900), Options(resize=300, side="long"), (200, 300)),
        ((333, 1000), Options(resize=100), (100, 300)),
        ((2000, 101), Options(resize=100), (1980, 100)),
        ((2000, 101), Options(resize=50, side="long"), (50, 3)),
        ((301, 300), Options(resize=300), (301, 300)),
    ],
)
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_resizing_shrinks_to_the_side_that_was_asked_for(size, options, expected, kind):
    data = encode(photo(size), kind)
    prepared = images.prepare(data, options)
    assert images.header(prepared.data)[1:] == expected
    assert (prepared.width, prepared.height) == size
    if expected == size:
        assert prepared.data is data
    else:
        assert (prepared.extension, prepared.changes) == ("jpg", ("resized",))


@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_small_pictures_are_never_enlarged(make, side, kind):
    small = make.picture(1, (20, 90), kind)
    prepared = images.prepare(small, Options(resize=90 if side == "long" else 30, side=side))
    assert prepared.data is small


@pytest.mark.parametrize("resize", [30, 40, 58, 70, 100, 140, 192, 199])
def test_decoding_at_a_fraction_of_the_size_changes_little(resize):
    """The stated bound is 28 dB to what full decoding gives."""
    for seed in range(4):
        data = encode(photo((640, 480), seed), "jpeg", quality=92)
        whole = Image.open(io.BytesIO(data))
        size = images.header(images.prepare(data, Options(resize=resize)).data)[1:]
        exact = whole.resize(size, Image.Resampling.BICUBIC)
        assert psnr(fast(data, resize), exact) >= 28


def fast(data: bytes, resize: int) -> Image.Image:
    """The picture before it is written: a JPEG of quality 100 would add its own error."""
    found = []
    original = images.encode
    images.encode = lambda image, kind, **options: found.append(image) or original(image, kind, **options)
    try:
        images.prepare(data, Options(resize=resize))
    finally:
        images.encode = original
    return found[0]


def test_a_large_jpeg_is_not_decoded_in_full(monkeypatch):
    sizes = []
    new = Image.core.new  # makes room for pixels

    def spy(mode, size, *rest):
        sizes.append(size)
        return new(mode, size, *rest)

    data = encode(photo((2000, 1500)), "jpeg")
    monkeypatch.setattr("PIL.Image.core.new", spy)
    prepared = images.prepare(data, Options(resize=128))
    assert (prepared.width, prepared.height) == (2000, 1500)
    assert sizes
    assert max(width * height for width, height in sizes) <= 2000 * 1500 / 60


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_the_same_bytes_come_out_every_time(kind):
    data = encode(photo(), kind)
    for options in (ANY, Options(resize=100)):
        assert images.prepare(data, options) == images.prepare(data, options)


def test_the_hash_does_not_depend_on_how_the_picture_was_read():
    picture = photo((1600, 1200))
    data = encode(picture, "jpeg", quality=92)
    exact = images.perceptual_hash(images.decode(data))
    for options in (ANY, Options(resize=256), Options(resize=300, side="long")):
        found = images.prepare(data, options).perceptual_hash
        assert found is not None
        assert exact is not None
        assert distance(found, exact) <= 6
    assert images.prepare(data, Options(hash=False)).perceptual_hash is None
    assert images.prepare(encode(Image.new("RGB", (99, 99)), "png"), ANY).perceptual_hash is None


# ------------------------------------------------------------------------------------------------------- hostile files


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int,
    height: int,
    *before: bytes,
    rows: bytes | None = None,
    depth: int = 8,
    colour: int = 0,
    body: bytes | None = None,
) -> bytes:
    """A PNG that says it is width x height; by default with only a few pixels inside."""
    body = body if body is not None else zlib.compress(bytes(1000) if rows is None else rows * height)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(before) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg(size: tuple[int, int] = (64, 48), **options) -> bytes:
    return encode(photo(size), "jpeg", **options)


def jpeg_claiming(width: int, height: int) -> bytes:
    data = jpeg()
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def jpeg_of_scans(number: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = jpeg(progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * number + data[-2:]


def webp(chunk_kind: bytes, body: bytes) -> bytes:
    content = b"WEBP" + chunk_kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(content)) + content


def webp_canvas(width: int, height: int) -> bytes:
    """An extended WebP of a large canvas around a small picture."""
    inner = encode(photo((16, 16)), "webp")[12:]
    head = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    content = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + head + inner
    return b"RIFF" + struct.pack("<I", len(content)) + content


def gif(width: int, height: int, *, frame: tuple[int, int] | None = None) -> bytes:
    data = bytearray(encode(Image.new("P", (16, 16), 3), "gif"))
    data[6:10] = struct.pack("<HH", width, height)
    if frame is not None:
        at = data.index(b",\0\0\0\0") + 5
        data[at : at + 4] = struct.pack("<HH", *frame)
    return bytes(data)


def bmp(width: int, height: int) -> bytes:
    data = bytearray(encode(photo((16, 16)), "bmp"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def tiff(*entries: tuple[int, int, int, int], tail: bytes = b"") -> bytes:
    """tag, type, count, value"""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + tail


def tiff_of(width: int, height: int, **other: int) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: height, 279: width * height % 2**32}
    tags |= {int(name[1:]): value for name, value in other.items()}
    return tiff(*((tag, 4, 1, value) for tag, value in tags.items()), tail=bytes(300))


BROKEN = ("truncated", "undecodable")
ZEROS = zlib.compress(bytes(40 << 20), 9)  # 40 kB that become 40 MB

HOSTILE: dict[str, tuple[bytes, tuple[str, ...]]] = {
    # other things
    "nothing": (b"", ("empty_image",)),
    "one byte": (b"\xff", ("unsupported_format",)),
    "words": (b"404 not found", ("unsupported_format",)),
    "a page": (b"<!DOCTYPE html><html></html>", ("unsupported_format",)),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ("unsupported_format",)),
    "pdf": (b"%PDF-1.4\n", ("unsupported_format",)),
    "zip": (b"PK\3\4" + bytes(100), ("unsupported_format",)),
    "program": (b"\x7fELF" + bytes(100), ("unsupported_format",)),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", ("unsupported_format",)),
    "icon": (b"\0\0\1\0\1\0" + bytes(100), ("unsupported_format",)),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(100), ("unsupported_format",)),
    "nearly a gif": (b"GIF?", ("unsupported_format",)),
    "random bytes": (random.Random(0).randbytes(5000), ("unsupported_format",)),
    # PNG
    "png signature alone": (b"\x89PNG\r\n\x1a\n", BROKEN),
    "png garbage": (b"\x89PNG\r\n\x1a\n" + b"?" * 50, BROKEN),
    "png of 50,000 x 50,000": (png(50_000, 50_000), ("too_many_pixels",)),
    "png of 2 G x 2 G": (png(2**31 - 1, 2**31 - 1), ("too_many_pixels",)),
    "png without width": (png(0, 100), ("too_small",)),
    "png of 200 x 3": (png(200, 3), ("too_small",)),
    "png of 4000 x 8": (png(4000, 8), ("too_elongated",)),
    "png that says more than it holds": (png(500, 500), BROKEN),
    "png of a broken header": (png(20, 20).replace(b"IHDR\0\0\0\x14", b"IHDR\0\0\0\x15"), BROKEN),
    "png with pixels that are no zlib": (png(20, 20, body=b"?" * 100), BROKEN),
    "png without pixels": (png(20, 20)[:33] + chunk(b"IEND", b""), BROKEN),
    "png of three bits": (png(20, 20, depth=3), BROKEN),
    "png of colour type 7": (png(20, 20, colour=7), BROKEN),
    "png with a text bomb": (png(20, 20, chunk(b"zTXt", b"Comment\0\0" + ZEROS)), BROKEN),
    "png with a text bomb of Unicode": (png(20, 20, chunk(b"iTXt", b"Comment\0\1\0\0\0" + ZEROS)), BROKEN),
    "png with a profile bomb": (png(20, 20, chunk(b"iCCP", b"icc\0\0" + ZEROS)), BROKEN),
    "png with a hundred texts": (
        png(20, 20, *[chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes((1 << 20) - 1), 9))] * 100),
        BROKEN,
    ),
    "png of a chunk of 2 GB": (png(20, 20)[:33] + b"\x7f\xff\xff\xfftEXt?", BROKEN),
    # JPEG
    "jpeg start alone": (b"\xff\xd8\xff", BROKEN),
    "jpeg garbage": (b"\xff\xd8\xff\xe0" + b"?" * 50, BROKEN),
    "jpeg without a picture": (b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xd9", BROKEN),
    "jpeg cut in its header": (jpeg()[:100], BROKEN),
    "jpeg cut in its pixels": (jpeg()[:-300], BROKEN),
    "jpeg of 65,535 x 65,535": (jpeg_claiming(65_535, 65_535), ("too_many_pixels",)),
    "jpeg of 65,535 x 9": (jpeg_claiming(65_535, 9), ("too_elongated",)),
    "jpeg without height": (jpeg_claiming(64, 0), BROKEN),
    "jpeg of 100,000 scans": (jpeg_of_scans(100_000), ("too_many_scans",)),
    "jpeg of twelve bits": (jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), BROKEN),
    "jpeg of no colours": (jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x08\x08"), BROKEN),
    # WebP
    "webp signature alone": (b"RIFF\x04\0\0\0WEBP", BROKEN),
    "webp cut in its header": (encode(photo(), "webp")[:24], BROKEN),
    "webp cut in its pixels": (encode(photo(), "webp")[:-200], BROKEN),
    "webp canvas of 16 M x 16 M": (webp_canvas(1 << 24, 1 << 24), ("too_many_pixels",)),
    "webp canvas larger than its picture": (webp_canvas(4000, 4000), BROKEN),
    "webp of an unknown kind": (webp(b"VP9 ", bytes(100)), BROKEN),
    "webp of 16,383 x 16,383": (webp(b"VP8 ", b"\x30\1\0\x9d\1\x2a\xff\x3f\xff\x3f" + bytes(99)), ("too_many_pixels",)),
    "lossless webp of garbage": (webp(b"VP8L", b"\x2f" + bytes([100, 0, 25, 0]) + b"?" * 99), BROKEN),
    # GIF
    "gif header alone": (b"GIF89a", BROKEN),
    "gif without a frame": (b"GIF89a" + struct.pack("<HHBBB", 20, 20, 0, 0, 0) + b";", BROKEN),
    "gif of 65,535 x 65,535": (gif(65_535, 65_535), ("too_many_pixels",)),
    "gif of a frame that sticks out": (gif(16, 16, frame=(65_535, 65_535)), ("too_many_pixels",)),
    "gif cut off": (encode(photo().convert("P"), "gif")[:3000], BROKEN),
    # BMP, TIFF, PPM
    "bmp header alone": (b"BM", BROKEN),
    "bmp of 1 G x 1 G": (bmp(1 << 30, 1 << 30), ("too_many_pixels",)),
    "bmp that says more than it holds": (bmp(500, 500), BROKEN),
    "bmp of an unknown header": (b"BM" + bytes(12) + struct.pack("<I", 99) + bytes(99), BROKEN),
    "tiff header alone": (b"II*\0", BROKEN),
    "tiff without tags": (tiff(), BROKEN),
    "tiff of 100,000 x 100,000": (tiff_of(100_000, 100_000), ("too_many_pixels",)),
    "tiff that says more than it holds": (tiff_of(500, 500), BROKEN),
    "tiff of a tag of 4 GB": (tiff(*[(256, 4, 2**32 - 1, 8), (257, 4, 1, 20)]), BROKEN),
    "tiff of huge tiles": (tiff_of(20, 20, t322=1 << 30, t323=1 << 30, t324=8, t325=2**31), BROKEN),
    "tiff of 65,535 samples": (tiff_of(20, 20, t277=65_535), BROKEN),
    "ppm without a size": (b"P6\n", BROKEN),
    "ppm of 99,999 x 99,999": (b"P6 99999 99999 255\n" + bytes(99), ("too_many_pixels",)),
    "ppm that says more than it holds": (b"P6 99 99 255\n" + bytes(99), BROKEN),
    "ppm of no colours": (b"P6 20 20 0\n" + bytes(1200), BROKEN),
    "ppm of a negative size": (b"P6 -20 -20 255\n" + bytes(1200), (*BROKEN, "too_small")),
    "ppm of endless digits": (b"P6 " + b"9" * 100_000, BROKEN),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_is_refused_with_its_reason(name):
    data, reasons = HOSTILE[name]
    with pytest.raises(BadImage) as caught:
        images.prepare(data, ANY)
    assert caught.value.reason in reasons
    with pytest.raises(BadImage):
        images.check(data)


def test_bombs_take_neither_memory_nor_time(tmp_path):
    """All of them in a process that may hold 120 MB more than it does after loading Pillow, and use 20 s."""
    for number, (data, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{number:03d}").write_bytes(data)
    code = (
        "import pathlib, resource, sys\n"
        "from data_pipeline import images\n"
        "images.prepare(images.encode(images.Image.new('RGB', (99, 99)), 'png'), images.Options())\n"
        "held = int(open('/proc/self/statm').read().split()[5]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (held + (120 << 20),) * 2)\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
        "refused = 0\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try:\n"
        "        images.prepare(path.read_bytes(), images.Options())\n"
        "    except images.BadImage:\n"
        "        refused += 1\n"
        "print(refused)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(len(HOSTILE)), "")


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm"])
def test_a_file_with_wrong_bytes_is_refused_or_can_be_read(kind):
    """Whatever is wrong with a file: a reason, or a picture that every reader can open."""
    rng = random.Random(kind)
    good = encode(photo((48, 36)), kind)
    for _ in range(60):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 3, 20))):
            data[int(len(data) * rng.random() ** 2)] = rng.randrange(256)  # headers more often than pixels
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        try:
            prepared = images.prepare(bytes(data), ANY)
        except BadImage as error:
            assert error.reason in (*BROKEN, *(reason for _, reasons in HOSTILE.values() for reason in reasons))
        else:
            assert images.decode(prepared.data).size == (prepared.width, prepared.height)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("resize", [None, 50])
def test_a_cut_off_file_is_noticed_wherever_it_is_cut(kind, resize):
    """Also where it is decoded at a fraction of its size only."""
    data = encode(photo((640, 480)), kind)
    for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        with pytest.raises(BadImage) as caught:
            images.prepare(data[: int(len(data) * share)], Options(resize=resize))
        assert caught.value.reason in BROKEN


# --------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("limits", "size", "reason"),
    [
        (Limits(min_side=31), (30, 40), "too_small"),
        (Limits(min_side=30), (30, 40), None),
        (Limits(max_pixels=1199), (30, 40), "too_many_pixels"),
        (Limits(max_pixels=1200), (30, 40), None),
        (Limits(max_aspect=1.3), (30, 40), "too_elongated"),
        (Limits(max_aspect=4 / 3), (30, 40), None),
        (Limits(max_aspect=4 / 3), (40, 30), None),
        (Limits(max_bytes=100), (30, 40), "too_many_bytes"),
    ],
)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "tiff"])
def test_a_limit_is_the_last_that_passes(make, limits, size, reason, kind):
    data = make.picture(1, size, kind)
    try:
        images.prepare(data, Options(limits))
        found = None
    except BadImage as error:
        found = error.reason
    assert found == reason


def test_the_pixel_limit_of_decode_holds_before_decoding(make):
    with pytest.raises(BadImage, match="too_many_pixels"):
        images.decode(make.picture(1, (20, 30)), max_pixels=599)
    assert images.decode(make.picture(1, (20, 30)), max_pixels=600).size == (20, 30)


def test_decode_takes_pictures_of_any_shape(make):
    """The limits are for building; an evaluation set is taken as it is."""
    assert images.decode(make.picture(1, (3, 200))).size == (3, 200)


def test_a_reason_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(BadImage("truncated", "at byte 7")))  # noqa: S301
    assert (error.reason, str(error)) == ("truncated", "truncated: at byte 7")


# ----------------------------------------------------------------------------------------------------------- in a build


def test_a_build_counts_what_was_refused_and_what_was_changed(make, build):
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = {
        "turned": encode(photo((40, 30), 1), "jpeg", exif=exif),
        "as_it_is": encode(photo((40, 30), 2), "jpeg"),
        "gif": encode(photo((40, 30), 3), "gif"),
        "elongated": encode(photo((400, 10), 4), "png"),
        "bomb": png(50_000, 50_000),
    }
    rows = [{"key": key, "image": data, "caption": "#dog"} for key, data in pictures.items()]
    manifest, output = build(rows)
    assert manifest["counts"]["changed"] == {"other_format": 1, "turned": 1}
    assert manifest["counts"]["dropped"]["too_elongated"] == 1
    assert manifest["counts"]["dropped"]["too_many_pixels"] == 1
    assert set(make.records(output)) == {"turned", "as_it_is", "gif"}


def test_limits_and_sides_can_be_chosen_on_the_command_line(make, build):
    rows = [
        {"key": "large", "image": encode(photo((400, 300), 1), "jpeg"), "caption": "#dog"},
        {"key": "long", "image": encode(photo((300, 100), 2), "jpeg"), "caption": "#dog"},
        {"key": "small", "image": encode(photo((40, 30), 3), "jpeg"), "caption": "#dog"},
        {"key": "heavy", "image": encode(photo((200, 200), 4), "png"), "caption": "#dog"},
    ]
    assert len(rows[0]["image"]) < len(rows[3]["image"])
    limits = ("--min-side", 32, "--max-aspect", 2, "--max-bytes", len(rows[3]["image"]) - 1, "--max-pixels", 200_000)
    manifest, output = build(rows, "--resize", 100, "--resize-side", "long", *limits)
    dropped = {reason: number for reason, number in manifest["counts"]["dropped"].items() if number}
    assert dropped == {"too_elongated": 1, "too_many_bytes": 1, "too_small": 1}
    assert list(make.records(output)) == ["large"]
