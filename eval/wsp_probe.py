"""The linear probe with the settings of SWAG: a linear layer trained by SGD on random resized crops (recipes 9.1).

All rates learn side by side from one pass of the trunk, each in two heads: one learns from all training images, the
other from all but those held out. The latter says which rate is best, and the former is what is evaluated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline.errors import UsageError
from eval.augment import resized_crop
from eval.features import Features
from eval.held_out import hold_out
from eval.metrics import topk
from eval.probes import Course, Kind, Learnt, Probe, Task, fitting_batch, too_high, train


@dataclass(frozen=True, kw_only=True)
class WspConfig:
    """SWAG's settings [torchvision #5793; recipes 9.1]; its rates are not known: those are suggested in recipes 9.1."""

    epochs: int = 28
    batch: int = 1024
    lr: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 0.003)
    """Peak rates, as they are; one is used, of several the best on the held-out training images."""
    momentum: float = 0.9
    weight_decay: float = 1e-9
    resize: float = 1.0

    def __post_init__(self) -> None:
        if not self.lr or min(self.lr) <= 0:
            raise ValueError("lr must be one or more numbers above 0")
        if self.epochs < 1 or self.batch < 2 or self.resize < 1:
            raise ValueError("epochs and resize must be 1 or more, and batch 2 or more")


class Pair(NamedTuple):
    """Two heads of one rate."""

    whole: Probe
    part: Probe | None  # without the held-out images; None where there is nothing to choose


def run(task: Task, cfg: WspConfig, held_out: float) -> Iterator[Learnt]:
    """The probe with the best rate for each kind of features, from one pass over the views."""
    batch = fitting_batch(cfg.batch, len(task.labels), "wsp")
    held = hold_out(task.labels, held_out, task.seed)
    rates = sorted(dict.fromkeys(cfg.lr))
    if len(rates) > 1 and not held.any():
        raise UsageError("one image a class leaves nothing to choose a rate on; give one, such as linear.wsp.lr=0.1")
    tried: dict[Kind, list[Pair]] = {
        kind: [
            Pair(_probe(task, cfg, kind, rate, None), _probe(task, cfg, kind, rate, ~held) if len(rates) > 1 else None)
            for rate in rates
        ]
        for kind in task.readable
    }
    size = task.encode.preprocess.image_size
    course = Course("wsp", cfg.epochs, batch, 0, lambda epoch: resized_crop(task.seed, epoch, size))
    train(task, [probe for pairs in tried.values() for pair in pairs for probe in pair if probe], course)
    facts = {"epochs": cfg.epochs, "batch": batch, "augmentation": "random resized crop, flip"}
    for kind, pairs in tried.items():
        best, chosen = best_rate(pairs, task.readable[kind], held)
        yield Learnt(kind, best, chosen, facts | {"lr": best.rate})


def best_rate(pairs: Sequence[Pair], images: Features, held: Tensor) -> tuple[Probe, dict[str, Any]]:
    """The rate whose head is best on the held-out images, which it has not learnt from; of equal ones the lowest.

    Raises UsageError when every rate was so high that its weights are no longer finite.
    """
    good = [pair for pair in pairs if all(probe.is_finite for probe in pair if probe)]
    if not good:
        raise too_high("linear.wsp.lr=" + ",".join(f"{pair.whole.rate:g}" for pair in pairs))
    features, labels = images.features[held], images.labels[held]
    top1 = {pair.whole.rate: topk(pair.part.scores(features), labels, 1) for pair in good if pair.part}
    if not top1:
        return good[0].whole, {}
    best = max(top1, key=lambda rate: top1[rate])
    told = {"held_out_images": int(held.sum()), "held_out_top1": top1[best]}
    tried = {f"{pair.whole.rate:g}": top1.get(pair.whole.rate) for pair in pairs}
    return next(pair.whole for pair in good if pair.whole.rate == best), {"lr": best, **told, "top1_by_lr": tried}


def _probe(task: Task, cfg: WspConfig, kind: Kind, rate: float, learns: Tensor | None) -> Probe:
    """All heads of a kind begin with the same weights."""
    head = task.head(kind)
    optimiser = torch.optim.SGD(
        head.parameters(), rate, cfg.momentum, weight_decay=cfg.weight_decay, nesterov=cfg.momentum > 0
    )
    return Probe(task.encode.own(kind), rate, head, optimiser, learns)
