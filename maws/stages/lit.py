"""Stage lit: lock a pretrained image tower and train a text tower against it (Zhai et al., 2022; MAWS §4.1).

    deepspeed maws/train.py --stage lit --preset demo --init-from runs/demo/mae_wsp --run runs/demo/lit \\
        data.shards=runs/demo/shards

Reads images and captions of a shard set. Without `text.pretrained` the text tower starts from random values and a
SentencePiece tokenizer is trained from the captions. `vit_b16` has not been trained by this project.
"""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

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
    TrainConfig,
    nearest,
)
from maws.data.captions import CaptionCleaner, CaptionConfig
from maws.data.loader import LoadImage, Sample, StepDataset, make_order
from maws.data.order import Item, Part
from maws.data.tokenizer import PretrainedTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from maws.handover import Handover
from maws.models import flops
from maws.models.init import Gather
from maws.models.text import TEXT_VARIANTS, TextShape, TextTower, load_pretrained
from maws.models.two_tower import TwoTower
from maws.objectives.contrastive import Contrastive
from maws.optim import BASE, NO_DECAY, Rules, Treatment, layer_wise
from maws.probe import ZeroShot, zero_shot
from maws.release import describe
from maws.stages import ReleaseParts, backbone, hand_over, image_side, meta, meta_images, shape_of

log = logging.getLogger(__name__)

MAX_TOKENIZER_CAPTIONS = 1_000_000  # ours: enough to learn pieces from


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    variant: str  # a key of models.text.TEXT_VARIANTS
    pretrained: str = ""  # XLM-R weights and tokenizer: a local folder or a hub name; empty: random, own tokenizer
    vocabulary: int = 0  # ids of the tokenizer, filled in when the run starts
    lr_scale: float = 1.0  # of the text tower against the projections


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    text: TextConfig
    joint_width: int
    lock: str = "image"  # the tower that is not trained: image, text or none
    loss: str = "clip"  # or siglip
    chunk: int = 0  # captions scored at once against this rank's images; 0: chosen
    captions: CaptionConfig = field(default_factory=CaptionConfig)


def prepare(cfg: Config, shards: ShardSet, run: Path) -> Config:
    if not cfg.init_from:
        raise ConfigError(
            "stage lit locks a trained image tower and needs one: add --init-from RUN (an mae or wsp run)"
        )
    if cfg.lock not in ("image", "text", "none"):
        raise ConfigError(f"lock={cfg.lock} is not known; use image, text or none")
    if cfg.lock == "image" and cfg.optim.layer_decay != 1:
        raise ConfigError(
            f"optim.layer_decay={cfg.optim.layer_decay} is for the image tower, which lock=image does not train; "
            f"set lock=none or lock=text, or leave layer_decay at 1"
        )
    if cfg.text.variant not in TEXT_VARIANTS:
        raise ConfigError(
            f"text.variant={cfg.text.variant} is not known; {nearest(cfg.text.variant, list(TEXT_VARIANTS))}"
        )
    tokenizer = _tokenizer(cfg, shards, run)
    if cfg.text.vocabulary not in (0, tokenizer.vocabulary):
        raise ConfigError(f"text.vocabulary={cfg.text.vocabulary}, but the tokenizer has {tokenizer.vocabulary} ids")
    return dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, vocabulary=tokenizer.vocabulary))


def objective(cfg: Config, shards: ShardSet) -> Contrastive:
    towers = TwoTower(backbone(cfg.model), TextTower(_text_shape(cfg)), cfg.joint_width, cfg.lock)
    return Contrastive(towers, cfg.data.mean, cfg.data.std)


def initialise(objective: Contrastive, cfg: Config, gather: Gather) -> Handover | None:
    if cfg.text.pretrained:
        load_pretrained(objective.towers.text, cfg.text.pretrained, gather, writer=dist.rank() == 0)
    return hand_over(objective.towers.image, cfg, gather)


def dataset(cfg: Config, shards: ShardSet, run: Path, part: Part) -> StepDataset:
    order = make_order(cfg.data, shards, cfg.seed, cfg.optim.batch_size)
    image = LoadImage(cfg.data, shards, cfg.seed, image_side(cfg.model))
    return StepDataset(order, part, LoadPair(image, shards, _tokenizer(cfg, shards, run), CaptionCleaner(cfg.captions)))


@dataclass
class LoadPair:
    """An image and its caption's tokens."""

    image: LoadImage
    shards: ShardSet
    tokenizer: Tokenizer
    clean: CaptionCleaner

    def __call__(self, item: Item) -> Sample:
        caption = self.shards.record(item.shard, item.row).get("caption") or ""
        ids, mask = self.tokenizer([self.clean(caption)])
        return self.image(item) | {"token_ids": ids[0], "token_mask": mask[0]}


def param_rules(cfg: Config) -> Rules:
    """`optim.layer_decay` is the image tower's, where that is trained; the text tower has `text.lr_scale`."""
    rules = [
        *([(rf"towers\.{cfg.lock}\..*", None)] if cfg.lock != "none" else []),
        (r"towers\.text\..*(bias|LayerNorm\.weight)", Treatment(decay=0.0, lr=cfg.text.lr_scale)),
        (r"towers\.text\..*", Treatment(lr=cfg.text.lr_scale)),
        (r".*(bias|norm\d?\.weight|cls_token|pos_embed|logit_scale)", NO_DECAY),
        (r".*", BASE),
    ]
    return layer_wise(rules, "towers.image.", shape_of(cfg.model).depth, cfg.optim.layer_decay)


def probe(objective: Contrastive, cfg: Config, shards: ShardSet, run: Path, part: Part) -> ZeroShot | None:
    return zero_shot(objective.towers, _tokenizer(cfg, shards, run), cfg, shards, part)


def release(objective: Contrastive, cfg: Config, shards: ShardSet, run: Path) -> ReleaseParts:
    config = {"text": describe(_text_shape(cfg)), "joint_width": cfg.joint_width}
    return ReleaseParts(lambda name: name.removeprefix("towers."), config, {"tokenizer": run / "tokenizer"})


def cost(cfg: Config) -> flops.Cost:
    """Also of the products with every caption and every image of the batch."""
    shape, side, text = shape_of(cfg.model), image_side(cfg.model), _text_shape(cfg)
    return flops.locked_image_text(shape, side, text, cfg.joint_width, cfg.optim.batch_size, cfg.lock)


def example(cfg: Config, size: int) -> dict[str, Tensor]:
    tokens = _text_shape(cfg).context + 2  # <s> and </s>
    image = meta_images(cfg.model, size)
    return {"image": image, "token_ids": meta(size, tokens), "token_mask": meta(size, tokens)}


def _text_shape(cfg: Config) -> TextShape:
    return dataclasses.replace(TEXT_VARIANTS[cfg.text.variant], vocabulary=cfg.text.vocabulary)


def _tokenizer(cfg: Config, shards: ShardSet, run: Path) -> Tokenizer:
    """The run's tokenizer; rank 0 makes RUN/tokenizer when it is not there yet."""
    folder, shape = run / "tokenizer", TEXT_VARIANTS[cfg.text.variant]
    if dist.rank() == 0 and not folder.is_dir():
        made: Tokenizer
        if cfg.text.pretrained:
            made = PretrainedTokenizer(cfg.text.pretrained, shape.context)
        else:
            made = train_tokenizer(_captions(shards), shape.vocabulary, shape.context)
            log.info("tokenizer trained from the captions: %d ids", made.vocabulary)
        tmp = run / "tmp-tokenizer"
        made.save(tmp)
        tmp.rename(folder)
    dist.barrier()
    return load_tokenizer(folder, shape.context)


def _captions(shards: ShardSet) -> Iterator[str]:
    """The captions of the set in stored order, at most a million."""
    left = MAX_TOKENIZER_CAPTIONS
    for shard, rows in enumerate(shards.shard_sizes):
        for row in range(min(rows, left)):
            yield shards.record(shard, row).get("caption") or ""
        left -= min(rows, left)


PRESETS = {
    # MAWS gives no optimizer for LiT; these are recipes §8.3's suggestions.
    "vit_b16": Config(
        model=ModelConfig(variant="vit_b16"),
        data=DataConfig(crop_scale=(0.9, 1.0), flip=False, workers=8),
        optim=OptimConfig(
            batch_size=32768, lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0,
            schedule="cosine", warmup=Duration(2000, "steps"), length=Duration(1, "epochs"),
        ),
        text=TextConfig(variant="xlmr_base", pretrained="FacebookAI/xlm-roberta-base", lr_scale=0.25),
        joint_width=768,
    ),
    "demo": Config(
        model=ModelConfig(variant="nano"),
        data=DataConfig(crop_scale=(0.8, 1.0), flip=False, resample=False),
        optim=OptimConfig(
            batch_size=128, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0,
            schedule="cosine", warmup=Duration(5, "percent"), length=Duration(250, "steps"),
        ),
        text=TextConfig(variant="nano"),
        joint_width=128,
    ),
    "debug": Config(
        model=ModelConfig(variant="atto"),
        data=DataConfig(flip=False),
        optim=OptimConfig(
            batch_size=16, lr=2e-3, clip=1.0, warmup=Duration(2, "steps"), length=Duration(40, "steps"),
        ),
        checkpoint=CheckpointConfig(every=Duration(10, "steps")),
        log=LogConfig(every=1),
        text=TextConfig(variant="atto"),
        joint_width=32,
    ),
}  # fmt: skip
