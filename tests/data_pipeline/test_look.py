"""The second look: the same at every size, another for other colours and other details."""

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipeline.dedup import looks_apart
from data_pipeline.look import SIZE, look
from data_pipeline.phash import distance, perceptual_hash
from data_pipeline.steps.duplicates import NEAR_LOOK


def apart(a: Image.Image, b: Image.Image) -> int:
    return int(looks_apart(*(np.frombuffer(look(image), np.uint8) for image in (a, b))))


def shapes(seed: int, side: int = 240) -> Image.Image:
    """Hard edges of all colours."""
    draw = random.Random(seed)
    image = Image.new("RGB", (side, side), "white")
    for _ in range(25):
        x, y = draw.randint(0, side), draw.randint(0, side)
        box = (x, y, x + draw.randint(10, 90), y + draw.randint(10, 90))
        ImageDraw.Draw(image).ellipse(box, fill=tuple(draw.randbytes(3)))
    return image


def face(mouth: str, fill: str = "gold", side: int = 128) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((4, 4, 124, 124), fill=fill)
    for x in (40, 80):
        draw.ellipse((x, 38, x + 10, 56), fill="black")
    box, angles = ((36, 50, 92, 100), (30, 150)) if mouth == "smile" else ((36, 84, 92, 134), (210, 330))
    draw.arc(box, *angles, fill="black", width=7)
    return image


@pytest.mark.parametrize("side", [61, 97, 121, 150, 239, 333, 480])
def test_a_picture_looks_the_same_at_every_size(side):
    for seed in range(6):
        small = shapes(seed).resize((side, side), Image.Resampling.BICUBIC)
        assert apart(shapes(seed), small) <= NEAR_LOOK


def test_a_picture_looks_the_same_when_it_is_saved_again():
    for seed in range(6):
        buffer = io.BytesIO()
        shapes(seed).save(buffer, "jpeg", quality=60)
        assert apart(shapes(seed), Image.open(buffer)) <= NEAR_LOOK / 2


def test_what_the_hash_cannot_tell_apart_the_look_can():
    smile, frown, pink = face("smile"), face("frown"), face("smile", "lightpink")
    hashes = [perceptual_hash(image) for image in (smile, frown, pink)]
    assert all(found is not None for found in hashes)
    assert distance(hashes[0], hashes[2]) <= 14  # to the hash, which knows brightness only, one drawing
    assert apart(smile, pink) > 3 * NEAR_LOOK
    assert apart(smile, frown) > 3 * NEAR_LOOK


def test_grey_pictures_and_tiny_ones_have_a_look():
    for image in (Image.new("L", (200, 100), 7), Image.new("RGB", (8, 9), (7, 7, 7))):
        assert set(look(image)) == {7}
        assert len(look(image)) == SIZE
