"""MAE's linear probe: batch norm without parameters and a linear layer, trained by LARS on random crops (recipes 9.1).

The statistics of batch norm are those of the whole batch; in MAE's code each GPU has those of its 512 images.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from eval.augment import byol_crop
from eval.lars import Lars
from eval.probes import Course, Kind, Learnt, Probe, Task, fitting_batch, too_high, train


@dataclass(frozen=True, kw_only=True)
class MaeConfig:
    """MAE's linear probe [main_linprobe.py, util/lars.py; recipes 9.1]; 50 epochs are enough for L and H."""

    epochs: int = 90
    warmup: int = 10
    """Epochs in which the rate rises linearly; then half a cosine to 0."""
    batch: int = 16384
    lr: float = 0.1
    """For every 256 images of a batch: 6.4 at 16,384."""
    momentum: float = 0.9
    trust: float = 0.001
    weight_decay: float = 0.0
    resize: float = 256 / 224
    """Short side before the centre crop of the evaluation, over the side of the crop."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2 or self.lr <= 0 or self.resize < 1:
            raise ValueError("epochs and resize must be 1 or more, batch 2 or more, and lr above 0")


def run(task: Task, cfg: MaeConfig) -> Iterator[Learnt]:
    """A probe for each kind of features, from one pass over the views."""
    batch = fitting_batch(cfg.batch, len(task.labels), "mae")
    rate = cfg.lr * batch / 256
    probes: dict[Kind, Probe] = {}
    for kind in task.readable:
        linear = task.head(kind)
        head = nn.Sequential(nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6), linear)
        optimiser = Lars(head.parameters(), rate, cfg.momentum, cfg.trust, cfg.weight_decay)
        probes[kind] = Probe(task.encode.own(kind), rate, head.to(task.encode.device), optimiser)
    size = task.encode.preprocess.image_size
    train(
        task,
        list(probes.values()),
        Course("mae", cfg.epochs, batch, cfg.warmup, lambda e: byol_crop(task.seed, e, size)),
    )
    facts = {"epochs": cfg.epochs, "batch": batch, "lr": rate, "augmentation": "BYOL crop, flip"}
    for kind, probe in probes.items():
        if not probe.is_finite:
            raise too_high(f"linear.mae.lr={cfg.lr:g}")
        yield Learnt(kind, probe, {}, facts)
