"""Bytes of memory that one rank of a training needs, by kind: counted in the real modules, built without memory.

    plan_memory("mae", cfg, ranks=64, micro_batch=64, device="h200").total

Model states are DeepSpeed 0.19.8's ZeRO-3, as its source keeps them: a parameter is cut into equal parts, one a rank;
gradients lie in one buffer of the same parts; in fp32 the weights are their own master copy. Activations are those of a
step rehearsed on the meta device (maws/rehearsal.py). tests/maws/test_planning.py holds them against real engines.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import nn

from maws import stages
from maws.config import ConfigError, EngineConfig, TrainConfig, load_json, override
from maws.ds_config import chosen, path_of
from maws.models.flops import CLASSES, SYNSETS
from maws.models.text import TEXT_VARIANTS
from maws.momentum import HasTarget
from maws.objectives.chunked_softmax import chosen_chunk
from maws.objectives.contrastive import Contrastive
from maws.optim import treat
from maws.rehearsal import Footprint, on_meta, rehearse

CONTEXT = 2 * 2**30  # CUDA context, NCCL's and the libraries' workspaces, beside torch's allocator: ours, not measured
# Bytes of each element while the (fused) optimizer is at it: its gradient in fp32, and in bf16 the copy it is made of
ADAM_STEP = {4: 4, 2: 6}
LEAVES = ("Block", "XLMRobertaLayer", "BertLayer")  # gathered in one piece (maws/engine.py)
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. The kinds up to `context` lie on the device; the last three elsewhere."""

    weights: int  # this rank's part of what is trained
    frozen: int  # and of what is not: position tables, locked towers, momentum targets
    gradients: int
    master: int  # fp32 copy of bf16 weights
    moments: int
    target: int  # fp32 means of a momentum target
    average: int  # optim.ema's
    secondary: int  # ZeRO++'s second copy of the weights within a node
    whole: int  # parameters that are made whole to be used, and small ones that always are
    buckets: int  # gradients on their way to the ranks that own them
    batch: int  # the pictures and what comes with them
    activations: int  # kept from forward to backward
    passing: int  # on top of it at the worst moment of either
    step: int  # temporaries of the optimizer's step, when the two above are gone
    context: int  # CUDA itself; not seen by torch.cuda.max_memory_allocated()
    host: int = 0  # what is offloaded to the CPU's memory
    disk: int = 0  # what is offloaded to NVMe
    saving: int = 0  # a copy on the host while an asynchronous checkpoint is written, or to rewind to

    @property
    def states(self) -> int:
        """What is there all the time."""
        kept = ("weights", "frozen", "gradients", "master", "moments", "target", "average", "secondary")
        return sum(getattr(self, name) for name in kept)

    @property
    def allocated(self) -> int:
        """The most that torch's allocator gives out at any time."""
        forward_backward = self.whole + self.batch + self.activations + self.passing
        return self.states + self.buckets + max(forward_backward, self.step)

    @property
    def total(self) -> int:
        return self.allocated + self.context

    def as_json(self) -> dict[str, int]:
        kinds = {f.name: getattr(self, f.name) for f in fields(self)}
        return kinds | {"states": self.states, "allocated": self.allocated, "total": self.total}


@dataclass(frozen=True)
class Zero:
    """The settings of a ds_configs file that memory depends on."""

    reduce_bucket: int
    prefetch_bucket: int
    sub_group: int
    persistent: int  # parameters with fewer elements stay whole
    max_live: int
    reuse: int
    contiguous: bool
    optimizer: str  # where its states are: none (the device), cpu or nvme
    params: str
    hpz: int  # ranks that share a second copy of the weights; 1: there is none

    @classmethod
    def of(
        cls, cfg: EngineConfig, cuda: bool, width: int, gpus_per_node: int = GPUS_PER_NODE, ranks: int = 0
    ) -> "Zero":
        """Of the file in force for an image tower of this width. Raises ConfigError when there is none of its name."""
        return cls.named(chosen(cfg.ds_config, "cuda" if cuda else "cpu", width, ranks)[0], gpus_per_node)

    @classmethod
    def named(cls, name: str, gpus_per_node: int = GPUS_PER_NODE) -> "Zero":
        """Of a file of ds_configs/, or of a path that ends in .json."""
        found: dict[str, Any] = load_json(path_of(name)).get("zero_optimization", {})

        def number(key: str, default: float) -> int:
            value = found.get(key, default)
            return gpus_per_node if isinstance(value, str) else int(value)  # "$LOCAL_SIZE": filled in when a run starts

        def where(key: str) -> str:
            return (found.get(key) or {}).get("device", "none")

        return cls(  # what a file leaves out is DeepSpeed's default
            number("reduce_bucket_size", 5e8), number("stage3_prefetch_bucket_size", 5e7),
            number("sub_group_size", 1e9),
            number("stage3_param_persistence_threshold", 1e5), number("stage3_max_live_parameters", 1e9),
            number("stage3_max_reuse_distance", 1e9), bool(found.get("contiguous_gradients", True)),
            where("offload_optimizer"), where("offload_param"), number("zero_hpz_partition_size", 1),
        )  # fmt: skip


def plan_memory(
    stage: str, cfg: TrainConfig, ranks: int, micro_batch: int, device: str = "cuda",
    gpus_per_node: int = GPUS_PER_NODE,
) -> Memory:  # fmt: skip
    """Bytes of one rank by kind; `device` is cpu, or the name of any GPU."""
    return Subject(stage, cfg, device != "cpu").memory(ranks, micro_batch, gpus_per_node)


def filled(cfg: Any, synsets: int = 0) -> tuple[Any, list[str]]:
    """The config with what a run fills in from its data, and what had to be assumed for it."""
    assumed, changes = list[str](), list[str]()
    if getattr(cfg, "synsets", None) == 0:
        changes.append(f"synsets={synsets or SYNSETS}")
        if not synsets:
            assumed.append(f"{SYNSETS:,} synsets, those of IG-3B (give --shards for your own)")
    if getattr(cfg, "classes", None) == 0:
        changes.append(f"classes={synsets or CLASSES}")
        if not synsets:
            assumed.append(f"{CLASSES:,} classes, those of ImageNet-1k (give --shards for your own)")
    if getattr(cfg, "prior_bias", False):
        changes.append("prior_bias=no")  # a value, not a size
    text = getattr(cfg, "text", None)
    if text is not None and not text.vocabulary and text.variant in TEXT_VARIANTS:
        ids = TEXT_VARIANTS[text.variant].vocabulary
        changes.append(f"text.vocabulary={ids}")
        if not text.pretrained:
            assumed.append(f"a tokenizer of {ids:,} ids")
    if cfg.data.features == "cache":
        assumed.append("samples are as large on disk as with their pictures, which cached features leave unread")
    target = getattr(cfg, "target", None)
    if target is not None and target.kind == "pca" and not target.file:
        changes.append("target.kind=pixels")
        assumed.append("target pca predicts as many values as pixels: target.file is not given yet")
    return override(cfg, changes), assumed


class Subject:
    """A stage's objective without memory, and what follows from it for any number of ranks."""

    def __init__(self, stage: str, cfg: TrainConfig, cuda: bool = True) -> None:
        """Raises ConfigError for sizes that do not go together."""
        self.module, self.cfg, self.cuda = stages.load(stage), filled(cfg)[0], cuda
        precision = cfg.engine.precision if cfg.engine.precision != "auto" else "bf16" if cuda else "fp32"
        self.width = stages.shape_of(cfg.model).width
        self.precision, self.element = precision, 2 if precision == "bf16" else 4
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        try:
            self.objective = on_meta(lambda: self.module.objective(self.cfg, None), dtype)  # type: ignore[arg-type]
        except (ValueError, AssertionError) as e:
            raise ConfigError(f"model.* and its companions do not go together: {e}") from None
        _without_tokenizer(self.objective)
        rules = self.module.param_rules(self.cfg)
        for name, param in self.objective.named_parameters():
            param.requires_grad_(treat(name, rules) is not None)
        follows = self.objective.follows() if isinstance(self.objective, HasTarget) else {}
        named = list(self.objective.named_parameters())
        self.trained = [p.numel() for _, p in named if p.requires_grad]
        self.frozen = [p.numel() for _, p in named if not p.requires_grad]
        self.followers = [p.numel() for n, p in named if n.startswith(tuple(follows))] if follows else []
        self.buffers = sum(b.numel() * b.element_size() for b in self.objective.buffers())
        self._footprints: dict[int, Footprint] = {}

    @cached_property
    def largest_leaf(self) -> int:
        """Elements of the largest module that is gathered in one piece."""
        return max(
            sum(p.numel() for p in m.parameters(recurse=type(m).__name__ in LEAVES)) for m in self.objective.modules()
        )

    def footprint(self, micro: int) -> Footprint:
        """Activations of a forward and backward pass of `micro` samples."""
        if micro not in self._footprints:
            self._footprints[micro] = rehearse(self.objective, self.module.example(self.cfg, micro))
        return self._footprints[micro]

    def memory(
        self, ranks: int, micro: int, gpus_per_node: int = GPUS_PER_NODE, footprint: Footprint | None = None
    ) -> Memory:
        """Bytes of one rank by kind, for `micro` samples at a time; rehearsed where no footprint is given."""
        zero, e = Zero.of(self.cfg.engine, self.cuda, self.width, gpus_per_node, ranks), self.element
        n, still, followers = (_part(sizes, ranks) for sizes in (self.trained, self.frozen, self.followers))
        apart = e == 2 or zero.optimizer != "none"  # is there a master copy beside the weights?
        optimizer = {"gradients": e * n, "master": 4 * n * apart, "moments": 8 * n, "target": 4 * followers,
                     "average": 4 * n * (self.cfg.optim.ema > 0)}  # fmt: skip
        weights = {"weights": e * n, "frozen": e * still}
        away: dict[str, int] = {"cpu": 0, "nvme": 0}
        for kinds, where in ((optimizer, zero.optimizer), (weights, zero.params)):
            if where != "none":
                away[where] += sum(kinds.values())
                kinds.update(dict.fromkeys(kinds, 0))
        found, batch = footprint or self.footprint(micro), self.module.example(self.cfg, max(micro, self._share(ranks)))
        saved, passing = self._across(found, micro, ranks)
        one_copy = (12 * n + 4 * followers) * (
            self.cfg.checkpoint.asynchronous
            or (self.cfg.faults.on_nan == "rewind" and self.cfg.faults.snapshot == "memory")
        )
        return Memory(
            **weights, **optimizer,
            secondary=e * _part([*self.trained, *self.frozen], zero.hpz) if 1 < zero.hpz < ranks else 0,
            whole=e * self._whole(zero, ranks), buckets=e * self._buckets(zero),
            batch=sum(t.numel() * t.element_size() for t in batch.values()) + self.buffers,
            activations=saved, passing=passing,
            step=ADAM_STEP[e] * self._stepped(zero, ranks),
            context=CONTEXT if self.cuda else 0, host=away["cpu"], disk=away["nvme"], saving=one_copy,
        )  # fmt: skip

    def _stepped(self, zero: Zero, ranks: int) -> int:
        """Elements that the optimizer has in hand at once; none here where it is elsewhere."""
        return _largest_sub_group(self.trained, ranks, zero.sub_group) if zero.optimizer == "none" else 0

    def _share(self, ranks: int) -> int:
        return self.cfg.optim.batch_size // ranks

    def _whole(self, zero: Zero, ranks: int) -> int:
        """Elements that are whole at a time. One rank has them whole already, where it has them at all."""
        if ranks == 1 and zero.params == "none":
            return 0
        sizes = [*self.trained, *self.frozen]
        small = sum(size for size in sizes if size < zero.persistent)
        live = max(zero.max_live if zero.reuse else 0, zero.prefetch_bucket + self.largest_leaf)
        return small + min(sum(sizes) - small, live)

    def _buckets(self, zero: Zero) -> int:
        """One that gradients are collected in, and what is sent at once, which may be one large gradient."""
        return zero.reduce_bucket * zero.contiguous + max(min(zero.reduce_bucket, sum(self.trained)), *self.trained)

    def _across(self, found: Footprint, micro: int, ranks: int) -> tuple[int, int]:
        """What a loss over all ranks' pairs adds: the features of all; while it is computed, a gradient of their size,
        three matrices of a chunk's scores and two of its features.
        """
        if not isinstance(self.objective, Contrastive) or ranks == 1:
            return found.saved, found.passing
        towers, pairs = self.objective.towers, micro * ranks
        width, gathered = towers.vision_projection.shape[1], 1 if towers.logit_bias is not None else 2
        features = 4 * pairs * width
        chunk = min(self.objective.chunk or chosen_chunk(micro, pairs), pairs)
        passing = features + 4 * chunk * (3 * micro + 2 * width)
        return found.saved + gathered * features, max(found.passing, passing)

    def with_settings(self, *settings: str) -> "Subject":
        """The same with other settings; the model is built again only where they concern it."""
        changed = override(self.cfg, settings)
        if changed.model != self.cfg.model or changed.engine.precision != self.cfg.engine.precision:
            return Subject(self.module.__name__.rsplit(".", 1)[1], changed, self.cuda)  # type: ignore[attr-defined]
        other = object.__new__(Subject)
        other.__dict__.update(self.__dict__ | {"cfg": changed})
        return other


def _part(sizes: list[int], ranks: int) -> int:
    """Elements of one rank's parts, their padding included."""
    return sum(-(-size // ranks) for size in sizes)


def _largest_sub_group(sizes: list[int], ranks: int, most: int) -> int:
    """Elements that the optimizer steps over at once: whole parts of parameters until `most` are reached."""
    largest = now = 0
    for size in sizes:
        now += -(-size // ranks)
        largest = max(largest, now)
        now = 0 if now >= most else now
    return largest


def _without_tokenizer(objective: nn.Module) -> None:
    """Tokens of a frozen tokenizer are numbers of known shape; somebody else's module need not be there to plan."""
    target = getattr(objective, "target", None)
    if tokenizer := getattr(target, "tokenizer", None):
        rows, cols = tokenizer.grid
        target.tokenizer = lambda images: torch.empty(len(images), rows * cols, dtype=torch.int64, device="meta")  # type: ignore[union-attr]
