"""The image tower: timm's VisionTransformer, in the sizes of MAWS Table 1.

Axes: B images, N patches, K visible patches, C class tokens, D width. Parameter names are timm's, which are those of
the released MAE and MAWS files (recipes §11.2).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from maws.models.attention import Float32Attention, recomputed, run_blocks
from maws.models.init import Constant, FanInNormal, InitRules, Normal, Table, Uniform, XavierUniform, fill
from maws.models.patch_embed import PatchEmbed
from maws.models.pos_embed import RelativePositionBias, sincos_2d

POSITIONS = ("sincos", "learned", "relative")
POOLS = ("cls", "mean", "mean_norm")


@dataclass(frozen=True)
class Shape:
    """What a ViT is: its sizes (recipes §1.1) and its tokens; `image` is the default side in pixels."""

    patch: int
    depth: int
    width: int
    heads: int
    image: int = 224
    class_tokens: int = 1  # 0: none
    positions: str = "sincos"  # how the table starts: sincos or learned (random); or relative: a bias of the attention
    # What stands for an image: the mean of its class tokens (cls) or patches (mean), after the final norm; or the norm
    # of the mean of its patches (mean_norm), as MAE finetunes: `fc_norm` in its files is our `norm`.
    pool: str = "cls"


@dataclass(frozen=True)
class Options:
    """How a ViT computes; none of it changes the parameters."""

    drop_path: float = 0.0  # of the last block, rising linearly from 0 at the first (stochastic depth)
    dropout: float = 0.0  # of tokens with positions and of what every attention and MLP adds (timm's proj_drop)
    fp32_attention: bool = False
    checkpoint_blocks: str = "none"  # which blocks are recomputed in the backward pass: none, all, every K, first K


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


class VisionTransformer(TimmVisionTransformer):
    """timm's ViT that returns all tokens and can encode only the visible patches, as MAE does (He et al., 2021, §3).

    Raises ValueError when the patch does not divide the image, for unknown positions or pools, a pool over class tokens
    that are not there, and several class tokens with relative positions.
    """

    cls_token: nn.Parameter  # 1 C D; None without class tokens
    pos_embed: nn.Parameter  # 1 C+N D; None with relative positions

    def __init__(self, shape: Shape, image_size: int, options: Options = Options()) -> None:
        _check(shape, image_size, options)
        relative, tokens = shape.positions == "relative", shape.class_tokens
        super().__init__(
            img_size=image_size,
            patch_size=shape.patch,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            num_classes=0,
            global_pool="",
            class_token=tokens > 0,
            pos_embed="none" if relative else "learn",
            drop_path_rate=options.drop_path,
            proj_drop_rate=options.dropout,
            pos_drop_rate=options.dropout,
            embed_layer=PatchEmbed,
            attn_layer=Float32Attention if options.fp32_attention else Attention,
            weight_init="skip",  # values come from `init_rules`, never from a constructor (models/init.py)
        )
        if tokens > 1:  # timm knows one
            self.cls_token = nn.Parameter(torch.empty(1, tokens, shape.width))
            self.pos_embed = nn.Parameter(torch.empty(1, tokens + self.patch_embed.num_patches, shape.width))
            self.num_prefix_tokens = tokens
        self.rel_pos_bias = RelativePositionBias(self.grid, shape.heads, tokens) if relative else None
        self.shape, self.image_size, self.options = shape, image_size, options

    @property
    def grid(self) -> tuple[int, int]:
        rows, cols = self.patch_embed.grid_size
        return rows, cols

    @property
    def class_tokens(self) -> int:
        return self.shape.class_tokens

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters: what images have to be turned into."""
        return self.patch_embed.proj.weight.dtype

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode normalised B 3 H W as B C+N D; given `ids_keep` (B K), only those patches enter, giving B C+K D.

        With pool mean_norm the tokens have not passed the final norm, which is for their mean: see `pooled`.
        """
        return self.forward_features(images, ids_keep)

    def forward_features(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.trunk(self.prepend(self.embed(images, ids_keep)), ids_keep)

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Patches with their positions: B N D, or B K D."""
        x = self.patch_embed(images, ids_keep)
        return x if self.pos_embed is None else x + self.places(ids_keep).to(x.dtype)

    def places(self, ids: Tensor | None = None) -> Tensor:
        """Positions of the patches: 1 N D, or B K D for `ids`: a patch keeps its place, whoever else is there."""
        table = self.pos_embed[:, self.class_tokens :]
        return table if ids is None else table[0][ids]

    def prepend(self, x: Tensor) -> Tensor:
        """Put the class tokens, with their positions, before patches: B K D to B C+K D."""
        if not self.class_tokens:
            return x
        cls = self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, : self.class_tokens]
        return torch.cat([cls.to(x.dtype).expand(len(x), -1, -1), x], dim=1)

    def trunk(self, x: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Blocks and, unless it is for the pooled tokens, the final norm; `ids_keep` says which patches x holds, for
        relative positions."""
        bias = self._bias(x, ids_keep)
        return self.finished(run_blocks(self.blocks, self.pos_drop(x), self.options.checkpoint_blocks, bias))

    def finished(self, x: Tensor) -> Tensor:
        """What the last block gave (B T D) as `forward` returns it."""
        return x if self.norms_the_mean else self.norm(x)

    @property
    def norms_the_mean(self) -> bool:
        """Is the final norm for the mean of the patches, and not for each token?"""
        return self.shape.pool == "mean_norm"

    def _bias(self, x: Tensor, ids_keep: Tensor | None) -> Tensor | None:
        if self.rel_pos_bias is None:
            return None
        if ids_keep is not None and self.class_tokens:
            ids_keep = torch.cat([torch.zeros_like(ids_keep[:, :1]), ids_keep + 1], dim=1)
        return self.rel_pos_bias(ids_keep).to(x.dtype)

    def pooled(self, tokens: Tensor, how: str | None = None) -> Tensor:
        """One vector for each image, B C+K D to B D: the mean of its class tokens (`cls`) or patches (`mean`), or the
        norm of the latter (`mean_norm`); the other two are of normed tokens, whatever `forward` leaves."""
        how, c = how or self.shape.pool, self.class_tokens
        if self.norms_the_mean:
            if how == "mean_norm":
                return self.norm(tokens[:, c:].mean(dim=1))
            tokens = self.norm(tokens)
        if how == "mean":
            return tokens[:, c:].mean(dim=1)
        return tokens[:, 0] if c == 1 else tokens[:, :c].mean(dim=1)

    def init_rules(self, prefix: str = "", style: str = "mae") -> InitRules:
        """MAE's initial values (recipes §2.4), or SWAG's for training from scratch (`swag`, recipes §6.3)."""
        p, grid = prefix.replace(".", r"\."), self.grid
        width, tokens = self.shape.width, self.class_tokens
        sincos = self.shape.positions == "sincos" and style == "mae"
        table = Table(lambda: sincos_2d(width, grid, tokens)) if sincos else Normal(0.02)
        relative = self.rel_pos_bias.init_rules(p + r"rel_pos_bias\.") if self.rel_pos_bias is not None else []
        blocks = transformer_rules(p) if style == "mae" else swag_rules(p, width)
        return [
            *relative,
            (p + r"pos_embed", table),
            (p + r"cls_token", Normal(0.02) if style == "mae" else Constant(0.0)),
            *patch_rules(p, 3 * self.shape.patch**2, style),
            *blocks,
        ]


def patch_rules(p: str, fan_in: int, style: str) -> InitRules:
    """Initial values of the patch convolution."""
    if style == "swag":
        return [(p + r"patch_embed\.proj\.weight", FanInNormal()), (p + r"patch_embed\.proj\.bias", Constant(0.0))]
    return [
        (p + r"patch_embed\.proj\.weight", XavierUniform()),
        (p + r"patch_embed\.proj\.bias", Uniform(fan_in**-0.5)),  # MAE leaves torch's default
    ]


def transformer_rules(p: str = "") -> InitRules:
    """Xavier-uniform matrices, zero biases, unit norms: MAE's values for everything inside and after the blocks."""
    return [
        (p + r".*norm\d?\.weight", Constant(1.0)),
        (p + r".*\.bias", Constant(0.0)),
        (p + r".*\.weight", XavierUniform()),
    ]


def swag_rules(p: str, width: int) -> InitRules:
    """SWAG's: as MAE's but for the MLP's biases and the attention's output, which torch starts as any linear layer."""
    return [
        (p + r".*\.mlp\.fc\d\.bias", Normal(1e-6)),
        (p + r".*\.attn\.proj\.weight", Uniform(width**-0.5)),
        *transformer_rules(p),
    ]


def _check(shape: Shape, image_size: int, options: Options) -> None:
    if image_size % shape.patch:
        raise ValueError(f"image size {image_size} is not a multiple of the patch size {shape.patch}")
    if shape.positions not in POSITIONS:
        raise ValueError(f"positions are {', '.join(POSITIONS)}; not {shape.positions!r}")
    if shape.pool not in POOLS or (shape.pool == "cls" and not shape.class_tokens):
        raise ValueError(
            f"pool={shape.pool!r} with {shape.class_tokens} class tokens: use cls where there are some, or mean or "
            f"mean_norm"
        )
    if shape.positions == "relative" and shape.class_tokens > 1:
        raise ValueError(f"relative positions know at most one class token, not {shape.class_tokens}")
    recomputed(options.checkpoint_blocks, shape.depth)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turn uint8 B 3 H W into float32 with the data set's mean and deviation taken out, on the images' device."""
    m, s = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images.float() / 255 - m) / s


def build_vit(
    variant: str, image_size: int | None = None, options: Options = Options(), seed: int | None = 0, **changes: Any
) -> VisionTransformer:
    """A ViT by name; `changes` replace fields of its Shape (`patch=14`). With `seed=None` its parameters are left
    without values, for `init.fill` to give them.

    Raises KeyError for an unknown variant and ValueError as VisionTransformer does.
    """
    if variant not in VARIANTS:
        raise KeyError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    shape = replace(VARIANTS[variant], **changes)
    vit = VisionTransformer(shape, image_size or shape.image, options)
    if seed is not None:
        fill(vit, vit.init_rules(), seed)
    return vit
