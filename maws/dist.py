"""Ranks: who we are, waiting for each other, and means over all. The only reader of launcher environment variables."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among the others, and which launcher started it."""

    rank: int
    size: int
    local_rank: int
    launcher: str


def detect() -> World:
    """Read what torchrun, deepspeed or srun left in the environment; nothing there means one plain process.

    Fills in what `torch.distributed` needs with `setdefault`, so that nothing tries to discover MPI.
    """
    env = os.environ
    if "RANK" in env:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_RANK" in env else "environment"
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        launcher = "srun"
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_NTASKS"], LOCAL_RANK=env["SLURM_LOCALID"])
        env.setdefault("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        env.setdefault("MASTER_PORT", "29500")
    else:
        launcher = "plain python"
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")), launcher)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def share_cores(world: World) -> None:
    """Split this machine's cores between its ranks: the launcher leaves every rank all of them, which then spin.

    A set OMP_NUM_THREADS is respected.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", str(world.size))))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))


def timeout() -> timedelta:
    """How long a collective may wait for a rank before the run fails."""
    return timedelta(minutes=float(os.environ.get("MAWS_COLLECTIVE_TIMEOUT_MINUTES", "30")))


def initialised() -> bool:
    return td.is_available() and td.is_initialized()


def rank() -> int:
    return td.get_rank() if initialised() else 0


def world_size() -> int:
    return td.get_world_size() if initialised() else 1


def barrier() -> None:
    if initialised():
        td.barrier()


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank; the value is small and made by us."""
    if not initialised():
        return value
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if not initialised():
        return [value]
    out: list[Any] = [None] * world_size()
    td.all_gather_object(out, value)
    return out


def any_rank(flag: bool, device: torch.device) -> bool:
    """Is it true anywhere? All ranks ask at the same place and get the same answer."""
    t = torch.tensor([int(flag)], device=device)
    if initialised():
        td.all_reduce(t, td.ReduceOp.MAX)
    return bool(t.item())


def mean(values: Sequence[Tensor], device: torch.device) -> list[float]:
    """Mean over ranks of some scalars, in one message."""
    t = torch.stack([v.detach().float().to(device) for v in values])
    if initialised():
        td.all_reduce(t)
        t /= world_size()
    return t.tolist()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        td.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        td.all_reduce(grad)  # what every rank's loss says about every rank's rows
        return grad.chunk(world_size())[rank()]


def all_gather_with_grad(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order (each rank gives the same number); the gradient goes back to who gave them."""
    return _AllGather.apply(x) if world_size() > 1 else x  # type: ignore[return-value]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        td.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous().clone()
        td.all_reduce(grad)  # every rank's loss depends on every rank's terms
        return grad


def sum_with_grad(x: Tensor) -> Tensor:
    """Sum over ranks of tensors of one shape; a rank's terms receive the gradients of all ranks' losses."""
    return _Sum.apply(x) if world_size() > 1 else x  # type: ignore[return-value]
