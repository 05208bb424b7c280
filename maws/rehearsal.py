"""A training step rehearsed on the meta device, where tensors have shapes but no memory: bytes that would be live.

    found = rehearse(objective, batch)          # an objective and a batch that were made on the meta device
    found.saved, found.peak                     # kept for the backward pass; most at any time, with what is in passing

Nothing is computed, so ViT-6.5B takes a second. Parameters and the batch are not counted, and each gradient of a
parameter is let go as soon as it is whole, as ZeRO-3 does. Attention is taken to be a fused kernel (flash or memory-
efficient), which keeps its inputs, its output and one number per row; every other operation is torch's own.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Footprint:
    """Bytes of one forward and backward pass, without parameters and without the batch."""

    saved: int  # live between forward and backward
    peak: int  # the most that is live at any time

    @property
    def passing(self) -> int:
        """What comes on top of `saved` at the worst moment."""
        return self.peak - self.saved


def rehearse(objective: nn.Module, batch: Mapping[str, Tensor]) -> Footprint:
    """One step of an objective that gives {"loss": …}; both on the meta device."""
    params = [p for p in objective.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(_let_go) for p in params]
    known = [*objective.parameters(), *objective.buffers(), *batch.values()]
    try:
        with LiveBytes(known) as live, _fused_attention():
            loss = objective(batch)["loss"]
            saved = live.now
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return Footprint(saved, live.peak)


def _let_go(param: Tensor) -> None:
    param.grad = None


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, and takes them off again when nobody holds them."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet[Any]()
        for tensor in known:
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:  # what only values have: say yes
            return True
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as a fused kernel: on the meta device torch would write out the whole matrix of logits.

    By its name, not as a torch function mode: those are off while checkpointed blocks are computed again.
    """
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return _Attention.apply(q, k, v, attn_mask)  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    """Shapes of scaled dot-product attention: B H T d each; the kernel's output lies as B T H d."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        b, h, t, _ = q.shape
        out = q.new_empty(b, t, h, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(b, h, t, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask, out, _ = ctx.saved_tensors
        like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        if not ctx.needs_input_grad[3]:
            return (*like, None)
        whole = q.new_empty(*out.shape[:3], k.shape[2])  # of a mask that all images share: each one's, then their sum
        return (*like, whole.sum_to_size(mask.shape))


def on_meta(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A module without memory, in training mode, its parameters in the precision of the run (buffers keep theirs)."""
    with torch.device("meta"):
        module = make()
    for param in module.parameters():
        param.data = param.data.to(dtype)
    return module.train()
