"""Run configuration: frozen dataclasses, durations, `a.b=value` overrides, and the JSON form kept in a run folder."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from data_pipeline.errors import UsageError

STAGE_NAMES = {  # for people
    "mae": "MAE", "lc_mae": "LC-MAE", "simmim": "SimMIM", "wsp": "WSP", "lit": "LiT", "finetune": "fine-tuned",
    "imported": "imported",
}  # fmt: skip
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # recipes §0


class ConfigError(UsageError):
    """A setting that cannot be used: what was asked, the rule, the way out."""


@dataclass(frozen=True)
class Duration:
    """A length of training: `400 epochs`, `1000 steps`, or `5%` of the whole."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Self:
        word = str(text).strip().lower().replace("%", " percent").split()
        units = {"step": "steps", "steps": "steps", "epoch": "epochs", "epochs": "epochs", "percent": "percent"}
        try:
            value, unit = float(word[0]), units[word[1]]
        except (ValueError, KeyError, IndexError):
            raise ConfigError(f"{text!r} is not a duration; write '400 epochs', '1000 steps' or '5%'") from None
        if not 0 <= value < float("inf"):
            raise ConfigError(f"a duration cannot be {text!r}; it must be a number from 0 up")
        return cls(value, unit)

    def steps(self, steps_per_epoch: int, total: int | None = None) -> int:
        """As whole optimizer steps; `total` is what a percentage is of."""
        if self.unit == "steps":
            return round(self.value)
        if self.unit == "epochs":
            return round(self.value * steps_per_epoch)
        if total is None:
            raise ConfigError(f"'{self}' needs something to be a part of; give steps or epochs here")
        return round(self.value / 100 * total)

    def __str__(self) -> str:
        return f"{self.value:g}%" if self.unit == "percent" else f"{self.value:g} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    variant: str  # a key of models.vit.VARIANTS
    image_size: int = 0  # pixels; 0 is the variant's own
    patch: int = 0  # pixels; 0 is the variant's own
    class_tokens: int = 1  # 0: none
    positions: str = "sincos"  # how the table starts: sincos, or learned (random); or relative: a bias of the attention
    # What stands for an image: cls (the class tokens' mean) or mean (the patches'), after the norm; mean_norm: the norm
    # of the patches' mean, as MAE finetunes
    pool: str = "cls"
    drop_path: float = 0.0
    dropout: float = 0.0
    fp32_attention: bool = False  # attention's logits and softmax in float32, whatever engine.precision says
    checkpoint_blocks: str = "none"  # blocks recomputed in the backward pass, for memory: none, all, every K, first K


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: str = ""  # a shard set made by `python -m data_pipeline build`
    crop: str = "resized"  # which part of a picture is seen: resized, fixed, centre or simple (data/views.py)
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area that a random resized crop takes
    flip: bool | None = None  # mirror half of the pictures; none: yes, but for crop=centre (MAE Table 1e)
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    jitter_probability: float = 0.8  # share of pictures whose colours are jittered
    three_augment: bool = False  # make each picture grey, solarised or blurred (DeiT III)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resample: bool = True  # apply the repeat factors of the shard set
    streams: int = (
        0  # canonical streams the order is made of; the number of ranks must divide it. 0: chosen, at most 64
    )
    window: int = 8  # shards (of one stream) whose samples are shuffled together
    workers: int = 0  # loader processes per rank; 0 loads in the training process
    prefetch: int = 4  # batches that each worker makes ahead
    max_bad: float = 0.001  # share of samples that may turn out unreadable before the run fails
    features: str = "images"  # or cache: features of a locked tower, written by `maws cache-features` (stage lit)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    batch_size: int  # images per optimizer step, over all ranks
    micro_batch: int = 0  # images per rank that are in memory at once; 0: batch_size / ranks, without accumulation
    lr: float
    lr_batch: int = 0  # when not 0, `lr` is meant for this batch size and scales linearly with batch_size
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 0.0  # largest global gradient norm; 0 does not clip
    schedule: str = "cosine"  # a key of schedule.SCHEDULES
    warmup: Duration = Duration(5, "percent")
    warmup_lr: float = 0.0  # where the warm-up begins; meant for the same batch size as `lr`
    min_lr: float = 0.0  # where cosine and linear end, whatever the batch size; MAE finetunes down to 1e-6
    milestone: Duration = Duration(87.5, "percent")  # schedule=multistep: from here on lr x 0.1
    layer_decay: float = 1.0  # learning rate of a block against the one after it; 1: all alike
    ema: float = 0.0  # exponential mean of all trained weights, kept beside them and released too; 0: none
    length: Duration

    @property
    def peak_lr(self) -> float:
        """The absolute learning rate at the end of the warm-up."""
        return self.lr * self.batch_size / self.lr_batch if self.lr_batch else self.lr


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    ds_config: str = "auto"  # a file of ds_configs/ or a path; auto: by device and size
    precision: str = "auto"  # fp32 or bf16; auto: bf16 on GPUs, fp32 on CPUs (many have no bf16 units)
    compile: str = "none"  # torch.compile of the blocks' attention and MLP: none or blocks


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: Duration = Duration(10, "percent")
    keep: int = 2  # the newest ones
    keep_every: Duration = Duration(0, "steps")  # and those of multiples of this, for ever; 0: none
    keep_best: str = ""  # and the one at which this metric was best: train/loss (lowest), probe/… (highest)
    asynchronous: bool = True  # written while training goes on; takes host memory for one copy of a rank's part


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """What happens when something goes wrong."""

    on_nan: str = "stop"  # a loss or gradient that is not finite: stop, or rewind to a snapshot and leave the batch out
    spike: float = 0.0  # a loss above this many times the median of the last 100 counts as not finite; 0: none does
    snapshot: str = "memory"  # what rewind goes back to: memory (a copy on the host) or disk (the newest checkpoint)
    snapshot_every: Duration = Duration(100, "steps")
    lr_factor: float = 0.5  # of the learning rate, after a rewind, for `lr_steps` steps
    lr_steps: int = 100
    max_rewinds: int = 10  # then the run stops
    hang_seconds: float = 1800.0  # no rank begins a step, save or probe for so long: stacks, and the end; 0: never
    stop_seconds: float = 600.0  # after a signal, leave by then, saved or not; deepspeed's launcher kills after 30
    peer_seconds: float = 60.0  # a rank that is not heard of for this long counts as dead; 0: never
    worker_restarts: int = 10  # loader workers that may die and be replaced


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How good the features are, while training goes on: kNN over synsets in mae, zero-shot in lit."""

    every: Duration = Duration(0, "steps")  # 0: never
    shards: str = ""  # a shard set; empty: the one that is trained on
    bank: int = 2000  # samples with known synsets (kNN)
    queries: int = 500
    k: int = 20


@dataclass(frozen=True, kw_only=True)
class HandoverConfig:
    """How the weights of `init_from` are made to fit where sizes differ (recipes §3.5)."""

    align_corners: bool = False  # of the bicubic resizing of position tables: MAE's false, SWAG's true (recipes §9.4)
    patch: str = "refuse"  # a patch kernel of another side: refuse, or resample it by bicubic or pinv


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int = 10  # steps between lines of metrics.jsonl
    keys: bool = False  # write the sample keys of every step to RUN/keys/
    tensorboard: bool = False  # also to RUN/tensorboard/
    wandb: str = ""  # also to this project of Weights & Biases
    peak_tflops: float = 0.0  # of one device, for MFU; 0: known GPUs by their name


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every stage has; a stage's Config adds its own."""

    seed: int = 0
    init_from: str = ""  # the run or release this stage starts from; empty: from random values
    init_sha256: str = ""  # hash of its weights, filled in when the run starts
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    handover: HandoverConfig = field(default_factory=HandoverConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    log: LogConfig = field(default_factory=LogConfig)


# What may differ between a run and its continuation: where and how fast, not what is computed.
MAY_CHANGE_ON_RESUME = (
    "engine.ds_config", "engine.compile", "checkpoint.", "faults.", "probe.", "log.", "data.workers", "data.prefetch",
    "data.shards", "optim.micro_batch",
)  # fmt: skip


C = TypeVar("C")


def override(cfg: C, settings: Sequence[str]) -> C:
    """Apply `group.name=value` settings, typed by the field.

    Raises ConfigError for a name that is not there (with the nearest one that is) and a value of the wrong type.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting!r} is not a setting; write name=value, for example optim.batch_size=256")
        cfg = _set(cfg, path.split("."), text, path)
    return cfg


def _set(cfg: C, names: list[str], text: str, path: str) -> C:
    hints = typing.get_type_hints(type(cfg))
    name, rest = names[0], names[1:]
    if name not in hints:
        known = list(flatten(to_json(cfg)))
        where = path[: len(path) - len(".".join(names))]
        raise ConfigError(f"unknown setting {path}; {nearest(path, [where + k for k in known])}")
    value = getattr(cfg, name)
    if rest:
        if not dataclasses.is_dataclass(value) or isinstance(value, Duration):
            raise ConfigError(f"{path}: {name} has no parts; set {path[: path.index(name) + len(name)]} itself")
        new = _set(value, rest, text, path)
    elif dataclasses.is_dataclass(value) and not isinstance(value, Duration):
        raise ConfigError(f"{path} is a group; set one of {', '.join(path + '.' + k for k in to_json(value))}")
    else:
        new = _parse(hints[name], text, path)
    return dataclasses.replace(cfg, **{name: new})  # type: ignore[type-var]


def _parse(hint: Any, text: str, path: str) -> Any:
    if hint is Duration:
        return Duration.parse(text)
    if isinstance(hint, types.UnionType):
        if text.lower() in ("none", "null", ""):
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    try:
        if hint is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if typing.get_origin(hint) is tuple:
            parts = text.strip("()[] ").split(",")
            kinds = typing.get_args(hint)
            if len(parts) != len(kinds):
                raise ValueError
            return tuple(kind(part) for kind, part in zip(kinds, parts, strict=True))
        if hint is int:
            return int(text.replace("_", ""))
        return hint(text)
    except (ValueError, KeyError):
        wanted = getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
        raise ConfigError(f"{path}={text} is not a {wanted}") from None


# Settings that a run fills in while it starts, and what they are before.
UNKNOWN: dict[str, Any] = {"synsets": 0, "classes": 0, "text.vocabulary": 0, "text_sha256": "", "features_sha256": ""}


def nearest(name: str, known: Sequence[str]) -> str:
    """A suggestion for a misspelt name, as the end of a sentence."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def to_json(cfg: Any) -> dict[str, Any]:
    """A config as plain JSON values; durations as their text."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if isinstance(value, Duration):
            out[f.name] = str(value)
        elif dataclasses.is_dataclass(value):
            out[f.name] = to_json(value)
        else:
            out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def from_json(cls: type, values: dict[str, Any]) -> Any:
    """The config that `to_json` wrote. Raises ConfigError for a field this version does not know."""
    hints = typing.get_type_hints(cls)
    unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise ConfigError(f"config has {', '.join(sorted(unknown))}, which this version does not know")
    return cls(**{name: _from_json_value(hints[name], value) for name, value in values.items()})


def _from_json_value(hint: Any, value: Any) -> Any:
    if hint is Duration:
        return Duration.parse(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value)
    return tuple(value) if isinstance(value, list) else value


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON as `a.b` -> value."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`name: old -> new` for every setting of a run that its continuation may not change but does."""
    a, b = flatten(old), flatten(new)
    return [
        f"{name}: {a.get(name)} -> {b.get(name)}"
        for name in sorted(set(a) | set(b))
        if a.get(name) != b.get(name) and not name.startswith(MAY_CHANGE_ON_RESUME) and b.get(name) != UNKNOWN.get(name)
    ]


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ConfigError names the file when it is not one."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value
