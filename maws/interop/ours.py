"""A release of ours as what the layouts write: the way out to the official codes.

write_foreign("clip.pth", from_release(open_release("runs/lit")), "maws_clip")
"""

import re

from maws.interop.converted import Converted, ConvertedClip, check, check_clip
from maws.models.mae import DecoderShape
from maws.models.text import TextShape
from maws.release import ENCODER, Release, read_weights

DECODER = r"(decoder_\w+|mask_token)(\..*)?"  # the names of MAE's decoder
LINEAR = {"head.0.weight": "head.weight", "head.0.bias": "head.bias"}  # of wsp runs, whose heads are sequences


def from_release(release: Release) -> Converted | ConvertedClip:
    """Its weights in memory. Raises CheckpointError when they are damaged or not what its config.json says."""
    config, weights, side = release.config, read_weights(release), release.config["image_size"]
    if release.stage == "lit":
        text, width = TextShape(**config["text"]), config["joint_width"]
        check_clip(weights, release.shape, side, text, width)
        return ConvertedClip("ours", release.shape, side, text, width, weights, preprocess=release.preprocess)
    decoder = DecoderShape(**config["decoder"]) if "decoder" in config else None
    own = rf"{ENCODER}|{DECODER}" if decoder else ENCODER
    trunk = {name: value for name, value in weights.items() if re.fullmatch(own, name)}
    check(trunk, release.shape, side, decoder)
    heads = {name: value for name, value in weights.items() if name not in trunk}
    if heads.keys() == LINEAR.keys():
        heads = {LINEAR[name]: value for name, value in heads.items()}
    return Converted("ours", release.shape, side, trunk, decoder, heads, preprocess=release.preprocess)
