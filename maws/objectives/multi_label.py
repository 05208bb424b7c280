"""Objective of WSP: softmax cross-entropy with target 1/k on each of an image's k synsets (Mahajan et al., 2018).

Axes: B images, S synsets of the vocabulary, M most synsets of an image, D width, N patches, K visible patches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maws.data.batch import LabelledBatch, Losses
from maws.models.init import Constant, FanInNormal, InitRules, Table
from maws.models.vit import VisionTransformer, normalise


class MultiLabel(nn.Module):
    """Predict an image's synsets from the class token.

    `head` is `mlp` (Linear, Tanh, Linear) or `linear`; SWAG's code has both and starts the last layer at zero
    (recipes §6.2). Given `images_per_synset`, its bias starts at the log of each synset's share instead, so that the
    first steps do not bend the trunk towards what is merely frequent. Two things are read from the batch: mixing two
    images (Zhang et al., 2018), which becomes two weighted terms, and the patches the trunk may see.
    """

    def __init__(
        self, backbone: VisionTransformer, synsets: int, mean: tuple[float, ...], std: tuple[float, ...],
        head: str = "mlp", images_per_synset: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        width = backbone.embed_dim
        self.backbone, self.mean, self.std = backbone, mean, std
        hidden = [nn.Linear(width, width), nn.Tanh()] if head == "mlp" else []
        self.head = nn.Sequential(*hidden, nn.Linear(width, synsets))
        self.images_per_synset = images_per_synset

    def logits(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Scores (B S) of normalised images, of which only the patches in `ids_keep` (B K) are seen if it is given."""
        return self.head(self.backbone(images, ids_keep)[:, 0])

    def forward(self, batch: LabelledBatch) -> Losses:
        images = normalise(batch["image"], self.mean, self.std)
        ids = batch["synset_ids"]  # B M, padded with -1, never all padding
        mix, other = batch.get("mix_weight"), batch.get("mix_with")  # B, weight of the image itself; B, who is mixed in
        if mix is not None:
            weight = mix.view(-1, 1, 1, 1)
            images = weight * images + (1 - weight) * images[other]
        scores = self.logits(images.to(self.backbone.cls_token.dtype), batch.get("ids_keep"))  # B S
        log_prob = scores.float().log_softmax(dim=1)  # B S
        loss = one_over_k(log_prob, ids)  # B
        if mix is not None:
            loss = mix * loss + (1 - mix) * one_over_k(log_prob, ids[other])
        best = log_prob.argmax(dim=1, keepdim=True)
        return {
            "loss": loss.mean(),
            "synsets_per_image": (ids >= 0).float().sum(dim=1).mean(),
            "hit": (best == ids).any(dim=1).float().mean(),  # the best guess is one of the image's synsets
        }

    def init_rules(self) -> InitRules:
        last, counts = len(self.head) - 1, self.images_per_synset
        prior = [(rf"head\.{last}\.bias", Table(lambda: log_share(counts)))] if counts is not None else []
        return [
            *prior,
            (rf"head\.{last}\.(weight|bias)", Constant(0.0)),
            (r"head\.0\.weight", FanInNormal()),
            (r"head\.0\.bias", Constant(0.0)),
            *self.backbone.init_rules("backbone."),
        ]


def log_share(counts: Sequence[int]) -> Tensor:
    """Log of each count's share of the sum (S); a count of 0 is taken as 1."""
    n = torch.tensor(counts, dtype=torch.float64).clamp(min=1)
    return (n / n.sum()).log().float()


def one_over_k(log_prob: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of each row (B S) against 1/k on each of its k synsets (B M, -1 is padding): B."""
    present = ids >= 0  # B M
    return -(log_prob.gather(1, ids.clamp(min=0)) * present).sum(dim=1) / present.sum(dim=1)
