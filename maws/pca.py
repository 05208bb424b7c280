"""`python -m maws fit-pca`: principal components of image patches, the target of MAE's PCA row (recipes §2.3).

    python -m maws fit-pca --shards shards/ --patch 16 --components 96 --patches 1000000 --output pca.safetensors

Patches are what a run would predict: random ones of randomly cropped training images, mean and deviation taken out.

Axes: n patches, P values of a patch (3pp, channel fastest), K components.
"""

import argparse
import logging
import math
import os
import time
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipeline.errors import DataError
from data_pipeline.images import BadImage
from data_pipeline.shardset import ShardSet
from maws.config import ConfigError, DataConfig, override
from maws.data.loader import LoadImage, open_shards
from maws.data.order import Item
from maws.models.mae import patchify
from maws.models.vit import normalise
from maws.objectives.targets import Basis
from maws.seeding import stream

log = logging.getLogger(__name__)

ROWS = 8192  # patches that are added to the moments at once
MAX_BAD = 0.01  # share of pictures that may turn out unreadable
SECONDS = 10  # between lines of progress


class Moments:
    """Count, mean and scatter of rows that come in pieces, in float64 (pairwise update: Chan et al., 1983)."""

    def __init__(self, values: int) -> None:
        self.count, self.mean, self.scatter = 0, np.zeros(values), np.zeros((values, values))

    def add(self, rows: np.ndarray) -> None:
        """Take in n P more; each piece is centred on its own mean first, so that large means cost no digits."""
        rows = rows.astype(np.float64)
        mean = rows.mean(axis=0)
        centred, gap, total = rows - mean, mean - self.mean, self.count + len(rows)
        self.scatter += centred.T @ centred + np.outer(gap, gap) * (self.count * len(rows) / total)
        self.mean += gap * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        return self.scatter / (self.count - 1)


def principal_components(covariance: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """The K directions of the largest variance (K P, orthonormal rows) and their variances, largest first.

    A direction has two signs: the first of its entries that are within 1% of the largest one is made positive.
    """
    variance, vectors = np.linalg.eigh(covariance)  # ascending
    rows = vectors[:, ::-1].T[:components]
    size = np.abs(rows)
    first = (size >= 0.99 * size.max(axis=1, keepdims=True)).argmax(axis=1)
    sign = np.sign(rows[np.arange(len(rows)), first])
    return rows * sign[:, None], np.maximum(variance[::-1][:components], 0)


class RandomPatches(Dataset[Tensor | None]):
    """Number to `each` random patches of one image (n P, float32), or None when the image cannot be read."""

    def __init__(
        self, cfg: DataConfig, shards: ShardSet, images: int, each: int, patch: int, image_size: int, seed: int
    ) -> None:
        self.cfg, self.shards, self.each, self.patch, self.seed = cfg, shards, each, patch, seed
        self.load = LoadImage(cfg, shards, seed, image_size)
        chosen = stream(seed, "pca").choice(len(shards), images, replace=False, shuffle=False)
        self.places = np.sort(chosen)  # shard after shard: their files are read from one end to the other
        self.starts = list(accumulate(shards.shard_sizes, initial=0))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Tensor | None:
        place = int(self.places[number])
        shard = bisect(self.starts, place) - 1
        row = place - self.starts[shard]
        item = Item(shard, row, self.shards.index(shard).column("key")[row].as_py(), epoch=0, copy=0)
        try:
            image = self.load(item)["image"]
        except (BadImage, DataError):
            return None
        patches = patchify(normalise(image[None], self.cfg.mean, self.cfg.std), self.patch)[0]  # N P
        return patches[torch.from_numpy(item.stream(self.seed, "pca").permutation(len(patches))[: self.each])]


def fit(
    cfg: DataConfig, patch: int, components: int, patches: int, *,
    each: int = 16, image_size: int = 224, seed: int = 0, workers: int = 0,
) -> Basis:  # fmt: skip
    """Principal components of `patches` random patches, `each` of them from one image.

    Raises ConfigError for settings that do not go together and DataError for a set that cannot be read.
    """
    shards = open_shards(cfg)
    images = _check(len(shards), cfg.shards, patch, components, patches, each, image_size)
    source = RandomPatches(cfg, shards, images, each, patch, image_size, seed)
    moments, waiting, bad = Moments(3 * patch**2), [], 0
    for number, found in enumerate(_with_progress(source, workers), start=1):
        bad += found is None
        waiting += [] if found is None else [found]
        if sum(map(len, waiting)) >= ROWS or number == images:
            rows = torch.cat(waiting)[: patches - moments.count] if waiting else torch.empty(0)
            waiting = []
            if len(rows):
                moments.add(rows.numpy())
    if bad > MAX_BAD * images:
        raise DataError(
            f"{bad} of {images} pictures of {cfg.shards} cannot be read; check the set with "
            f"`python -m data_pipeline inspect {cfg.shards}`"
        )
    rows, variance = principal_components(moments.covariance, components)
    total = float(np.trace(moments.covariance))
    return Basis(moments.mean, rows, variance, patch, (cfg.mean, cfg.std), moments.count, total)


def _check(samples: int, name: str, patch: int, components: int, patches: int, each: int, image_size: int) -> int:
    """How many images are needed."""
    values = 3 * patch**2
    if patch < 1 or image_size % patch:
        raise ConfigError(f"--patch {patch} must be at least 1 and divide --image-size {image_size}")
    if not 1 <= components <= values:
        raise ConfigError(f"--components {components} must be from 1 to the {values} values of a patch")
    if not 1 <= each <= (image_size // patch) ** 2:
        raise ConfigError(f"--per-image {each} must be from 1 to the {(image_size // patch) ** 2} patches of an image")
    if patches <= values:
        raise ConfigError(f"--patches {patches} must be more than the {values} values of a patch; 1000000 is usual")
    images = math.ceil(patches / each)
    if images > samples:
        raise ConfigError(
            f"--patches {patches} at --per-image {each} needs {images} images and {name} has {samples}; "
            f"try --patches {samples * each}, or a larger --per-image (at most {(image_size // patch) ** 2})"
        )
    return images


def _with_progress(source: RandomPatches, workers: int) -> Iterator[Tensor | None]:
    spoke = time.monotonic()
    for number, found in enumerate(DataLoader(source, batch_size=None, num_workers=workers), start=1):
        yield found
        if time.monotonic() - spoke > SECONDS:
            spoke = time.monotonic()
            log.info("%d of %d images", number, len(source))


def run(options: argparse.Namespace) -> int:
    """The command `fit-pca`."""
    cfg = override(DataConfig(shards=options.shards), [s.removeprefix("data.") for s in options.settings])
    begun, workers = time.monotonic(), options.workers
    if workers is None:
        workers = min(8, len(os.sched_getaffinity(0)))
    basis = fit(
        cfg, options.patch, options.components, options.patches,
        each=options.per_image, image_size=options.image_size, seed=options.seed, workers=workers,
    )  # fmt: skip
    basis.write(Path(options.output), {"seed": options.seed, "shards_sha256": open_shards(cfg).sha256})
    shares = np.cumsum(basis.variance) / basis.total_variance
    for k in sorted({1, 3, 10, 30, options.components}):
        if k <= options.components:
            log.info("%4d components explain %5.1f%% of the variance", k, 100 * shares[k - 1])
    log.info("%s: %d patches in %.0f s", options.output, basis.patches, time.monotonic() - begun)
    return 0
