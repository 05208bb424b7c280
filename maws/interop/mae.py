"""facebookresearch/mae: our own names, as the encoder alone (what is released), with the decoder, or as a classifier.

| tensor | shape |
|---|---|
| cls_token, pos_embed, patch_embed.proj.*, blocks.i.*, norm.* | recipes §11.2 |
| decoder_embed.weight / .bias | (E, D) / (E) |
| mask_token | (1, 1, E) |
| decoder_pos_embed | (1, N+1, E), fixed as pos_embed is |
| decoder_blocks.i.*, decoder_norm.* | as blocks and norm, of width E |
| decoder_pred.weight / .bias | (3pp, E) / (3pp) |
| fc_norm.weight / .bias, of finetuned models | (D): ours is norm.*, of a tower whose pool is mean_norm |
| head.weight / .bias, of the same | (S, D) / (S): the same |

Finetuned files of naver-ai/lut (LC-MAE) are MAE's.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.data.transforms import Preprocess
from maws.interop.converted import Converted, check, check_head
from maws.interop.sizes import decoder_size, trunk_size

WRAPPER = "model"
TRUNK = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight")
HEAD = ("head.weight", "head.bias")
MARGIN = 224 / 256  # of what its evaluation resizes to, up to 224 pixels (recipes §9.4)


def detect(keys: Collection[str]) -> bool:
    """Encoder names, and of others only a decoder's; or a classifier with `fc_norm`."""
    others = ("predictor.",) if "fc_norm.weight" in keys else ("head.", "predictor.")
    return all(name in keys for name in TRUNK) and not any(name.startswith(others) for name in keys)


def to_ours(tensors: Mapping[str, Tensor], heads: int = 0) -> Converted:
    head = {name: tensors[name] for name in HEAD if name in tensors}
    weights = {own_norm(name): value for name, value in tensors.items() if name not in head}
    shape, side = trunk_size(weights, heads)
    if "fc_norm.weight" in tensors:
        shape = replace(shape, pool="mean_norm")
    decoder = None
    if "decoder_embed.weight" in weights:
        decoder = decoder_size(weights, shape, (side // shape.patch) ** 2)
    check(weights, shape, side, decoder)
    check_head(head, shape.width)
    preprocess = Preprocess(side, resize=int(side / MARGIN)) if head and side <= 224 else None
    return Converted("mae", shape, side, weights, decoder, head, preprocess=preprocess)


def own_norm(name: str) -> str:
    """Our name of a tensor: the norm of the pooled tokens is the tower's last one, as that of all tokens is."""
    return name.removeprefix("fc_") if name.startswith("fc_norm.") else name


def from_ours(converted: Converted) -> dict[str, Tensor]:
    if converted.shape.pool == "mean_norm" and converted.heads.keys() <= set(HEAD):
        names = {name: f"fc_{name}" if name.startswith("norm.") else name for name in converted.weights}
        return {names[name]: value for name, value in converted.weights.items()} | converted.heads
    if converted.heads:
        raise CheckpointError(f"MAE's files have no place for {', '.join(converted.heads)}; write a layout that has")
    if converted.decoder is not None and converted.decoder.reduction != "none":
        raise CheckpointError("MAE's decoder is not reduced; write it as long_seq_mae")
    return dict(converted.weights)
