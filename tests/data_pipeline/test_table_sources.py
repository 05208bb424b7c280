"""Arrow files, tables that name pictures, sidecars, patterns, weights: what may be named, what is dropped for what."""

import csv
import io
import json
import os
import random
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError, UsageError
from data_pipeline.sources import Reading, discover, identity, split_weight
from data_pipeline.sources.listing import Layout, records


def read(*paths, **options) -> list[dict]:
    sources = discover([str(path) for path in paths], Path("/nowhere"), **options)
    rows = [row for piece in sources.pieces for table in piece.read() for row in table.to_pylist()]
    assert len(rows) == sources.rows
    return rows


def problems(rows: list[dict]) -> Counter:
    return Counter(row["problem"] for row in rows if row["problem"])


@pytest.fixture
def photos(tmp_path, make) -> Path:
    (tmp_path / "photos").mkdir()
    for n in range(6):
        (tmp_path / "photos" / f"{n}.png").write_bytes(make.picture(n))
    return tmp_path / "photos"


# --------------------------------------------------------------------------------------------------------------- Arrow


@pytest.mark.parametrize("kind", ["file", "stream", "feather", "parquet"])
def test_the_same_table_in_every_arrow_form(tmp_path, make, kind, monkeypatch):
    monkeypatch.setattr("data_pipeline.sources.PIECE_ROWS", 4)
    table = pa.Table.from_pylist(make.rows(11))
    path = tmp_path / "t.bin"  # the ending says nothing
    if kind == "feather":
        pyarrow.feather.write_feather(table, str(path), chunksize=3)
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=3)
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, 3)
    rows = read(path)
    assert [(row["key"], row["image"], row["caption"]) for row in rows] == [
        (row["key"], row["image"], row["caption"]) for row in make.rows(11)
    ]


def test_an_arrow_text_that_points_outside_its_buffer_is_dropped_and_not_read(tmp_path, make):
    good = pa.Table.from_pylist(make.rows(3)).to_batches()[0]
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1 << 30, 2, 6)))
    captions = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"#dog.."))
    bad = pa.RecordBatch.from_arrays(
        [captions if name == "caption" else good[name] for name in good.schema.names], good.schema.names
    )
    with pa.ipc.new_file(str(tmp_path / "t.arrow"), good.schema) as writer:
        writer.write_batch(good)
        writer.write_batch(bad)
        writer.write_batch(good)
    rows = read(tmp_path / "t.arrow")
    assert problems(rows) == {"damaged_file": 3}
    assert [row["problem"] for row in rows[3:6]] == ["damaged_file"] * 3


def test_a_damaged_page_costs_its_row_group_only(tmp_path, make):
    path = make.parquet(tmp_path / "t.parquet", make.rows(9), row_group_size=3)
    data = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(1)
    place = min(chunk.column(n).data_page_offset for n in range(chunk.num_columns))
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    rows = read(path)
    assert problems(rows) == {"damaged_file": 3}
    assert [row["key"] for row in rows if not row["problem"]] == [f"k{n:03d}" for n in (0, 1, 2, 6, 7, 8)]


def test_columns_under_other_names(tmp_path, make):
    rows = [{"JPG": row["image"], "TEXT": row["caption"], "Tags": "sea lion, dog"} for row in make.rows(2)]
    assert [(row["caption"], row["hashtags"]) for row in read(make.parquet(tmp_path / "a.parquet", rows))] == [
        (row["TEXT"], ["sea lion", "dog"]) for row in rows
    ]
    rows = [{"img_data": row["image"], "caption": "wrong", "title_de": row["caption"]} for row in make.rows(2)]
    path = make.parquet(tmp_path / "b.parquet", rows)
    reading = Reading(caption_column="title_de", image_column="img_data")
    assert [row["caption"] for row in read(path, reading=reading)] == [row["title_de"] for row in rows]
    with pytest.raises(DataError, match="no column titel; the columns that are there: img_data, caption, title_de"):
        read(path, reading=Reading(caption_column="titel", image_column="img_data"))


# ------------------------------------------------------------------------------------------- tables that name pictures


def test_csv_tsv_and_json_lines_say_the_same(photos, make):
    header = ["file_name", "text", "hashtags", "license", "key"]
    lines = [[f"{n}.png", f'a "#dog",\n{n}', "snow;sea lion", "CC0-1.0", f"k{n}"] for n in range(3)]
    for name, delimiter in (("a.csv", ","), ("b.tsv", "\t"), ("lies.txt", ";")):
        with (photos / name).open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([header, *lines])
    with (photos / "c.jsonl").open("w", encoding="utf-8-sig") as file:
        file.writelines(json.dumps(dict(zip(header, line, strict=True))) + "\r\n\n" for line in lines)
    expected = [
        (f"k{n}", make.picture(n), f'a "#dog",\n{n}', ["snow", "sea lion"], "CC0-1.0", str(photos / f"{n}.png"))
        for n in range(3)
    ]
    for name in ("a.csv", "b.tsv", "lies.txt", "c.jsonl"):
        found = [
            (r["key"], r["image"], r["caption"], r["hashtags"], r["licence"], r["path"]) for r in read(photos / name)
        ]
        assert found == expected, name


def test_hostile_lines_cost_only_themselves(photos):
    good = json.dumps({"path": "1.png", "caption": "#dog"}).encode()
    lines = [
        good,
        b'{"path": "2.png", "caption": "#dog \xff"}',
        b'{"path": "2.png", "caption": NaN}',
        b'{"path": "2.png", "caption": "a\\u0000b"}',
        b'{"path": "2.png", "caption": "\\ud800"}',
        b'{"path": "2.png", "caption": ["a"]}',
        b'{"path": "2.png", "caption": "' + b"x" * 10_000_000 + b'"}',
        b"[" * 100_000,
        b'{"path": "2.png"',
        b'{"path": "nowhere.png", "caption": "#dog"}',
        b'{"path": "/dev/zero", "caption": "#dog"}',
        b'{"path": "\\u0000.png", "caption": "#dog"}',
        b'{"path": "https://example.org/x.png", "caption": "#dog"}',
        b'{"path": "ftp://example.org/x.png", "caption": "#dog"}',
        b'{"path": "simplecache::s3://bucket/x.png", "caption": "#dog"}',
        b'{"path": 7, "caption": "#dog"}',
        b'{"caption": "#dog"}',
        b'{"path": "3.png", "caption": "#dog", "key": ' + b"9" * 5000 + b"}",
        json.dumps({"path": "4.png", "caption": "#dog"}).encode(),
    ]
    path = photos / "lines.jsonl"
    path.write_bytes(b"\n".join(lines))
    rows = read(path)
    assert [row["key"] for row in rows if row["image"] and row["caption"]] == ["1", "4"]
    assert problems(rows) == {
        "caption_not_utf8": 2, "nul_byte": 1, "caption_not_text": 1, "record_too_long": 1, "bad_json": 3,
        "missing_file": 1, "unreadable_file": 1, "unsafe_path": 1, "url_not_allowed": 3, "missing_image": 2,
    }  # fmt: skip
    assert rows[2]["caption"] is None


def test_hostile_csv_costs_only_its_records(photos):
    lines = [
        b"path,caption",
        b"1.png,#dog",
        b"2.png,#dog,one too many",
        b"2.png",
        b"2.png,\xff",
        b"2.png,a\0b",
        b"2.png," + b"x" * 200_000,
        b'3.png,"two\nlines #dog"',
        b'4.png,"never closed #dog',
        b"5.png,#cat",
    ]
    path = photos / "t.csv"
    path.write_bytes(b"\n".join(lines) + b"\n")
    rows = read(path)
    assert {row["key"]: row["caption"] for row in rows if row["image"]} == {
        "1": "#dog", "3": "two\nlines #dog", "5": "#cat"
    }  # fmt: skip
    assert problems(rows) == {"bad_csv": 2, "caption_not_utf8": 1, "nul_byte": 1, "record_too_long": 2}


def test_records_are_those_of_the_csv_module(tmp_path):
    """Cut by our own scan for record ends, against the standard reader on the whole."""
    rows = [["a", 'q"uo"te', "line\nbreak"], ["", "\n\n", ","], ['"', "x\r\ny", '""'], ["1", "2", "3"]] * 5
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with path.open("rb") as file:
        found = [
            next(csv.reader([*record.decode().splitlines(keepends=True)]))
            for _, record in records(file, Layout(("a",)))
        ]
    assert found == rows


def test_pieces_of_a_table_are_its_rows(photos, monkeypatch):
    path = photos / "t.csv"
    path.write_text("path,caption\n" + "".join(f'{n % 6}.png,"#dog\n{n}"\n' for n in range(23)))
    whole = read(path)
    monkeypatch.setattr("data_pipeline.sources.PIECE_ROWS", 4)
    assert read(path) == whole
    pieces = discover([str(path)], Path("/x")).pieces
    assert len(pieces) == 6
    to_the_end = [row for table in pieces[1].part(1, 1 << 60).read() for row in table.to_pylist()]
    assert to_the_end == whole[5:8]
    part = pieces[1].part(1, 3)
    assert [row for table in part.read() for row in table.to_pylist()] == whole[5:7]


def test_a_folder_with_a_table_of_its_pictures_is_read_through_it(build, make, photos):
    (photos / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{n}.png", "text": "#dog"}) + "\n" for n in range(4))
    )
    (photos / "labels.csv").write_text("name,label\n0.png,3\n")
    manifest, output = build(photos)
    assert set(make.records(output)) == {"0", "1", "2", "3"}
    assert {entry["why"] for entry in manifest["skipped_inputs"]} == {
        "no column path and no column caption",
        "6 images without captions beside them: a table of the folder names images",
    }


def test_json_beside_a_picture(photos, make):
    record = {"caption": "not this", "hashtags": ["#Snow"], "licence": "CC0-1.0"}
    (photos / "0.json").write_text(json.dumps(record))
    (photos / "0.txt").write_text("a #dog")
    (photos / "1.json").write_text(json.dumps({"text": "a #cat", "key": "mine"}))
    (photos / "2.json").write_text("{")
    rows = {row["key"]: row for row in read(photos)}
    assert (rows["0"]["caption"], rows["0"]["hashtags"], rows["0"]["licence"]) == ("a #dog", ["#Snow"], "CC0-1.0")
    assert (rows["mine"]["caption"], rows["mine"]["image"]) == ("a #cat", make.picture(1))
    assert rows["2"]["problem"] == "bad_json"
    assert rows["3"]["caption"] is None


# ------------------------------------------------------------------------------------------ patterns, weights, identity


def test_braces_and_wild_cards(tmp_path, make):
    for n in range(12):
        make.parquet(tmp_path / f"s{n:02d}.parquet", make.rows(1, n))
    keys = [row["key"] for row in read(f"{tmp_path}/s{{03..05}}.parquet", f"{tmp_path}/s1*.parquet")]
    assert keys == ["k003", "k004", "k005", "k010", "k011"]
    with pytest.raises(DataError, match="nothing matches"):
        read(f"{tmp_path}/t*.parquet")
    with pytest.raises(DataError, match=r"s12\.parquet: no such file"):
        read(f"{tmp_path}/s{{11..12}}.parquet")
    odd = make.parquet(tmp_path / "odd{1,2}[x]*.parquet", make.rows(2))
    assert len(read(odd)) == 2  # what is there under just this name is no pattern


@pytest.mark.parametrize(("text", "expected"), [
    ("a.parquet", ("a.parquet", 1.0)),
    ("a.parquet::2.5", ("a.parquet", 2.5)),
    ("s3://b/{0..9}.tar::.5", ("s3://b/{0..9}.tar", 0.5)),
    ("simplecache::s3://b/x", ("simplecache::s3://b/x", 1.0)),
])  # fmt: skip
def test_a_weight_is_written_behind_the_path(text, expected):
    assert split_weight(text) == expected


def test_a_weight_multiplies_the_repeat_factor_of_its_source(run, make, tmp_path):
    one = make.parquet(tmp_path / "one.parquet", make.rows(12))
    two = make.parquet(tmp_path / "two.parquet", make.rows(12, 12))
    result = run(
        "build",
        "--input",
        one,
        "--input",
        f"{two}::3",
        "--output",
        tmp_path / "out",
        "--workers",
        0,
        "--resample",
        "none",
    )
    assert result.code == 0, result.err
    repeats = {key: record["repeat"] for key, record in make.records(tmp_path / "out").items()}
    assert {repeats[key] for key in repeats if key < "k012"} == {1.0}
    assert {repeats[key] for key in repeats if key >= "k012"} == {3.0}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert [entry.get("weight") for entry in manifest["inputs"]] == [None, 3.0]
    with pytest.raises(UsageError, match="above 0"):
        read(f"{two}::0")


def test_copies_of_an_input_give_the_same_bytes_and_changes_are_noticed(make, tmp_path, run, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE", 1000)  # as if it were terabytes
    sets = []
    for name, time in (("a", 1), ("b", 2)):
        path = make.parquet(tmp_path / name / "in.parquet", make.rows(6))
        os.utime(path, (time, time))
        assert run("build", "--input", path, "--output", tmp_path / name / "out", "--workers", 0).code == 0
        sets.append(make.hashes(tmp_path / name / "out"))
    assert sets[0] == sets[1]
    entry = json.loads((tmp_path / "a" / "out" / "manifest.json").read_bytes())["inputs"][0]
    assert set(entry) == {"path", "bytes", "names_and_sizes_sha256"}
    make.parquet(tmp_path / "a" / "in.parquet", make.rows(7))
    result = run(
        "build", "--input", path.parent.parent / "a" / "in.parquet", "--output", tmp_path / "a" / "out", "--workers", 0
    )
    assert (result.code, "the input in.parquet has changed" in result.err) == (1, True)


def test_an_unfinished_build_notices_a_changed_input_by_its_time(make, tmp_path, run, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE", 1000)
    path = make.parquet(tmp_path / "in.parquet", make.rows(6))
    arguments = ("build", "--input", path, "--output", tmp_path / "out", "--workers", 0)
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.build._run_steps", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*arguments).code == 130
    os.utime(path, (1, 1))
    result = run(*arguments)
    assert (result.code, "other times or checksums" in result.err) == (1, True)


# ------------------------------------------------------------------------------------------------------------- damages


def whole_files(make) -> dict[str, bytes]:
    table = pa.Table.from_pylist([row | {"hashtags": ["a", "b"]} for row in make.rows(9)])
    found = {
        "csv": b"path,caption\n" + b'1.png,"a #dog\n, b"\n' * 9,
        "jsonl": b'{"path": "1.png", "caption": "#dog"}\n' * 9,
    }
    for kind in ("parquet", "stream", "file", "tar"):
        sink = io.BytesIO()
        if kind == "parquet":
            pq.write_table(table, sink, row_group_size=4)
        elif kind == "tar":
            with tarfile.open(fileobj=sink, mode="w") as archive:
                for name, data in [
                    (f"{n}.{end}", data) for n in range(4) for end, data in (("png", b"x" * 700), ("txt", b"#dog"))
                ]:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        else:
            with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(sink, table.schema) as writer:
                writer.write_table(table, 4)
        found[kind] = sink.getvalue()
    return found


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "stream", "file", "tar"])
def test_whatever_happens_to_a_file_it_is_read_or_refused(make, tmp_path, kind):
    """Bytes changed, taken out and put in at random; as many rows come as were promised, or one line says why not."""
    chance = random.Random(kind)
    whole = whole_files(make)[kind]
    path = tmp_path / f"t.{kind}"
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 2, 5])):
            place = chance.randrange(len(data))
            taken = chance.choice([0, 1, 1, 8, 300])
            data[place : place + taken] = chance.choice(
                [b"", b"\xff" * 8, b"\0" * 8, b"7" * 8, chance.randbytes(taken)]
            )
            data = data or bytearray(1)
        path.write_bytes(data)
        try:
            read(path)
        except DataError as error:
            assert str(tmp_path) in str(error)
