"""Photographs: resized by torch, in a third of Pillow's time; everything else of a picture is as for drawings.

    JPEG ─decode─▶ picture, format "JPEG" ─crop─▶ region ─torch, antialiased bicubic─▶ uint8 3 size size

torch computes with the same filter as Pillow, on integers, and gives the same bits with AVX2 and without. It is as near
to the exact result as Pillow (tests/maws/test_photo.py): both round after each axis. Like torchvision's
RandomResizedCrop it sees the region alone, where Pillow's `box` also looks at the pixels beside it.
Drawings (PNG, WebP) are resized by Pillow, as they always were.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.images import decode

JPEG = "JPEG"
START = b"\xff\xd8\xff"

Box = tuple[int, int, int, int]


def read(data: bytes) -> Image.Image:
    """As `decode`, and a photograph says that it is one. Raises BadImage."""
    image = decode(data)
    if data.startswith(START):
        image.format = JPEG
    return image


def is_photo(image: Image.Image) -> bool:
    return image.format == JPEG


def resized(image: Image.Image, box: Box, size: int, mirror: bool) -> Tensor:
    """A region of an RGB picture at size x size: uint8 3 size size, channels last in memory."""
    region = torch.from_numpy(np.array(image.crop(box)))  # H W 3
    # With these very strides torch takes its fast way: of a single picture it otherwise cannot tell the layout.
    out = torch.ops.aten._upsample_bicubic2d_aa(region[None].permute(0, 3, 1, 2), [size, size], False, None, None)
    return (out.flip(3) if mirror else out)[0]
