"""Frozen features of a run's encoder, extracted once and cached.

    encoder = open_encoder(Path("runs/demo/mae_wsp"))          # decode -> preprocess -> tower -> a vector, float32
    bank = extract(encoder, data.train)                        # bank.features N D, bank.labels N
    mean = extract(encoder, data.train, "mean")                # from the same pass over the pictures

The cache is RUN/features/*.safetensors, one file per (weights, model, pre-processing, precision, data); a picture that
cannot be decoded is dropped, counted and reported, and more than 1 % of them stop the evaluation.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, cast

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data_pipeline.errors import DataError, UsageError
from data_pipeline.files import write_bytes
from data_pipeline.images import BadImage, decode
from eval.datasets import Dataset
from eval.progress import Progress
from maws.data.transforms import Preprocess, normalise
from maws.models.two_tower import TwoTower
from maws.models.vit import VisionTransformer
from maws.release import Release, load_image_tower, load_two_tower, open_release

log = logging.getLogger(__name__)

# What stands for a picture: what the tower was trained with (pooled, which is cls or mean); its class token (of several
# the mean) or the mean of its patches, after the final norm; or what is projected beside the text, l2-normalised.
Kind = Literal["pooled", "cls", "mean", "joint"]
View = Callable[[Image.Image, int], Tensor]  # RGB picture and its position in the data set -> uint8 3 H W

MAX_BAD: Final = 0.01  # share of pictures that may be broken
BATCH: Final = 128
FORMAT: Final = 3  # of the cache


@dataclass
class Encoder:
    """A frozen image tower and what it needs to see a picture. A trainer can make one from a model in memory."""

    tower: VisionTransformer
    preprocess: Preprocess
    sha256: str = ""  # of the weights
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cache: Path | None = None  # folder; None keeps nothing
    release: Release | None = None  # where the text tower comes from
    precision: str = "fp32"

    def __post_init__(self) -> None:
        self.tower = self.tower.to(self.device).eval().requires_grad_(False)

    @cached_property
    def two_tower(self) -> TwoTower:
        assert self.release is not None
        return load_two_tower(self.release).to(self.device).eval().requires_grad_(False)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 B 3 H W -> float32 on the encoder's device, normalised."""
        return normalise(images.to(self.device), self.preprocess)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What one pass of the tower gives; without class tokens there is no `cls`."""
        return ("cls", "mean") if self.tower.class_tokens else ("mean",)

    def own(self, kind: Kind) -> Kind:
        """`pooled` as what it is for this tower. Raises UsageError for the class token of a tower without one."""
        found = cast(Kind, self.tower.shape.pool) if kind == "pooled" else kind
        if found not in (*self.kinds, "joint"):
            raise UsageError(f"there are no {found} features: this encoder has no class token; use mean")
        return found

    @torch.no_grad()
    def all(self, images: Tensor) -> dict[Kind, Tensor]:
        """uint8 B 3 H W -> float32 B D of every kind that the tower has."""
        tokens = self.tower(self.prepare(images))
        return {kind: self.tower.pooled(tokens, kind).float() for kind in self.kinds}

    @torch.no_grad()
    def __call__(self, images: Tensor, kind: Kind = "pooled") -> Tensor:
        """uint8 B 3 H W -> float32 B D."""
        if kind == "joint":
            return self.two_tower.encode_image(self.prepare(images)).float()
        return self.tower.pooled(self.tower(self.prepare(images)), self.own(kind)).float()


def open_encoder(run: Path, device: torch.device) -> Encoder:
    """The encoder of a run folder or a release folder, any stage."""
    release = open_release(run)
    cache = home(release) / "features"
    return Encoder(load_image_tower(release), release.preprocess, release.sha256, device, cache, release)


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


@dataclass(frozen=True)
class Features:
    """Features of the readable pictures of a data set, in its order."""

    features: Tensor  # N D, float32, on the encoder's device
    labels: Tensor  # N
    rows: Tensor  # N, positions in the data set
    keys: tuple[str, ...]
    broken: dict[str, int]  # dropped pictures by reason

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.features.split(size), self.labels.split(size), strict=True)


def extract(encode: Encoder, dataset: Dataset, kind: Kind = "pooled") -> Features:
    """Features of `dataset`, from the cache when weights, model, pre-processing and data are the same."""
    kind = encode.own(kind)
    source = "joint" if kind == "joint" else "tower"
    identity = {
        "format": FORMAT,
        "source": source,
        "weights": encode.sha256,
        "model": encode.release.config["model"] if encode.release else None,  # heads and pooling are not in the weights
        "preprocess": asdict(encode.preprocess),
        "precision": encode.precision,
        "data": dataset.sha256,
    }
    text = json.dumps(identity, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    file = encode.cache / f"{source}-{dataset.name}-{digest}.safetensors" if encode.cache else None
    found = _load(file, text, kind) if file else None
    if found is None:
        every, rows, broken = _compute(encode, dataset, ("joint",) if kind == "joint" else encode.kinds)
        if file:
            _save(file, text, every, rows, broken)
        found = every[kind], rows, broken
    features, rows, broken = found
    if broken:
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(broken.items()))
        log.warning(
            "warning: %d of %d pictures of the %s data cannot be read and are left out: %s",
            sum(broken.values()),
            len(dataset),
            dataset.name,
            listed,
        )
    positions = rows.tolist()
    return Features(
        features.to(encode.device),
        torch.from_numpy(dataset.labels)[rows].to(encode.device),
        rows,
        tuple(dataset.keys[position] for position in positions),
        broken,
    )


def _compute(
    encode: Encoder, dataset: Dataset, kinds: Sequence[Kind]
) -> tuple[dict[Kind, Tensor], Tensor, dict[str, int]]:
    pieces: dict[Kind, list[Tensor]] = {kind: [] for kind in kinds}
    rows: list[int] = []
    broken: Counter[str] = Counter()
    with Progress(f"features of the {dataset.name} data", len(dataset)) as progress:
        for batch in decoded(dataset, range(len(dataset)), encode.preprocess):
            broken.update(bad.reason for bad in batch.broken)
            if sum(broken.values()) > MAX_BAD * len(dataset):
                first = batch.broken[0]
                raise DataError(
                    f"more than {MAX_BAD:.0%} of the {len(dataset):,} pictures of the {dataset.name} data cannot be "
                    f"read, such as '{first.key}' ({first.reason}); repair or remove them"
                )
            if batch.rows:
                of_batch = encode.all(batch.images) if "joint" not in kinds else None
                for kind in kinds:
                    pieces[kind].append((of_batch[kind] if of_batch else encode(batch.images, kind)).cpu())
                rows += batch.rows
            progress.add(len(batch.rows) + len(batch.broken))
    every: dict[Kind, Tensor] = {kind: torch.cat(parts) for kind, parts in pieces.items()}
    if not all(torch.isfinite(features).all() for features in every.values()):
        raise DataError(f"the encoder gives nan or infinity on the {dataset.name} data; its weights are damaged")
    return every, torch.tensor(rows), dict(broken)


# -------------------------------------------------------------------------------------------------------------- decode


@dataclass(frozen=True)
class Broken:
    key: str
    reason: str


@dataclass(frozen=True)
class Decoded:
    """A batch of pictures as the encoder takes them."""

    images: Tensor  # uint8 B 3 H W
    rows: list[int]  # positions of the readable ones
    broken: list[Broken]


def decoded(
    dataset: Dataset, rows: Sequence[int], preprocess: Preprocess, batch: int | None = None, view: View | None = None
) -> Iterator[Decoded]:
    """Decode batches in threads (codecs let go of the interpreter lock), a few ahead, in order.

    A `view` shows the pictures in another way than `preprocess`, such as the random crops of training.
    """
    batch = batch or BATCH

    def load(positions: Sequence[int]) -> Decoded:
        images: list[Tensor] = []
        good: list[int] = []
        broken: list[Broken] = []
        for position in positions:
            try:
                image = decode(dataset.read(position))
                images.append(view(image, position) if view else preprocess(image))
                good.append(position)
            except BadImage as error:
                broken.append(Broken(dataset.keys[position], error.reason))
        size = preprocess.image_size
        stacked = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return Decoded(stacked, good, broken)

    batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        yield from _ordered(pool, load, batches, ahead=2 * workers)


def _ordered(
    pool: ThreadPoolExecutor, function: Callable[[Sequence[int]], Decoded], items: Sequence[Sequence[int]], ahead: int
) -> Iterator[Decoded]:
    waiting: list[Future[Decoded]] = []
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        for future in waiting:
            future.cancel()


def pictures(dataset: Dataset, rows: Sequence[int], preprocess: Preprocess) -> Tensor:
    """uint8 N 3 H W of positions that are known to be readable."""
    batches = list(decoded(dataset, rows, preprocess))
    if lost := [bad for batch in batches for bad in batch.broken]:
        raise DataError(f"'{lost[0].key}' was readable before and is not now ({lost[0].reason}); is the disk failing?")
    return torch.cat([batch.images for batch in batches])


# --------------------------------------------------------------------------------------------------------------- cache


def _load(file: Path, identity: str, kind: Kind) -> tuple[Tensor, Tensor, dict[str, int]] | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("identity") != identity:
                return None
            features, rows = stored.get_tensor(kind), stored.get_tensor("rows")
        return features, rows, json.loads(metadata["broken"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        log.warning("warning: the cached features %s are damaged (%s) and are made again", file, error)
        return None


def _save(file: Path, identity: str, every: dict[Kind, Tensor], rows: Tensor, broken: dict[str, int]) -> None:
    metadata = {"identity": identity, "broken": json.dumps(broken)}
    try:
        write_bytes(file, save({**{kind: t.contiguous() for kind, t in every.items()}, "rows": rows}, metadata))
    except OSError as error:
        log.warning("warning: features are not cached, cannot write %s (%s)", file, error)
