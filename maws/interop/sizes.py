"""Sizes of a model from the shapes of its tensors, under our names.

Letters: N patches, C class tokens, D width, E decoder width, g patches along a side.
"""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.models.mae import DecoderShape
from maws.models.vit import VARIANTS, Shape

MAE_DECODER = DecoderShape()


def trunk_size(tensors: Mapping[str, Tensor], heads: int = 0, positions: str = "sincos") -> tuple[Shape, int]:
    """Sizes of a trunk and the side of its images in pixels. `heads`: 0 takes those of the variant of this width.

    Raises CheckpointError for a width without known heads, and a position table that is not of a square of patches.
    """
    patches, table = _tensor(tensors, "patch_embed.proj.weight", 4), _tensor(tensors, "pos_embed", 3)
    width, patch, depth = patches.shape[0], patches.shape[-1], count(tensors, "blocks.")
    tokens = _tensor(tensors, "cls_token", 3).shape[1] if "cls_token" in tensors else 0
    n = table.shape[1] - tokens
    side = math.isqrt(max(n, 0))
    seen = f"width {width}, {depth} blocks, patch {patch}, {n} positions and {tokens} class token(s)"
    if not width or not patch:
        raise CheckpointError(f"{seen}: patch_embed.proj.weight is empty, it has the shape {tuple(patches.shape)}")
    if side * side != n or not n:
        raise CheckpointError(f"{seen}: positions of {n} patches are not those of a square image")
    heads = heads or heads_of(width, seen)
    if width % heads:
        raise CheckpointError(f"{seen}: {heads} heads do not divide the width; give a number of heads that does")
    return Shape(patch, depth, width, heads, side * patch, tokens, positions), side * patch


def heads_of(width: int, seen: str) -> int:
    known = {shape.width: shape.heads for shape in VARIANTS.values()}
    if width not in known:
        raise CheckpointError(
            f"{seen}: no known model has this width (known: {', '.join(map(str, sorted(known)))}), and the number of "
            f"attention heads cannot be read from tensors; give heads"
        )
    return known[width]


def decoder_size(tensors: Mapping[str, Tensor], encoder: Shape, patches: int) -> DecoderShape:
    """Sizes of MAE's decoder beside an encoder of `patches`: heads by the rules of recipes §1.4.

    Raises CheckpointError for a width that neither MAE's rule (512: 16 heads) nor that of long-sequence MAE (half the
    encoder's: as many heads as it has) covers.
    """
    width, depth = _tensor(tensors, "decoder_embed.weight", 2).shape[0], count(tensors, "decoder_blocks.")
    if width == MAE_DECODER.width:
        heads = MAE_DECODER.heads
    elif 2 * width == encoder.width:
        heads = encoder.heads
    else:
        raise CheckpointError(
            f"a decoder of width {width} beside an encoder of width {encoder.width}: its heads are known for width "
            f"{MAE_DECODER.width} ({MAE_DECODER.heads}) and {encoder.width // 2} ({encoder.heads}) only"
        )
    places = _tensor(tensors, "decoder_pos_embed", 3).shape[1] - encoder.class_tokens
    learned = "decoder_reduce.weight" in tensors
    reduction = "conv" if learned else "average" if 4 * places == patches else "none"
    return DecoderShape(width, depth, heads, reduction, restore="decoder_restore.weight" in tensors)


def count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Blocks, by the largest number after the prefix: a missing one in between is found when names are compared.

    Raises CheckpointError for a number that so few tensors cannot lead up to.
    """
    numbers = (re.match(re.escape(prefix) + r"(\d{1,9})\.", name) for name in tensors)
    last = max((int(found[1]) for found in numbers if found), default=-1)
    if last >= len(tensors):
        raise CheckpointError(
            f"there is a {prefix}{last}, and {len(tensors)} tensors in all: those before it are missing"
        )
    return 1 + last


def _tensor(tensors: Mapping[str, Tensor], name: str, axes: int) -> Tensor:
    """Raises CheckpointError when the tensor is missing or has another number of axes."""
    if name not in tensors:
        raise CheckpointError(f"there is no {name}, which says how large the model is")
    if tensors[name].ndim != axes:
        raise CheckpointError(f"{name} has the shape {tuple(tensors[name].shape)}, expected {axes} axes")
    return tensors[name]
