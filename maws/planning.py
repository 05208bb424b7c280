"""python -m maws plan: does a training fit its GPUs, how long does it take, what does it read and write?

    python -m maws plan --stage mae --preset vit_6.5b14 --gpus 64 --gpu h200 --samples 5e9

Memory is maws/plan_memory.py's, compute models/flops.py's. Time follows from a speed that was measured (--from-run) or
assumed (a share of the device's peak, --mfu). Whatever is assumed is listed at the end of what is printed.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.shardset import ShardSet
from maws import devices, stages
from maws.config import ConfigError, TrainConfig, from_json, load_json, override
from maws.data.order import MAX_STREAMS, choose_streams
from maws.devices import GIB
from maws.ds_config import chosen
from maws.files import json_lines
from maws.models.attention import recomputed
from maws.plan_memory import Memory, Subject, filled
from maws.plan_search import Alternative, alternatives
from maws.weight_files import parse_size

MFU = 0.4  # share of the peak that all products reach together: ours, until a run is measured
USABLE = 0.95  # of the device's memory: the allocator's gaps take some; ours
SAMPLE_BYTES = 60_000  # a 500-pixel JPEG with its json: ours
SAMPLES = {"billions": 5_000_000_000, "imagenet": 1_281_167}  # MAWS's 5B visits (recipes §5.2), ImageNet-1k
FEW_EPOCHS = 10  # a longer training is of a set like ImageNet
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Speed:
    """How fast one rank computes, and how that is known."""

    flops: float  # a second, operations of recomputed blocks included
    how: str


@dataclass(frozen=True)
class Data:
    """What a training reads."""

    samples: float  # visits of an epoch
    sample_bytes: float
    synsets: int = 0


@dataclass
class Result:
    """All that `plan` says."""

    stage: str
    cfg: TrainConfig
    gpu: devices.Device
    ranks: int
    micro: int
    accumulate: int
    precision: str
    parameters: dict[str, int]
    memory: Memory
    usable: int
    flops: dict[str, float]
    time: dict[str, float]
    data: dict[str, float]
    checkpoints: dict[str, float]
    refused: list[str] = field(default_factory=list)
    nearest: list[Alternative] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    @property
    def ds_config(self) -> str:
        return chosen(self.cfg.engine.ds_config, "cuda", stages.shape_of(self.cfg.model).width)[0]

    def as_json(self) -> dict[str, Any]:
        settings = {"stage": self.stage, "gpu": self.gpu.name, "ranks": self.ranks, "micro_batch": self.micro,
                    "accumulation": self.accumulate, "batch_size": self.cfg.optim.batch_size,
                    "precision": self.precision, "ds_config": self.ds_config}  # fmt: skip
        return settings | {
            "fits": not self.refused, "parameters": self.parameters, "memory_bytes": self.memory.as_json(),
            "usable_bytes": self.usable, "flops": self.flops, "time": self.time, "data": self.data,
            "checkpoints": self.checkpoints, "refused": self.refused,
            "nearest": [n.as_json() for n in self.nearest], "assumed": self.assumed,
        }  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """The command `plan`: 0 when it fits, 1 when it does not. Raises ConfigError for what cannot be planned."""
    from maws.plan_report import show

    if options.gpus < 1:
        raise ConfigError(f"--gpus {options.gpus}: a training needs at least one rank; give 1 or more")
    result = plan(options)
    if options.json:
        sys.stdout.write(json.dumps(result.as_json(), indent=1) + "\n")
    else:
        show(result)
    return 1 if result.refused else 0


def plan(options: argparse.Namespace) -> Result:
    """Everything about one training."""
    assumed = list[str]()
    cfg = override(stages.preset(options.stage, options.preset), options.settings)
    if options.micro_batch is not None:
        cfg = override(cfg, [f"optim.micro_batch={options.micro_batch}"])
    gpu, data = _gpu(options, assumed), _data(options, cfg, assumed)
    cfg, more = filled(cfg, data.synsets)
    subject, ranks = Subject(options.stage, cfg), options.gpus
    speed, share = _speed(options, gpu, subject), max(1, cfg.optim.batch_size // ranks)
    micro = min(cfg.optim.micro_batch or share, share)
    memory, usable = subject.memory(ranks, micro, options.gpus_per_node), int(USABLE * gpu.memory_bytes)
    refused = [*_indivisible(cfg, ranks, data), *_too_much(memory, usable, gpu, options)]
    flops = _flops(subject, gpu, speed)
    seconds = cfg.optim.batch_size / ranks * flops["executed_flops_per_sample"] / speed.flops
    steps, saves = _lengths(cfg, data)
    numbers = {
        "trained": sum(subject.trained), "frozen": sum(subject.frozen),
        "follow a momentum target": sum(subject.followers),
    }  # fmt: skip
    result = Result(
        options.stage, cfg, gpu, ranks, micro, max(1, share // micro), subject.precision, numbers, memory, usable,
        flops,
        _takes(steps, seconds),
        _reads(cfg, data, steps, seconds), _writes(subject, ranks, saves), refused, [], [speed.how, *assumed, *more],
    )  # fmt: skip
    if refused:
        result.nearest = alternatives(subject, ranks, usable, lambda c, n: _indivisible(c, n, data))
    return result


def _too_much(memory: Memory, usable: int, gpu: devices.Device, options: argparse.Namespace) -> list[str]:
    """Why the memory does not suffice; empty when it does."""
    out = []
    if memory.total > usable:
        needs, has = memory.total / GIB, usable / GIB
        out.append(f"one rank needs {needs:.1f} GiB, the {gpu.name} has {has:.1f} GiB to give")
    if options.host_memory:
        node = (memory.host + memory.saving) * min(options.gpus, options.gpus_per_node)
        if node > (there := parse_size(options.host_memory, plain=False)):
            out.append(f"a node needs {node / GIB:.0f} GiB of host memory, --host-memory is {there / GIB:.0f} GiB")
    return out


def _flops(subject: Subject, gpu: devices.Device, speed: Speed) -> dict[str, float]:
    cost, executed = subject.module.cost(subject.cfg), executed_flops(subject.module, subject.cfg)
    peak = gpu.peak(devices.training_precision(subject.precision))
    return {
        "forward_macs_per_sample": cost.forward, "training_flops_per_sample": cost.training_flops,
        "executed_flops_per_sample": executed, "per_rank_per_second": speed.flops,
        "model_flops_utilisation": speed.flops * cost.training_flops / executed / peak,
    }  # fmt: skip


def executed_flops(module: Any, cfg: TrainConfig) -> float:
    """FLOP of one sample in training, recomputed blocks counted as often as they run."""
    cost, again = module.cost(cfg), recomputed(cfg.model.checkpoint_blocks, stages.shape_of(cfg.model).depth)
    return 2 * (cost.training() + cost.trained * sum(again) / len(again))


def _lengths(cfg: TrainConfig, data: Data) -> tuple[int, int]:
    """Steps, and how often a checkpoint is written."""
    epoch = max(1, int(data.samples) // cfg.optim.batch_size)
    steps = max(1, cfg.optim.length.steps(epoch))
    return steps, -(-steps // max(1, cfg.checkpoint.every.steps(epoch, steps)))


def _takes(steps: int, seconds: float) -> dict[str, float]:
    whole = steps * seconds
    return {"step_seconds": seconds, "steps": steps, "seconds": whole, "days": whole / SECONDS_PER_DAY}


def _reads(cfg: TrainConfig, data: Data, steps: int, seconds: float) -> dict[str, float]:
    samples, rate = steps * cfg.optim.batch_size, cfg.optim.batch_size / seconds
    tokens = stages.patch_count(cfg.model) + cfg.model.class_tokens
    return {
        "samples": samples, "tokens": samples * tokens, "samples_per_epoch": data.samples, "samples_per_second": rate,
        "sample_bytes": data.sample_bytes, "bytes_per_second": rate * data.sample_bytes,
    }  # fmt: skip


def _writes(subject: Subject, ranks: int, saves: int) -> dict[str, float]:
    """fp32 weights and two moments of what is trained, means of what follows it, buffers."""
    trained, frozen = sum(subject.trained), sum(subject.frozen)
    size = (12 + 4 * (subject.cfg.optim.ema > 0)) * trained + 4 * sum(subject.followers) + subject.buffers
    return {
        "bytes": size, "bytes_per_rank": size / ranks, "writes": saves, "written_bytes": saves * size,
        "kept_bytes": (subject.cfg.checkpoint.keep + 1) * size, "release_bytes": 4.0 * (trained + frozen),
    }  # fmt: skip


def _gpu(options: argparse.Namespace, assumed: list[str]) -> devices.Device:
    """The device: by name, the one that is here, or by its own numbers."""
    gpu = devices.find(options.gpu) if options.gpu else _present()
    if gpu is None:
        gpu = devices.find("h200")
        if not options.memory:
            assumed.append("an H200, as no GPU is here that is known (--gpu NAME)")
    if options.memory or options.tflops:
        memory = parse_size(options.memory, plain=False) / devices.GB if options.memory else gpu.memory
        speeds = dict.fromkeys(devices.PRECISIONS, options.tflops) if options.tflops else {}
        gpu = replace(gpu, name="stated device" if options.memory else gpu.name, memory=memory, **speeds)
    return gpu


def _present() -> devices.Device | None:
    import torch

    if not torch.cuda.is_available():
        return None
    gpu = devices.recognise(torch.cuda.get_device_name())
    return replace(gpu, memory=torch.cuda.get_device_properties(0).total_memory / devices.GB) if gpu else None


def _data(options: argparse.Namespace, cfg: TrainConfig, assumed: list[str]) -> Data:
    """What an epoch is: of a shard set, as stated, or assumed."""
    stated = options.sample_bytes
    if options.shards:
        shards = ShardSet.open(options.shards)
        from maws.data.loader import make_order

        order = make_order(cfg.data, shards, cfg.seed, 1, labelled=hasattr(cfg, "synsets") or hasattr(cfg, "classes"))
        each = sum(s["bytes"] for s in shards.manifest["shards"]) / max(1, len(shards))
        return Data(order.visits, stated or each, len(shards.vocabulary))
    samples = options.samples
    if not samples:
        kind = "imagenet" if cfg.optim.length.unit == "epochs" and cfg.optim.length.value > FEW_EPOCHS else "billions"
        samples = SAMPLES[kind]
        if cfg.optim.length.unit == "epochs":
            where = {"billions": "MAWS's visits to IG-3B", "imagenet": "ImageNet-1k"}[kind]
            assumed.append(f"an epoch is {samples:,} samples, {where} (--samples N or --shards FOLDER)")
    if not stated:
        assumed.append(f"a sample is {SAMPLE_BYTES / 1000:.0f} kB on disk (--sample-bytes N or --shards FOLDER)")
    return Data(samples, stated or SAMPLE_BYTES)


def _indivisible(cfg: TrainConfig, ranks: int, data: Data) -> list[str]:
    """Why so many ranks cannot share the batch; empty when they can."""
    batch, micro = cfg.optim.batch_size, cfg.optim.micro_batch
    if batch % ranks:
        return [
            f"optim.batch_size={batch} is not a multiple of {ranks} ranks; try {max(1, round(batch / ranks)) * ranks}"
        ]
    if micro and batch // ranks % micro:
        return [f"a rank's {batch // ranks} samples are not a multiple of optim.micro_batch={micro}"]
    streams = cfg.data.streams or choose_streams(batch, int(data.samples))
    if streams % ranks or batch % streams:
        wanted = ranks if ranks > MAX_STREAMS or batch % MAX_STREAMS else MAX_STREAMS
        return [f"{ranks} ranks cannot share {streams} streams evenly; set data.streams={wanted}"]
    return []


def _speed(options: argparse.Namespace, gpu: devices.Device, subject: Subject) -> Speed:
    """From a run's metrics, or a share of the peak."""
    if options.from_run:
        return measured(Path(options.from_run))
    products, mfu = devices.training_precision(subject.precision), options.mfu or MFU
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu} must lie between 0 and 1")
    said = "as stated" if options.mfu else "assumed (--mfu X, or --from-run RUN once one is measured)"
    how = f"a rank computes at {mfu:.0%} of its peak of {gpu.peak(products) / 1e12:g} TFLOP/s in {products}, {said}"
    return Speed(mfu * gpu.peak(products), how)


def measured(run: Path) -> Speed:
    """The speed of a run, from its metrics: the median of the second half of its lines.

    Raises ConfigError when the folder has no config or no line with a speed.
    """
    config, starts = load_json(run / "config.json"), [e for e in json_lines(run / "events.jsonl") if e.get("ranks")]
    rates = [r for line in json_lines(run / "metrics.jsonl") if (r := line.get("train/images_per_second"))]
    if not rates:
        raise ConfigError(f"--from-run {run}: metrics.jsonl has no line with train/images_per_second; give another run")
    ranks, module = starts[-1]["ranks"] if starts else 1, stages.load(config["stage"])
    cfg = from_json(module.Config, {k: v for k, v in config.items() if k in module.Config.__dataclass_fields__})
    rate = statistics.median(rates[len(rates) // 2 :])
    flops = executed_flops(module, cfg) * rate / ranks
    return Speed(
        flops,
        f"a rank computes at {flops / 1e12:.3g} TFLOP/s, measured in {run} ({config['stage']} {config['preset']}, "
        f"{rate:,.0f} images/s on {ranks} ranks), and as fast among more ranks",
    )
