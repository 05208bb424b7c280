"""Objective of LC-MAE: masked image modelling, guided by a momentum target that sees whole pictures.

    view 1 ─first quarter of the patches──▶ online encoder ─▶ decoder: the masked patches of view 1
                                                │ pool
                                                ▼
                                            projector ─▶ predictor ──┐
                                                                     ├ guidance: 2 - 2 cos, and the other way round
    view 2 ─all patches─▶ target encoder ─pool─▶ target projector ───┘

Kim et al., 2023, §3, with what the official code does beyond the text (recipes §4.1): view 2 goes through the online
branch too, as the second quarter of the same permutation, and is guided by the target's view 1; the target is in
evaluation mode, so its batch norm uses running statistics, which are averaged like its weights (maws/momentum.py).

Axes: B images, N patches, K visible, T guided patches (K, or N), C class tokens, D width of tokens, P a patch's values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self, cast

import torch
from torch import Tensor, nn

from maws.config import ConfigError, nearest
from maws.data.batch import Losses, MaskedBatch, ViewsBatch
from maws.models.guided import GUIDED, GuidedAutoencoder, GuidedSimMIM
from maws.models.heads import Head
from maws.models.init import InitRules
from maws.models.vit import VisionTransformer, normalise
from maws.momentum import cosine_to_one
from maws.objectives.masked_patches import masked_error
from maws.objectives.similarity import Similarity, cosine, info_nce, smooth_l1
from maws.objectives.simmim import masked_l1
from maws.objectives.targets import Target

LOSSES = ("cosine", "infonce", "smooth_l1", "none")
LEVELS = {"global": ("global",), "tokens": ("tokens",), "both": ("global", "tokens")}
POOLED = {"cls": "cls", "patches": "mean"}  # -> VisionTransformer.pooled

Online = GuidedAutoencoder | GuidedSimMIM
Reconstruction = Callable[[Online, Tensor, MaskedBatch, Tensor], Tensor]  # encoder, prediction B M P, batch, images


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How the target guides: the config group `guidance.`, with the switches of LC-MAE Table 5 (recipes §4.6)."""

    loss: str = "cosine"  # cosine, infonce, smooth_l1, or none: no target, masked image modelling alone
    alpha: float = 0.25  # weight of the guidance loss; the reconstruction's is 1
    level: str = "global"  # one pooled vector of each image (global), each guided token (tokens), or both, averaged
    target_mask_ratio: float = 0.0  # share of the patches that the target does not see; it takes them from the end of
    # the permutation, away from those of the online branch (how they are chosen is not given in the paper)
    pooled: str = "patches"  # what is averaged into the pooled vector: patches, or cls
    guided: str = "visible"  # visible: the encoder's visible tokens; all: mask tokens too (models/guided.py)
    symmetric: bool = True  # both views guide and are guided (official code); no: view 2 guides view 1 (paper's text)
    temperature: float = 0.2  # infonce; not given in the paper, MoCo v3's
    beta: float = 2.0  # smooth_l1; not given in the paper, data2vec's
    momentum: float = 0.996  # of the target at the start of training, rising to 1 along a cosine
    hidden: int = 4096  # width inside projector and predictor
    projector_depth: int = 2
    predictor_depth: int = 2

    def check(self, patches: int, keep: int) -> None:
        """Raises ConfigError for what does not exist or does not go together."""
        for name, value, known in (
            ("loss", self.loss, LOSSES), ("level", self.level, list(LEVELS)),
            ("pooled", self.pooled, list(POOLED)), ("guided", self.guided, GUIDED),
        ):  # fmt: skip
            if value not in known:
                raise ConfigError(f"guidance.{name}={value} is not known; {nearest(value, known)}")
        if not (self.alpha >= 0 and self.temperature > 0 and self.beta > 0):
            raise ConfigError("guidance.alpha must be at least 0, guidance.temperature and guidance.beta more than 0")
        if not 0 <= self.momentum <= 1:
            raise ConfigError(f"guidance.momentum={self.momentum} must lie between 0 and 1; the paper's is 0.996")
        if not (1 <= self.projector_depth <= 4 and 0 <= self.predictor_depth <= 4 and self.hidden > 0):
            raise ConfigError("guidance.projector_depth must be 1 to 4, predictor_depth 0 to 4, and hidden more than 0")
        if not 0 < self.target_patches(patches) <= patches:
            raise ConfigError(
                f"guidance.target_mask_ratio={self.target_mask_ratio} leaves the target {self.target_patches(patches)} "
                f"of {patches} patches; the paper's is 0"
            )
        if self.loss != "none":
            self._check_pairs(patches, keep)

    def _check_pairs(self, patches: int, keep: int) -> None:
        if self.symmetric and 2 * keep > patches:
            raise ConfigError(
                f"two views with {keep} visible patches each do not fit into {patches} without overlap; "
                f"raise mask.ratio to 0.5 or more, or set guidance.symmetric=no"
            )
        if "tokens" in LEVELS[self.level] and (self.target_mask_ratio or self.loss == "infonce"):
            raise ConfigError(
                "guidance.level=tokens compares each token with the target's at the same place: set "
                "guidance.target_mask_ratio=0, and a guidance.loss that needs no negatives (cosine, smooth_l1)"
            )

    def target_patches(self, patches: int) -> int:
        """How many patches the target sees."""
        return int(patches * (1 - self.target_mask_ratio))

    def similarity(self) -> Similarity:
        if self.loss == "infonce":
            return partial(info_nce, temperature=self.temperature)
        return partial(smooth_l1, beta=self.beta) if self.loss == "smooth_l1" else cosine


class Branch(nn.Module):
    """An encoder, and a projector for each level that is guided."""

    def __init__(self, encoder: VisionTransformer, projector: "Heads") -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector


class Heads(nn.Module):
    """A head for each level; pooled vectors and single tokens have other statistics, so they share none (ours)."""

    def __init__(self, levels: tuple[str, ...], width: int, hidden: int, depth: int) -> None:
        super().__init__()
        for level in levels:
            self.add_module(level, Head(width, hidden, depth))

    def forward(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {level: self.get_submodule(level)(values) for level, values in rows.items()}

    def init_rules(self, prefix: str) -> InitRules:
        rules = [
            head.init_rules(f"{prefix}{level}.") for level, head in self.named_children() if isinstance(head, Head)
        ]
        return [rule for found in rules for rule in found]


class MomentumGuidance(nn.Module):
    """Reconstruct view 1 and agree with the target about both.

    `target` has the parameters of `online` that its forward needs: a VisionTransformer of the same shape, or with
    guided=all of MAE a GuidedAutoencoder; None with guidance.loss=none.
    """

    def __init__(
        self, online: Online, target: VisionTransformer | None, keep: int, mean: tuple[float, ...],
        std: tuple[float, ...], reconstruction: Reconstruction, guidance: Guidance,
    ) -> None:  # fmt: skip
        super().__init__()
        self.keep, self.mean, self.std = keep, mean, std
        self.reconstruction, self.guidance, self.similarity = reconstruction, guidance, guidance.similarity()
        levels = LEVELS[guidance.level] if target is not None else ()
        width, hidden = online.token_width, guidance.hidden
        self.online = Branch(online, Heads(levels, width, hidden, guidance.projector_depth))
        self.predictor = Heads(levels, width, hidden, guidance.predictor_depth)
        self.target = None
        if target is not None:
            self.target = Branch(target, Heads(levels, width, hidden, guidance.projector_depth)).eval()

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but the target, which never leaves evaluation."""
        super().train(mode)
        if self.target is not None:
            self.target.eval()
        return self

    def forward(self, batch: ViewsBatch) -> Losses:
        first, ids = normalise(batch["image"], self.mean, self.std), batch["ids_shuffle"]  # B 3 H W, B N
        if self.target is None:
            _, prediction = self._online(first, ids, len(ids))
            return {"loss": self._reconstruction(prediction, batch, first)}
        second = normalise(batch["image_other"], self.mean, self.std)
        guided, guides, unseen = first, second, ids.flip(1)
        if self.guidance.symmetric:
            ids = torch.cat([ids, ids.roll(-self.keep, dims=1)])  # view 2 shows the next K patches: none of view 1's
            guided, guides, unseen = torch.cat([first, second]), torch.cat([second, first]), unseen.repeat(2, 1)
        tokens, prediction = self._online(guided, ids, len(first))  # views*B C+T D, B M P
        places = ids[:, : tokens.shape[1] - self.online.encoder.class_tokens]  # views*B T
        wanted = self._target(guides, unseen, places)
        guidance = self._guidance(tokens, wanted, views=len(guided) // len(first))
        reconstruction = self._reconstruction(prediction, batch, first)
        loss = reconstruction + self.guidance.alpha * guidance
        return {"loss": loss, "reconstruction": reconstruction, "guidance": guidance}

    def _reconstruction(self, prediction: Tensor, batch: ViewsBatch, images: Tensor) -> Tensor:
        return self.reconstruction(cast(Online, self.online.encoder), prediction, cast(MaskedBatch, batch), images)

    def _online(self, images: Tensor, ids: Tensor, predicted: int) -> tuple[Tensor, Tensor]:
        encoder = self.online.encoder
        return encoder(images.to(encoder.dtype), ids, self.keep, predicted)

    def _guidance(self, tokens: Tensor, wanted: dict[str, Tensor], views: int) -> Tensor:
        """Mean over views and levels. Each view passes the heads alone: batch norm sees one view, as officially."""
        found = []
        for view, part in enumerate(tokens.chunk(views)):
            rows = self.predictor(self.online.projector(self._rows(part)))
            for level, prediction in rows.items():
                target = wanted[level].chunk(views)[view]
                found.append(self.similarity(prediction.float(), target.float()))
        return torch.stack(found).mean()

    def _rows(self, tokens: Tensor) -> dict[str, Tensor]:
        """B C+T D as one row for each image (`global`: B D) and for each patch (`tokens`: B*T D)."""
        encoder, levels = self.online.encoder, LEVELS[self.guidance.level]
        rows: dict[str, Tensor] = {}
        if "global" in levels:
            rows["global"] = encoder.pooled(tokens, POOLED[self.guidance.pooled])
        if "tokens" in levels:
            rows["tokens"] = tokens[:, encoder.class_tokens :].flatten(0, 1)
        return rows

    @torch.no_grad()
    def _target(self, images: Tensor, unseen: Tensor, places: Tensor) -> dict[str, Tensor]:
        """The target's rows for each level: of whole images, or of the first of `unseen` (B N).

        Where single tokens are compared, they are those of the patches `places` (B T).
        """
        assert self.target is not None
        encoder, patches = self.target.encoder, unseen.shape[1]
        count = self.guidance.target_patches(patches)
        shown = torch.arange(patches, device=unseen.device).expand_as(unseen) if count == patches else unseen
        if isinstance(encoder, GuidedAutoencoder):
            tokens, _ = encoder(images.to(encoder.dtype), shown, count, 0)
        else:
            tokens = encoder(images.to(encoder.dtype), None if count == patches else shown[:, :count])
        rows = self._rows(tokens)
        if "tokens" in rows:
            rows["tokens"] = tokens[:, encoder.class_tokens :].take_along_dim(places[..., None], dim=1).flatten(0, 1)
        return self.target.projector(rows)

    def follows(self) -> dict[str, str]:
        return {"target.": "online."} if self.target is not None else {}

    def momentum(self, progress: float) -> float:
        return cosine_to_one(self.guidance.momentum, progress)

    def init_rules(self) -> InitRules:
        """Of the target too, which starts as a copy of the online branch when the engine is built."""
        rules = [
            *self.online.encoder.init_rules("online.encoder."),
            *self.online.projector.init_rules("online.projector."),
        ]
        rules += self.predictor.init_rules("predictor.")
        if self.target is not None:
            rules += self.target.encoder.init_rules("target.encoder.")
            rules += self.target.projector.init_rules("target.projector.")
        return rules


def reconstruct_patches(target: Target, keep: int) -> Reconstruction:
    """MAE's reconstruction, as objectives/masked_patches.py has it."""

    def loss(encoder: Online, prediction: Tensor, batch: MaskedBatch, images: Tensor) -> Tensor:
        assert isinstance(encoder, GuidedAutoencoder)
        return masked_error(encoder, target, prediction, batch, images, keep)

    return loss


def reconstruct_pixels(keep: int) -> Reconstruction:
    """SimMIM's."""

    def loss(encoder: Online, prediction: Tensor, batch: MaskedBatch, images: Tensor) -> Tensor:
        return masked_l1(prediction, images, batch["ids_shuffle"][:, keep:], encoder.shape.patch)

    return loss
