"""Masked autoencoder: the ViT encoder on visible patches and a small transformer decoder (He et al., 2021, §3).

Axes: B images, N patches, K visible, M masked (N = K + M), D encoder width, E decoder width, P values of a patch (3pp).
Parameter names are the mae repository's: the encoder's at the top level, the decoder's with the prefix `decoder_`.
"""

from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maws.models.init import InitRules, Normal, Table
from maws.models.pos_embed import sincos_2d
from maws.models.vit import Shape, VisionTransformer, run_block


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of the decoder; MAE's own for every encoder (recipes §1.4)."""

    width: int = 512
    depth: int = 8
    heads: int = 16


class MaskedAutoencoder(VisionTransformer):
    """Encode the visible patches, fill in mask tokens, predict the masked patches."""

    def __init__(self, shape: Shape, image_size: int, decoder: DecoderShape, checkpoint_blocks: bool = False) -> None:
        super().__init__(shape, image_size, checkpoint_blocks=checkpoint_blocks)
        self.decoder_shape, e = decoder, decoder.width
        self.decoder_embed = nn.Linear(shape.width, e)
        self.mask_token = nn.Parameter(torch.empty(1, 1, e))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, 1 + self.patch_embed.num_patches, e))
        self.decoder_blocks = nn.ModuleList(
            Block(e, decoder.heads, mlp_ratio=4, qkv_bias=True) for _ in range(decoder.depth)
        )
        self.decoder_norm = nn.LayerNorm(e, eps=1e-6)
        self.decoder_pred = nn.Linear(e, 3 * shape.patch**2)

    def forward(self, images: Tensor, ids_shuffle: Tensor, keep: int) -> Tensor:  # type: ignore[override]
        """Predict the masked patches of normalised images.

        `ids_shuffle` (B N) is a permutation per image whose first `keep` entries are visible.
        Returns B M P for the patches `ids_shuffle[:, keep:]`, in that order, channel fastest inside a patch.

        Tokens stay in shuffled order and take their decoder positions with them: attention does not see order, so
        un-shuffling first, as the paper's text has it, gives the same predictions and moves more memory.
        """
        latent = self.forward_features(images, ids_shuffle[:, :keep])  # B 1+K D
        x = self.decoder_embed(latent)  # B 1+K E
        masked = self.mask_token.to(x.dtype).expand(len(x), ids_shuffle.shape[1] - keep, -1)
        places = self.decoder_pos_embed.to(x.dtype)
        x = torch.cat([x, masked], dim=1)  # B 1+N E
        x = x + torch.cat([places[:, :1].expand(len(x), -1, -1), places[0, 1:][ids_shuffle]], dim=1)
        for block in self.decoder_blocks:
            x = run_block(block, x, self.checkpoint_blocks)
        return self.decoder_pred(self.decoder_norm(x[:, 1 + keep :]))  # B M P

    def init_rules(self, prefix: str = "") -> InitRules:
        p, e, grid = prefix.replace(".", r"\."), self.decoder_shape.width, self.grid
        return [
            (p + r"decoder_pos_embed", Table(lambda: sincos_2d(e, grid))),
            (p + r"mask_token", Normal(0.02)),
            *super().init_rules(prefix),
        ]


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut B 3 H W into B N P: rows of patches first, and inside a patch row, column, channel (channel fastest)."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1)  # B h w p q C
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Undo `patchify`: B N P to B 3 H W."""
    b, _, values = patches.shape
    c = values // patch**2
    x = patches.reshape(b, *grid, patch, patch, c).permute(0, 5, 1, 3, 2, 4)  # B C h p w q
    return x.reshape(b, c, grid[0] * patch, grid[1] * patch)


def normalise_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-patch normalised targets, and the mean and deviation (B N 1) that undo it (recipes §2.2: unbiased, 1e-6)."""
    mean = patches.mean(dim=-1, keepdim=True)
    std = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / std, mean, std
