"""Batch norm whose statistics are those of the rows of all ranks, on GPUs over NCCL and on CPUs over gloo.

torch's SyncBatchNorm refuses CPU tensors, so that a two-rank test could not run it. Names of parameters and buffers are
those of nn.BatchNorm1d: `weight bias running_mean running_var num_batches_tracked`.

Axes: R rows of this rank, C channels.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from maws import dist


class BatchNorm1d(nn.Module):
    """nn.BatchNorm1d over the rows of all ranks (Ioffe and Szegedy, 2015); rows may differ in number between ranks.

    All ranks run it the same number of times. Statistics are float32 at least, whatever the precision of the rest: a
    running mean in bfloat16 would not see an update of 1 %.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.empty(channels))  # values come from the rules of models/init.py
        self.bias = nn.Parameter(torch.empty(channels))
        # `.float()`: inside deepspeed.zero.Init torch.zeros makes bfloat16
        self.register_buffer("running_mean", torch.zeros(channels).float())
        self.register_buffer("running_var", torch.ones(channels).float())
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise R C: in training by the mean and biased variance of all ranks' rows, otherwise by the running ones.

        Raises ValueError for a single row in training: it has no variance.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            mean, var = self._statistics(wide)
        else:
            mean, var = self.running_mean, self.running_var
        y = (wide - mean) * (var + self.eps).rsqrt() * self.weight + self.bias
        return y.to(x.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over all ranks, each C, and one step of the running ones.

        Two passes, since E[x^2] - E[x]^2 cancels where the mean is large; the second message is another C numbers.
        """
        rows = dist.sum_with_grad(torch.tensor([float(len(x))], device=x.device, dtype=x.dtype))
        if len(x) * dist.world_size() < 2:  # not `rows`, which would wait for the device
            raise ValueError("batch norm in training needs more than one row; raise optim.batch_size")
        mean = dist.sum_with_grad(x.sum(0)) / rows
        var = dist.sum_with_grad((x - mean).square().sum(0)) / rows
        with torch.no_grad():
            unbiased = var * rows / (rows - 1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        return mean, var

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast as any module, but keep the running statistics in float32 when an engine casts the model."""
        kept: dict[str, Any] = {n: b for n, b in self._buffers.items() if b is not None and b.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = self._buffers[name]
            if now is not None and now.dtype.itemsize < before.dtype.itemsize:
                self._buffers[name] = before.to(now.device)
        return self
