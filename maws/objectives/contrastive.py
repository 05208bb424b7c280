"""Objective of LiT: every image against every caption of the global batch, by CLIP's loss or SigLIP's (recipes §8.3).

    loss     what is asked of the scores                                             starts at temperature, bias
    clip     which of all captions is the image's, and which image the caption's     0.07      (Radford et al., 2021)
    siglip   of every pair, whether it is one                                        0.1, -10  (Zhai et al., 2023)

Each rank scores its own rows against the features of all ranks, through which gradients flow back to who made them; so
the mean over ranks of losses and gradients is that of one rank with the whole batch (open_clip's local_loss and
gather_with_grad). With gradient accumulation the batch is that of a micro-step.

Axes: b pairs on this rank, B pairs in the global batch, E joint width.
"""

from torch import Tensor, nn

from maws.data.batch import Losses, PairBatch
from maws.dist import all_gather_with_grad, rank
from maws.models.init import InitRules
from maws.models.two_tower import TwoTower
from maws.models.vit import normalise
from maws.objectives.chunked_pairs import sigmoid_of_pairs, softmax_of_pairs

LOSSES = ("clip", "siglip")
TIE = 1e-3  # of a score: equal captions differ by less, and which of them is ahead is rounding


class Contrastive(nn.Module):
    """Two towers, and the loss of their pairs: SigLIP's where the towers have a bias for it, else CLIP's.

    `chunk` columns of the scores are in memory at a time; 0: chosen. A batch with `features` in place of `image` skips
    the image tower.
    """

    def __init__(self, towers: TwoTower, mean: tuple[float, ...], std: tuple[float, ...], chunk: int = 0) -> None:
        super().__init__()
        self.towers, self.mean, self.std, self.chunk = towers, mean, std, chunk

    def forward(self, batch: PairBatch) -> Losses:
        dtype = self.towers.image.dtype
        features = batch.get("features")
        seen = normalise(batch["image"], self.mean, self.std) if features is None else features
        image, text, scale, *bias = self.towers(seen.to(dtype), batch["token_ids"], batch["token_mask"])
        loss, right = pair_loss(image.float(), text.float(), scale, *bias, chunk=self.chunk)
        logged = {"logit_scale": scale, "logit_bias": bias[0]} if bias else {"logit_scale": scale}
        return {
            "loss": loss,
            **{name: value.detach().mean() for name, value in logged.items()},
            "image_to_text": right.float().mean(),
        }

    def init_rules(self) -> InitRules:
        return self.towers.init_rules("towers.")


def pair_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """This rank's loss of its unit features (b E each, float32) among those of all ranks, and whether an image's own
    caption, or one of the same score, is its best (b). SigLIP's loss where there is a bias.
    """
    first = rank() * len(image)
    all_text = all_gather_with_grad(text)  # B E
    if bias is not None:
        losses, behind = sigmoid_of_pairs(image, all_text, scale, bias, first, chunk)
        return losses.mean(), behind <= TIE
    to_text, behind = softmax_of_pairs(image, all_text, scale, first, chunk)
    to_image, _ = softmax_of_pairs(text, all_gather_with_grad(image), scale, first, chunk)
    return (to_text + to_image).mean() / 2, behind <= TIE
