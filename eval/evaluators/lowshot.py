"""Evaluator lowshot: K training images per class, several random splits; a linear classifier and VPT on a frozen trunk.

    python -m eval lowshot --run runs/demo/mae_wsp --train demo/emoji --data demo/emoji/eval-emojione.parquet

K is 1 and 5 from 5 seeds (recipes 9.2); a class with fewer than K images gives all it has. Every (K, seed) is written
down as a split file beside the results. One score per seed: `1-shot/linear/top1`, `5-shot/vpt/top1`.

Hyper-parameters are fixed, or chosen on the training images of the first seed alone: l2 of the linear classifier on one
image per class held out of its largest split, and then used for every K and seed.

VPT is meant to be cheap, so that many encoders can be compared on a CPU: its head starts from the linear solution of
the same split (on features under the initial prompts, which all splits share), and prompts and head are then trained
together for a fixed, small number of steps (`vpt.steps`), without gradients for the trunk's weights; pictures are
decoded once. This is far shorter than the paper's 100 epochs: raise `vpt.steps` on a GPU.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from eval import logistic
from eval.adapters.vpt import Vpt, initial_prompts, prompted_features
from eval.base import EvaluatorConfig, File, Score
from eval.datasets import Data, check_classes
from eval.evaluators.linear import choose_l2, hold_out, positions_in_class
from eval.features import BATCH, Encoder, Features, extract, pictures
from eval.metrics import topk
from eval.progress import Progress
from maws.seeding import generator

METHODS = ("linear", "vpt")

Splits = dict[tuple[int, int], Tensor]  # (K, seed) -> positions among the training features
Value = tuple[tuple[int, int], str, float]  # (K, seed), method, top-1


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    l2: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    iterations: int = 60
    search_iterations: int = 30


@dataclass(frozen=True, kw_only=True)
class VptConfig:
    """Rates and steps were tried on training images alone: one small encoder, the images of one vendor held out."""

    prompts: int = 8  # recipes 9.2
    steps: int = 8
    batch: int = 64
    lr: float = 3e-3
    """Peak rate of the prompts (Adam)."""
    head_lr: float = 1e-3
    """Peak rate of the head (SGD: it starts from a solution, and Adam would push rows of classes not in the batch)."""
    flip: bool = True
    """Show half of the training images mirrored (recipes 9.2)."""
    warmup: float = 0.1  # share of the steps; the paper's 10 of 100 epochs


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    k: tuple[int, ...] = (1, 5)
    seeds: int = 5
    """Splits per K: --seed, --seed + 1, …"""
    methods: tuple[str, ...] = METHODS
    linear: LinearConfig = field(default_factory=LinearConfig)
    vpt: VptConfig = field(default_factory=VptConfig)

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(f"unknown method '{min(unknown)}', there are: {', '.join(METHODS)}")
        if not self.k or min(self.k) < 1 or self.seeds < 1:
            raise ValueError("k must be one or more whole numbers from 1, and seeds at least 1")


class Lowshot:
    needs_train: ClassVar[bool] = True
    needs_text: ClassVar[bool] = False

    def __init__(self, cfg: Config, data: Data, seed: int) -> None:
        self.cfg, self.data = cfg, data
        self.seeds = range(seed, seed + cfg.seeds)

    def run(self, encode: Encoder) -> Iterator[Score | File]:
        assert self.data.train is not None
        train, test = extract(encode, self.data.train), extract(encode, self.data.test)
        check_classes(self.data, test.labels.cpu().numpy(), train.labels.cpu().numpy())
        chosen = self._choose(train)
        splits = {(k, seed): split(train, k, seed) for k in self.cfg.k for seed in self.seeds}
        for (k, seed), rows in splits.items():
            yield split_file(train, rows, k, seed)
        methods = [score for name, score in (("linear", self._linear), ("vpt", self._vpt)) if name in self.cfg.methods]
        for score in methods:
            for (k, seed), method, value in score(encode, train, test, splits, chosen["linear.l2"]):
                file = split_file(train, splits[k, seed], k, seed)
                hashes = {"split": hashlib.sha256(file.text.encode()).hexdigest()}
                yield Score(f"{k}-shot/{method}/top1", value, len(test), seed, chosen, hashes)

    def _linear(self, encode: Encoder, train: Features, test: Features, splits: Splits, l2: float) -> Iterator[Value]:
        with Progress("low-shot linear", len(splits)) as progress:
            for which, rows in splits.items():
                head = self._fit(train.features[rows], train.labels[rows], l2)
                yield which, "linear", topk(head(test.features), test.labels, 1)
                progress.add(1)

    def _vpt(self, encode: Encoder, train: Features, test: Features, splits: Splits, l2: float) -> Iterator[Value]:
        """All splits start from the same random prompts, so that features under them are made once for all heads."""
        assert self.data.train is not None
        cfg, preprocess = self.cfg.vpt, encode.preprocess
        prompts = initial_prompts(encode.tower, cfg.prompts, generator(self.seeds[0], "prompts")).to(encode.device)
        used = torch.cat(list(splits.values())).unique()
        start = torch.zeros_like(train.features)
        with Progress("features under the first prompts", len(used)) as progress:
            for rows in used.split(BATCH):
                images = pictures(self.data.train, train.rows[rows.cpu()].tolist(), preprocess)
                with torch.no_grad():
                    start[rows] = prompted_features(encode.tower, prompts, encode.prepare(images))
                progress.add(len(rows))
        queries = pictures(self.data.test, test.rows.tolist(), preprocess)
        with Progress("low-shot VPT", len(splits)) as progress:
            for (k, seed), rows in splits.items():
                images = pictures(self.data.train, train.rows[rows.cpu()].tolist(), preprocess)
                head = self._fit(start[rows], train.labels[rows], l2)
                model = train_vpt(encode, Vpt(encode.tower, prompts, head), images, train.labels[rows], cfg, seed)
                yield (k, seed), "vpt", topk(predict(model, encode, queries), test.labels, 1)
                progress.add(1)

    def _fit(self, features: Tensor, labels: Tensor, l2: float) -> logistic.LinearHead:
        return logistic.fit(features, labels, len(self.data.classes), l2, iterations=self.cfg.linear.iterations)

    def _choose(self, train: Features) -> dict[str, Any]:
        """The strength of l2, and what it was chosen on."""
        strengths, seed, k = self.cfg.linear.l2, self.seeds[0], max(self.cfg.k)
        rows = split(train, k, seed)
        features, labels = train.features[rows], train.labels[rows]
        held = hold_out(labels, 1 / k, seed)  # one image of every class that has two
        choice = choose_l2(features, labels, held, len(self.data.classes), strengths, self.cfg.linear.search_iterations)
        where = f"seed {seed}, {k}-shot, {int(held.sum())} of its images held out" if choice.head else "fixed"
        return {"linear.l2": choice.l2, "linear.l2_chosen_on": where, "linear.held_out_top1": choice.top1}


def split(train: Features, k: int, seed: int) -> Tensor:
    """Positions in `train` of at most `k` random images of every class, sorted by key.

    Depends on the keys, the labels and the seed alone, not on the order of the files; 1-shot is part of 5-shot.
    """
    by_key = sorted(range(len(train)), key=lambda row: train.keys[row])
    shuffled = torch.randperm(len(by_key), generator=generator(seed, "lowshot"))
    order = torch.tensor(by_key)[shuffled]
    kept = order[positions_in_class(train.labels.cpu()[order]) < k]
    return torch.tensor(sorted(kept.tolist(), key=lambda row: train.keys[row]), device=train.labels.device)


def split_file(train: Features, rows: Tensor, k: int, seed: int) -> File:
    """The images of a split, to compare with other codes."""
    keys = [train.keys[row] for row in rows.tolist()]
    name = hashlib.sha256("\n".join(sorted(train.keys)).encode()).hexdigest()[:8]
    return File(f"splits/{name}-{k}shot-seed{seed}.json", json.dumps({"k": k, "seed": seed, "keys": keys}, indent=0))


def train_vpt(encode: Encoder, model: Vpt, images: Tensor, labels: Tensor, cfg: VptConfig, seed: int) -> Vpt:
    """Train prompts and head together on uint8 N 3 H W."""
    draw = generator(seed, "vpt")
    optimisers = [
        torch.optim.Adam([model.prompts], lr=cfg.lr),
        torch.optim.SGD([model.weight, model.bias], lr=cfg.head_lr, momentum=0.9),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: multiplier(step, cfg)) for o in optimisers]
    order = torch.empty(0, dtype=torch.long)
    for _ in range(cfg.steps):
        while len(order) < cfg.batch:
            order = torch.cat([order, torch.randperm(len(images), generator=draw)])
        batch, order = order[: cfg.batch], order[cfg.batch :]
        flip = (torch.rand(len(batch), generator=draw) < 0.5) & cfg.flip
        shown = torch.where(flip[:, None, None, None], images[batch].flip(-1), images[batch])
        loss = F.cross_entropy(model(encode.prepare(shown)), labels[batch.to(labels.device)])
        model.zero_grad()
        loss.backward()
        for part in (*optimisers, *schedules):
            part.step()
    return model.eval()


def multiplier(step: int, cfg: VptConfig) -> float:
    """Linear warm-up, then half a cosine to 0."""
    warmup = cfg.warmup * cfg.steps
    if step < warmup:
        return (step + 1) / (math.floor(warmup) + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(cfg.steps - warmup, 1)))


@torch.no_grad()
def predict(model: Vpt, encode: Encoder, images: Tensor) -> Tensor:
    """Scores of uint8 N 3 H W, N S."""
    return torch.cat([model(encode.prepare(batch)) for batch in images.split(BATCH)])
