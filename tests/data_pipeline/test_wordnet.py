import hashlib
import itertools
import logging
import re
import zipfile

import pyarrow.compute as pc
import pytest
from nltk_wordnet import nltk_reader

from data_pipeline import wordnet
from data_pipeline.wordnet import WordNet, squash


def name(nouns: WordNet, tag: str) -> str | None:
    senses = nouns.senses(tag)
    return nouns.synset(senses[0]).name if senses else None


def test_all_nouns_of_wordnet_3_are_there_with_the_ids_of_imagenet(nouns):
    assert len(nouns) == 82_115
    dog = nouns.synset(nouns.senses("dog")[0])
    assert (dog.name, dog.wnid) == ("dog.n.01", "n02084071")
    assert dog.lemmas == ["dog", "domestic_dog", "Canis_familiaris"]


def test_the_bundled_nouns_are_princetons_with_glosses():
    """And with the glosses blanked they are the dictionary of the first release, so no id, offset or pointer moved."""
    with zipfile.ZipFile(wordnet.ARCHIVE) as archive:
        data = archive.read("wordnet/data.noun")
    assert hashlib.sha256(data).hexdigest() == "489f145e0f68877c0be5bd0eb4117adaaac52f38f6204eb8d85dbe2158b614cc"
    blank = re.sub(rb"(?m)^(\d{8} .*? \| )(.*)$", lambda line: line[1] + b" " * len(line[2]), data)
    assert hashlib.sha256(blank).hexdigest() == "a8d6726eddec910e040cbab04a297f3187e248a334bc4177a5108fb33d7c980a"


def test_the_archive_carries_no_time_of_its_making():
    with zipfile.ZipFile(wordnet.ARCHIVE) as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.namelist() == sorted(archive.namelist())


def test_a_synset_has_a_gloss_examples_and_the_file_of_its_kind(nouns):
    row = nouns.senses("dog")[0]
    assert nouns.synset(row).gloss.startswith("a member of the genus Canis (probably descended from the common wolf)")
    assert nouns.synset(row).lexname == "noun.animal"
    assert nouns.synsets["examples"][row].as_py() == ["the dog barked all night"]
    assert all(nouns.synsets["gloss"].to_pylist())
    assert len(set(nouns.synsets["lexname"].to_pylist())) == 26


def test_every_noun_is_found_under_its_squashed_key_with_all_its_senses(nouns):
    """Read from index.noun once more, without any of our code."""
    rows = {int(wnid[1:]): row for row, wnid in enumerate(nouns.synsets["wnid"].to_pylist())}
    with zipfile.ZipFile(wordnet.ARCHIVE) as archive:
        lines = archive.read("wordnet/index.noun").decode().splitlines()
    spellings: dict[str, list[list[int]]] = {}
    for lemma, _, number, *rest in (line.split() for line in lines if not line.startswith(" ")):
        key = re.sub("[-_'./]", "", lemma)
        spellings.setdefault(key, []).append([rows[int(offset)] for offset in rest[-int(number) :]])
    lost = []
    for key, senses in spellings.items():
        found = nouns.senses(key)
        if sorted(found) != sorted({*itertools.chain(*senses)}) or (len(senses) == 1 and found != senses[0]):
            lost.append(key)
    assert lost == []


def test_the_uses_of_a_sense_are_those_of_princetons_tagged_texts(nouns):
    heart = nouns.lemmas.filter(pc.field("squashed") == "heart").to_pylist()[0]
    assert heart["uses"] == [42, 25, 9, 5, 2, 1, 0, 0, 0, 0]


def test_senses_come_in_the_order_of_wordnet(nouns):
    """As the line `crane n 5 4 @ ~ #m + 5 0 10914447 10914331 09295455 03126707 02012849` of index.noun has them."""
    wnids = [nouns.synset(sense).wnid for sense in nouns.senses("crane")]
    assert wnids == ["n10914447", "n10914331", "n09295455", "n03126707", "n02012849"]


@pytest.mark.parametrize(
    ("tag", "synset"),
    [
        ("goldenretriever", "golden_retriever.n.01"),
        ("golden_retriever", "golden_retriever.n.01"),
        ("brownbear", "brown_bear.n.01"),
        ("ursusarctos", "brown_bear.n.01"),
        ("tshirt", "jersey.n.03"),
        ("cats", "cat.n.01"),
        ("cherries", "cherry.n.01"),
        ("foxes", "fox.n.01"),
        ("churches", "church.n.01"),
        ("wolves", "wolf.n.01"),
        ("geese", "goose.n.01"),
        ("goldenretrievers", "golden_retriever.n.01"),
        ("polarbears", "ice_bear.n.01"),
        ("workmen", "workman.n.01"),
        ("computermice", "mouse.n.04"),
        ("glasses", "spectacles.n.01"),
        ("café", "cafe.n.01"),
        ("cafés", "cafe.n.01"),
        ("fiancées", "fiancee.n.01"),
        ("crème_brûlée", "creme_brulee.n.01"),
        ("für", None),
        ("montaña", None),
        ("goldendog", None),
        ("dogcat", None),
        ("ups", None),
        ("happy", None),
        ("", None),
    ],
)
def test_a_tag_is_a_whole_noun_or_its_plural_or_nothing(nouns, tag, synset):
    assert name(nouns, tag) == synset


def test_the_lemma_of_a_plural_is_its_singular(nouns):
    assert [nouns.lemma(tag) for tag in ("dogs", "Polar_Bears", "dog", "happy")] == ["dog", "polarbear", "dog", None]


def test_a_compound_is_never_split(nouns):
    senses = {nouns.synset(sense).name for sense in nouns.senses("hotdog")}
    assert senses == {"hotdog.n.01", "hotdog.n.02", "frank.n.02"}


def test_an_irregular_plural_must_be_the_last_word_of_the_compound(nouns):
    assert name(nouns, "dormice") == "dormouse.n.01"  # listed as a plural of its own
    assert name(nouns, "titmice") == "titmouse.n.01"
    assert name(nouns, "agape" + "mice") is None


def test_squashing_takes_all_separators_away():
    assert squash("Jack-o'-lantern Co._St. TCP/IP") == "jackolanterncosttcpip"


def test_hypernyms_lead_to_entity(nouns):
    row, path = nouns.senses("dog")[0], []
    while parents := nouns.synsets["hypernyms"][row].as_py():
        row = parents[0]
        path.append(nouns.synset(row).name)
    assert path[0] in ("canine.n.02", "domestic_animal.n.01")
    assert path[-1] == "entity.n.01"


def test_the_second_opening_reads_the_cache(nouns, monkeypatch):
    monkeypatch.setattr(wordnet, "build", lambda archive: pytest.fail("built again"))
    assert wordnet.open_wordnet().lemmas.equals(nouns.lemmas)


def test_a_damaged_cache_is_built_again(nouns, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(wordnet, "build", lambda archive: nouns)
    wordnet.open_wordnet()
    (table,) = tmp_path.rglob("lemmas.parquet")
    data = bytearray(table.read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(data)
    assert wordnet.open_wordnet().lemmas.equals(nouns.lemmas)
    assert table.read_bytes() != data


def test_without_a_writable_cache_the_tables_live_in_memory(nouns, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(wordnet, "build", lambda archive: nouns)
    with caplog.at_level(logging.WARNING):
        assert len(wordnet.open_wordnet()) == len(nouns)
    assert "cannot keep the WordNet tables" in caplog.text


@pytest.mark.slow
def test_nltk_reads_the_same(nouns, tmp_path):
    """Every noun and every lemma; nltk's own reading of a gloss differs where quotes are inside the definition."""
    with nltk_reader(tmp_path) as reader:
        rows = {synset.offset(): row for row, synset in enumerate(reader.all_synsets("n"))}
        same_gloss = 0
        for synset, ours in zip(reader.all_synsets("n"), nouns.synsets.to_pylist(), strict=True):
            parents = {rows[parent.offset()] for parent in synset.hypernyms() + synset.instance_hypernyms()}
            assert (synset.name(), f"n{synset.offset():08d}") == (ours["synset"], ours["wnid"])
            assert (synset.lemma_names(), synset.lexname()) == (ours["lemmas"], ours["lexname"])
            assert parents == set(ours["hypernyms"])
            same_gloss += (synset.definition(), synset.examples()) == (ours["gloss"], ours["examples"])
        assert same_gloss > 0.998 * len(nouns)
        for entry in nouns.lemmas.to_pylist():
            first = entry["lemmas"][0]
            found = [rows[s.offset()] for s in reader.synsets(first, "n") if first in map(str.lower, s.lemma_names())]
            found = list(dict.fromkeys(found))
            assert entry["synsets"][: len(found)] == found
        for tag in ("bat", "heart", "dog"):
            uses = [next(m.count() for m in s.lemmas() if m.name() == tag) for s in reader.synsets(tag, "n")]
            assert nouns.lemmas.filter(pc.field("squashed") == tag)["uses"].to_pylist() == [uses]
        for file in reader._data_file_map.values():  # nltk leaves them open
            file.close()
