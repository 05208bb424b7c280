import io
import pickle
import struct
import zlib

import pytest
from PIL import Image

from data_pipeline import images
from data_pipeline.images import BadImage


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A few bytes that decode to width x height pixels: a decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm"])
def test_header_and_decode_agree_for_every_format(make, kind):
    data = make.picture(1, (20, 30), kind)
    assert images.header(data) == (kind, 20, 30)
    image = images.decode(data)
    assert (image.mode, image.size) == ("RGB", (20, 30))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    kind = "tiff" if mode == "CMYK" else "png"
    assert images.decode(encode(Image.new(mode, (9, 8)), kind)).mode == "RGB"


def test_transparent_parts_are_white():
    data = encode(Image.new("RGBA", (9, 8), (255, 0, 0, 0)), "png")
    assert images.decode(data).getpixel((0, 0)) == (255, 255, 255)
    palette = encode(Image.new("P", (9, 8), 0), "png", transparency=0)
    assert images.decode(palette).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    data = encode(Image.new("I;16", (9, 8), 0x8080), "png")
    assert images.decode(data).getpixel((0, 0)) == (128, 128, 128)


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = encode(Image.new("RGB", (30, 20)), "jpeg", exif=exif)
    assert images.header(data)[1:] == (30, 20)
    assert images.decode(data).size == (20, 30)


def test_an_animation_shows_its_first_frame():
    frames = [Image.new("RGB", (9, 8), color) for color in ("red", "blue")]
    data = encode(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert images.decode(data).getpixel((0, 0)) == (254, 0, 0) or images.decode(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("empty_image", b""),
        ("unsupported_format", b"GIF?"),
        ("unsupported_format", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("undecodable", b"\x89PNG\r\n\x1a\n" + b"?" * 50),
        ("undecodable", b"\xff\xd8\xff\xe0" + b"?" * 50),
        ("too_many_pixels", png_claiming(50_000, 50_000)),
        ("too_small", png_claiming(200, 3)),
    ],
)
def test_a_bad_image_is_refused_with_a_reason(reason, data):
    with pytest.raises(BadImage) as caught:
        images.check(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_a_cut_off_image_is_refused(make, kind):
    data = make.picture(1, (60, 60), kind)
    with pytest.raises(BadImage) as caught:
        images.decode(data[: len(data) * 2 // 3])
    assert caught.value.reason in ("truncated", "undecodable")


def test_the_pixel_limit_holds_before_decoding(make):
    with pytest.raises(BadImage, match="too_many_pixels"):
        images.decode(make.picture(1, (20, 30)), max_pixels=599)
    assert images.decode(make.picture(1, (20, 30)), max_pixels=600).size == (20, 30)


def test_a_reason_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(BadImage("truncated", "at byte 7")))  # noqa: S301
    assert (error.reason, str(error)) == ("truncated", "truncated: at byte 7")


@pytest.mark.parametrize(("kind", "extension"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
def test_common_formats_stay_the_bytes_they_are(make, kind, extension):
    data = make.picture(1, (20, 30), kind)
    assert images.prepare(data, None, 90) == (data, extension)


def test_other_formats_become_png_with_the_same_pixels(make):
    data = make.picture(1, (20, 30), "bmp")
    stored, extension = images.prepare(data, None, 90)
    assert extension == "png"
    assert images.decode(stored).tobytes() == images.decode(data).tobytes()


def test_resizing_shrinks_to_the_short_side_and_never_enlarges(make):
    stored, extension = images.prepare(make.picture(1, (60, 90)), 30, 90)
    assert (images.header(stored), extension) == (("jpeg", 30, 45), "jpg")
    small = make.picture(1, (20, 90))
    assert images.prepare(small, 30, 90) == (small, "png")
