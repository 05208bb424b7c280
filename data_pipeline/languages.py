"""Nouns of other languages, from nltk's Open Multilingual WordNet where the user has it: #chien -> dog.n.01.

    python -m nltk.downloader omw-1.4            python -m data_pipeline build … --languages fra jpn

Its lemmas name synsets of the same WordNet 3.0. A tag is looked up in English first and then in the languages given, in
their order; without the corpus, or in a language that was not given, it is unmapped. There is no morphology for these
languages: a tag has to be a lemma as it stands.
"""

import difflib
import functools
import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, Final

import pyarrow as pa

from data_pipeline.errors import DataError, UsageError
from data_pipeline.hashtags import as_hashtag

CORPORA: Final = ("omw-1.4", "omw-2.0")  # nltk's names; the first that is there
INSTALL: Final = f"python -m nltk.downloader {CORPORA[0]}"
TAB_FILES: Final = r".*/wn-data-.*\.tab"

SCHEMA: Final = pa.schema(
    [
        ("key", pa.string()),
        ("language", pa.string()),
        ("synsets", pa.list_(pa.int32())),  # rows of the WordNet table, the most usual in English first
    ]
)
# Written or left out as one likes: vowel signs of Arabic and Hebrew, and the stroke that makes an Arabic word longer.
_OPTIONAL: Final = re.compile("[\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06ed]+")


def key(text: str) -> str:
    """The form in which a noun and its hashtag meet."""
    return _OPTIONAL.sub("", as_hashtag(text).replace("_", ""))


def read(languages: Iterable[str], rows: Mapping[str, int], uses: Mapping[int, int]) -> pa.Table:
    """SCHEMA, of all languages in their order. `rows`: wnid -> synset; `uses`: how often English has it."""
    tables = [pa.Table.from_pylist(_entries(language, rows, uses), SCHEMA) for language in languages]
    return pa.concat_tables([SCHEMA.empty_table(), *tables])


def _entries(language: str, rows: Mapping[str, int], uses: Mapping[int, int]) -> list[dict[str, Any]]:
    lemmas: dict[str, list[int]] = {}
    capitals: dict[str, list[int]] = {}  # the ı of #IŞIK folds to i: what capitals make of a lemma is a spelling too
    for wnid, lemma in _lines(language):
        if (row := rows.get(wnid)) is not None:
            lemmas.setdefault(key(lemma), []).append(row)
            capitals.setdefault(key(lemma.upper()), []).append(row)
    found = {**capitals, **lemmas}
    order = Counter({row: -number for row, number in uses.items()})
    return [
        {"key": name, "language": language, "synsets": sorted(set(found[name]), key=lambda row: (order[row], row))}
        for name in sorted(found)
        if name
    ]


def nouns(language: str) -> dict[str, list[str]]:
    """wnid -> its nouns as they are written, each once, in the order of the data."""
    found: dict[str, dict[str, None]] = {}
    for wnid, lemma in _lines(language):
        if noun := lemma.replace("_", " ").strip():
            found.setdefault(wnid, {})[noun] = None
    return {wnid: list(lemmas) for wnid, lemmas in found.items()}


def _lines(language: str) -> Iterator[tuple[str, str]]:
    """wnid and lemma of every noun."""
    for line in _data(language).decode("utf-8", "replace").splitlines():
        if line.startswith("#"):
            continue
        offset, kind, lemma, *_ = [*line.split("\t"), "", ""]
        if offset.endswith("-n") and kind.rpartition(":")[2] == "lemma":
            yield f"n{offset.removesuffix('-n')}", lemma


def sha256(languages: Iterable[str]) -> dict[str, str]:
    """Of the data of each language."""
    return {language: hashlib.sha256(_data(language)).hexdigest() for language in languages}


@functools.cache
def _data(language: str) -> bytes:
    """Lines `offset-pos TAB type TAB lemma`, type being lemma or fra:lemma."""
    reader, files = _corpus()
    if language not in files:
        known = sorted(files)
        near = difflib.get_close_matches(language, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"--languages {language}: nltk's multilingual WordNet has no such language{hint} It has {', '.join(known)}"
        )
    with reader.abspath(files[language]).open() as file:
        return file.read()


@functools.cache
def _corpus() -> tuple[Any, dict[str, str]]:
    """nltk's reader, and the file of each language, under the name that nltk gives it."""
    from nltk.corpus.reader.api import CorpusReader  # here: two seconds that only other languages pay
    from nltk.corpus.util import LazyCorpusLoader

    said: list[str] = []
    for name in CORPORA:
        reader: Any = LazyCorpusLoader(name, CorpusReader, TAB_FILES, encoding="utf8")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                files = reader.fileids()
        except LookupError:
            said.extend(str(warning.message).splitlines()[0] for warning in caught)
            continue
        languages: dict[str, str] = {}
        for file in files:
            path = PurePosixPath(file)
            language = path.stem.rpartition("-")[2]
            languages.setdefault(language if language not in languages else f"{language}_{path.parent.name}", file)
        return reader, languages
    reasons = f" ({'; '.join(dict.fromkeys(said))})" if said else ""
    raise DataError(
        f"--languages: nltk's multilingual WordNet is not on its data path{reasons}; get it with: {INSTALL}"
    )
