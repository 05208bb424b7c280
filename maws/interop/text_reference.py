"""What a text tower's own tensors compute, in plain float32 operations, one layer's weights in memory at a time.

    features = text_features(torchtext_names(tensors), shape, ids, dtype)     # B D, compared with ours after an import

It knows the original names and nothing of transformers: post-norm layers, exact gelu (recipes §8.1, §11.5).

Axes: B captions, T tokens, D width, H heads, d width of a head.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maws.interop.maws_clip import OURS, TEXT
from maws.models.text import PAD, TextShape

Linear = tuple[Tensor, Tensor]  # weight (out, in) and bias (out)


class Layer(NamedTuple):
    """One layer's tensors, whatever they are called."""

    qkv: Linear  # queries, keys, values one after the other: (3D, D), (3D)
    out: Linear
    norm1: Linear
    up: Linear
    down: Linear
    norm2: Linear


class Names(NamedTuple):
    """Where the tensors are."""

    words: Tensor  # V D
    places: Tensor  # P D
    types: Tensor | None  # 1 D; None: there are none
    norm: Linear
    layer: Callable[[int], Layer]


def torchtext_names(tensors: Mapping[str, Tensor]) -> Names:
    """Of a maws_clip file, of the newer or the older generation."""

    def pair(newer: str, older: str = "") -> Linear:
        found = newer if f"{newer}weight" in tensors else older
        return tensors[f"{found}weight"], tensors[f"{found}bias"]

    def layer(i: int) -> Layer:
        new, old = f"{TEXT}layers.layers.{i}.", f"{TEXT}layers.{i}."
        return Layer(
            pair(f"{new}self_attn.in_proj_", f"{old}attention.input_projection."),
            pair(f"{new}self_attn.out_proj.", f"{old}attention.output_projection."),
            pair(f"{new}norm1.", f"{old}attention_layer_norm."),
            pair(f"{new}linear1.", f"{old}residual_mlp.mlp.0."),
            pair(f"{new}linear2.", f"{old}residual_mlp.mlp.3."),
            pair(f"{new}norm2.", f"{old}final_layer_norm."),
        )

    words, places = tensors[f"{TEXT}token_embedding.weight"], tensors[f"{TEXT}positional_embedding.embedding.weight"]
    return Names(words, places, None, pair(f"{TEXT}embedding_layer_norm."), layer)


def our_names(weights: Mapping[str, Tensor]) -> Names:
    """Of a model under our names, where there are no others."""

    def pair(name: str) -> Linear:
        return weights[f"{OURS}{name}.weight"], weights[f"{OURS}{name}.bias"]

    def layer(i: int) -> Layer:
        at = f"encoder.layer.{i}."
        parts = [pair(f"{at}attention.self.{part}") for part in ("query", "key", "value")]
        qkv = torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])
        output = f"{at}attention.output."
        return Layer(
            qkv, pair(f"{output}dense"), pair(f"{output}LayerNorm"),
            pair(f"{at}intermediate.dense"), pair(f"{at}output.dense"), pair(f"{at}output.LayerNorm"),
        )  # fmt: skip

    tables = [weights[f"{OURS}embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type")]
    return Names(tables[0], tables[1], tables[2][:1], pair("embeddings.LayerNorm"), layer)


@torch.no_grad()
def text_features(names: Names, shape: TextShape, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What stands for each caption (B D) of ids (B T) padded with PAD. Values are rounded to `dtype`, which a release
    keeps them in.
    """

    def rounded(pair: Linear) -> Linear:
        return pair[0].to(dtype).float(), pair[1].to(dtype).float()

    def norm(x: Tensor, pair: Linear) -> Tensor:
        return F.layer_norm(x, (shape.width,), *rounded(pair), shape.eps)

    there = ids != PAD  # B T
    x = names.words[ids].to(dtype).float() + names.places[_rows(there, shape)].to(dtype).float()
    if names.types is not None:
        x = x + names.types[0].to(dtype).float()
    x = norm(x, names.norm)
    for i in range(shape.depth):
        layer = names.layer(i)
        x = norm(x + _attention(x, there, rounded(layer.qkv), rounded(layer.out), shape.heads), layer.norm1)
        hidden = F.gelu(F.linear(x, *rounded(layer.up)))
        x = norm(x + F.linear(hidden, *rounded(layer.down)), layer.norm2)
    if shape.pool == "first":
        return x[:, 0]
    return torch.stack([tokens[real].mean(0) for tokens, real in zip(x, there, strict=True)])


def _rows(there: Tensor, shape: TextShape) -> Tensor:
    """Of the position table, B T: BERT counts from 0, XLM-R from after the padding's row, and only what is there."""
    if shape.layout == "bert":
        return torch.arange(there.shape[1]).expand_as(there)
    return torch.where(there, there.cumsum(1) + PAD, PAD)


def _attention(x: Tensor, there: Tensor, qkv: Linear, out: Linear, heads: int) -> Tensor:
    b, t, width = x.shape
    q, k, v = F.linear(x, *qkv).view(b, t, 3, heads, width // heads).permute(2, 0, 3, 1, 4)  # B H T d each
    logits = (q @ k.transpose(-2, -1)) * (width // heads) ** -0.5  # B H T T
    weight = logits.masked_fill(~there[:, None, None], float("-inf")).softmax(dim=-1)
    return F.linear((weight @ v).transpose(1, 2).reshape(b, t, width), *out)
