"""Stage mae: masked autoencoding of images, the pre-pretraining of MAWS (He et al., 2021; Singh et al., 2023, §3).

    deepspeed maws/train.py --stage mae --preset demo --run runs/demo/mae data.shards=runs/demo/shards

Reads the images of a shard set; captions and synsets play no part, but the resampling does (recipes §5.2-8).

    vit_b16 … vit_6.5b14               MAWS: one epoch of billions of images (recipes §2.5)
    vit_6.5b14_bf16                    the same in bfloat16 with attention in float32; the paper's is float32
    vit_b16_in1k …                     MAE on ImageNet-1k, 1600 epochs
    vit_l16_ablation, vit_l16_block50 …   one row each of MAE's Table 1 (ABLATIONS; recipes §2.3)
    long_b16_448, long_b16_448_ld196 …    long-sequence MAE (LONG_SEQUENCE; recipes §3, §10.5)
    pixio_h16                          a deep decoder, blocks of 4 x 4 patches, 8 class tokens

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
    EngineConfig,
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
from maws.models.mae import DecoderShape, MaskedAutoencoder, long_sequence_decoder
from maws.models.vit import VARIANTS
from maws.objectives.masked_patches import MaskedPatches
from maws.objectives.targets import Target, TargetConfig, make_target
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


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    mask: Masking = field(default_factory=Masking)
    target: TargetConfig = field(default_factory=TargetConfig)
    decoder: DecoderShape = field(default_factory=DecoderShape)
    encode_mask_tokens: bool = False  # the encoder sees a mask token for every masked patch: 3.3 times the compute


def prepare(cfg: Config, shards: ShardSet, run: Path) -> Config:
    cfg.mask.check(grid_of(cfg.model))
    d = cfg.decoder
    if d.depth < 1 or d.heads < 1 or d.width % d.heads or d.width % 4:
        raise ConfigError(
            f"decoder.width={d.width}, depth={d.depth}, heads={d.heads}: the width must be a multiple of the heads and "
            f"of 4 (its sine-cosine positions), depth and heads at least 1; MAE's are 512, 8 and 16"
        )
    try:
        with torch.device("meta"):  # one block of each is enough to see
            one = replace(shape_of(cfg.model), depth=1)
            MaskedAutoencoder(one, image_side(cfg.model), replace(d, depth=1), options_of(cfg.model))
    except ValueError as e:
        raise ConfigError(f"model.* and decoder.* do not go together: {e}") from None
    _target(cfg).check()
    return cfg


def objective(cfg: Config, shards: ShardSet) -> MaskedPatches:
    target, shape, options = _target(cfg), shape_of(cfg.model), options_of(cfg.model)
    autoencoder = MaskedAutoencoder(
        shape, image_side(cfg.model), cfg.decoder, options, target.outputs, cfg.encode_mask_tokens
    )
    return MaskedPatches(autoencoder, cfg.mask.keep(grid_of(cfg.model)), cfg.data.mean, cfg.data.std, target)


def _target(cfg: Config) -> Target:
    times = 2 if cfg.decoder.reduction != "none" and not cfg.decoder.restore else 1  # side of a predicted patch
    patch, (rows, cols) = times * shape_of(cfg.model).patch, grid_of(cfg.model)
    side, grid = image_side(cfg.model), (rows // times, cols // times)
    return make_target(cfg.target, patch, side, grid, cfg.data.mean, cfg.data.std)


def initialise(objective: MaskedPatches, cfg: Config, gather: Gather) -> Handover | None:
    return hand_over(objective.autoencoder, cfg, gather)


def dataset(cfg: Config, shards: ShardSet, run: Path, part: Part) -> StepDataset:
    order = make_order(cfg.data, shards, cfg.seed, cfg.optim.batch_size)
    second = cfg.target.image_size if cfg.target.kind == "tokens" else 0
    image = LoadImage(cfg.data, shards, cfg.seed, image_side(cfg.model), second)
    return StepDataset(order, part, LoadMasked(image, cfg.mask, grid_of(cfg.model), cfg.seed))


def param_rules(cfg: Config) -> Rules:
    """`optim.layer_decay` is the encoder's; the decoder is above it."""
    tokens = (*EMBEDDINGS, "mask_token") if cfg.encode_mask_tokens else EMBEDDINGS
    return layer_wise(rules(cfg.model), "autoencoder.", shape_of(cfg.model).depth, cfg.optim.layer_decay, tokens)


def rules(model: ModelConfig) -> Rules:
    """No decay of what has one axis; sine-cosine tables stay as they are."""
    fixed = r".*pos_embed" if model.positions == "sincos" else r".*decoder_pos_embed"
    return [
        (fixed, None),
        (r".*(bias|norm\d?\.weight)", NO_DECAY),  # tokens have three axes and decay (recipes §2.5)
        (r".*", BASE),
    ]


def probe(objective: MaskedPatches, cfg: Config, shards: ShardSet, run: Path, part: Part) -> Knn | None:
    return knn(objective.autoencoder, cfg, shards, part)


def release(objective: MaskedPatches, cfg: Config, shards: ShardSet, run: Path) -> ReleaseParts:
    config = {
        "decoder": describe(cfg.decoder),
        "mask": describe(cfg.mask),
        "target": describe(cfg.target),
        "encode_mask_tokens": cfg.encode_mask_tokens,
    }
    return ReleaseParts(lambda name: name.removeprefix("autoencoder."), config, {})


def cost(cfg: Config) -> flops.Cost:
    """Masked patches are never embedded, visible ones never predicted."""
    outputs = cfg.target.components if cfg.target.kind == "pca" else _target(cfg).outputs
    return flops.masked_autoencoder(
        shape_of(cfg.model), image_side(cfg.model), cfg.decoder, skip=True, keep=cfg.mask.keep(grid_of(cfg.model)),
        mask_tokens=cfg.encode_mask_tokens, outputs=outputs,
    )  # fmt: skip


def example(cfg: Config, size: int) -> dict[str, Tensor]:
    batch = {"image": meta_images(cfg.model, size), "ids_shuffle": meta(size, patch_count(cfg.model))}
    if cfg.target.kind == "tokens" and cfg.target.image_size:
        batch["image_second"] = meta_images(cfg.model, size, cfg.target.image_size)
    return batch


def _maws(variant: str, precision: str = "auto") -> Config:
    """recipes §2.5, MAWS column: one epoch of its data; warm-up is NOT FOUND there and follows its suggestion."""
    return Config(
        model=ModelConfig(variant=variant),
        data=DataConfig(crop_scale=(0.2, 1.0), workers=8),
        optim=OptimConfig(
            batch_size=4096, lr=1.5e-4, lr_batch=256, betas=(0.9, 0.95), weight_decay=0.05,
            schedule="cosine", warmup=Duration(5, "percent"), length=Duration(1, "epochs"),
        ),
        engine=EngineConfig(precision=precision),
    )  # fmt: skip


SIZES = ("vit_ti16", "vit_s16", "vit_b16", "vit_l16", "vit_h14", "vit_2b14")
PRESETS = {variant: _maws(variant) for variant in SIZES}
PRESETS["vit_6.5b14"] = _maws("vit_6.5b14", "fp32")  # it diverged in half precision (recipes §2.6)
# Ours, not tried at this size: half the memory and float32 where others found the trouble, in q k^T and its softmax
# (recipes §2.6); the loss and the master weights are float32 in any case.
PRESETS["vit_6.5b14_bf16"] = override(PRESETS["vit_6.5b14"], ["engine.precision=bf16", "model.fp32_attention=yes"])

# A picture of ImageNet-1k is seen once an epoch, whatever its classes: no repeat factors.
IN1K = ("optim.length=1600 epochs", "optim.warmup=40 epochs", "data.resample=no")
PRESETS |= {f"{variant}_in1k": override(PRESETS[variant], IN1K) for variant in ("vit_b16", "vit_l16", "vit_h14")}

# MAE's ablations are 800 epochs of ViT-L with plain pixels as targets; each row below changes what it says and no more.
PRESETS["vit_l16_ablation"] = override(PRESETS["vit_l16_in1k"], ["optim.length=800 epochs", "target.kind=pixels"])
ABLATIONS: dict[str, tuple[str, ...]] = {
    "block50": ("mask.kind=block", "mask.ratio=0.5"),
    "block75": ("mask.kind=block",),
    "grid75": ("mask.kind=grid",),
    "norm_pixels": ("target.kind=norm_pixels",),
    "pca": ("target.kind=pca",),  # and target.file=…
    "tokens": ("target.kind=tokens", "target.image_size=112"),  # and target.tokenizer=…
    "encoder_mask_tokens": ("encode_mask_tokens=yes",),
    **{f"decoder_depth{n}": (f"decoder.depth={n}",) for n in (1, 2, 4, 12)},
    **{f"decoder_width{n}": (f"decoder.width={n}",) for n in (128, 256, 768, 1024)},
    "no_augmentation": ("data.crop=centre",),
    "fixed_crop": ("data.crop=fixed",),
    "colour_jitter": ("data.jitter=0.4,0.4,0.2,0.1",),  # its strength is NOT FOUND for MAE; this is LC-MAE's
}
PRESETS |= {f"vit_l16_{row}": override(PRESETS["vit_l16_ablation"], changes) for row, changes in ABLATIONS.items()}


# Long sequences: 28 x 28 patches, hidden as squares of 2 x 2, and a decoder of half the encoder's width with as many
# heads (recipes §3.3). Rows of recipes §10.5 change what they say; `_le` and `_ld` are lengths of encoder and decoder.
def _with_its_decoder(variant: str) -> tuple[str, ...]:
    decoder = long_sequence_decoder(VARIANTS[variant])
    return f"model.variant={variant}", f"decoder.width={decoder.width}", f"decoder.heads={decoder.heads}"


PRESETS["long_b16_448"] = override(
    PRESETS["vit_b16_in1k"],
    ["optim.length=800 epochs", "model.image_size=448", "mask.kind=unit", "mask.unit=2", *_with_its_decoder("vit_b16")],
)
VIT_L, VIT_H = _with_its_decoder("vit_l16"), _with_its_decoder("vit_h14")
LONG_SEQUENCE: dict[str, tuple[str, ...]] = {
    "long_b16_224": ("model.image_size=224", "mask.unit=1"),  # the baseline, L=196
    "long_b16_224_4x": ("model.image_size=224", "mask.unit=1", "optim.length=3200 epochs"),
    **{f"long_b16_{side}": (f"model.image_size={side}",) for side in (320, 384, 512)},
    "long_b16_448_m1": ("mask.unit=1",),
    "long_b16_448_m4": ("mask.unit=4",),
    "long_b16_448_le49": ("mask.ratio=0.9375",),
    "long_b16_448_ld196": ("decoder.reduction=conv",),
    "long_b16_448_ld196_average": ("decoder.reduction=average",),
    "long_b16_448_ld196_restore": ("decoder.reduction=conv", "decoder.restore=yes"),
    "long_b8_224": ("model.image_size=224", "model.patch=8"),
    "long_b24_672": ("model.image_size=672", "model.patch=24"),
    "long_l16_224": (*VIT_L, "model.image_size=224", "mask.unit=1"),
    "long_l16_448": VIT_L,
    "long_h14_224": (*VIT_H, "model.image_size=224"),
    "long_h7_224": (*VIT_H, "model.image_size=224", "model.patch=7"),
}
PRESETS |= {row: override(PRESETS["long_b16_448"], changes) for row, changes in LONG_SEQUENCE.items()}

# Epochs by data set (recipes §3.4). COCO's 40 epochs of warm-up were epochs of a folder that held it several times.
LONG_DATA: dict[str, tuple[str, ...]] = {
    "coco": ("optim.length=4000 epochs", "optim.warmup=200 epochs"),  # train2017 and unlabeled2017
    "coco_train": ("optim.length=8000 epochs", "optim.warmup=400 epochs"),  # its warm-up: ours, the same share
    "in1k_1600": ("optim.length=1600 epochs",),
    "openimages": ("optim.length=800 epochs",),
    "places": ("optim.length=600 epochs",),
}
PRESETS |= {
    f"{base}_{data}": override(PRESETS[base], changes)
    for base in ("long_b16_224", "long_b16_448", "long_l16_224", "long_l16_448")
    for data, changes in LONG_DATA.items()
}

# Pixio: its decoder, blocks of 4 x 4, class tokens and picture size; what else it does differently is not known to us,
# so the rest is MAWS's ViT-H with patches of 16.
PRESETS["pixio_h16"] = override(
    PRESETS["vit_h14"],
    ["model.patch=16", "model.image_size=256", "model.class_tokens=8", "decoder.depth=32",
     "mask.kind=unit", "mask.unit=4"],
)  # fmt: skip

PRESETS |= {
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
            batch_size=16, lr=2e-3, warmup=Duration(2, "steps"), length=Duration(40, "steps"),
        ),
        checkpoint=CheckpointConfig(every=Duration(10, "steps")),
        log=LogConfig(every=1),
        decoder=DecoderShape(width=32, depth=1, heads=2),
    ),
}  # fmt: skip
