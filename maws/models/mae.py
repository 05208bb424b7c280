"""Masked autoencoder: the ViT encoder on visible patches and a small transformer decoder (He et al., 2021, §3).

Axes: B images, N patches, K visible, M predicted, C class tokens, D encoder width, E decoder width, P values of a
patch. Parameter names are the mae repository's: the encoder's at the top level, the decoder's with `decoder_`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maws.models.attention import Float32Attention, run_blocks
from maws.models.init import InitRules, Normal, Table, Uniform
from maws.models.pos_embed import sincos_2d
from maws.models.vit import Options, Shape, VisionTransformer

REDUCTIONS = ("none", "conv", "average")


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of the decoder; MAE's own for every encoder (recipes §1.4).

    `reduction` makes one token of 2 x 2 before the decoder's blocks, by a learned convolution or their mean; it then
    predicts patches of twice the side, unless `restore` brings the grid back by a transposed convolution (§3.3).
    """

    width: int = 512
    depth: int = 8
    heads: int = 16
    reduction: str = "none"
    restore: bool = False


def long_sequence_decoder(encoder: Shape, reduction: str = "none", restore: bool = False) -> DecoderShape:
    """Half the encoder's width and as many heads: the rule of long-sequence MAE (recipes §3.3)."""
    return DecoderShape(encoder.width // 2, 8, encoder.heads, reduction, restore)


class MaskedAutoencoder(VisionTransformer):
    """Encode the visible patches, fill in mask tokens, predict the masked patches.

    `outputs` values are predicted for each patch (default: its pixels). With `encode_mask_tokens` mask tokens of the
    encoder's width stand for the masked patches from the first block on (MAE Table 1c, "encoder w/ [M]").

    Raises ValueError as VisionTransformer does, for relative positions, an unknown reduction, and one on an odd grid.
    """

    def __init__(
        self, shape: Shape, image_size: int, decoder: DecoderShape, options: Options = Options(),
        outputs: int | None = None, encode_mask_tokens: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(shape, image_size, options)
        _check(shape, decoder, self.grid)
        self.decoder_shape, self.encode_mask_tokens, e = decoder, encode_mask_tokens, decoder.width
        self.reduced = decoder.reduction != "none"
        self.decoder_grid = (self.grid[0] // 2, self.grid[1] // 2) if self.reduced else self.grid
        self.decoder_embed = nn.Linear(shape.width, e)
        self.mask_token = nn.Parameter(torch.empty(1, 1, shape.width if encode_mask_tokens else e))
        places = self.decoder_grid[0] * self.decoder_grid[1]
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, shape.class_tokens + places, e))
        if decoder.reduction == "conv":
            self.decoder_reduce = nn.Conv2d(e, e, kernel_size=2, stride=2)
        attention = Float32Attention if options.fp32_attention else Attention
        self.decoder_blocks = nn.ModuleList(
            Block(e, decoder.heads, mlp_ratio=4, qkv_bias=True, attn_layer=attention) for _ in range(decoder.depth)
        )
        if self.reduced and decoder.restore:
            self.decoder_restore = nn.ConvTranspose2d(e, e, kernel_size=2, stride=2)
        self.decoder_norm = nn.LayerNorm(e, eps=1e-6)
        self.outputs = outputs or 3 * self.prediction_patch**2
        self.decoder_pred = nn.Linear(e, self.outputs)

    @property
    def coarse(self) -> bool:
        """Are predictions made for patches of twice the side?"""
        return self.reduced and not self.decoder_shape.restore

    @property
    def prediction_patch(self) -> int:
        return self.shape.patch * (2 if self.coarse else 1)

    @property
    def prediction_grid(self) -> tuple[int, int]:
        return self.decoder_grid if self.coarse else self.grid

    def forward(self, images: Tensor, ids_shuffle: Tensor, keep: int) -> Tensor:  # type: ignore[override]
        """Predict the masked patches of normalised images.

        `ids_shuffle` (B N) is a permutation per image whose first `keep` entries are visible.
        Returns B M P for the patches that `predicted` names, channel fastest inside a patch.
        """
        x = self.decode(self.encode(images, ids_shuffle, keep), ids_shuffle, keep)
        return self.decoder_pred(x[:, self.class_tokens + (0 if self.coarse else keep) :])

    def predicted(self, ids_shuffle: Tensor, keep: int) -> tuple[Tensor, Tensor | None]:
        """Which patches of `prediction_grid` are predicted (B M), and how much each counts in the loss (B M, or None
        for all the same): of a patch made of 2 x 2, the share that was masked (recipes §3.3)."""
        if not self.coarse:
            return ids_shuffle[:, keep:], None
        masked = torch.ones(ids_shuffle.shape, device=ids_shuffle.device).scatter(1, ids_shuffle[:, :keep], 0.0)
        weight = F.avg_pool2d(masked.view(-1, 1, *self.grid), 2).flatten(1)  # B N/4
        return torch.arange(weight.shape[1], device=weight.device).expand_as(weight), weight

    def encode(self, images: Tensor, ids_shuffle: Tensor, keep: int) -> Tensor:
        """The encoder's tokens after its norm: B C+K D, or B C+N D in shuffled order with `encode_mask_tokens`."""
        x = self.embed(images, ids_shuffle[:, :keep])
        if self.encode_mask_tokens:
            x = torch.cat([x, self.mask_token.to(x.dtype) + self.places(ids_shuffle[:, keep:]).to(x.dtype)], dim=1)
        return self.trunk(self.prepend(x))

    def decode(self, latent: Tensor, ids_shuffle: Tensor, keep: int) -> Tensor:
        """The decoder's tokens after its norm: B C+N E in shuffled order, or one of every 2 x 2 in row-major order.

        Tokens stay shuffled where they can and take their positions with them: attention does not see order, so
        un-shuffling first, as the paper's text has it, gives the same predictions and moves more memory.
        """
        x = self.decoder_embed(latent)
        if not self.encode_mask_tokens:
            masked = self.mask_token.to(x.dtype).expand(len(x), ids_shuffle.shape[1] - keep, -1)
            x = torch.cat([x, masked], dim=1)  # B C+N E
        places, c = self.decoder_pos_embed.to(x.dtype), self.class_tokens
        if self.reduced:
            x = torch.cat([x[:, :c], self._reduce(x[:, c:], ids_shuffle)], dim=1) + places
        else:
            x = x + torch.cat([places[:, :c].expand(len(x), -1, -1), places[0, c:][ids_shuffle]], dim=1)
        x = run_blocks(self.decoder_blocks, x, self.options.checkpoint_blocks)
        if self.reduced and self.decoder_shape.restore:
            x = torch.cat([x[:, :c], self._restore(x[:, c:], ids_shuffle)], dim=1)
        return self.decoder_norm(x)

    def _reduce(self, x: Tensor, ids_shuffle: Tensor) -> Tensor:
        """Shuffled patches B N E to B N/4 E in row-major order."""
        x = x.take_along_dim(ids_shuffle.argsort(dim=1)[..., None], dim=1)  # each patch at its place
        image = x.transpose(1, 2).unflatten(2, self.grid)  # B E h w
        image = self.decoder_reduce(image) if self.decoder_shape.reduction == "conv" else F.avg_pool2d(image, 2)
        return image.flatten(2).transpose(1, 2)

    def _restore(self, x: Tensor, ids_shuffle: Tensor) -> Tensor:
        """B N/4 E in row-major order to shuffled patches B N E."""
        image = self.decoder_restore(x.transpose(1, 2).unflatten(2, self.decoder_grid))
        return image.flatten(2).transpose(1, 2).take_along_dim(ids_shuffle[..., None], dim=1)

    def init_rules(self, prefix: str = "", style: str = "mae") -> InitRules:
        p, e, grid, tokens = prefix.replace(".", r"\."), self.decoder_shape.width, self.decoder_grid, self.class_tokens
        return [
            (p + r"decoder_pos_embed", Table(lambda: sincos_2d(e, grid, tokens))),
            (p + r"decoder_(reduce|restore)\.(weight|bias)", Uniform((4 * e) ** -0.5)),  # torch's default
            (p + r"mask_token", Normal(0.02)),
            *super().init_rules(prefix, style),
        ]


def _check(encoder: Shape, decoder: DecoderShape, grid: tuple[int, int]) -> None:
    if encoder.positions == "relative":
        raise ValueError("a masked autoencoder needs sincos or learned positions, not relative ones")
    if encoder.pool == "mean_norm":
        raise ValueError("a decoder reads normed tokens, and pool=mean_norm norms their mean alone; use cls or mean")
    if decoder.reduction not in REDUCTIONS:
        raise ValueError(f"decoder reductions are {', '.join(REDUCTIONS)}; not {decoder.reduction!r}")
    if decoder.reduction != "none" and (grid[0] % 2 or grid[1] % 2):
        raise ValueError(f"a decoder of 2 x 2 patches needs an even grid, not {grid[0]} x {grid[1]}")
    if decoder.reduction == "none" and decoder.restore:
        raise ValueError("decoder.restore undoes a reduction, and there is none; set decoder.reduction=conv or average")


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
