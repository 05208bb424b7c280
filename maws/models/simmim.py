"""SimMIM: a ViT that sees hidden patches as mask tokens, and a linear decoder (Xie et al., 2021; recipes §4.7).

Axes: B images, N patches, K visible, M masked (N = K + M), C class tokens, D width, P = 3pp values of a patch.
Encoder names are those of models/vit.py; `decoder_pred` is the official 1x1 convolution `decoder.0` as a linear layer,
its values in the order that pixel shuffle takes: channel, row, column.

Two things of the official ViT are not here: its layer scale (started at 0.1; our trunk has none, recipes §1.2), and its
missing bias of the keys, which makes no difference: the same number added to all logits of a query.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maws.models.init import Centred, Constant, InitRules, Uniform
from maws.models.vit import Options, Shape, VisionTransformer


@dataclass(frozen=True)
class CutNormal(Centred):
    """Normal with deviation `sigma` cut at one of them on either side, as BEiT and SimMIM start their weights."""

    sigma: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        s = self.sigma
        return nn.init.trunc_normal_(torch.empty(shape), std=s, a=-s, b=s, generator=generator)

    def std(self, shape: torch.Size) -> float:
        return 0.5396 * self.sigma  # of a standard normal cut at 1: sqrt(1 - 2 phi(1) / (2 Phi(1) - 1))


class SimMIM(VisionTransformer):
    """Predict masked patches from a sequence in which a mask token stands for each of them."""

    def __init__(self, shape: Shape, image_size: int, options: Options = Options()) -> None:
        if shape.pool == "mean_norm":
            raise ValueError(
                "every token is predicted from, and pool=mean_norm norms their mean alone; use cls or mean"
            )
        super().__init__(shape, image_size, options)
        self.mask_token = nn.Parameter(torch.empty(1, 1, shape.width))
        self.decoder_pred = nn.Linear(shape.width, 3 * shape.patch**2)

    def forward(self, images: Tensor, ids_shuffle: Tensor, keep: int) -> Tensor:  # type: ignore[override]
        """Predict the patches `ids_shuffle[:, keep:]` of normalised images: B M P, channel fastest inside a patch."""
        return self.predict(self.encode(images, ids_shuffle, keep), ids_shuffle, keep)

    def encode(self, images: Tensor, ids_shuffle: Tensor, keep: int) -> Tensor:
        """All tokens after the final norm, B C+N D in row-major order; only `ids_shuffle[:, :keep]` are seen."""
        x = self.patch_embed(images)  # B N D
        masked = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, ids_shuffle[:, :keep], False)
        x = torch.where(masked[..., None], self.mask_token.to(x.dtype), x)
        if self.pos_embed is not None:
            x = x + self.places().to(x.dtype)
        return self.trunk(self.prepend(x))

    def predict(self, tokens: Tensor, ids_shuffle: Tensor, keep: int) -> Tensor:
        """What the decoder makes of the masked ones among B C+N D."""
        masked = tokens[:, self.class_tokens :].take_along_dim(ids_shuffle[:, keep:, None], dim=1)  # B M D
        pixels = self.decoder_pred(masked).unflatten(2, (3, self.shape.patch, self.shape.patch))  # B M C p q
        return pixels.permute(0, 1, 3, 4, 2).flatten(2)

    def init_rules(self, prefix: str = "", style: str = "mae") -> InitRules:
        """Everything from a normal of 0.02 cut at one deviation; a block's outputs less with depth, as BEiT's.

        The decoder keeps torch's default. `style` is for the encoder's own rules and plays no part.
        """
        p = prefix.replace(".", r"\.")
        outputs = [
            (p + rf"blocks\.{i}\.(attn\.proj|mlp\.fc2)\.weight", CutNormal(0.02 / math.sqrt(2 * (i + 1))))
            for i in range(self.shape.depth)
        ]
        relative = self.rel_pos_bias.init_rules(p + r"rel_pos_bias\.") if self.rel_pos_bias is not None else []
        return [
            *relative,
            *outputs,
            (p + r"decoder_pred\.(weight|bias)", Uniform(self.shape.width**-0.5)),
            (p + r".*norm\d?\.weight", Constant(1.0)),
            (p + r".*\.bias", Constant(0.0)),
            *(rule for rule in super().init_rules(prefix) if rule[0] == p + "pos_embed"),
            (p + r".*", CutNormal(0.02)),
        ]
