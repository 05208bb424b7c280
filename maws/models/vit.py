"""The image tower: timm's VisionTransformer, in the sizes of MAWS Table 1.

Axes: B images, N patches, K visible patches, D width. Parameter names are timm's, which are those of the released
MAE and MAWS files (recipes §11.2).
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed as TimmPatchEmbed
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maws.models.init import Constant, InitRules, Normal, Table, Uniform, XavierUniform, fill
from maws.models.pos_embed import sincos_2d


@dataclass(frozen=True)
class Shape:
    """Sizes of a ViT (recipes §1.1); `image` is the default side in pixels."""

    patch: int
    depth: int
    width: int
    heads: int
    image: int = 224


VARIANTS: dict[str, Shape] = {
    "vit_b16": Shape(patch=16, depth=12, width=768, heads=12),
    "vit_l16": Shape(patch=16, depth=24, width=1024, heads=16),
    "vit_h14": Shape(patch=14, depth=32, width=1280, heads=16),
    "vit_2b14": Shape(patch=14, depth=24, width=2560, heads=32),
    "vit_6.5b14": Shape(patch=14, depth=32, width=4096, heads=32),
    "vit_s16": Shape(patch=16, depth=12, width=384, heads=6),  # LC-MAE's
    "vit_ti16": Shape(patch=16, depth=12, width=192, heads=3),
    "nano": Shape(patch=8, depth=6, width=192, heads=3, image=48),  # ours: the demo, 2.7M parameters
    "atto": Shape(patch=8, depth=2, width=32, heads=2, image=32),  # ours: tests and the debug presets
}


class PatchProjection(nn.Conv2d):
    """The patch convolution, which can also embed only some of the patches; weights and names are the convolution's."""

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Map B 3 H W to B D h w, or, given `ids_keep` (B K), to B K D for those patches alone."""
        if ids_keep is None:
            return super().forward(images)
        patches = self.patches(images).take_along_dim(ids_keep[..., None], dim=1)  # B K 3pp
        return F.linear(patches, self.weight.flatten(1), self.bias)

    def patches(self, images: Tensor) -> Tensor:
        """Cut B 3 H W into B N 3pp, channel first inside a patch, as the convolution's weight is laid out."""
        b, c, h, w = images.shape
        p, q = self.kernel_size
        x = images.reshape(b, c, h // p, p, w // q, q).permute(0, 2, 4, 1, 3, 5)  # B h w C p q
        return x.reshape(b, (h // p) * (w // q), c * p * q)


class PatchEmbed(TimmPatchEmbed):
    """timm's patch embedding with a projection that can skip masked patches."""

    def __init__(self, *args: Any, in_chans: int = 3, embed_dim: int = 768, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, in_chans=in_chans, embed_dim=embed_dim, bias=bias, **kwargs)
        patch = int(self.patch_size[0])
        self.proj = PatchProjection(in_chans, embed_dim, kernel_size=patch, stride=patch, bias=bias)

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Embed B 3 H W as B N D, or B K D for the patches in `ids_keep`."""
        x = self.proj(images, ids_keep)
        return x if ids_keep is not None else x.flatten(2).transpose(1, 2)


class VisionTransformer(TimmVisionTransformer):
    """timm's ViT that returns all tokens and can encode only the visible patches, as MAE does (He et al., 2021, §3)."""

    cls_token: nn.Parameter  # timm makes both optional; here they are always there
    pos_embed: nn.Parameter

    def __init__(self, shape: Shape, image_size: int, drop_path: float = 0.0, checkpoint_blocks: bool = False) -> None:
        super().__init__(
            img_size=image_size,
            patch_size=shape.patch,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            num_classes=0,
            drop_path_rate=drop_path,
            embed_layer=PatchEmbed,
            weight_init="skip",  # values come from `init_rules`, never from a constructor (models/init.py)
        )
        self.shape, self.image_size, self.checkpoint_blocks = shape, image_size, checkpoint_blocks

    @property
    def grid(self) -> tuple[int, int]:
        rows, cols = self.patch_embed.grid_size
        return rows, cols

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode normalised B 3 H W as B 1+N D; given `ids_keep` (B K), only those patches enter, giving B 1+K D."""
        return self.forward_features(images, ids_keep)

    def forward_features(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x = self.patch_embed(images, ids_keep)  # B N D or B K D
        places = self.pos_embed.to(x.dtype)
        if ids_keep is None:
            x = x + places[:, 1:]
        else:
            x = x + places[0, 1:][ids_keep]  # a patch keeps its place
        cls = (self.cls_token + places[:, :1]).expand(len(x), 1, -1)
        x = torch.cat([cls.to(x.dtype), x], dim=1)  # B 1+K D, class token first
        for block in self.blocks:
            x = run_block(block, x, self.checkpoint_blocks)
        return self.norm(x)

    def init_rules(self, prefix: str = "") -> InitRules:
        """MAE's initial values (recipes §2.4); the stage says whether the sine-cosine position table is trained."""
        grid, width, patch = self.grid, self.shape.width, self.shape.patch
        p = prefix.replace(".", r"\.")
        return [
            (p + r"pos_embed", Table(lambda: sincos_2d(width, grid))),
            (p + r"cls_token", Normal(0.02)),
            (p + r"patch_embed\.proj\.weight", XavierUniform()),
            (p + r"patch_embed\.proj\.bias", Uniform((3 * patch**2) ** -0.5)),  # MAE leaves torch's default
            *transformer_rules(p),
        ]


def transformer_rules(p: str = "") -> InitRules:
    """Xavier-uniform matrices, zero biases, unit norms: MAE's values for everything inside and after the blocks."""
    return [
        (p + r".*norm\d?\.weight", Constant(1.0)),
        (p + r".*\.bias", Constant(0.0)),
        (p + r".*\.weight", XavierUniform()),
    ]


def run_block(block: nn.Module, x: Tensor, checkpointed: bool) -> Tensor:
    """One transformer block, recomputed in the backward pass when `checkpointed`."""
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False)
    return block(x)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turn uint8 B 3 H W into float32 with the data set's mean and deviation taken out, on the images' device."""
    m, s = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images.float() / 255 - m) / s


def build_vit(
    variant: str,
    image_size: int | None = None,
    drop_path: float = 0.0,
    checkpoint_blocks: bool = False,
    seed: int | None = 0,
) -> VisionTransformer:
    """A ViT by name; with `seed=None` its parameters are left without values, for `init.fill` to give them.

    Raises KeyError for an unknown variant and ValueError when the patch does not divide the image.
    """
    if variant not in VARIANTS:
        raise KeyError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    shape = VARIANTS[variant]
    size = image_size or shape.image
    if size % shape.patch:
        raise ValueError(f"image size {size} is not a multiple of {variant}'s patch size {shape.patch}")
    vit = VisionTransformer(shape, size, drop_path, checkpoint_blocks)
    if seed is not None:
        fill(vit, vit.init_rules(), seed)
    return vit


def describe(vit: VisionTransformer) -> dict[str, Any]:
    """Sizes for a config file."""
    return asdict(vit.shape) | {"image": vit.image_size}
