"""Pictures without labels: every form, one hash whatever is known of classes, and what cannot be read."""

from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from eval.pictures import open_pictures, spread
from tests.eval.conftest import NAMES, corpus, picture, write_parquet, write_shards, write_tar
from tests.eval.published import put


def contents(pictures):
    return {key: pictures.test.read(row) for row, key in enumerate(pictures.test.keys)}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Pictures, some deeper, and what is none."""
    for name in ("b.png", "a.png", "deep/er/c.png", ".thumbs/d.png", "deep/notes.txt"):
        (tmp_path / "plain" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / name).write_bytes(picture(0, len(name)))
    return tmp_path / "plain"


def test_a_plain_folder_is_all_its_pictures_in_order(plain):
    found = open_pictures([plain])
    assert found.test.keys == ("a.png", "b.png", "deep/er/c.png")
    assert contents(found) == {name: (plain / name).read_bytes() for name in found.test.keys}
    assert set(found.test.labels.tolist()) == {-1}
    assert found.sets == {"data": found.test}
    assert found.hashes == {"data": found.test.sha256}


def test_every_form_gives_the_same_pictures(tmp_path):
    found = corpus("x", 1)
    by_key = dict(zip(found.keys, found.images, strict=True))
    bare = write_parquet(tmp_path / "bare.parquet", key=found.keys, image=found.images)
    labelled = write_parquet(tmp_path / "a.parquet", key=found.keys, image=found.images, label=found.labels)
    tar = write_tar(tmp_path / "t.tar", [(f"{key}.png", image) for key, image in by_key.items()])
    samples = [(key, image, [label]) for key, image, label in zip(found.keys, found.images, found.labels, strict=True)]
    shards = write_shards(tmp_path / "shards", samples, [f"{name}.n.01" for name in NAMES])
    for path in (bare, labelled, tar, shards):
        assert contents(open_pictures([path])) == by_key, path
    assert open_pictures([tar]).test.left_out == {}  # a picture without a label is still a picture


def test_the_hash_is_of_the_pictures_and_their_order(plain):
    before = open_pictures([plain]).test.sha256
    assert open_pictures([plain]).test.sha256 == before
    (plain / "a.png").rename(plain / "z.png")
    assert open_pictures([plain]).test.sha256 != before


def test_one_picture_is_enough_and_several_paths_are_joined(plain, tmp_path):
    assert open_pictures([plain / "b.png"]).test.keys == ("b.png",)
    found = open_pictures([plain, plain / "deep", plain / "b.png"])
    assert found.test.keys == ("plain/a.png", "plain/b.png", "plain/deep/er/c.png", "deep/er/c.png", "b.png")
    assert open_pictures([plain / "b.png", plain / "b.png"]).test.left_out == {"duplicate_key": 1}


def test_a_published_set_can_be_named_beside_plain_pictures(plain, tmp_path):
    made = put(tmp_path / "in1k", "train/n01440764/n01440764_1.JPEG", "train/n01443537/n01443537_2.JPEG")
    reference = Path(f"imagenet1k:train={tmp_path / 'in1k'}")
    alone = open_pictures([reference])
    assert list(contents(alone).values()) == list(made.values())
    published = alone.facts["published"]["data"]
    assert (published["name"], published["split"], published["whole"]) == ("imagenet1k", "train", False)
    both = open_pictures([reference, plain])
    assert len(both.test) == 5 and both.facts == {}, "with other pictures it is no longer the set"


@pytest.mark.parametrize("name", ["nowhere", "plain/deep/notes.txt", "plain/empty"])
def test_what_holds_no_picture_is_refused(plain, tmp_path, name):
    (plain / "empty").mkdir()
    with pytest.raises(DataError, match=name.rsplit("/", maxsplit=1)[-1]):
        open_pictures([tmp_path / name])


def test_the_spread_reaches_both_ends_and_never_repeats(plain):
    dataset = open_pictures([plain]).test
    assert spread(dataset, 2) == [0, 2]
    assert spread(dataset, 0) == spread(dataset, 99) == [0, 1, 2]
