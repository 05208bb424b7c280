"""A training shrunk to what two CPU ranks do in a minute: sizes and lengths go, what the training does stays.

    tiny, changes = shrink("mae", cfg)      # ["model.variant: vit_6.5b14 -> atto", …]

Kept are the objective, masks and targets, class tokens and positions, the decoder's reduction, checkpointing policy,
accumulation, momentum target, mean of the weights, layer-wise rates, schedule, clipping, precision and the ds_config.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from maws import stages
from maws.config import ConfigError, TrainConfig, flatten, load_json, override, to_json
from maws.ds_config import CUDA_ONLY, chosen, path_of
from maws.models.vit import VARIANTS

GRIDS = (4, 8, 12, 16)  # patches a side; the first that the masks can be cut from
RANKS, STEPS, EVERY, PATCH = 2, 32, 8, 8
SMALL = {  # elements: parameters of the tiny model are cut and gathered as those of the large one are
    "reduce_bucket_size": 20_000, "stage3_prefetch_bucket_size": 20_000, "sub_group_size": 30_000,
    "stage3_param_persistence_threshold": 200, "stage3_max_live_parameters": 100_000,
    "stage3_max_reuse_distance": 100_000,
}  # fmt: skip


def shrink(stage: str, cfg: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The tiny config and what was changed, `name: from -> to`. Raises ConfigError where no small grid fits masks."""
    tiny = override(cfg, [*_sizes(cfg), *_lengths(cfg)])
    tiny = _fitting(stage, tiny)
    return tiny, changes(cfg, tiny)


def changes(old: TrainConfig, new: TrainConfig) -> list[str]:
    a, b = flatten(to_json(old)), flatten(to_json(new))
    return [f"{name}: {_said(a[name])} -> {_said(b[name])}" for name in a if a[name] != b[name]]


def settings(base: TrainConfig, cfg: TrainConfig) -> list[str]:
    """`group.name=value` for everything in which `cfg` differs from `base`: how a command line asks for it."""
    a, b = flatten(to_json(base)), flatten(to_json(cfg))
    return [f"{name}={_text(b[name])}" for name in a if a[name] != b[name]]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _said(value: Any) -> str:
    return _text(value) or "(none)"


def _sizes(cfg: Any) -> list[str]:
    out = ["model.variant=atto", "model.patch=0", "engine.compile=none"]
    if hasattr(cfg, "decoder"):
        out += ["decoder.width=32", "decoder.depth=2", "decoder.heads=2"]
    if hasattr(cfg, "guidance"):
        out += ["guidance.hidden=48"]
    if hasattr(cfg, "text"):
        out += ["text.variant=atto", "text.pretrained=", "text.vocabulary=0", "joint_width=32"]
    if cfg.data.features != "images":
        out += ["data.features=images"]  # of another tower: the twin's own is made on the spot
    if hasattr(cfg, "classes"):
        out += ["classes=0", *(["trainable=last 1"] if cfg.trainable.startswith("last") else [])]  # of two blocks
    if hasattr(cfg, "synsets"):
        out += ["synsets=0", *(["chunk=3"] if cfg.chunk else [])]
    if hasattr(cfg, "target") and cfg.target.kind in ("pca", "tokens"):
        out += ["target.kind=pixels", "target.image_size=0", "target.file=", "target.tokenizer="]  # of other patches
    return out


def _lengths(cfg: TrainConfig) -> list[str]:
    micro = 4 if cfg.optim.micro_batch and cfg.optim.micro_batch < cfg.optim.batch_size else 0
    out = [
        "optim.batch_size=16", f"optim.micro_batch={micro}", f"optim.length={STEPS} steps", "optim.warmup=2 steps",
        "optim.lr=2e-3", "optim.lr_batch=0", f"checkpoint.every={EVERY} steps", "checkpoint.keep=9", "log.every=1",
        "log.keys=yes", "log.wandb=", "log.tensorboard=no", "faults.hang_seconds=300", "data.streams=2",
        f"data.workers={min(cfg.data.workers, 1)}",
    ]  # fmt: skip
    if cfg.optim.min_lr:
        out += ["optim.min_lr=1e-6"]
    if cfg.optim.warmup_lr:
        out += ["optim.warmup_lr=1e-4"]
    if cfg.optim.milestone.unit != "percent":
        out += ["optim.milestone=87.5%"]
    if cfg.probe.every.value:
        out += [f"probe.every={STEPS // 2} steps", "probe.bank=48", "probe.queries=24", "probe.k=5", "probe.shards="]
    if cfg.engine.precision == "auto":
        out += ["engine.precision=bf16"]  # what it is on GPUs
    return out


def _fitting(stage: str, cfg: Any) -> TrainConfig:
    """The smallest grid of patches that the run's masks and decoder can be cut from."""
    wrong: Exception | None = None
    for side in GRIDS:
        tiny = override(cfg, [f"model.image_size={side * PATCH}"])
        try:
            if hasattr(tiny, "mask"):
                tiny.mask.check((side, side))
            if hasattr(tiny, "guidance"):
                tiny.guidance.check(side * side, tiny.mask.keep((side, side)))
            if hasattr(tiny, "decoder") and tiny.decoder.reduction != "none" and side % 2:
                continue
            stages.load(stage).example(tiny, 1)
            return tiny
        except ConfigError as e:
            wrong = e
    raise ConfigError(f"no small grid fits these masks: {wrong}")


def shrink_ds_config(cfg: TrainConfig, path: Path) -> list[str]:
    """Write the ds_config that the training would have on GPUs, as far as CPU ranks have it; what was changed."""
    width = VARIANTS[cfg.model.variant].width if cfg.model.variant in VARIANTS else 0
    name, _ = chosen(cfg.engine.ds_config, "cuda", width)
    original = load_json(source := path_of(name))
    zero = dict(original.get("zero_optimization", {}))
    tiny = {k: v for k, v in zero.items() if k not in CUDA_ONLY}
    tiny |= {k: small for k, small in SMALL.items() if k in zero}
    tiny |= {"overlap_comm": False, "memory_efficient_linear": False}  # streams, and a layer for GPUs
    if "zero_hpz_partition_size" in zero:
        tiny["zero_hpz_partition_size"] = RANKS
    for kind in ("offload_optimizer", "offload_param"):
        if where := (zero.get(kind) or {}).get("device"):
            tiny[kind] = {"device": "none" if where == "none" else "cpu", "pin_memory": False}
    path.write_text(json.dumps({"zero_optimization": tiny}, indent=1) + "\n")
    out = [f"ds_config: {source.name} -> {path.name}"]
    for key in zero:
        if zero[key] != tiny.get(key):
            out.append(f"ds_config {key}: {_short(zero[key])} -> {_short(tiny.get(key, 'left out (CUDA only)'))}")
    return out + [f"ds_config {key}: left out" for key in original if key != "zero_optimization"]


def _short(value: Any) -> str:
    return value.get("device", "none") if isinstance(value, dict) else str(value)


def donor(cfg: TrainConfig) -> tuple[str, TrainConfig]:
    """A tiny training whose tower fits: what the twin of a stage with `init_from` starts from."""
    stage = "simmim" if cfg.model.positions == "relative" else "mae"
    base = stages.preset(stage, "debug")
    pool = "mean" if cfg.model.pool == "mean_norm" else cfg.model.pool  # no norm for the mean yet
    model = dataclasses.replace(cfg.model, drop_path=0.0, dropout=0.0, checkpoint_blocks="none", pool=pool)
    optim = dataclasses.replace(base.optim, length=dataclasses.replace(base.optim.length, value=2))
    engine = dataclasses.replace(cfg.engine, precision="fp32", ds_config="zero3_cpu", compile="none")
    data = dataclasses.replace(base.data, streams=2)
    return stage, dataclasses.replace(base, model=model, optim=optim, engine=engine, data=data)
