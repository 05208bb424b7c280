"""The DeepSpeed file of a run: found, checked, and merged with the settings that are ours. DeepSpeed is not imported.

    engine.ds_config=auto              chosen by device and width of the image tower; NAME of ds_configs/, or a path
    "nvme_path": "$MAWS_NVME_PATH"     a value that begins with $ comes from the environment

One owner per number: a file holds what only DeepSpeed knows (ZeRO, buckets, offload), and is refused when it also sets
what is ours, at any depth. Unknown keys are refused with the nearest: DeepSpeed ignores those at the top in silence.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maws.config import ConfigError, EngineConfig, OptimConfig, load_json, nearest

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
OURS = {
    "train_batch_size": "optim.batch_size",
    "train_micro_batch_size_per_gpu": "optim.micro_batch",
    "gradient_accumulation_steps": "optim.micro_batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim.lr, optim.betas, optim.weight_decay",
    "scheduler": "optim.schedule",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",
    "fp16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "compile": "engine.compile",
    "activation_checkpointing": "model.checkpoint_blocks",
    "checkpoint": "checkpoint.*",
    "tensorboard": "log.tensorboard",
    "wandb": "log.wandb",
    "csv_monitor": "log.every",
    "steps_per_print": "log.every",
    "zero_allow_untested_optimizer": "nothing (torch's AdamW is always used)",
    "zero_force_ds_cpu_optimizer": "nothing (torch's AdamW is always used)",
}
TOP = (
    "zero_optimization", "aio", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc",
)  # fmt: skip
# Of DeepSpeed 0.19.8, without those it calls deprecated; a test compares.
ZERO = (
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights",
    "elastic_checkpoint", "offload_param", "offload_optimizer", "zenflow", "sub_group_size",
    "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save",
    "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
    "ignore_unused_parameters", "legacy_stage1", "round_robin_gradients", "parameter_alignment",
    "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients", "memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply",
    "log_trace_cache_warnings", "enable_sanity_checks", "save_muon_momentum_buffer_in_memory", "leaf_module",
)  # fmt: skip
OFFLOAD_PARAM = ("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory")
OFFLOAD_OPTIMIZER = (
    "device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init", "ratio",
    "super_offload", "cpuadam_cores_perc",
)  # fmt: skip
AIO = ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds")
KNOWN = {
    "": TOP,
    "zero_optimization": ZERO,
    "zero_optimization.offload_param": OFFLOAD_PARAM,
    "zero_optimization.offload_optimizer": OFFLOAD_OPTIMIZER,
    "aio": AIO,
}
REMOVED = {  # in September 2026 (DeepSpeed's issue 8489)
    "mics_shard_size": "zero_hpz_partition_size",
    "mics_hierarchical_params_gather": "zero_hpz_partition_size",
    "zeropp_loco_param": "zero_quantized_gradients alone",
}
CUDA_ONLY = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def chosen(name: str, device: str, width: int = 0, ranks: int = 0) -> tuple[str, str]:
    """(the file's name, why it) for `engine.ds_config`; `width` is the image tower's, 0 where it is not known."""
    if name != "auto":
        return name, "as asked"
    if device != "cuda":
        return ("zero3_cpu_alone", "auto: no GPU, one rank") if ranks == 1 else ("zero3_cpu", "auto: no GPU here")
    for least, file in ((4096, "zero3_6.5b"), (2560, "zero3_2b")):
        if width >= least:
            return file, f"auto: GPUs, and a tower of width {width} (at least {least})"
    return "zero3", "auto: GPUs" + (f", and a tower of width {width} (less than 2560)" if width else "")


def path_of(name: str) -> Path:
    """A file of ds_configs/, or a path that ends in .json. Raises ConfigError when there is none."""
    path = Path(name) if name.endswith(".json") else DS_CONFIGS / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in DS_CONFIGS.glob("*.json"))
        raise ConfigError(f"engine.ds_config={name}: there is no {path}; {nearest(name, known)}")
    return path


def ds_config(cfg: EngineConfig, device: str, width: int = 0, ranks: int = 0) -> dict[str, Any]:
    """The DeepSpeed file in force, values from the environment filled in.

    Raises ConfigError for an unknown file or key, a doubled setting, another ZeRO stage, and what cannot run here.
    """
    path = path_of(chosen(cfg.ds_config, device, width, ranks)[0])
    config = load_json(path)
    for where, key, _value in _walk(config):
        _check_key(path, where, key)
    config = _filled(config, path)
    _check_values(config, path, device)
    return config


def merged(config: dict[str, Any], optim: OptimConfig, precision: str, micro: int, accumulate: int) -> dict[str, Any]:
    """A file's settings with ours: all that DeepSpeed is told."""
    return config | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": optim.clip,
        "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,  # torch's AdamW: nothing is compiled on the user's machine
        "zero_force_ds_cpu_optimizer": False,  # also where the optimizer is on the host
        "steps_per_print": 1 << 60,
    }


def accumulation(cfg: OptimConfig, world: int) -> tuple[int, int]:
    """(images per rank and forward, forwards per step). Raises ConfigError when the batch does not divide."""
    if cfg.batch_size % world:
        raise ConfigError(
            f"optim.batch_size={cfg.batch_size} must be a multiple of the {world} ranks; "
            f"try {-(-cfg.batch_size // world) * world}"
        )
    per_rank = cfg.batch_size // world
    micro = cfg.micro_batch or per_rank
    if per_rank % micro:
        unit = world * micro
        raise ConfigError(
            f"optim.batch_size={cfg.batch_size} must be a multiple of {unit} "
            f"({world} ranks x optim.micro_batch={micro}); "
            f"try {-(-cfg.batch_size // unit) * unit}"
        )
    return micro, per_rank // micro


def offloads(config: dict[str, Any], what: str) -> str:
    """Where `optimizer` or `param` is kept: `none`, `cpu` or `nvme`."""
    return (config["zero_optimization"].get(f"offload_{what}") or {}).get("device", "none")


def _walk(config: dict[str, Any], where: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted path of the object, key, value) at every depth."""
    for key, value in config.items():
        yield where, key, value
        if isinstance(value, dict):
            yield from _walk(value, f"{where}.{key}" if where else key)


def _check_key(path: Path, where: str, key: str) -> None:
    full = f"{where}.{key}" if where else key
    if key in OURS:
        raise ConfigError(f"{path} sets {full}, which is ours: remove it there and set {OURS[key]} instead")
    if key in REMOVED:
        raise ConfigError(f"{path} sets {full}, which DeepSpeed has removed; use {REMOVED[key]}")
    if where in KNOWN and key not in KNOWN[where]:
        raise ConfigError(f"{path} sets {full}, which DeepSpeed 0.19.8 does not know; {nearest(key, KNOWN[where])}")


def _filled(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same with every `$NAME` replaced; digits become a number."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = _filled(value, path)
        elif isinstance(value, str) and (match := re.fullmatch(r"\$(\w+)", value)):
            text = os.environ.get(match[1], "")
            if not text:
                raise ConfigError(
                    f"{path} takes {key} from the environment: set it, for example "
                    f"export {match[1]}={'/local/nvme' if 'path' in key else 8}"
                )
            value = int(text) if text.isdecimal() else text
        out[key] = value
    return out


def _check_values(config: dict[str, Any], path: Path, device: str) -> None:
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or stage != 3:
        raise ConfigError(f"{path} has ZeRO stage {stage}; checkpoints and export are written for stage 3")
    for key in CUDA_ONLY:
        if zero.get(key) and device != "cuda":
            raise ConfigError(f"{path} sets {key}, which DeepSpeed has for CUDA only; use zero3_hpz or zero3_cpu here")
    for what in ("optimizer", "param"):
        if offloads(config, what) == "nvme":
            folder = zero[f"offload_{what}"].get("nvme_path", "")
            if not folder or not os.access(folder, os.W_OK):
                raise ConfigError(
                    f"{path} keeps the {what} on NVMe in {folder or 'no folder (nvme_path)'}, which is not a folder "
                    f"that can be written to; give one on a local disk (MAWS_NVME_PATH for zero3_nvme)"
                )
