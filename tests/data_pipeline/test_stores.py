"""Inputs and outputs in stores: fsspec's memory file system, and S3 as spoken by a small server of our own."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fake_s3
import fsspec
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.decisions import Decisions
from data_pipeline.sources import Reading, discover, location
from data_pipeline.steps import Settings, Work
from data_pipeline.steps.read import examine
from data_pipeline.upload import default_folder

KEYS = {"key": "me", "secret": "secret", "region": "us-east-1"}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "PAUSES", (0.0, 0.0))


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def server() -> Iterator[fake_s3.Store]:
    with fake_s3.serve() as store:
        yield store


@pytest.fixture
def s3(server: fake_s3.Store) -> fake_s3.Store:
    for kept in (server.objects, server.requests, server.broken, server.spoil):
        kept.clear()
    return server


def options(s3: fake_s3.Store) -> str:
    return json.dumps(KEYS | {"endpoint_url": s3.url})


def corpus(make, tmp_path: Path) -> dict[str, bytes]:
    """One of each kind of input, other pictures in each."""
    files = {}
    for n in (0, 1):
        files |= {f"photos/{n}.png": make.picture(n), f"photos/{n}.txt": b"a #dog"}
    files["lists/a.jsonl"] = b'{"path": "pictures/2.png", "caption": "#cat", "key": "k2"}\n' * 1
    files["lists/pictures/2.png"] = make.picture(2)
    files["tables/t.parquet"] = make.parquet(tmp_path / "t.parquet", make.rows(2, 3)).read_bytes()
    sink = io.BytesIO()
    table = pa.Table.from_pylist(make.rows(2, 5))
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    files["tables/t.arrow"] = sink.getvalue()
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in (("7.png", make.picture(7)), ("7.txt", b"#brownbear")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    files["tars/00.tar"] = sink.getvalue()
    return files


def rows(inputs: list[str], storage: str = "{}") -> list[tuple]:
    sources = discover(inputs, Path("/nowhere"), Reading(storage))
    found = [row for piece in sources.pieces for table in piece.read() for row in table.to_pylist()]
    return [(row["key"], row["image"], row["caption"], row["problem"]) for row in found]


def test_a_store_gives_the_rows_that_the_same_files_give_here(make, tmp_path, memory, s3):
    folder = tmp_path / "corpus"
    for name, data in corpus(make, tmp_path).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        memory.pipe(f"/b/corpus/{name}", data)
        s3.objects[f"b/corpus/{name}"] = data
    expected = rows([str(folder)])
    assert len(expected) == 8
    assert all(image is not None and problem is None for _, image, _, problem in expected)
    assert rows([f"file://{folder}"]) == expected
    assert rows(["memory://b/corpus"]) == expected
    assert rows(["s3://b/corpus"], options(s3)) == expected
    each = ["photos", "lists/a.jsonl", "tables/{t.parquet,t.arrow}", "tars/*.tar"]
    here = rows([f"{folder}/{name}" for name in each])
    assert rows([f"memory://b/corpus/{name}" for name in each]) == here
    assert rows([f"s3://b/corpus/{name}" for name in each], options(s3)) == here


def test_a_failing_request_is_made_again_and_a_failing_store_ends_the_build(run, make, tmp_path, s3):
    s3.objects["b/t.parquet"] = make.parquet(tmp_path / "t.parquet", make.rows(3)).read_bytes()
    s3.broken["GET", "b/t.parquet"] = 2
    assert [row[0] for row in rows(["s3://b/t.parquet"], options(s3))] == ["k000", "k001", "k002"]
    s3.broken["GET", "b/t.parquet"] = 10**9
    result = run(
        "build",
        "--input",
        "s3://b/t.parquet",
        "--storage-options",
        options(s3),
        "--output",
        tmp_path / "o",
        "--workers",
        0,
    )
    assert result.code == 1
    assert "secret" not in result.err.replace("SECRET", "")


def test_what_is_not_there(run, tmp_path, memory, s3):
    for place in ("memory://b/nowhere", "s3://b/nowhere/x.tar"):
        result = run(
            "build",
            "--input",
            place,
            "--storage-options",
            options(s3) if "s3" in place else "{}",
            "--output",
            tmp_path / "o",
        )
        assert (result.code, f"--input {place}: no such file or folder" in result.err) == (1, True), result.err
    result = run("build", "--input", "https://example.org/x.tar", "--output", tmp_path / "o")
    assert (result.code, "unless --allow-http is given" in result.err) == (1, True)
    result = run("build", "--input", "s3://b/x", "--storage-options", "{", "--output", tmp_path / "o")
    assert (result.code, "--storage-options is not JSON" in result.err) == (2, True)


def test_a_table_in_a_store_names_no_file_of_this_machine(make, tmp_path, memory):
    secret = tmp_path / "secret.png"
    secret.write_bytes(make.picture(1))
    lines = [
        {"path": path, "caption": "#dog"}
        for path in (str(secret), f"file://{secret}", "../x.png", "memory://other/x.png")
    ]
    memory.pipe("/b/t.jsonl", "\n".join(map(json.dumps, lines)).encode())
    memory.pipe("/x.png", make.picture(2))
    memory.pipe("/other/x.png", make.picture(3))
    found = rows(["memory://b/t.jsonl"])
    assert [row[3] for row in found] == ["unsafe_path", "url_not_allowed", "unsafe_path", None]
    assert found[3][1] == make.picture(3)


def test_pictures_of_a_store_are_in_the_set_and_nothing_secret_is(run, make, tmp_path, s3):
    for n in range(5):
        s3.objects[f"b/photos/{n}.png"] = make.picture(n)
        s3.objects[f"b/photos/{n}.txt"] = b"#dog"
    arguments = ("--input", "s3://b/photos", "--storage-options", options(s3), "--workers", 0)
    result = run("build", *arguments, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert set(make.records(tmp_path / "out")) == {str(n) for n in range(5)}
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes()
    assert "up to date" in run("build", *arguments, "--output", tmp_path / "out").out


@pytest.mark.parametrize("left_out", [[0], [1], [2], [4], [1, 3], [3, 4], [0, 1, 2, 3, 4]])
def test_a_tar_in_a_store_loses_only_the_records_that_are_left_out(make, tmp_path, memory, nouns, left_out):
    """Also behind the end that was guessed from its size."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in [
            (f"{n}.{end}", data) for n in range(5) for end, data in (("png", make.picture(n)), ("txt", b"#dog"))
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    memory.pipe("/b/0.tar", sink.getvalue())
    (piece,) = discover(["memory://b/0.tar"], Path("/x")).pieces
    assert piece.rows == 1
    work = Work(tmp_path)
    nouns.save(work.wordnet)
    decisions = Decisions.read(Settings(), tmp_path)
    decisions.check()
    decisions.lay_down(work)
    skip = {n: {"reason": "killed_worker", "detail": ""} for n in left_out}
    found = list(examine(work, Settings(), 0, piece, io.BytesIO(), (0, piece.rows), skip))
    expected = [(None, "killed_worker") if n in left_out else (f"0/{n}", None) for n in range(5)]
    assert [(None if reason else row["key"].split("-")[0], reason) for row, reason, _ in found] == expected


# -------------------------------------------------------------------------------------------------------------- output


@pytest.fixture(scope="module")
def built(make, tmp_path_factory) -> Path:
    """Input and a set made from it here."""
    folder = tmp_path_factory.mktemp("built")
    source = make.parquet(folder / "in.parquet", make.rows(9))
    fixed = ("--input", source, "--workers", 0, "--samples-per-shard", 4)
    assert main(["build", *map(str, fixed), "--output", str(folder / "here")]) == 0
    return folder


@pytest.fixture
def to_url(run, make, tmp_path, s3, built, monkeypatch):
    """Build to a store, and the files that must lie there. After the first test the build is a copy of the one here."""
    expected = {name: (built / "here" / name).read_bytes() for name in make.hashes(built / "here")}
    fixed = ("--input", built / "in.parquet", "--workers", 0)

    def call(url: str = "s3://b/sets/one", *more: object, samples: int = 4, really: bool = False):
        if not really:
            monkeypatch.setattr("data_pipeline.upload.build", copied)
        storage = options(s3) if url.startswith("s3") else "{}"
        given = ("--storage-options", storage, "--work-dir", tmp_path / "work", "--samples-per-shard", samples)
        return run("build", *fixed, "--output", url, *given, *more)

    def copied(inputs, output, *_, **__):
        shutil.copytree(built / "here", output, dirs_exist_ok=True)
        return json.loads((output / "manifest.json").read_bytes()), True

    return call, expected


def test_a_set_in_a_store_has_the_same_bytes_as_one_built_here(to_url, s3, memory, tmp_path):
    call, expected = to_url
    result = call(really=True)
    assert result.code == 0, result.err
    assert s3.below("b/sets/one/") == expected
    assert list(tmp_path.iterdir()) == []
    result = call()
    assert (result.code, "up to date" in result.out) == (0, True), result.err
    assert call("memory://m/one").code == 0
    assert {name.removeprefix("/m/one/"): memory.cat(name) for name in memory.find("/m/one")} == expected


def test_the_manifest_comes_last_and_a_set_that_is_not_whole_has_none(to_url, s3):
    call, _ = to_url
    assert call().code == 0
    written = [name for method, name in s3.requests if method in ("PUT", "POST") and name.startswith("b/sets/one/")]
    assert written[-1] == "b/sets/one/manifest.json"
    assert written.index("b/sets/one/uploading.json") == 0


def test_a_killed_upload_goes_on_where_it_was(to_url, s3, tmp_path):
    call, expected = to_url
    last = sorted(name for name in expected if name.endswith(".tar"))[-1]
    for method in ("PUT", "POST"):
        s3.broken[method, f"b/sets/one/{last}"] = 10**9
    result = call()
    assert result.code == 1
    assert "the same command continues" in result.err
    assert "manifest.json" not in s3.below("b/sets/one/")
    s3.broken.clear()
    s3.requests.clear()
    result = call()
    assert result.code == 0, result.err
    assert s3.below("b/sets/one/") == expected
    sent = {name for method, name in s3.requests if method in ("PUT", "POST")}
    first = sorted(name for name in expected if name.endswith(".tar"))[0]
    assert f"b/sets/one/{first}" not in sent
    assert not (tmp_path / "work").exists()


def test_a_copy_with_other_bytes_is_made_again(to_url, s3):
    call, expected = to_url
    name = sorted(name for name in expected if name.endswith(".tar"))[0]
    s3.spoil.add(f"b/sets/one/{name}")
    assert call().code == 0
    assert s3.below("b/sets/one/") == expected


def test_a_store_is_not_overwritten_unasked(to_url, s3):
    call, _ = to_url
    s3.objects["b/sets/one/holiday.jpg"] = b"mine"
    result = call()
    assert (result.code, "is not empty and not a shard set" in result.err) == (1, True)
    del s3.objects["b/sets/one/holiday.jpg"]
    assert call().code == 0
    result = call(samples=5)
    assert (result.code, "--samples-per-shard was 4, now 5" in result.err) == (1, True), result.err
    s3.objects["b/sets/one/shards/00009.tar"] = b"of an older set"
    s3.objects["b/sets/one/holiday.jpg"] = b"mine"
    assert call("s3://b/sets/one", "--overwrite").code == 0
    assert {"shards/00000.tar", "holiday.jpg", "manifest.json"} <= set(s3.below("b/sets/one/"))
    assert "shards/00009.tar" not in s3.below("b/sets/one/")
    del s3.objects["b/sets/one/shards/00000.tar"]
    result = call()
    assert (result.code, "shards/00000.tar is missing" in result.err) == (1, True), result.err


def test_each_url_has_a_work_folder_of_its_own():
    assert default_folder("s3://b/one") != default_folder("s3://b/two")
    assert default_folder("s3://b/one") == default_folder("s3://b/one")


# ------------------------------------------------------------------------------------------------------- other readers


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves tars open
def test_webdataset_reads_a_built_set(build, make):
    _, output = build(make.rows(11), "--samples-per-shard", 4)
    records = make.records(output)
    urls = [str(path) for path in sorted((output / "shards").glob("*.tar"))]
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        (ending,) = {"jpg", "png", "webp"} & set(sample)
        with Image.open(io.BytesIO(sample[ending])) as image:
            image.load()
            assert image.size == (12, 10)
        found[sample["__key__"]] = json.loads(sample["json"])
    assert found == records
    assert len(found) == 11


def test_pyarrow_reads_a_built_set(build, make):
    _, output = build(make.rows(11), "--samples-per-shard", 4)
    index = pyarrow.dataset.dataset(output / "shards", format="parquet", exclude_invalid_files=True).to_table()
    records = make.records(output)
    assert sorted(index["key"].to_pylist()) == sorted(records)
    for row in index.to_pylist():
        assert row["labels"] == records[row["key"]]["labels"]
        assert row["repeat"] == records[row["key"]]["repeat"]
    shard = pq.read_table(output / "shards" / "00000.parquet").to_pylist()
    tar = (output / "shards" / "00000.tar").read_bytes()
    images = {row["key"]: row["image"] for row in make.rows(11)}
    for row in shard:
        assert tar[row["image_offset"] :][: row["image_size"]] == images[row["key"]]
