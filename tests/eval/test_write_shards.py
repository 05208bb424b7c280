"""`python -m eval shards`: any labelled set as a shard set with one class a picture."""

import io
import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.shardset import ShardSet, safe_key
from eval.__main__ import Parser
from eval.classes import read_classes
from eval.datasets import open_data, open_training
from eval.write_shards import parser, write
from tests.eval.conftest import NAMES, corpus, picture, write_classes, write_parquet
from tests.eval.published import put


@pytest.fixture
def pictures(tmp_path):
    """Parquet with three pictures of each class."""
    made = corpus("train", 3)
    return made, write_parquet(tmp_path / "a.parquet", key=made.keys, image=made.images, label=made.labels)


def stored(shards: ShardSet) -> dict[str, tuple[list[int], bytes]]:
    found = {}
    for shard, size in enumerate(shards.shard_sizes):
        index = shards.index(shard)
        for row in range(size):
            record = shards.record(shard, row)
            assert record["key"] == index["key"][row].as_py()
            assert record["labels"] == index["labels"][row].as_py()
            found[record["key"]] = (record["labels"], shards.image_bytes(shard, row))
    return found


def test_every_picture_is_in_it_once_with_one_label_and_its_own_bytes(evaluate, tmp_path, pictures, files):
    made, path = pictures
    outcome = evaluate(
        "shards", "--data", path, "--classes", files.classes, "--output", tmp_path / "s", "--samples-per-shard", 8
    )
    assert outcome.code == 0, outcome.err
    assert f"{tmp_path / 's'}: 21 pictures of 7 classes, 3 shards" in outcome.out
    shards = ShardSet.open(tmp_path / "s")
    assert list(shards.verify()) == []
    wanted = {
        safe_key(key): ([label], image) for key, image, label in zip(made.keys, made.images, made.labels, strict=True)
    }
    assert stored(shards) == wanted
    assert shards.shard_sizes == [8, 8, 5]
    assert len({label for labels, _ in list(stored(shards).values())[:8] for label in labels}) > 2  # classes are mixed
    assert [(e.index, e.synset, e.lemmas, e.count) for e in shards.vocabulary] == [
        (label, f"{name}.n.01", [name], 3) for label, name in enumerate(NAMES)
    ]
    assert shards.manifest["kind"] == "classes"
    assert shards.manifest["class_set"]["source"] == str(files.classes)


def test_it_is_training_data_for_the_published_set_it_was_made_of(tmp_path):
    """The set's folders are called otherwise than its classes, which are what a shard set tells of."""
    folders = [own[0] for own in read_classes("eurosat").folders]
    put(tmp_path, *(f"2750/{folder}/{folder}_{n}.png" for folder in folders for n in range(2)))
    reference = Path(f"eurosat:all={tmp_path}")
    classes, dataset = open_training([reference])
    write(dataset, classes, tmp_path / "s")
    data = open_data([reference], [tmp_path / "s"])
    assert data.classes == classes and data.train is not None
    by_picture = {data.train.read(row): label for row, label in enumerate(data.train.labels)}
    assert [by_picture[data.test.read(row)] for row in range(len(data.test))] == data.test.labels.tolist()


def test_it_is_read_back_as_the_data_it_came_from(tmp_path, pictures, files):
    made, path = pictures
    classes, dataset = open_training([path], files.classes)
    write(dataset, classes, tmp_path / "s")
    data = open_data([tmp_path / "s"])
    assert [data.classes.name(label) for label in range(7)] == list(NAMES)
    assert dict(zip(data.test.keys, data.test.labels.tolist(), strict=True)) == dict(
        zip(map(safe_key, made.keys), made.labels, strict=True)
    )


def test_wnids_stand_in_the_vocabulary_and_a_reference_gives_its_training_split(evaluate, tmp_path):
    for split, wnid in (("train", "n01440764"), ("train", "n01443537"), ("val", "n01484850")):
        folder = tmp_path / "imagenet" / split / wnid
        folder.mkdir(parents=True)
        (folder / f"{wnid}_1.JPEG").write_bytes(picture(len(wnid), int(wnid[-1])))
    (tmp_path / "two.json").write_text(
        json.dumps(
            [{"label": 0, "name": "goldfish", "wnid": "n01443537"}, {"label": 1, "name": "tench", "wnid": "n01440764"}]
        )
    )
    words = ["shards", "--data", f"imagenet1k={tmp_path / 'imagenet'}", "--classes", tmp_path / "two.json"]
    outcome = evaluate(*words, "--output", tmp_path / "s")
    assert outcome.code == 0, outcome.err
    shards = ShardSet.open(tmp_path / "s")
    assert [(entry.wnid, entry.lemmas) for entry in shards.vocabulary] == [
        ("n01443537", ["goldfish"]),
        ("n01440764", ["tench"]),
    ]
    assert {key.split("/")[0]: labels for key, (labels, _) in stored(shards).items()} == {
        "n01440764": [1],
        "n01443537": [0],
    }
    assert shards.manifest["data"]["published"] == {"name": "imagenet1k", "split": "train", "whole": False}


def test_the_same_data_gives_the_same_bytes(tmp_path, pictures, files):
    classes, dataset = open_training([pictures[1]], files.classes)
    assert write(dataset, classes, tmp_path / "a").sha256 == write(dataset, classes, tmp_path / "b").sha256


def test_a_form_that_no_shard_holds_becomes_png_with_every_pixel(tmp_path):
    (tmp_path / "d" / "red").mkdir(parents=True)
    image = Image.open(io.BytesIO(picture(0, 0))).convert("RGB")
    image.save(tmp_path / "d" / "red" / "a.bmp")
    image.save(tmp_path / "d" / "red" / "b.jpg")
    classes, dataset = open_training([tmp_path / "d"])
    shards = write(dataset, classes, tmp_path / "s")
    kept = {key.split("_")[0].split("/")[1][0]: data for key, (_, data) in stored(shards).items()}
    assert kept["b"] == (tmp_path / "d" / "red" / "b.jpg").read_bytes()
    assert Image.open(io.BytesIO(kept["a"])).convert("RGB").tobytes() == image.tobytes()
    assert shards.manifest["counts"]["written_as_png"] == 1


def test_a_broken_picture_is_left_out_and_many_are_an_error(evaluate, tmp_path, files):
    made = corpus("train", 15)
    images = list(made.images)
    images[5] = images[5][:60]
    path = write_parquet(tmp_path / "a.parquet", key=made.keys, image=images, label=made.labels)
    outcome = evaluate("shards", "--data", path, "--classes", files.classes, "--output", tmp_path / "s")
    assert outcome.code == 0
    assert "104 pictures of 7 classes, 1 shards; left out: 1 that cannot be read" in outcome.out
    assert sum(ShardSet.open(tmp_path / "s").manifest["counts"]["broken"].values()) == 1
    images[6], images[7] = b"", b"GIF89a"
    path = write_parquet(tmp_path / "b.parquet", key=made.keys, image=images, label=made.labels)
    outcome = evaluate("shards", "--data", path, "--classes", files.classes, "--output", tmp_path / "t")
    assert outcome.code == 1
    assert "3 pictures cannot be read, more than 1 % of 105" in outcome.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.parquet", "b.parquet", "s"]  # nothing half-written


def test_a_class_without_a_picture_is_refused(evaluate, tmp_path):
    made = corpus("train", 1, classes=5)
    path = write_parquet(tmp_path / "a.parquet", key=made.keys, image=made.images, label=made.labels)
    outcome = evaluate(
        "shards", "--data", path, "--classes", write_classes(tmp_path / "c.json"), "--output", tmp_path / "s"
    )
    assert outcome.code == 1
    assert "2 of 7 classes have no picture: brown, white; give --classes" in outcome.err
    assert not (tmp_path / "s").exists()


def test_an_output_that_is_there_is_not_touched(evaluate, tmp_path, pictures):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine").write_text("keep")
    outcome = evaluate("shards", "--data", pictures[1], "--output", tmp_path / "s")
    assert outcome.code == 2
    assert "is there already; give another folder" in outcome.err
    assert [file.name for file in (tmp_path / "s").iterdir()] == ["mine"]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path, pictures, files, monkeypatch):
    import eval.write_shards as module

    def full(*_):
        raise OSError(28, "No space left on device")

    classes, dataset = open_training([pictures[1]], files.classes)
    monkeypatch.setattr(module, "write_vocabulary", full)
    with pytest.raises(DataError, match="No space left on device"):
        write(dataset, classes, tmp_path / "s")
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


def test_one_that_is_told_to_stop_leaves_nothing(evaluate, tmp_path, pictures, files, monkeypatch):
    import eval.write_shards as module

    monkeypatch.setattr(module, "write_vocabulary", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    outcome = evaluate("shards", "--data", pictures[1], "--classes", files.classes, "--output", tmp_path / "s")
    assert (outcome.code, signal.getsignal(signal.SIGTERM)) == (128 + signal.SIGTERM, before)
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


def test_its_flags_can_be_read_without_running_it():
    words = ["--data", "imagenet1k=/data/imagenet", "--classes", "imagenet1k", "--output", "shards/in1k"]
    args = parser(Parser).parse_args(words)
    assert [str(path) for path in args.data] == ["imagenet1k=/data/imagenet"]
    assert (args.classes, str(args.output)) == ("imagenet1k", "shards/in1k")
