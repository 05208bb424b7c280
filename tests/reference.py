"""Vision transformers written out once more, slowly: loops over images, heads and tokens, float64, from a state dict.

Nothing here is shared with what it checks. Axes: N patches, C class tokens, T tokens, D width, d width of a head.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    rows = []
    for row in x:
        mean = row.sum() / len(row)
        variance = ((row - mean) ** 2).sum() / len(row)
        rows.append((row - mean) / torch.sqrt(variance + eps) * weight + bias)
    return torch.stack(rows)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(state: State, name: str, x: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Self-attention of T D; `bias` (heads T T) is added to the logits."""
    qkv = torch.einsum("td,ed->te", x, state[f"{name}.qkv.weight"]) + state[f"{name}.qkv.bias"]
    q, k, v = qkv.split(x.shape[1], dim=1)
    d, out = x.shape[1] // heads, torch.zeros_like(x)
    for h in range(heads):
        own = slice(h * d, (h + 1) * d)
        for t in range(len(x)):
            logits = torch.stack([(q[t, own] * k[s, own]).sum() / math.sqrt(d) for s in range(len(x))])
            if bias is not None:
                logits = logits + bias[h, t]
            weights = torch.exp(logits - logits.max())
            weights = weights / weights.sum()
            out[t, own] = sum(weights[s] * v[s, own] for s in range(len(x)))
    return torch.einsum("td,ed->te", out, state[f"{name}.proj.weight"]) + state[f"{name}.proj.bias"]


def block(state: State, name: str, x: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    normed = layer_norm(x, state[f"{name}.norm1.weight"], state[f"{name}.norm1.bias"])
    x = x + attention(state, f"{name}.attn", normed, heads, bias)
    normed = layer_norm(x, state[f"{name}.norm2.weight"], state[f"{name}.norm2.bias"])
    hidden = gelu(normed @ state[f"{name}.mlp.fc1.weight"].T + state[f"{name}.mlp.fc1.bias"])
    return x + hidden @ state[f"{name}.mlp.fc2.weight"].T + state[f"{name}.mlp.fc2.bias"]


def embed_patches(state: State, image: Tensor, patch: int) -> Tensor:
    """N D of one image 3 H W, patch by patch in row-major order."""
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    vectors = []
    for top in range(0, image.shape[1], patch):
        for left in range(0, image.shape[2], patch):
            piece = image[:, top : top + patch, left : left + patch]
            vectors.append(torch.einsum("chw,dchw->d", piece, weight) + bias)
    return torch.stack(vectors)


def encoder(
    state: State, image: Tensor, patch: int, heads: int, keep: list[int] | None = None, bias: Tensor | None = None
) -> Tensor:
    """Tokens of one image after the final norm, class tokens first; only the patches in `keep` enter, in that order."""
    tokens = embed_patches(state, image, patch)
    cls = state["cls_token"][0] if "cls_token" in state else tokens[:0]
    if "pos_embed" in state:
        table = state["pos_embed"][0]
        cls, tokens = cls + table[: len(cls)], tokens + table[len(cls) :]
    if keep is not None:
        tokens = torch.stack([tokens[i] for i in keep])
    x, depth = torch.cat([cls, tokens]), len({n.split(".")[1] for n in state if n.startswith("blocks.")})
    for i in range(depth):
        x = block(state, f"blocks.{i}", x, heads, bias)
    return layer_norm(x, state["norm.weight"], state["norm.bias"])


def decoder(state: State, tokens: Tensor, heads: int, positions: Tensor) -> Tensor:
    """Decoder blocks and norm over tokens that are already of the decoder's width and in the order of `positions`."""
    x, depth = tokens + positions, len({n.split(".")[1] for n in state if n.startswith("decoder_blocks.")})
    for i in range(depth):
        x = block(state, f"decoder_blocks.{i}", x, heads)
    return x


def double(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's state in float64."""
    return {k: v.detach().double() for k, v in module.state_dict().items()}
