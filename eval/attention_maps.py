"""Attention weights of a ViT as it stands, and how far its heads look.

    with watch(tower, blocks, see): tower(images)      # see(block, Attended) for each block, in order

The fused attention of a forward pass gives no weights. Here hooks read what each block's `qkv` gave, and the weights
are made again, some queries at a time, with the bias of relative positions and timm's q_norm and k_norm where they are.
Nothing of the model is changed. Axes: B images, H heads, T tokens = C class tokens + N patches, R some of the queries,
d width of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from maws.models.vit import VisionTransformer

WEIGHTS: Final = 1 << 24  # that may exist at once: 64 MiB of float32


@dataclass(frozen=True)
class Attended:
    """What the heads of a block compare."""

    queries: Tensor  # B H T d, float32, scaled
    keys: Tensor  # B H T d, float32
    bias: Tensor | None  # broadcasts to B H T T

    def weights(self, rows: slice | Tensor) -> Tensor:
        """softmax(q k^T + bias) of some queries, in float32 whatever the pass is in: B H R T; each row sums to 1."""
        with torch.autocast(self.queries.device.type, enabled=False):
            logits = self.queries[:, :, rows] @ self.keys.transpose(-2, -1)
            if self.bias is not None:
                logits = logits + self.bias[:, :, rows].float()
            return logits.softmax(dim=-1)

    def chunks(self, start: int, most: int = WEIGHTS) -> Iterator[slice]:
        """Queries from `start` on, so many at a time that their weights number `most` or fewer (or one query)."""
        images, heads, tokens, _ = self.queries.shape
        size = max(1, most // (images * heads * tokens))
        yield from (slice(row, min(row + size, tokens)) for row in range(start, tokens, size))


See = Callable[[int, Attended], None]


@contextmanager
def watch(tower: VisionTransformer, blocks: Sequence[int], see: See) -> Iterator[None]:
    """While open, every forward of `tower` shows the attention of these blocks (from 0) to `see`."""
    handles: list[Any] = []
    for number in blocks:
        attention: Any = tower.blocks[number].attn
        bias: dict[str, Tensor | None] = {}

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], bias: dict[str, Any] = bias) -> None:
            bias["of this pass"] = kwargs.get("attn_mask", args[1] if len(args) > 1 else None)

        def after(
            _: nn.Module, args: tuple[Any, ...], qkv: Tensor,
            number: int = number, attention: Any = attention, bias: dict[str, Any] = bias,
        ) -> None:  # fmt: skip
            see(number, _attended(attention, qkv, bias.get("of this pass")))

        handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(attention.qkv.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attended(attention: Any, qkv: Tensor, bias: Tensor | None) -> Attended:
    """qkv B T 3Hd, as timm's Attention lays it out."""
    b, t, _ = qkv.shape
    q, k, _ = qkv.reshape(b, t, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)  # B H T d each
    q, k = attention.q_norm(q), attention.k_norm(k)
    return Attended(q.float() * attention.scale, k.float(), bias)


# ----------------------------------------------------------------------------------------------------------- distances


def patch_distances(grid: tuple[int, int], patch: int) -> Tensor:
    """Between the centres of all patches, Euclidean, in pixels: N N, patches in reading order."""
    rows, cols = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij")
    centres = torch.stack([rows.flatten(), cols.flatten()], dim=1) * patch  # N 2
    return (centres[:, None] - centres[None]).square().sum(-1).sqrt()


@dataclass(frozen=True)
class Reach:
    """Means over the patches of each picture: B H each."""

    over_all: Tensor  # sum_k a_qk distance(q, k) over the patches k, in pixels; a class token counts as no distance
    over_patches: Tensor  # the same with the weights of the patches brought to a sum of 1
    class_share: Tensor  # weight on the class tokens, 0..1


def reach(attended: Attended, distances: Tensor, class_tokens: int, most: int = WEIGHTS) -> Reach:
    """How far each head looks, on average over the patches that ask; class tokens do not ask (recipes §9.11).

    A query whose weights on the patches are all 0 (in float32) counts as looking nowhere: 0 pixels.
    """
    images, heads, tokens, _ = attended.queries.shape
    sums = torch.zeros(3, images, heads, dtype=torch.float64, device=attended.queries.device)
    for rows in attended.chunks(class_tokens, most):
        weights = attended.weights(rows)[..., class_tokens:]  # B H R N
        far = (weights * distances[rows.start - class_tokens : rows.stop - class_tokens]).sum(-1)  # B H R
        kept = weights.sum(-1)  # B H R
        renormalised = far / kept.clamp(min=torch.finfo(torch.float32).tiny)
        sums += torch.stack([x.double().sum(-1) for x in (far, renormalised, 1 - kept)])
    over_all, over_patches, share = sums / (tokens - class_tokens)
    return Reach(over_all, over_patches, share.clamp(min=0))


def maps(attended: Attended, queries: Sequence[int], grid: tuple[int, int], class_tokens: int) -> Tensor:
    """How strongly some patches (numbers in reading order) look at every patch: B H R h w, each map's sum at most 1."""
    rows = torch.tensor(queries, device=attended.queries.device) + class_tokens
    return attended.weights(rows)[..., class_tokens:].unflatten(-1, grid)
