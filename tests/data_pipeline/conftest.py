"""Small corpora made on the spot, the command line in this process, and WordNet read once."""

import hashlib
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline import wordnet
from data_pipeline.__main__ import main
from data_pipeline.shardset import ShardSet

CAPTIONS = (
    "a walk #dog #snow",
    "#dog and #cat",
    "#cats everywhere",
    "#goldenretriever in the #snow",
    "#brownbear",
    "#ursusarctos #snow",
)


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def nouns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[wordnet.WordNet]:
    """Built once, as after a clone with umask 002, into a cache that all tests and their subprocesses see."""
    folder = tmp_path_factory.mktemp("wordnet")
    archive = folder / "group_writable" / "wordnet.zip"
    archive.parent.mkdir()
    shutil.copy(wordnet.ARCHIVE, archive)
    archive.chmod(0o664)
    archive.parent.chmod(0o775)
    previous = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    original, wordnet.ARCHIVE = wordnet.ARCHIVE, archive  # type: ignore[misc]
    yield wordnet.open_wordnet()
    wordnet.ARCHIVE = original  # type: ignore[misc]
    if previous is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = previous


def picture(seed: int = 0, size: tuple[int, int] = (12, 10), kind: str = "png", mode: str = "RGB") -> bytes:
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = random.Random(seed).randbytes(size[0] * size[1] * bands)
    buffer = io.BytesIO()
    Image.frombytes(mode, size, noise).save(buffer, kind)
    return buffer.getvalue()


def rows(number: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"key": f"k{n:03d}", "image": picture(n), "caption": CAPTIONS[n % len(CAPTIONS)], "language": "en"}
        for n in range(first, first + number)
    ]


def write_parquet(path: Path, table: list[dict[str, Any]] | pa.Table, **options: Any) -> Path:
    table = pa.Table.from_pylist(table) if isinstance(table, list) else table
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def write_folder(folder: Path, number: int) -> Path:
    """Pictures with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(number):
        (folder / f"photo{n:02d}.png").write_bytes(picture(1000 + n))
        (folder / f"photo{n:02d}.txt").write_text(CAPTIONS[n % len(CAPTIONS)])
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below, so that a file too many shows as well."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Every sample's json by key."""
    shards = ShardSet.open(folder)
    found = [shards.record(shard, row) for shard, size in enumerate(shards.shard_sizes) for row in range(size)]
    return {record["key"]: record for record in found}


class Make:
    """The helpers above as one fixture: test modules cannot import each other."""

    picture = staticmethod(picture)
    rows = staticmethod(rows)
    parquet = staticmethod(write_parquet)
    folder = staticmethod(write_folder)
    hashes = staticmethod(hashes)
    records = staticmethod(records)


@pytest.fixture(scope="session")
def make() -> type[Make]:
    return Make


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """python -m data_pipeline …, in this process."""

    def call(*arguments: object) -> Result:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def build(run: Callable[..., Result], tmp_path: Path) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Build from rows, a file or a folder, and give the manifest and the folder."""

    def call(source: Any, *options: object) -> tuple[dict[str, Any], Path]:
        path = source if isinstance(source, Path) else write_parquet(tmp_path / "in.parquet", source)
        output = tmp_path / "shards"
        result = run("build", "--input", path, "--output", output, "--workers", 0, *options)
        assert result.code == 0, result.err
        return ShardSet.open(output).manifest, output

    return call
