"""VPT: learned prompt tokens in a frozen ViT (Jia et al., 2022).

n prompts follow the class tokens at block 0. `Deep`: before every later block the outputs of the previous prompts are
replaced by that block's own n prompts. `Shallow`: they go on through all blocks. Prompt outputs are not pooled.

In the deep form what a block computes *for* a prompt is thrown away: prompts matter only as keys and values. That is
how it is computed here, exactly and for less: their keys and values are made once per block, not per image, and in the
last block only the class token asks. A test compares this with inserting tokens by hand.

Letters: B images, N patches, C class tokens, n prompts, D width, H heads, d width of a head.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.adapters.adapted import refuse_relative
from maws.models.vit import VisionTransformer


class Deep(nn.Module):
    """VPT-deep. With no prompts it is the plain trunk, to the bit."""

    def __init__(self, prompts: Tensor) -> None:
        """`prompts` (depth n D) are where training starts."""
        super().__init__()
        self.prompts = nn.Parameter(prompts.clone())

    def forward(self, trunk: VisionTransformer, images: Tensor) -> Tensor:
        """Normalised B 3 H W -> B D. Raises UsageError for relative positions, of which prompts have none."""
        refuse_relative(trunk, "VPT")
        if not self.prompts.shape[1]:
            return trunk.pooled(trunk(images))
        x = trunk.prepend(trunk.embed(images))  # B C+N D
        last = len(trunk.blocks) - 1
        for number, block in enumerate(trunk.blocks):
            x = prompted(block, x, self.prompts[number], _asked(trunk, x) if number == last else x.shape[1])
        return trunk.pooled(trunk.finished(x))


class Shallow(nn.Module):
    """VPT-shallow: prompts of the first block alone, whose outputs are the prompts of the next. No prompts: as Deep."""

    def __init__(self, prompts: Tensor) -> None:
        """`prompts` (1 n D) are where training starts."""
        super().__init__()
        self.prompts = nn.Parameter(prompts.clone())

    def forward(self, trunk: VisionTransformer, images: Tensor) -> Tensor:
        """Normalised B 3 H W -> B D. Raises UsageError for relative positions, of which prompts have none."""
        refuse_relative(trunk, "VPT")
        number = self.prompts.shape[1]
        if not number:
            return trunk.pooled(trunk(images))
        patches, c = trunk.prepend(trunk.embed(images)), trunk.class_tokens
        x = torch.cat([patches[:, :c], self.prompts.expand(len(images), -1, -1), patches[:, c:]], dim=1)  # B C+n+N D
        for block in trunk.blocks:
            x = block(x)
        return trunk.pooled(trunk.finished(torch.cat([x[:, :c], x[:, c + number :]], dim=1)))


def initial_prompts(trunk: VisionTransformer, number: int, draw: torch.Generator, deep: bool = True) -> Tensor:
    """depth n D (shallow: 1 n D), uniform in the bound that Xavier gives the patch projection (recipes 9.2)."""
    patch, width = trunk.patch_embed.patch_size[0], trunk.embed_dim
    bound = math.sqrt(6 / (3 * patch * patch + width))
    prompts = torch.empty(len(trunk.blocks) if deep else 1, number, width)
    return prompts.uniform_(-bound, bound, generator=draw)


def prompted(block: Any, x: Tensor, prompts: Tensor, asked: int) -> Tensor:
    """A block on x B C+N D and prompts n D: what it gives for the first `asked` tokens."""
    x = x[:, :asked] + block.ls1(_attend(block, x, prompts, asked))
    return x + block.ls2(block.mlp(block.norm2(x)))


def _asked(trunk: VisionTransformer, x: Tensor) -> int:
    """How many of the first tokens are looked at after the last block."""
    return trunk.class_tokens if trunk.shape.pool == "cls" else x.shape[1]


def _attend(block: Any, x: Tensor, prompts: Tensor, asked: int) -> Tensor:
    """Attention of the first `asked` tokens over all tokens and the prompts. x B C+N D, prompts n D."""
    attn = block.attn
    b, tokens, width = x.shape
    q, k, v = attn.qkv(block.norm1(x)).view(b, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)  # B H C+N d
    q, k = attn.q_norm(q[:, :, :asked]), attn.k_norm(k)
    own = attn.qkv(block.norm1(prompts)).view(len(prompts), 3, attn.num_heads, -1)
    _, extra_k, extra_v = own.permute(1, 2, 0, 3)  # H n d each
    k = torch.cat([k, attn.k_norm(extra_k).expand(b, -1, -1, -1)], dim=2)  # B H C+N+n d
    v = torch.cat([v, extra_v.expand(b, -1, -1, -1)], dim=2)
    mixed = F.scaled_dot_product_attention(q, k, v)  # B H asked d
    return attn.proj(mixed.transpose(1, 2).reshape(b, asked, width))
