"""The online encoder of LC-MAE: MAE or SimMIM that also hands out the tokens that are guided (Kim et al., 2023).

Both give, for images and a permutation whose first `keep` patches are visible,

    tokens      B C+T D   class tokens, then the T first patches of the permutation, in its order
    prediction  Q M P     of the masked patches of the first Q images; nothing is decoded for the others

`guided="visible"`: the K visible patches as the encoder gives them. `guided="all"` (LC-MAE Table 5, "visible + mask"):
all N, the hidden ones as what mask tokens became. The paper gives no procedure for it; ours is to take them where MAE
has mask tokens, which is the end of the decoder, in the decoder's width, and SimMIM at the end of its encoder.

Everything goes through one `forward`: ZeRO-3 gathers a module's own parameters only there, and DeepSpeed 0.19.8 refuses
the gradients of a block that was called twice (as a leaf). Two views are one batch of twice as many images.

Axes: B images, Q predicted ones, N patches, K visible, M masked, C class tokens, D width of tokens, P a patch's values.
"""

import torch
from torch import Tensor

from maws.models.mae import DecoderShape, MaskedAutoencoder
from maws.models.simmim import SimMIM
from maws.models.vit import Options, Shape

GUIDED = ("visible", "all")


class GuidedAutoencoder(MaskedAutoencoder):
    """A masked autoencoder whose forward also returns tokens."""

    def __init__(
        self, shape: Shape, image_size: int, decoder: DecoderShape, options: Options = Options(),
        guided: str = "visible",
    ) -> None:  # fmt: skip
        super().__init__(shape, image_size, decoder, options)
        if guided == "all" and self.reduced:
            raise ValueError("guided=all needs a token of the decoder for each patch: set decoder.reduction=none")
        self.guided = guided

    @property
    def token_width(self) -> int:
        return self.shape.width if self.guided == "visible" else self.decoder_shape.width

    def forward(  # type: ignore[override]
        self, images: Tensor, ids_shuffle: Tensor, keep: int, predicted: int
    ) -> tuple[Tensor, Tensor]:
        tokens = self.encode(images, ids_shuffle, keep)  # B C+K D
        decoding = predicted if self.guided == "visible" else len(images)
        decoded = self.decode(tokens[:decoding], ids_shuffle[:decoding], keep)  # … C+N E, or … C+N/4 E
        first = self.class_tokens + (0 if self.coarse else keep)
        prediction = self.decoder_pred(decoded[:predicted, first:])
        return (tokens if self.guided == "visible" else decoded), prediction


class GuidedSimMIM(SimMIM):
    """SimMIM whose forward also returns tokens; for `visible` only the positions that it saw."""

    def __init__(self, shape: Shape, image_size: int, options: Options = Options(), guided: str = "visible") -> None:
        super().__init__(shape, image_size, options)
        self.guided = guided

    @property
    def token_width(self) -> int:
        return self.shape.width

    def forward(  # type: ignore[override]
        self, images: Tensor, ids_shuffle: Tensor, keep: int, predicted: int
    ) -> tuple[Tensor, Tensor]:
        x, c = self.encode(images, ids_shuffle, keep), self.class_tokens  # B C+N D, row-major
        shown = ids_shuffle if self.guided == "all" else ids_shuffle[:, :keep]
        tokens = x[:, c:].take_along_dim(shown[..., None], dim=1)
        prediction = self.predict(x[:predicted], ids_shuffle[:predicted], keep)
        return torch.cat([x[:, :c], tokens], dim=1), prediction
