"""facebookresearch/long_seq_mae: MAE's names, a reduced decoder, and attention whose keys may have no bias.

| tensor | shape | ours |
|---|---|---|
| decoder_downsample.weight / .bias | (E, E, 2, 2) / (E), a convolution | decoder_reduce.* |
| decoder_upsample.weight / .bias | (E, E, 2, 2) / (E), a transposed convolution | decoder_restore.* |
| decoder_pos_embed | (1, N/4+1, E) of a reduced decoder | the same |
| decoder_pred.weight / .bias | (12pp, E) / (12pp) of a reduced decoder that is not restored | the same |
| blocks.i.attn.q_bias, .v_bias | (D) each, of models without a bias of the keys | attn.qkv.bias = q, 0, v |

Without any of these it is a file of MAE with another decoder width, and is read as one.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.interop import mae
from maws.interop.converted import Converted

WRAPPER = "model"
NAMES = {"decoder_downsample.": "decoder_reduce.", "decoder_upsample.": "decoder_restore."}


def detect(keys: Collection[str]) -> bool:
    own = (*NAMES, "blocks.0.attn.q_bias")
    return all(name in keys for name in mae.TRUNK) and any(name.startswith(own) for name in keys)


def to_ours(tensors: Mapping[str, Tensor], heads: int = 0) -> Converted:
    weights = join_biases({_renamed(name, NAMES): value for name, value in tensors.items()})
    return replace(mae.to_ours(weights, heads), layout="long_seq_mae")


def from_ours(converted: Converted) -> dict[str, Tensor]:
    """With one bias for queries, keys and values, which is the official default."""
    if converted.heads:
        raise CheckpointError(f"long_seq_mae's files have no place for {', '.join(converted.heads)}")
    if converted.decoder is not None and converted.decoder.reduction == "average":
        raise CheckpointError("long_seq_mae reduces by a convolution only, and this decoder averages; it has no layout")
    back = {ours: theirs for theirs, ours in NAMES.items()}
    return {_renamed(name, back): value for name, value in converted.weights.items()}


def join_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`attn.q_bias` and `attn.v_bias` as the one `attn.qkv.bias` that means the same: a bias of 0 on the keys.

    Softmax does not see it: a bias of the keys adds the same to all logits of a query.
    """
    joined = {name: value for name, value in tensors.items() if not name.endswith((".attn.q_bias", ".attn.v_bias"))}
    for name, query in tensors.items():
        stem, own, _ = name.rpartition(".attn.q_bias")
        if own and (value := tensors.get(f"{stem}.attn.v_bias")) is not None:
            joined[f"{stem}.attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
        elif own:
            raise CheckpointError(f"{name} has no {stem}.attn.v_bias beside it; the two make one bias")
    return joined


def _renamed(name: str, names: Mapping[str, str]) -> str:
    old = next((old for old in names if name.startswith(old)), "")
    return names[old] + name.removeprefix(old) if old else name
