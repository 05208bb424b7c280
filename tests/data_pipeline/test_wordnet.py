import logging
import shutil

import pytest

from data_pipeline import wordnet
from data_pipeline.synsets import map_hashtags
from data_pipeline.wordnet import WordNet, squash


def name(nouns: WordNet, tag: str) -> str | None:
    senses = nouns.senses(tag)
    return nouns.synset(senses[0]).name if senses else None


def test_all_nouns_of_wordnet_3_are_there_with_the_ids_of_imagenet(nouns):
    assert len(nouns) == 82_115
    dog = nouns.synset(nouns.senses("dog")[0])
    assert (dog.name, dog.wnid) == ("dog.n.01", "n02084071")
    assert dog.lemmas == ["dog", "domestic_dog", "Canis_familiaris"]


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
        ("goldendog", None),
        ("dogcat", None),
        ("ups", None),
        ("happy", None),
        ("", None),
    ],
)
def test_a_tag_is_a_whole_noun_or_its_plural_or_nothing(nouns, tag, synset):
    assert name(nouns, tag) == synset


def test_a_compound_is_never_split(nouns):
    senses = {nouns.synset(sense).name for sense in nouns.senses("hotdog")}
    assert senses == {"hotdog.n.01", "hotdog.n.02", "frank.n.02"}


def test_an_irregular_plural_must_be_the_last_word_of_the_compound(nouns):
    assert name(nouns, "dormice") == "dormouse.n.01"  # listed as a plural of its own
    assert name(nouns, "titmice") == "titmouse.n.01"
    assert name(nouns, "agape" + "mice") is None


def test_squashing_takes_all_separators_away():
    assert squash("Jack-o'-lantern Co._St.") == "jackolanterncost"


def test_each_hashtag_is_counted_as_mapped_unmapped_or_ambiguous(nouns):
    mapped = map_hashtags([["brownbear", "bat", "happy"], ["ursusarctos", "brownbear"], []], nouns)
    assert [[nouns.synset(s).name for s in row] for row in mapped.synsets] == [
        ["brown_bear.n.01", "bat.n.01"],
        ["brown_bear.n.01"],
        [],
    ]
    assert mapped.counts == {"hashtags": 5, "mapped_hashtags": 4, "unmapped_hashtags": 1, "ambiguous_hashtags": 1}


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


def test_the_private_copy_of_the_dictionary_is_readable_by_its_owner_only(tmp_path):
    wordnet._unpack(wordnet.ARCHIVE, tmp_path / "copy")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "copy").iterdir()} == {0o600}
    shutil.rmtree(tmp_path / "copy")
