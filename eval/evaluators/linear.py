"""Evaluator linear: a linear classifier on frozen, standardised class tokens.

    python -m eval linear --run runs/demo/mae_wsp --train demo/emoji --data demo/emoji/eval-emojione.parquet

The fast form of the linear probe: features of one centre view are extracted once, and a multinomial logistic regression
is fitted by L-BFGS. Standardising stands for the BatchNorm without parameters that MAE's probe has; there are no
augmented views and no LARS schedule (recipes 9.1), so it is not the published protocol, and its difference from that on
ImageNet is not measured. The strength of l2 is chosen on images held out from the training data, never on the
evaluation data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from eval import logistic
from eval.base import EvaluatorConfig, File, Score
from eval.datasets import Data, check_classes
from eval.features import Encoder, extract
from eval.metrics import classification, topk


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    l2: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    """Strengths to choose from (recipes 9.2); one value is used as it is. Relative to the mean loss of an image."""
    held_out: float = 0.2
    """Share of the training images of every class, at least one of a class with two, on which l2 is chosen."""
    iterations: int = 100
    """Of L-BFGS for the final fit, which starts from the best solution of the search."""
    search_iterations: int = 30
    """For each strength tried, starting from the solution of the stronger one."""

    def __post_init__(self) -> None:
        if not self.l2 or min(self.l2) < 0:
            raise ValueError("l2 must be one or more numbers from 0")
        if not 0 < self.held_out < 1:
            raise ValueError("held_out must be between 0 and 1")
        if min(self.iterations, self.search_iterations) < 1:
            raise ValueError("iterations and search_iterations must be 1 or more")


class Linear:
    needs_train: ClassVar[bool] = True
    needs_text: ClassVar[bool] = False

    def __init__(self, cfg: Config, data: Data, seed: int) -> None:
        self.cfg, self.data, self.seed = cfg, data, seed

    def run(self, encode: Encoder) -> Iterator[Score | File]:
        assert self.data.train is not None
        train, test = extract(encode, self.data.train), extract(encode, self.data.test)
        check_classes(self.data, test.labels.cpu().numpy(), train.labels.cpu().numpy())
        classes = len(self.data.classes)
        held = hold_out(train.labels, self.cfg.held_out, self.seed)
        choice = choose_l2(train.features, train.labels, held, classes, self.cfg.l2, self.cfg.search_iterations)
        head = logistic.fit(
            train.features, train.labels, classes, choice.l2, start=choice.head, iterations=self.cfg.iterations
        )
        scores = torch.cat([head(query) for query, _ in test.split(4096)])  # B S
        chosen = {"l2": choice.l2, "held_out_images": int(held.sum()), "held_out_top1": choice.top1}
        for metric, value in classification(scores, test.labels).items():
            yield Score(metric, value, len(test), chosen=chosen)


def hold_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """True for a random `share` of every class: at least one image of a class that has two, never all of a class."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    place = positions_in_class(labels.cpu()[order])
    rank = torch.empty_like(place)
    rank[order] = place  # a random number 0, 1, 2, … inside the class
    counts = torch.bincount(labels.cpu())[labels.cpu()]
    held = (counts * share).round().long().clamp(min=1)
    return (rank < torch.minimum(held, counts - 1)).to(labels.device)


def positions_in_class(labels: Tensor) -> Tensor:
    """How many earlier entries have the same label. labels N -> N."""
    order = torch.argsort(labels, stable=True)
    ordered = labels[order]
    starts = torch.searchsorted(ordered, ordered)  # where the run of equal labels begins
    place = torch.empty_like(labels)
    place[order] = torch.arange(len(labels), device=labels.device) - starts
    return place


class Choice(NamedTuple):
    """A strength, its top-1 on the held-out images, and the head that had it; None where nothing was tried."""

    l2: float
    top1: float | None = None
    head: logistic.LinearHead | None = None


def choose_l2(
    features: Tensor, labels: Tensor, held: Tensor, classes: int, strengths: Sequence[float], iterations: int
) -> Choice:
    """The strength with the best top-1 on the held-out images; of equal ones the strongest."""
    if len(strengths) == 1:
        return Choice(strengths[0])
    if not held.any():  # one image a class: nothing to choose on
        return Choice(sorted(strengths)[len(strengths) // 2])
    best, head = Choice(max(strengths)), None
    for l2 in sorted(strengths, reverse=True):  # each search starts where the stronger one ended
        head = logistic.fit(features[~held], labels[~held], classes, l2, start=head, iterations=iterations)
        top1 = topk(head(features[held]), labels[held], 1)
        if best.top1 is None or top1 > best.top1:
            best = Choice(l2, top1, head)
    return best
