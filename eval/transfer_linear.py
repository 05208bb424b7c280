"""A transfer's grid with a linear classifier on cached features: minutes on a laptop, where finetuning takes days.

A softmax head on standardised features of one centre view, AdamW with cosine decay over the epochs, in the order of a
seed. It is a stand-in for finetuning with the same grid, not the papers' protocol. Letters: N images, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.logistic import LinearHead, standardisation
from eval.metrics import ranks
from eval.transfers import Grid, Point
from maws.schedule import warmup_cosine


def fit(features: Tensor, labels: Tensor, classes: int, lr: float, decay: float, grid: Grid, seed: int) -> LinearHead:
    """Train a head from zero. features N D, labels N."""
    mean, scale = standardisation(features)
    x = (features - mean) / scale
    head = torch.nn.Linear(x.shape[1], classes, device=x.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    batch = min(grid.batch, len(x))
    peak = lr * batch / 256  # base lr, as in finetuning
    groups = [{"params": [head.weight], "weight_decay": decay}, {"params": [head.bias], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999))
    generator = torch.Generator().manual_seed(seed)
    steps, step = max(1, round(grid.epochs * math.ceil(len(x) / batch))), 0
    multiplier = warmup_cosine(0, steps)
    while step < steps:
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(batch):
            if step == steps:
                break
            for group in optimiser.param_groups:
                group["lr"] = peak * multiplier(step)
            optimiser.zero_grad()
            F.cross_entropy(head(x[rows]), labels[rows]).backward()
            optimiser.step()
            step += 1
    return LinearHead(mean, scale, head.weight.detach(), head.bias.detach())


def top1(head: LinearHead, features: Tensor, labels: Tensor) -> float:
    hits = [ranks(head(x), y) == 0 for x, y in zip(features.split(4096), labels.split(4096), strict=True)]
    return torch.cat(hits).double().mean().item()


def point(
    train: tuple[Tensor, Tensor], held: Tensor, test: tuple[Tensor, Tensor], classes: int,
    lr: float, decay: float, grid: Grid, seed: int,
) -> Point:  # fmt: skip
    """Train on what is not held out; score both. `train` and `test` are features and labels, `held` is bool N."""
    features, labels = train
    head = fit(features[~held], labels[~held], classes, lr, decay, grid, seed)
    return Point(lr, decay, seed, top1(head, features[held], labels[held]), top1(head, *test))
