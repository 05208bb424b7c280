"""Attention whose logits and softmax are float32 whatever the model's precision, and which blocks are recomputed.

MAE of ViT-6.5B diverged in half precision (MAWS §4.2), and others found q k^T and its softmax to be the place
(recipes §2.6). Axes: B images, T tokens, D width, H heads, d width of a head.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Float32Attention(Attention):
    """timm's attention, parameters and names included, with everything between its two linear layers in float32."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)  # B H T d each
        mask = None if attn_mask is None else attn_mask.float()
        with torch.autocast(x.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, is_causal=is_causal)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(b, t, d).to(x.dtype)))


def recomputed(policy: str, depth: int) -> list[bool]:
    """Which of `depth` blocks are computed again in the backward pass instead of being remembered.

    `none`, `all`, `every K` (each K-th, the first included) or `first K`. Raises ValueError for anything else.
    """
    if policy in ("none", "all"):
        return [policy == "all"] * depth
    word, _, number = policy.partition(" ")
    if word not in ("every", "first") or not number.isdecimal() or int(number) < 1:
        raise ValueError(f"{policy!r} does not say which blocks to recompute; write none, all, every K or first K")
    k = int(number)
    return [i % k == 0 if word == "every" else i < k for i in range(depth)]


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, policy: str = "none", mask: Tensor | None = None) -> Tensor:
    """Transformer blocks in turn; B T D to B T D. `mask` (broadcast to B H T T) is added to the attention logits."""
    blocks = list(blocks)
    for block, again in zip(blocks, recomputed(policy, len(blocks)), strict=True):
        if again and torch.is_grad_enabled():
            x = checkpoint(block, x, mask, use_reentrant=False)  # type: ignore[assignment]
        else:
            x = block(x, mask)
    return x
