"""facebookresearch/maws, type `maws_clip`: image tower, torchtext's XLM-R and both projections (recipes §11.3, §11.5).

| maws_clip | shape | ours |
|---|---|---|
| vision_encoder.* | as a file of MAWS (interop/maws.py) | image.* |
| vision_projection, text_projection | (Dv, E), (Dt, E) | the same |
| logit_scale | () | logit_scale (1,) |
| text_encoder.encoder.transformer.* | below, after this prefix | text.encoder.* |
| token_embedding.weight | (V, D) | embeddings.word_embeddings.weight |
| positional_embedding.embedding.weight | (P, D) | embeddings.position_embeddings.weight |
| none | | embeddings.token_type_embeddings.weight: (1, D), zeros |
| embedding_layer_norm.* | (D) | embeddings.LayerNorm.* |
| layers.layers.i.self_attn.in_proj_weight / _bias | (3D, D) / (3D): q, k, v | attention.self.query, .key, .value |
| .self_attn.out_proj, .norm1, .linear1, .linear2, .norm2 | | the layer's, in transformers' names (IN_LAYER) |

Older files have layers.i.attention.input_projection and so on instead (OLDER); torchtext renames them when it loads.
Of the heads no tensor tells: 64 values each, as in every published XLM-R (12 for base, 16 for large).
"""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.interop import maws
from maws.interop.converted import Converted, ConvertedClip, check_clip
from maws.interop.sizes import count
from maws.models.text import TEXT_VARIANTS, TextShape

WRAPPER = ""
IMAGE, TEXT, TOKENIZER = maws.IMAGE_TOWER, "text_encoder.encoder.transformer.", "text_tokenizer."
ALONE = ("vision_projection", "text_projection", "logit_scale")
OURS = "text.encoder."
EMBEDDINGS = {
    "token_embedding.": "embeddings.word_embeddings.",
    "positional_embedding.embedding.": "embeddings.position_embeddings.",
    "embedding_layer_norm.": "embeddings.LayerNorm.",
}
TYPES = "embeddings.token_type_embeddings.weight"
LAYER = r"layers\.layers\.(\d+)\.(.+)"
IN_LAYER = {
    "self_attn.out_proj.": "attention.output.dense.",
    "norm1.": "attention.output.LayerNorm.",
    "linear1.": "intermediate.dense.",
    "linear2.": "output.dense.",
    "norm2.": "output.LayerNorm.",
}
QKV = ("query", "key", "value")
OLDER = {  # of the older files, each after `layers.i.`; the newer ones' after `layers.layers.i.`
    "attention.input_projection.": "self_attn.in_proj_",
    "attention.output_projection.": "self_attn.out_proj.",
    "residual_mlp.mlp.0.": "linear1.",
    "residual_mlp.mlp.3.": "linear2.",
    "attention_layer_norm.": "norm1.",
    "final_layer_norm.": "norm2.",
}
HEAD_WIDTH = 64  # of XLM-R base and large
UNUSED, SPECIAL = 2, 2  # rows of the position table that no token has (counting starts at 2); <s> and </s>


def detect(keys: Collection[str]) -> bool:
    """Both towers are there, behind their prefixes."""
    return all(any(name.startswith(prefix) for name in keys) for prefix in (IMAGE, TEXT))


def to_ours(tensors: Mapping[str, Tensor], heads: int = 0) -> ConvertedClip:
    """`heads` are the image tower's."""
    image = maws.to_ours({n: v for n, v in tensors.items() if n.startswith(IMAGE)}, heads)
    if image.heads:
        raise CheckpointError(f"unknown: {', '.join(IMAGE + n for n in image.heads)}: no maws_clip file has a head")
    text = {n.removeprefix(TEXT): v for n, v in tensors.items() if n.startswith(TEXT)}
    weights = {f"image.{name}": value for name, value in image.weights.items()}
    weights |= {OURS + name: value for name, value in text_to_ours(text).items()}
    rest = {n: v for n, v in tensors.items() if not n.startswith((IMAGE, TEXT, TOKENIZER))}
    weights |= {name: value.reshape(1) if _is_scale(name, value) else value for name, value in rest.items()}
    shape = text_size(weights)
    width = weights["text_projection"].shape[-1] if "text_projection" in weights else 0
    check_clip(weights, image.shape, image.image_size, shape, width)
    dropped = {n: "the tokenizer is a file of its own" for n in tensors if n.startswith(TOKENIZER)}
    return ConvertedClip("maws_clip", image.shape, image.image_size, shape, width, weights, dropped)


def text_to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchtext's RobertaModel, of either generation of names, as transformers'; unknown names are kept as they are.

    Queries, keys and values are views of the tensor they lie in.
    """
    ours = dict[str, Tensor]()
    for name, value in tensors.items():
        layer = re.fullmatch(LAYER, newer(name))
        if layer is None:
            put = {_renamed(name, EMBEDDINGS): value}
        elif layer[2] in ("self_attn.in_proj_weight", "self_attn.in_proj_bias"):
            at, kind = f"encoder.layer.{layer[1]}.attention.self", layer[2].removeprefix("self_attn.in_proj_")
            put = {f"{at}.{part}.{kind}": third for part, third in zip(QKV, _thirds(name, value), strict=True)}
        else:
            put = {f"encoder.layer.{layer[1]}.{_renamed(layer[2], IN_LAYER)}": value}
        if twice := ours.keys() & put.keys():
            raise CheckpointError(f"{', '.join(sorted(twice))}: there twice, under both generations of names")
        ours |= put
    if (table := ours.get("embeddings.word_embeddings.weight")) is not None and table.ndim == 2:
        ours[TYPES] = table.new_zeros(1, table.shape[1])
    return ours


def newer(name: str) -> str:
    """A tensor of an older file under the newer name."""
    older = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return f"layers.layers.{older[1]}.{_renamed(older[2], OLDER)}" if older else name


def text_size(weights: Mapping[str, Tensor]) -> TextShape:
    """Sizes of the text tower under our names; what no tensor tells is XLM-R's.

    Raises CheckpointError where a table is missing, or the width is none of whole heads.
    """
    words, places = (_table(weights, name) for name in ("word_embeddings", "position_embeddings"))
    width, depth = words.shape[1], count(weights, f"{OURS}encoder.layer.")
    mlp = weights.get(f"{OURS}encoder.layer.0.intermediate.dense.weight")
    known = {s.width: s.heads for s in TEXT_VARIANTS.values()}
    heads = known.get(width) or width // HEAD_WIDTH
    if not heads or width % heads:
        raise CheckpointError(f"a text tower of width {width} has no whole number of heads of {HEAD_WIDTH} values")
    hidden = 0 if mlp is None or mlp.shape[0] == 4 * width else mlp.shape[0]
    context = min(TextShape.context, places.shape[0] - UNUSED - SPECIAL)
    try:
        return TextShape(width, depth, heads, words.shape[0], context, mlp=hidden, positions=places.shape[0])
    except ValueError as error:
        raise CheckpointError(f"no such text tower: {error}") from None


def from_ours(converted: Converted | ConvertedClip) -> dict[str, Tensor]:
    """Under the newer names, which torchtext loads strictly as they are.

    Raises CheckpointError for models that MAWS's code has no place for: a trunk alone, SigLIP's bias, other layouts of
    the text tower.
    """
    if not isinstance(converted, ConvertedClip):
        raise CheckpointError("maws_clip files hold an image tower and a text tower; write a trunk as maws")
    text = converted.text
    wrong = [
        *(["a logit_bias (SigLIP's)"] if "logit_bias" in converted.weights else []),
        *([f"a text tower of layout {text.layout}"] if text.layout != "xlmr" else []),
        *([f"captions read as their tokens' {text.pool}"] if text.pool != "first" else []),
        *([f"{text.types} token types"] if text.types != 1 else []),
        *([f"norms with eps {text.eps}"] if text.eps != 1e-5 else []),
    ]
    if wrong:
        raise CheckpointError(f"maws_clip files have no place for {', '.join(wrong)}; write open_clip or hf instead")
    weights = converted.weights
    tensors = {name: weights[name] for name in ALONE} | {"logit_scale": weights["logit_scale"].reshape(())}
    tensors |= {IMAGE + n.removeprefix("image."): v for n, v in weights.items() if n.startswith("image.")}
    ours = {n.removeprefix(OURS): v for n, v in weights.items() if n.startswith(OURS)}
    return tensors | {TEXT + name: value for name, value in _text_from_ours(ours, text.depth).items()}


def _text_from_ours(ours: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """torchtext has no token types: the one there is is added to every token's embedding."""
    outside, inside = ({b: a for a, b in names.items()} for names in (EMBEDDINGS, IN_LAYER))
    tensors = dict[str, Tensor]()
    for name, value in ours.items():
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
        if layer is None and name != TYPES:
            tensors[_renamed(name, outside)] = value
        elif layer is not None and not layer[2].startswith("attention.self."):
            tensors[f"layers.layers.{layer[1]}.{_renamed(layer[2], inside)}"] = value
    for i in range(depth):
        for kind in ("weight", "bias"):
            parts = [ours[f"encoder.layer.{i}.attention.self.{part}.{kind}"] for part in QKV]
            tensors[f"layers.layers.{i}.self_attn.in_proj_{kind}"] = torch.cat(parts)
    if not ours[TYPES].is_meta and bool(ours[TYPES].any()):
        tensors["token_embedding.weight"] = tensors["token_embedding.weight"] + ours[TYPES]
    return tensors


def _thirds(name: str, value: Tensor) -> tuple[Tensor, ...]:
    if not value.ndim or value.shape[0] % 3:
        raise CheckpointError(
            f"{TEXT}{name} is {tuple(value.shape)}, expected queries, keys and values: (3 * width, …)"
        )
    return value.chunk(3)


def _is_scale(name: str, value: Tensor) -> bool:
    return name == "logit_scale" and value.ndim == 0


def _table(weights: Mapping[str, Tensor], name: str) -> Tensor:
    value = weights.get(f"{OURS}embeddings.{name}.weight")
    if value is None or value.ndim != 2:
        had = "is missing" if value is None else f"has the shape {tuple(value.shape)}"
        theirs = {b: a for a, b in EMBEDDINGS.items()}[f"embeddings.{name}."]
        raise CheckpointError(f"{TEXT}{theirs}weight {had}; it says how large the text tower is: (rows, width)")
    return value


def _renamed(name: str, names: Mapping[str, str]) -> str:
    old = next((old for old in names if name.startswith(old)), "")
    return names[old] + name.removeprefix(old) if old else name
