"""Splits: at most K of every class, written down, read back, and refused when they do not fit."""

import json
from collections import Counter

import numpy as np
import pytest

from data_pipeline.errors import DataError, UsageError
from eval import splits
from eval.classes import plain_classes
from eval.datasets import Dataset
from eval.splits import Pool

CLASSES = plain_classes(("ant", "bee", "cat"), "a test")
WHICH = [(k, seed) for k in (1, 4) for seed in (0, 1)]


def bank(labels: list[int], keys: list[str] | None = None) -> Dataset:
    keys = keys or [f"k{number:03d}" for number in range(len(labels))]
    return Dataset("training", tuple(keys), np.array(labels), lambda row: keys[row].encode(), "0", {})


def keys_of(dataset: Dataset, positions: list[int]) -> list[str]:
    return [dataset.keys[position] for position in positions]


TRAIN = bank([0] * 9 + [1] * 2 + [2] * 5)
POOL = Pool(TRAIN)


def test_a_split_has_at_most_k_images_of_every_class():
    positions = POOL.draw(4, seed=0)
    assert Counter(TRAIN.labels[positions].tolist()) == {0: 4, 1: 2, 2: 4}
    assert len(set(positions)) == len(positions)


def test_splits_differ_by_seed_and_one_shot_is_part_of_five_shot():
    pool = Pool(bank([0] * 50 + [1] * 50))
    one, five, other = pool.draw(1, 0), pool.draw(5, 0), pool.draw(5, 1)
    assert set(one) < set(five)
    assert set(five) != set(other)


def test_a_split_does_not_depend_on_the_order_of_the_files():
    images = bank([0, 1] * 20)
    turned = bank([1, 0] * 20, list(images.keys)[::-1])
    keys = keys_of(images, Pool(images).draw(3, 0))
    assert keys == keys_of(turned, Pool(turned).draw(3, 0)) == sorted(keys)


def test_every_image_is_drawn_equally_often():
    pool = Pool(bank([0] * 10))
    counts = Counter(position for seed in range(600) for position in pool.draw(1, seed))
    assert set(counts) == set(range(10)) and max(counts.values()) < 2 * min(counts.values())


def test_the_next_image_of_its_class_stands_in_for_a_broken_one():
    whole = POOL.draw(4, 0)
    lost = whole[1]
    mended = POOL.draw(4, 0, {lost})
    assert set(whole) - set(mended) == {lost} and len(mended) == len(whole)
    assert POOL.draw(4, 0, {9}) == [p for p in whole if p != 9]  # the class has only two


def test_a_part_is_a_data_set_of_its_own():
    part = TRAIN.part([3, 10, 11])
    assert part.keys == ("k003", "k010", "k011") and part.labels.tolist() == [0, 1, 2]
    assert [part.read(row) for row in range(3)] == [b"k003", b"k010", b"k011"]
    assert len({TRAIN.sha256, part.sha256, TRAIN.part([3, 10, 12]).sha256}) == 3


# ---------------------------------------------------------------------------------------------------------------- given


@pytest.fixture
def folder(tmp_path):
    """What an evaluation writes."""
    for which in WHICH:
        file = splits.file_of(TRAIN, POOL.draw(*which), *which)
        path = tmp_path / file.name
        path.parent.mkdir(exist_ok=True)
        path.write_text(file.text)
    return tmp_path / "splits"


def read(folder, which=WHICH) -> dict[tuple[int, int], list[int]]:
    return splits.read(folder, which, TRAIN, CLASSES)


def test_written_splits_are_read_back_and_written_the_same_again(folder):
    for which, positions in read(folder).items():
        assert positions == POOL.draw(*which)
        file = splits.file_of(TRAIN, positions, *which)
        assert (folder.parent / file.name).read_text() == file.text


def test_a_list_of_keys_a_line_is_read_too(tmp_path):
    keys = keys_of(TRAIN, POOL.draw(4, 7))
    (tmp_path / "mine_4shot_seed7.txt").write_text("\n".join(keys[::-1]) + "\n\n")
    assert keys_of(TRAIN, read(tmp_path, [(4, 7)])[4, 7]) == keys


def test_files_of_other_images_may_lie_beside_ours(folder):
    (folder / "00000000-4shot-seed0.json").write_text(json.dumps({"k": 4, "seed": 0, "keys": ["elsewhere"]}))
    assert set(read(folder)) == set(WHICH)


def write(folder, keys, k=4, seed=0, name=None):
    (folder / (name or f"{k}shot-seed{seed}.json")).write_text(json.dumps({"k": k, "seed": seed, "keys": keys}))
    return folder


FULL = ["k000", "k001", "k002", "k003", "k009", "k010", "k011", "k012", "k013", "k014"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            [*FULL[:-1], "p.png"],
            "1 of its 10 images are not in the training data, such as 'p.png'; keys there look like",
        ),
        ([key for key in FULL if key not in ("k009", "k010")], "no image of 1 of 3 classes: bee"),
        ([*FULL, "k004"], "1 classes have a wrong number of images, such as ant with 5; 4-shot takes 4 of its 9"),
        (FULL[1:], "1 classes have a wrong number of images, such as ant with 3; 4-shot takes 4 of its 9"),
        ([key for key in FULL if key != "k010"], "such as bee with 1; 4-shot takes 2 of its 2"),
        ([*FULL, "k003"], "names images twice: k003"),
        ({"k000": 1}, "is not a split file: expected"),
        ([1, 2], "is not a split file: expected"),
    ],
)
def test_splits_that_do_not_fit_are_refused(tmp_path, keys, message):
    assert len(read(write(tmp_path, FULL), [(4, 0)])[4, 0]) == 10
    with pytest.raises(DataError) as error:
        read(write(tmp_path, keys), [(4, 0)])
    assert message in str(error.value) and "4shot-seed0.json" in str(error.value)


def test_a_split_that_is_not_there_is_told_with_those_that_are(folder):
    with pytest.raises(UsageError, match=r"has no 4-shot split of seed 5; there are: 1-shot seed 0, 1-shot seed 1, 4-"):
        read(folder, [(4, 5)])


def test_two_files_for_one_split_are_refused(tmp_path):
    write(write(tmp_path, FULL), FULL, name="again-4shot-seed0.json")
    with pytest.raises(UsageError, match=r"4shot-seed0.json and again-4shot.* are both 4-shot of seed 0; keep one"):
        read(tmp_path, [(4, 0)])


def test_a_folder_without_splits_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="no such folder, or no split files"):
            read(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("4shot-seed0.json", b"{", "is not JSON"),
        ("4shot-seed0.json", b"\xff\xfe", "cannot be read"),
        ("4shot-seed0.json", b'{"k": 0, "seed": 0, "keys": []}', "is not a split file"),
        ("images.txt", b"k000", "does not say which split it is; name it like 5shot-seed0.txt"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path, [(4, 0)])
