"""Objective of finetuning: one class for each image, by a linear layer on what stands for it (recipes §9.4, §9.5).

Axes: B images, S classes, D width, C class tokens, N patches.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maws.config import ConfigError
from maws.data.batch import ClassBatch, Losses
from maws.models.init import Constant, InitRules, Normal
from maws.models.vit import VisionTransformer, normalise
from maws.optim import EMBEDDINGS


class Classification(nn.Module):
    """Softmax over classes with label smoothing; a mixed image has two labels, each with its weight.

    The head starts at normal noise of deviation `head_std` and no bias: MAE's 2e-5 leaves the first gradients to the
    head alone. Given `frozen`, the embeddings and that many blocks are not trained: they run without dropout and drop
    path, and nothing of them is kept for a backward pass, since no value in them asks for a gradient.
    """

    def __init__(
        self, backbone: VisionTransformer, classes: int, mean: tuple[float, ...], std: tuple[float, ...],
        smoothing: float = 0.1, head_std: float = 2e-5, frozen: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone, self.mean, self.std = backbone, mean, std
        self.head = nn.Linear(backbone.embed_dim, classes)
        self.smoothing, self.head_std, self.frozen = smoothing, head_std, frozen
        if frozen is not None:
            first: nn.Module = [*backbone.blocks, self.head][frozen]
            first.register_forward_pre_hook(_with_gradient)

    def logits(self, images: Tensor) -> Tensor:
        """Scores (B S) of normalised images."""
        return self.head(self.backbone.pooled(self.backbone(images)))

    def forward(self, batch: ClassBatch) -> Losses:
        images = normalise(batch["image"], self.mean, self.std).to(self.backbone.dtype)
        scores, labels = self.logits(images).float(), batch["label"]
        loss, likeliest = cross_entropy(scores, labels, self.smoothing), labels
        other, weight = batch.get("label_other"), batch.get("mix_weight")
        if other is not None and weight is not None:
            loss = weight * loss + (1 - weight) * cross_entropy(scores, other, self.smoothing)
            likeliest = torch.where(weight >= 0.5, labels, other)
        # `hit`: is the best guess the class with the larger part? Not an accuracy: images are augmented and mixed.
        return {"loss": loss.mean(), "hit": (scores.argmax(dim=1) == likeliest).float().mean()}

    def train(self, mode: bool = True) -> "Classification":
        super().train(mode)
        if self.frozen is not None:
            self.backbone.pos_drop.eval()
            for block in self.backbone.blocks[: self.frozen]:
                block.eval()
        return self

    def init_rules(self) -> InitRules:
        return [
            (r"head\.weight", Normal(self.head_std)),
            (r"head\.bias", Constant(0.0)),
            *self.backbone.init_rules("backbone."),
        ]


def _with_gradient(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What enters the first trained module, asking for a gradient that nobody reads: ZeRO-3 lets go of a module's
    parameters when the gradient of what entered it is there, and without one it would before they were used.
    """
    x, *others = given
    return (x.detach().requires_grad_(torch.is_grad_enabled()), *others)


def cross_entropy(scores: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Of each image (B), against 1 - smoothing on its class and smoothing/S on all S (Szegedy et al., 2016)."""
    return F.cross_entropy(scores, labels, reduction="none", label_smoothing=smoothing)


def first_trained(trainable: str, depth: int) -> int:
    """The first block that is trained, wholly or in part: 0 of `all`, `depth` of `none` (recipes §9.5).

    Raises ConfigError for what is neither all, none, half nor `last K`.
    """
    word, _, number = trainable.partition(" ")
    if trainable in ("all", "none", "half"):
        return {"all": 0, "none": depth, "half": depth - 1}[trainable]
    if word == "last" and number.isdecimal() and 1 <= int(number) <= depth:
        return depth - int(number)
    raise ConfigError(
        f"trainable={trainable} does not say which part is trained; write all, none (the head alone), half (the MLP of "
        f"the last block) or 'last K' of the {depth} blocks"
    )


def frozen_patterns(trainable: str, depth: int, tower: str) -> list[str]:
    """Patterns of the names that are not trained, of a tower whose names begin with `tower`. Raises as above.

    The head is always trained, and the final norm unless nothing below the head is. `last K` of all K blocks still
    leaves the embeddings, as MAE's partial finetuning does not reach them either.
    """
    first, p = first_trained(trainable, depth), tower.replace(".", r"\.")
    if trainable == "all":
        return []
    patterns = [rf"{p}({'|'.join(EMBEDDINGS)}|rel_pos_bias)(\..*)?"]
    if first:
        patterns.append(rf"{p}blocks\.({'|'.join(map(str, range(first)))})\..*")
    if trainable == "half":
        patterns.append(rf"{p}blocks\.{first}\.(?!mlp\.).*")
    if trainable == "none":
        patterns.append(rf"{p}norm\..*")
    return patterns
