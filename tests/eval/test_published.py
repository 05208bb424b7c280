"""Published sets: what is known of them, references, counts and hashes."""

import dataclasses
import hashlib
import io
import logging
import tarfile
from pathlib import Path

import pytest

from data_pipeline.errors import DataError, UsageError
from eval.classes import read_classes
from eval.datasets import open_data
from eval.published import description, registry
from eval.published.sets import open_published
from eval.published.tree import Tree
from tests.eval.conftest import picture, write_tar
from tests.eval.published import opened, put, shrunk, text

# --------------------------------------------------------------------------------------------------------- descriptions


@pytest.mark.parametrize("name", registry.names())
def test_every_description_can_be_used(name):
    """It names itself, its splits are there, its layout is one, figures have sources."""
    published = registry.find(name)
    assert published.name == name == description.files()[name].stem
    for split in (published.evaluate, published.train):
        assert split is None or split in published.splits
    for part in published.splits.values():
        assert (Path(registry.__file__).parent / "layouts" / f"{part.layout}.py").is_file()
        assert part.images is None or part.images > 0
    assert {split for archive in published.archives for split in archive.splits} <= published.splits.keys()
    for archive in published.archives:
        assert archive.hashes.md5 is None or len(archive.hashes.md5) == 32
        assert archive.hashes.sha256 is None or len(archive.hashes.sha256) == 64
        assert archive.unpack == "" or "{}" in archive.unpack
    assert published.source.startswith("http")
    assert published.licence
    assert published.lay_out
    assert published.sources and all({"fact", "from"} <= source.keys() for source in published.sources)


def test_bundled_classes_are_as_many_as_published():
    own = [registry.find(name) for name in registry.names()]
    for published in own:
        if isinstance(published.classes, str) and published.classes == published.name:
            assert len(read_classes(published.classes)) == published.num_classes, published.name


# ---------------------------------------------------------------------------------------------------- counts and hashes


def pets(folder: Path, there: int = 3) -> None:
    names = [f"Abyssinian_{number}" for number in range(3)]
    put(folder, *(f"images/{name}.jpg" for name in names[:there]))
    text(folder / "annotations" / "test.txt", *(f"{name} {number + 1} 1 1" for number, name in enumerate(names)))


def test_a_whole_split_is_whole_and_says_so(tmp_path):
    pets(tmp_path)
    published, split = shrunk("oxford_pets", 3, 3)
    found = registry.verify(published, split, tmp_path)
    assert (found.whole, found.images, found.classes, found.missing, found.problems) == (True, 3, 3, (), ())
    assert registry.open_split(published, split, tmp_path).published == {
        "name": "oxford_pets",
        "split": "test",
        "whole": True,
    }


def test_missing_pictures_are_counted_and_named(tmp_path, caplog):
    pets(tmp_path, there=2)
    (tmp_path / "images" / "Abyssinian_1.jpg").write_bytes(b"")  # empty is as good as missing
    published, split = shrunk("oxford_pets", 3, 3)
    found = registry.verify(published, split, tmp_path)
    assert found.missing == ("images/Abyssinian_1.jpg", "images/Abyssinian_2.jpg")
    assert found.problems == (
        "2 of 3 listed pictures are not there: images/Abyssinian_1.jpg, images/Abyssinian_2.jpg",
        "pictures of 1 classes, published are 3",
    )
    with caplog.at_level(logging.WARNING):
        source = registry.open_split(published, split, tmp_path)
    assert (source.keys, source.left_out["missing_image"]) == (["Abyssinian_0.jpg"], 2)
    assert "2 of 3 listed pictures are not there" in caplog.text
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"holds no picture of oxford_pets .* see `python -m eval prepare oxford_pets`"):
        registry.open_split(published, split, tmp_path)


def test_a_wrong_count_of_pictures_or_classes_is_no_whole_split(tmp_path):
    pets(tmp_path)
    for images, classes, problem in (
        (4, 3, "3 pictures, published are 4"),
        (3, 37, "pictures of 3 classes, published are 37"),
    ):
        published, split = shrunk("oxford_pets", images, classes)
        assert registry.verify(published, split, tmp_path).problems == (problem,)


def test_where_only_a_least_number_is_known_fewer_are_no_whole_split(tmp_path):
    pets(tmp_path)
    for least, problems in ((3, ()), (4, ("3 pictures, published are at least 4",))):
        published, split = shrunk("oxford_pets", 3, 3)
        part = dataclasses.replace(published.splits[split], images=None, at_least=least)
        published = dataclasses.replace(published, splits={split: part})
        assert registry.verify(published, split, tmp_path).problems == problems


def test_an_empty_class_is_a_problem(tmp_path):
    put(tmp_path, "2750/SeaLake/SeaLake_1.jpg")
    (tmp_path / "2750" / "Forest").mkdir()
    published, split = shrunk("eurosat", 1, 2)
    assert registry.verify(published, split, tmp_path).problems == (
        "the class folder 2750/Forest holds no pictures", "pictures of 1 classes, published are 2"
    )  # fmt: skip


def test_hashes_of_lists_and_of_tars_are_checked_in_one_reading(tmp_path, monkeypatch):
    """Both published kinds of hash; and neither a list nor a tar is opened a second time for it."""
    write_tar(tmp_path / "val_256.tar", [("val_256/Places365_val_00000001.jpg", picture(0, 0))])
    text(tmp_path / "categories_places365.txt", "/a/airfield 0")
    text(tmp_path / "places365_val.txt", "Places365_val_00000001.jpg 0")
    published, split = shrunk("places365", 1, 1)
    problems = registry.verify(published, split, tmp_path).problems
    assert len(problems) == 3 and all(" has md5 " in problem for problem in problems)

    def md5(name):
        return hashlib.md5((tmp_path / name).read_bytes()).hexdigest()

    lists = {
        name: dataclasses.replace(one, md5=md5(name))
        for name, one in published.lists.items()
        if (tmp_path / name).exists()
    }
    archives = [
        dataclasses.replace(one, hashes=dataclasses.replace(one.hashes, md5=md5(one.name)))
        if one.name == "val_256.tar"
        else one
        for one in published.archives
    ]
    right = dataclasses.replace(published, lists=lists, archives=tuple(archives))
    reads: list[str] = []
    original = Tree.read
    monkeypatch.setattr(Tree, "read", lambda self, name: reads.append(name) or original(self, name))
    source = registry.open_split(right, split, tmp_path)
    assert source.published is not None and source.published["whole"]
    assert sorted(reads) == ["categories_places365.txt", "places365_val.txt"]
    assert sorted(registry.verify(right, split, tmp_path).checked) == [
        "categories_places365.txt",
        "places365_val.txt",
        "val_256.tar",
    ]


def test_the_hash_of_a_set_follows_its_pictures_and_labels(tmp_path):
    pets(tmp_path / "a")
    pets(tmp_path / "b")
    first, same = (open_data([Path(f"oxford_pets={tmp_path / name}")]).test.sha256 for name in "ab")
    assert first == same
    (tmp_path / "b" / "images" / "Abyssinian_1.jpg").write_bytes(picture(9, 9))
    assert open_data([Path(f"oxford_pets={tmp_path / 'b'}")]).test.sha256 != first


def test_a_damaged_tar_is_refused(tmp_path):
    path = write_tar(
        tmp_path / "ILSVRC2012_img_val.tar", [(f"ILSVRC2012_val_0000000{n}.JPEG", picture(0, n)) for n in (1, 2)]
    )
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"is cut off or damaged"):
        opened(f"imagenet1k={tmp_path}")


def test_names_in_a_tar_stay_inside_and_links_are_not_followed(tmp_path):
    path = tmp_path / "ILSVRC2012_img_val.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("../up.JPEG", tarfile.REGTYPE), ("ILSVRC2012_val_00000002.JPEG", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
        info.size = len(picture(0, 0))
        tar.addfile(info, io.BytesIO(picture(0, 0)))
    text(tmp_path / "val.txt", "ILSVRC2012_val_00000001.JPEG 0", "ILSVRC2012_val_00000002.JPEG 1")
    data = open_data([Path(f"imagenet1k={tmp_path}")])
    assert data.test.keys == ("ILSVRC2012_val_00000001.JPEG",)
    assert data.test.left_out == {"unsafe_name": 1, "tar_link": 1, "missing_image": 1}


# ----------------------------------------------------------------------------------------------------------- references


def test_a_reference_chooses_the_split_that_the_field_uses(tmp_path):
    assert str(registry.reference("flowers102=/x")) == "flowers102:test=/x"
    assert str(registry.reference("flowers102=/x", training=True)) == "flowers102:trainval=/x"
    assert str(registry.reference(Path("Oxford-Pets:trainval=a/b=c"))) == "oxford_pets:trainval=a/b=c"
    assert registry.reference("some/folder=with/x.parquet") is None
    home = registry.reference("food101=~/food")  # which a shell leaves as it is
    assert home is not None and home.folder == Path.home() / "food"
    (tmp_path / "food101=x").mkdir()
    assert registry.reference(tmp_path / "food101=x") is None


@pytest.mark.parametrize(
    ("text_", "message"),
    [
        ("inat2081=/x", "no published set 'inat2081'; did you mean inat20"),
        ("food101:tset=/x", "food101 has no split 'tset'; did you mean test"),
        ("food101=", "say where food101 lies"),
        ("coco=/x", "name the annotations, as in coco:annotations/FILE.json=/x"),
        ("coco:val=/x", "name the annotations"),
    ],
)
def test_a_reference_that_means_nothing_is_refused(text_, message):
    with pytest.raises(UsageError, match=message):
        registry.reference(text_)
    with pytest.raises(UsageError, match=r"has no training split of its own"):
        registry.reference("eurosat=/x", training=True)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(DataError, match=r"no such folder; give the folder that the published files lie in"):
        opened(f"food101={tmp_path / 'no'}")
    with pytest.raises(
        DataError, match=r"has no pictures of food101 .test.: expected the folder images/ or food-101/images/"
    ):
        opened(f"food101={tmp_path}")


def test_classes_that_are_not_the_sets_are_refused(tmp_path, files):
    put(tmp_path, "2750/SeaLake/SeaLake_1.jpg")
    with pytest.raises(DataError, match=r"has a class 'SeaLake' that"):
        open_data([Path(f"eurosat={tmp_path}")], classes=files.classes)


def test_several_published_sets_at_once(tmp_path):
    pets(tmp_path / "pets")
    put(tmp_path / "euro", "2750/SeaLake/SeaLake_1.jpg")
    sets = open_published([Path(f"oxford_pets={tmp_path / 'pets'}"), Path(f"eurosat={tmp_path / 'euro'}")])
    assert {name: dataset.labels.tolist() for name, dataset in sets.sets.items()} == {
        "oxford_pets:test": [0, 1, 2],
        "eurosat:all": [9],
    }
    assert sets.facts["published"]["eurosat:all"] == {"name": "eurosat", "split": "all", "whole": False}
    assert sets.published["eurosat:all"].num_classes == 10
    with pytest.raises(UsageError, match=r"has to know which one a path is: give NAME=PATH, such as imagenet-v2="):
        open_published([tmp_path])
    with pytest.raises(UsageError, match=r"is given twice"):
        open_published([Path(f"eurosat={tmp_path / 'euro'}")] * 2)
