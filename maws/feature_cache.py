"""Image features of a locked tower, computed once and kept beside the shards (`python -m maws cache-features`).

    SHARDS/features/TOWER-CROPS/settings.json   what is cached, written first; the name is of two hashes, 12 digits each
                                00000.arrow     a row for each sample of shards/00000.tar: key, reason, features (K D)
                                manifest.json   sizes, hashes and counts; written last: with it the cache is finished

    cache = open_cache(shards, source, make); cache.verify(part); cache.read(shard, row, crop)       # D

Crop k is the one that epoch k of a training with the same seed would take of the sample's first visit. A sample that
could not be read has a reason and no features. bfloat16 is kept as its bits, in uint16.

Axes: n samples of a shard, K crops, D width of the tower.
"""

import hashlib
import json
import shlex
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.images import BadImage
from data_pipeline.shardset import FEATURES, ShardSet, manifest_bytes
from maws import dist
from maws.config import ConfigError, DataConfig, to_json
from maws.data.loader import Sample
from maws.data.order import Item, Part
from maws.files import sha256
from maws.models.vit import Shape

FORMAT = 1
FOLDER, SETTINGS, MANIFEST = FEATURES, "settings.json", "manifest.json"
CROP_SETTINGS = ("crop", "crop_scale", "flip", "jitter", "jitter_probability", "three_augment", "mean", "std")
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
OPEN_FILES = 1024  # mapped at a time; the system's own limit is 65,530 for all of a process
MOST_HASHED = 16 * 2**30  # bytes that a rank reads at its start to compare hashes: seconds; sizes are always compared


@dataclass(frozen=True)
class Source:
    """What features are of: a tower, and pictures cropped in one way."""

    tower_sha256: str  # of the release's weights
    model: Mapping[str, Any]  # how the tower computes: the fields of its Shape
    image_size: int
    crops: Mapping[str, Any]  # the `data.` settings that a crop depends on

    @classmethod
    def of(cls, data: DataConfig, tower_sha256: str, shape: Shape, image_size: int) -> "Source":
        settings = to_json(data)
        model = {name: value for name, value in asdict(shape).items() if name != "image"}
        return cls(tower_sha256, model, image_size, {name: settings[name] for name in CROP_SETTINGS})

    def as_json(self) -> dict[str, Any]:
        return {"tower_sha256": self.tower_sha256, "model": dict(self.model), "image_size": self.image_size,
                "crop_settings": dict(self.crops)}  # fmt: skip

    def folder(self, shards: Path) -> Path:
        how = json.dumps([self.model, self.image_size, self.crops], sort_keys=True).encode()
        return shards / FOLDER / f"{self.tower_sha256[:12]}-{hashlib.sha256(how).hexdigest()[:12]}"

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What another cache is of, where that is something else: `crop_scale 0.2, 1.0`."""
        mine, found = self.as_json(), []
        if other.get("tower_sha256") != self.tower_sha256:
            found.append(f"another tower ({str(other.get('tower_sha256'))[:12]}…)")
        for group in ("model", "crop_settings"):
            there = other.get(group, {})
            found += [
                f"{name} {_said(there.get(name))}" for name, value in mine[group].items() if there.get(name) != value
            ]
        if other.get("image_size") != self.image_size:
            found.append(f"images of {other.get('image_size')} px")
        return found


def command(
    init_from: str, shards: str, data: DataConfig, seed: int, crops: int = 1, dtype: str = "float32"
) -> str:  # fmt: skip
    """The command line that makes the cache a run asks for."""
    own, default = to_json(data), to_json(DataConfig())
    settings = [f"data.{name}={_setting(own[name])}" for name in CROP_SETTINGS if own[name] != default[name]]
    words = ["python", "-m", "maws", "cache-features", "--run", init_from, "--shards", shards, "--crops", str(crops)]
    words += ["--seed", str(seed)] if seed else []
    words += ["--dtype", dtype] if dtype != "float32" else []
    return shlex.join([*words, *settings])


def open_cache(shards: ShardSet, source: Source, make: Callable[..., str]) -> "FeatureCache":
    """The finished cache of a source. `make` gives the command that makes one, of so many `crops` and this `dtype`.

    Raises ConfigError when there is none, and says what there is instead; DataError for one that does not fit the
    shard set or is damaged.
    """
    folder = source.folder(shards.path)
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"data.features=cache: {_instead(folder, source, shards.path)}; make it with\n  {make()}")
    manifest = read_manifest(folder)
    again = f"make it again with\n  {make(crops=manifest['crops'], dtype=manifest['dtype'])} --overwrite"
    if different := source.differences(manifest):
        raise DataError(f"{folder} is of {', '.join(different)}, which its name denies; {again}")
    if manifest["shards_sha256"] != shards.sha256:
        raise DataError(
            f"{folder} is of another shard set, or of {shards.path} before it was changed "
            f"({manifest['shards_sha256'][:12]}… there, {shards.sha256[:12]}… now); {again}"
        )
    rows = [file["rows"] for file in manifest["files"]]
    if rows != shards.shard_sizes:
        raise DataError(f"{folder} has features of {sum(rows)} samples, the shard set has {len(shards)}; {again}")
    return FeatureCache(folder, manifest, again)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises DataError when it is not as it was written, or of a later version."""
    data = (folder / MANIFEST).read_bytes()
    try:
        manifest = json.loads(data)
        if manifest["format"] > FORMAT:
            raise DataError(f"{folder} has format {manifest['format']}, this version reads up to {FORMAT}")
        whole = manifest_bytes(manifest) == data
    except (ValueError, KeyError, TypeError, RecursionError):
        whole, manifest = False, {}
    if not whole:
        raise DataError(f"{folder / MANIFEST} is damaged; remove {folder} and run cache-features again")
    return manifest


class FeatureCache:
    """Features by sample and crop, mapped from the files when they are first asked for."""

    def __init__(self, folder: Path, manifest: dict[str, Any], again: str) -> None:
        self.folder, self.manifest, self._again = folder, manifest, again
        self.crops: int = manifest["crops"]
        self.width: int = manifest["width"]
        self.dtype = getattr(torch, manifest["dtype"])
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    @property
    def sha256(self) -> str:
        """The identity of the cache: its manifest holds the hashes of all files."""
        return sha256(self.folder / MANIFEST)

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureCache, (self.folder, self.manifest, self._again)  # mapped files stay behind

    def verify(self, part: Part = Part()) -> None:
        """Compare all sizes and, shared by the ranks, hashes of up to 16 GiB a rank; all ranks take part.

        Raises DataError on every rank when a file is missing or damaged.
        """
        mine = list(_problems(self.folder, self.manifest["files"], part))
        if problems := [problem for found in dist.gather_objects(mine) for problem in found]:
            raise DataError(f"{problems[0]}{_more(len(problems) - 1)}; {self._again}")

    def read(self, shard: int, row: int, crop: int) -> Tensor:
        """D, in the precision that is kept. Raises BadImage for a sample that could not be read."""
        rows = self._shard(shard)
        if reason := rows.reasons.get(row):
            raise BadImage(reason)
        value = torch.from_numpy(rows.features[row, crop].copy())
        return value.view(torch.bfloat16) if self.dtype == torch.bfloat16 else value

    def reasons(self, shard: int) -> list[str]:
        """Why samples of a shard have no features, one for each that has none."""
        return list(self._shard(shard).reasons.values())

    def _shard(self, number: int) -> "_Shard":
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) >= OPEN_FILES:
            self._open.popitem(last=False)
        entry = self.manifest["files"][number]
        self._open[number] = _Shard(self.folder / entry["name"], entry["rows"], self.crops, self.width)
        return self._open[number]


class _Shard:
    """One file: features (n K D) as numpy sees them in the mapped file, and why some rows have none."""

    def __init__(self, path: Path, rows: int, crops: int, width: int) -> None:
        """Raises DataError when it is not what the manifest says."""
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            flat = table["features"].chunk(0).flatten().flatten()
            self.features = flat.to_numpy(zero_copy_only=True).reshape(rows, crops, width)
            self.reasons = {i: reason for i, reason in enumerate(table["reason"].to_pylist()) if reason}
        except (OSError, KeyError, IndexError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{path} is damaged ({error}); remove it and run cache-features again") from None


@dataclass
class LoadFeatures:
    """The part of a sample that stands for its image: crop e mod K in epoch e.

    A sample that resampling visits again in the same epoch takes the next crop.
    """

    cache: FeatureCache

    def __call__(self, item: Item) -> Sample:
        return {"features": self.cache.read(item.shard, item.row, (item.epoch + item.copy) % self.cache.crops)}


def write_features(path: Path, keys: list[str], reasons: list[str | None], features: Tensor) -> None:
    """One file, under a temporary name that the caller renames; features n K D of a kept precision."""
    n, crops, width = features.shape
    bits = features.view(torch.int16) if features.dtype == torch.bfloat16 else features
    values = bits.contiguous().flatten().numpy()
    flat = pa.array(values.view(np.uint16) if features.dtype == torch.bfloat16 else values)
    nested = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, width), crops)
    table = pa.table({"key": pa.array(keys, pa.string()), "reason": pa.array(reasons, pa.string()), "features": nested})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, n))  # in one piece, so that a row is found by its number


def _problems(folder: Path, files: list[dict[str, Any]], part: Part) -> Iterator[str]:
    read = 0
    for number, entry in enumerate(files):
        path = folder / entry["name"]
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{path} has {path.stat().st_size:,} bytes, the manifest says {entry['bytes']:,}"
        elif number % part.world == part.rank and read < MOST_HASHED:
            read += entry["bytes"]
            if sha256(path) != entry["sha256"]:
                yield f"{path} is damaged: its sha256 is not the one in the manifest"


def _instead(folder: Path, source: Source, shards: Path) -> str:
    """What is there in place of a finished cache."""
    if folder.is_dir():
        return f"{folder} is not finished"
    others = []
    for path in sorted(shards.glob(f"{FOLDER}/*/{SETTINGS}"))[:3]:
        try:
            others.append(f"{path.parent.name} is of {', '.join(source.differences(json.loads(path.read_text())))}")
        except (OSError, ValueError, AttributeError):
            others.append(f"{path.parent.name} is damaged")
    return f"{shards / FOLDER} has no features of this tower and these crops" + "".join(f"; {o}" for o in others)


def _more(count: int) -> str:
    return f" (and {count} more)" if count else ""


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _setting(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value).lower()
