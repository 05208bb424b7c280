"""facebookresearch/mae: our own names, as the encoder alone (what is released) or with the decoder.

| tensor | shape |
|---|---|
| cls_token, pos_embed, patch_embed.proj.*, blocks.i.*, norm.* | recipes §11.2 |
| decoder_embed.weight / .bias | (E, D) / (E) |
| mask_token | (1, 1, E) |
| decoder_pos_embed | (1, N+1, E), fixed as pos_embed is |
| decoder_blocks.i.*, decoder_norm.* | as blocks and norm, of width E |
| decoder_pred.weight / .bias | (3pp, E) / (3pp) |
"""

from collections.abc import Collection, Mapping

from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.interop.converted import Converted, check
from maws.interop.sizes import decoder_size, trunk_size

WRAPPER = "model"
TRUNK = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight")


def detect(keys: Collection[str]) -> bool:
    """Encoder names, and of others only a decoder's."""
    return all(name in keys for name in TRUNK) and not any(name.startswith(("head.", "predictor.")) for name in keys)


def to_ours(tensors: Mapping[str, Tensor], heads: int = 0) -> Converted:
    weights = dict(tensors)
    shape, side = trunk_size(weights, heads)
    decoder = None
    if "decoder_embed.weight" in weights:
        decoder = decoder_size(weights, shape, (side // shape.patch) ** 2)
    check(weights, shape, side, decoder)
    return Converted("mae", shape, side, weights, decoder)


def from_ours(converted: Converted) -> dict[str, Tensor]:
    if converted.heads:
        raise CheckpointError(f"MAE's files have no place for {', '.join(converted.heads)}; write a layout that has")
    if converted.decoder is not None and converted.decoder.reduction != "none":
        raise CheckpointError("MAE's decoder is not reduced; write it as long_seq_mae")
    return dict(converted.weights)
