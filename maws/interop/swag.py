"""Vision transformers of facebookresearch/SWAG, and the same weights under torchvision's names.

| SWAG | torchvision | ours |
|---|---|---|
| class_token (1, 1, D) | the same | cls_token |
| conv_proj.* (D, 3, p, p) | the same | patch_embed.proj.* |
| encoder.pos_embedding (1+N, 1, D) | (1, 1+N, D) | pos_embed (1, 1+N, D) |
| encoder.layers.layer_i. | encoder.layers.encoder_layer_i. | blocks.i. |
| .ln_1, .ln_2 (eps 1e-6) | the same | .norm1, .norm2 |
| .self_attention.in_proj_weight / _bias (3D, D) / (3D): q, k, v | the same | .attn.qkv.weight / .bias |
| .self_attention.out_proj | the same | .attn.proj |
| .mlp.linear_1, .mlp.linear_2 | .mlp.0, .mlp.3, of old files as SWAG | .mlp.fc1, .mlp.fc2 |
| encoder.ln | the same | norm |
| head.layers.head, .pre_logits | heads.head, .pre_logits | head.*, head.pre_logits.* |

SWAG's tables are learned and resized with align_corners=True (recipes §9.4).
"""

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.interop.converted import Converted, check, check_head
from maws.interop.sizes import trunk_size

WRAPPER = ""
OUTSIDE = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj.weight": "patch_embed.proj.weight",
    "conv_proj.bias": "patch_embed.proj.bias",
    "encoder.ln.weight": "norm.weight",
    "encoder.ln.bias": "norm.bias",
    "head.layers.head.weight": "head.weight",
    "head.layers.head.bias": "head.bias",
    "head.layers.pre_logits.weight": "head.pre_logits.weight",
    "head.layers.pre_logits.bias": "head.pre_logits.bias",
}
IN_BLOCK = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "mlp.linear_1": "mlp.fc1",
    "mlp.linear_2": "mlp.fc2",
}
TORCHVISION = (  # to SWAG's own names
    (r"encoder\.layers\.encoder_layer_(\d+)\.", r"encoder.layers.layer_\1."),
    (r"\.mlp\.0\.", ".mlp.linear_1."),
    (r"\.mlp\.3\.", ".mlp.linear_2."),
    (r"^heads\.", "head.layers."),
)


def detect(keys: Collection[str]) -> bool:
    return "encoder.pos_embedding" in keys and "conv_proj.weight" in keys


def to_ours(tensors: Mapping[str, Tensor], heads: int = 0) -> Converted:
    named = {_ours(name): value for name, value in tensors.items()}
    if len(named) < len(tensors):
        raise CheckpointError("some weights are there twice, under SWAG's and under torchvision's names")
    if "pos_embed" in named and named["pos_embed"].ndim == 3 and named["pos_embed"].shape[1] == 1:
        named["pos_embed"] = named["pos_embed"].transpose(0, 1)  # tokens first, as all of SWAG's activations are
    head = {name: value for name, value in named.items() if name in OUTSIDE.values() and name.startswith("head.")}
    weights = {name: value for name, value in named.items() if name not in head}
    shape, side = trunk_size(weights, heads, positions="learned")
    check(weights, shape, side)
    last = {name: value for name, value in head.items() if "pre_logits" not in name}
    check_head(last, head["head.pre_logits.weight"].shape[0] if "head.pre_logits.weight" in head else shape.width)
    return Converted("swag", shape, side, weights, None, head)


def from_ours(converted: Converted) -> dict[str, Tensor]:
    """Under SWAG's own names."""
    if converted.decoder is not None:
        raise CheckpointError("SWAG's files hold a trunk and a head, not a decoder")
    outside, inside = ({ours: theirs for theirs, ours in names.items()} for names in (OUTSIDE, IN_BLOCK))
    tensors = {}
    for name, value in {**converted.weights, **converted.heads}.items():
        if block := re.fullmatch(r"blocks\.(\d+)\.(norm\d|attn\.qkv\.|attn\.proj|mlp\.fc\d)(.*)", name):
            theirs = f"encoder.layers.layer_{block[1]}.{inside[block[2]]}{block[3]}"
        elif name in outside:
            theirs = outside[name]
        else:
            raise CheckpointError(f"SWAG's files have no place for {name}")
        tensors[theirs] = value.transpose(0, 1) if name == "pos_embed" else value
    return tensors


def _ours(name: str) -> str:
    """A name that is not in the tables is kept: it will be named as unknown."""
    for pattern, replacement in TORCHVISION:
        name = re.sub(pattern, replacement, name)
    block = re.fullmatch(r"encoder\.layers\.layer_(\d+)\.(.+)", name)
    if block is None:
        return OUTSIDE.get(name, name)
    theirs = next((theirs for theirs in IN_BLOCK if block[2].startswith(theirs)), "")
    return f"blocks.{block[1]}.{IN_BLOCK[theirs]}{block[2].removeprefix(theirs)}" if theirs else name
