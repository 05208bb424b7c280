"""A copy of tensors in the host's memory, into the same buffers every time: what a save needs and a snapshot too."""

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def copy_to_host(state: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The values of `state` on the CPU, contiguous; complete when this returns.

    `into` is what an earlier call gave: its memory is used again where a tensor has the same shape and type. From a GPU
    the copy goes to pinned memory, which the GPU writes by itself at the speed of the bus; pageable memory is taken
    when the host has no more to pin.
    """
    out: dict[str, Tensor] = {}
    on_gpu = False
    for name, tensor in state.items():
        buffer = (into or {}).get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = _buffer(tensor)
        buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        out[name], on_gpu = buffer, on_gpu or tensor.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    return out


def _buffer(like: Tensor) -> Tensor:
    try:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
    except RuntimeError:  # not so much memory may be pinned
        return torch.empty(like.shape, dtype=like.dtype)
