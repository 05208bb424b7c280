"""A multilingual WordNet of a few words, in nltk's own layout."""

import shutil
from pathlib import Path

import nltk.data
import pytest

from data_pipeline import languages, wordnet
from data_pipeline.errors import DataError, UsageError

TABS = {
    "fra": [
        ("02084071-n", "fra:lemma", "chien"),
        ("02084071-n", "fra:lemma", "chien domestique"),
        ("07697537-n", "fra:lemma", "hot-dog français"),
        ("00001740-v", "fra:lemma", "respirer"),
        ("99999999-n", "fra:lemma", "inconnu"),
        ("02084071-n", "fra:def", "animal"),
        ("02691156-n", "fra:lemma", "chat"),  # also an English noun
        ("02512053-n", "fra:lemma", "poisson"),
    ],
    "tur": [
        ("02084071-n", "lemma", "köpek"),
        ("11473954-n", "lemma", "ışık"),
        ("05285623-n", "lemma", "ilik"),
        ("02084071-n", "lemma", "poisson"),  # to see which language comes first
    ],
    "arb": [("02084071-n", "lemma", "كَلْب")],
    "hin": [("02084071-n", "lemma", "कुत्ता")],
    "jpn": [
        ("02084071-n", "jpn:lemma", "犬"),
        ("02691156-n", "jpn:lemma", "ドッグ"),
        ("02084071-n", "jpn:lemma", "ドッグ"),
    ],
}


def forget():
    languages._corpus.cache_clear()
    languages._data.cache_clear()


def write_corpus(root: Path) -> Path:
    for language, lines in TABS.items():
        path = root / "corpora" / "omw-1.4" / language / f"wn-data-{language}.tab"
        path.parent.mkdir(parents=True, mode=0o755)
        text = f"# name\t{language}\thttp://example.org\tlicence\n"
        path.write_text(text + "".join("\t".join(line) + "\n" for line in lines), "utf-8")
    return root


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """The folder nltk looks into, and nothing else it might find on this machine."""
    root = write_corpus(tmp_path / "nltk_data")
    monkeypatch.setattr(nltk.data, "path", [str(root)])
    forget()
    yield root
    forget()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """English, and five languages after it."""
    root = write_corpus(tmp_path_factory.mktemp("languages") / "nltk_data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(root)])
        forget()
        yield wordnet.open_wordnet(["fra", "tur", "arb", "hin", "jpn"])
        forget()


def names(words: wordnet.WordNet, tag: str) -> list[str]:
    return [words.synset(sense).name for sense in words.senses(tag)]


@pytest.mark.parametrize(
    ("tag", "synsets"),
    [
        ("chien", ["dog.n.01"]),
        ("chiendomestique", ["dog.n.01"]),
        ("chien_domestique", ["dog.n.01"]),
        ("hotdogfrançais", ["hotdog.n.02"]),
        ("respirer", []),  # a verb
        ("inconnu", []),  # no synset of WordNet 3.0
        ("animal", ["animal.n.01"]),  # English
        ("köpek", ["dog.n.01"]),
        ("ışık", ["light.n.01"]),
        ("işik", ["light.n.01"]),  # #IŞIK, folded
        ("ilik", ["marrow.n.01"]),
        ("كلب", ["dog.n.01"]),
        ("كَلْب", ["dog.n.01"]),
        ("कुत्ता", ["dog.n.01"]),
        ("कुतता", []),
        ("犬", ["dog.n.01"]),
        ("ドッグ", ["dog.n.01", "airplane.n.01"]),  # the synset that is more usual in English first
        ("hund", []),
    ],
)
def test_a_tag_is_a_noun_of_one_of_the_languages(words, tag, synsets):
    assert names(words, tag) == synsets


def test_english_comes_first_and_then_the_languages_in_their_order(corpus):
    english, french, both = (wordnet.open_wordnet(wanted) for wanted in ([], ["fra"], ["tur", "fra"]))
    assert french.senses("chat") == english.senses("chat") != []
    assert (names(french, "poisson"), names(both, "poisson")) == (["fish.n.01"], ["dog.n.01"])


def test_without_languages_their_nouns_are_unmapped(corpus):
    assert wordnet.open_wordnet().senses("chien") == []


def test_the_nouns_of_languages_are_kept_with_the_tables(corpus, tmp_path):
    wordnet.open_wordnet(["fra"]).save(tmp_path / "tables")
    assert names(wordnet.WordNet.load(tmp_path / "tables"), "chien") == ["dog.n.01"]


def test_a_zip_of_nltks_downloader_is_read_too(corpus):
    before = languages.sha256(["fra", "jpn"])
    folder = corpus / "corpora"
    shutil.make_archive(str(folder / "omw-1.4"), "zip", folder, "omw-1.4")
    shutil.rmtree(folder / "omw-1.4")
    languages._corpus.cache_clear()
    languages._data.cache_clear()
    assert languages.sha256(["fra", "jpn"]) == before
    assert names(wordnet.open_wordnet(["jpn"]), "犬") == ["dog.n.01"]


def test_a_language_that_is_not_there_is_named_with_its_nearest(corpus):
    with pytest.raises(UsageError, match=r"--languages fr: .* no such language; did you mean fra\?.* arb, fra, hin"):
        wordnet.open_wordnet(["fr"])


def test_without_the_corpus_the_error_says_how_to_get_it(corpus):
    shutil.rmtree(corpus / "corpora")
    with pytest.raises(DataError, match=r"not on its data path; get it with: python -m nltk\.downloader omw-1\.4"):
        wordnet.open_wordnet(["fra"])


def test_a_corpus_that_others_may_write_to_is_refused_with_nltks_reason(corpus: Path):
    for path in (corpus, corpus / "corpora", corpus / "corpora" / "omw-1.4"):
        path.chmod(0o777)
    with pytest.raises(DataError, match="writable by"):
        wordnet.open_wordnet(["fra"])


def test_a_build_reads_the_languages_it_is_asked_for(corpus, make, run, tmp_path):
    rows = [row | {"caption": "#chien"} for row in make.rows(2)] + [
        row | {"caption": "#dog"} for row in make.rows(2, 2)
    ]
    source = make.parquet(tmp_path / "in.parquet", rows)
    english, french = ("build", "--input", source, "--workers", 1, "--output"), ("--languages", "fra")
    assert run(*english, tmp_path / "french", *french).code == 0
    assert [record["synsets"] for record in make.records(tmp_path / "french").values()] == [["dog.n.01"]] * 4
    assert run(*english, tmp_path / "english").code == 0
    assert len(make.records(tmp_path / "english")) == 2
    again = run(*english, tmp_path / "french", *french)
    assert (again.code, "up to date" in again.out) == (0, True)
    tab = corpus / "corpora" / "omw-1.4" / "fra" / "wn-data-fra.tab"
    tab.write_text(tab.read_text("utf-8").replace("chien domestique", "toutou"), "utf-8")
    forget()
    changed = run(*english, tmp_path / "french", *french)
    assert (changed.code, "languages_sha256 was" in changed.err) == (1, True)
