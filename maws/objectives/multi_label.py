"""Objective of WSP: predict an image's synsets, with target 1/k on each of its k (Mahajan et al., 2018; recipes §6).

Axes: B images, S synsets of the vocabulary, M most synsets of an image, D width, N patches, K visible patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maws.data.batch import LabelledBatch, Losses
from maws.models.init import Constant, FanInNormal, InitRules, Table
from maws.models.vit import VisionTransformer, normalise
from maws.objectives.chunked_softmax import ClassScores, Targets, each_class, mix, one_over_k

HEADS = ("mlp", "linear")


class Head(nn.Sequential):
    """`mlp` (Linear, Tanh, Linear) or `linear`, the two of SWAG's code (recipes §6.2); names are a Sequential's."""

    def __init__(self, width: int, synsets: int, kind: str = "mlp", loss: str = "softmax", chunk: int = 0) -> None:
        if kind not in HEADS:
            raise ValueError(f"head {kind!r} is not known; use {' or '.join(HEADS)}")
        hidden = [nn.Linear(width, width), nn.Tanh()] if kind == "mlp" else []
        super().__init__(*hidden, ClassScores(width, synsets, loss, chunk))

    def forward(self, features: Tensor, *targets: Tensor) -> Any:  # type: ignore[override]
        """Scores (B S) of features (B D); given the parts of `Targets`, losses (B) and best classes (B)."""
        *hidden, last = self
        for layer in hidden:
            features = layer(features)
        return last(features, *targets)


class MultiLabel(nn.Module):
    """Predict an image's synsets from what stands for it: its class token, or the mean of its patches.

    `loss` is softmax against 1/k, or sigmoid: a yes or no for each synset, summed over them. The head's last layer
    starts at zero, as in SWAG's code (recipes §6.2); given `images_per_synset`, its bias starts at the log of each
    synset's share instead, so that the first steps do not bend the trunk towards what is merely frequent. `initial`
    chooses the trunk's values when it starts from scratch: MAE's or SWAG's. Two things are read from the batch: mixing
    two images (Zhang et al., 2018), which becomes two weighted terms, and the patches the trunk may see.
    """

    def __init__(
        self, backbone: VisionTransformer, synsets: int, mean: tuple[float, ...], std: tuple[float, ...],
        head: str = "mlp", images_per_synset: Sequence[int] | None = None, loss: str = "softmax", chunk: int = 0,
        initial: str = "mae",
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone, self.mean, self.std = backbone, mean, std
        self.head = Head(backbone.embed_dim, synsets, head, loss, chunk)
        self.images_per_synset, self.loss, self.initial = images_per_synset, loss, initial

    def features(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Pooled tokens (B D) of normalised images, of which only the patches in `ids_keep` (B K) are seen if given."""
        return self.backbone.pooled(self.backbone(images, ids_keep))

    def logits(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Scores (B S) of normalised images, for evaluation."""
        return self.head(self.features(images, ids_keep))

    def forward(self, batch: LabelledBatch) -> Losses:
        images = normalise(batch["image"], self.mean, self.std)
        ids = batch["synset_ids"]  # B M, padded with -1
        targets_of = one_over_k if self.loss == "softmax" else each_class
        targets = targets_of(ids)
        if "image_other" in batch and "synset_ids_other" in batch and "mix_weight" in batch:
            weight = batch["mix_weight"]  # B, of the image itself
            share = weight.view(-1, 1, 1, 1)
            images = share * images + (1 - share) * normalise(batch["image_other"], self.mean, self.std)
            targets = mix(targets, targets_of(batch["synset_ids_other"]), weight)
        features = self.features(images.to(self.backbone.dtype), batch.get("ids_keep"))
        loss, best = self.head(features, *targets)  # B, B
        return {
            "loss": mean_over_labelled(loss, targets),
            "synsets_per_image": (ids >= 0).float().sum(dim=1).mean(),
            "hit": (best[:, None] == ids).any(dim=1).float().mean(),  # the best guess is one of the image's synsets
        }

    def init_rules(self) -> InitRules:
        last, counts = len(self.head) - 1, self.images_per_synset
        prior = [(rf"head\.{last}\.bias", Table(lambda: log_share(counts)))] if counts is not None else []
        return [
            *prior,
            (rf"head\.{last}\.(weight|bias)", Constant(0.0)),
            (r"head\.0\.weight", FanInNormal()),
            (r"head\.0\.bias", Constant(0.0)),
            *self.backbone.init_rules("backbone.", self.initial),
        ]


def mean_over_labelled(loss: Tensor, targets: Targets) -> Tensor:
    """Mean of losses (B) over the images that have a synset; 0 when none has (recipes §6.1: others do not count)."""
    return loss.sum() / (targets.mass > 0).sum().clamp(min=1)


def log_share(counts: Sequence[int]) -> Tensor:
    """Log of each count's share of the sum (S); a count of 0 is taken as 1."""
    n = torch.tensor(counts, dtype=torch.float64).clamp(min=1)
    return (n / n.sum()).log().float()
