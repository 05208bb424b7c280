"""One interface for every form of evaluation data, and what is refused."""

import json
import logging
import shutil

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shardset import safe_key
from eval.classes import read_classes
from eval.datasets import LABELS_FILE, open_data
from tests.eval.conftest import NAMES, corpus, picture, write_classes, write_parquet, write_shards

SYNSETS = [f"{name}.n.01" for name in NAMES]


def contents(dataset) -> dict[str, tuple[int, bytes]]:
    return {key: (int(dataset.labels[row]), dataset.read(row)) for row, key in enumerate(dataset.keys)}


def expected(data, rename=lambda key: key) -> dict[str, tuple[int, bytes]]:
    return {rename(k): (label, image) for k, image, label in zip(data.keys, data.images, data.labels, strict=True)}


@pytest.fixture
def train():
    return corpus("train", 3)


@pytest.fixture
def folder(tmp_path, train):
    """Class folders with pictures."""
    for key, image, label in zip(train.keys, train.images, train.labels, strict=True):
        (tmp_path / "folders" / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders" / NAMES[label] / f"{key}.png").write_bytes(image)
    return tmp_path / "folders"


def test_parquet_with_labels(tmp_path, train):
    path = write_parquet(tmp_path / "a.parquet", key=train.keys, image=train.images, label=train.labels)
    data = open_data([path])
    assert contents(data.test) == expected(train)
    assert data.test.keys == tuple(train.keys)  # in the order of the file
    assert len(data.classes) == len(NAMES)


def test_parquet_labels_may_be_names_and_images_may_be_structs(tmp_path, train):
    images = pa.array([{"bytes": image, "path": None} for image in train.images])
    labels = pa.array([NAMES[label] for label in train.labels]).dictionary_encode()
    path = write_parquet(tmp_path / "a.parquet", key=train.keys, image=images, label=labels)
    assert contents(open_data([path], classes=write_classes(tmp_path / "c.json")).test) == expected(train)


@pytest.mark.parametrize("how", ["in the folder", "in its own folder", "beside", "named", "among the paths"])
def test_parquet_joins_a_labels_file(tmp_path, train, how, files):
    """Pictures the labels file does not name are left out, and counted."""
    half = len(train.keys) // 2
    folder = tmp_path / "images"
    write_parquet(folder / "one.parquet", key=train.keys[:half], image=train.images[:half])
    write_parquet(folder / "two.parquet", key=train.keys[half:], image=train.images[half:])
    write_parquet(folder / "other.parquet", key=["x-1", "x-2"], image=train.images[:2])
    places = {"in the folder": folder, "beside": folder, "in its own folder": tmp_path}
    labels = write_parquet(places.get(how, tmp_path / "else") / LABELS_FILE, key=train.keys, label=train.labels)
    paths = sorted(folder.glob("[ot]*.parquet")) if how == "beside" else [folder]
    paths += [labels] if how == "among the paths" else []
    data = open_data([files.test], paths, files.classes, labels if how == "named" else None)
    assert data.train is not None
    assert contents(data.train) == expected(train)
    assert data.train.left_out == {"not_in_labels_file": 2}


def test_a_folder_that_also_holds_the_evaluation_file_gives_only_what_the_labels_file_names(tmp_path, train):
    """As in demo/emoji: eval-*.parquet has labels of its own but no key in train-labels.parquet."""
    test = corpus("test", 2)
    write_parquet(tmp_path / "train.parquet", key=train.keys, image=train.images)
    write_parquet(tmp_path / LABELS_FILE, key=train.keys, label=train.labels)
    evaluation = write_parquet(tmp_path / "eval-x.parquet", key=test.keys, image=test.images, label=test.labels)
    data = open_data([evaluation], [tmp_path])
    assert data.train is not None
    assert set(data.train.keys) == set(train.keys)


def test_a_labels_file_near_by_does_not_overrule_labels_of_the_pictures(tmp_path, train, files):
    path = write_parquet(tmp_path / "a.parquet", key=train.keys, image=train.images, label=train.labels)
    write_parquet(tmp_path / LABELS_FILE, key=train.keys, label=[0] * len(train.keys))
    data = open_data([files.test], [path], files.classes)
    assert data.train is not None
    assert contents(data.train) == expected(train)


def test_labels_without_a_picture_are_reported(tmp_path, train, files, caplog):
    path = write_parquet(tmp_path / "a.parquet", key=train.keys, image=train.images)
    labels = write_parquet(tmp_path / "l.parquet", key=[*train.keys, "gone"], label=[*train.labels, 3])
    with caplog.at_level(logging.WARNING):
        open_data([files.test], [path, labels], files.classes)
    assert "1 labels of" in caplog.text and "have no picture: gone" in caplog.text


def test_class_folders_are_numbered_by_sorted_name(folder, train):
    data = open_data([folder])
    by_name = train._replace(labels=[sorted(NAMES).index(NAMES[label]) for label in train.labels])
    assert contents(data.test) == expected(by_name, lambda key: f"{key.split('-')[1]}/{key}.png")
    assert [data.classes.name(label) for label in range(len(NAMES))] == sorted(NAMES)


def test_class_folders_may_be_named_by_name_synset_or_number(folder, files):
    for number, name in enumerate(NAMES):
        renamed = (name, f"{name}.n.01", str(number))[number % 3]
        (folder / name).rename(folder / renamed)
    data = open_data([folder], classes=files.classes)
    for row, key in enumerate(data.test.keys):
        assert NAMES[data.test.labels[row]] in key.split("/")[1]


def test_shard_set_takes_the_one_class_among_the_synsets(tmp_path, train, files):
    samples = [(k, image, [label, 7]) for k, image, label in zip(train.keys, train.images, train.labels, strict=True)]
    samples += [("several", train.images[0], [1, 2]), ("other", train.images[0], [7]), ("none", train.images[0], [])]
    shards = write_shards(tmp_path / "shards", samples, [*SYNSETS, "paint.n.01"])
    data = open_data([files.test], [shards], files.classes)
    assert data.train is not None
    assert contents(data.train) == expected(train)
    assert data.train.left_out == {"several_classes": 1, "no_class": 2}


def test_shard_set_with_a_labels_file_finds_escaped_keys(tmp_path, train, files):
    names = [f"my pictures/{key}.png" for key in train.keys]
    samples = [(safe_key(name), image, []) for name, image in zip(names, train.images, strict=True)]
    shards = write_shards(tmp_path / "shards", [*samples, ("extra", train.images[0], [])], SYNSETS)
    labels = write_parquet(tmp_path / "l.parquet", key=names, label=train.labels)
    data = open_data([files.test], [shards], files.classes, labels)
    assert data.train is not None
    assert contents(data.train) == expected(train, lambda key: safe_key(f"my pictures/{key}.png"))
    assert data.train.left_out == {"not_in_labels_file": 1}


def test_the_hash_follows_the_content_not_the_place(tmp_path, folder, files):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy / "folders")
    first, same = open_data([folder]), open_data([copy / "folders"])
    assert first.test.sha256 == same.test.sha256
    (copy / "folders" / "red" / "train-red-0.png").write_bytes(picture(3, 3))
    assert open_data([copy / "folders"]).test.sha256 != first.test.sha256


def test_a_key_twice_is_taken_once(tmp_path, train):
    path = write_parquet(tmp_path / "a.parquet", key=train.keys, image=train.images, label=train.labels)
    shutil.copy(path, tmp_path / "b.parquet")
    data = open_data([tmp_path])
    assert contents(data.test) == expected(train)
    assert data.test.left_out == {"duplicate_key": len(train.keys)}


def test_the_same_key_in_both_sets_is_reported(tmp_path, train, caplog):
    path = write_parquet(tmp_path / "a.parquet", key=train.keys, image=train.images, label=train.labels)
    with caplog.at_level(logging.WARNING):
        open_data([path], [path])
    assert "21 keys are in the training and in the evaluation data" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["key"]}, "has no 'key' column, only image, label; expected key, image, label"),
        ({"drop": ["image", "label"]}, "has no 'image' column, only key; expected key, image, label"),
        ({"drop": ["image"]}, "holds labels but no pictures"),
        ({"drop": ["label"]}, "has no 'label' column, and no labels file goes with it"),
        ({"label": [7] * 21}, "has label 7, outside 0..6 of"),
        ({"label": [-1] * 21}, "has label -1, outside 0..6 of"),
        ({"label": ["gren"] * 21}, "a class 'gren' that .* does not list; the nearest is 'green'"),
        ({"label": [0.5] * 21}, "the 'label' column of .* is double"),
        ({"image": ["path.png"] * 21}, None),
        ({"label": pa.array([None] * 21, pa.int32())}, r"no picture with a class \(21 no_label\)"),
    ],
)
def test_refused_parquet(tmp_path, train, files, change, message):
    columns = {"key": train.keys, "image": train.images, "label": train.labels} | change
    path = write_parquet(tmp_path / "a.parquet", **columns)
    if message is None:
        with pytest.raises(DataError, match=r"the 'image' column of .* is string; expected the bytes"):
            open_data([path], classes=files.classes).test.read(0)
    else:
        with pytest.raises(DataError, match=message):
            open_data([path], classes=files.classes)


def test_a_class_without_training_images_is_refused(tmp_path, files):
    train = corpus("train", 3, classes=5)
    path = write_parquet(tmp_path / "a.parquet", key=train.keys, image=train.images, label=train.labels)
    with pytest.raises(DataError, match="2 of 7 classes in the evaluation data have no training image: brown, white"):
        open_data([files.test], [path], files.classes)


def test_different_class_folders_are_refused(tmp_path, folder, train):
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "red").rename(tmp_path / "other" / "rot")
    with pytest.raises(DataError, match="1 of 7 classes in the evaluation data have no training image: red"):
        open_data([folder], [tmp_path / "other"])


def test_an_empty_class_folder_is_refused(folder):
    (folder / "pink").mkdir()
    with pytest.raises(DataError, match=r"the class folder .*pink holds no pictures"):
        open_data([folder])


def test_labels_that_fit_no_key_are_refused(tmp_path, train, files):
    path = write_parquet(tmp_path / "a.parquet", key=train.keys, image=train.images)
    labels = write_parquet(tmp_path / "l.parquet", key=["a", "b"], label=[0, 1])
    with pytest.raises(DataError, match=r"none of the 21 picture keys \(such as 'train-red-0'\) is in"):
        open_data([files.test], [path, labels], files.classes)


def test_two_labels_for_a_key_are_refused(tmp_path, train, files):
    path = write_parquet(tmp_path / "a.parquet", key=train.keys, image=train.images)
    labels = write_parquet(tmp_path / "l.parquet", key=["train-red-0"] * 2, label=[0, 1])
    with pytest.raises(DataError, match="gives 'train-red-0' two labels, 0 and 1"):
        open_data([files.test], [path, labels], files.classes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no evaluation data at .*nothing: no such file or folder"),
        ("empty", "holds neither Parquet files, nor class folders with pictures, nor a shard set"),
        ("text.txt", "is not a Parquet file"),
        ("broken.parquet", "cannot read .*broken.parquet"),
        ("shards", "is a shard set: say which synsets are classes with --classes"),
    ],
)
def test_refused_paths(tmp_path, train, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    write_shards(tmp_path / "shards", [("a", train.images[0], [0]), ("b", train.images[1], [1])], SYNSETS)
    with pytest.raises(DataError, match=message):
        open_data([tmp_path / name])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not JSON"),
        ("{}", "must be a list"),
        ('[{"label": 0}]', "entry 0 of .* needs a 'name'"),
        ('[{"label": 1, "name": "a"}]', "the labels of its 1 classes must be 0..0"),
        ('[{"label": 0, "name": "a"}, {"label": 0, "name": "b"}]', "each once"),
        ('[{"label": "0", "name": "a"}]', "must be 0..0"),
        ('[{"label": 0, "names": []}]', "needs a 'name'"),
    ],
)
def test_refused_classes(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_classes(tmp_path / "c.json")


def test_a_class_may_have_several_names(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps([{"label": 0, "names": ["dog", "hound"]}, {"label": 1, "name": "cat"}]))
    classes = read_classes(tmp_path / "c.json")
    assert classes.names == (("dog", "hound"), ("cat",))
    assert classes.resolve(["hound", "cat", "1", 0], "here") == [0, 1, 1, 0]


def test_reading_in_any_order_and_from_threads_gives_the_same_pictures(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    data = corpus("a", 12)
    path = write_parquet(tmp_path / "a.parquet", row_group_size=3, key=data.keys, image=data.images, label=data.labels)
    test = open_data([path]).test
    order = np.random.default_rng(0).permutation(len(test)).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(test.read, order)) == [data.images[row] for row in order]
