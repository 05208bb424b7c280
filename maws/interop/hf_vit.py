"""Our image tower under the names of transformers' ViTModel, and with MAE's decoder of ViTMAEForPreTraining.

| ours | theirs |
|---|---|
| cls_token, pos_embed | embeddings.cls_token, embeddings.position_embeddings |
| patch_embed.proj.* | embeddings.patch_embeddings.projection.* |
| blocks.i.norm1.*, norm2.* | encoder.layer.i.layernorm_before.*, layernorm_after.* |
| blocks.i.attn.qkv.* (3D) | encoder.layer.i.attention.attention.query.*, key.*, value.* (D each) |
| blocks.i.attn.proj.* | encoder.layer.i.attention.output.dense.* |
| blocks.i.mlp.fc1.*, fc2.* | encoder.layer.i.intermediate.dense.*, output.dense.* |
| norm.* | layernorm.* |
| decoder_blocks.i.*, other decoder_*, mask_token | decoder.decoder_layers.i.* as above, decoder.* |

These are the names of the files on the hub, which every release of transformers reads, whatever it calls its modules.
"""

import re
from collections.abc import Mapping
from typing import Any

from maws.interop.outgoing import Made, same, third
from maws.models.mae import DecoderShape
from maws.models.vit import Shape
from maws.weight_files import WeightFiles

EPS = 1e-6  # of every norm, recipes §1.2
OUTSIDE = {
    "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.", "norm.": "layernorm.",
}  # fmt: skip
IN_BLOCK = {
    "norm1.": "layernorm_before.", "norm2.": "layernorm_after.", "attn.proj.": "attention.output.dense.",
    "mlp.fc1.": "intermediate.dense.", "mlp.fc2.": "output.dense.",
}  # fmt: skip
PARTS = ("query", "key", "value")


def image_tensors(files: WeightFiles, names: Mapping[str, str], prefix: str = "") -> dict[str, Made]:
    """The image tower behind `prefix`; `names` are ours -> those in the file."""
    made: dict[str, Made] = {}
    for name, stored in names.items():
        if block := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            made |= _block(files, stored, f"{prefix}encoder.layer.{block[1]}.", block[2])
        else:
            ours = next(ours for ours in OUTSIDE if name.startswith(ours))
            made[prefix + OUTSIDE[ours] + name.removeprefix(ours)] = same(files, stored)
    return made


def decoder_tensors(files: WeightFiles) -> dict[str, Made]:
    """MAE's decoder and mask token, of a release whose decoder is a plain one."""
    made: dict[str, Made] = {}
    for name in files.names:
        if block := re.fullmatch(r"decoder_blocks\.(\d+)\.(.+)", name):
            made |= _block(files, name, f"decoder.decoder_layers.{block[1]}.", block[2])
        elif name.startswith("decoder_") or name == "mask_token":
            made[f"decoder.{name}"] = same(files, name)
    return made


def _block(files: WeightFiles, stored: str, prefix: str, rest: str) -> dict[str, Made]:
    if rest.startswith("attn.qkv."):
        kind = rest.removeprefix("attn.qkv.")
        return {f"{prefix}attention.attention.{part}.{kind}": third(files, stored, i) for i, part in enumerate(PARTS)}
    ours = next(ours for ours in IN_BLOCK if rest.startswith(ours))
    return {prefix + IN_BLOCK[ours] + rest.removeprefix(ours): same(files, stored)}


def image_config(shape: Shape, side: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of ViTModel."""
    return {
        "architectures": ["ViTModel"], "model_type": "vit", "hidden_size": shape.width,
        "num_hidden_layers": shape.depth, "num_attention_heads": shape.heads, "intermediate_size": 4 * shape.width,
        "hidden_act": "gelu", "layer_norm_eps": EPS, "qkv_bias": True, "image_size": side, "patch_size": shape.patch,
        "num_channels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "encoder_stride": shape.patch,        "dtype": dtype, "torch_dtype": dtype,
    }  # fmt: skip


def autoencoder_config(
    shape: Shape, side: int, decoder: DecoderShape, ratio: float, norm_pix: bool, dtype: str = "float32"
) -> dict[str, Any]:
    """config.json of ViTMAEForPreTraining."""
    return image_config(shape, side, dtype) | {
        "architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae", "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth, "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": 4 * decoder.width, "mask_ratio": ratio, "norm_pix_loss": norm_pix,
    }  # fmt: skip
