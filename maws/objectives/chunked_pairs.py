"""The losses of pairs that meet in one space, without the matrix of all their scores: CLIP's softmax, SigLIP's sigmoid.

    losses, behind = softmax_of_pairs(image, all_text, scale, first)           # b, b
    losses, behind = sigmoid_of_pairs(image, all_text, scale, bias, first)

The columns are passed in chunks: forward keeps one number per row, backward computes each chunk's scores again, so the
peak is a few matrices of b x chunk where the plain formulas keep several of b x B (B = 32,768: 4 GiB each on one rank).
Scores are at least float32, whatever the features are.

Axes: b rows of this rank, B columns of all ranks, C columns of a chunk, E width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from maws.objectives.chunked_softmax import chosen_chunk


def softmax_of_pairs(rows: Tensor, columns: Tensor, scale: Tensor, first: int, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """Cross-entropy of finding each row's own column among all (Radford et al., 2021), and how far its score is behind
    the best one, both b.

    The own column of row i is number first + i; a score is `scale` (1,) times the product of a row (b E) and a column
    (B E). `chunk` columns at a time; 0: chosen.
    """
    return _ChunkedPairs.apply(rows, columns, scale, None, first, chunk or chosen_chunk(len(rows), len(columns)))  # type: ignore[return-value]


def sigmoid_of_pairs(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, first: int, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """A yes or no for every pair (Zhai et al., 2023, SigLIP): the sum over columns of -log sigmoid(±score), where plus
    is the row's own column, and how far that is behind the best, both b. `bias` (1,) is added to every score; the rest
    is as above.
    """
    return _ChunkedPairs.apply(rows, columns, scale, bias, first, chunk or chosen_chunk(len(rows), len(columns)))  # type: ignore[return-value]


class _ChunkedPairs(torch.autograd.Function):
    """softmax (no bias): log sum exp z - z_own;  sigmoid: sum softplus(z) - z_own;  z = scale x·y + bias.

    The second is SigLIP's, as softplus(-z) = softplus(z) - z.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, first: int, chunk: int
    ) -> tuple[Tensor, Tensor]:
        empty = rows.new_zeros(len(rows), dtype=_wide(rows))  # b
        normaliser = empty - torch.inf if bias is None else empty.clone()
        own, top = empty.clone(), empty - torch.inf
        for part, scores in _scores(rows, columns, scale, bias, chunk):
            if bias is None:
                normaliser = torch.logaddexp(normaliser, scores.logsumexp(dim=1))
            else:
                normaliser += F.softplus(scores).sum(dim=1)
            mine, place = _own(part, first, len(rows))
            own[mine] = scores[mine].diagonal(place)
            top = torch.maximum(top, scores.amax(dim=1))
        ctx.save_for_backward(rows, columns, scale, bias, normaliser)
        ctx.first, ctx.chunk = first, chunk
        behind = top - own
        ctx.mark_non_differentiable(behind)
        return normaliser - own, behind

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, columns, scale, bias, normaliser = ctx.saved_tensors
        x, factor = rows.to(_wide(rows)), scale.to(_wide(rows))
        weighted = torch.zeros_like(x)  # b E, the sum of columns by what the loss says about their scores
        to_columns = torch.empty_like(columns) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(factor) if ctx.needs_input_grad[3] else None
        for part, scores in _scores(rows, columns, scale, bias, ctx.chunk):
            by_scores = scores.sub_(normaliser[:, None]).exp_() if bias is None else scores.sigmoid_()
            mine, place = _own(part, ctx.first, len(rows))
            by_scores[mine].diagonal(place).sub_(1)
            by_scores.mul_(grad[:, None])  # b C
            weighted.addmm_(by_scores, columns[part].to(x.dtype))
            if to_columns is not None:
                to_columns[part] = factor * (by_scores.T @ x)
            if to_bias is not None:
                to_bias += by_scores.sum()
        to_scale = (weighted * x).sum().view_as(scale).to(scale.dtype)  # the products are linear in it
        to_rows = (factor * weighted).to(rows.dtype)
        return to_rows, to_columns, to_scale, None if to_bias is None else to_bias.to(scale.dtype), None, None


def _wide(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def _scores(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk's columns and their scores (b C)."""
    x = rows.to(_wide(rows)) * scale
    for start in range(0, len(columns), chunk):
        part = slice(start, min(start + chunk, len(columns)))
        scores = x @ columns[part].to(x.dtype).T
        yield part, scores if bias is None else scores.add_(bias)


def _own(part: slice, first: int, rows: int) -> tuple[slice, int]:
    """The rows whose own columns lie in a chunk, and the diagonal of the chunk's scores of these rows that they are."""
    low, high = max(part.start - first, 0), max(min(part.stop - first, rows), 0)
    low = min(low, high)
    return slice(low, high), first + low - part.start
