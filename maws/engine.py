"""DeepSpeed ZeRO-3, and nothing else of the project imports it.

    runtime = start(cfg.engine)                     # process group, device, precision
    with runtime.partitioned(): objective = ...     # parameters are split over the ranks as they are made
    engine = runtime.build(objective, groups, cfg)  # forward, backward, step, the local part of the state

`ds_configs/*.json` hold what only DeepSpeed knows; batch, learning rate, clipping and precision are ours and are merged
here. A file that also sets them is an error: one owner per number.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from maws import dist
from maws.config import ConfigError, EngineConfig, OptimConfig, load_json, nearest
from maws.data.batch import Batch, Losses
from maws.momentum import MomentumTarget

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
import deepspeed  # noqa: E402 - after the accelerator is chosen, so that it does not probe and warn
from deepspeed.utils import (  # noqa: E402
    groups,
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)
from timm.models.vision_transformer import Block  # noqa: E402

log = logging.getLogger(__name__)

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
OURS = {
    "train_batch_size": "optim.batch_size",
    "train_micro_batch_size_per_gpu": "optim.micro_batch",
    "gradient_accumulation_steps": "optim.micro_batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim.lr, optim.betas, optim.weight_decay",
    "scheduler": "optim.schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "torch_autocast": "engine.precision",
}
# Gathered in one piece: DeepSpeed's hooks run once a block, not for each layer in it. By name where the import is slow.
LEAVES: list[Any] = [Block, "XLMRobertaLayer"]
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, Loshchilov and Hutter, 2019


def ds_config(cfg: EngineConfig, device: str) -> dict[str, Any]:
    """The DeepSpeed file in force. Raises ConfigError for an unknown file, a doubled setting, or another ZeRO stage."""
    name = cfg.ds_config if cfg.ds_config != "auto" else "zero3" if device == "cuda" else "zero3_cpu"
    path = Path(name) if name.endswith(".json") else DS_CONFIGS / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in DS_CONFIGS.glob("*.json"))
        raise ConfigError(f"engine.ds_config={cfg.ds_config}: there is no {path}; {nearest(name, known)}")
    config = load_json(path)
    for key, ours in OURS.items():
        if key in config:
            raise ConfigError(f"{path} sets {key}, which is ours: remove it there and set {ours} instead")
    stage = config.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise ConfigError(f"{path} has ZeRO stage {stage}; checkpoints and export are written for stage 3")
    return config


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


class Runtime:
    """The process group, the device and the numbers' precision."""

    def __init__(self, cfg: EngineConfig, optim: OptimConfig) -> None:
        self.world = dist.detect()
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        self.config = ds_config(cfg, kind)
        self.micro, self.accumulate = accumulation(optim, self.world.size)
        self.precision = cfg.precision if cfg.precision != "auto" else "bf16" if kind == "cuda" else "fp32"
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"engine.precision={cfg.precision} is not known; use auto, fp32 or bf16")
        self.config |= {
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": optim.clip,
            "bf16": {"enabled": self.precision == "bf16"},
            "zero_allow_untested_optimizer": True,  # torch's AdamW: nothing is compiled on the user's machine
            "steps_per_print": 1 << 60,
        }
        if kind == "cpu":
            dist.share_cores(self.world)
            deepspeed.ops.__dict__["__compatible_ops__"] = {}  # no probe for compilers, no shared-memory op
        self.device = torch.device(kind, self.world.local_rank if kind == "cuda" else None)  # type: ignore[arg-type]
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        if not dist.initialised():
            backend = "nccl" if kind == "cuda" else "gloo"
            deepspeed.init_distributed(dist_backend=backend, timeout=dist.timeout(), verbose=False)

    def partitioned(self) -> AbstractContextManager[Any]:
        """Parameters made inside are split over the ranks at once; nothing in the config but the file's own keys."""
        return deepspeed.zero.Init(config_dict_or_path=self.config)

    def gather(self, params: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Parameters are whole inside; what rank 0 wrote is everybody's afterwards."""
        return deepspeed.zero.GatheredParameters(params, modifier_rank=0)

    def build(self, objective: nn.Module, groups: list[dict[str, Any]], optim: OptimConfig) -> "Engine":
        adamw = torch.optim.AdamW(groups, lr=optim.peak_lr, betas=optim.betas, weight_decay=optim.weight_decay)
        set_z3_leaf_modules(objective, LEAVES, raise_if_not_found=False)
        engine, *_ = deepspeed.initialize(
            model=objective, optimizer=adamw, config=self.config, dist_init_required=False
        )
        return Engine(engine, self)

    def close(self) -> None:
        """End the process group. Only on success: waiting for a rank that failed would hang."""
        dist.barrier()
        if dist.initialised():
            td.destroy_process_group()
            groups._WORLD_GROUP = None  # DeepSpeed's copy of it: a later run of this process makes another


class Engine:
    """One objective in training."""

    def __init__(self, engine: Any, runtime: Runtime) -> None:
        self._engine, self.runtime = engine, runtime
        self.objective: nn.Module = engine.module
        self.device = runtime.device
        self.target = MomentumTarget(self.objective, _local_fp32)
        self.target.start()
        self._renew(p.target for p in self.target.params)

    def step(self, batch: Batch, progress: float = 0.0) -> Losses:
        """Forward, backward and one optimizer step on this rank's share; the losses averaged over its micro-batches.

        `progress` (0 to 1) is how much of the training is done before this step; a momentum target asks for it.
        """
        self._engine.train()
        total: Losses = {}
        for micro in self._micro_batches(batch):
            losses: Losses = self._engine(micro)
            self._engine.backward(losses["loss"])
            self._engine.step()
            for name, value in losses.items():
                total[name] = (
                    total.get(name, torch.zeros((), device=self.device)) + value.detach() / self.runtime.accumulate
                )
        if self.target.params:
            momentum = self.objective.momentum(progress)  # type: ignore[operator]
            self.target.follow(momentum)
            self._renew(p.target for p in self.target.params)
            total["momentum"] = torch.tensor(momentum, device=self.device)
        return total

    def _renew(self, params: Iterable[nn.Parameter]) -> None:
        """After partitions were written: small parameters are kept whole, and forward reads those without gathering."""
        changed = {id(p) for p in params}
        whole = [p for p in self._engine.optimizer.persistent_parameters if id(p) in changed]
        if whole:
            whole[0].partition(whole)
            whole[0].all_gather(whole)

    def _micro_batches(self, batch: Batch) -> Iterator[dict[str, Any]]:
        tensors = {k: v.to(self.device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}
        for i in range(self.runtime.accumulate):
            part = slice(i * self.runtime.micro, (i + 1) * self.runtime.micro)
            yield {k: v[part] for k, v in tensors.items()}

    def set_lr(self, lr: float) -> None:
        """The rate of this step; every group takes its own multiple."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    @torch.no_grad()
    def inside(self, module: nn.Module, function: Callable[[], Tensor]) -> Tensor:
        """What `function` gives in place of the forward of one of the objective's modules, in evaluation mode.

        Parameters are whole only inside the forward of the module that owns them, and only the engine may be called;
        all ranks take part.
        """
        self._engine.eval()
        with _forward(module, function), _forward(self.objective, module):
            return self._engine()

    def grad_norm(self) -> float:
        """The global norm before clipping."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.objective.named_parameters() if p.requires_grad]

    def partitions(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds cut into partitions: key -> the parameter that is cut in the same way."""
        kept = {f"{kind}/{name}": p for name, p in self.trained() for kind in ("weight", *MOMENTS)}
        return kept | {f"average/{name}": target for name, target, _ in self.target.params}

    def buffers(self) -> dict[str, Tensor]:
        """What a checkpoint holds whole: `buffer/name` -> running statistics and the like, the same on all ranks."""
        state = self.objective.state_dict(keep_vars=True)  # leaves out what a constructor computes
        return {f"buffer/{n}": b for n, b in self.objective.named_buffers() if n in state}

    def local_state(self) -> dict[str, Tensor]:
        """This rank's partition of the fp32 weights and moments of everything trained and of the means of what follows
        it, one flat tensor each; and the buffers."""
        state = self.buffers()
        for name, p in self.trained():
            state[f"weight/{name}"] = safe_get_local_fp32_param(p)
            for moment in MOMENTS:
                state[f"{moment}/{name}"] = safe_get_local_optimizer_state(p, moment)
        state |= {f"average/{name}": mean for name, mean in self.target.means.items()}
        return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()}

    @torch.no_grad()
    def load_local_state(self, state: dict[str, Tensor], steps: int) -> None:
        """Put back what `local_state` gave; `steps` is how many optimizer steps had been taken."""
        zero = self._engine.optimizer
        for flat in zero.fp32_partitioned_groups_flat:  # the moments are otherwise made at the first step
            zero.optimizer.state[flat] = {
                "step": torch.tensor(float(steps)),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        for name, p in self.trained():
            weight = state[f"weight/{name}"].to(self.device)
            safe_set_local_fp32_param(p, weight)
            p.ds_tensor.copy_(weight)  # type: ignore[attr-defined]  # the copy that forward gathers, in its own precision
            for moment in MOMENTS:
                safe_set_local_optimizer_state(p, state[f"{moment}/{name}"].to(self.device), moment)
        self.target.load({name: state[f"average/{name}"] for name in self.target.means})
        for key, buffer in self.buffers().items():
            buffer.copy_(state[key])
        self._renew(self.objective.parameters())
        dist.barrier()

    def partition(self, param: nn.Parameter) -> tuple[int, int]:
        """(elements of the whole parameter, elements of one rank's partition, padding included)."""
        return param.ds_numel, param.ds_tensor.ds_numel  # type: ignore[attr-defined]

    def full_weights(self, wanted: Callable[[str], object] = bool) -> Iterator[tuple[str, Tensor]]:
        """The parameters whose names are wanted (all are true), whole: fp32 master values where there are some, on the
        CPU; all ranks take part."""
        for name, p in self.objective.named_parameters():
            if not wanted(name):
                continue
            if p.requires_grad:
                yield name, safe_get_full_fp32_param(p).detach().float().cpu().reshape(p.ds_shape)  # type: ignore
            else:
                with deepspeed.zero.GatheredParameters([p]):
                    value = p.detach().float().cpu().clone()
                yield name, value

    def close(self) -> None:
        self._engine.destroy()


def _local_fp32(param: nn.Parameter) -> Tensor:
    """This rank's partition of a parameter: of the optimizer's master copy, or what there is of a frozen one."""
    master = safe_get_local_fp32_param(param)
    return master if master is not None else param.ds_tensor.float()  # type: ignore[attr-defined]


@contextmanager
def _forward(module: nn.Module, function: Callable[[], Tensor]) -> Iterator[None]:
    """For a while, calling the module (its hooks stay) is calling the function."""
    own = module.__dict__  # not setattr, which would register a module given as a function
    before = own.get("forward")
    own["forward"] = function
    try:
        yield
    finally:
        del own["forward"]
        if before is not None:
            own["forward"] = before
