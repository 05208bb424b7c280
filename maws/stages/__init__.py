"""Training stages: one file each, found by file name. The folder is the registry."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import nn

from data_pipeline.shardset import ShardSet
from maws.config import ConfigError, ModelConfig, TrainConfig, nearest
from maws.data.loader import StepDataset
from maws.data.order import Part
from maws.models.init import Gather
from maws.models.vit import VARIANTS
from maws.optim import Rules


class ReleaseParts(NamedTuple):
    """What a stage's release holds."""

    rename: Callable[[str], str]  # parameter name in the objective -> name in model.safetensors
    config: dict[str, Any]  # how to rebuild the model
    files: dict[str, Path]  # further files, by name in the release


class Stage(Protocol):
    """The functions of a stage file (style: a stage is one file)."""

    Config: type[TrainConfig]
    PRESETS: dict[str, TrainConfig]

    def prepare(self, cfg: Any, shards: ShardSet, run: Path) -> Any:
        """Fill in what follows from the data (number of synsets, tokenizer). All ranks call it."""

    def objective(self, cfg: Any, shards: ShardSet) -> nn.Module: ...

    def initialise(self, objective: Any, cfg: Any, gather: Gather) -> None:
        """Load what the stage starts from; parameters have their random initial values already."""

    def dataset(self, cfg: Any, shards: ShardSet, run: Path, part: Part) -> StepDataset: ...

    def param_rules(self, cfg: Any) -> Rules: ...

    def release(self, objective: Any, cfg: Any, shards: ShardSet, run: Path) -> ReleaseParts: ...


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


def image_side(model: ModelConfig) -> int:
    """The image side in pixels. Raises ConfigError for an unknown variant or a side its patches do not divide."""
    if model.variant not in VARIANTS:
        raise ConfigError(f"model.variant={model.variant} is not known; {nearest(model.variant, list(VARIANTS))}")
    shape = VARIANTS[model.variant]
    side = model.image_size or shape.image
    if side % shape.patch:
        raise ConfigError(
            f"model.image_size={side} must be a multiple of {model.variant}'s patch, {shape.patch}; "
            f"try {max(1, round(side / shape.patch)) * shape.patch}"
        )
    return side


def patch_count(model: ModelConfig) -> int:
    """Patches of an image. Raises ConfigError as `image_side` does."""
    return (image_side(model) // VARIANTS[model.variant].patch) ** 2
