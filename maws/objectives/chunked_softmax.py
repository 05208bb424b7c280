"""Losses over many classes, fused with the layer that scores them: no matrix of batch x classes ever exists.

    layer = ClassScores(width, classes)
    loss, best = layer(features, *one_over_k(synset_ids))     # B, B
    scores = layer(features)                                  # B S, for evaluation

The vocabulary is passed in chunks: forward keeps one normalising number per image, backward computes each chunk's
scores again. So the peak is batch x chunk instead of two or three float32 matrices of batch x classes, and targets are
indices and weights, never dense rows (recipes §6.2).

Axes: B images, S classes, M most classes of an image, D width, C classes of a chunk.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LOSSES = ("softmax", "sigmoid")
MOST_SCORES = 2**22  # of a chunk, 16 MiB in float32; ours
CHUNKS = (1024, 8192)  # fewest and most classes of a chunk that is chosen here: matrix products gain nothing above


class Targets(NamedTuple):
    """What an image should be scored as, by index."""

    ids: Tensor  # B M, class indices, -1 is padding
    weights: Tensor  # B M, the target value of each, 0 where padded
    mass: Tensor  # B, weight of the normalising term: 1, or 0 for an image without classes


def one_over_k(ids: Tensor) -> Targets:
    """1/k on each of an image's k classes (Mahajan et al., 2018), for softmax; a row without classes has loss 0."""
    present = ids >= 0
    count = present.sum(dim=1)
    return Targets(ids, present / count.clamp(min=1)[:, None], (count > 0).float())


def each_class(ids: Tensor) -> Targets:
    """1 on each of an image's classes, for sigmoid; a row without classes has loss 0."""
    present = ids >= 0
    return Targets(ids, present.float(), present.any(dim=1).float())


def mix(targets: Targets, others: Targets, weight: Tensor) -> Targets:
    """Targets whose loss is `weight` (B) of each image's own and the rest of what is mixed in: both losses are linear
    in the target, so the two terms of mixup (Zhang et al., 2018) take one pass over the classes.
    """
    ids = torch.cat([targets.ids, others.ids], dim=1)  # B 2M; a class of both images stands there twice
    own, rest = weight[:, None], (1 - weight)[:, None]
    weights = torch.cat([own * targets.weights, rest * others.weights], dim=1)
    return Targets(ids, weights, weight * targets.mass + (1 - weight) * others.mass)


class ClassScores(nn.Linear):
    """A linear layer that gives scores, or, given targets, each image's loss.

    The loss is computed inside this module's forward because ZeRO-3 makes weight and bias whole around it, and again
    around its backward; the arguments are plain tensors because its hooks look for tensors in them.
    """

    def __init__(self, width: int, classes: int, loss: str = "softmax", chunk: int = 0) -> None:
        """`chunk` classes at a time; 0: as many as `chosen_chunk` says."""
        super().__init__(width, classes)
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r} is not known; use {' or '.join(LOSSES)}")
        self.loss, self.chunk = loss, chunk

    def forward(  # type: ignore[override]
        self, features: Tensor, ids: Tensor | None = None, weights: Tensor | None = None, mass: Tensor | None = None
    ) -> Any:
        """Scores (B S) of features (B D); given the parts of `Targets`, losses (B, at least float32) and the index of
        each image's best class (B).
        """
        if ids is None:
            return super().forward(features)
        chunk = self.chunk or chosen_chunk(len(features), self.out_features)
        return _ChunkedLoss.apply(features, self.weight, self.bias, ids, weights, mass, self.loss, chunk)


def chosen_chunk(batch: int, classes: int) -> int:
    """Classes of a chunk for a batch: what fits in 16 MiB of float32 scores, within bounds."""
    fewest, most = CHUNKS
    return min(classes, max(fewest, min(most, MOST_SCORES // max(1, batch))))


class _ChunkedLoss(torch.autograd.Function):
    """softmax: mass log(sum exp z) - sum w z;  sigmoid: mass sum softplus(z) - sum w z;  z = x W^T + b, w the target.

    The weight itself is saved, not a view of it: backward then reads what ZeRO-3 has gathered by that time.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, weights: Tensor, mass: Tensor,
        loss: str, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        weights, mass = weights.to(_wide(features)), mass.to(_wide(features))
        empty = features.new_zeros(len(features), dtype=_wide(features))  # B
        normaliser = empty - torch.inf if loss == "softmax" else empty
        wanted, top, best = empty.clone(), empty - torch.inf, torch.zeros_like(ids[:, 0])
        for part, scores in _scores(features, weight, bias, chunk):
            if loss == "softmax":
                normaliser = torch.logaddexp(normaliser, scores.logsumexp(dim=1))
            else:
                normaliser = normaliser + F.softplus(scores).sum(dim=1)
            places, inside = _inside(ids, weights, part)
            wanted += (scores.gather(1, places) * inside).sum(dim=1)
            value, place = scores.max(dim=1)
            best = torch.where(value > top, place + part.start, best)  # the first of equals, as argmax of all
            top = torch.maximum(value, top)
        ctx.save_for_backward(features, weight, bias, ids, weights, mass, normaliser)
        ctx.loss, ctx.chunk = loss, chunk
        ctx.mark_non_differentiable(best)
        return mass * normaliser - wanted, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        features, weight, bias, ids, weights, mass, normaliser = ctx.saved_tensors
        wide, needs = features.to(_wide(features)), ctx.needs_input_grad
        to_features = torch.zeros_like(wide) if needs[0] else None
        to_weight = torch.empty_like(weight) if needs[1] else None
        to_bias = torch.empty_like(bias) if needs[2] else None
        for part, scores in _scores(features, weight, bias, ctx.chunk):
            share = scores.sub_(normaliser[:, None]).exp_() if ctx.loss == "softmax" else scores.sigmoid_()
            places, inside = _inside(ids, weights, part)
            by_scores = share.mul_(mass[:, None]).scatter_add_(1, places, -inside).mul_(grad[:, None])  # B C
            if to_features is not None:
                to_features.addmm_(by_scores, weight[part].to(wide.dtype))
            if to_weight is not None:
                to_weight[part] = by_scores.T @ wide  # summed over images in float32, then rounded once
            if to_bias is not None:
                to_bias[part] = by_scores.sum(dim=0)
        to_features = None if to_features is None else to_features.to(features.dtype)
        return to_features, to_weight, to_bias, None, None, None, None, None


def _wide(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def _scores(features: Tensor, weight: Tensor, bias: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk's classes and their scores (B C): a product in the network's precision, then at least float32."""
    for start in range(0, len(weight), chunk):
        part = slice(start, min(start + chunk, len(weight)))
        yield part, torch.addmm(bias[part], features, weight[part].T).to(_wide(features))


def _inside(ids: Tensor, weights: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Where targets lie in a chunk (B M), and their weights, 0 for those outside and for padding."""
    inside = (ids >= part.start) & (ids < part.stop)
    return (ids - part.start).clamp(0, part.stop - part.start - 1), weights * inside
