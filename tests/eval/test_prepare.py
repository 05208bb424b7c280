"""`python -m eval prepare`: what a folder holds of a published set, what is missing, and where to get it."""

import dataclasses
import hashlib

import pytest

from eval.__main__ import Parser, main
from eval.prepare import parser
from eval.published import description, registry
from tests.eval.conftest import picture


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """A small set as published: two training pictures and three test pictures of two classes, in archives."""
    real = registry.find("oxford_pets")
    splits = {
        name: dataclasses.replace(real.splits[name], images=images) for name, images in (("trainval", 2), ("test", 3))
    }
    digest = dataclasses.replace(real.archives[1].hashes, md5=hashlib.md5(b"packed").hexdigest())
    archives = (real.archives[0], dataclasses.replace(real.archives[1], hashes=digest))
    small = dataclasses.replace(real, num_classes=2, splits=splits, archives=archives)
    monkeypatch.setattr(description, "read", lambda name: small)
    for split, count in (("trainval", 2), ("test", 3)):
        names = [f"{split}_{number}" for number in range(count)]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"{split}.txt").write_text(
            "".join(f"{name} {1 + number % 2} 1 1\n" for number, name in enumerate(names))
        )
        for number, name in enumerate(names):
            (tmp_path / "images" / f"{name}.jpg").write_bytes(picture(number, 0, side=8))
    return tmp_path


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_whole_set_is_whole_and_nothing_is_changed(evaluate, pets):
    before = files_of(pets)
    outcome = evaluate("prepare", "oxford_pets", "--source", pets)
    assert outcome.code == 0
    assert "trainval: whole: 2 pictures of 2 classes" in outcome.out
    assert "test: whole: 3 pictures of 2 classes" in outcome.out
    assert f"{pets} holds oxford_pets whole" in outcome.out
    assert files_of(pets) == before


def test_missing_pictures_are_counted_and_named_and_the_place_to_get_them_is_told(evaluate, pets):
    (pets / "images" / "test_1.jpg").unlink()
    outcome = evaluate("prepare", "oxford_pets", "--source", pets)
    assert outcome.code == 1
    assert "test: not whole\n  1 of 3 listed pictures are not there: images/test_1.jpg" in outcome.out
    assert "images.tar.gz is not there; it is published at https://www.robots.ox.ac.uk/~vgg/data/pets/" in outcome.out
    assert "licence: CC BY-SA 4.0" in outcome.out
    assert "oxford_pets is not whole" in outcome.out
    assert evaluate("prepare", "oxford_pets", "--source", pets, "--split", "trainval").code == 0


def test_a_packed_archive_is_not_unpacked_but_checked_and_the_command_is_told(evaluate, pets):
    for file in (pets / "annotations").iterdir():
        file.unlink()
    (pets / "annotations").rmdir()
    (pets / "annotations.tar.gz").write_bytes(b"packed")
    before = files_of(pets)
    outcome = evaluate("prepare", "oxford_pets", "--source", pets)
    assert outcome.code == 1
    assert "test: not there: " in outcome.out
    assert f"annotations.tar.gz lies there packed: cd {pets} && tar -xzf annotations.tar.gz" in outcome.out
    assert files_of(pets) == before
    (pets / "annotations.tar.gz").write_bytes(b"packed, and damaged")
    outcome = evaluate("prepare", "oxford_pets", "--source", pets)
    assert f"its md5 is {hashlib.md5(b'packed, and damaged').hexdigest()}, published is" in outcome.out


def test_every_set_is_listed_and_described(evaluate):
    outcome = evaluate("prepare")
    assert outcome.code == 0
    assert [line.split()[0] for line in outcome.out.splitlines()[1 : 1 + len(registry.names())]] == registry.names()
    for name in registry.names():
        outcome = evaluate("prepare", name)
        assert outcome.code == 0
        assert registry.find(name).title in outcome.out
        assert registry.find(name).source in outcome.out


def test_what_cannot_be_asked_is_refused(evaluate, tmp_path):
    for words, message in (
        (["inat2081"], "no published set 'inat2081'; did you mean inat20"),
        (["food101", "--source", tmp_path, "--split", "tset"], "food101 has no split 'tset'; did you mean test"),
        (["--source", tmp_path], "--source and --split belong to one set"),
        (["coco", "--source", tmp_path], "name the annotations with --split annotations/FILE.json"),
        (["food101", "--sorce", tmp_path], "unrecognized arguments"),
    ):
        outcome = evaluate("prepare", *words)
        assert outcome.code == 2
        assert message in outcome.err


def test_an_empty_folder_is_not_there(evaluate, tmp_path):
    outcome = evaluate("prepare", "inat2018", "--source", tmp_path, "--split", "val")
    assert outcome.code == 1
    assert "val: not there: " in outcome.out and "has no annotations of inat2018 (val): expected" in outcome.out
    assert "val2018.json.tar.gz is not there" in outcome.out
    assert "train2018.json.tar.gz is not there" not in outcome.out
    assert main(["prepare", "inat2018", "--source", str(tmp_path / "no")]) == 1


def test_its_flags_can_be_read_without_running_it():
    args = parser(Parser).parse_args(["inat2018", "--source", "/data/inat2018", "--split", "val"])
    assert (args.name, str(args.source), args.split) == ("inat2018", "/data/inat2018", ["val"])
