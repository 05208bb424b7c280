"""An image tower and a text tower that meet in one space (LiT, Zhai et al., 2022; MAWS's model, recipes §8.1).

Axes: B pairs, E joint width.
"""

import math
from typing import Any, NamedTuple

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

    `locked` names the tower that is never trained and always in evaluation mode; "none": both are trained. With `bias`
    the score of a pair also has a learned offset, as SigLIP's loss wants it (Zhai et al., 2023).
    """

    def __init__(
        self, image: VisionTransformer, text: TextTower, width: int, locked: str = "image", bias: bool = False
    ) -> None:
        super().__init__()
        self.image, self.text, self.locked = image, text, locked
        self.vision_projection = nn.Parameter(torch.empty(image.embed_dim, width))
        self.text_projection = nn.Parameter(torch.empty(text.shape.width, width))
        self.logit_scale = nn.Parameter(torch.empty(1))  # ZeRO-3 cannot partition a parameter without axes
        self.logit_bias = nn.Parameter(torch.empty(1)) if bias else None

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Embed images, as `encode_image` takes them, and captions (B T): image B E, text B E, the scale of their
        product (1,) and, where there is one, its bias (1,).
        """
        # A copy of the bias: the parameter is whole in here alone (ZeRO-3).
        bias = () if self.logit_bias is None else (self.logit_bias.float().clone(),)
        return self.encode_image(images), self.encode_text(ids, mask), self.scale(), *bias

    def encode_image(self, images: Tensor) -> Tensor:
        """B E of normalised images (B 3 H W), or of what the image tower made of them (B D, cached features)."""
        features = self.image_features(images) if images.ndim == 4 else images
        return F.normalize(features @ self.vision_projection.to(features.dtype), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """What the image tower makes of normalised images: B D, as a rule the class token after the final norm."""
        with self._gradients_unless("image"):
            return self.image.pooled(self.image(images))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """B E of token ids and attention mask (B T each)."""
        with self._gradients_unless("text"):
            features = self.text(ids, mask)
        return F.normalize(features @ self.text_projection.to(features.dtype), dim=-1)

    def _gradients_unless(self, locked: str) -> torch.set_grad_enabled:
        """A locked tower keeps nothing for a backward pass."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.locked != locked)

    def scale(self) -> Tensor:
        """exp of the learned logarithm, at most 100; shape (1,)."""
        return _Bounded.apply(self.logit_scale.float(), MAX_LOGIT_SCALE).exp()  # type: ignore[union-attr]

    def train(self, mode: bool = True) -> "TwoTower":
        super().train(mode)
        if self.locked in ("image", "text"):
            getattr(self, self.locked).eval()
        return self

    def init_rules(self, prefix: str = "") -> InitRules:
        p = prefix.replace(".", r"\.")
        scale = 1 / 0.07 if self.logit_bias is None else 10.0  # CLIP's; SigLIP's, and big_vision's for LiT
        return [
            (p + r"logit_scale", Constant(math.log(scale))),
            (p + r"logit_bias", Constant(-10.0)),  # nearly all pairs are none: the first steps need not learn that
            (p + r"(vision|text)_projection", WidthNormal()),
            *self.image.init_rules(prefix + "image."),
            *self.text.init_rules(prefix + "text."),
        ]


class _Bounded(torch.autograd.Function):
    """min(x, bound), whose gradient above the bound is only what would bring x down again.

    CLIP clamps the parameter after every step; a plain clamp in its place would leave a parameter that has passed the
    bound without any gradient, for ever.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x <= bound)
        return x.clamp(max=bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (within,) = ctx.saved_tensors
        return grad * (within | (grad > 0)), None
