"""VPT-deep: learned prompt tokens before every block of a frozen ViT (Jia et al., 2022).

n prompts follow the class token at block 0; before every later block the outputs of the previous prompts are replaced
by that block's own n prompts. So what a block computes *for* a prompt is thrown away: prompts matter only as keys and
values. That is how it is computed here, exactly and for less: their keys and values are made once per block, not per
image, and in the last block only the class token asks. A test compares this with inserting tokens by hand.

Letters: B images, N patches, C class tokens, n prompts, D width, H heads, d width of a head, S classes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.logistic import LinearHead
from maws.models.vit import VisionTransformer


class Vpt(nn.Module):
    """A frozen trunk with prompts and a linear head. With no prompts it is the head on the plain trunk."""

    mean: Tensor
    scale: Tensor

    def __init__(self, trunk: VisionTransformer, prompts: Tensor, head: LinearHead) -> None:
        """`prompts` (depth n D) and `head` are where training starts; the head's standardisation stays."""
        super().__init__()
        self.trunk = trunk.requires_grad_(False)
        self.prompts = nn.Parameter(prompts.to(head.weight).clone())
        self.weight = nn.Parameter(head.weight.clone())  # S D
        self.bias = nn.Parameter(head.bias.clone())  # S
        self.register_buffer("mean", head.mean.clone())
        self.register_buffer("scale", head.scale.clone())
        self.train()

    def train(self, mode: bool = True) -> "Vpt":
        super().train(mode)
        self.trunk.eval()  # frozen: no dropout, no drop path
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Normalised B 3 H W -> B S."""
        return self.classify(prompted_features(self.trunk, self.prompts, images))

    def classify(self, features: Tensor) -> Tensor:
        return F.linear((features - self.mean) / self.scale, self.weight, self.bias)


def initial_prompts(trunk: VisionTransformer, number: int, generator: torch.Generator) -> Tensor:
    """depth n D, uniform in the bound that Xavier gives the patch projection (recipes 9.2)."""
    patch, width = trunk.patch_embed.patch_size[0], trunk.embed_dim
    bound = math.sqrt(6 / (3 * patch * patch + width))
    return torch.empty(len(trunk.blocks), number, width).uniform_(-bound, bound, generator=generator)


def prompted_features(trunk: Any, prompts: Tensor, images: Tensor) -> Tensor:
    """What stands for each of the normalised images B 3 H W (`trunk.pooled`), B D.

    Raises ValueError for relative positions, of which prompts have none.
    """
    if trunk.rel_pos_bias is not None:
        raise ValueError("VPT cannot prompt a trunk with relative positions: its prompts have no place in the picture")
    x = trunk.prepend(trunk.embed(images))  # B C+N D
    last = len(trunk.blocks) - 1
    for number, block in enumerate(trunk.blocks):
        asking = x[:, : trunk.class_tokens] if number == last and trunk.shape.pool == "cls" else x
        x = asking + block.ls1(_attend(block, x, prompts[number], asking.shape[1]))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return trunk.pooled(trunk.norm(x))


def _attend(block: Any, x: Tensor, prompts: Tensor, asking: int) -> Tensor:
    """Attention of the first `asking` tokens over all tokens and the prompts. x B 1+N D, prompts n D."""
    attn = block.attn
    b, tokens, width = x.shape
    q, k, v = attn.qkv(block.norm1(x)).view(b, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)  # B H 1+N d
    q = attn.q_norm(q[:, :, :asking])
    k = attn.k_norm(k)
    if len(prompts):
        own = attn.qkv(block.norm1(prompts)).view(len(prompts), 3, attn.num_heads, -1)
        _, extra_k, extra_v = own.permute(1, 2, 0, 3)  # H n d each
        k = torch.cat([k, attn.k_norm(extra_k).expand(b, -1, -1, -1)], dim=2)  # B H 1+N+n d
        v = torch.cat([v, extra_v.expand(b, -1, -1, -1)], dim=2)
    mixed = F.scaled_dot_product_attention(q, k, v)  # B H asking d
    return attn.proj(mixed.transpose(1, 2).reshape(b, asking, width))
