"""An image tower and a text tower that meet in one space (LiT, Zhai et al., 2022; MAWS's model, recipes §8.1).

Axes: B pairs, E joint width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maws.models.init import Constant, InitRules, WidthNormal
from maws.models.text import TextTower
from maws.models.vit import VisionTransformer

MAX_LOGIT_SCALE = math.log(100)  # CLIP's clamp; MAWS gives no bound


class ClipShape(NamedTuple):
    """A pair of towers by the names of their sizes, and the width they are projected to."""

    image: str  # models.vit.VARIANTS
    text: str  # models.text.TEXT_VARIANTS
    joint_width: int


CLIP_VARIANTS = {  # the released ones (recipes §8.1)
    "vit_b16_xlmr_b": ClipShape("vit_b16", "xlmr_base", 768),
    "vit_l16_xlmr_l": ClipShape("vit_l16", "xlmr_large", 1024),
    "vit_h14_xlmr_l": ClipShape("vit_h14", "xlmr_large", 1024),
    "vit_2b14_xlmr_l": ClipShape("vit_2b14", "xlmr_large", 2048),
}


class TwoTower(nn.Module):
    """Both towers end in a bias-free projection and l2 normalisation; the temperature is learned as a logarithm.

    `locked` names the tower that is never trained and always in evaluation mode.
    """

    def __init__(self, image: VisionTransformer, text: TextTower, width: int, locked: str = "image") -> None:
        super().__init__()
        self.image, self.text, self.locked = image, text, locked
        self.vision_projection = nn.Parameter(torch.empty(image.embed_dim, width))
        self.text_projection = nn.Parameter(torch.empty(text.shape.width, width))
        self.logit_scale = nn.Parameter(torch.empty(1))  # ZeRO-3 cannot partition a parameter without axes

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed normalised images (B 3 H W) and captions (B T): image B E, text B E, and the scale of their product."""
        return self.encode_image(images), self.encode_text(ids, mask), self.scale()

    def encode_image(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.locked != "image"):
            features = self.image.pooled(self.image(images))  # B D, the class token after the final norm
        return F.normalize(features @ self.vision_projection.to(features.dtype), dim=-1)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        features = self.text(ids, mask)
        return F.normalize(features @ self.text_projection.to(features.dtype), dim=-1)

    def scale(self) -> Tensor:
        """exp of the learned logarithm, at most 100; shape (1,)."""
        return self.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp()

    def train(self, mode: bool = True) -> "TwoTower":
        super().train(mode)
        if self.locked in ("image", "text"):
            getattr(self, self.locked).eval()
        return self

    def init_rules(self, prefix: str = "") -> InitRules:
        p = prefix.replace(".", r"\.")
        return [
            (p + r"logit_scale", Constant(math.log(1 / 0.07))),
            (p + r"(vision|text)_projection", WidthNormal()),
            *self.image.init_rules(prefix + "image."),
            *self.text.init_rules(prefix + "text."),
        ]
