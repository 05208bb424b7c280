"""Published sets: every layout on small data in its real on-disk form, and lists that are refused."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import DataError
from eval.classes import read_classes
from eval.datasets import open_data
from eval.published import registry
from eval.published.tree import MAX_LIST
from tests.eval.conftest import picture, write_tar
from tests.eval.published import opened, put, savemat, shrunk, text

WNIDS = [next(folder for folder in folders if folder.startswith("n")) for folders in read_classes("imagenet1k").folders]


# -------------------------------------------------------------------------------------------------------- class folders


def test_imagenet_train_folders(tmp_path):
    made = put(tmp_path, "train/n01443537/n01443537_2.JPEG", "train/n01440764/n01440764_10026.JPEG")
    found, names = opened(f"imagenet1k:train={tmp_path}")
    assert found == {
        "n01440764/n01440764_10026.JPEG": (0, made["train/n01440764/n01440764_10026.JPEG"]),
        "n01443537/n01443537_2.JPEG": (1, made["train/n01443537/n01443537_2.JPEG"]),
    }
    assert names[:2] == ["tench", "goldfish"]
    assert len(names) == 1000


@pytest.mark.parametrize("extended", [False, True])
def test_imagenet_train_archive_is_read_in_place(tmp_path, extended):
    """A tar of a tar per class, as it is published; or packed again by a program that writes pax headers."""
    made = {
        "n01440764_10026.JPEG": picture(0, 1),
        "n01440764_10027.JPEG": picture(0, 2),
        "n01484850_3.JPEG": picture(2, 3),
    }
    inner = []
    for wnid in ("n01440764", "n01484850"):
        path = write_tar(tmp_path / "x" / f"{wnid}.tar", [(n, d) for n, d in made.items() if n.startswith(wnid)])
        inner.append((path.name, path.read_bytes()))
    outer = write_tar(tmp_path / "in" / "ILSVRC2012_img_train.tar", inner)
    if extended:
        with tarfile.open(outer, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, data in inner:
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = len(data), {"comment": "x" * 600}
                tar.addfile(info, io.BytesIO(data))
    found, _ = opened(f"imagenet1k:train={tmp_path / 'in'}")
    order = {"n01440764": 0, "n01484850": WNIDS.index("n01484850")}
    assert found == {f"{name[:9]}/{name}": (order[name[:9]], data) for name, data in made.items()}


def test_imagenet_val_as_class_folders(tmp_path):
    made = put(tmp_path, "val/n01440764/ILSVRC2012_val_00000293.JPEG")
    found, _ = opened(f"imagenet1k={tmp_path}")
    assert found == {"n01440764/ILSVRC2012_val_00000293.JPEG": (0, *made.values())}


@pytest.mark.parametrize(
    ("how", "packed"), [("wnids", False), ("wnids", True), ("kaggle", False), ("caffe", False), ("devkit", False)]
)
def test_imagenet_val_flat_with_a_list(tmp_path, how, packed):
    """The first three pictures of the set and what the published lists say of them: snake, ski, Shetland sheepdog."""
    names = [f"ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2, 3)]
    wnids, numbers, devkit = ["n01751748", "n09193705", "n02105855"], [65, 970, 230], [490, 361, 171]
    made = put(tmp_path / "val", *names)
    if packed:
        write_tar(tmp_path / "ILSVRC2012_img_val.tar", made.items())
        for name in names:
            (tmp_path / "val" / name).unlink()
    if how == "wnids":
        text(tmp_path / "imagenet_2012_validation_synset_labels.txt", *wnids)
    elif how == "kaggle":
        rows = [f"{names[row][:-5]},{wnids[row]} 111 108 441 193 " for row in (2, 0, 1)]  # in no order, as published
        text(tmp_path / "LOC_val_solution.csv", "ImageId,PredictionString", *rows)
    elif how == "caffe":
        text(tmp_path / "val.txt", *(f"{name} {number}" for name, number in zip(names, numbers, strict=True)))
    else:
        folder = tmp_path / "ILSVRC2012_devkit_t12" / "data"
        text(folder / "ILSVRC2012_validation_ground_truth.txt", *map(str, devkit))
        kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
        rows = np.array([(number, wnid, "words") for number, wnid in zip(devkit, wnids, strict=True)], dtype=kind)
        savemat(folder / "meta.mat", synsets=rows)
    found, _ = opened(f"imagenet1k={tmp_path}")
    assert found == {name: (number, made[name]) for name, number in zip(names, numbers, strict=True)}
    assert [WNIDS[number] for number in numbers] == wnids


def test_flat_validation_pictures_without_classes_say_which_lists_would_do(tmp_path):
    put(tmp_path, "val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(DataError, match=r"without their classes: put ILSVRC2012_devkit_t12/data/ILSVRC2012_validation"):
        opened(f"imagenet1k={tmp_path}")


def test_numbered_folders_are_numbers_not_text(tmp_path):
    made = put(
        tmp_path,
        "imagenetv2-matched-frequency-format-val/10/a.jpeg",
        "imagenetv2-matched-frequency-format-val/9/b.jpeg",
    )
    published, split = shrunk("imagenet-v2", 2, 1000)
    source = registry.open_split(published, split, tmp_path)
    assert list(zip(source.labels, map(source.read, range(2)), strict=True)) == [
        (9, list(made.values())[1]),
        (10, next(iter(made.values()))),
    ]


def test_caltech_and_eurosat_folders(tmp_path):
    put(
        tmp_path,
        "101_ObjectCategories/BACKGROUND_Google/image_0001.jpg",
        "101_ObjectCategories/yin_yang/image_0001.jpg",
    )
    assert sorted(label for label, _ in opened(f"caltech101={tmp_path}")[0].values()) == [0, 101]
    put(tmp_path, "2750/SeaLake/SeaLake_1.jpg", "2750/AnnualCrop/AnnualCrop_1.jpg")
    assert sorted(label for label, _ in opened(f"eurosat={tmp_path}")[0].values()) == [0, 9]


def test_imagenet21k_numbers_its_folders_in_order(tmp_path):
    put(tmp_path, "n00004475/n00004475_6590.JPEG", "n15102894/n15102894_1.JPEG")
    found, names = opened(f"imagenet21k:train={tmp_path}")
    assert [label for label, _ in found.values()] == [0, 1]
    assert names == ["n00004475", "n15102894"]


# ----------------------------------------------------------------------------------------------------------------- coco


def write_coco(path: Path, images, annotations, categories=((7, "ant"), (3, "bee"))) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": number, "file_name": name, "width": 8, "height": 8} for number, name in images],
        "annotations": [{"id": n, "image_id": image, "category_id": one} for n, (image, one) in enumerate(annotations)],
        "categories": [{"id": number, "name": name, "supercategory": "Insecta"} for number, name in categories],
    }
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("year", ["2017", "2018", "2019"])
def test_inaturalist_json(tmp_path, year):
    folder = "train_val_images" if year == "2017" else f"train_val{year}"
    made = put(tmp_path, f"{folder}/Insecta/3/aa.jpg", f"{folder}/Insecta/7/bb.jpg")
    names = list(made)
    write_coco(tmp_path / f"val{year}.json", [(12, names[1]), (5, names[0])], [(5, 3), (12, 7)])
    found, classes = opened(f"inat{year}={tmp_path}")
    assert found == {names[1]: (1, made[names[1]]), names[0]: (0, made[names[0]])}
    assert classes == ["bee", "ant"]  # by their ids, 3 and 7


def test_inaturalist_2021_mini_trains_on_its_own_json(tmp_path):
    made = put(tmp_path, "train_mini/00001_A/x.jpg", "val/00001_A/y.jpg")
    write_coco(tmp_path / "train_mini.json", [(1, "train_mini/00001_A/x.jpg")], [(1, 3)])
    write_coco(tmp_path / "val.json", [(1, "val/00001_A/y.jpg")], [(1, 3)])
    reference = Path(f"inat2021-mini={tmp_path}")
    data = open_data([reference], [reference])
    assert data.train is not None
    assert [data.test.read(0), data.train.read(0)] == [made["val/00001_A/y.jpg"], made["train_mini/00001_A/x.jpg"]]
    assert data.facts["published"] == {
        "train": {"name": "inat2021-mini", "split": "train", "whole": False},
        "data": {"name": "inat2021-mini", "split": "val", "whole": False},
    }


def test_coco_takes_one_category_or_the_most_frequent(tmp_path):
    made = put(tmp_path, "val2017/1.jpg", "val2017/2.jpg", "val2017/3.jpg", "val2017/4.jpg")
    images = [(number, f"{number}.jpg") for number in (1, 2, 3, 4)]
    write_coco(tmp_path / "annotations" / "i.json", images, [(1, 7), (1, 7), (2, 3), (2, 7), (2, 3), (3, 3), (3, 7)])
    with pytest.raises(DataError, match=r"2\.jpg has 2 categories, .* coco_most_frequent"):
        opened(f"coco:annotations/i.json={tmp_path}")
    data = open_data([Path(f"coco_most_frequent:annotations/i.json={tmp_path}")])
    assert dict(zip(data.test.keys, data.test.labels.tolist(), strict=True)) == {"1.jpg": 1, "2.jpg": 0}
    assert data.test.read(1) == made["val2017/2.jpg"]
    assert data.test.left_out == {"several_categories": 1, "no_category": 1}
    write_coco(tmp_path / "annotations" / "i.json", images[:2], [(1, 7), (1, 7), (2, 3)])
    assert [label for label, _ in opened(f"coco:annotations/i.json={tmp_path}")[0].values()] == [1, 0]


def one_image(number: bytes = b"1", name: bytes = b'"a"', category: bytes = b"1") -> bytes:
    image = b'{"images": [{"id": %b, "file_name": %b}], "categories": [{"id": 1}], ' % (number, name)
    return image + b'"annotations": [{"image_id": 1, "category_id": %b}]}' % category


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "needs 'images'"),
        (b'{"images": [1], "categories": [2]}', "needs 'images'"),
        (b'{"images": [{"id": 1, "file_name": "a"}], "categories": [{"id": 1}]}', "has no annotations"),
        (one_image(category=b"2"), "the category 2, which is not listed"),
        (one_image(b"1e999"), "'id' is inf"),
        (one_image(name=b'["a"]'), "without 'file_name'"),
        (b'{"images": [{"id": ' + b"9" * 9000 + b'}], "categories": []}', "is not JSON"),
        (one_image(name=b'"../../etc/passwd"'), "it must be relative and below"),
        (one_image(name=b'"/etc/passwd"'), "it must be relative and below"),
        (one_image(name=b'"a\\u0000b"'), "it must be relative and below"),
        (one_image(name=b'"\\ud800"'), "it must be relative and below"),
    ],
)
def test_hostile_json_is_refused(tmp_path, content, message):
    (tmp_path / "val2018.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(f"inat2018={tmp_path}")


# ---------------------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize("folder", ["data_large", "data_256", "data_256_standard"])
def test_places365_lists(tmp_path, folder):
    made = put(tmp_path, f"{folder}/z/zen_garden/00000002.jpg", f"{folder}/a/apartment_building/outdoor/00000001.jpg")
    made |= put(tmp_path, "val_256/Places365_val_00000001.jpg")
    text(tmp_path / "categories_places365.txt", "/a/apartment_building/outdoor 0", "/z/zen_garden 1")
    text(
        tmp_path / "places365_train_standard.txt",
        "/a/apartment_building/outdoor/00000001.jpg 0",
        "/z/zen_garden/00000002.jpg 1",
    )
    text(tmp_path / "places365_val.txt", "Places365_val_00000001.jpg 1")
    found, names = opened(f"places365:train={tmp_path}")
    assert found == {
        "a/apartment_building/outdoor/00000001.jpg": (0, made[f"{folder}/a/apartment_building/outdoor/00000001.jpg"]),
        "z/zen_garden/00000002.jpg": (1, made[f"{folder}/z/zen_garden/00000002.jpg"]),
    }
    assert names == ["apartment_building/outdoor", "zen_garden"]
    assert opened(f"places365={tmp_path}")[0] == {
        "Places365_val_00000001.jpg": (1, made["val_256/Places365_val_00000001.jpg"])
    }


def test_places365_archives_are_read_in_place(tmp_path):
    data = picture(0, 0)
    write_tar(tmp_path / "val_256.tar", [("val_256/Places365_val_00000001.jpg", data)])
    lists = [("categories_places365.txt", b"/a/airfield 0\n"), ("places365_val.txt", b"Places365_val_00000001.jpg 0\n")]
    write_tar(tmp_path / "filelist_places365-standard.tar", lists)
    assert opened(f"places365={tmp_path}")[0] == {"Places365_val_00000001.jpg": (0, data)}


def test_places205_lists(tmp_path):
    base = "data/vision/torralba/deeplearning/images256"
    made = put(tmp_path, f"{base}/a/abbey/gsun_1.jpg", f"{base}/c/cathedral/outdoor/gsun_2.jpg")
    text(
        tmp_path / "trainvalsplit_places205" / "val_places205.csv",
        "c/cathedral/outdoor/gsun_2.jpg 1",
        "a/abbey/gsun_1.jpg 0",
    )
    found, names = opened(f"places205={tmp_path}")
    assert [(key, label) for key, (label, _) in found.items()] == [
        ("c/cathedral/outdoor/gsun_2.jpg", 1),
        ("a/abbey/gsun_1.jpg", 0),
    ]
    assert {data for _, data in found.values()} == set(made.values())
    assert names == ["abbey", "cathedral/outdoor"]


def test_food101_and_dtd_lists(tmp_path):
    put(tmp_path / "f", "food-101/images/waffles/1.jpg", "food-101/images/apple_pie/1005649.jpg")
    text(tmp_path / "f" / "food-101/meta/test.txt", "apple_pie/1005649", "waffles/1")
    assert [label for label, _ in opened(f"food101={tmp_path / 'f'}")[0].values()] == [0, 100]
    put(tmp_path / "d", "dtd/images/banded/banded_0002.jpg", "dtd/images/zigzagged/zigzagged_0001.jpg")
    text(tmp_path / "d" / "dtd/labels/train1.txt", "zigzagged/zigzagged_0001.jpg")
    text(tmp_path / "d" / "dtd/labels/val1.txt", "banded/banded_0002.jpg")
    data = open_data([Path(f"dtd:trainval={tmp_path / 'd'}")])
    assert dict(zip(data.test.keys, data.test.labels, strict=True)) == {
        "zigzagged/zigzagged_0001.jpg": 46,
        "banded/banded_0002.jpg": 0,
    }


def test_aircraft_names_may_hold_spaces(tmp_path):
    made = put(tmp_path, "fgvc-aircraft-2013b/data/images/1025794.jpg", "fgvc-aircraft-2013b/data/images/0034309.jpg")
    base = tmp_path / "fgvc-aircraft-2013b" / "data"
    names = read_classes("fgvc_aircraft").names
    text(base / "variants.txt", *(name[0] for name in names))
    spaced = next(number for number, name in enumerate(names) if " " in name[0])
    text(base / "images_variant_test.txt", "1025794 707-320", f"0034309 {names[spaced][0]}")
    assert opened(f"fgvc_aircraft={tmp_path}")[0] == {
        "1025794.jpg": (0, next(iter(made.values()))), "0034309.jpg": (spaced, list(made.values())[1])
    }  # fmt: skip


def test_pets_count_from_one(tmp_path):
    put(tmp_path, "images/Abyssinian_201.jpg", "images/yorkshire_terrier_9.jpg")
    text(
        tmp_path / "annotations" / "test.txt",
        "#Image CLASS-ID SPECIES BREED ID",
        "Abyssinian_201 1 1 1",
        "yorkshire_terrier_9 37 2 25",
    )
    found, names = opened(f"oxford_pets={tmp_path}")
    assert {key: names[label] for key, (label, _) in found.items()} == {
        "Abyssinian_201.jpg": "Abyssinian", "yorkshire_terrier_9.jpg": "yorkshire terrier"
    }  # fmt: skip


def test_sun397_lists(tmp_path):
    put(
        tmp_path,
        "SUN397/a/abbey/sun_aaalbzqrimafwbiv.jpg",
        "SUN397/t/theater/indoor_seats/sun_x.jpg",
        "SUN397/y/youth_hostel/sun_y.jpg",
    )
    text(
        tmp_path / "Partitions" / "Testing_01.txt",
        "/a/abbey/sun_aaalbzqrimafwbiv.jpg",
        "/y/youth_hostel/sun_y.jpg",
        "/t/theater/indoor_seats/sun_x.jpg",
    )
    found, names = opened(f"sun397={tmp_path}")
    assert [names[label] for label, _ in found.values()] == ["abbey", "youth hostel", "theater indoor seats"]


@pytest.mark.parametrize("name", ["cub200", "nabirds"])
def test_birds_join_their_lists(tmp_path, name):
    folder = tmp_path / ("CUB_200_2011" if name == "cub200" else "nabirds")
    made = put(
        folder,
        "images/001.Black_footed_Albatross/A.jpg",
        "images/200.Common_Yellowthroat/B.jpg",
        "images/001.Black_footed_Albatross/C.jpg",
    )
    text(folder / "images.txt", *(f"{number} {path.removeprefix('images/')}" for number, path in enumerate(made, 11)))
    text(folder / "image_class_labels.txt", "11 1", "12 200", "13 1")
    text(folder / "train_test_split.txt", "11 0", "12 0", "13 1")
    text(folder / "classes.txt", "0 Birds", "1 001.Black_footed_Albatross", "200 200.Common_Yellowthroat")  # groups too
    found, names = opened(f"{name}={tmp_path}")
    assert found == {
        "001.Black_footed_Albatross/A.jpg": (0, next(iter(made.values()))),
        "200.Common_Yellowthroat/B.jpg": (1, list(made.values())[1]),
    }
    assert names == ["Black footed Albatross", "Common Yellowthroat"]
    assert list(opened(f"{name}:train={folder}")[0]) == ["001.Black_footed_Albatross/C.jpg"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["apple_pie/../../../../etc/passwd"], "it must be relative and below"),
        (["/etc/passwd"], "it must be relative and below"),
        (["1005649"], "expected CLASS/PICTURE"),
        (["apple_pie/" + "x" * 5000], "more than 4,096 characters"),
        ([], "is empty"),
        (["no_such_dish/1"], "has a class 'no_such_dish'|holds no picture"),
        (["apple_pie/\0"], "it must be relative and below"),
    ],
)
def test_hostile_lists_are_refused(tmp_path, lines, message):
    put(tmp_path, "images/apple_pie/1.jpg")
    text(tmp_path / "meta" / "test.txt", *lines)
    with pytest.raises(DataError, match=message):
        opened(f"food101={tmp_path}")


@pytest.mark.parametrize("label", ["9" * 400, "365", "-1", "x", "1.5", ""])
def test_a_label_that_is_no_class_is_refused(tmp_path, label):
    put(tmp_path, "val_256/Places365_val_00000001.jpg")
    text(tmp_path / "categories_places365.txt", "/a/airfield 0")
    text(tmp_path / "places365_val.txt", f"Places365_val_00000001.jpg {label}")
    with pytest.raises(DataError, match=r"line 1 of"):
        opened(f"places365={tmp_path}")


def test_a_list_that_is_too_large_is_not_read(tmp_path):
    put(tmp_path, "images/apple_pie/1.jpg")
    (tmp_path / "meta").mkdir()
    with (tmp_path / "meta" / "test.txt").open("wb") as file:
        file.truncate(MAX_LIST + 1)
    with pytest.raises(DataError, match=r"a list has at most"):
        opened(f"food101={tmp_path}")


# ----------------------------------------------------------------------------------------------------------- mat, cifar


def flowers(folder: Path) -> dict[str, bytes]:
    savemat(folder / "imagelabels.mat", labels=np.array([[77, 1, 102, 1]], dtype=np.uint8))
    savemat(folder / "setid.mat", trnid=np.array([[3]]), valid=np.array([[1]]), tstid=np.array([[4, 2]]))
    return put(folder, *(f"jpg/image_0000{number}.jpg" for number in (1, 2, 3, 4)))


def test_flowers_mat(tmp_path):
    made = flowers(tmp_path)
    assert opened(f"flowers102={tmp_path}")[0] == {
        "image_00004.jpg": (0, made["jpg/image_00004.jpg"]), "image_00002.jpg": (0, made["jpg/image_00002.jpg"])
    }  # fmt: skip
    assert [label for label, _ in opened(f"flowers102:trainval={tmp_path}")[0].values()] == [101, 76]


def test_cars_mat(tmp_path):
    made = put(tmp_path, "cars_train/00001.jpg", "cars_test/00001.jpg")
    kind = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    savemat(tmp_path / "devkit" / "cars_train_annos.mat", annotations=np.array([[(39, 196, "00001.jpg")]], dtype=kind))
    savemat(tmp_path / "cars_test_annos_withlabels.mat", annotations=np.array([[(39, 1, "00001.jpg")]], dtype=kind))
    data = open_data([Path(f"stanford_cars:train={tmp_path}")])
    assert (int(data.test.labels[0]), data.test.read(0)) == (195, made["cars_train/00001.jpg"])
    assert opened(f"stanford_cars={tmp_path}")[0] == {"cars_test/00001.jpg": (0, made["cars_test/00001.jpg"])}
    savemat(
        tmp_path / "cars_test_annos_withlabels.mat",
        annotations=np.array([[(39, "00001.jpg")]], dtype=[kind[0], kind[2]]),
    )
    with pytest.raises(DataError, match=r"no 'fname' and 'class'; cars_test_annos.mat has no classes"):
        opened(f"stanford_cars={tmp_path}")


def test_dogs_mat(tmp_path):
    files = ["n02085620-Chihuahua/n02085620_2650.jpg", "n02116738-African_hunting_dog/n02116738_1.jpg"]
    made = put(tmp_path / "Images", *files)
    listed = np.array([[file] for file in files], dtype=object)
    savemat(
        tmp_path / "test_list.mat",
        file_list=listed,
        annotation_list=listed,
        labels=np.array([[1], [2]], dtype=np.uint8),
    )
    found, names = opened(f"stanford_dogs={tmp_path}")
    assert found == {files[0]: (0, made[files[0]]), files[1]: (1, made[files[1]])}
    assert names == ["Chihuahua", "African hunting dog"]


def test_a_broken_mat_file_is_refused(tmp_path):
    flowers(tmp_path)
    whole = (tmp_path / "imagelabels.mat").read_bytes()
    for damaged in (
        whole[:150],
        b"",
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        whole[:128] + os.urandom(400),
        b"MATLAB 7.3 MAT-file" + bytes(600),
    ):
        (tmp_path / "imagelabels.mat").write_bytes(damaged)
        with pytest.raises(DataError, match=r"imagelabels.mat"):
            opened(f"flowers102={tmp_path}")
    savemat(tmp_path / "imagelabels.mat", labels=np.array([[0.5, 1, 1, 1]]))
    with pytest.raises(DataError, match=r"must hold whole numbers from 1"):
        opened(f"flowers102={tmp_path}")
    savemat(tmp_path / "imagelabels.mat", labels=np.array([[103, 1, 1, 103]]))
    with pytest.raises(DataError, match=r"has class 103; flowers102 has 102"):
        opened(f"flowers102={tmp_path}")
    savemat(tmp_path / "imagelabels.mat", labels=np.array([[1]]))
    with pytest.raises(DataError, match=r"names picture 4, and .* has labels of 1"):
        opened(f"flowers102={tmp_path}")


@pytest.mark.parametrize(("name", "before", "classes"), [("cifar10", 1, 10), ("cifar100", 2, 100)])
def test_cifar_binary(tmp_path, name, before, classes):
    """The pixels of the file are those of the picture, plane by plane: red, green, blue."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    labels = [classes - 1, 0, 3]
    rows = [
        bytes([9] * (before - 1) + [label]) + planes.tobytes() for label, planes in zip(labels, pixels, strict=True)
    ]
    folder = tmp_path / ("cifar-10-batches-bin" if classes == 10 else "cifar-100-binary")
    file = "test_batch.bin" if classes == 10 else "test.bin"
    folder.mkdir()
    (folder / file).write_bytes(b"".join(rows))
    own = read_classes(name)
    text(
        folder / ("batches.meta.txt" if classes == 10 else "fine_label_names.txt"),
        *(own.name(n) for n in range(classes)),
    )
    found, _ = opened(f"{name}={tmp_path}")
    assert list(found) == [f"{file}/{row}" for row in range(3)]
    for (label, data), wanted, planes in zip(found.values(), labels, pixels, strict=True):
        assert label == wanted
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.moveaxis(planes, 0, -1))
    (folder / file).write_bytes(b"".join(rows)[:-1])
    with pytest.raises(DataError, match=r"it is cut off"):
        opened(f"{name}={tmp_path}")


def test_pickled_cifar_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/x'\ntR.")
    with pytest.raises(DataError, match=r"pickled: .* Get the binary version, cifar-10-binary\.tar\.gz, from https"):
        opened(f"cifar10={tmp_path}")
