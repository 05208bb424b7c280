"""Stage simmim: predict the pixels of masked patches from all positions, with a linear decoder (Xie et al., 2021).

    deepspeed maws/train.py --stage simmim --preset demo --run runs/simmim data.shards=shards/

Reads the images of a shard set. Its releases hold a ViT with relative positions and no table, and are used like MAE's:
`--init-from`, features, linear probes. LC-SimMIM is in stages/lc_mae.py.

    vit_b16         ViT-B, 800 epochs (recipes §4.7)
    vit_b16_100ep   100 epochs: what LC-SimMIM is compared with

They hold the papers' numbers; this project has trained only `demo` and `debug`.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data_pipeline.shardset import ShardSet
from maws.config import (
    CheckpointConfig,
    DataConfig,
    Duration,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    override,
)
from maws.data.loader import LoadImage, LoadMasked, StepDataset, make_order
from maws.data.masks import Masking
from maws.data.order import Part
from maws.handover import Handover
from maws.models import flops
from maws.models.init import Gather
from maws.models.simmim import SimMIM
from maws.objectives.simmim import MaskedPixelsL1
from maws.optim import BASE, EMBEDDINGS, NO_DECAY, Rules, layer_wise
from maws.probe import Knn, knn
from maws.release import describe
from maws.stages import (
    ReleaseParts,
    grid_of,
    hand_over,
    image_side,
    meta,
    meta_images,
    options_of,
    patch_count,
    shape_of,
)

UNITS = Masking(kind="unit", ratio=0.6, unit=2, whole_units=True)  # 32 pixels of ViT-B's 16


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    mask: Masking = UNITS


def prepare(cfg: Config, shards: ShardSet, run: Path) -> Config:
    cfg.mask.check(grid_of(cfg.model))
    options_of(cfg.model)
    return cfg


def objective(cfg: Config, shards: ShardSet) -> MaskedPixelsL1:
    model = SimMIM(shape_of(cfg.model), image_side(cfg.model), options_of(cfg.model))
    return MaskedPixelsL1(model, cfg.mask.keep(grid_of(cfg.model)), cfg.data.mean, cfg.data.std)


def initialise(objective: MaskedPixelsL1, cfg: Config, gather: Gather) -> Handover | None:
    return hand_over(objective.model, cfg, gather)


def dataset(cfg: Config, shards: ShardSet, run: Path, part: Part) -> StepDataset:
    order = make_order(cfg.data, shards, cfg.seed, cfg.optim.batch_size)
    image = LoadImage(cfg.data, shards, cfg.seed, image_side(cfg.model))
    return StepDataset(order, part, LoadMasked(image, cfg.mask, grid_of(cfg.model), cfg.seed))


def param_rules(cfg: Config) -> Rules:
    """The mask token is an embedding here: the encoder sees it."""
    tokens = (*EMBEDDINGS, "mask_token")
    return layer_wise(rules(cfg.model), "model.", shape_of(cfg.model).depth, cfg.optim.layer_decay, tokens)


def rules(model: ModelConfig) -> Rules:
    """No decay of what has one axis and of the class token; mask token and relative positions decay, as officially."""
    frozen = [(r".*pos_embed", None)] if model.positions == "sincos" else []
    return [*frozen, (r".*(bias|norm\d?\.weight|cls_token|pos_embed)", NO_DECAY), (r".*", BASE)]


def probe(objective: MaskedPixelsL1, cfg: Config, shards: ShardSet, run: Path, part: Part) -> Knn | None:
    return knn(objective.model, cfg, shards, part)


def release(objective: MaskedPixelsL1, cfg: Config, shards: ShardSet, run: Path) -> ReleaseParts:
    return ReleaseParts(lambda name: name.removeprefix("model."), {"mask": describe(cfg.mask)}, {})


def cost(cfg: Config) -> flops.Cost:
    return flops.simmim(shape_of(cfg.model), image_side(cfg.model), cfg.mask.keep(grid_of(cfg.model)))


def example(cfg: Config, size: int) -> dict[str, Tensor]:
    return {"image": meta_images(cfg.model, size), "ids_shuffle": meta(size, patch_count(cfg.model))}


PRESETS = {
    # recipes §4.7; betas and clipping are the official configuration's, whose learning rates are for batches of 512
    "vit_b16": Config(
        model=ModelConfig(variant="vit_b16", positions="relative", drop_path=0.1),
        data=DataConfig(crop_scale=(0.67, 1.0), resample=False, workers=8),
        optim=OptimConfig(
            batch_size=2048, lr=1e-4, lr_batch=512, betas=(0.9, 0.999), weight_decay=0.05, clip=5.0,
            schedule="multistep", milestone=Duration(700, "epochs"), warmup=Duration(10, "epochs"), warmup_lr=5e-7,
            length=Duration(800, "epochs"),
        ),
    ),
    # ours: the demo's encoder, minutes on two CPU cores
    "demo": Config(
        model=ModelConfig(variant="nano", positions="relative"),
        data=DataConfig(crop_scale=(0.67, 1.0)),
        optim=OptimConfig(batch_size=64, lr=1e-3, clip=5.0, length=Duration(200, "steps")),
    ),
    "debug": Config(
        model=ModelConfig(variant="atto", positions="relative"),
        mask=Masking(kind="unit", ratio=0.6, unit=1, whole_units=True),
        optim=OptimConfig(batch_size=16, lr=4e-3, warmup=Duration(2, "steps"), length=Duration(40, "steps")),
        checkpoint=CheckpointConfig(every=Duration(10, "steps")),
        log=LogConfig(every=1),
    ),
}  # fmt: skip
# The schedule of 100 epochs of a ViT is NOT FOUND; the official configurations of that length have a cosine.
PRESETS["vit_b16_100ep"] = override(PRESETS["vit_b16"], ["optim.length=100 epochs", "optim.schedule=cosine"])
