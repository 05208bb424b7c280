"""Photographs are resized by torch: as exactly as by Pillow, and drawings as ever."""

import hashlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.images import BadImage
from maws.data.photo import is_photo, read, resized
from maws.data.transforms import Cut, resized_crop
from maws.data.views import View


def photo(seed: int = 0, size: tuple[int, int] = (500, 375)) -> Image.Image:
    """Soft shades, hard edges and grain."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(small).astype(float) + rng.normal(0, 6, (size[1], size[0], 1))
    pixels[60:200, 90:300] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "jpeg", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exact(image: Image.Image, box: tuple, size: int) -> np.ndarray:
    """The region with Pillow's filter in floating point, rounded once: size size 3."""
    channels = [Image.fromarray(np.asarray(c, np.float32)) for c in image.crop(box).split()]
    whole = np.stack([np.asarray(c.resize((size, size), Image.Resampling.BICUBIC)) for c in channels], axis=-1)
    return np.rint(whole.clip(0, 255))


@pytest.mark.parametrize("box", [(55, 10, 437, 350), (55, 110, 237, 350), (400, 300, 500, 375), (0, 0, 500, 375)])
def test_a_photograph_is_as_near_to_the_exact_result_as_pillow_makes_it(box):
    image = photo()
    ours = resized(image, box, 224, False).permute(1, 2, 0).numpy()
    pillow = np.asarray(image.crop(box).resize((224, 224), Image.Resampling.BICUBIC))
    own, theirs = (np.abs(made - exact(image, box, 224)) for made in (ours, pillow))
    assert (own > 1).mean() < 0.01 and own.max() < 20  # beside hard edges, where the first axis overshoots and is cut
    assert own.mean() < 1.1 * theirs.mean() + 0.01
    if min(box[2] - box[0], box[3] - box[1]) > 224:
        assert np.abs(ours.astype(int) - pillow).max() <= 1


def test_a_mirrored_photograph_is_the_mirror_image_of_the_other():
    cut = resized_crop(read(encoded(photo())), (0.2, 1.0), np.random.default_rng(0))
    assert torch.equal(cut.mirrored().tensor(64), cut.tensor(64).flip(2))
    assert cut.mirrored().mirrored() == cut
    kind = Image.Resampling.LANCZOS
    assert np.array_equal(np.asarray(cut.mirrored().at(64, kind)), np.asarray(cut.at(64, kind))[:, ::-1])
    assert np.array_equal(np.asarray(cut.at(64)), cut.tensor(64).permute(1, 2, 0).numpy())


def test_drawings_are_resized_by_pillow_and_mirrored_before_it():
    image = photo()
    drawing = read(encoded(image, "png"))
    assert not is_photo(drawing) and is_photo(read(encoded(image)))
    cut = resized_crop(drawing, (0.2, 1.0), np.random.default_rng(0))
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top, right, bottom = cut.box
    boxes = ((cut, image, cut.box), (cut.mirrored(), flipped, (500 - right, top, 500 - left, bottom)))
    for made, source, box in boxes:
        wanted = source.resize((64, 64), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        assert np.array_equal(np.asarray(wanted), made.tensor(64).permute(1, 2, 0).numpy())


def test_a_region_between_pixels_is_left_to_pillow():
    image = read(encoded(photo()))
    box = (10.5, 20.0, 310.5, 300.0)
    wanted = image.resize((64, 64), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    assert np.array_equal(np.asarray(Cut(image, box).at(64)), np.asarray(wanted))


def test_turned_grey_and_damaged_photographs_are_what_decode_makes_of_them():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read(encoded(photo(), exif=exif))
    assert turned.size == (375, 500) and is_photo(turned)
    grey = read(encoded(photo().convert("L")))
    assert grey.mode == "RGB" and is_photo(grey)
    assert View()(grey, 32, np.random.default_rng(0)).shape == (3, 32, 32)
    with pytest.raises(BadImage, match="truncated"):
        read(encoded(photo())[:9000])


HASH = """
import hashlib, numpy as np, torch
from PIL import Image
from maws.data.photo import resized
torch.set_num_threads(1)
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8))
boxes = ((55, 10, 437, 350), (55, 110, 237, 350), (400, 300, 500, 375))
made = b"".join(resized(image, box, 224, mirror).contiguous().numpy().tobytes() for box in boxes for mirror in (0, 1))
print(torch.backends.cpu.get_cpu_capability(), hashlib.sha256(made).hexdigest())
"""


@pytest.mark.slow
def test_the_bits_do_not_depend_on_what_the_processor_can():
    def run(**environment: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", HASH], env=os.environ | environment, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    plain, own = run(ATEN_CPU_CAPABILITY="default"), run()
    assert plain[0] == "DEFAULT" and plain[1] == own[1]
    assert len(own[1]) == hashlib.sha256().digest_size * 2
