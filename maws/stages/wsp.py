"""Stage wsp: weakly supervised pretraining, predicting an image's synsets (Mahajan et al., 2018; MAWS §3).

    deepspeed maws/train.py --stage wsp --preset demo --init-from runs/demo/mae --run runs/demo/mae_wsp \\
        data.shards=runs/demo/shards

Without `--init-from` it starts from random values: the baseline that MAE pre-pretraining is compared with.
The presets `vit_…` hold the paper's numbers where recipes §6.3 has them; none has been trained by this project.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.shardset import ShardSet
from maws.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    Duration,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from maws.data.batch import LabelledBatch
from maws.data.loader import LoadImage, Sample, StepDataset, make_order
from maws.data.masks import random_mask, visible_patches
from maws.data.mix import neighbours
from maws.data.order import Item, Order, Part
from maws.handover import Handover
from maws.models import flops
from maws.models.init import Gather
from maws.objectives.chunked_softmax import LOSSES
from maws.objectives.multi_label import HEADS, MultiLabel
from maws.optim import BASE, NO_DECAY, Rules, layer_wise
from maws.probe import Knn, knn
from maws.seeding import derive
from maws.stages import ReleaseParts, backbone, hand_over, image_side, meta, meta_images, patch_count, shape_of


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    head: str = "mlp"  # mlp or linear, recipes §6.2
    loss: str = "softmax"  # against 1/k on each of k synsets; or sigmoid, a yes or no for each (recipes §6.1)
    chunk: int = 0  # synsets scored at a time: memory is batch x chunk; 0: chosen. Changes nothing else
    initial: str = "mae"  # the trunk's values when it starts from scratch: mae (recipes §2.4) or swag (§6.3)
    prior_bias: bool = False  # start the head's bias at the log of each synset's share; else at 0, as SWAG's code does
    mixup: float = 0.0  # alpha of Beta(alpha, alpha); 0 mixes nothing
    mask_ratio: float = 0.0  # share of random patches left out, for speed (Li et al., 2023, FLIP); 0: none, as in MAWS
    synsets: int = 0  # outputs of the head: the size of the shard set's vocabulary, filled in when the run starts


def prepare(cfg: Config, shards: ShardSet, run: Path) -> Config:
    for name, value, known in (
        ("head", cfg.head, HEADS), ("loss", cfg.loss, LOSSES), ("initial", cfg.initial, ("mae", "swag")),
    ):  # fmt: skip
        if value not in known:
            raise ConfigError(f"{name}={value} is not known; use {' or '.join(known)}")
    if cfg.chunk < 0:
        raise ConfigError(f"chunk={cfg.chunk} must be a number of synsets, or 0 to have it chosen")
    if cfg.prior_bias and cfg.loss != "softmax":
        raise ConfigError(f"prior_bias=true is the prior of a softmax; leave it out with loss={cfg.loss}")
    if not shards.vocabulary:
        raise ConfigError(f"{shards.path} has an empty vocabulary; build it with a lower --min-count")
    if not 0 <= cfg.mixup < float("inf"):
        raise ConfigError(
            f"mixup={cfg.mixup} must be 0 (none) or the alpha of a Beta distribution; 0.1 is the presets'"
        )
    patches = patch_count(cfg.model)
    if not 0 <= cfg.mask_ratio < 1 or not visible_patches(patches, cfg.mask_ratio):
        raise ConfigError(f"mask_ratio={cfg.mask_ratio} must be at least 0 and leave some of {patches} patches")
    return dataclasses.replace(cfg, synsets=len(shards.vocabulary))


def objective(cfg: Config, shards: ShardSet) -> MultiLabel:
    counts = [entry.count for entry in shards.vocabulary] if cfg.prior_bias else None
    return MultiLabel(
        backbone(cfg.model), cfg.synsets, cfg.data.mean, cfg.data.std,
        cfg.head, counts, cfg.loss, cfg.chunk, cfg.initial,
    )  # fmt: skip


def initialise(objective: MultiLabel, cfg: Config, gather: Gather) -> Handover | None:
    return hand_over(objective.backbone, cfg, gather)


def dataset(cfg: Config, shards: ShardSet, run: Path, part: Part) -> StepDataset:
    order = make_order(cfg.data, shards, cfg.seed, cfg.optim.batch_size, labelled=True)
    if cfg.mixup and order.per_stream < 2:
        raise ConfigError(f"mixup needs two samples of a stream in a batch; lower data.streams below {order.streams}")
    image = LoadImage(cfg.data, shards, cfg.seed, image_side(cfg.model))
    keep = visible_patches(patch_count(cfg.model), cfg.mask_ratio) if cfg.mask_ratio else 0
    load = LoadLabelled(image, shards, cfg.seed, patch_count(cfg.model), keep)
    return StepDataset(order, part, load, Mix(cfg.mixup, cfg.seed, order, part) if cfg.mixup else None)


@dataclass
class LoadLabelled:
    """An image and the indices of its synsets; of `patches`, the `keep` that are seen unless that is 0."""

    image: LoadImage
    shards: ShardSet
    seed: int
    patches: int
    keep: int

    def __call__(self, item: Item) -> Sample:
        labels = self.shards.index(item.shard).column("labels")[item.row].as_py()
        sample = self.image(item) | {"synset_ids": torch.tensor(labels, dtype=torch.int64)}
        if self.keep:
            mask = random_mask(item.stream(self.seed, "mask"), self.patches)
            sample["ids_keep"] = torch.from_numpy(mask[: self.keep])
        return sample


@dataclass
class Mix:
    """Mix each sample with its neighbour of the same stream: the pairs do not depend on the number of ranks.

    The neighbour's picture and synsets go along, so that a batch can be cut into micro-batches between any two samples.
    """

    alpha: float
    seed: int
    order: Order
    part: Part

    def __call__(self, batch: LabelledBatch, step: int) -> LabelledBatch:
        other = neighbours(len(batch["keys"]), self.order.per_stream)
        weight = np.random.Generator(np.random.PCG64(derive(self.seed, "mixup", step))).beta(self.alpha, self.alpha)
        batch["image_other"], batch["synset_ids_other"] = batch["image"][other], batch["synset_ids"][other]
        batch["mix_weight"] = torch.full((len(other),), float(weight))
        return batch


def param_rules(cfg: Config) -> Rules:
    rules = [
        (r".*(bias|norm\d?\.weight)", NO_DECAY),  # recipes §6.3
        (r".*", BASE),  # positions too: they are learned (recipes §7)
    ]
    return layer_wise(rules, "backbone.", shape_of(cfg.model).depth, cfg.optim.layer_decay)


def probe(objective: MultiLabel, cfg: Config, shards: ShardSet, run: Path, part: Part) -> Knn | None:
    return knn(objective.backbone, cfg, shards, part)


def release(objective: MultiLabel, cfg: Config, shards: ShardSet, run: Path) -> ReleaseParts:
    config = {"classes": cfg.synsets, "head": cfg.head, "loss": cfg.loss}
    vocabulary = {"vocabulary.parquet": shards.path / "vocabulary.parquet"}
    return ReleaseParts(lambda name: name.removeprefix("backbone."), config, vocabulary)


def cost(cfg: Config) -> flops.Cost:
    shape, side = shape_of(cfg.model), image_side(cfg.model)
    keep = visible_patches(patch_count(cfg.model), cfg.mask_ratio)
    seen = flops.encoder(shape, side, cfg.mask_ratio, skip=True, keep=keep)
    return flops.Cost(seen + flops.wsp_head(shape.width, cfg.synsets or flops.SYNSETS, cfg.head))


def example(cfg: Config, size: int) -> dict[str, Tensor]:
    batch = {"image": meta_images(cfg.model, size), "synset_ids": meta(size, 8)}  # 8: ours; it hardly matters
    if cfg.mixup:
        other = {"image_other": batch["image"].clone(), "synset_ids_other": meta(size, 8)}
        batch |= other | {"mix_weight": meta(size, dtype=torch.float32)}
    if cfg.mask_ratio:
        batch["ids_keep"] = meta(size, visible_patches(patch_count(cfg.model), cfg.mask_ratio))
    return batch


def paper(variant: str, checkpoint_blocks: str = "none", mixup: float = 0.1, **data: Any) -> Config:
    """MAWS's WSP, with the same hyper-parameters for every size (MAWS §4.1).

    The main text gives no numbers; these are recipes §6.3's suggestions. `checkpoint_blocks` is for memory alone.
    """
    return Config(
        model=ModelConfig(variant=variant, checkpoint_blocks=checkpoint_blocks),
        data=DataConfig(crop_scale=(0.08, 1.0), workers=8, **data),
        optim=OptimConfig(
            batch_size=8192, lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0,
            schedule="linear", warmup=Duration(5, "percent"), length=Duration(1, "epochs"),
        ),
        mixup=mixup,
    )  # fmt: skip


def in21k() -> Config:
    """ImageNet-21k, one label an image (MAWS Fig. 6), from scratch; from an MAE run set optim.lr=6e-5 (§6.3)."""
    cfg = paper("vit_l16", mixup=0.5, resample=False)
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, dropout=0.1),
        optim=dataclasses.replace(cfg.optim, length=Duration(90, "epochs")),
    )


PRESETS = {
    "vit_b16": paper("vit_b16"),
    "vit_l16": paper("vit_l16"),
    "vit_h14": paper("vit_h14"),
    "vit_2b14": paper("vit_2b14", checkpoint_blocks="all"),
    "vit_6.5b14": paper("vit_6.5b14", checkpoint_blocks="all"),
    "vit_l16_in21k": in21k(),
    # ours; tried on the linear probe with one training vendor held out, never on the evaluation vendor
    "demo": Config(
        model=ModelConfig(variant="nano"),
        data=DataConfig(crop_scale=(0.5, 1.0)),
        optim=OptimConfig(
            batch_size=64, lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0,
            schedule="linear", warmup=Duration(5, "percent"), length=Duration(250, "steps"),
        ),
        head="linear", prior_bias=True, mask_ratio=0.5,  # all three for what two minutes of a core can learn
    ),
    "debug": Config(
        model=ModelConfig(variant="atto"),
        optim=OptimConfig(
            batch_size=16, lr=2e-3, clip=1.0, warmup=Duration(2, "steps"), length=Duration(40, "steps"),
        ),
        checkpoint=CheckpointConfig(every=Duration(10, "steps")),
        log=LogConfig(every=1),
    ),
}  # fmt: skip
