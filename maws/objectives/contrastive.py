"""Objective of LiT: symmetric cross-entropy between every image and every caption of the global batch (recipes §8.3).

Axes: b pairs on this rank, B pairs in the global batch, E joint width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from maws.data.batch import Losses, PairBatch
from maws.dist import all_gather_with_grad, rank
from maws.models.init import InitRules
from maws.models.two_tower import TwoTower
from maws.models.vit import normalise


class Contrastive(nn.Module):
    """CLIP's loss: each rank scores its own rows against the features of all ranks, gradients flow to all of them."""

    def __init__(self, towers: TwoTower, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.towers, self.mean, self.std = towers, mean, std

    def forward(self, batch: PairBatch) -> Losses:
        images = normalise(batch["image"], self.mean, self.std)
        dtype = self.towers.image.dtype
        image, text, scale = self.towers(images.to(dtype), batch["token_ids"], batch["token_mask"])
        image, text = image.float(), text.float()
        all_image, all_text = all_gather_with_grad(image), all_gather_with_grad(text)  # B E
        target = torch.arange(len(image), device=image.device) + rank() * len(image)  # b, the row's own partner
        to_text, to_image = scale * image @ all_text.T, scale * text @ all_image.T  # b B
        loss = (F.cross_entropy(to_text, target) + F.cross_entropy(to_image, target)) / 2
        return {
            "loss": loss,
            "logit_scale": scale.detach().mean(),
            "image_to_text": (to_text.argmax(dim=1) == target).float().mean(),
        }

    def init_rules(self) -> InitRules:
        return self.towers.init_rules("towers.")
