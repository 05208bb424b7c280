"""facebookresearch/maws: a plain state dict of a trunk, with a classifier's head when it was finetuned (recipes §11.2).

The MAE, MAWS and `_ft_in1k` files are read whole. Asked for by name, this layout takes the image tower of a `maws_clip`
file (interop/maws_clip.py) and lists the rest as dropped. Finetuned ones see whole pictures, squashed to a square of
512 or 518 pixels (recipes §11.4).
"""

from collections.abc import Collection, Mapping

from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.data.transforms import Preprocess
from maws.interop import mae
from maws.interop.converted import Converted, check, check_head
from maws.interop.sizes import trunk_size

WRAPPER = ""
IMAGE_TOWER = "vision_encoder."
FINETUNED = (512, 518)  # pixels of the released classifiers (recipes §9.4), which see whole pictures


def detect(keys: Collection[str]) -> bool:
    """Encoder names, and of others only a head's; or those behind `vision_encoder.`."""
    if any(name.startswith(IMAGE_TOWER) for name in keys):
        keys = {name.removeprefix(IMAGE_TOWER) for name in keys if name.startswith(IMAGE_TOWER)}
    others = any(name.startswith(("decoder_", "predictor.")) for name in keys)
    return all(name in keys for name in mae.TRUNK) and not others


def to_ours(tensors: Mapping[str, Tensor], heads: int = 0) -> Converted:
    dropped = dict[str, str]()
    if any(name.startswith(IMAGE_TOWER) for name in tensors):
        rest = [name for name in tensors if not name.startswith(IMAGE_TOWER)]
        dropped = dict.fromkeys(rest, "not part of the image tower")
        tensors = {n.removeprefix(IMAGE_TOWER): v for n, v in tensors.items() if n.startswith(IMAGE_TOWER)}
    head = {name: tensors[name] for name in ("head.weight", "head.bias") if name in tensors}
    weights = {name: value for name, value in tensors.items() if name not in head}
    shape, side = trunk_size(weights, heads)
    check(weights, shape, side)
    check_head(head, shape.width)
    preprocess = Preprocess(side, squash=True) if head and side in FINETUNED else None
    return Converted("maws", shape, side, weights, None, head, dropped, preprocess)


def from_ours(converted: Converted) -> dict[str, Tensor]:
    """The trunk and a head; MAWS's files never hold a decoder."""
    others = [name for name in converted.heads if name not in ("head.weight", "head.bias")]
    if converted.decoder is not None or others:
        raise CheckpointError(f"MAWS's files hold a trunk and a head, not {', '.join(others) or 'a decoder'}")
    return {**converted.weights, **converted.heads}
