"""Tars of strangers: what webdataset and img2dataset write is read, what cannot be trusted is dropped by name."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from webdataset import tariterators

from data_pipeline.images import MAX_BYTES
from data_pipeline.sources import discover, tar


def pack(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT, mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=kind) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read(path: Path | list[Path], **options) -> list[dict]:
    paths = path if isinstance(path, list) else [path]
    sources = discover(paths, Path("/nowhere"), **options)
    return [row for piece in sources.pieces for table in piece.read() for row in table.to_pylist()]


def problems(rows: list[dict]) -> Counter:
    return Counter(row["problem"] for row in rows if row["problem"])


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_what_webdataset_sees_is_what_we_see(tmp_path, make, kind, mode):
    long = "sub/" + "x" * (90 if kind == tarfile.USTAR_FORMAT else 300)
    members = []
    for n, name in enumerate(("a", "b.c", long, "ü", "d/e")):
        members += [(f"{name}.jpg", make.picture(n)), (f"{name}.txt", f"#dog {n}".encode()), (f"{name}.cls", b"3")]
    path = pack(tmp_path / "000.tar", members, kind, mode)
    with path.open("rb") as stream:
        files = tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        theirs = {one["__key__"]: (one.get("jpg"), one.get("txt")) for one in tariterators.group_by_keys(files)}
    ours = {row["key"].removeprefix("000/"): (row["image"], (row["caption"] or "").encode()) for row in read(path)}
    assert {key: value for key, value in theirs.items() if value[0] is not None} == {
        key: value for key, value in ours.items() if value[0] is not None
    }
    assert len(ours) == 5


def test_captions_keys_and_the_rest_come_from_the_json(tmp_path, make):
    record = {
        "key": "k1",
        "TEXT": "a #dog",
        "hashtags": ["snow"],
        "license": "CC0-1.0",
        "url": "http://x/1.jpg",
        "similarity": 0.3,
    }
    path = pack(tmp_path / "a.tar", [("1.png", make.picture(1)), ("1.json", json.dumps(record).encode())])
    (row,) = read(path)
    assert (row["key"], row["caption"], row["hashtags"], row["licence"], row["url"]) == (
        "k1", "a #dog", ["snow"], "CC0-1.0", "http://x/1.jpg"
    )  # fmt: skip


def test_every_bad_member_is_dropped_by_its_reason_and_the_good_ones_stay(tmp_path, make):
    good = make.picture(1)
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: str) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, fields.pop("link", "")
            info.pax_headers = fields
            archive.addfile(info, io.BytesIO(data))

        add("ok1.png", good)
        add("ok1.txt", b"#dog")
        add("../../etc/cron.d/evil.png", good)
        add("/abs/olute.png", good)
        add("c:/windows.png", good)
        add("symbolic.png", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add("hard.png", kind=tarfile.LNKTYPE, link="ok1.png")
        add("device.png", kind=tarfile.CHRTYPE)
        add("fifo.png", kind=tarfile.FIFOTYPE)
        add("folder.d", kind=tarfile.DIRTYPE)
        add("sparse.png", good, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 12})
        add("long.png", good, comment="x" * (tar.MAX_EXTENDED + 1))
        add("new\nline.png", good)
        add("huge.png", bytes(MAX_BYTES + 1))
        add("huge.txt", b"#dog, but where is its picture")
        add("twice.png", good)
        add("twice.png", make.picture(2))
        add("twice.txt", b"#cat")
        add("__meta__/index.json", b"{}")
        add("README", b"no ending")
        add("lonely.txt", b"#dog")
        add("ok2.png", good)
        add("ok2.txt", b"#cat")
    rows = read(path)
    assert problems(rows) == {
        "unsafe_name": 4, "tar_link": 2, "tar_device": 2, "tar_sparse": 1, "header_too_long": 1, "too_many_bytes": 1,
        "duplicate_member": 1, "missing_image": 1,
    }  # fmt: skip
    usable = {row["key"].removeprefix("hostile/"): row for row in rows if not row["problem"]}
    assert set(usable) == {"ok1", "ok2", "twice"}
    assert (usable["twice"]["image"], usable["twice"]["caption"]) == (good, "#cat")
    assert sum(piece.rows for piece in discover([path], Path("/x")).pieces) == len(rows)


def test_a_lying_size_costs_no_memory(tmp_path, make):
    path = tmp_path / "liar.tar"
    info = tarfile.TarInfo("big.png")
    info.size = 1 << 45
    pack(tmp_path / "x.tar", [("a.png", make.picture(1)), ("a.txt", b"#dog")])
    whole = (tmp_path / "x.tar").read_bytes()
    path.write_bytes(whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512) + info.tobuf(tarfile.GNU_FORMAT))
    rows = read(path)
    assert [row["key"] for row in rows if not row["problem"]] == ["liar/a"]
    assert problems(rows) == {"truncated_tar": 1}


def test_a_tar_cut_or_damaged_anywhere_gives_what_comes_before(tmp_path, make):
    """Every cut: whole samples are right, nothing is made up, and counting agrees with reading."""
    members = [
        (f"{n}.{ending}", data) for n in range(3) for ending, data in (("png", make.picture(n)), ("txt", b"#dog"))
    ]
    whole = pack(tmp_path / "whole.tar", members).read_bytes()
    images = {f"cut/{n}": make.picture(n) for n in range(3)}
    for size in [*range(0, len(whole), 300), 511, 513, 1024]:
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:size])
        sources = discover([path, pack(tmp_path / "also.tar", members)], Path("/x"))
        rows = [row for piece in sources.pieces for table in piece.read() for row in table.to_pylist()]
        assert len(rows) == sources.rows
        for row in rows:
            if row["key"].startswith("cut/") and not row["problem"]:
                assert row["image"] == images[row["key"]]
        assert sum(row["key"].startswith("also/") for row in rows) == 3
    damaged = bytearray(whole)
    place = whole.index(b"1.png")
    damaged[place : place + 400] = b"\x55" * 400
    path.write_bytes(damaged)
    rows = read(path)
    assert [row["key"] for row in rows if not row["problem"]] == ["cut/0"]
    assert problems(rows) == {"damaged_tar": 1}


def test_pieces_and_parts_of_pieces_are_the_rows_of_the_whole(tmp_path, make, monkeypatch):
    members = [
        (f"{n:02d}.{ending}", data) for n in range(23) for ending, data in (("png", make.picture(n)), ("txt", b"#dog"))
    ]
    path = pack(tmp_path / "a.tar", members)
    whole = read(path)
    monkeypatch.setattr("data_pipeline.sources.PIECE_ROWS", 4)
    pieces = discover([path], Path("/x")).pieces
    assert [piece.rows for piece in pieces] == [4, 4, 4, 4, 4, 3]
    assert read(path) == whole
    assert [row["row"] for row in whole] == list(range(23))
    piece = pieces[2]
    for start in range(4):
        for stop in range(start + 1, 5):
            part = [row for table in piece.part(start, stop).read() for row in table.to_pylist()]
            assert part == whole[8 + start : 8 + stop]
            again = piece.part(0, stop).part(start, stop)
            assert [row for table in again.read() for row in table.to_pylist()] == part


def test_tars_with_the_same_names_inside_keep_all_their_samples(tmp_path, make):
    paths = []
    for n, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        paths.append(pack(tmp_path / folder / "0.tar", [("0.png", make.picture(n)), ("0.txt", b"#dog")]))
    assert [row["key"] for row in read(paths)] == ["one/0/0", "two/0/0"]


def write_img2dataset(folder: Path, make, kind: str) -> None:
    """What its 1.47 leaves, by kind of output: two pictures, two failures."""
    folder.mkdir()
    table = []
    for n in range(4):
        status = ("success", "failed_to_download", "success", "failed_to_resize")[n]
        row = {"url": f"http://x/{n}.jpg", "caption": f"#dog {n}", "key": f"00000000{n}", "status": status,
               "error_message": None if status == "success" else "HTTP Error 404", "width": 12, "height": 10,
               "original_width": 40, "original_height": 30, "exif": "{}", "sha256": "ab" * 32}  # fmt: skip
        table.append(row)
    members = []
    for row in table:
        if row["status"] == "success":
            members += [
                (f"{row['key']}.jpg", make.picture(int(row["key"]), kind="jpeg")),
                (f"{row['key']}.json", json.dumps(row | {"similarity": float("nan")}).encode()),
                (f"{row['key']}.txt", row["caption"].encode()),
            ]
    if kind == "webdataset":
        pack(folder / "00000.tar", members)
    elif kind == "files":
        (folder / "00000").mkdir()
        for name, data in members:
            (folder / "00000" / name).write_bytes(data)
    else:
        images = {name.split(".")[0]: data for name, data in members if name.endswith("jpg")}
        table = [{"jpg": images.get(row["key"])} | row for row in table]
    pq.write_table(pa.Table.from_pylist(table), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps({"count": 4, "successes": 2, "failed_to_download": 1}))


@pytest.mark.parametrize("kind", ["webdataset", "files", "parquet"])
def test_img2dataset_s_output_as_it_is(build, make, tmp_path, kind):
    write_img2dataset(tmp_path / "laion", make, kind)
    manifest, output = build(tmp_path / "laion")
    assert manifest["counts"]["read"] == 4
    dropped = {reason: number for reason, number in manifest["counts"]["dropped"].items() if number}
    assert dropped == {"failed_to_download": 1, "failed_to_resize": 1}
    records = make.records(output)
    assert {key: (record["caption"], record["url"]) for key, record in records.items()} == {
        f"00000000{n}": (f"#dog {n}", f"http://x/{n}.jpg") for n in (0, 2)
    }


def test_our_own_shards_can_be_read_again(build, make, tmp_path, run):
    _, output = build(make.rows(7))
    again = tmp_path / "again"
    result = run("build", "--input", str(output / "shards" / "*.tar"), "--output", again, "--workers", 0)
    assert result.code == 0, result.err
    assert make.records(again) == make.records(output)
