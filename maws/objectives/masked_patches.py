"""Objective of MAE: predict the masked patches, as pixels or as another target (He et al., 2021; recipes §2.2, §3.3).

Axes: B images, N patches, M predicted patches, P values of a patch.
"""

import torch
from torch import Tensor, nn

from maws.data.batch import Losses, MaskedBatch
from maws.models.init import InitRules
from maws.models.mae import MaskedAutoencoder, normalise_patches, patchify, unpatchify
from maws.models.vit import normalise
from maws.objectives.targets import Target


class MaskedPatches(nn.Module):
    """Predict the target of each masked patch from the first `keep` patches of a permutation.

    The loss is the mean error of the masked patches. Where the decoder works on 2 x 2 patches, each of its patches
    counts by the share of it that was masked: sum(error * share) / sum(share) (recipes §3.3).
    """

    def __init__(
        self, autoencoder: MaskedAutoencoder, keep: int, mean: tuple[float, ...], std: tuple[float, ...], target: Target
    ) -> None:
        super().__init__()
        self.autoencoder, self.keep, self.target = autoencoder, keep, target
        self.mean, self.std = mean, std

    def forward(self, batch: MaskedBatch) -> Losses:
        images = normalise(batch["image"], self.mean, self.std)  # B 3 H W, float32
        ids_shuffle = batch["ids_shuffle"]  # B N, the first `keep` visible
        prediction = self.autoencoder(images.to(self.autoencoder.dtype), ids_shuffle, self.keep)  # B M P
        return {"loss": masked_error(self.autoencoder, self.target, prediction, batch, images, self.keep)}

    def init_rules(self) -> InitRules:
        return self.autoencoder.init_rules("autoencoder.")


def masked_error(
    autoencoder: MaskedAutoencoder, target: Target, prediction: Tensor, batch: MaskedBatch, images: Tensor, keep: int
) -> Tensor:
    """The loss of a prediction (B M P) of normalised float32 images (B 3 H W)."""
    ids, share = autoencoder.predicted(batch["ids_shuffle"], keep)  # B M, on the prediction grid
    error = target.error(prediction.float(), target.of(batch, images, ids))  # B M or B M P
    if share is None:
        return error.mean()  # patches have equally many values: also the mean of the patches' means
    per_patch = error if error.ndim == 2 else error.mean(dim=2)  # B M
    return (per_patch * share).sum() / share.sum()


@torch.no_grad()
def reconstruct(
    autoencoder: MaskedAutoencoder, images: Tensor, ids_shuffle: Tensor, keep: int, norm_pix: bool = True
) -> tuple[Tensor, Tensor]:
    """Fill in the masked patches of normalised images for people to look at.

    Returns images of the same shape with the visible patches pasted in (a normalised-pixel prediction is given back the
    patch's own mean and deviation), and the mask (B N, 1 = was removed). The model must predict pixels.
    """
    patches = patchify(images, autoencoder.prediction_patch)
    ids, _ = autoencoder.predicted(ids_shuffle, keep)
    prediction = autoencoder(images, ids_shuffle, keep)
    if norm_pix:
        _, mean, std = normalise_patches(patches.take_along_dim(ids[..., None], dim=1))
        prediction = prediction * std + mean
    whole = patches.scatter(1, ids[..., None].expand_as(prediction), prediction)
    painted = unpatchify(whole, autoencoder.prediction_patch, autoencoder.prediction_grid)
    mask = torch.zeros(ids_shuffle.shape, device=images.device).scatter(1, ids_shuffle[:, keep:], 1.0)
    patch = autoencoder.shape.patch
    removed = unpatchify(mask[..., None].expand(-1, -1, 3 * patch**2), patch, autoencoder.grid)
    return torch.where(removed.bool(), painted, images), mask
