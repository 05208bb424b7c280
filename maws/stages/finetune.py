"""Stage finetune: a classifier of a labelled set, full, in part, or from scratch (recipes §9.4, §9.5).

    python -m eval shards --data imagenet1k:train=/data/imagenet --classes imagenet1k --output shards/in1k
    deepspeed maws/train.py --stage finetune --preset mae_b16 --init-from runs/mae_b16 --run runs/finetune_b16 \\
        data.shards=shards/in1k probe.shards=shards/in1k_val probe.every="1 epochs"
    python -m eval finetune --run runs/finetune_b16 --data imagenet1k=/data/imagenet --classes imagenet1k

Without `--init-from` it starts from random values (`scratch_…`). `probe.shards` is a labelled set that is not trained
on: its accuracy goes to the log. No preset but `demo` and `debug` has been trained to its end by this project.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.shardset import ShardSet
from maws import dist
from maws.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    Duration,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    TrainConfig,
    override,
)
from maws.data.augment import AugmentConfig, LoadAugmented
from maws.data.loader import Sample, StepDataset, make_order
from maws.data.mix import Mix
from maws.data.order import Item, Part
from maws.data.transforms import Preprocess
from maws.handover import Handover
from maws.models import flops
from maws.models.init import Gather
from maws.objectives.classification import Classification, first_trained, frozen_patterns
from maws.optim import BASE, NO_DECAY, Rules, layer_wise
from maws.probe_accuracy import Accuracy, accuracy
from maws.stages import ReleaseParts, backbone, hand_over, image_side, meta, meta_images, shape_of

TOWER = "backbone."
MARGIN = 224 / 256  # of what evaluation resizes to, up to 224 pixels; larger images are seen whole (recipes §9.4)


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    trainable: str = "all"  # or the last K blocks ("last 4"), "half" (the MLP of the last one), "none" (the head alone)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    smoothing: float = 0.1  # of the labels
    head_std: float = 2e-5  # deviation of the head's initial weights
    crop: float = 0.0  # image size over the side evaluation resizes to; 0: 224/256 up to 224 pixels, else 1
    squash: bool = False  # evaluation resizes both sides, without a crop: MAWS's classifiers (recipes §11.4)
    classes: int = 0  # of the labelled set, filled in when the run starts


def prepare(cfg: Config, shards: ShardSet, run: Path) -> Config:
    cfg.augment.check()
    first_trained(cfg.trainable, shape_of(cfg.model).depth)
    if not 0 <= cfg.smoothing < 1:
        raise ConfigError(f"smoothing={cfg.smoothing} must be at least 0 and less than 1; 0.1 is usual")
    if not 0 <= cfg.head_std < float("inf"):
        raise ConfigError(f"head_std={cfg.head_std} must be 0 or more; MAE's is 2e-5")
    if not 0 <= cfg.crop <= 1:
        raise ConfigError(f"crop={cfg.crop} must lie between 0 (chosen by the image size) and 1 (the whole short side)")
    if cfg.trainable != "all" and not cfg.init_from:
        raise ConfigError(f"trainable={cfg.trainable} freezes random values; add --init-from RUN, or set trainable=all")
    if not shards.vocabulary:
        raise ConfigError(f"{shards.path} has no classes; {WAY_OUT}")
    refuse_several_labels(shards)
    return dataclasses.replace(cfg, classes=len(shards.vocabulary))


WAY_OUT = "write a labelled set with `python -m eval shards --data DATA --classes CLASSES --output FOLDER`"


def refuse_several_labels(shards: ShardSet) -> None:
    """Raises ConfigError when a picture has more than one; every rank reads its share of the indexes."""
    several = 0
    for shard in range(dist.rank(), shards.num_shards, dist.world_size()):
        for part in shards.index(shard).column("labels").chunks:
            several += int((part.value_lengths().to_numpy() > 1).sum())
    if total := sum(dist.gather_objects(several)):
        raise ConfigError(
            f"{total:,} of the {len(shards):,} pictures of {shards.path} have several labels, and finetuning is to one "
            f"class each; {WAY_OUT}, or train on synsets with --stage wsp"
        )


def objective(cfg: Config, shards: ShardSet) -> Classification:
    frozen = None if cfg.trainable == "all" else first_trained(cfg.trainable, shape_of(cfg.model).depth)
    return Classification(
        backbone(cfg.model), cfg.classes, cfg.data.mean, cfg.data.std, cfg.smoothing, cfg.head_std, frozen
    )


def initialise(objective: Classification, cfg: Config, gather: Gather) -> Handover | None:
    return hand_over(objective.backbone, cfg, gather)


def dataset(cfg: Config, shards: ShardSet, run: Path, part: Part) -> StepDataset:
    order = make_order(cfg.data, shards, cfg.seed, cfg.optim.batch_size, labelled=True)
    if cfg.augment.mixes and not cfg.data.streams and order.per_stream == 1 < order.streams:
        half = dataclasses.replace(
            cfg.data, streams=order.streams // 2
        )  # of two, each has a neighbour to be mixed with
        order = make_order(half, shards, cfg.seed, cfg.optim.batch_size, labelled=True)
    image = LoadAugmented(cfg.data, cfg.augment, shards, cfg.seed, image_side(cfg.model))
    mix = Mix(cfg.augment, cfg.seed, order, part) if cfg.augment.mixes else None
    return StepDataset(order, part, LoadClass(image, shards), mix)


@dataclass
class LoadClass:
    """An image and the number of its class."""

    image: LoadAugmented
    shards: ShardSet

    def __call__(self, item: Item) -> Sample:
        (label,) = self.shards.index(item.shard).column("labels")[item.row].as_py()
        return self.image(item) | {"label": torch.tensor(label, dtype=torch.int64)}


def param_rules(cfg: Config) -> Rules:
    depth = shape_of(cfg.model).depth
    rules = [
        *((pattern, None) for pattern in frozen_patterns(cfg.trainable, depth, TOWER)),
        (r".*(bias|norm\d?\.weight|cls_token|pos_embed)", NO_DECAY),  # 1-D, cls_token and pos_embed (recipes §9.4)
        (r".*", BASE),
    ]
    return layer_wise(rules, TOWER, depth, cfg.optim.layer_decay)


def probe(objective: Classification, cfg: Config, shards: ShardSet, run: Path, part: Part) -> Accuracy | None:
    return accuracy(objective.backbone, objective.head, cfg, shards, part, preprocess(cfg))


def preprocess(cfg: Config) -> Preprocess:
    """How evaluation makes pictures: the short side resized, the centre cut; or both sides resized."""
    side = image_side(cfg.model)
    share = 1.0 if cfg.squash else cfg.crop or (MARGIN if side <= 224 else 1.0)
    resize = int(side / share)
    return Preprocess(side, 0 if resize == side else resize, cfg.data.mean, cfg.data.std, squash=cfg.squash)


def release(objective: Classification, cfg: Config, shards: ShardSet, run: Path) -> ReleaseParts:
    vocabulary = {"vocabulary.parquet": shards.path / "vocabulary.parquet"}
    config = {"classes": cfg.classes, "trainable": cfg.trainable}
    return ReleaseParts(lambda name: name.removeprefix(TOWER), config, vocabulary)


def cost(cfg: Config) -> flops.Cost:
    shape = shape_of(cfg.model)
    trained = shape.depth - first_trained(cfg.trainable, shape.depth)
    blocks = {"all": None, "half": 0.5}.get(cfg.trainable, float(trained))
    return flops.classifier(shape, image_side(cfg.model), cfg.classes or flops.CLASSES, blocks)


def example(cfg: Config, size: int) -> dict[str, Tensor]:
    batch = {"image": meta_images(cfg.model, size), "label": meta(size)}
    if cfg.augment.mixes:
        batch |= {"label_other": meta(size), "mix_weight": meta(size, dtype=torch.float32)}
    return batch


# ------------------------------------------------------------------------------------------------------------- presets


def mae(variant: str, lr: float, layer_decay: float, epochs: int, drop_path: float, **optim: Any) -> Config:
    """The settings that reproduce MAE's finetuning at 224 px (recipes §9.4: mae repo, FINETUNE.md)."""
    return Config(
        model=ModelConfig(variant=variant, pool="mean_norm", drop_path=drop_path),
        data=DataConfig(crop_scale=(0.08, 1.0), resample=False, workers=8),
        optim=OptimConfig(
            batch_size=1024, lr=lr, lr_batch=256, betas=(0.9, 0.999), weight_decay=0.05, schedule="cosine",
            min_lr=1e-6, warmup=Duration(5, "epochs"), layer_decay=layer_decay, length=Duration(epochs, "epochs"),
            **optim,
        ),
        checkpoint=CheckpointConfig(every=Duration(1, "epochs")),
    )  # fmt: skip


def suggested(variant: str, lr: float, layer_decay: float, epochs: int, drop_path: float) -> Config:
    """For WSP and MAWS models: the class token, and MAE's components (recipes §9.4). MAWS gives no numbers: these are
    suggestions, the learning rates of L, H and 2B are ours between those of B and 6.5B.
    """
    cfg = mae(variant, lr, layer_decay, epochs, drop_path, ema=0.9999)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, pool="cls"))


def scratch(variant: str, epochs: int, drop_path: float) -> Config:
    """Supervised from random values: the baseline of MAE A.2 (recipes §9.4). Its pool is not given: the class token."""
    return Config(
        model=ModelConfig(variant=variant, drop_path=drop_path),
        data=DataConfig(crop_scale=(0.08, 1.0), resample=False, workers=8),
        optim=OptimConfig(
            batch_size=4096, lr=1e-4, lr_batch=256, betas=(0.9, 0.95), weight_decay=0.3, schedule="cosine",
            warmup=Duration(20, "epochs"), ema=0.9999, length=Duration(epochs, "epochs"),
        ),
        checkpoint=CheckpointConfig(every=Duration(1, "epochs")),
    )  # fmt: skip


PRESETS = {
    "vit_b16": suggested("vit_b16", 5e-4, 0.65, 100, 0.1),
    "vit_l16": suggested("vit_l16", 4e-4, 0.75, 50, 0.2),
    "vit_h14": suggested("vit_h14", 3.5e-4, 0.8, 50, 0.3),
    "vit_2b14": override(suggested("vit_2b14", 3e-4, 0.85, 50, 0.4), ["model.checkpoint_blocks=all"]),
    "vit_6.5b14": override(suggested("vit_6.5b14", 2.5e-4, 0.9, 50, 0.5), ["model.checkpoint_blocks=all"]),
    "mae_b16": mae("vit_b16", 5e-4, 0.65, 100, 0.1),  # 83.66 %
    "mae_l16": mae("vit_l16", 1e-3, 0.75, 50, 0.2),  # 85.95 %
    "mae_h14": mae("vit_h14", 1e-3, 0.75, 50, 0.3),  # 86.93 %
    "scratch_b16": scratch("vit_b16", 300, 0.1),
    "scratch_l16": scratch("vit_l16", 200, 0.2),
    "scratch_h14": scratch("vit_h14", 200, 0.2),
}
# Of the released classifiers: 512 px for patches of 16, 518 for 14, whole pictures squashed (recipes §9.4, §11.4).
PRESETS |= {
    f"{name}_{side}": override(PRESETS[name], [f"model.image_size={side}", "squash=yes", "model.checkpoint_blocks=all"])
    for name, side in (
        ("vit_b16", 512), ("vit_l16", 512), ("vit_h14", 518), ("vit_2b14", 518), ("vit_6.5b14", 518),
    )
}  # fmt: skip
PRESETS["mae_h14_448"] = override(PRESETS["mae_h14"], ["model.image_size=448"])  # 87.8 %; its settings: not found
# Partial finetuning of MAE's ViT-L (recipes §9.5): its epochs are the best of 50, 100 and 200, so try all three.
PARTS = {"none": "none", "half": "half", **{f"last{k}": f"last {k}" for k in (1, 2, 4, 6, 12, 18, 24)}}
PRESETS |= {f"mae_l16_{name}": override(PRESETS["mae_l16"], [f"trainable={part}"]) for name, part in PARTS.items()}

PRESETS |= {
    # ours: minutes on two CPU cores; a few epochs of a few pictures a class cannot pay for MAE's augmentation
    "demo": Config(
        model=ModelConfig(variant="nano"),
        data=DataConfig(crop_scale=(0.5, 1.0), resample=False),
        optim=OptimConfig(
            batch_size=64, lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05, layer_decay=0.75, clip=1.0,
            schedule="cosine", warmup=Duration(5, "percent"), length=Duration(300, "steps"),
        ),
        augment=AugmentConfig(rand_augment="", erase=0.1, mixup=0.0, cutmix=0.0),
    ),
    "debug": Config(
        model=ModelConfig(variant="atto"),
        data=DataConfig(resample=False),
        optim=OptimConfig(
            batch_size=16, lr=2e-3, betas=(0.9, 0.999), clip=1.0, warmup=Duration(2, "steps"),
            length=Duration(40, "steps"),
        ),
        augment=AugmentConfig(mixup=0.2, cutmix=0.0, erase=0.0),
        checkpoint=CheckpointConfig(every=Duration(10, "steps")),
        probe=ProbeConfig(queries=30),
        log=LogConfig(every=1),
    ),
}  # fmt: skip
