"""Names and shapes of the tensors in official weight files, written out from recipes §11.2, §3.3, §4.3 and the codes.

Letters: D width, E decoder width, N patches, p patch side.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, Tensor]

ATTO = {"d": 32, "depth": 2, "p": 8, "n": 16}  # the size of VARIANTS["atto"], 2 heads
B16 = {"d": 768, "depth": 12, "p": 16, "n": 196}
EVERY = {  # width, depth, patch, patches at 224 px (recipes §1.1)
    "vit_b16": B16,
    "vit_l16": {"d": 1024, "depth": 24, "p": 16, "n": 196},
    "vit_h14": {"d": 1280, "depth": 32, "p": 14, "n": 256},
    "vit_2b14": {"d": 2560, "depth": 24, "p": 14, "n": 256},
    "vit_6.5b14": {"d": 4096, "depth": 32, "p": 14, "n": 256},
    "vit_s16": {"d": 384, "depth": 12, "p": 16, "n": 196},
}


def block_shapes(prefix: str, d: int) -> Shapes:
    """Recipes §11.2."""
    return {
        f"{prefix}norm1.weight": (d,), f"{prefix}norm1.bias": (d,),
        f"{prefix}attn.qkv.weight": (3 * d, d), f"{prefix}attn.qkv.bias": (3 * d,),
        f"{prefix}attn.proj.weight": (d, d), f"{prefix}attn.proj.bias": (d,),
        f"{prefix}norm2.weight": (d,), f"{prefix}norm2.bias": (d,),
        f"{prefix}mlp.fc1.weight": (4 * d, d), f"{prefix}mlp.fc1.bias": (4 * d,),
        f"{prefix}mlp.fc2.weight": (d, 4 * d), f"{prefix}mlp.fc2.bias": (d,),
    }  # fmt: skip


def maws_shapes(d: int, depth: int, p: int, n: int, classes: int = 0) -> Shapes:
    shapes = {
        "cls_token": (1, 1, d), "pos_embed": (1, n + 1, d),
        "patch_embed.proj.weight": (d, 3, p, p), "patch_embed.proj.bias": (d,),
    }  # fmt: skip
    for i in range(depth):
        shapes |= block_shapes(f"blocks.{i}.", d)
    shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
    return shapes | ({"head.weight": (classes, d), "head.bias": (classes,)} if classes else {})


def mae_shapes(d: int, depth: int, p: int, n: int, e: int = 512, deep: int = 8) -> Shapes:
    """The repository's whole model; E 512 for every encoder (recipes §1.4)."""
    shapes = maws_shapes(d, depth, p, n) | {
        "decoder_embed.weight": (e, d), "decoder_embed.bias": (e,), "mask_token": (1, 1, e),
        "decoder_pos_embed": (1, n + 1, e), "decoder_norm.weight": (e,), "decoder_norm.bias": (e,),
        "decoder_pred.weight": (3 * p * p, e), "decoder_pred.bias": (3 * p * p,),
    }  # fmt: skip
    for i in range(deep):
        shapes |= block_shapes(f"decoder_blocks.{i}.", e)
    return shapes


def long_shapes(d: int, depth: int, p: int, n: int, deep: int = 8, up: bool = False, split: bool = False) -> Shapes:
    """A decoder of half the width behind a 2 x 2 convolution; `split`: no bias of the keys."""
    e = d // 2
    shapes = mae_shapes(d, depth, p, n, e, deep) | {
        "decoder_downsample.weight": (e, e, 2, 2), "decoder_downsample.bias": (e,),
        "decoder_pos_embed": (1, n // 4 + 1, e),
    }  # fmt: skip
    if up:
        shapes |= {"decoder_upsample.weight": (e, e, 2, 2), "decoder_upsample.bias": (e,)}
    else:
        shapes |= {"decoder_pred.weight": (12 * p * p, e), "decoder_pred.bias": (12 * p * p,)}
    if split:
        for name in [name for name in shapes if name.endswith("attn.qkv.bias")]:
            width = shapes.pop(name)[0] // 3
            shapes |= {name.replace("qkv.bias", "q_bias"): (width,), name.replace("qkv.bias", "v_bias"): (width,)}
    return shapes


def lut_shapes(d: int, depth: int, p: int, n: int, hidden: int = 4096, e: int = 512, deep: int = 8) -> Shapes:
    shapes = mae_shapes(d, depth, p, n, e, deep)
    for head in ("head", "predictor"):
        shapes |= {
            f"{head}.0.weight": (hidden, d),
            f"{head}.3.weight": (d, hidden),
            f"{head}.1.num_batches_tracked": (),
        }
        shapes |= {f"{head}.1.{name}": (hidden,) for name in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def swag_shapes(d: int, depth: int, p: int, n: int, classes: int = 0) -> Shapes:
    shapes: Shapes = {
        "class_token": (1, 1, d), "conv_proj.weight": (d, 3, p, p), "conv_proj.bias": (d,),
        "encoder.pos_embedding": (n + 1, 1, d), "encoder.ln.weight": (d,), "encoder.ln.bias": (d,),
    }  # fmt: skip
    for i in range(depth):
        at = f"encoder.layers.layer_{i}."
        shapes |= {
            f"{at}ln_1.weight": (d,), f"{at}ln_1.bias": (d,), f"{at}ln_2.weight": (d,), f"{at}ln_2.bias": (d,),
            f"{at}self_attention.in_proj_weight": (3 * d, d), f"{at}self_attention.in_proj_bias": (3 * d,),
            f"{at}self_attention.out_proj.weight": (d, d), f"{at}self_attention.out_proj.bias": (d,),
            f"{at}mlp.linear_1.weight": (4 * d, d), f"{at}mlp.linear_1.bias": (4 * d,),
            f"{at}mlp.linear_2.weight": (d, 4 * d), f"{at}mlp.linear_2.bias": (d,),
        }  # fmt: skip
    return shapes | ({"head.layers.head.weight": (classes, d), "head.layers.head.bias": (classes,)} if classes else {})


def clip_shapes(d: int, depth: int, p: int, n: int, e: int, dt: int, layers: int, v: int, positions: int) -> Shapes:
    """maws_clip, recipes §11.3 and §11.5 with the newer names; Dt text width, V ids."""
    at = "text_encoder.encoder.transformer."
    shapes: Shapes = {"logit_scale": (), "vision_projection": (d, e), "text_projection": (dt, e)}
    shapes |= {f"vision_encoder.{name}": size for name, size in maws_shapes(d, depth, p, n).items()}
    shapes |= {
        f"{at}token_embedding.weight": (v, dt), f"{at}positional_embedding.embedding.weight": (positions, dt),
        f"{at}embedding_layer_norm.weight": (dt,), f"{at}embedding_layer_norm.bias": (dt,),
    }  # fmt: skip
    for i in range(layers):
        layer = f"{at}layers.layers.{i}."
        shapes |= {
            f"{layer}self_attn.in_proj_weight": (3 * dt, dt), f"{layer}self_attn.in_proj_bias": (3 * dt,),
            f"{layer}self_attn.out_proj.weight": (dt, dt), f"{layer}self_attn.out_proj.bias": (dt,),
            f"{layer}linear1.weight": (4 * dt, dt), f"{layer}linear1.bias": (4 * dt,),
            f"{layer}linear2.weight": (dt, 4 * dt), f"{layer}linear2.bias": (dt,),
            f"{layer}norm1.weight": (dt,), f"{layer}norm1.bias": (dt,),
            f"{layer}norm2.weight": (dt,), f"{layer}norm2.bias": (dt,),
        }  # fmt: skip
    return shapes


def older_text_names(tensors: Tensors) -> Tensors:
    """As the older maws_clip files call the same tensors (recipes §11.5)."""
    for new, old in (
        ("layers.layers.", "layers."), ("self_attn.in_proj_", "attention.input_projection."),
        ("self_attn.out_proj", "attention.output_projection"), ("linear1", "residual_mlp.mlp.0"),
        ("linear2", "residual_mlp.mlp.3"), (".norm1.", ".attention_layer_norm."), (".norm2.", ".final_layer_norm."),
    ):  # fmt: skip
        text = "text_encoder."
        tensors = {n.replace(new, old) if n.startswith(text) else n: value for n, value in tensors.items()}
    return tensors


OFFICIAL: dict[str, Callable[..., Shapes]] = {
    "mae": mae_shapes, "long_seq_mae": long_shapes, "lut": lut_shapes, "maws": maws_shapes, "swag": swag_shapes,
}  # fmt: skip


def drawn(shapes: Shapes, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensors:
    """Random tensors; running variances are positive, as they must be."""
    g = torch.Generator().manual_seed(seed)
    values = {name: (torch.randn(size, generator=g) * 0.3).to(dtype) for name, size in shapes.items()}
    return values | {n: v.abs() + 0.5 for n, v in values.items() if n.endswith("running_var")}


def small(layout: str) -> Tensors:
    """A model of atto's size under the names of a layout; the decoder as the rule of long-sequence MAE has it."""
    more = {"mae": {"e": 16, "deep": 1}, "long_seq_mae": {"deep": 1}, "lut": {"e": 16, "deep": 1, "hidden": 20}}
    return drawn(OFFICIAL[layout](**ATTO, **more.get(layout, {})))
