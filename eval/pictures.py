"""Pictures alone, for what is measured without labels: every form that datasets.py reads, and a plain folder.

    open_pictures([Path("photos/")]).test            every picture in the folder, at any depth; the key is its path
    open_pictures([Path("val.parquet")]).test        labels are not asked for: the hash is the same with any classes
    open_pictures([Path("imagenet1k=/data/in1k")])   a published set

`shown` goes through some of them in batches, and counts those that cannot be read.
"""

import base64
import hashlib
import io
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.errors import DataError
from eval import distributed
from eval.datasets import Dataset, expanded
from eval.decode import BATCH, Broken, Decoded, batches_of, decoded_batches
from eval.encoder import Encoder
from eval.features import MAX_BAD
from eval.progress import Progress
from eval.published import registry
from eval.sources.folders import digest, is_picture, reader
from eval.sources.parquet import parquet_files, read_parquet, split_parquet
from eval.sources.shards import open_shards
from eval.sources.source import UNLABELLED, Source
from eval.sources.tars import read_tar
from maws import dist

log = logging.getLogger(__name__)

UNKNOWN: Final = -1  # the label of every picture
TARS: Final = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Pictures:
    """What an evaluation without labels is about."""

    test: Dataset

    @property
    def sets(self) -> dict[str, Dataset]:
        return {"data": self.test}

    @property
    def hashes(self) -> dict[str, str]:
        return {"data": self.test.sha256}

    @property
    def facts(self) -> dict[str, Any]:
        """Which published set it is, where it is one."""
        return {"published": {"data": self.test.published}} if self.test.published else {}

    def summary(self) -> str:
        return f"pictures: {len(self.test):,}, whatever their labels"


def open_pictures(paths: Sequence[Path]) -> Pictures:
    """All pictures of all paths, each key once; DataError says what cannot be read."""
    references = [registry.reference(path) for path in paths]
    every = [
        one for path, known in zip(paths, references, strict=True) for one in ([known] if known else expanded([path]))
    ]
    return Pictures(_join([source for one in every for source in _sources(one, several=len(every) > 1)]))


def _sources(path: Path | registry.Reference, several: bool) -> list[Source]:
    """A source per published set, per file with pictures, per shard set and per folder."""
    if isinstance(path, registry.Reference):
        return [registry.open_split(path.published, path.split, path.folder)]
    if path.is_file() and path.suffix == ".parquet":
        return _tables([path])
    if path.is_file() and path.name.endswith(TARS):
        return [read_tar(path, prefix=several)]
    if path.is_file() and is_picture(path):
        return [Source(str(path), [path.name], [None], reader([path]), digest([path]))]
    if not path.is_dir():
        what = "is not a picture, a Parquet file or a tar" if path.exists() else "is not there"
        raise DataError(f"{path} {what}; give pictures as a folder, Parquet files, tars or a shard set")
    if (path / "manifest.json").is_file():
        return [open_shards(path)[1]]
    if tables := parquet_files(path):
        return _tables(tables)
    if tars := sorted(path.glob("*.tar")):
        return [read_tar(tar, prefix=several or len(tars) > 1) for tar in tars]
    return [_folder(path, several)]


def _tables(files: Sequence[Path]) -> list[Source]:
    """Those with pictures; labels files beside them are not read."""
    return [read_parquet(file) for file in split_parquet(files)[0]]


def _folder(path: Path, several: bool) -> Source:
    """Every picture below `path` that is not hidden."""
    below = sorted(file.relative_to(path) for file in path.rglob("*") if is_picture(file))
    names = [name for name in below if not any(part.startswith(".") for part in name.parts)]
    files = [path / name for name in names]
    start = f"{path.name}/" if several else ""
    keys = [start + name.as_posix() for name in names]
    return Source(str(path), keys, [None] * len(keys), reader(files), digest(files))


def _join(sources: Sequence[Source]) -> Dataset:
    left_out: Counter[str] = Counter()
    places: dict[str, tuple[Source, int]] = {}
    for source in sources:
        left_out += Counter({why: count for why, count in source.left_out.items() if why not in UNLABELLED})
        for row, key in enumerate(source.keys):
            if places.setdefault(key, (source, row)) != (source, row):
                left_out["duplicate_key"] += 1
    if not places:
        raise DataError(f"there is no picture in {', '.join(source.where for source in sources) or 'what was given'}")
    order = list(places.values())
    content = repr(([source.sha256 for source in sources], list(places)))

    def read(position: int) -> bytes:
        source, row = order[position]
        return source.read(row)

    labels = np.full(len(places), UNKNOWN, dtype=np.int64)
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    published = sources[0].published if len(sources) == 1 else None
    return Dataset("evaluation", tuple(places), labels, read, sha256, dict(left_out), published)


# ------------------------------------------------------------------------------------------------------------- showing


def spread(dataset: Dataset, number: int) -> list[int]:
    """`number` positions at even distances, or all: of data that is sorted by class, some of every class."""
    return np.linspace(0, len(dataset) - 1, min(number or len(dataset), len(dataset))).round().astype(int).tolist()


def shown(
    encode: Encoder, dataset: Dataset, rows: Sequence[int], what: str, batch: int = BATCH, shared: bool = True
) -> Iterator[Decoded]:
    """Batches of the readable ones among `rows`, at most `batch` at a time; each rank has its share, or all of them.

    All ranks get as many batches, and one without `rows` has a black picture, for nobody: a forward may need all ranks.
    DataError when more than MAX_BAD cannot be read.
    """
    batches = batches_of(rows, min(batch, encode.batch or batch))
    own = distributed.own_share(batches) if shared else batches
    size, broken = encode.preprocess.image_size, list[Broken]()
    nothing = Decoded(torch.zeros(1, 3, size, size, dtype=torch.uint8), [], [])
    source = decoded_batches(dataset, own, encode.preprocess)
    with Progress(what, len(rows)) as progress:
        for step in range(distributed.steps(batches) if shared else len(batches)):
            distributed.pulse(step, what)
            found = next(source, nothing)
            broken += found.broken
            _check_broken(broken, len(rows))
            yield found if found.rows else nothing
            progress.add((len(found.rows) + len(found.broken)) * (dist.world_size() if shared else 1))
    next(source, None)  # ends its threads
    broken = [one for of_rank in dist.gather_objects(broken) for one in of_rank] if shared else broken
    _check_broken(broken, len(rows))
    if broken:
        reasons = sorted(Counter(one.reason for one in broken).items())
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons)
        log.warning("warning: %d of %d pictures cannot be read and are left out: %s", len(broken), len(rows), listed)


def _check_broken(broken: Sequence[Broken], asked: int) -> None:
    if len(broken) > MAX_BAD * asked:
        raise DataError(
            f"more than {MAX_BAD:.0%} of the {asked:,} pictures that were asked for cannot be read, such as "
            f"'{broken[0].key}' ({broken[0].reason}); repair or remove them"
        )


def data_uri(image: Tensor, side: int) -> str:
    """uint8 3 H W as a PNG no wider and higher than `side`, in a text."""
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def about(encode: Encoder, dataset: Dataset) -> dict[str, Any]:
    """What a file of measurements must say, so that two of them are compared only where that means something."""
    lineage = list(encode.release.lineage) if encode.release else []
    tower = encode.tower
    return {
        "lineage": lineage,
        "weights": encode.sha256,
        "data": dataset.sha256,
        "pictures": len(dataset),
        "image_size": tower.image_size,
        "patch": tower.shape.patch,
        "grid": list(tower.grid),
        "precision": encode.precision,
    }
