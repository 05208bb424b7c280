"""Stage wsp: weakly supervised pretraining, predicting an image's synsets (Mahajan et al., 2018; MAWS §3).

    deepspeed maws/train.py --stage wsp --preset demo --init-from runs/demo/mae --run runs/demo/mae_wsp \\
        data.shards=runs/demo/shards

Without `--init-from` it starts from random values: the baseline that MAE pre-pretraining is compared with.
`vit_b16` holds the paper's numbers where recipes §6.3 has them; it has not been trained by this project.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

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
from maws.data.order import Item, Order, Part
from maws.models.init import Gather
from maws.models.vit import build_vit
from maws.objectives.multi_label import MultiLabel
from maws.optim import BASE, NO_DECAY, Rules
from maws.release import load_backbone, open_release
from maws.seeding import derive
from maws.stages import ReleaseParts, image_side, patch_count


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    head: str = "mlp"  # mlp or linear, recipes §6.2
    prior_bias: bool = False  # start the head's bias at the log of each synset's share; else at 0, as SWAG's code does
    mixup: float = 0.0  # alpha of Beta(alpha, alpha); 0 mixes nothing
    mask_ratio: float = 0.0  # share of random patches left out, for speed (Li et al., 2023, FLIP); 0: none, as in MAWS
    synsets: int = 0  # outputs of the head: the size of the shard set's vocabulary, filled in when the run starts


def prepare(cfg: Config, shards: ShardSet, run: Path) -> Config:
    if cfg.head not in ("mlp", "linear"):
        raise ConfigError(f"head={cfg.head} is not known; use mlp or linear")
    if not shards.vocabulary:
        raise ConfigError(f"{shards.path} has an empty vocabulary; build it with a lower --min-count")
    patches = patch_count(cfg.model)
    if not 0 <= cfg.mask_ratio < 1 or not visible_patches(patches, cfg.mask_ratio):
        raise ConfigError(f"mask_ratio={cfg.mask_ratio} must be at least 0 and leave some of {patches} patches")
    return dataclasses.replace(cfg, synsets=len(shards.vocabulary))


def objective(cfg: Config, shards: ShardSet) -> MultiLabel:
    m = cfg.model
    backbone = build_vit(m.variant, image_side(m), m.drop_path, m.checkpoint_blocks, seed=None)
    counts = [entry.count for entry in shards.vocabulary] if cfg.prior_bias else None
    return MultiLabel(backbone, cfg.synsets, cfg.data.mean, cfg.data.std, cfg.head, counts)


def initialise(objective: MultiLabel, cfg: Config, gather: Gather) -> None:
    if cfg.init_from:
        load_backbone(objective.backbone, open_release(cfg.init_from), gather)


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
    """Mix each sample with its neighbour of the same stream: the pairs do not depend on the number of ranks."""

    alpha: float
    seed: int
    order: Order
    part: Part

    def __call__(self, batch: LabelledBatch, step: int) -> LabelledBatch:
        n, per_stream = len(batch["keys"]), self.order.per_stream
        place = np.arange(n)
        neighbour = place - place % per_stream + (place + 1) % per_stream
        weight = np.random.Generator(np.random.PCG64(derive(self.seed, "mixup", step))).beta(self.alpha, self.alpha)
        batch["mix_with"] = torch.from_numpy(neighbour)
        batch["mix_weight"] = torch.full((n,), float(weight))
        return batch


def param_rules(cfg: Config) -> Rules:
    return [
        (r".*(bias|norm\d?\.weight|cls_token|pos_embed)", NO_DECAY),  # the position table is learned (recipes §7)
        (r".*", BASE),
    ]


def release(objective: MultiLabel, cfg: Config, shards: ShardSet, run: Path) -> ReleaseParts:
    config = {"classes": cfg.synsets, "head": cfg.head}
    vocabulary = {"vocabulary.parquet": shards.path / "vocabulary.parquet"}
    return ReleaseParts(lambda name: name.removeprefix("backbone."), config, vocabulary)


PRESETS = {
    # MAWS gives no numbers for WSP in its main text; these are recipes §6.3's suggestions.
    "vit_b16": Config(
        model=ModelConfig(variant="vit_b16"),
        data=DataConfig(crop_scale=(0.08, 1.0), workers=8),
        optim=OptimConfig(
            batch_size=8192, lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0,
            schedule="linear", warmup=Duration(5, "percent"), length=Duration(1, "epochs"),
        ),
        mixup=0.1,
    ),
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
            batch_size=16, lr=2e-3, clip=1.0, warmup=Duration(2, "steps"), length=Duration(20, "steps"),
        ),
        checkpoint=CheckpointConfig(every=Duration(5, "steps")),
        log=LogConfig(every=1),
    ),
}  # fmt: skip
