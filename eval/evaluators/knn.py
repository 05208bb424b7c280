"""Evaluator knn: weighted nearest neighbours on frozen features, and class-mean prototypes; nothing is trained.

    python -m eval knn --run runs/demo/mae_wsp --train demo/emoji --data demo/emoji/eval-emojione.parquet

Each of the k nearest training images votes for its class with exp(cosine / temperature) (Wu et al., 2018; 0.07 as
there). `prototype/top1`: the class whose mean training feature is nearest by cosine. Letters: B images, D width,
K neighbours, S classes.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.base import EvaluatorConfig, File, Score
from eval.correct import packed
from eval.datasets import Data, check_classes
from eval.features import Encoder, extract
from eval.metrics import ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    k: tuple[int, ...] = (1, 5, 20)
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError("k must be one or more whole numbers from 1")
        if self.temperature <= 0:
            raise ValueError("temperature must be above 0")


class Knn:
    needs_train: ClassVar[bool] = True
    needs_text: ClassVar[bool] = False

    def __init__(self, cfg: Config, data: Data, seed: int) -> None:
        self.cfg, self.data = cfg, data

    def run(self, encode: Encoder) -> Iterator[Score | File]:
        assert self.data.train is not None
        bank, test = extract(encode, self.data.train), extract(encode, self.data.test)
        check_classes(self.data, test.labels.cpu().numpy(), bank.labels.cpu().numpy())
        sizes = [k for k in self.cfg.k if k <= len(bank)]
        if left := sorted(set(self.cfg.k) - set(sizes)):
            log.warning("warning: knn leaves out k=%s, there are %d training images", left, len(bank))
        classes = len(self.data.classes)
        features = F.normalize(bank.features, dim=1)  # N D
        means = prototypes(features, bank.labels, classes)  # S D
        right: dict[str, list[Tensor]] = {}
        for query, label in test.split(256):  # B D, B: the whole similarity would not fit
            query = F.normalize(query, dim=1)
            right.setdefault("prototype/top1", []).append(ranks(query @ means.T, label) == 0)
            if not sizes:
                continue
            similarity, nearest = (query @ features.T).topk(max(sizes))  # B K, best first
            weight = ((similarity - 1) / self.cfg.temperature).exp()  # B K; minus 1: the votes stay below 1
            for k in sizes:
                votes = weight.new_zeros(len(query), classes)
                votes.scatter_add_(1, bank.labels[nearest[:, :k]], weight[:, :k])  # B S
                right.setdefault(f"top1@k={k}", []).append(votes.argmax(1) == label)
        for metric in (*(f"top1@k={k}" for k in sizes), "prototype/top1"):
            hits = torch.cat(right[metric])  # N
            yield Score(metric, hits.double().mean().item(), len(test), facts={"protocol": "knn"}, right=packed(hits))


def prototypes(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """l2-normalised mean feature of every class, S D; a class without images stays at zero."""
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    return F.normalize(sums / counts[:, None], dim=1)
