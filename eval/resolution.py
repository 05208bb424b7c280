"""An image tower at another resolution than it was trained at: its table of positions is interpolated (recipes §3.5).

    tower = at_size(load_image_tower(release), 448); preprocess = scaled(release.preprocess, 448)

Bicubic with align_corners false, as MAE does and as MAWS's 224 -> 518 is taken to be (recipes §9.4); SWAG's own code
has true there. Pictures are resized and cropped in the proportion of the release: 256 -> 224 becomes 512 -> 448.
"""

from dataclasses import replace

import torch
from torch import Tensor

from data_pipeline.errors import UsageError
from maws.data.transforms import Preprocess
from maws.models.pos_embed import resize_positions
from maws.models.vit import Shape, VisionTransformer

POSITIONS = "pos_embed"


def check(shape: Shape, trained: int, size: int) -> None:
    """Raises UsageError for a size that the tower cannot take; `trained` is its own, in pixels."""
    if size == trained:
        return
    if shape.positions == "relative":
        raise UsageError(
            f"--image-size {size}: this encoder has relative positions, one value for each offset between patches of "
            f"its {trained} pixels, and no rule was published for those of a larger grid; leave --image-size away"
        )
    if size < shape.patch or size % shape.patch:
        near = max(1, round(size / shape.patch)) * shape.patch
        raise UsageError(
            f"--image-size {size} is not a multiple of the encoder's patch of {shape.patch} pixels; "
            f"the nearest that is: {near}"
        )


def scaled(preprocess: Preprocess, size: int) -> Preprocess:
    """For pictures of another size, with the same share of them in the crop."""
    resize = round(preprocess.resize * size / preprocess.image_size)
    return replace(preprocess, image_size=size, resize=resize)


@torch.no_grad()
def at_size(tower: VisionTransformer, size: int) -> VisionTransformer:
    """The tower itself, or one with interpolated positions."""
    if size == tower.image_size:
        return tower
    resized = VisionTransformer(tower.shape, size, tower.options)
    weights = tower.state_dict()
    weights[POSITIONS] = positions(weights[POSITIONS], tower.shape, tower.image_size, size)
    resized.load_state_dict(weights)
    return resized.eval().requires_grad_(False)


def positions(table: Tensor, shape: Shape, trained: int, size: int) -> Tensor:
    """A table of positions, 1 C+N D, for pictures of another size."""
    old, new = trained // shape.patch, size // shape.patch
    return resize_positions(table, shape.class_tokens, (old, old), (new, new), align_corners=False)
