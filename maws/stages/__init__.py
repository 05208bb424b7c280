"""Training stages: one file each, found by file name. The folder is the registry."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from data_pipeline.shardset import ShardSet
from maws.config import ConfigError, ModelConfig, TrainConfig, nearest
from maws.data.loader import StepDataset
from maws.data.order import Part
from maws.handover import Handover, load_backbone
from maws.models.attention import recomputed
from maws.models.flops import Cost
from maws.models.init import Gather
from maws.models.vit import POOLS, POSITIONS, VARIANTS, Options, Shape, VisionTransformer
from maws.optim import Rules
from maws.release import open_release


class ReleaseParts(NamedTuple):
    """What a stage's release holds."""

    rename: Callable[[str], str]  # parameter name in the objective -> name in model.safetensors; empty: left out
    config: dict[str, Any]  # how to rebuild the model
    files: dict[str, Path]  # further files, by name in the release


class Stage(Protocol):
    """The functions of a stage file (style: a stage is one file).

    One may also have `probe(objective, cfg, shards, run, part)`: what tells now and then, while training goes on, how
    good the features are (maws/probe.py); None when `probe.every` is 0. And `preprocess(cfg)`: how evaluation makes
    pictures for its release, where that is not the short side resized to the image size.
    """

    Config: type[TrainConfig]
    PRESETS: dict[str, TrainConfig]

    def prepare(self, cfg: Any, shards: ShardSet, run: Path) -> Any:
        """Fill in what follows from the data (number of synsets, tokenizer). All ranks call it."""

    def objective(self, cfg: Any, shards: ShardSet) -> nn.Module: ...

    def initialise(self, objective: Any, cfg: Any, gather: Gather) -> Handover | None:
        """Load what the stage starts from; parameters have their random initial values already.

        An image tower that was handed over is returned, for its parity to be checked before the first step.
        """

    def dataset(self, cfg: Any, shards: ShardSet, run: Path, part: Part) -> StepDataset: ...

    def param_rules(self, cfg: Any) -> Rules: ...

    def release(self, objective: Any, cfg: Any, shards: ShardSet, run: Path) -> ReleaseParts: ...

    def cost(self, cfg: Any) -> Cost:
        """Multiply-adds of one sample."""
        ...

    def example(self, cfg: Any, size: int) -> dict[str, Tensor]:
        """The tensors of a batch as shapes: on the meta device, without values."""
        ...


def names() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_"))


def load(name: str) -> Stage:
    """A stage by name. Raises ConfigError for an unknown one, with the nearest."""
    if name not in names():
        raise ConfigError(f"unknown stage {name!r}; {nearest(name, names())}")
    return importlib.import_module(f"maws.stages.{name}")  # type: ignore[return-value]


def preset(stage: str, name: str) -> TrainConfig:
    """A preset of a stage. Raises ConfigError for an unknown one, with the nearest."""
    presets = load(stage).PRESETS
    if name not in presets:
        raise ConfigError(f"stage {stage} has no preset {name!r}; {nearest(name, list(presets))}")
    return presets[name]


def shape_of(model: ModelConfig) -> Shape:
    """The ViT of a run. Raises ConfigError for an unknown variant and for tokens that do not go together."""
    if model.variant not in VARIANTS:
        raise ConfigError(f"model.variant={model.variant} is not known; {nearest(model.variant, list(VARIANTS))}")
    own = VARIANTS[model.variant]
    for name, value, known in (("positions", model.positions, POSITIONS), ("pool", model.pool, POOLS)):
        if value not in known:
            raise ConfigError(f"model.{name}={value} is not known; {nearest(value, known)}")
    if model.class_tokens < 0:
        raise ConfigError(f"model.class_tokens={model.class_tokens} cannot be less than 0")
    if model.pool == "cls" and not model.class_tokens:
        raise ConfigError("model.pool=cls needs a class token; set model.pool=mean or model.class_tokens=1")
    if model.positions == "relative" and model.class_tokens > 1:
        raise ConfigError("model.positions=relative knows at most one class token; set model.class_tokens=1")
    return dataclasses.replace(
        own,
        patch=model.patch or own.patch,
        class_tokens=model.class_tokens,
        positions=model.positions,
        pool=model.pool,
    )


def options_of(model: ModelConfig) -> Options:
    """How the ViT of a run computes. Raises ConfigError for an impossible drop path or checkpointing policy."""
    for name, rate in (("drop_path", model.drop_path), ("dropout", model.dropout)):
        if not 0 <= rate < 1:
            raise ConfigError(f"model.{name}={rate} must be at least 0 and less than 1")
    try:
        recomputed(model.checkpoint_blocks, 1)
    except ValueError as e:
        raise ConfigError(f"model.checkpoint_blocks: {e}") from None
    return Options(model.drop_path, model.dropout, model.fp32_attention, model.checkpoint_blocks)


def backbone(model: ModelConfig) -> VisionTransformer:
    """The ViT of a run, its parameters still without values. Raises ConfigError as the functions here do."""
    return VisionTransformer(shape_of(model), image_side(model), options_of(model))


def hand_over(tower: VisionTransformer, cfg: TrainConfig, gather: Gather) -> Handover | None:
    """Give a stage's tower the weights of `init_from`; None without one. Raises as `load_backbone` does."""
    return load_backbone(tower, open_release(cfg.init_from), gather, cfg.handover) if cfg.init_from else None


def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor that is only a shape, for a stage's `example`."""
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_images(model: ModelConfig, size: int, side: int = 0) -> Tensor:
    """Pictures that are only a shape: `size` of them, uint8, of the run's side or of `side` pixels."""
    side = side or image_side(model)
    return meta(size, 3, side, side, dtype=torch.uint8)


def image_side(model: ModelConfig) -> int:
    """The image side in pixels. Raises ConfigError for an unknown variant or a side its patches do not divide."""
    shape = shape_of(model)
    side = model.image_size or shape.image
    if side % shape.patch:
        raise ConfigError(
            f"model.image_size={side} must be a multiple of {model.variant}'s patch, {shape.patch}; "
            f"try {max(1, round(side / shape.patch)) * shape.patch}"
        )
    return side


def grid_of(model: ModelConfig) -> tuple[int, int]:
    """Rows and columns of patches. Raises ConfigError as `image_side` does."""
    side = image_side(model) // shape_of(model).patch
    return side, side


def patch_count(model: ModelConfig) -> int:
    """Patches of an image. Raises ConfigError as `image_side` does."""
    rows, cols = grid_of(model)
    return rows * cols
