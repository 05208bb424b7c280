"""DeepSpeed ZeRO-3, and nothing else of the project imports it.

    runtime = start(cfg.engine)                     # process group, device, precision
    with runtime.partitioned(): objective = ...     # parameters are split over the ranks as they are made
    engine = runtime.build(objective, groups, cfg)  # forward, backward, step, the local part of the state
    frozen = Frozen(make, read, device)             # no training: a module whose parameters are split over the ranks

The file in force and what is merged into it are in maws/ds_config.py; the means of weights in maws/momentum.py.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from maws import compiling, dist, ds_config
from maws.config import ConfigError, Duration, EngineConfig, OptimConfig
from maws.data.batch import Batch, Losses
from maws.host_copy import copy_to_host
from maws.momentum import MomentumTarget, WeightMeans, write

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
import deepspeed  # noqa: E402 - after the accelerator is chosen, so that it does not probe and warn
from deepspeed.ops.op_builder import AsyncIOBuilder  # type: ignore[attr-defined]  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    groups,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)
from timm.models.vision_transformer import Block  # noqa: E402

log = logging.getLogger(__name__)

# Gathered in one piece: DeepSpeed's hooks run once a block, not for each layer in it. By name where the import is slow.
LEAVES: list[Any] = [Block, "XLMRobertaLayer", "BertLayer"]
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, Loshchilov and Hutter, 2019


class Runtime:
    """The process group, the device and the numbers' precision.

    `width` is the image tower's, for `engine.ds_config=auto`. Raises ConfigError for settings that cannot be used, all
    of them before a model is built.
    """

    def __init__(self, cfg: EngineConfig, optim: OptimConfig, width: int = 0) -> None:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        self.world = dist.one_device_each(torch.cuda.device_count()) if kind == "cuda" else dist.detect()
        self.precision = cfg.precision if cfg.precision != "auto" else "bf16" if kind == "cuda" else "fp32"
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"engine.precision={cfg.precision} is not known; use auto, fp32 or bf16")
        if not 0 <= optim.ema < 1:
            raise ConfigError(f"optim.ema={optim.ema} must be at least 0 (none) and less than 1; 0.9999 is usual")
        compiling.check(cfg.compile, kind)
        self.compile = cfg.compile
        self.ds_config, self.ds_config_why = ds_config.chosen(cfg.ds_config, kind, width, self.world.size)
        own = ds_config.ds_config(cfg, kind, width, self.world.size)
        self.micro, self.accumulate = ds_config.accumulation(optim, self.world.size)
        self.config = ds_config.merged(own, optim, self.precision, self.micro, self.accumulate)
        _understood(self.config, self.ds_config, self.world.size)
        self.offloaded = ds_config.offloads(self.config, "optimizer") != "none"
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
        adamw = torch.optim.AdamW(  # fused: one pass over the states, and no temporaries of their size
            groups, lr=optim.peak_lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
        )
        if self.compile == "blocks":
            compiling.compile_blocks(objective)
        set_z3_leaf_modules(objective, LEAVES, raise_if_not_found=False)
        engine, *_ = deepspeed.initialize(
            model=objective, optimizer=adamw, config=self.config, dist_init_required=False
        )
        return Engine(engine, self, optim.ema)

    def close(self) -> None:
        """End the process group. Only on success: waiting for a rank that failed would hang."""
        dist.barrier()
        if dist.initialised():
            td.destroy_process_group()
            groups._WORLD_GROUP = None  # DeepSpeed's copy of it: a later run of this process makes another


class Frozen:
    """A module for inference alone, its parameters split over the ranks: ZeRO-3 without optimizer and gradients.

    `make` gives the module, without values; `read` those of a parameter by its name, and is asked on rank 0 alone. The
    process group stands already. All ranks take part in everything, the same number of times.
    """

    def __init__(self, make: Callable[[], nn.Module], read: Callable[[str], Tensor], device: torch.device) -> None:
        own = ds_config.ds_config(EngineConfig(), device.type, ranks=dist.world_size())
        nothing = OptimConfig(batch_size=dist.world_size(), lr=0.0, length=Duration(0, "steps"))  # is trained
        config = ds_config.merged(own, nothing, "fp32", micro=1, accumulate=1)
        if device.type == "cpu":
            deepspeed.ops.__dict__["__compatible_ops__"] = {}  # no probe for compilers, no shared-memory op
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, timeout=dist.timeout(), verbose=False)  # takes the group over
        with deepspeed.zero.Init(config_dict_or_path=config):
            module = make()
        for name, param in module.named_parameters():
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0), torch.no_grad():
                if dist.rank() == 0:
                    param.copy_(read(name))
        set_z3_leaf_modules(module, LEAVES, raise_if_not_found=False)
        self.module = module.eval().requires_grad_(False)
        self._engine, *_ = deepspeed.initialize(model=self.module, config=config, dist_init_required=False)
        self._engine.eval()

    @torch.no_grad()
    def inside(self, function: Callable[[], Any]) -> Any:
        """What `function` gives, which may call any part of the module: as in its forward, parameters are whole."""
        with _forward(self.module, function):
            return self._engine()

    def close(self) -> None:
        self._engine.destroy()
        groups._WORLD_GROUP = None  # DeepSpeed's copy of the process group, which its owner ends


class Engine:
    """One objective in training."""

    def __init__(self, engine: Any, runtime: Runtime, ema: float = 0.0) -> None:
        self._engine, self.runtime = engine, runtime
        self.objective: nn.Module = engine.module
        self.device = runtime.device
        self.target = MomentumTarget(self.objective, _local_fp32)
        self.target.start()
        self.decay, self.ema = ema, WeightMeans(self.trained() if ema else [], _local_fp32, on_host=runtime.offloaded)
        self.ema.start()
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
        self.ema.follow(self.decay)
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
        kept |= {f"ema/{name}": p for name, p in self.ema.params}
        return kept | {f"average/{name}": target for name, target, _ in self.target.params}

    def buffers(self) -> dict[str, Tensor]:
        """What a checkpoint holds whole: `buffer/name` -> running statistics and the like, the same on all ranks."""
        state = self.objective.state_dict(keep_vars=True)  # leaves out what a constructor computes
        return {f"buffer/{n}": b for n, b in self.objective.named_buffers() if n in state}

    def local_state(self, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """This rank's partition of the fp32 weights and moments of everything trained, of its means (optim.ema) and
        those of what follows it, one flat tensor each; and the buffers. Copies on the CPU, in the memory of an earlier
        one if that is given."""
        state = self.buffers()
        for name, p in self.trained():
            state[f"weight/{name}"] = safe_get_local_fp32_param(p)
            for moment in MOMENTS:
                state[f"{moment}/{name}"] = _local_moment(p, moment)
        state |= {f"ema/{name}": mean for name, mean in self.ema.means.items()}
        state |= {f"average/{name}": mean for name, mean in self.target.means.items()}
        return copy_to_host(state, into)

    @torch.no_grad()
    def load_local_state(self, state: dict[str, Tensor], steps: int) -> None:
        """Put back what `local_state` gave; `steps` is how many optimizer steps had been taken."""
        zero = self._engine.optimizer
        for flat in zero.fp32_partitioned_groups_flat:  # the moments are otherwise made at the first step
            zero.optimizer.state[flat] = {
                "step": torch.tensor(float(steps), device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        for name, p in self.trained():
            weight = state[f"weight/{name}"].to(self.device)
            safe_set_local_fp32_param(p, weight)
            write(p, weight)  # the copy that forward gathers, in its own precision
            for moment in MOMENTS:
                safe_set_local_optimizer_state(p, state[f"{moment}/{name}"].to(self.device), moment)
        self.ema.load({name: state[f"ema/{name}"] for name in self.ema.means})
        self.target.load({name: state[f"average/{name}"] for name in self.target.means})
        for key, buffer in self.buffers().items():
            buffer.copy_(state[key])
        self._renew(self.objective.parameters())
        dist.barrier()

    def partition(self, param: nn.Parameter) -> tuple[int, int]:
        """(elements of the whole parameter, elements of one rank's partition, padding included)."""
        return param.ds_numel, param.ds_tensor.ds_numel  # type: ignore[attr-defined]

    def close(self) -> None:
        self._engine.destroy()
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's, which DeepSpeed makes once a process


def _understood(config: dict[str, Any], name: str, world: int) -> None:
    """Raises ConfigError for values that DeepSpeed refuses, and for NVMe where its driver cannot be built."""
    try:
        zero = DeepSpeedZeroConfig(**config["zero_optimization"])
    except (ValueError, AssertionError, TypeError) as e:
        raise ConfigError(f"engine.ds_config={name}: DeepSpeed refuses it: {' '.join(str(e).split())}") from None
    if zero.zero_hpz_partition_size > 1 and world % zero.zero_hpz_partition_size:
        raise ConfigError(
            f"engine.ds_config={name}: zero_hpz_partition_size={zero.zero_hpz_partition_size} must divide the {world} "
            f"ranks; it is the number of ranks on one machine"
        )
    nvme = "nvme" in (ds_config.offloads(config, "optimizer"), ds_config.offloads(config, "param"))
    if nvme and not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            f"engine.ds_config={name}: DeepSpeed's async_io cannot be built here; it needs the headers of libaio "
            f"(Debian and Ubuntu: apt-get install libaio-dev). zero3_offload keeps the states in memory instead"
        )


def _local_moment(param: nn.Parameter, moment: str) -> Tensor:
    """This rank's partition of a moment; before the first step there are none, which is to say zeros."""
    try:
        return safe_get_local_optimizer_state(param, moment)
    except KeyError:
        return torch.zeros_like(safe_get_local_fp32_param(param))


def _local_fp32(param: nn.Parameter) -> Tensor:
    """This rank's partition of a parameter: of the optimizer's master copy, or what there is of a frozen one."""
    master = safe_get_local_fp32_param(param)
    return master if master is not None else param.ds_tensor.float()  # type: ignore[attr-defined]


@contextmanager
def _forward(module: nn.Module, function: Callable[[], Any]) -> Iterator[None]:
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
