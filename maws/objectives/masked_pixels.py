"""Objective of MAE: squared error on the pixels of masked patches (He et al., 2021; recipes §2.2).

Axes: B images, N patches, M masked patches, P values of a patch.
"""

import torch
from torch import Tensor, nn

from maws.data.batch import Losses, MaskedBatch
from maws.models.init import InitRules
from maws.models.mae import MaskedAutoencoder, normalise_patches, patchify, unpatchify
from maws.models.vit import normalise


class MaskedPixels(nn.Module):
    """Predict masked patches; with `norm_pix` each target patch has its own mean and deviation taken out."""

    def __init__(
        self, autoencoder: MaskedAutoencoder, keep: int, mean: tuple[float, ...], std: tuple[float, ...],
        norm_pix: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.autoencoder, self.keep, self.norm_pix = autoencoder, keep, norm_pix
        self.mean, self.std = mean, std

    def forward(self, batch: MaskedBatch) -> Losses:
        images = normalise(batch["image"], self.mean, self.std)  # B 3 H W, float32
        ids_shuffle = batch["ids_shuffle"]  # B N, the first `keep` visible
        prediction = self.autoencoder(images.to(self.autoencoder.cls_token.dtype), ids_shuffle, self.keep)  # B M P
        target = self.target(images).take_along_dim(ids_shuffle[:, self.keep :, None], dim=1)
        return {"loss": (prediction.float() - target).square().mean()}

    def target(self, images: Tensor) -> Tensor:
        patches = patchify(images, self.autoencoder.shape.patch)  # B N P
        return normalise_patches(patches)[0] if self.norm_pix else patches

    def init_rules(self) -> InitRules:
        return self.autoencoder.init_rules("autoencoder.")


@torch.no_grad()
def reconstruct(
    autoencoder: MaskedAutoencoder, images: Tensor, ids_shuffle: Tensor, keep: int, norm_pix: bool = True
) -> tuple[Tensor, Tensor]:
    """Fill in the masked patches of normalised images for people to look at.

    Returns images of the same shape with the visible patches pasted in (a normalised-pixel prediction is given back the
    patch's own mean and deviation), and the mask (B N, 1 = was removed).
    """
    patch = autoencoder.shape.patch
    patches = patchify(images, patch)
    masked = ids_shuffle[:, keep:]
    prediction = autoencoder(images, ids_shuffle, keep)
    if norm_pix:
        _, mean, std = normalise_patches(patches.take_along_dim(masked[..., None], dim=1))
        prediction = prediction * std + mean
    whole = patches.scatter(1, masked[..., None].expand(-1, -1, patches.shape[2]), prediction)
    mask = torch.zeros(ids_shuffle.shape).scatter(1, masked, 1.0)
    return unpatchify(whole, patch, autoencoder.grid), mask
