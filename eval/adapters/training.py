"""Training an adapter and its head together on the few images of a split, and asking several of them at once.

Two schedules. `Fast`: a few steps on pictures that are decoded once, the head started from the linear solution: minutes
on a CPU. `Paper`: epochs of random crops with the published rates (recipes 9.2): for a GPU.

Letters: B images, D width, S classes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.adapters.adapted import Adapted
from eval.augment import random_crop
from eval.datasets import Dataset
from eval.decode import BATCH, decoded, readable
from eval.encoder import Encoder
from eval.metrics import ranks
from maws.seeding import derive, generator

HELD = 2 << 30  # bytes of decoded pictures that are kept; more are decoded again at every pass

Batches = Iterable[tuple[Tensor, Tensor]]  # uint8 B 3 H W, labels B


class Diverged(Exception):
    """The loss or a weight is not a number any more."""


@dataclass(frozen=True, kw_only=True)
class Fast:
    """Ours. VPT's rates and steps were tried on training images alone: one small encoder, one vendor's held out."""

    steps: int = 8
    batch: int = 64
    lr: tuple[float, ...] = (3e-3,)
    """Peak rates of the adapter (AdamW) to choose from; one value is used as it is."""
    weight_decay: tuple[float, ...] = (0.0,)
    """Of the adapter alone; to choose from."""
    head_lr: float = 1e-3
    """Peak rate of the head (SGD: it starts from a solution, and Adam would push rows of classes not in the batch)."""
    flip: bool = True
    """Show half of the training images mirrored (recipes 9.2)."""
    warmup: float = 0.1  # share of the steps; the paper's 10 of 100 epochs

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, self.batch)
        if self.steps < 0 or not 0 <= self.warmup < 1 or self.head_lr < 0:
            raise ValueError("steps and head_lr must be at least 0, and warmup between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Published: SGD with momentum 0.9 (or AdamW), linear warm-up, a cosine to 0."""

    optimiser: str = "sgd"
    lr: tuple[float, ...] = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)
    """To choose from. Of SGD per 256 images: the rate is lr x batch / 256; of AdamW as it is."""
    weight_decay: tuple[float, ...] = (0.01, 0.001, 1e-4, 0.0)
    """To choose from; the head's bias has none."""
    momentum: float = 0.9
    epochs: int = 100
    warmup_epochs: int = 10
    batch: int = 256
    """Images of a step, or all there are if fewer; an epoch leaves out its last, smaller batch."""
    crop: float = 224 / 256
    """The random crop's side as a share of the short side: 224 of 256 for an encoder of 224 pixels."""
    flip: bool = True

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, self.batch)
        if self.optimiser not in ("sgd", "adamw"):
            raise ValueError("optimiser must be sgd or adamw")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError("epochs must be more than warmup_epochs (set these first), which are at least 0")
        if not 0 < self.crop <= 1 or not 0 <= self.momentum < 1:
            raise ValueError("crop must be a share above 0 up to 1, and momentum from 0 to less than 1")


def _check(lr: Sequence[float], weight_decay: Sequence[float], batch: int) -> None:
    if not lr or min(lr) <= 0 or not weight_decay or min(weight_decay) < 0:
        raise ValueError("lr must be numbers above 0, and weight_decay numbers from 0")
    if batch < 1:
        raise ValueError("batch must be 1 or more")


# ------------------------------------------------------------------------------------------------------------ pictures


@dataclass
class Pictures:
    """Pictures of a data set as the encoder sees them, in an order, with their labels."""

    dataset: Dataset
    encode: Encoder
    positions: Sequence[int]  # in the data set, all readable
    labels: Tensor  # one per position
    kept: dict[int, Tensor] = field(default_factory=dict, repr=False)  # decoded, by position; at most HELD bytes

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def size(self) -> int:
        """Pictures of a forward."""
        return self.encode.batch or BATCH

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them in order: uint8 B 3 H W, labels B. Each is decoded once while there is room to keep it."""
        new = [position for position in self.positions if position not in self.kept]
        known = self.kept.keys() - new
        fresh = (image for batch in decoded(self.dataset, new, self.encode.preprocess) for image in readable(batch))
        for start, labels in zip(range(0, len(self), self.size), self.labels.split(self.size), strict=False):
            positions = self.positions[start : start + self.size]
            images = [self.kept[position] if position in known else next(fresh) for position in positions]
            for position, image in zip(positions, images, strict=True):
                if (len(self.kept) + 1) * image.numel() <= HELD:
                    self.kept[position] = image
            yield torch.stack(images), labels

    def all(self) -> Tensor:
        """uint8 N 3 H W."""
        return torch.cat([images for images, _ in self.batches()])

    def part(self, rows: Tensor) -> "Pictures":
        """Those at `rows` (n numbers from 0); what is decoded is shared."""
        positions = [self.positions[row] for row in rows.tolist()]
        return Pictures(self.dataset, self.encode, positions, self.labels[rows], self.kept)


# ------------------------------------------------------------------------------------------------------------ training


def train_fast(model: Adapted, shots: Pictures, cfg: Fast, lr: float, weight_decay: float, seed: int) -> Adapted:
    """`cfg.steps` steps from the model as it is. Raises Diverged."""
    optimisers = [
        torch.optim.AdamW(model.adapter.parameters(), lr=lr, weight_decay=weight_decay),
        torch.optim.SGD(model.head.parameters(), lr=cfg.head_lr, momentum=0.9),
    ]
    multiplier = warmup_cosine(cfg.warmup * cfg.steps, cfg.steps)
    return _train(model, shots.encode, centre_views(shots, cfg, seed), optimisers, multiplier, seed)


def train_paper(model: Adapted, shots: Pictures, cfg: Paper, lr: float, weight_decay: float, seed: int) -> Adapted:
    """All epochs. Raises Diverged."""
    batch = min(cfg.batch, len(shots))
    others = [*model.adapter.parameters(), model.head.weight]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": [model.head.bias], "weight_decay": 0.0}]
    if cfg.optimiser == "sgd":
        optimiser: torch.optim.Optimizer = torch.optim.SGD(groups, lr=lr * batch / 256, momentum=cfg.momentum)
    else:
        optimiser = torch.optim.AdamW(groups, lr=lr)
    steps = len(shots) // batch  # of an epoch
    multiplier = warmup_cosine(cfg.warmup_epochs * steps, cfg.epochs * steps)
    return _train(model, shots.encode, crops(shots, cfg, batch, seed), [optimiser], multiplier, seed)


def _train(
    model: Adapted,
    encode: Encoder,
    batches: Batches,
    optimisers: Sequence[torch.optim.Optimizer],
    multiplier: Callable[[int], float],
    seed: int,
) -> Adapted:
    model.train()
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, multiplier) for optimiser in optimisers]
    with torch.random.fork_rng(devices=[encode.device] if encode.device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "adapter dropout"))  # the only draw that takes no generator
        for images, labels in batches:
            loss = F.cross_entropy(model.scores(encode, images), labels)
            if not torch.isfinite(loss):
                raise Diverged
            model.zero_grad()
            loss.backward()
            for part in (*optimisers, *schedules):
                part.step()
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise Diverged
    return model.eval()


def centre_views(shots: Pictures, cfg: Fast, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for `cfg.steps` steps in random order, the last of one order filled up from the next; half mirrored."""
    draw = generator(seed, "adapter")
    images, order = shots.all(), torch.empty(0, dtype=torch.long)
    for _ in range(cfg.steps):
        while len(order) < cfg.batch:
            order = torch.cat([order, torch.randperm(len(images), generator=draw)])
        rows, order = order[: cfg.batch], order[cfg.batch :]
        flip = (torch.rand(len(rows), generator=draw) < 0.5) & cfg.flip
        shown = torch.where(flip[:, None, None, None], images[rows].flip(-1), images[rows])
        yield shown, shots.labels[rows.to(shots.labels.device)]


def crops(shots: Pictures, cfg: Paper, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every epoch in another order, every picture another crop of itself."""
    preprocess = shots.encode.preprocess
    size = preprocess.image_size
    for epoch in range(cfg.epochs):
        order = torch.randperm(len(shots), generator=generator(seed, "adapter", epoch))
        order = order[: len(shots) // batch * batch]
        positions = [shots.positions[row] for row in order.tolist()]
        view = random_crop(seed, epoch, size, round(size / cfg.crop), cfg.flip)
        images = map(readable, decoded(shots.dataset, positions, preprocess, batch, view))
        yield from zip(images, shots.labels[order.to(shots.labels.device)].split(batch), strict=True)


def warmup_cosine(warmup: float, steps: int) -> Callable[[int], float]:
    """Multiplier of the rate at a step: linear warm-up, then half a cosine to 0."""

    def multiplier(step: int) -> float:
        if step < warmup:
            return (step + 1) / (math.floor(warmup) + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    return multiplier


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def right(models: Sequence[Adapted], queries: Pictures) -> Tensor:
    """Which of the N pictures each of M models gets right, in one pass over them: bool M N."""
    batches = [
        torch.stack([ranks(model.scores(queries.encode, images), labels) == 0 for model in models])
        for images, labels in queries.batches()
    ]
    return torch.cat(batches, dim=1)
