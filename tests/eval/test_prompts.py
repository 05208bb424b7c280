"""The bundled class sets against the lists of other libraries, and against what their README says of them."""

import hashlib
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import MNIST, Flowers102
from torchvision.models._meta import _VOC_CATEGORIES

from data_pipeline.wordnet import open_wordnet
from eval import class_files, templates
from eval.class_files import PROMPTS, ClassFile, read_class_file
from eval.classes import read_classes

README = (PROMPTS / "README.md").read_text()
SETS = sorted(class_files.bundled())
LEFT_OUT = {"missile", "sunglasses"}  # names that two classes of ImageNet have


def module_file(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported: open_clip alone takes seconds."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / path


@pytest.fixture(scope="module")
def open_clip():
    path = module_file("open_clip", "zero_shot_metadata.py")
    spec = importlib.util.spec_from_file_location("zero_shot_metadata", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def column(key: str, value: str) -> dict[str, Any]:
    """Of the bundled WordNet."""
    table = open_wordnet().synsets
    return dict(zip(table[key].to_pylist(), table[value].to_pylist(), strict=True))


@cache
def read_set(name: str) -> ClassFile:
    return read_class_file(class_files.find(name))


def wnids() -> list[str]:
    return module_file("timm", "data/_info/imagenet_synsets.txt").read_text().split()


def first_names(name: str) -> list[str]:
    classes = read_classes(name)
    return [classes.name(label) for label in range(len(classes))]


# ---------------------------------------------------------------------------------------------------------- other lists


def test_imagenet_has_open_clips_names_and_templates(open_clip):
    classes = read_classes("imagenet1k")
    assert classes.names == tuple((name,) for name in open_clip.IMAGENET_CLASSNAMES)
    assert list(classes.templates) == [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    seven = [template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    assert list(templates.read_templates("imagenet7").texts) == seven
    assert (len(classes), len(classes.templates), len(seven)) == (1000, 80, 7)


@pytest.mark.parametrize("name", [name for name in SETS if name.startswith("imagenet1k")])
def test_imagenet_is_in_the_order_of_sorted_folders_with_the_synset_of_each(name):
    of_synset = column("synset", "wnid")
    entries = read_set(name).entries
    assert [entry.wnid for entry in entries] == wnids() == sorted(wnids())
    assert [of_synset[str(entry.synset)] for entry in entries] == wnids()


def test_the_wordnet_that_names_imagenets_synsets_says_the_same_of_them_as_timm():
    lemmas = column("synset", "lemmas")
    lines = module_file("timm", "data/_info/imagenet_synset_to_lemma.txt").read_text().splitlines()
    theirs = {wnid: words.split(", ") for wnid, words in (line.split("\t") for line in lines)}
    for entry in read_set("imagenet1k").entries:
        ours = [lemma.replace("_", " ") for lemma in lemmas[str(entry.synset)]]
        assert ours == theirs[str(entry.wnid)]


def test_flowers_are_torchvisions_but_for_three():
    pairs = zip(first_names("flowers102"), Flowers102.classes, strict=True)
    assert [pair for pair in pairs if pair[0] != pair[1]] == [
        ("globe flower", "globe-flower"),
        ("pink and yellow dahlia", "pink-yellow dahlia?"),
        ("air plant", "ball moss"),
    ]


def test_digits_are_torchvisions():
    assert [f"{digit} - {word}" for digit, word in zip(first_names("mnist"), first_names("svhn"), strict=True)] == (
        MNIST.classes
    )


def test_voc_is_in_torchvisions_order():
    assert first_names("voc2007") == _VOC_CATEGORIES[1:]  # the first is the background


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("cifar10", "airplane automobile bird cat deer dog frog horse ship truck"),
        ("stl10", "airplane bird car cat deer dog horse monkey ship truck"),
        ("fer2013", "angry disgusted fearful happy sad surprised neutral"),
        ("clevr_counts", "3 4 5 6 7 8 9 10"),
        ("sst2", "negative positive"),
    ],
)
def test_the_numbers_of_small_sets(name, known):
    assert first_names(name) == known.split()


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("cifar100", {0: "apple", 1: "aquarium_fish", 47: "maple_tree", 99: "worm"}),
        ("food101", {0: "apple_pie", 16: "cheese_plate", 17: "cheesecake", 100: "waffles"}),
        ("oxford_pets", {0: "Abyssinian", 1: "american_bulldog", 4: "beagle", 5: "Bengal", 36: "yorkshire_terrier"}),
        ("eurosat", {0: "AnnualCrop", 2: "HerbaceousVegetation", 6: "PermanentCrop", 9: "SeaLake"}),
        ("caltech101", {0: "BACKGROUND_Google", 1: "Faces", 5: "accordion", 6: "airplanes", 101: "yin_yang"}),
        ("country211", {0: "AD", 1: "AE", 65: "GB", 210: "ZW"}),
        ("gtsrb", {0: "00000", 14: "00014"}),
        ("ucf101", {0: "ApplyEyeMakeup", 100: "YoYo"}),
        ("fgvc_aircraft", {0: "707-320", 72: "F-16A_B", 99: "Yak-42"}),
        ("stanford_cars", {0: "AM General Hummer SUV 2000", 195: "smart fortwo Convertible 2012"}),
        ("sun397", {0: "abbey", 8: "apartment_building/outdoor", 396: "youth_hostel"}),
        ("dtd", {0: "banded", 30: "polka-dotted", 46: "zigzagged"}),
        ("imagenet1k", {0: "n01440764", 134: "n02012849", 517: "n03126707", 639: "n03710721", 999: "n15075141"}),
    ],
)
def test_folders_of_the_data_sets_are_their_labels(name, folders):
    assert read_classes(name).resolve(folders.values(), "here") == list(folders)


@pytest.mark.parametrize("name", ["birdsnap", "caltech101", "country211", "dtd", "eurosat", "food101", "resisc45"])
def test_sorted_folders_are_sorted(name):
    entries = read_set(name).entries
    folders = [entry.folders[0] if entry.folders else entry.names[0].replace(" ", "_") for entry in entries]
    assert folders == sorted(folders)


# What the small sets mean, chosen by hand: a class and its synset share a word but for these.
OTHER_WORDS = {"aquarium fish", "possum", "motorbike", "pottedplant", "tvmonitor", "maple tree", "keyboard"}


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "voc2007"])
def test_synsets_chosen_by_hand_bear_the_name_of_their_class(name):
    lemmas = column("synset", "lemmas")
    for entry in read_set(name).entries:
        words = {lemma.replace("_", "").lower() for lemma in lemmas[str(entry.synset)]}
        assert entry.names[0].replace(" ", "") in words or entry.names[0] in OTHER_WORDS


# --------------------------------------------------------------------------------------------------------------- files


def rows(mark: str) -> dict[str, list[str]]:
    """The cells of a table of the README by its first column."""
    found = re.search(rf"<!-- {mark} -->\n(.*?)\n<!-- end of", README, re.S)
    assert found
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()[2:]]
    return {first: rest for first, *rest in cells}


def test_the_readme_lists_every_file_with_its_counts_and_hash():
    sets, texts = rows("class sets"), rows("templates")
    assert {*sets, *texts, "README.md", "LICENCE-MIT"} == {file.name for file in PROMPTS.iterdir()}
    for name, (_, classes, number, language, digest) in sets.items():
        file = read_class_file(PROMPTS / name)
        assert (len(file.entries), len(file.templates), file.language) == (int(classes), int(number), language)
        assert hashlib.sha256((PROMPTS / name).read_bytes()).hexdigest() == file.sha256 == digest
    for name, (number, digest) in texts.items():
        found = templates.read_templates(name.removesuffix(".txt"))
        assert (len(found.texts), found.sha256) == (int(number), digest)


@pytest.mark.parametrize("name", SETS)
def test_a_set_says_where_it_is_from_and_its_templates_have_one_place_for_the_name(name):
    file = read_set(name)
    assert file.about is not None and file.about["name"] == name.partition(".")[0]
    assert file.about["title"] and file.about["order"] and file.about["sources"]
    for source in file.about["sources"]:
        assert set(source) == {"file", "version", "sha256", "licence"} and source["licence"] in ("MIT", "Apache-2.0")
        assert len(source["sha256"]) == 64
    assert all(template.count("{}") == 1 for template in file.templates) and file.templates


@pytest.mark.parametrize("name", SETS)
def test_names_that_two_classes_share_are_told_and_in_english_there_are_two(name):
    file = read_set(name)
    names = [each for entry in file.entries for each in entry.names]
    shared = {each for each in names if names.count(each) > 1}
    assert file.about is not None and shared == set(file.about.get("shared_names", ()))
    if file.language == "en":
        assert shared == (LEFT_OUT if name == "imagenet1k" else set())
        assert len(set(file.templates)) == len(file.templates)


def test_the_cranes_and_maillots_are_told_apart():
    names = first_names("imagenet1k")
    assert names[134] != names[517] and names[638] != names[639]


def test_food_has_its_one_template():
    assert read_classes("food101").templates == ("a photo of {}, a type of food.",)
