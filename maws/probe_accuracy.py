"""The accuracy of a classifier on held-out pictures while training goes on.

    deepspeed maws/train.py --stage finetune … probe.every="1 epochs" probe.shards=shards/in1k_val probe.queries=50000

As the probes of features (maws/probe.py): every rank runs the same number of forwards of the same size on an equal
share of the pictures, padded with one that does not count, so no rank waits under ZeRO-3 and each picture counts once.

Letters: N pictures, n of this rank.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data_pipeline.shardset import ShardSet
from maws.config import ConfigError, TrainConfig
from maws.data.order import Part
from maws.data.transforms import Preprocess, normalise
from maws.models.vit import VisionTransformer
from maws.probe import BATCH, Pictures, choose, gather, told, untouched

if TYPE_CHECKING:  # only named here: a stage can be read without DeepSpeed
    from maws.engine import Engine


def accuracy(
    tower: VisionTransformer, head: nn.Linear, cfg: TrainConfig, shards: ShardSet, part: Part, preprocess: Preprocess
) -> "Accuracy | None":
    """The probe of a classifier; None when `probe.every` is 0. Raises ConfigError for a set of other classes."""
    if not cfg.probe.every.value:
        return None
    if cfg.probe.queries < 1:
        raise ConfigError(f"probe.queries={cfg.probe.queries} must be 1 or more")
    held_out = ShardSet.open(cfg.probe.shards) if cfg.probe.shards else shards
    ours, theirs = ([entry.synset for entry in s.vocabulary] for s in (shards, held_out))
    if ours != theirs:
        raise ConfigError(
            f"probe.shards={cfg.probe.shards} has other classes than {shards.path} ({len(theirs):,} and {len(ours):,}, "
            f"or in another order); write both with the same --classes (python -m eval shards)"
        )
    choices = choose(held_out, cfg.probe.queries, {number: number for number in range(len(ours))})
    if not choices:
        raise ConfigError(f"probe.every={cfg.probe.every}: {held_out.path} has no labelled picture")
    pictures = Pictures(held_out, choices, part, preprocess.image_size, preprocess)
    return Accuracy(tower, head, pictures, held_out is not shards)


@dataclass
class Accuracy:
    """`probe/top1`: share of pictures whose class has the best score; `probe/top1_chance`: of the commonest class."""

    tower: VisionTransformer
    head: nn.Linear
    pictures: Pictures
    held_out: bool

    def __call__(self, engine: "Engine") -> dict[str, float]:
        def best(images: Tensor) -> Tensor:
            x = normalise(images.to(engine.device), self.pictures.preprocess).to(self.tower.dtype)
            seen = engine.inside(self.tower, lambda: self.tower.pooled(VisionTransformer.forward(self.tower, x)))
            return engine.inside(self.head, lambda: nn.Linear.forward(self.head, seen)).argmax(dim=1)

        with untouched(engine.device):
            mine = torch.cat([best(images) for images in self.pictures.images().split(BATCH)])  # n
            guesses, read = gather(mine[:, None].double(), self.pictures.valid, len(self.pictures.choices))
            labels = torch.tensor([choice.synsets[0] for choice in self.pictures.choices], device=guesses.device)[read]
            hits = (guesses[read, 0] == labels).double().mean()
            found = {"probe/top1": float(hits), "probe/top1_chance": float(labels.bincount().max() / len(labels))}
        return told(found, f"the head{'' if self.held_out else ' (on pictures it is trained on)'}", int(read.sum()))
