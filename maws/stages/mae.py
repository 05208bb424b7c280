"""Stage mae: masked autoencoding of images, the pre-pretraining of MAWS (He et al., 2021; Singh et al., 2023, §3).

    deepspeed maws/train.py --stage mae --preset demo --run runs/demo/mae data.shards=runs/demo/shards

Reads the images of a shard set; captions and synsets play no part, but the resampling does (recipes §5.2-8).
`vit_b16` holds the paper's numbers and has not been trained by this project.
"""

from dataclasses import dataclass, field
from pathlib import Path

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
from maws.data.loader import LoadImage, Sample, StepDataset, make_order
from maws.data.masks import random_mask, visible_patches
from maws.data.order import Item, Part
from maws.models.init import Gather
from maws.models.mae import DecoderShape, MaskedAutoencoder
from maws.models.vit import VARIANTS
from maws.objectives.masked_pixels import MaskedPixels
from maws.optim import BASE, NO_DECAY, Rules
from maws.release import describe, load_backbone, open_release
from maws.stages import ReleaseParts, image_side, patch_count


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    mask_ratio: float = 0.75
    norm_pix: bool = True  # the target is each patch with its own mean and deviation taken out
    decoder: DecoderShape = field(default_factory=DecoderShape)


def prepare(cfg: Config, shards: ShardSet, run: Path) -> Config:
    if not 0 < cfg.mask_ratio < 1:
        raise ConfigError(f"mask_ratio={cfg.mask_ratio} must lie between 0 and 1; the paper's is 0.75")
    patches = patch_count(cfg.model)
    if not 0 < visible_patches(patches, cfg.mask_ratio) < patches:
        raise ConfigError(f"mask_ratio={cfg.mask_ratio} leaves no patch visible or none masked of {patches}")
    return cfg


def objective(cfg: Config, shards: ShardSet) -> MaskedPixels:
    autoencoder = MaskedAutoencoder(
        VARIANTS[cfg.model.variant], image_side(cfg.model), cfg.decoder, cfg.model.checkpoint_blocks
    )
    keep = visible_patches(patch_count(cfg.model), cfg.mask_ratio)
    return MaskedPixels(autoencoder, keep, cfg.data.mean, cfg.data.std, cfg.norm_pix)


def initialise(objective: MaskedPixels, cfg: Config, gather: Gather) -> None:
    if cfg.init_from:
        load_backbone(objective.autoencoder, open_release(cfg.init_from), gather)


def dataset(cfg: Config, shards: ShardSet, run: Path, part: Part) -> StepDataset:
    order = make_order(cfg.data, shards, cfg.seed, cfg.optim.batch_size)
    image = LoadImage(cfg.data, shards, cfg.seed, image_side(cfg.model))
    return StepDataset(order, part, LoadMasked(image, cfg.seed, patch_count(cfg.model)))


@dataclass
class LoadMasked:
    """An image and which of its patches are hidden, drawn from (seed, epoch, key): the same on any world size."""

    image: LoadImage
    seed: int
    patches: int

    def __call__(self, item: Item) -> Sample:
        mask = random_mask(item.stream(self.seed, "mask"), self.patches)
        return self.image(item) | {"ids_shuffle": torch.from_numpy(mask)}


def param_rules(cfg: Config) -> Rules:
    return [
        (r".*pos_embed", None),  # fixed sine-cosine tables
        (r".*(bias|norm\d?\.weight|cls_token|mask_token)", NO_DECAY),
        (r".*", BASE),
    ]


def release(objective: MaskedPixels, cfg: Config, shards: ShardSet, run: Path) -> ReleaseParts:
    config = {"decoder": describe(cfg.decoder), "mask_ratio": cfg.mask_ratio, "norm_pix": cfg.norm_pix}
    return ReleaseParts(lambda name: name.removeprefix("autoencoder."), config, {})


PRESETS = {
    # recipes §2.5, MAWS column; warm-up is NOT FOUND there and follows its suggestion.
    "vit_b16": Config(
        model=ModelConfig(variant="vit_b16"),
        data=DataConfig(crop_scale=(0.2, 1.0), workers=8),
        optim=OptimConfig(
            batch_size=4096, lr=1.5e-4, lr_batch=256, betas=(0.9, 0.95), weight_decay=0.05,
            schedule="cosine", warmup=Duration(5, "percent"), length=Duration(1, "epochs"),
        ),
    ),
    # ours: 2.7M + 0.3M parameters, minutes on two CPU cores
    "demo": Config(
        model=ModelConfig(variant="nano"),
        data=DataConfig(crop_scale=(0.5, 1.0)),
        optim=OptimConfig(
            batch_size=128, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05,
            schedule="cosine", warmup=Duration(5, "percent"), length=Duration(300, "steps"),
        ),
        decoder=DecoderShape(width=96, depth=2, heads=3),
    ),
    "debug": Config(
        model=ModelConfig(variant="atto"),
        optim=OptimConfig(
            batch_size=16, lr=2e-3, warmup=Duration(2, "steps"), length=Duration(20, "steps"),
        ),
        checkpoint=CheckpointConfig(every=Duration(5, "steps")),
        log=LogConfig(every=1),
        decoder=DecoderShape(width=32, depth=1, heads=2),
    ),
}  # fmt: skip
