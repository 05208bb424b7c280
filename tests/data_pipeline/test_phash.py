import math
import random
import statistics

import pytest
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

from data_pipeline.images import decode, encode
from data_pipeline.phash import distance, perceptual_hash


def photo(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Blurred noise of several scales and some shapes: the spectrum of a photograph, roughly."""
    rng = random.Random(seed)
    picture = Image.new("RGB", size, "grey")
    for cells in (4, 8, 16, 32):
        noise = Image.frombytes("RGB", (cells, cells), rng.randbytes(3 * cells * cells)).resize(size)
        picture = ImageChops.overlay(picture, noise)
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y, w, h = (rng.randrange(side) for side in (*size, *size))
        draw.ellipse((x, y, x + w // 2, y + h // 2), fill=tuple(rng.randbytes(3)))
    return picture


def hashed(picture: Image.Image) -> bytes:
    found = perceptual_hash(picture)
    assert found is not None
    return found


CHANGES = {
    "jpeg 30": (lambda p: decode(encode(p, "jpeg", quality=30)), 15),
    "webp 50": (lambda p: decode(encode(p, "webp", quality=50)), 15),
    "half the size": (lambda p: p.resize((p.width // 2, p.height // 2)), 15),
    "a quarter of the size": (lambda p: p.resize((p.width // 4, p.height // 4)), 15),
    "twice the size": (lambda p: p.resize((p.width * 2, p.height * 2)), 15),
    "grey": (lambda p: p.convert("L"), 1),
    "less contrast": (lambda p: ImageEnhance.Contrast(p).enhance(0.7), 9),
    "darker": (lambda p: ImageEnhance.Brightness(p).enhance(0.8), 9),
    "blurred": (lambda p: p.filter(ImageFilter.GaussianBlur(2)), 15),
    "one percent cut off": (lambda p: p.crop((3, 2, p.width - 3, p.height - 2)), 27),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_stays_near(change):
    apply, limit = CHANGES[change]
    assert max(distance(hashed(p), hashed(apply(p))) for p in map(photo, range(20))) <= limit


def test_different_pictures_are_far_apart():
    hashes = [hashed(photo(seed)) for seed in range(60)]
    assert min(distance(a, b) for n, a in enumerate(hashes) for b in hashes[:n]) >= 50


def test_a_symmetric_drawing_stays_near_its_copy():
    """Half of its frequencies are zero; a sign bit of each would be drawn by lot."""
    drawing = Image.new("RGB", (200, 200), "white")
    draw = ImageDraw.Draw(drawing)
    draw.ellipse((20, 20, 180, 180), fill="yellow", outline="black", width=6)
    draw.ellipse((60, 70, 80, 90), fill="black")
    draw.ellipse((120, 70, 140, 90), fill="black")
    draw.arc((60, 90, 140, 150), 0, 180, fill="black", width=6)
    copy = decode(encode(drawing, "jpeg", quality=40))
    assert distance(hashed(drawing), hashed(copy)) <= 8


def test_the_hash_is_that_of_the_plain_formula():
    """128 lowest frequencies of the DCT-II; two bits each; band b of 16 bits holds frequencies b, b + 16, …"""
    picture = photo(3, (64, 64)).convert("L")
    pixels = [[picture.getpixel((x, y)) for x in range(64)] for y in range(64)]
    cosine = [[math.cos(math.pi * (2 * x + 1) * f / 128) for x in range(64)] for f in range(16)]
    scale = [math.sqrt(1 / 2)] + [1.0] * 15
    lines = [[sum(p * c for p, c in zip(row, cosine[v], strict=True)) for v in range(16)] for row in pixels]
    places = sorted((u * u + v * v, u, v) for u in range(16) for v in range(16))[1:129]
    values = [
        scale[u] * scale[v] * sum(lines[y][v] * cosine[u][y] for y in range(64)) for _, u, v in places
    ]  # fmt: skip
    threshold = statistics.median(abs(value) for value in values)
    bits = ""
    for band in range(16):
        for value in values[band::16]:
            bits += f"{value > threshold:d}{value < -threshold:d}"
    expected = int(bits, 2).to_bytes(32)
    assert distance(hashed(picture), expected) <= 2  # the matrix is rounded to whole numbers
    assert bits.count("1") == 64


def test_every_machine_computes_the_same_bits():
    picture = Image.new("L", (64, 64))
    picture.putdata([(x * x * 7 + y * y * y * 3 + x * y * 5) // 16 % 256 for y in range(64) for x in range(64)])
    assert hashed(picture).hex() == "5011544051a05000518156405000560251804200520044955980400645805812"


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("RGB", (90, 70), "white"),
        Image.new("RGB", (8, 8), "red"),
        Image.linear_gradient("L"),
        Image.linear_gradient("L").rotate(90),
        Image.radial_gradient("L"),
        Image.linear_gradient("L").point(lambda value: 255 if value > 120 else 0),
        Image.effect_noise((640, 480), 3),
    ],
    ids=["white", "red", "gradient", "turned gradient", "radial gradient", "one edge", "faint noise"],
)
def test_a_picture_that_says_nothing_has_no_hash(picture):
    assert perceptual_hash(picture) is None


@pytest.mark.parametrize("size", [(8, 8), (8, 300), (63, 64), (5000, 9), (1, 1)])
def test_every_size_is_hashed_or_refused(size):
    found = perceptual_hash(photo(1, size))
    assert found is None or len(found) == 32


def test_near_hashes_share_a_band():
    """What the search of near duplicates stands on: 15 flips cannot touch all 16 pairs of bytes."""
    rng = random.Random(0)
    for seed in range(20):
        a = hashed(photo(seed))
        flips = sum(1 << bit for bit in rng.sample(range(256), 15))
        b = (int.from_bytes(a) ^ flips).to_bytes(32)
        assert distance(a, b) == 15
        assert any(a[at : at + 2] == b[at : at + 2] for at in range(0, 32, 2))
