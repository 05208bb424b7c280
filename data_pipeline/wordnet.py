"""Nouns of WordNet 3.0: squashed lemma -> synsets in sense order, with ids, lemmas, glosses and hypernyms.

    goldenretriever -> golden_retriever.n.01 (n02099601)     polarbears -> ice_bear.n.01     goldenfishing -> nothing
    chien -> dog.n.01, where languages.py was asked for French

The bundled dictionary is Princeton's, its nouns complete (wordnet30/README.md). It is read once, in about two seconds;
the tables are kept as Parquet under ${XDG_CACHE_HOME:-~/.cache}/maws-open, keyed by the sha256 of the dictionary.
"""

import contextlib
import functools
import itertools
import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline import dictionary, languages
from data_pipeline.dictionary import SEPARATORS, squash
from data_pipeline.errors import DataError
from data_pipeline.files import atomic_write, sha256_bytes

log = logging.getLogger(__name__)

ARCHIVE: Final = Path(__file__).parent / "wordnet30" / "corpora" / "wordnet.zip"
TABLE_VERSION: Final = 3  # raise when the tables below are made differently

# WordNet's rules of detachment for nouns (morphy(7WN)): the first that gives a lemma holds.
DETACHMENTS: Final = (
    ("ches", "ch"), ("shes", "sh"), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ves", "f"), ("ies", "y"),
    ("men", "man"), ("s", ""),
)  # fmt: skip
MIN_SINGULAR: Final = 3  # letters; ours: #ups and #abs are not plurals of two-letter nouns

# WordNet is ASCII. English nouns that are also written with accents, and cities; ours. A list rather than a rule: to
# take accents away would make Montana of the Spanish montaña and fur of the German für.
ACCENTED: Final = """
aïoli ångström appliqué attaché béchamel bêtenoire bouclé café château chèvre cliché communiqué consommé coupdétat
crèmebrûlée crèmecaramel crèmedecacao crèmedementhe crêpe crudités débutante décor déjàvu derrière divorcée doppelgänger
éclair élan élite elniño émigré entrée épée étagère façade fête fiancé fiancée gruyère habitué ingénue jalapeño
lämmergeier lycée macramé mêlée moiré naïveté négligée noël papiermâché pâté pâtisserie pietà piñacolada piñata protégé
purée raisondêtre résumé séance señor señora señorita smörgåsbord soirée soufflé têteàtête velouté vicuña
asunción bogotá brasília cádiz canadá cancún curaçao düsseldorf gdańsk göteborg köln málaga malmö medellín méxico
montréal panamá perú québec reykjavík sãopaulo yucatán zürich
"""


@dataclass(frozen=True)
class Synset:
    name: str
    wnid: str
    lemmas: list[str]
    gloss: str
    lexname: str


def _plain(word: str) -> str:
    """Without accents."""
    return "".join(char for char in unicodedata.normalize("NFD", word) if not unicodedata.combining(char))


class WordNet:
    """The noun tables; a synset is a row number of `synsets`."""

    def __init__(
        self, synsets: pa.Table, lemmas: pa.Table, exceptions: pa.Table, translations: pa.Table | None = None
    ) -> None:
        self.synsets = synsets
        self.lemmas = lemmas
        self.exceptions = exceptions
        self.translations = languages.SCHEMA.empty_table() if translations is None else translations
        self._folder: Path | None = None  # where these tables lie, just as they are

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        rows = {squashed: row for row, squashed in enumerate(self.lemmas["squashed"].to_pylist())}
        return rows | {word: rows[_plain(word)] for word in ACCENTED.split()}

    @functools.cached_property
    def _singulars(self) -> dict[str, list[str]]:
        singulars: dict[str, list[str]] = {}
        for plural, singular in zip(*(column.to_pylist() for column in self.exceptions.columns), strict=True):
            singulars.setdefault(plural, []).append(singular)
        return singulars

    @functools.cached_property
    def _names(self) -> pa.StringArray:
        """All that is a noun as it stands."""
        return pa.array([*self._rows, *self._translated], pa.string())

    @functools.cached_property
    def _endings(self) -> frozenset[str]:
        """The last three letters of irregular plurals; all others end in s."""
        return frozenset(plural[-3:] for plural in (*self._singulars, "men"))

    @functools.cached_property
    def _senses(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Where the senses of each lemma begin, and all of them."""
        column = self.lemmas["synsets"].combine_chunks()
        return column.offsets.to_numpy(), column.values.to_numpy()

    @functools.cached_property
    def _translated(self) -> dict[str, list[int]]:
        """Of a key that several languages have, the first language."""
        found: dict[str, list[int]] = {}
        for key, synsets in zip(*(self.translations[name].to_pylist() for name in ("key", "synsets")), strict=True):
            found.setdefault(key, synsets)
        return found

    def with_languages(self, wanted: Sequence[str]) -> "WordNet":
        """The same with the nouns of nltk's multilingual WordNet, looked up after the English ones."""
        rows = {wnid: row for row, wnid in enumerate(self.synsets["wnid"].to_pylist())}
        synsets, uses = (self.lemmas[name].combine_chunks().flatten() for name in ("synsets", "uses"))
        total = np.bincount(synsets.to_numpy(), weights=uses.to_numpy(), minlength=len(self)).astype(int).tolist()
        translations = languages.read(wanted, rows, dict(enumerate(total)))
        return WordNet(self.synsets, self.lemmas, self.exceptions, translations)

    def __len__(self) -> int:
        return self.synsets.num_rows

    def synset(self, row: int) -> Synset:
        name, wnid, lemmas, gloss, lexname = (
            self.synsets[column][row].as_py() for column in ("synset", "wnid", "lemmas", "gloss", "lexname")
        )
        return Synset(name, wnid, lemmas, gloss, lexname)

    def senses(self, hashtag: str) -> list[int]:
        """Synsets a hashtag can name, most usual first; none if it is no noun. It is never split into single words."""
        row = self._row(hashtag)
        if row is None:
            return list(self._translated.get(languages.key(hashtag), ())) if self._translated else []
        begin, flat = self._senses
        return flat[begin[row] : begin[row + 1]].tolist()

    def lemma(self, hashtag: str) -> str | None:
        """The squashed lemma it is, or is the plural of."""
        row = self._row(hashtag)
        return None if row is None else self.lemmas["squashed"][row].as_py()

    def uses(self, hashtag: str) -> dict[int, int]:
        """How often the makers of WordNet met each sense in the texts they tagged."""
        row = self._row(hashtag)
        if row is None:
            return {}
        return dict(zip(self.lemmas["synsets"][row].as_py(), self.lemmas["uses"][row].as_py(), strict=True))

    def _row(self, hashtag: str) -> int | None:
        squashed = squash(hashtag)
        for candidate in itertools.chain((squashed,), self._reduce(squashed)):
            if (row := self._rows.get(candidate)) is not None:
                return row
        return None

    def may_name(self, hashtags: pa.StringArray) -> npt.NDArray[np.bool_]:
        """Of many at once: false for what is certainly no noun, as most hashtags are."""
        ending = pc.call_function("utf8_slice_codeunits", [hashtags], pc.SliceOptions(-3, 1 << 30))
        answers = (
            pc.call_function("ascii_is_alnum", [hashtags]),
            pc.call_function("ascii_is_lower", [hashtags]),  # what `squash` leaves as it is
            pc.call_function("is_in", [hashtags], pc.SetLookupOptions(self._names)),
            pc.call_function("ends_with", [hashtags], pc.MatchSubstringOptions("s")),
            pc.call_function("is_in", [ending], pc.SetLookupOptions(pa.array(sorted(self._endings)))),
        )
        alnum, lower, known, regular, irregular = (answer.to_numpy(zero_copy_only=False) for answer in answers)
        return ~(alnum & lower) | known | regular | irregular

    def _reduce(self, plural: str) -> Iterator[str]:
        """Singular forms, the ending belonging to the last word of a compound: polarbears, computermice."""
        yield from self._singulars.get(plural, [])
        for start in range(1, len(plural) if plural[-3:] in self._endings else 0):  # longest last word first
            for singular in self._singulars.get(plural[start:], []):
                candidate = plural[:start] + singular
                if self._ends_in_word(candidate, singular):
                    yield candidate
        if plural.endswith("ss"):
            return
        for ending, singular in DETACHMENTS:
            if plural.endswith(ending):
                candidate = plural.removesuffix(ending) + singular
                if len(candidate) >= MIN_SINGULAR:
                    yield candidate

    def _ends_in_word(self, squashed: str, word: str) -> bool:
        row = self._rows.get(squashed)
        return row is not None and any(
            squash(SEPARATORS.split(lemma)[-1]) == word for lemma in self.lemmas["lemmas"][row].as_py()
        )

    def save(self, folder: Path) -> None:
        for name in _TABLES:
            with atomic_write(folder / f"{name}.parquet") as file:
                if self._folder is not None:  # ten times faster
                    file.write((self._folder / f"{name}.parquet").read_bytes())
                else:
                    pq.write_table(getattr(self, name), file, compression="zstd", write_page_checksum=True)

    @staticmethod
    def load(folder: Path) -> "WordNet":
        tables = {}
        for name, schema in _TABLES.items():
            with pq.ParquetFile(folder / f"{name}.parquet", page_checksum_verification=True) as file:
                tables[name] = file.read().cast(schema)
        wordnet = WordNet(**tables)
        wordnet._folder = folder
        return wordnet


_TABLES: Final = {
    "synsets": dictionary.SYNSETS,
    "lemmas": dictionary.LEMMAS,
    "exceptions": dictionary.EXCEPTIONS,
    "translations": languages.SCHEMA,
}


def open_wordnet(wanted: Sequence[str] = ()) -> WordNet:
    """The nouns of English, and of the languages wanted. The tables of English come from the cache, built first where
    needed; without a writable cache they live in memory only."""
    wordnet = _open_english()
    return wordnet.with_languages(wanted) if wanted else wordnet


def _open_english() -> WordNet:
    folder = cache_folder() / f"wordnet-{archive_sha256()[:16]}-v{TABLE_VERSION}"
    with contextlib.suppress(OSError, ValueError, pa.ArrowException):
        return WordNet.load(folder)
    log.info("reading the nouns of WordNet, once: about two seconds")
    wordnet = build(ARCHIVE)
    try:
        wordnet.save(folder)
    except OSError as error:
        log.warning("cannot keep the WordNet tables in %s (%s); they are built again next time", folder, error.strerror)
    return wordnet


@functools.cache
def archive_sha256() -> str:
    try:
        return sha256_bytes(ARCHIVE.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read the bundled WordNet {ARCHIVE} ({error.strerror}); install the package again"
        ) from None


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "maws-open"


def build(archive: Path) -> WordNet:
    return WordNet(*dictionary.read(archive))
