"""One interface for every form of evaluation data, and what is refused."""

import gzip
import json
import logging
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shardset import safe_key
from eval.classes import read_classes
from eval.datasets import LABELS_FILE, open_data
from eval.sources import tars
from tests.eval.conftest import NAMES, corpus, picture, write_classes, write_parquet, write_shards, write_tar


def member_end(path: Path, number: int) -> int:
    """Where the blocks of a member end."""
    with tarfile.open(path) as tar:
        info = tar.getmembers()[number]
    return info.offset_data + -(-info.size // 512) * 512


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


def test_classes_of_a_shard_set_may_be_ids_of_wordnet(tmp_path, train):
    samples = [(key, image, [label]) for key, image, label in zip(train.keys, train.images, train.labels, strict=True)]
    path = write_shards(tmp_path / "set", samples, SYNSETS)  # its ids are n00000000, n00000001, …
    (tmp_path / "c.csv").write_text("wnid,name\n" + "".join(f"n{i:08d},{name}\n" for i, name in enumerate(NAMES)))
    assert dict(zip(train.keys, train.labels, strict=True)) == {
        key: label for key, (label, _) in contents(open_data([path], classes=tmp_path / "c.csv").test).items()
    }


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
        (
            "empty",
            "holds neither Parquet files, nor tars, nor class folders with pictures, nor a shard set: it is empty",
        ),
        ("flat", "flat holds pictures but no classes; put each into a folder that has the name of its class"),
        ("parts", r"parts holds the parts of a data set, not classes; give one of them: .*parts/train, .*parts/val"),
        ("packed.tar.gz", "is packed, and its pictures are read in any order; unpack it first: gunzip"),
        ("empty.tar", "is not a tar; it is empty"),
        ("text.tar", "text.tar is not a tar$"),
        ("cut.tar", r"cut.tar is cut off or damaged after 4 \(truncated_tar\); copy it again"),
        ("bare.tar", r"no picture with a class \(6 no_label\)"),
        ("v-{3..1}.tar", r"v-\{3\.\.1\}\.tar stands for no file: 3 is more than 1"),
        ("text.txt", "is not a Parquet file"),
        ("broken.parquet", "cannot read .*broken.parquet"),
        ("shards", "is a shard set: say which synsets are classes with --classes"),
    ],
)
def test_refused_paths(tmp_path, train, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    for name_ in ("flat/a.png", "parts/train/red/a.png", "parts/val/red/a.png"):
        (tmp_path / name_).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name_).write_bytes(train.images[0])
    for name_ in ("empty.tar", "text.tar"):
        (tmp_path / name_).write_text("" if name_ == "empty.tar" else "no header" * 100)
    whole = write_tar(tmp_path / "bare.tar", [(f"{n}.png", image) for n, image in enumerate(train.images[:6])])
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[: member_end(whole, 5) - 600])
    (tmp_path / "packed.tar.gz").write_bytes(gzip.compress(whole.read_bytes()))
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


# ---------------------------------------------------------------------------------------------------------- WebDataset


def as_members(data, style: str) -> list[tuple[str, bytes]]:
    """Samples of one class number each; among them what webdataset's rules must keep apart."""
    members: list[tuple[str, bytes]] = []
    for number, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        name = f"a.b/{number:03d}" if number % 2 else f"./{number:03d}"  # dots in folders are not endings
        members += [(f"{name}.seg.png", b"a mask"), (f"{name}.PNG", image)]
        if style == "cls":
            members.append((f"{name}.cls", f" {label}\n".encode()))
        else:
            members.append((f"{name}.json", json.dumps({"label": NAMES[label], "caption": "x"}).encode()))
    return members


@pytest.mark.parametrize("style", ["cls", "json"])
def test_a_tar_gives_what_the_webdataset_library_reads_from_it(tmp_path, train, files, style):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    path = write_tar(tmp_path / "val.tar", as_members(train, style))
    data = open_data([path], classes=files.classes).test
    found = {key: (label, image) for key, (label, image) in contents(data).items()}
    expected = {}
    with path.open("rb") as stream:
        for sample in group_by_keys(tar_file_expander([{"url": "val.tar", "stream": stream}])):
            label = int(sample["cls"]) if style == "cls" else NAMES.index(json.loads(sample["json"])["label"])
            expected[sample["__key__"]] = (label, sample["png"])
    assert found == expected and len(expected) == len(train.keys)


def test_tars_by_braces_or_folder_keep_samples_of_the_same_name_apart(tmp_path, train, files):
    for number in range(3):
        part = type(train)(*(column[number * 7 : number * 7 + 7] for column in train))
        write_tar(tmp_path / "wds" / f"val-{number:02d}.tar", as_members(part, "cls"))
    by_braces = open_data([tmp_path / "wds" / "val-{00..02}.tar"], classes=files.classes).test
    by_folder = open_data([tmp_path / "wds"], classes=files.classes).test
    assert by_braces.keys == by_folder.keys and by_braces.sha256 == by_folder.sha256
    assert sorted(by_braces.read(row) for row in range(21)) == sorted(train.images)
    assert len(open_data([tmp_path / "wds" / "val-{00,02}.tar"], classes=files.classes).test) == 14
    with pytest.raises(DataError, match=r"no evaluation data at .*val-03.tar"):
        open_data([tmp_path / "wds" / "val-{00..03}.tar"], classes=files.classes)


def test_a_labels_file_finds_the_keys_inside_of_tars(tmp_path, train, files):
    for number in range(2):
        half = range(number * 10, number * 10 + 10)
        write_tar(tmp_path / f"{number}.tar", [(f"{train.keys[row]}.png", train.images[row]) for row in half])
    labels = write_parquet(tmp_path / "l.parquet", key=train.keys[:20], label=train.labels[:20])
    data = open_data([files.test], [tmp_path / "0.tar", tmp_path / "1.tar"], files.classes, labels).train
    assert [label for label, _ in contents(data).values()] == train.labels[:20] and data.left_out == {}


def test_hostile_members_are_refused_and_counted(tmp_path, train, files, monkeypatch):
    largest = max(map(len, train.images))
    monkeypatch.setattr(tars, "MAX_BYTES", largest)
    members = [(f"{number}.{ending}", data) for number, image in enumerate(train.images[:3])
               for ending, data in (("png", image), ("cls", b"1"))]  # fmt: skip
    members += [
        ("../../up.png", train.images[0]), ("../../up.cls", b"1"), ("/etc/root.png", train.images[0]),
        ("big.png", bytes(largest + 1)), ("big.cls", b"1"),
        ("bad.png", train.images[0]), ("bad.json", b"[" * 2500),
        ("list.png", train.images[0]), ("list.json", b"[1]"),
        ("odd.png", train.images[0]), ("odd.json", b'{"label": 1.5}'),
        ("none.png", train.images[0]), ("bytes.png", train.images[0]), ("bytes.cls", b"\xff\xfe"),
        ("3.png", train.images[3]), ("3.cls", b"2"), ("3.png", train.images[4]),
    ]  # fmt: skip
    path = write_tar(tmp_path / "t.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("4.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    test = open_data([path], classes=files.classes).test
    wanted = {str(number): (1, train.images[number]) for number in range(3)} | {"3": (2, train.images[3])}
    assert contents(test) == wanted
    assert test.left_out == {
        "unsafe_name": 3, "too_many_bytes": 1, "missing_image": 1, "bad_json": 2, "bad_label": 1, "no_label": 1,
        "label_not_utf8": 1, "duplicate_member": 1, "tar_link": 1,
    }  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == before


# -------------------------------------------------------------------------------------------- as on Hugging Face


def hugging_face(path, data, rows: slice, names=NAMES, column: str = "label"):
    """A file as `datasets` writes it: a struct of bytes, a number, and the names in the schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = {"info": {"features": {column: {"names": list(names), "_type": "ClassLabel"}}}}
    images = pa.array([{"bytes": image, "path": None} for image in data.images[rows]])
    table = pa.table({"image": images, column: pa.array(data.labels[rows], pa.int64())})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path, row_group_size=3)
    return path


def test_a_data_set_as_on_hugging_face(tmp_path, train):
    for number, rows in enumerate((slice(0, 10), slice(10, 21))):
        hugging_face(tmp_path / "data" / f"test-{number:05d}-of-00002.parquet", train, rows)
    data = open_data([tmp_path])
    assert [data.test.read(row) for row in range(21)] == train.images and data.test.labels.tolist() == train.labels
    assert data.classes.names == tuple((name,) for name in NAMES) and data.classes.named
    assert len(set(data.test.keys)) == 21 and data.test.keys[0].startswith("test-00000-of-00002-")
    hugging_face(tmp_path / "data" / "train-00000-of-00001.parquet", train, slice(0, 21))
    with pytest.raises(
        DataError, match=r"holds several splits: test, train; give the files of one, such as .*/test-\*"
    ):
        open_data([tmp_path])


def test_numbers_whose_names_the_file_knows_follow_the_names(tmp_path, train, files):
    """The classes may be given in another order; a file with more or fewer classes is another data set."""
    backwards = [NAMES.index(name) for name in reversed(NAMES)]
    turned = train._replace(labels=[backwards[label] for label in train.labels])
    path = hugging_face(tmp_path / "a.parquet", turned, slice(0, 21), [name.upper() for name in reversed(NAMES)])
    assert open_data([path], classes=files.classes).test.labels.tolist() == train.labels
    strangers = hugging_face(tmp_path / "b.parquet", train, slice(0, 21), ["a", "b", "c", "d", "e", "f", "g", "h"])
    with pytest.raises(
        DataError, match=r"has 8 classes \(a, b, c and 5 more\), and .* 7; give the classes that belong"
    ):
        open_data([strangers], classes=files.classes)
    with pytest.raises(DataError, match="number their classes differently; give --classes"):
        open_data([path, strangers])


def test_numbers_are_not_trusted_where_a_name_that_both_know_has_another(tmp_path, train, files):
    """One stranger among the names must not turn what was matched by name into what is matched by number."""
    path = hugging_face(tmp_path / "a.parquet", train, slice(0, 21), ["rouge", *NAMES[1:]])
    assert open_data([path], classes=files.classes).test.labels.tolist() == train.labels
    path = hugging_face(tmp_path / "b.parquet", train, slice(0, 21), [*reversed(NAMES[1:]), "rouge"])
    with pytest.raises(DataError, match=r"label 0 is 'brown' in .*, and 6 in .* these are not.*: rouge; give a class"):
        open_data([path], classes=files.classes)


def test_files_of_the_same_name_have_keys_of_their_own(tmp_path, train, caplog):
    first = hugging_face(tmp_path / "train" / "0.parquet", train, slice(0, 14), column="fine_label")
    second = hugging_face(tmp_path / "test" / "0.parquet", train, slice(7, 21), column="fine_label")
    with caplog.at_level(logging.WARNING):
        data = open_data([second], [first])
    assert data.train is not None and not set(data.train.keys) & set(data.test.keys) and not caplog.text
    assert len(open_data([first, second]).test) == 28
