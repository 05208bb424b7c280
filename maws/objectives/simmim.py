"""Objective of SimMIM: absolute error on the pixels of masked patches (Xie et al., 2021, §3.4; recipes §4.7).

Axes: B images, N patches, M masked patches, P values of a patch.
"""

from torch import Tensor, nn

from maws.data.batch import Losses, MaskedBatch
from maws.models.init import InitRules
from maws.models.mae import patchify
from maws.models.simmim import SimMIM
from maws.models.vit import normalise


class MaskedPixelsL1(nn.Module):
    """Predict masked patches from the first `keep` of a permutation, as plain pixels."""

    def __init__(self, model: SimMIM, keep: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model, self.keep, self.mean, self.std = model, keep, mean, std

    def forward(self, batch: MaskedBatch) -> Losses:
        images = normalise(batch["image"], self.mean, self.std)  # B 3 H W, float32
        ids_shuffle = batch["ids_shuffle"]  # B N, the first `keep` visible
        prediction = self.model(images.to(self.model.dtype), ids_shuffle, self.keep)  # B M P
        return {"loss": masked_l1(prediction, images, ids_shuffle[:, self.keep :], self.model.shape.patch)}

    def init_rules(self) -> InitRules:
        return self.model.init_rules("model.")


def masked_l1(prediction: Tensor, images: Tensor, masked: Tensor, patch: int) -> Tensor:
    """Sum of |prediction - pixel| over the masked patches (ids B M), per masked pixel and channel.

    sum / (pixels + 1e-5) / 3, as the official code writes it, whose mask is an image of zeros and ones.
    """
    target = patchify(images, patch).take_along_dim(masked[..., None], dim=1)  # B M P
    pixels = masked.numel() * patch**2
    return (prediction.float() - target).abs().sum() / (pixels + 1e-5) / 3
