"""AdaptFormer: a bottleneck beside the MLP of every block of a frozen ViT (Chen et al., 2022).

    x = x + attention(norm1(x)),   x = x + mlp(norm2(x)) + 0.1 up(dropout(relu(down(x))))

The bottleneck sees the residual stream after the attention, without a norm of its own. `up` starts at zero, so that the
features are those of the plain trunk (recipes 9.2). Letters: L blocks, B images, T tokens, D width, d bottleneck.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.adapters.adapted import refuse_relative
from maws.models.vit import VisionTransformer


class AdaptFormer(nn.Module):
    """`down` is Kaiming-uniform with a = sqrt 5, that is in +-1 / sqrt D; `up` and both biases start at zero."""

    def __init__(
        self, trunk: VisionTransformer, draw: torch.Generator, bottleneck: int, dropout: float, scale: float
    ) -> None:
        super().__init__()
        depth, width = len(trunk.blocks), trunk.embed_dim
        bound = 1 / math.sqrt(width)
        down = torch.empty(depth, bottleneck, width).uniform_(-bound, bound, generator=draw)
        self.down, self.down_bias = nn.Parameter(down), nn.Parameter(torch.zeros(depth, bottleneck))  # L d D, L d
        self.up, self.up_bias = (
            nn.Parameter(torch.zeros(depth, width, bottleneck)),
            nn.Parameter(torch.zeros(depth, width)),
        )
        self.dropout, self.scale = dropout, scale

    def forward(self, trunk: VisionTransformer, images: Tensor) -> Tensor:
        """Normalised B 3 H W -> B D. Raises UsageError for relative positions."""
        refuse_relative(trunk, "AdaptFormer")
        x = trunk.prepend(trunk.embed(images))  # B T D
        for number, block in enumerate(trunk.blocks):
            x = self.block(block, number, x)
        return trunk.pooled(trunk.finished(x))

    def block(self, block: Any, number: int, x: Tensor) -> Tensor:
        """Block `number` of the trunk with what is beside it. B T D -> B T D."""
        x = x + block.ls1(block.attn(block.norm1(x)))
        inner = F.relu(F.linear(x, self.down[number], self.down_bias[number]))  # B T d
        inner = F.dropout(inner, self.dropout, self.training)
        beside = F.linear(inner, self.up[number], self.up_bias[number])
        return x + block.ls2(block.mlp(block.norm2(x))) + self.scale * beside
