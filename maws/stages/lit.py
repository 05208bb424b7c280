"""Stage lit: lock a pretrained image tower and train a text tower against it (Zhai et al., 2022; MAWS §4.1).

    deepspeed maws/train.py --stage lit --preset demo --init-from runs/demo/mae_wsp --run runs/demo/lit \\
        data.shards=runs/demo/shards

Reads images and captions of a shard set; with data.features=cache what `maws cache-features` made of the images.
Without `text.pretrained` the text tower starts from random values and a SentencePiece tokenizer is trained from the
captions. The ablations of LiT are settings: lock=none trains both towers, lock=text the image tower alone.
The presets `vit_…` have not been trained by this project.
"""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.shardset import ShardSet
from maws import dist
from maws.checkpoint import complete
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
from maws.data.loader import Load, LoadImage, Sample, StepDataset, make_order
from maws.data.order import Item, Part
from maws.data.tokenizer import Tokenizer, load_pretrained_tokenizer, load_tokenizer, train_tokenizer
from maws.feature_cache import FeatureCache, LoadFeatures, Source, command, open_cache
from maws.files import whole_folder, write_json
from maws.handover import Handover
from maws.models import flops
from maws.models.init import Gather
from maws.models.text import TEXT_VARIANTS, TextShape, TextTower
from maws.models.two_tower import CLIP_VARIANTS, TwoTower
from maws.objectives.contrastive import LOSSES, Contrastive
from maws.optim import BASE, NO_DECAY, Rules, Treatment, layer_wise
from maws.pretrained_text import load_pretrained, pretrained_sha256, shape_from
from maws.probe import ZeroShot, zero_shot
from maws.release import describe, open_release
from maws.stages import ReleaseParts, backbone, hand_over, image_side, meta, meta_images, shape_of

log = logging.getLogger(__name__)

MAX_TOKENIZER_CAPTIONS = 1_000_000  # ours: enough to learn pieces from
SURVEYED_CAPTIONS = 2000  # ours: what cleaning changes is counted on so many, spread over the set
LOCKS, FEATURES = ("image", "text", "none"), ("images", "cache")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    variant: str  # a key of models.text.TEXT_VARIANTS; empty: as text.pretrained says
    pretrained: str = ""  # weights and tokenizer: a folder, hub name or LiT release; empty: random, own tokenizer
    context: int = 0  # pieces of a caption that are read; 0: as many as the variant
    pool: str = ""  # what a caption is: its "first" token or the "mean" of all; empty: as the variant
    vocabulary: int = 0  # ids of the tower, filled in when the run starts
    shape: dict[str, Any] = field(default_factory=dict)  # all of its sizes, filled in when the run starts
    lr_scale: float = 1.0  # of the text tower against the projections


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    text: TextConfig
    joint_width: int
    lock: str = "image"  # the tower that is not trained: image, text or none
    loss: str = "clip"  # or siglip
    chunk: int = 0  # captions scored at once against this rank's images: memory is images x chunk; 0: chosen
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    text_sha256: str = ""  # hash of the weights of text.pretrained, filled in when the run starts
    features_sha256: str = ""  # of the manifest of cached features, filled in when the run starts


def prepare(cfg: Config, shards: ShardSet, run: Path) -> Config:
    _check(cfg)
    tokenizer = _tokenizer(cfg, shards, run, anew=not complete(run / "checkpoints"))
    shape = _text_shape(cfg)
    if cfg.text.pretrained and tokenizer.vocabulary > shape.vocabulary:
        raise ConfigError(
            f"text.pretrained={cfg.text.pretrained}: its tokenizer has {tokenizer.vocabulary} ids, the tower "
            f"{shape.vocabulary}; they are not of one model"
        )
    ids = shape.vocabulary if cfg.text.pretrained else tokenizer.vocabulary
    if cfg.text.vocabulary not in (0, ids):
        raise ConfigError(f"text.vocabulary={cfg.text.vocabulary}, but the tokenizer has {ids} ids")
    text = dataclasses.replace(cfg.text, vocabulary=ids, shape=asdict(dataclasses.replace(shape, vocabulary=ids)))
    cache = _cache(cfg, shards)
    if cache:
        cache.verify(Part(dist.rank(), dist.world_size()))
        log.info("%s: %d crops a sample, of seed %d", cache.folder, cache.crops, cache.manifest["seed"])
    if dist.rank() == 0:
        _survey(cfg.captions, shards, run)
    return dataclasses.replace(
        cfg, text=text, text_sha256=_text_sha256(cfg), features_sha256=cache.sha256 if cache else ""
    )


def _check(cfg: Config) -> None:
    """Raises ConfigError for settings that cannot be, or not together."""
    for name, value, known in (
        ("lock", cfg.lock, LOCKS), ("loss", cfg.loss, LOSSES), ("data.features", cfg.data.features, FEATURES),
    ):  # fmt: skip
        if value not in known:
            raise ConfigError(f"{name}={value} is not known; {nearest(value, known)}")
    if cfg.chunk < 0:
        raise ConfigError(f"chunk={cfg.chunk} must be a number of captions, or 0 to have it chosen")
    if cfg.lock == "image" and not cfg.init_from:
        raise ConfigError(
            "stage lit locks a trained image tower and needs one: add --init-from RUN (an mae or wsp run); "
            "with lock=none or lock=text it is trained, and may start from random values"
        )
    if cfg.lock == "image" and cfg.optim.layer_decay != 1:
        raise ConfigError(
            f"optim.layer_decay={cfg.optim.layer_decay} is for the image tower, which lock=image does not train; "
            f"set lock=none or lock=text, or leave layer_decay at 1"
        )
    if cfg.data.features == "cache" and cfg.lock != "image":
        raise ConfigError(f"data.features=cache is of a locked image tower; lock={cfg.lock} trains it")
    if cfg.text.variant and cfg.text.variant not in TEXT_VARIANTS:
        raise ConfigError(
            f"text.variant={cfg.text.variant} is not known; {nearest(cfg.text.variant, list(TEXT_VARIANTS))}"
        )
    if not cfg.text.variant and not cfg.text.pretrained:
        raise ConfigError(f"text.variant is empty; name one of {', '.join(TEXT_VARIANTS)}, or set text.pretrained")
    if cfg.lock == "text" and not cfg.text.pretrained:
        log.warning("lock=text without text.pretrained: the text tower keeps its random values")
    if cfg.optim.micro_batch and cfg.optim.micro_batch * dist.world_size() < cfg.optim.batch_size:
        log.warning(
            "optim.micro_batch=%d: a pair is told from those of its micro-step, %d, and not of the whole batch, %d",
            cfg.optim.micro_batch, cfg.optim.micro_batch * dist.world_size(), cfg.optim.batch_size,
        )  # fmt: skip


def objective(cfg: Config, shards: ShardSet) -> Contrastive:
    text = TextTower(_text_shape(cfg))
    towers = TwoTower(backbone(cfg.model), text, cfg.joint_width, cfg.lock, bias=cfg.loss == "siglip")
    return Contrastive(towers, cfg.data.mean, cfg.data.std, cfg.chunk)


def initialise(objective: Contrastive, cfg: Config, gather: Gather) -> Handover | None:
    if cfg.text.pretrained:
        load_pretrained(objective.towers.text, cfg.text.pretrained, gather, writer=dist.rank() == 0)
    return hand_over(objective.towers.image, cfg, gather)


def dataset(cfg: Config, shards: ShardSet, run: Path, part: Part) -> StepDataset:
    order = make_order(cfg.data, shards, cfg.seed, cfg.optim.batch_size)
    cache = _cache(cfg, shards)
    image = LoadFeatures(cache) if cache else LoadImage(cfg.data, shards, cfg.seed, image_side(cfg.model))
    return StepDataset(order, part, LoadPair(image, shards, _tokenizer(cfg, shards, run), CaptionCleaner(cfg.captions)))


@dataclass
class LoadPair:
    """An image, or its features, and its caption's tokens."""

    image: Load
    shards: ShardSet
    tokenizer: Tokenizer
    clean: CaptionCleaner

    def __call__(self, item: Item) -> Sample:
        caption = self.shards.record(item.shard, item.row).get("caption") or ""
        ids, mask = self.tokenizer([self.clean(caption)])
        return self.image(item) | {"token_ids": ids[0], "token_mask": mask[0]}


def param_rules(cfg: Config) -> Rules:
    """`optim.layer_decay` is the image tower's, where that is trained; the text tower has `text.lr_scale`."""
    text: Rules = [
        (r"towers\.text\..*(bias|LayerNorm\.weight)", Treatment(decay=0.0, lr=cfg.text.lr_scale)),
        (r"towers\.text\..*", Treatment(lr=cfg.text.lr_scale)),
    ]
    rules = [
        *([(rf"towers\.{cfg.lock}\..*", None)] if cfg.lock != "none" else []),
        *(text if cfg.lock != "text" else []),  # a pattern is one row of the table
        (r".*(bias|norm\d?\.weight|cls_token|pos_embed|logit_scale)", NO_DECAY),
        (r".*", BASE),
    ]
    return layer_wise(rules, "towers.image.", shape_of(cfg.model).depth, cfg.optim.layer_decay)


def probe(objective: Contrastive, cfg: Config, shards: ShardSet, run: Path, part: Part) -> ZeroShot | None:
    return zero_shot(objective.towers, _tokenizer(cfg, shards, run), cfg, shards, part)


def release(objective: Contrastive, cfg: Config, shards: ShardSet, run: Path) -> ReleaseParts:
    config = {"text": describe(_text_shape(cfg)), "joint_width": cfg.joint_width, "loss": cfg.loss}
    return ReleaseParts(lambda name: name.removeprefix("towers."), config, {"tokenizer": run / "tokenizer"})


def cost(cfg: Config) -> flops.Cost:
    """Also of the products with every caption and every image of the batch."""
    both = flops.locked_image_text(
        shape_of(cfg.model), image_side(cfg.model), _text_shape(cfg), cfg.joint_width,
        cfg.optim.batch_size, cfg.lock, cfg.loss,
    )  # fmt: skip
    return flops.Cost(both.trained) if cfg.data.features == "cache" else both


def example(cfg: Config, size: int) -> dict[str, Tensor]:
    tokens = _text_shape(cfg).context + 2  # <s> and </s>
    captions = {"token_ids": meta(size, tokens), "token_mask": meta(size, tokens)}
    if cfg.data.features == "cache":
        return {"features": meta(size, shape_of(cfg.model).width, dtype=torch.float32), **captions}
    return {"image": meta_images(cfg.model, size), **captions}


def _text_shape(cfg: Config) -> TextShape:
    """Of the run, once it has started; before, as the variant or the pretrained tower says."""
    if cfg.text.shape:
        return TextShape(**cfg.text.shape)
    shape = TEXT_VARIANTS[cfg.text.variant] if cfg.text.variant else shape_from(cfg.text.pretrained)
    chosen = {k: value for k in ("context", "pool", "vocabulary") if (value := getattr(cfg.text, k))}
    try:
        return dataclasses.replace(shape, **chosen)
    except ValueError as e:
        raise ConfigError(f"text.context={cfg.text.context}, text.pool={cfg.text.pool or shape.pool}: {e}") from None


def _text_sha256(cfg: Config) -> str:
    """What a locked text tower is known by: it is in no checkpoint. Rank 0 reads the files."""
    if not cfg.text.pretrained:
        return ""
    return dist.broadcast(pretrained_sha256(cfg.text.pretrained) if dist.rank() == 0 else "")


def _cache(cfg: Config, shards: ShardSet) -> FeatureCache | None:
    """The cached features of the run. Raises ConfigError or DataError when they are not there or not those."""
    if cfg.data.features != "cache":
        return None
    source = Source.of(cfg.data, cfg.init_sha256, shape_of(cfg.model), image_side(cfg.model))
    tower = open_release(cfg.init_from)
    released = Source.of(cfg.data, cfg.init_sha256, tower.shape, tower.config["image_size"])
    if changed := source.differences(released.as_json()):
        raise ConfigError(
            f"data.features=cache: {cfg.init_from} is of {', '.join(changed)}, and features are of the tower as it was "
            f"released; set model.* to the same, or leave data.features at images"
        )
    return open_cache(shards, source, partial(command, cfg.init_from, cfg.data.shards, cfg.data, cfg.seed))


def _survey(captions: CaptionConfig, shards: ShardSet, run: Path) -> None:
    """Count on some captions, spread over the set, what cleaning changes: to the log and RUN/captions.json."""
    clean, ends = CaptionCleaner(captions), np.cumsum(shards.shard_sizes)
    for place in np.unique(np.linspace(0, len(shards) - 1, SURVEYED_CAPTIONS).astype(int)):
        shard = int(np.searchsorted(ends, place, side="right"))
        try:
            clean.clean(shards.record(shard, int(place - ends[shard])).get("caption") or "")
        except DataError:  # the loader counts and names it when its turn comes
            continue
    counts = {name: count for name, count in clean.counts.most_common() if count and name != "captions"}
    said = ", ".join(f"{name} {count}" for name, count in counts.items()) or "nothing"
    log.info("captions: cleaning %d of them changed: %s", clean.counts["captions"], said)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "captions.json", {"captions": clean.counts["captions"], "changed": counts})


def _tokenizer(cfg: Config, shards: ShardSet, run: Path, anew: bool = False) -> Tokenizer:
    """The run's tokenizer; rank 0 makes RUN/tokenizer when it is not there yet. `anew`: also when it is, because what
    a start left that came to no checkpoint may be of other settings.
    """
    folder, shape = run / "tokenizer", _text_shape(cfg)
    if dist.rank() == 0 and (anew or not folder.is_dir()):
        made: Tokenizer
        if cfg.text.pretrained:
            made = load_pretrained_tokenizer(cfg.text.pretrained, shape.context)
        else:
            clean = CaptionCleaner(cfg.captions).clean
            made = train_tokenizer(_captions(shards), shape.vocabulary, shape.context, clean)
            log.info("tokenizer trained from the captions: %d ids", made.vocabulary)
        with whole_folder(folder) as tmp:
            made.save(tmp)
    dist.barrier()
    return load_tokenizer(folder, shape.context)


def _captions(shards: ShardSet) -> Iterator[str]:
    """The captions of the set in stored order, at most a million."""
    left = MAX_TOKENIZER_CAPTIONS
    for shard, rows in enumerate(shards.shard_sizes):
        for row in range(min(rows, left)):
            yield shards.record(shard, row).get("caption") or ""
        left -= min(rows, left)


def paper(name: str) -> Config:
    """A pair of MAWS's towers (recipes §8.1). MAWS gives no optimizer for LiT; these are recipes §8.3's suggestions."""
    pair = CLIP_VARIANTS[name]
    pretrained = {"xlmr_base": "FacebookAI/xlm-roberta-base", "xlmr_large": "FacebookAI/xlm-roberta-large"}[pair.text]
    return Config(
        model=ModelConfig(variant=pair.image),
        data=DataConfig(crop_scale=(0.9, 1.0), flip=False, workers=8),
        optim=OptimConfig(
            batch_size=32768, lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0,
            schedule="cosine", warmup=Duration(2000, "steps"), length=Duration(1, "epochs"),
        ),
        text=TextConfig(variant=pair.text, pretrained=pretrained, lr_scale=0.25),
        joint_width=pair.joint_width,
    )  # fmt: skip


PRESETS = {
    **{name: paper(name) for name in CLIP_VARIANTS},
    "vit_b16": paper("vit_b16_xlmr_b"),  # the same by the name of its image tower
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
