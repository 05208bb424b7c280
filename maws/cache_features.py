"""`python -m maws cache-features`: the features of a locked image tower, K crops of every picture of a shard set.

    python -m maws cache-features --run runs/demo/mae_wsp --shards runs/demo/shards --crops 2 \\
        data.crop_scale=0.8,1.0 data.flip=no

What is written, and how it is read, is in maws/feature_cache.py. A shard's file appears when it is whole, so a command
that was killed goes on behind the last one. Axes: n pictures, K crops, D width.
"""

import argparse
import logging
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.images import BadImage
from data_pipeline.shardset import manifest_bytes
from maws.config import ConfigError, DataConfig, load_json, nearest, override
from maws.data.batch import Batch
from maws.data.feed import Feed
from maws.data.loader import LoadImage, StepDataset, open_shards
from maws.data.order import Item
from maws.data.photo import read
from maws.feature_cache import FORMAT, MANIFEST, SETTINGS, STORED, FeatureCache, Source, write_features
from maws.files import sha256, sync, write_json, write_whole
from maws.models.vit import VisionTransformer, normalise
from maws.release import load_image_tower, open_release

log = logging.getLogger(__name__)

SECONDS = 10  # between lines of progress
WORKER_RESTARTS = 10


class Rows(NamedTuple):
    """Rows [start, stop) of a shard: what is decoded and encoded at once."""

    shard: int
    start: int
    stop: int


class Crops:
    """Number of some rows -> the first K crops of their pictures, as the loader gives them to a training."""

    def __init__(self, load: LoadImage, parts: list[Rows], crops: int) -> None:
        self.load, self.parts, self.crops = load, parts, crops

    def reach(self, step: int) -> None:
        """Nothing is to be counted first."""

    def __getitem__(self, number: int) -> Batch:
        """`image` n*K 3 H W, row after row; `keys`; and for each row in `reasons` why it cannot be read, or None."""
        shard, start, stop = self.parts[number]
        keys = self.load.shards.index(shard).column("key").slice(start, stop - start).to_pylist()
        found = [self._row(shard, start + i, key) for i, key in enumerate(keys)]
        images = torch.cat([images for images, _ in found])
        return cast(Batch, {"keys": keys, "image": images, "bad": [], "reasons": [reason for _, reason in found]})

    def _row(self, shard: int, row: int, key: str) -> tuple[Tensor, str | None]:
        load, size = self.load, self.load.image_size
        try:
            image = read(load.shards.image_bytes(shard, row))
            visits = [Item(shard, row, key, epoch=k, copy=0) for k in range(self.crops)]
            return torch.stack([load.view(image, size, v.stream(load.seed, "augment")) for v in visits]), None
        except (BadImage, DataError) as e:
            return torch.zeros(self.crops, 3, size, size, dtype=torch.uint8), getattr(e, "reason", None) or str(e)


class Job:
    """One cache and the way to it."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Raises ConfigError for what cannot be done as asked."""
        if options.dtype not in STORED:
            raise ConfigError(f"--dtype {options.dtype} is not known; {nearest(options.dtype, list(STORED))}")
        for name, value in (("crops", options.crops), ("batch", options.batch)):
            if value < 1:
                raise ConfigError(f"--{name} {value} must be 1 or more")
        self.data = data_settings(options.shards, options.settings)
        self.shards, release = open_shards(self.data), open_release(options.run)
        self.tower, self.size = load_image_tower(release), release.config["image_size"]
        self.load = LoadImage(self.data, self.shards, options.seed, self.size)
        self.source = Source.of(self.data, release.sha256, release.shape, self.size)
        self.folder = self.source.folder(self.shards.path)
        self.options, self.dtype = options, getattr(torch, options.dtype)
        self.settings = self.source.as_json() | {
            "shards_sha256": self.shards.sha256, "crops": options.crops, "seed": options.seed, "dtype": options.dtype,
            "width": self.tower.embed_dim, "variant": release.config["variant"], "lineage": list(release.lineage),
        }  # fmt: skip

    def start(self) -> None:
        """The folder with its settings. Raises ConfigError when one of other settings is there."""
        if self.options.overwrite and self.folder.exists():
            shutil.rmtree(self.folder)
        if (self.folder / SETTINGS).is_file():
            there = load_json(self.folder / SETTINGS)
            names = ("shards_sha256", "crops", "seed", "dtype")
            if wrong := [f"{n} {there.get(n)}" for n in names if there.get(n) != self.settings[n]]:
                raise ConfigError(
                    f"{self.folder} is there already with other settings ({', '.join(wrong)}); add --overwrite to "
                    f"replace it, or ask for the same"
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / SETTINGS, self.settings)

    def name(self, shard: int) -> str:
        return f"{self.shards.tar_path(shard).stem}.arrow"

    def missing(self) -> list[int]:
        return [s for s in range(self.shards.num_shards) if not (self.folder / self.name(s)).is_file()]


def run(options: argparse.Namespace) -> int:
    """The command `cache-features`."""
    job = Job(options)
    job.start()
    missing, begun = job.missing(), time.monotonic()
    if not missing and (job.folder / MANIFEST).is_file():
        log.info("%s is finished", job.folder)
        return 0
    log.info(
        "%s: %d crops of %d samples; %d of %d shards are done", job.folder, options.crops, len(job.shards),
        job.shards.num_shards - len(missing), job.shards.num_shards,
    )  # fmt: skip
    encode_shards(job, missing)
    manifest = finish(job)
    size = sum(file["bytes"] for file in manifest["files"])
    log.info("%s: %d samples, %.1f MiB in %.0f s", job.folder, len(job.shards), size / 2**20, time.monotonic() - begun)
    return 0


def data_settings(shards: str, settings: list[str]) -> DataConfig:
    """The data settings of the training that is to come; the same words as for maws/train.py."""
    if wrong := [s for s in settings if not s.startswith("data.")]:
        raise ConfigError(f"{wrong[0]}: only data settings change what is cached; write data.name=value")
    return override(DataConfig(shards=shards), [s.removeprefix("data.") for s in settings])


def encode_shards(job: Job, missing: list[int]) -> None:
    """Write the files of some shards, one after another."""
    parts = [rows for shard in missing for rows in cut(shard, job.shards.shard_sizes[shard], job.options.batch)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tower = job.tower.to(device)
    if device.type == "cuda" and job.dtype == torch.bfloat16:  # what is kept is no finer than what is computed
        tower = tower.to(torch.bfloat16)
    feed = Feed(
        cast(StepDataset, Crops(job.load, parts, job.options.crops)),
        0,
        len(parts),
        workers(job.options),
        WORKER_RESTARTS,
    )
    try:
        _encode_all(job, tower, parts, feed, device)
    finally:
        feed.close()


def _encode_all(job: Job, tower: VisionTransformer, parts: list[Rows], feed: Feed, device: torch.device) -> None:
    keys, reasons, rows = list[str](), list[str | None](), list[Tensor]()
    spoke, begun = time.monotonic(), time.monotonic()
    for number, part in enumerate(parts, start=1):
        batch = cast(dict[str, Any], feed.next()[0])
        features = encode(tower, batch["image"].to(device), job.data).to(job.dtype).cpu()
        rows.append(features.view(len(batch["keys"]), job.options.crops, -1))
        keys += batch["keys"]
        reasons += batch["reasons"]
        if part.stop == job.shards.shard_sizes[part.shard]:
            write_shard(job.folder / job.name(part.shard), keys, reasons, torch.cat(rows))
            keys, reasons, rows = [], [], []
        if time.monotonic() - spoke > SECONDS:
            spoke = time.monotonic()
            left = (spoke - begun) / number * (len(parts) - number)
            log.info("%d of %d batches; %.0f s to go", number, len(parts), left)


@torch.no_grad()
def encode(tower: VisionTransformer, images: Tensor, data: DataConfig) -> Tensor:
    """Pooled features (n D) of uint8 images (n 3 H W)."""
    return tower.pooled(tower(normalise(images, data.mean, data.std).to(tower.dtype)))


def write_shard(path: Path, keys: list[str], reasons: list[str | None], features: Tensor) -> None:
    """A file that is there when it is whole; rows without a picture hold zeros."""
    for row, reason in enumerate(reasons):
        if reason:
            log.warning("sample %s left out: %s", keys[row], reason)
            features[row] = 0
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_features(tmp, keys, reasons, features)
        sync(tmp)
        tmp.replace(path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    sync(path.parent)


def finish(job: Job) -> dict[str, Any]:
    """Count, hash, and write the manifest. Raises DataError when more samples are unreadable than a run may have."""
    files = []
    for shard in range(job.shards.num_shards):
        path = job.folder / job.name(shard)
        rows = job.shards.shard_sizes[shard]
        files.append({"name": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": sha256(path)})
    found = FeatureCache(job.folder, job.settings | {"files": files}, "")
    reasons = Counter(reason for shard in range(job.shards.num_shards) for reason in found.reasons(shard))
    bad, most = reasons.total(), max(1, math.floor(job.data.max_bad * len(job.shards)))
    if bad > most:
        raise DataError(
            f"{bad} of {len(job.shards)} samples could not be read "
            f"({', '.join(f'{n} {reason}' for reason, n in reasons.most_common(5))}), more than data.max_bad allows "
            f"({most}); check the set with `python -m data_pipeline inspect {job.shards.path}`, or raise data.max_bad"
        )
    content = {
        "format": FORMAT,
        **job.settings,
        "samples": len(job.shards),
        "unreadable": dict(reasons),
        "files": files,
    }
    write_whole(job.folder / MANIFEST, manifest_bytes(content))
    return content


def cut(shard: int, rows: int, batch: int) -> Iterator[Rows]:
    """Parts of a shard of at most `batch` rows."""
    for start in range(0, rows, batch):
        yield Rows(shard, start, min(start + batch, rows))


def workers(options: argparse.Namespace) -> int:
    """Loader processes: as asked, or one a core that is left, at most 8."""
    if options.workers is not None:
        return options.workers
    return min(8, len(os.sched_getaffinity(0)) - 1)
