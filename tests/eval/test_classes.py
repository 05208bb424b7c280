"""Classes by name and from files of one's own, and their names in other languages."""

import json
import logging

import pytest

from data_pipeline import languages as wordnets
from data_pipeline.errors import DataError, UsageError
from eval.classes import read_classes
from eval.templates import read_templates, templates_for

ANIMALS = """\
# a comment
dog; hound
cat

fire ant ; ant
"""


@pytest.mark.parametrize("name", ["food101", "Food-101", "food_101", "FOOD 101"])
def test_bundled_sets_are_found_whatever_their_separators_and_capitals(name):
    assert read_classes(name).source == "food101"


def test_a_misspelt_set_is_told_with_the_nearest():
    with pytest.raises(UsageError, match=r"--classes imagenet1: neither a bundled .* did you mean imagenet1k\?"):
        read_classes("imagenet1")


def test_lines_have_a_class_each_with_its_names(tmp_path):
    (tmp_path / "animals.txt").write_text(ANIMALS)
    classes = read_classes(tmp_path / "animals.txt")
    assert classes.names == (("dog", "hound"), ("cat",), ("fire ant", "ant"))
    assert classes.synsets == (None,) * 3 and classes.templates == () and classes.language == "en"


@pytest.mark.parametrize(
    "text",
    [
        "label,names,synset,folder\n1,cat,cat.n.01,\n0,dog; hound,dog.n.01,d1;d2\n",
        "\ufefflabel,names,synset,folder\n1,cat,cat.n.01,\n0,dog;hound,dog.n.01,d1;d2\n",
        "names,synset,folder\ndog;hound,dog.n.01,d1;d2\ncat,cat.n.01,\n",
    ],
)
def test_a_spreadsheet_gives_the_same_as_json(tmp_path, text):
    (tmp_path / "c.csv").write_text(text)
    dog = {"label": 0, "names": ["dog", "hound"], "synset": "dog.n.01", "folder": ["d1", "d2"]}
    (tmp_path / "c.json").write_text(json.dumps([{"label": 1, "name": "cat", "synset": "cat.n.01"}, dog]))
    table, listed = read_classes(tmp_path / "c.csv"), read_classes(tmp_path / "c.json")
    assert table.names == listed.names == (("dog", "hound"), ("cat",))
    assert table.synsets == listed.synsets == ("dog.n.01", "cat.n.01")
    assert table.folders == listed.folders == (("d1", "d2"), ())
    assert table.resolve(["d2", "cat", "hound", 1], "here") == [0, 1, 0, 1]


def test_an_id_of_wordnet_is_a_synset_where_no_name_of_one_is_given(tmp_path):
    (tmp_path / "c.csv").write_text("name,wnid,synset\ndog,n02084071,\ncat,n02121620,cat.n.01\n")
    classes = read_classes(tmp_path / "c.csv")
    assert classes.synsets == ("n02084071", "cat.n.01") and classes.resolve(["n02084071", "n02121620"], "") == [0, 1]


def test_a_file_may_bring_templates_and_a_language(tmp_path):
    content = {"language": "fr", "templates": ["une photo de {}."], "classes": [{"label": 0, "name": "chien"}]}
    (tmp_path / "c.json").write_text(json.dumps(content))
    classes = read_classes(tmp_path / "c.json")
    assert classes.language == "fr" and templates_for(classes).texts == ("une photo de {}.",)
    assert read_templates(str(tmp_path / "c.json")).texts == ("une photo de {}.",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "a,b\n1,2\n", r"has no column 'name' or 'names', only a, b"),
        ("c.csv", 'name\n"dog\n', r"is not a CSV file"),
        ("c.csv", "label,name\n0,dog\nx,cat\n", r"the labels of its 2 classes must be 0\.\.1, each once"),
        ("c.csv", "label,name\n0,\n", r"entry 0 of .* needs a 'name'"),
        ("c.txt", "# nothing\n", r"must be a list of .*, and not empty"),
        ("c.txt", "dog\n;\n", r"entry 1 of .* needs a 'name'"),
        ("c.json", '{"templates": []}', r"must be a list of {label, name, synset}"),
        ("c.json", '{"classes": [{"label": 0, "name": "a"}], "templates": [1]}', r"'templates' must be a list of text"),
        ("c.json", '[{"label": 0, "name": "a", "wnid": 3}]', r"entry 0 of .*: 'synset', 'wnid' and 'folder' must be"),
        ("c.json", "[", r"is not JSON"),
        ("c.json", '[{"label": 0, "name": "a \\ud83d"}]', r"entry 0 of .* needs a 'name'"),
        ("c.txt", None, r"cannot read classes from .*No such file"),
    ],
)
def test_refused_class_files(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_classes(tmp_path / name)


def test_a_class_is_known_by_name_then_folder_then_synset_then_number_then_loosely(tmp_path):
    content = [
        {"label": 0, "name": "annual crop", "folder": "1"},
        {"label": 1, "name": "crane", "wnid": "n02012849", "synset": "crane.n.05"},
        {"label": 2, "name": "crane", "synset": "crane.n.04"},
    ]
    (tmp_path / "c.json").write_text(json.dumps(content))
    classes = read_classes(tmp_path / "c.json")
    asked = ["annual crop", "1", "n02012849", "crane.n.04", "2", "AnnualCrop", "annual_crop"]
    assert classes.resolve(asked, "here") == [0, 0, 1, 2, 2, 0, 0]
    for stranger in ("crane", "Crane", "annual crops"):  # two classes have the first, loosely too
        with pytest.raises(DataError, match=f"here has a class '{stranger}' that"):
            classes.resolve([stranger], "here")


# ----------------------------------------------------------------------------------------------------------- languages


@pytest.mark.parametrize(("language", "word", "number"), [("it", "foto", 49), ("ja", "写真", 37), ("zh", "照片", 80)])
def test_imagenet_in_another_language_keeps_its_folders_and_synsets(language, word, number):
    english, other = read_classes("imagenet1k"), read_classes("imagenet1k", language)
    assert other.language == language and other.synsets == english.synsets
    assert other.names != english.names and other.sha256 != english.sha256
    assert len(other.templates) == number and any(word in text for text in other.templates)
    assert other.resolve(["n01440764", "tench", other.name(5)], "here") == [0, 0, 5]
    assert templates_for(other, "imagenet1k").texts == other.templates


def test_a_language_may_be_written_with_three_letters_and_english_is_itself():
    assert read_classes("imagenet1k", "ita") == read_classes("imagenet1k", "it")
    assert read_classes("cifar10", "eng") == read_classes("cifar10", "en") == read_classes("cifar10")


FRENCH = """\
# name\tfra\thttp://example.org\tlicence
02084071-n\tfra:lemma\tchien
02084071-n\tfra:lemma\tchien_domestique
02084071-n\tfra:lemma\tchien
02121620-n\tfra:lemma\tchat
02084071-n\tfra:def\tanimal
02084071-v\tfra:lemma\tsuivre
"""


@pytest.fixture
def french(monkeypatch):
    """nltk's French WordNet, of two nouns."""
    monkeypatch.setattr(wordnets, "_data", lambda language: {"fra": FRENCH.encode()}[language])


def test_synsets_give_names_in_languages_of_nltks_wordnet(french, caplog):
    with caplog.at_level(logging.WARNING):
        classes = read_classes("cifar10", "fr")
    assert classes.names[3] == ("chat",) and classes.names[5] == ("chien", "chien domestique")
    assert classes.names[0] == ("airplane",) and "8 of the 10 classes of cifar10 have no noun" in caplog.text
    assert classes.language == "fr" and classes.sha256 != read_classes("cifar10").sha256
    assert classes.resolve(["dog", "chien", 5], "here") == [5, 5, 5]
    assert "une photo de {}." in templates_for(classes).texts  # ours: CIFAR-10's own are English
    assert templates_for(classes, "drawings").texts == read_templates("drawings").texts


def test_classes_without_synsets_cannot_be_translated(french):
    with pytest.raises(UsageError, match=r"--language fr: the classes of food101 have no synsets .* is there in: en"):
        read_classes("food101", "fr")


def test_without_nltks_wordnet_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(wordnets, "_corpus", lambda: (_ for _ in ()).throw(DataError("--languages: it is not there")))
    wordnets._data.cache_clear()
    with pytest.raises(DataError, match=r"^--language: it is not there; imagenet1k is there in: en, ar, it, ja, zh$"):
        read_classes("imagenet1k", "fr")


def test_a_file_of_ones_own_is_translated_by_the_file_beside_it(tmp_path):
    (tmp_path / "mine.txt").write_text("dog\ncat\n")
    (tmp_path / "mine.sw.txt").write_text("mbwa\npaka\n")
    classes = read_classes(tmp_path / "mine.txt", "sw")
    assert classes.names == (("mbwa",), ("paka",)) and classes.language == "sw"
    with pytest.raises(UsageError, match=r"--language \.\./sw: the classes of .*mine.txt have no synsets"):
        read_classes(tmp_path / "mine.txt", "../sw")
    assert templates_for(classes).texts == ("{}",)  # nothing is known of Swahili but the name itself
    (tmp_path / "mine.sw.txt").write_text("mbwa\n")
    with pytest.raises(DataError, match=r"mine.sw.txt has 1 classes and .*mine.txt 2; both must agree"):
        read_classes(tmp_path / "mine.txt", "sw")
