"""Stage lc_mae: masked autoencoding guided by a momentum target that sees whole pictures (Kim et al., 2023).

    deepspeed maws/train.py --stage lc_mae --preset demo --run runs/lc_mae data.shards=shards/

Reads the images of a shard set. The release is the online encoder and decoder under MAE's names, so everything that
starts from or looks at an MAE run takes one of these.

    vit_s16, vit_b16, vit_l16             the paper's runs (recipes §4.4)
    vit_b16_ablation, vit_b16_infonce …   400 epochs, and each row of its Table 5 (ABLATIONS; recipes §4.6)
    lc_simmim                             SimMIM in MAE's place (recipes §4.7)

They hold the papers' numbers; this project has trained only `demo` and `debug`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

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
    nearest,
    override,
)
from maws.data.loader import LoadImage, LoadMasked, LoadTwoViews, StepDataset, make_order
from maws.data.masks import Masking
from maws.data.order import Part
from maws.data.views import DISTORTED, View, view_of
from maws.handover import Handover
from maws.models import flops
from maws.models.guided import GuidedAutoencoder, GuidedSimMIM
from maws.models.heads import NORMS
from maws.models.init import Gather
from maws.models.mae import DecoderShape
from maws.models.vit import VisionTransformer
from maws.objectives.momentum_guidance import (
    Guidance,
    MomentumGuidance,
    Online,
    reconstruct_patches,
    reconstruct_pixels,
)
from maws.objectives.targets import Pixels
from maws.optim import EMBEDDINGS, NO_DECAY, Rules, layer_wise
from maws.probe import Knn, knn
from maws.release import describe
from maws.stages import (
    ReleaseParts,
    grid_of,
    hand_over,
    image_side,
    mae,
    meta,
    meta_images,
    options_of,
    patch_count,
    shape_of,
    simmim,
)

MODELS = ("mae", "simmim")


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    mim: str = "mae"  # what is guided: mae, or simmim (then decoder and norm_pix mean nothing)
    mask: Masking = field(default_factory=Masking)
    norm_pix: bool = True  # mae predicts each patch with its own mean and deviation taken out
    decoder: DecoderShape = field(default_factory=DecoderShape)
    guidance: Guidance = field(default_factory=Guidance)


def prepare(cfg: Config, shards: ShardSet, run: Path) -> Config:
    if cfg.mim not in MODELS:
        raise ConfigError(f"mim={cfg.mim} is not known; {nearest(cfg.mim, MODELS)}")
    if cfg.guidance.pooled == "cls" and not cfg.model.class_tokens:
        raise ConfigError(
            "guidance.pooled=cls needs a class token; set guidance.pooled=patches or model.class_tokens=1"
        )
    rows, cols = grid = grid_of(cfg.model)
    cfg.mask.check(grid)
    cfg.guidance.check(rows * cols, cfg.mask.keep(grid))
    try:
        with torch.device("meta"):
            objective(cfg, shards)
    except (ValueError, AssertionError) as e:  # timm asserts that heads divide a width
        raise ConfigError(f"model.*, decoder.* and guidance.* do not go together: {e}") from None
    return cfg


def objective(cfg: Config, shards: ShardSet) -> MomentumGuidance:
    keep, online = cfg.mask.keep(grid_of(cfg.model)), _online(cfg)
    reconstruction = reconstruct_pixels(keep)
    if isinstance(online, GuidedAutoencoder):
        reconstruction = reconstruct_patches(Pixels(online.prediction_patch, cfg.norm_pix), keep)
    target = _target(cfg) if cfg.guidance.loss != "none" else None
    return MomentumGuidance(online, target, keep, cfg.data.mean, cfg.data.std, reconstruction, cfg.guidance)


def _online(cfg: Config) -> Online:
    shape, side, options = shape_of(cfg.model), image_side(cfg.model), options_of(cfg.model)
    if cfg.mim == "simmim":
        return GuidedSimMIM(shape, side, options, cfg.guidance.guided)
    return GuidedAutoencoder(shape, side, cfg.decoder, options, cfg.guidance.guided)


def _target(cfg: Config) -> VisionTransformer:
    if cfg.mim == "mae" and cfg.guidance.guided == "all":
        return _online(cfg)  # the guided tokens are the decoder's, so the target has one as well
    return VisionTransformer(shape_of(cfg.model), image_side(cfg.model), options_of(cfg.model))


def initialise(objective: MomentumGuidance, cfg: Config, gather: Gather) -> Handover | None:
    """The online branch alone: the target becomes a copy of it when the engine is built."""
    return hand_over(objective.online.encoder, cfg, gather)


def views(cfg: Config) -> tuple[View, View]:
    """The run's own view, and the same with colours distorted as well (recipes §4.2)."""
    first = view_of(cfg.data)
    return first, replace(
        first,
        jitter=DISTORTED.jitter,
        jitter_probability=DISTORTED.jitter_probability,
        three_augment=DISTORTED.three_augment,
    )


def dataset(cfg: Config, shards: ShardSet, run: Path, part: Part) -> StepDataset:
    """Two views, of one crop where tokens are compared place by place; a single one where there is no target."""
    order, side = make_order(cfg.data, shards, cfg.seed, cfg.optim.batch_size), image_side(cfg.model)
    if cfg.guidance.loss == "none":
        load = LoadImage(cfg.data, shards, cfg.seed, side)
    else:
        load = LoadTwoViews(cfg.data, *views(cfg), shards, cfg.seed, side, same_crop=cfg.guidance.level != "global")
    return StepDataset(order, part, LoadMasked(load, cfg.mask, grid_of(cfg.model), cfg.seed))


def param_rules(cfg: Config) -> Rules:
    """`optim.layer_decay` is the online encoder's; the target follows it."""
    masked = cfg.mim == "simmim"
    own = simmim.rules(cfg.model) if masked else mae.rules(cfg.model)
    rules = [(r"target\..*", None), (rf".*(projector|predictor)\.\w+\.{NORMS}", NO_DECAY), *own]
    tokens = (*EMBEDDINGS, "mask_token") if masked else EMBEDDINGS
    return layer_wise(rules, "online.encoder.", shape_of(cfg.model).depth, cfg.optim.layer_decay, tokens)


def probe(objective: MomentumGuidance, cfg: Config, shards: ShardSet, run: Path, part: Part) -> Knn | None:
    return knn(objective.online.encoder, cfg, shards, part)


def release(objective: MomentumGuidance, cfg: Config, shards: ShardSet, run: Path) -> ReleaseParts:
    """Online encoder and decoder; projector, predictor and target stay behind."""
    config = {"mim": cfg.mim, "mask": describe(cfg.mask), "guidance": describe(cfg.guidance)}
    if cfg.mim == "mae":
        config |= {
            "decoder": describe(cfg.decoder),
            "target": {"kind": "norm_pixels" if cfg.norm_pix else "pixels"},
        }
    own = "online.encoder."
    return ReleaseParts(lambda name: name.removeprefix(own) if name.startswith(own) else "", config, {})


def cost(cfg: Config) -> flops.Cost:
    """Each view through the online branch and through the target's; the first one's masked patches are predicted."""
    shape, side, g, keep = shape_of(cfg.model), image_side(cfg.model), cfg.guidance, cfg.mask.keep(grid_of(cfg.model))
    views = 2 if g.symmetric and g.loss != "none" else 1
    decodes_all = cfg.mim == "mae" and g.guided == "all" and g.loss != "none"  # the guided tokens are the decoder's
    if cfg.mim == "simmim":
        encode, decode = flops.trunk(shape, side), 0
        predict = flops.simmim(shape, side, keep).trained - encode
    else:
        encode = flops.encoder(shape, side, 0, skip=True, keep=keep)
        predicted = patch_count(cfg.model) - (0 if cfg.decoder.reduction != "none" else keep)
        predict = predicted * cfg.decoder.width * 3 * shape.patch**2
        decode = flops.decoder(shape, cfg.decoder, side, 0, skip=True, keep=keep) - predict
    online = views * encode + (views if decodes_all else 1) * decode + predict
    if g.loss == "none":
        return flops.Cost(online)
    width = cfg.decoder.width if decodes_all else shape.width
    guided = patch_count(cfg.model) if g.guided == "all" else keep
    rows = (g.level in ("global", "both")) + guided * (g.level in ("tokens", "both"))
    projector, predictor = (
        flops.head(width, g.hidden, g.projector_depth),
        flops.head(width, g.hidden, g.predictor_depth),
    )
    seen = g.target_patches(patch_count(cfg.model))
    target = flops.encoder(shape, side, 0, skip=True, keep=seen)
    if decodes_all:
        target += flops.decoder(shape, cfg.decoder, side, 0, skip=True, keep=seen, outputs=1)
        target -= (patch_count(cfg.model) - seen) * cfg.decoder.width  # nothing is predicted
    return flops.Cost(online + views * rows * (projector + predictor), views * (target + rows * projector))


def example(cfg: Config, size: int) -> dict[str, Tensor]:
    batch = {"image": meta_images(cfg.model, size), "ids_shuffle": meta(size, patch_count(cfg.model))}
    return batch | ({"image_other": meta_images(cfg.model, size)} if cfg.guidance.loss != "none" else {})


def _paper(variant: str, epochs: int, alpha: float) -> Config:
    """recipes §4.4, with the code's betas; alpha of ViT-L is NOT FOUND and follows its suggestion."""
    return Config(
        model=ModelConfig(variant=variant),
        data=DataConfig(crop="simple", resample=False, workers=8),
        guidance=Guidance(alpha=alpha),
        optim=OptimConfig(
            batch_size=4096, lr=1.5e-4, lr_batch=256, betas=(0.9, 0.95), weight_decay=0.05,
            schedule="cosine", warmup=Duration(40, "epochs"), length=Duration(epochs, "epochs"),
        ),
    )  # fmt: skip


PRESETS = {
    "vit_s16": _paper("vit_s16", 400, alpha=1.0),
    "vit_b16": _paper("vit_b16", 1600, alpha=0.25),
    "vit_l16": _paper("vit_l16", 1600, alpha=0.25),
    "vit_b16_ablation": _paper("vit_b16", 400, alpha=0.25),
}
# Table 5: each row changes what it says and no more. Its defaults (cosine, global, target mask 0, patches, visible,
# SRC, alpha 0.25) are `vit_b16_ablation`.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "infonce": ("guidance.loss=infonce",),
    "smooth_l1": ("guidance.loss=smooth_l1",),
    "mae_rrc": ("guidance.loss=none", "data.crop=resized"),  # also the row "loss none", which has the same results
    "mae_src": ("guidance.loss=none",),
    "rrc": ("data.crop=resized",),
    "tokens": ("guidance.level=tokens",),  # and with it one crop for both views
    "both": ("guidance.level=both",),
    "target_mask50": ("guidance.target_mask_ratio=0.5",),
    "target_mask75": ("guidance.target_mask_ratio=0.75",),
    "cls": ("guidance.pooled=cls",),
    "visible_and_mask": ("guidance.guided=all",),
    **{f"alpha{n}": (f"guidance.alpha={n}",) for n in (0.1, 0.5, 1.0)},
    "one_way": ("guidance.symmetric=no",),  # not a row: the paper's text without its code (recipes §4.1)
}
PRESETS |= {f"vit_b16_{row}": override(PRESETS["vit_b16_ablation"], changes) for row, changes in ABLATIONS.items()}

PRESETS |= {
    # model, masks, optimiser and schedule of simmim's vit_b16_100ep; the views stay LC-MAE's
    "lc_simmim": Config(
        mim="simmim",
        model=simmim.PRESETS["vit_b16_100ep"].model,
        mask=simmim.PRESETS["vit_b16_100ep"].mask,
        data=DataConfig(crop="simple", resample=False, workers=8),
        guidance=Guidance(alpha=0.25),
        optim=simmim.PRESETS["vit_b16_100ep"].optim,
    ),
    # ours: the demo's encoder, minutes on two CPU cores; so few steps need a target that follows faster
    "demo": Config(
        model=ModelConfig(variant="nano"),
        data=DataConfig(crop_scale=(0.5, 1.0)),
        guidance=Guidance(momentum=0.98, hidden=256),
        optim=OptimConfig(batch_size=64, lr=1e-3, length=Duration(200, "steps")),
        decoder=DecoderShape(width=96, depth=2, heads=3),
    ),
    "debug": Config(
        model=ModelConfig(variant="atto"),
        data=DataConfig(crop="simple"),
        guidance=Guidance(momentum=0.9, hidden=48),
        optim=OptimConfig(batch_size=16, lr=2e-3, warmup=Duration(2, "steps"), length=Duration(40, "steps")),
        checkpoint=CheckpointConfig(every=Duration(10, "steps")),
        log=LogConfig(every=1),
        decoder=DecoderShape(width=32, depth=1, heads=2),
    ),
}
