"""Small labelled pictures in every form of file, and releases of untrained models, made on the spot."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data_pipeline.shardset import Sample, VocabularyEntry, write_manifest, write_shard, write_vocabulary
from eval.__main__ import main
from eval.datasets import Data, open_data
from maws.data.tokenizer import train_tokenizer
from maws.data.transforms import Preprocess
from maws.models.init import fill
from maws.models.text import TEXT_VARIANTS, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import VARIANTS, VisionTransformer, build_vit
from maws.release import write_release

NAMES = ("red", "green", "blue", "grey", "black", "white", "brown")
SIDE = 32


def picture(label: int, number: int, side: int = SIDE) -> bytes:
    """A disc in the colour of its class on a noisy ground: easy, but not without errors for an untrained encoder."""
    rng = np.random.default_rng([label, number])
    pixels = rng.integers(0, 256, (side, side, 3))
    colour = np.random.default_rng(label).integers(0, 256, 3)
    y, x = np.mgrid[:side, :side]
    disc = (y - side / 2) ** 2 + (x - side / 2) ** 2 < (side * rng.uniform(0.25, 0.4)) ** 2
    pixels[disc] = 0.3 * pixels[disc] + 0.7 * colour
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


class Corpus(NamedTuple):
    """Keys, pictures and labels."""

    keys: list[str]
    images: list[bytes]
    labels: list[int]


def corpus(prefix: str, per_class: int, classes: int = len(NAMES), start: int = 0) -> Corpus:
    pairs = [(label, number) for number in range(start, start + per_class) for label in range(classes)]
    keys = [f"{prefix}-{NAMES[label]}-{number}" for label, number in pairs]
    return Corpus(keys, [picture(*pair) for pair in pairs], [label for label, _ in pairs])


def write_parquet(path: Path, drop: Sequence[str] = (), row_group_size: int = 5, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: values for name, values in columns.items() if name not in drop})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, samples: Sequence[tuple[str, bytes, list[int]]], synsets: Sequence[str]) -> Path:
    """A shard set of two shards; labels are positions in `synsets`."""
    ordered = sorted(samples)
    half = len(ordered) // 2
    entries = []
    for number, part in enumerate((ordered[:half], ordered[half:])):
        records = [Sample(key, image, "png", _record(key, labels, synsets), labels, 1.0) for key, image, labels in part]
        entries.append(write_shard(folder / "shards", f"{number:05d}", records))
    words = [VocabularyEntry(i, s, f"n{i:08d}", [s.split(".")[0]], "", 1) for i, s in enumerate(synsets)]
    digest = write_vocabulary(folder / "vocabulary.parquet", words)
    content = {"samples": len(ordered), "classes": len(synsets), "shards": entries, "vocabulary_sha256": digest}
    write_manifest(folder, content)
    return folder


def _record(key: str, labels: list[int], synsets: Sequence[str]) -> dict[str, Any]:
    named = [synsets[label] for label in labels]
    return {"key": key, "caption": "", "language": None, "hashtags": [], "synsets": named, "labels": labels,
            "repeat": 1.0, "source": None, "licence": None}  # fmt: skip


def write_classes(path: Path, classes: int = len(NAMES)) -> Path:
    entries = [{"label": label, "name": NAMES[label], "synset": f"{NAMES[label]}.n.01"} for label in range(classes)]
    path.write_text(json.dumps(entries[::-1]))  # the order in the file means nothing
    return path


class Files(NamedTuple):
    """The same pictures, ready for the command line."""

    folder: Path
    train: Path
    test: Path
    classes: Path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("data")
    train, test = corpus("train", 6), corpus("test", 4, start=100)
    return Files(
        folder,
        write_parquet(folder / "train.parquet", key=train.keys, image=train.images, label=train.labels),
        write_parquet(folder / "test.parquet", key=test.keys, image=test.images, label=test.labels),
        write_classes(folder / "classes.json"),
    )


@pytest.fixture(scope="session")
def data(files: Files) -> Data:
    """The same, opened: 42 pictures to learn from and 28 to evaluate on, of seven classes."""
    return open_data([files.test], [files.train], files.classes)


def atto(seed: int = 0) -> VisionTransformer:
    return build_vit("atto", image_size=SIDE, seed=seed).eval()


def write_run(run: Path, weights: dict[str, torch.Tensor], lineage: Sequence[str], **more: Any) -> Path:
    config = {"stage": lineage[-1], "lineage": list(lineage), "variant": "atto", "model": asdict(VARIANTS["atto"])}
    weights = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    extras = more.pop("extras", None)
    config |= {"image_size": SIDE, "train": {}, **more}
    write_release(run / "release", weights, config, Preprocess(SIDE), extras)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished WSP run of an untrained encoder."""
    return write_run(tmp_path / "wsp", atto().state_dict(), ["wsp"])


@pytest.fixture
def lit_run(tmp_path: Path) -> Path:
    """A finished LiT run of untrained towers."""
    tokenizer = train_tokenizer([f"a photo of a {name} thing #{name}" for name in NAMES] * 3, 80, 14)
    shape = replace(TEXT_VARIANTS["atto"], vocabulary=tokenizer.vocabulary)
    towers = TwoTower(atto(), TextTower(shape), 16)
    fill(towers, towers.init_rules(), 3)
    tokenizer.save(tmp_path / "tokenizer")
    return write_run(
        tmp_path / "lit",
        towers.state_dict(),
        ["mae", "wsp", "lit"],
        text=asdict(shape),
        joint_width=16,
        extras={"tokenizer": tmp_path / "tokenizer"},
    )


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call
