"""A run's image tower and what it needs to see a picture: what every evaluator is given.

    encode = open_encoder(Path("runs/demo/mae_wsp"), pick_device("auto"), image_size=448, precision="bf16")
    encode(images)                                             # uint8 B 3 H W -> float32 B D

Pictures become features in features.py; other resolutions are in resolution.py, towers that do not fit into one device
in partition.py.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast

import torch
from torch import Tensor

from data_pipeline.errors import DataError, UsageError
from eval.decode import BATCH
from eval.resolution import at_size, check, scaled
from maws import dist
from maws.data.transforms import Preprocess, normalise
from maws.models.two_tower import TwoTower
from maws.models.vit import VisionTransformer
from maws.release import Release, load_image_tower, load_two_tower, open_release

if TYPE_CHECKING:
    from eval.partition import Partition

T = TypeVar("T")

# What stands for a picture: what the tower was trained with (pooled, which is one of the next three); its class token
# (of several the mean) or the mean of its patches, after the final norm; the norm of the latter's mean, of a tower that
# has this pool; or what is projected beside the text, l2-normalised.
Kind = Literal["pooled", "cls", "mean", "mean_norm", "joint"]

PRECISIONS: Final = ("fp32", "bf16")


@dataclass
class Encoder:
    """A frozen image tower and what it needs to see a picture. A trainer can make one from a model in memory."""

    tower: VisionTransformer
    preprocess: Preprocess
    sha256: str = ""  # of the weights; without it nothing is kept
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cache: Path | None = None  # folder; None keeps nothing
    release: Release | None = None  # where the text tower comes from
    precision: str = "fp32"  # of matrix products; bf16 is torch's autocast. Weights, norms and features are float32
    batch: int | None = None  # pictures of a forward
    partition: "Partition | None" = None  # whose tower it is, if its parameters are split over the ranks

    def __post_init__(self) -> None:
        if self.partition is None:
            self.tower = self.tower.to(self.device).eval().requires_grad_(False)

    @cached_property
    def two_tower(self) -> TwoTower:
        if self.partition is not None:
            return cast(TwoTower, self.partition.two_tower)
        assert self.release is not None
        towers = load_two_tower(self.release)
        towers.image = self.tower  # the same weights, once in memory, and at this resolution
        return towers.to(self.device).eval().requires_grad_(False)

    @property
    def extraction(self) -> dict[str, Any]:
        """How features are computed, for the record; none of it changes more than their last bits."""
        split = "none" if self.partition is None else "zero3"
        return {"batch": self.batch or BATCH, "ranks": dist.world_size(), "partition": split}

    @property
    def manner(self) -> str:
        """What is not as usual, for people: `, 448 px (positions interpolated from 224), bf16, on 2 ranks`."""
        trained = self.release.config["image_size"] if self.release else self.preprocess.image_size
        size = self.preprocess.image_size
        said = [f"{size} px (positions interpolated from {trained})"] if size != trained else []
        said += [self.precision] if self.precision != "fp32" else []
        said += [f"on {dist.world_size()} ranks"] if dist.world_size() > 1 else []
        said += ["split over them (ZeRO-3)"] if self.partition is not None else []
        return "".join(f", {part}" for part in said)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 B 3 H W -> float32 on the encoder's device, normalised."""
        return normalise(images.to(self.device, non_blocking=images.is_pinned()), self.preprocess)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What one pass of the tower gives; without class tokens there is no `cls`."""
        every: tuple[Kind, ...] = ("cls", "mean") if self.tower.class_tokens else ("mean",)
        return (*every, "mean_norm") if self.tower.norms_the_mean else every

    def own(self, kind: Kind) -> Kind:
        """`pooled` as what it is for this tower. Raises UsageError for one that it does not have."""
        found = cast(Kind, self.tower.shape.pool) if kind == "pooled" else kind
        if found not in (*self.kinds, "joint"):
            why = "has no class token" if found == "cls" else "does not take the norm of a mean"
            raise UsageError(f"there are no {found} features: this encoder {why}; use {' or '.join(self.kinds)}")
        return found

    @torch.no_grad()
    def all(self, images: Tensor) -> dict[Kind, Tensor]:
        """uint8 B 3 H W -> float32 B D of every kind that the tower has."""

        def forward() -> dict[Kind, Tensor]:
            with self.arithmetic():
                tower = self.tower if self.partition is None else self.partition.forward
                tokens = tower(self.prepare(images)).float()
            return {kind: self.tower.pooled(tokens, kind).float() for kind in self.kinds}

        return self._told_of_memory(forward)

    @torch.no_grad()
    def __call__(self, images: Tensor, kind: Kind = "pooled") -> Tensor:
        """uint8 B 3 H W -> float32 B D."""
        if kind != "joint":
            return self.all(images)[self.own(kind)]

        towers = self.two_tower if self.partition is None else cast(TwoTower, self.partition.module)

        def forward() -> Tensor:
            with self.arithmetic():
                return TwoTower.encode_image(towers, self.prepare(images)).float()

        return self._told_of_memory(forward)

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 by autocast; float32 is float32 also in the convolution, for which cuDNN would take tf32."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        if self.device.type == "cuda":
            return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        return contextlib.nullcontext()

    def _told_of_memory(self, forward: Callable[[], T]) -> T:
        try:
            return self.partition.inside(forward) if self.partition is not None else forward()
        except torch.OutOfMemoryError:
            batch = self.batch or BATCH
            raise UsageError(
                f"the GPU has not enough memory for {batch} pictures of {self.preprocess.image_size} pixels at a time; "
                f"give --batch {max(1, batch // 2)}, or --precision bf16"
            ) from None


def open_encoder(
    run: Path, device: torch.device, image_size: int | None = None, precision: str = "fp32",
    batch: int | None = None, partition: str = "none",
) -> Encoder:  # fmt: skip
    """The encoder of a run folder or a release folder, any stage.

    With `image_size` at another resolution than it was trained at; `partition` is explained in partition.py. Raises
    UsageError for what cannot be had, and DataError when the weights are replaced while they are read.
    """
    _check_settings(device, precision, batch)
    release = open_release(run)
    size = image_size or release.preprocess.image_size
    trained = release.config["image_size"]
    check(release.shape, trained, size)
    before, sha256 = signature(release), release.sha256
    split = None
    if partition != "none":
        from eval.partition import Partition, wanted

        split = Partition(release, size, device) if wanted(partition, release, device) else None
    try:
        tower = split.tower if split else at_size(load_image_tower(release), size).to(device)
    except torch.OutOfMemoryError:
        raise UsageError(f"the weights of {run} do not fit into {device}; start several ranks (torchrun)") from None
    if signature(release) != before:
        raise DataError(f"the weights in {release.folder} were replaced while they were read; start again")
    preprocess = scaled(release.preprocess, size)
    return Encoder(
        tower, preprocess, sha256, device, home(release) / "features", release, precision, batch, partition=split
    )


def _check_settings(device: torch.device, precision: str, batch: int | None) -> None:
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision} is not known; use {' or '.join(PRECISIONS)}")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UsageError(f"--precision bf16: {torch.cuda.get_device_name(device)} has no bfloat16; use fp32")
    if batch is not None and batch < 1:
        raise UsageError(f"--batch {batch} must be at least 1; the default is {BATCH}")


def signature(release: Release) -> list[tuple[int, ...]]:
    """Which files the weights are in, and when they were written: theirs changes with every change of a file."""
    files = sorted({release.weights, *release.weights.parent.glob(f"{release.stem}*.safetensors")})
    stats = [file.stat() for file in files]
    return [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one. Raises UsageError for what is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try auto") from None
    return device


def home(release: Release) -> Path:
    """The folder for what is made of a release: its run's, or its own when it lies somewhere else.

    Never the path the user gave, which may be that of a file (RUN/release/ema.safetensors).
    """
    return release.folder.parent if release.folder.name == "release" else release.folder
