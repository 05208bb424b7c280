"""The views of probes: their distribution, and what they are a function of."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.errors import UsageError
from eval.augment import byol_box, byol_crop, random_crop, resized_crop
from maws.data.transforms import crop_box
from maws.seeding import stream

N = 3000


def brute_force(width: int, height: int, n: int) -> list[tuple[float, float]]:
    """Area and aspect of BYOL's crop, drawn with another generator."""
    draw = random.Random(7)
    found = []
    for _ in range(n):
        area, aspect = draw.uniform(0.08, 1) * width * height, math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = min(width, round(math.sqrt(area * aspect))), min(height, round(math.sqrt(area / aspect)))
        found.append((w * h / (width * height), w / h))
    return found


@pytest.mark.parametrize(("width", "height"), [(400, 400), (600, 200), (90, 350)])
def test_area_and_aspect_of_the_byol_crop_have_the_quantiles_of_a_brute_force_draw(width, height):
    rng = np.random.default_rng(0)
    boxes = np.array([byol_box(width, height, rng) for _ in range(N)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= width).all() and (bottom <= height).all()
    w, h = right - left, bottom - top
    expected = np.array(brute_force(width, height, N))
    share = np.linspace(0.02, 0.98, 25)
    for ours, theirs in ((w * h / (width * height), expected[:, 0]), (w / h, expected[:, 1])):
        np.testing.assert_allclose(np.quantile(ours, share), np.quantile(theirs, share), rtol=0.08, atol=0.015)
    clipped = ((w == width) | (h == height)).mean()
    assert clipped == pytest.approx(np.mean([_clips(width, height, a, r) for a, r in expected]), abs=0.03)


def _clips(width: int, height: int, area: float, aspect: float) -> bool:
    h = math.sqrt(area * width * height / aspect)
    return round(h) == height or round(h * aspect) == width


def test_the_byol_crop_lies_anywhere_in_the_picture_with_equal_chance():
    rng = np.random.default_rng(1)
    boxes = np.array([byol_box(300, 500, rng) for _ in range(N)])
    room = 500 - (boxes[:, 3] - boxes[:, 1])
    place = boxes[:, 1][room > 20] / room[room > 20]
    np.testing.assert_allclose(np.quantile(place, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)


def test_a_picture_of_one_pixel_can_be_cut():
    assert byol_box(1, 1, np.random.default_rng(0)) == (0, 0, 1, 1)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    return Image.fromarray(pixels)


MAKERS = [byol_crop, resized_crop, lambda seed, epoch, size: random_crop(seed, epoch, size, 20)]


@pytest.mark.parametrize("make", MAKERS, ids=["byol", "resized", "random"])
def test_a_view_is_a_function_of_seed_epoch_and_position_alone(photo, make):
    view = make(3, 5, 16)
    first = [view(photo, position) for position in (4, 9)]
    assert first[0].shape == (3, 16, 16) and first[0].dtype == torch.uint8
    assert make(3, 5, 16)(photo, 9).equal(first[1])  # not of what was seen before
    others = [make(4, 5, 16)(photo, 9), make(3, 6, 16)(photo, 9), first[0]]
    assert not any(first[1].equal(other) for other in others)


@pytest.mark.parametrize("flip", [True, False])
def test_half_of_the_views_are_mirrored(flip):
    ramp = Image.fromarray(np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None] * 7, (32, 32, 3)).copy())
    views = [byol_crop(0, 0, 8, flip=flip)(ramp, position) for position in range(200)]
    mirrored = np.mean([int(view[0, 4, 0]) > int(view[0, 4, -1]) for view in views])
    assert mirrored == pytest.approx(0.5 if flip else 0, abs=0.11)


def test_a_resized_crop_is_cut_before_it_is_resized():
    """Pixels beyond the box have no part in the view: a bright frame does not shine in."""
    view = resized_crop(0, 0, 16, scale=(0.1, 0.1), flip=False)
    left, top, right, bottom = crop_box(64, 64, (0.1, 0.1), stream(0, "view", 0, 3))
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[top:bottom, left:right] = 0
    assert not view(Image.fromarray(pixels), 3).any()
    assert view(Image.fromarray(pixels), 4).any()


def test_a_random_crop_shows_the_picture_at_the_size_it_was_resized_to(photo):
    full = np.asarray(photo.resize((30, 20), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    for position in range(5):
        shown = random_crop(0, 0, 16, 20, flip=False)(photo, position).numpy()
        places = [(y, x) for y in range(5) for x in range(15) if (full[:, y : y + 16, x : x + 16] == shown).all()]
        assert len(places) == 1


def test_a_crop_larger_than_the_picture_is_refused():
    with pytest.raises(UsageError, match="short side of 200; resize to at least 224"):
        random_crop(0, 0, 224, 200)
