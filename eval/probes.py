"""Linear probes trained on augmented views: the trunk is frozen, and sees other views of the pictures in every epoch.

    for each epoch, for each batch:  views ─▶ trunk ─▶ features B D ─▶ every probe takes a step with its own rate

Any number of probes (learning rates, kinds of features) learn side by side from one pass of the trunk. Under several
ranks the views are shared out and the features gathered; every rank then takes the same steps. All randomness is a
function of the seed.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from data_pipeline.errors import DataError, UsageError
from eval import distributed
from eval.augment import View
from eval.datasets import Dataset
from eval.decode import BATCH, Decoded, batches_of, decoded_batches, readable
from eval.encoder import Encoder, Kind
from eval.features import Features
from eval.progress import Progress
from maws.schedule import warmup_cosine
from maws.seeding import generator

log = logging.getLogger(__name__)


@dataclass
class Probe:
    """A head on one kind of features."""

    kind: Kind  # not `pooled`, but what that is
    rate: float  # at the peak of the schedule
    head: nn.Module  # B D -> B S
    optimiser: Optimizer
    learns: Tensor | None = None  # N, bool: the images it learns from; None: all

    def step(self, features: Tensor, labels: Tensor, which: Tensor, multiplier: float) -> None:
        """One step on a batch; `which` are its positions among the training images."""
        if self.learns is not None:
            mine = self.learns[which]
            features, labels = features[mine], labels[mine]
            if len(labels) < 2:  # statistics of a batch need two
                return
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * multiplier
        self.optimiser.zero_grad()
        F.cross_entropy(self.head(features), labels).backward()
        self.optimiser.step()

    @property
    def is_finite(self) -> bool:
        """False when its rate was so high that the weights went to infinity."""
        return all(bool(torch.isfinite(weight).all()) for weight in self.head.parameters())

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """N D -> N S."""
        self.head.eval()
        return torch.cat([self.head(part) for part in features.split(4096)])


@dataclass(frozen=True)
class Course:
    """What all probes of a training share."""

    name: str
    epochs: int
    batch: int
    warmup: int  # epochs
    view: Callable[[int], View]  # epoch -> how pictures look


@dataclass(frozen=True)
class Task:
    """What probes are trained for."""

    encode: Encoder
    dataset: Dataset
    readable: dict[Kind, Features]  # centre views of its readable pictures, by the kinds that are asked for
    classes: int
    seed: int

    @property
    def labels(self) -> Tensor:
        return next(iter(self.readable.values())).labels

    def head(self, kind: Kind) -> nn.Linear:
        """Weights from a truncated normal of deviation 0.01, bias 0 (MAE; recipes 9.1)."""
        linear = nn.Linear(self.readable[kind].features.shape[1], self.classes)
        draw = generator(self.seed, "linear head", self.encode.own(kind))
        nn.init.trunc_normal_(linear.weight, std=0.01, generator=draw)
        nn.init.zeros_(linear.bias)
        return linear.to(self.encode.device)


def too_high(setting: str) -> UsageError:
    """`setting` is such as linear.mae.lr=0.1."""
    return UsageError(f"{setting} is too high for these features: the weights went to infinity; lower it")


class Learnt(NamedTuple):
    """A probe after training, for the kind of features that was asked for."""

    kind: Kind
    probe: Probe
    chosen: dict[str, Any]
    facts: dict[str, Any]


def fitting_batch(batch: int, images: int, name: str) -> int:
    """The batch size, or all images where there are not so many; that is told."""
    if batch > images:
        log.warning(
            "warning: linear.%s.batch=%d, and there are %d training images: every batch is all of them, a step an "
            "epoch; set linear.%s.batch lower",
            name, batch, images, name,
        )  # fmt: skip
    return min(batch, images)


def train(task: Task, probes: Sequence[Probe], course: Course) -> None:
    """Train all probes on views of the readable pictures; what is left of an epoch after its last whole batch is not
    seen in it, as in MAE's code.

    Raises DataError for features that are not finite, and for a picture that can no longer be read.
    """
    readable, seed = next(iter(task.readable.values())), task.seed
    steps = len(readable) // course.batch
    multiplier = warmup_cosine(course.warmup * steps, course.epochs * steps)
    with Progress(f"{course.name}, {course.epochs} epochs: views", course.epochs * steps * course.batch) as progress:
        for epoch in range(course.epochs):
            order = torch.randperm(len(readable), generator=generator(seed, "probe order", epoch))
            batches = [order[at : at + course.batch] for at in range(0, steps * course.batch, course.batch)]
            views = _views(task.encode, task.dataset, readable.rows, batches, course.view(epoch))
            for number, (which, features) in enumerate(zip(batches, views, strict=True), epoch * steps):
                distributed.pulse(number, course.name)
                which = which.to(readable.labels.device)
                for probe in probes:
                    probe.step(features[probe.kind], readable.labels[which], which, multiplier(number))
                progress.add(course.batch)


def _views(
    encode: Encoder, dataset: Dataset, rows: Tensor, batches: Sequence[Tensor], view: View
) -> Iterator[dict[Kind, Tensor]]:
    """Features of each batch under `view`, on all ranks; pictures are decoded ahead of the batch in work."""
    size = encode.batch or BATCH
    chunks = [batches_of(range(len(batch)), size) for batch in batches]  # places inside the batch
    mine = [distributed.own_share(of_batch) for of_batch in chunks]
    asked = [rows[batch[list(places)]].tolist() for batch, own in zip(batches, mine, strict=True) for places in own]
    pictures = decoded_batches(dataset, asked, encode.preprocess, view, pin=encode.device.type == "cuda")
    for batch, of_batch, own in zip(batches, chunks, mine, strict=True):
        yield _gathered(encode, pictures, len(batch), own, distributed.steps(of_batch))
    next(pictures, None)  # ends the threads


def _gathered(
    encode: Encoder, pictures: Iterator[Decoded], count: int, own: Sequence[Sequence[int]], forwards: int
) -> dict[Kind, Tensor]:
    """Features of one batch: this rank's chunks, then everybody's. All ranks do as many forwards."""
    tables: dict[Kind, Tensor] = {}
    for number in range(forwards):
        places = own[number] if number < len(own) else ()
        found = encode.all(readable(next(pictures)) if places else _black(encode))
        for kind, features in found.items():
            table = tables.setdefault(kind, features.new_zeros(count, features.shape[1]))
            if places:
                table[places[0] : places[-1] + 1] = features
    distributed.exchange(tables, torch.tensor([place for chunk in own for place in chunk], dtype=torch.long))
    if not all(torch.isfinite(table).all() for table in tables.values()):
        raise DataError("the encoder gives nan or infinity on views of the training data; its weights are damaged")
    return tables


def _black(encode: Encoder) -> Tensor:
    """A picture for nobody, where another rank still has some."""
    size = encode.preprocess.image_size
    return torch.zeros(1, 3, size, size, dtype=torch.uint8)
