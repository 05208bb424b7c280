"""Ranks: waiting for each other, means over all, and gathering. Who we are is in maws/launchers.py."""

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from maws.launchers import World
from maws.launchers import detect as detect  # with dist.rank() and the like: who we are
from maws.launchers import free_port as free_port
from maws.launchers import one_device_each as one_device_each
from maws.launchers import started_as_first as started_as_first


def share_cores(world: World) -> None:
    """Split this machine's cores between its ranks: the launcher leaves every rank all of them, which then spin.

    A set OMP_NUM_THREADS is respected.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))


def timeout() -> timedelta:
    """How long a collective may wait for a rank before the run fails."""
    return timedelta(minutes=float(os.environ.get("MAWS_COLLECTIVE_TIMEOUT_MINUTES", "30")))


def initialised() -> bool:
    return td.is_available() and td.is_initialized()


def rank() -> int:
    return td.get_rank() if initialised() else 0


def world_size() -> int:
    return td.get_world_size() if initialised() else 1


def master() -> str:
    """The host of rank 0, as the launcher announced it."""
    return os.environ.get("MASTER_ADDR") or socket.gethostname()


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


def mean(values: Sequence[Tensor], device: torch.device) -> list[float]:
    """Mean over ranks of some scalars, in one message."""
    t = torch.stack([v.detach().float().to(device) for v in values])
    if initialised():
        td.all_reduce(t)
        t /= world_size()
    return t.tolist()


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest over ranks of each number, in one message."""
    t = torch.tensor(values, device=device)
    if initialised():
        td.all_reduce(t, td.ReduceOp.MAX)
    return t.tolist()


def all_gather(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order; each rank gives the same number."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    td.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        td.all_reduce(grad)  # what every rank's loss says about every rank's rows
        return grad.chunk(world_size())[rank()].clone()  # a view would keep the rows of all ranks


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
