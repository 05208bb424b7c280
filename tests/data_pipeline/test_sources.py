"""What may lie under --input, and what becomes of it."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.shardset import ShardSet


def test_a_folder_of_pictures_with_captions_beside_them(build, make, tmp_path):
    folder = make.folder(tmp_path / "photos", 8)
    (folder / "sub").mkdir()
    (folder / "sub" / "cat.v2.JPG").write_bytes(make.picture(5, (20, 20), "jpeg"))
    (folder / "sub" / "cat.v2.txt").write_bytes(b"\xef\xbb\xbfa #cat\n")  # with the byte order mark of some editors
    (folder / "lonely.png").write_bytes(make.picture(6))
    (folder / "notes.md").write_text("not a picture")
    manifest, output = build(folder)
    records = make.records(output)
    assert manifest["counts"]["read"] == 10
    assert manifest["counts"]["dropped"]["no_caption"] == 1
    assert set(records) >= {f"photo{n:02d}" for n in range(8)}
    (key,) = (key for key in records if key.startswith("sub/"))
    assert records[key]["caption"] == "a #cat"
    assert {"language", "source", "licence"} <= {name for name, value in records[key].items() if value is None}


def test_pictures_without_caption_are_kept_when_asked(build, make, tmp_path):
    folder = make.folder(tmp_path / "photos", 3)
    (folder / "lonely.png").write_bytes(make.picture(6))
    manifest, output = build(folder, "--keep-unlabelled")
    assert manifest["counts"]["unlabelled"] == {"no_caption": 1}
    assert make.records(output)["lonely"]["labels"] == []


def test_two_folders_may_hold_the_same_names(run, make, tmp_path):
    folders = [make.folder(tmp_path / name, 3) for name in ("one", "two")]
    for n in range(3):
        (folders[1] / f"photo0{n}.png").write_bytes(make.picture(2000 + n))
    assert run("build", "--input", *folders, "--output", tmp_path / "shards", "--workers", 1).code == 0
    assert set(make.records(tmp_path / "shards")) == {f"{name}/photo0{n}" for name in ("one", "two") for n in range(3)}


def test_hugging_face_images_and_wide_types(build, make, tmp_path):
    rows = make.rows(4)
    table = pa.table(
        {
            "key": pa.array([100, 101, 102, 103]),
            "image": pa.array([{"bytes": row["image"], "path": "/etc/passwd"} for row in rows[:3]] + [None]),
            "caption": pa.array([row["caption"] for row in rows], pa.large_string()),
            "language": pa.array(["en", "en", None, "de"]).dictionary_encode(),
            "hashtags": pa.array([["#Wolf"], None, [], ["x"]], pa.large_list(pa.string())),
        }
    )
    manifest, output = build(make.parquet(tmp_path / "hf.parquet", table))
    records = make.records(output)
    assert set(records) == {"100", "101", "102"}
    assert manifest["counts"]["dropped"] == {"duplicate_key": 0, "missing_image": 1}
    assert records["100"]["hashtags"] == ["dog", "snow", "wolf"]
    assert records["102"]["language"] is None


def test_a_string_of_hashtags_and_missing_columns(build, make, tmp_path):
    rows = [{"image": make.picture(n), "caption": "no tag", "hashtags": "wolf, #Bear;snow"} for n in range(2)]
    _, output = build(make.parquet(tmp_path / "plain.parquet", rows))
    records = make.records(output)
    assert set(records) == {"plain-000000", "plain-000001"}
    assert records["plain-000000"]["hashtags"] == ["wolf", "bear", "snow"]


def test_what_is_not_utf8_costs_its_row_only(build, make, tmp_path):
    rows = make.rows(4)
    captions = [row["caption"].encode() for row in rows]
    captions[2] = b"#dog \xff\xfe"
    table = pa.table(
        {
            "key": [row["key"] for row in rows],
            "image": [row["image"] for row in rows],
            "caption": pa.array(captions, pa.binary()).view(pa.string()),
        }
    )
    manifest, output = build(make.parquet(tmp_path / "latin.parquet", table))
    assert manifest["counts"]["dropped"]["caption_not_utf8"] == 1
    assert "k002" not in make.records(output)


def test_other_parquet_files_of_a_folder_are_skipped_with_a_note(run, make, tmp_path):
    make.parquet(tmp_path / "data" / "train.parquet", make.rows(4))
    make.parquet(tmp_path / "data" / "labels.parquet", pa.table({"key": ["a"], "label": [3]}))
    make.parquet(tmp_path / "data" / "eval.parquet", pa.table({"key": ["a"], "image": [b""], "label": [3]}))
    result = run("build", "--input", tmp_path / "data", "--output", tmp_path / "shards", "--workers", 1)
    assert result.code == 0
    skipped = json.loads((tmp_path / "shards" / "manifest.json").read_bytes())["skipped_inputs"]
    assert skipped == [
        {"path": "data/eval.parquet", "why": "no column caption"},
        {"path": "data/labels.parquet", "why": "no column image and no column caption"},
    ]


def test_the_same_file_named_directly_is_an_error_that_names_its_columns(run, make, tmp_path):
    labels = make.parquet(tmp_path / "labels.parquet", pa.table({"key": ["a"], "label": [3]}))
    result = run("build", "--input", labels, "--output", tmp_path / "shards")
    assert result.code == 1
    assert "no column image and no column caption; the columns that are there: key, label" in result.err


def test_a_folder_in_which_nothing_is_usable_is_an_error(run, make, tmp_path):
    make.parquet(tmp_path / "data" / "labels.parquet", pa.table({"key": ["a"], "label": [3]}))
    result = run("build", "--input", tmp_path / "data", "--output", tmp_path / "shards")
    assert result.code == 1
    assert "every file was skipped (data/labels.parquet: no column image and no column caption)" in result.err


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("image", [1, 2], "column image is int64, not bytes"),
        ("caption", [1.0, 2.0], "column caption is double, not text"),
        ("hashtags", [{"a": 1}, None], "column hashtags is struct"),
    ],
)
def test_a_column_of_the_wrong_type_is_named(run, make, tmp_path, column, values, message):
    table = pa.Table.from_pylist(make.rows(2)).select(["key", "image", "caption"])
    table = (table.drop_columns([column]) if column in table.column_names else table).append_column(column, [values])
    file = make.parquet(tmp_path / "in.parquet", table)
    result = run("build", "--input", file, "--output", tmp_path / "shards")
    assert result.code == 1
    assert message in result.err


def test_an_empty_folder_says_what_it_should_hold(run, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("build", "--input", tmp_path / "empty", "--output", tmp_path / "shards")
    assert result.code == 1
    assert "no captioned images in" in result.err
    assert "Parquet files with the columns image and caption" in result.err
    assert not (tmp_path / "shards").exists()


def test_a_path_that_is_not_there(run, tmp_path):
    result = run("build", "--input", tmp_path / "nowhere", "--output", tmp_path / "shards")
    assert (result.code, "no such file or folder" in result.err) == (1, True)


def test_a_damaged_parquet_file_is_named(run, make, tmp_path):
    """One asked for by name ends the build; one among others is left out."""
    file = make.parquet(tmp_path / "data" / "broken.parquet", make.rows(3))
    file.write_bytes(file.read_bytes()[:-100])
    result = run("build", "--input", file, "--output", tmp_path / "shards")
    assert (result.code, "broken.parquet is not a readable Parquet file" in result.err) == (1, True)
    make.parquet(tmp_path / "data" / "whole.parquet", make.rows(3))
    assert run("build", "--input", tmp_path / "data", "--output", tmp_path / "shards", "--workers", 0).code == 0
    skipped = json.loads((tmp_path / "shards" / "manifest.json").read_bytes())["skipped_inputs"]
    assert skipped == [{"path": "data/broken.parquet", "why": "damaged: not a readable Parquet file"}]


def test_an_output_inside_the_input_is_not_read_again(run, make, tmp_path):
    make.parquet(tmp_path / "train.parquet", make.rows(4))
    arguments = ("build", "--input", tmp_path, "--output", tmp_path / "shards", "--workers", 1)
    assert run(*arguments).code == 0
    assert "up to date" in run(*arguments).out


def test_row_groups_are_cut_into_pieces_without_losing_rows(build, make, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.sources.PIECE_ROWS", 4)
    file = make.parquet(tmp_path / "groups.parquet", make.rows(23), row_group_size=3)
    _, output = build(file)
    assert set(make.records(output)) == {f"k{n:03d}" for n in range(23)}
    images = {}
    shards = ShardSet.open(output)
    for row, key in enumerate(shards.index(0)["key"].to_pylist()):
        images[key] = shards.image_bytes(0, row)
    assert images == dict(zip(*(pq.read_table(file)[name].to_pylist() for name in ("key", "image")), strict=True))
