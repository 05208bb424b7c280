"""Nouns of WordNet 3.0: squashed lemma -> synsets in sense order, with ids, lemmas, glosses and hypernyms.

    goldenretriever -> golden_retriever.n.01 (n02099601)     polarbears -> ice_bear.n.01     goldenfishing -> nothing

nltk reads the bundled dictionary once (about ten seconds); the resulting tables are kept as Parquet under
${XDG_CACHE_HOME:-~/.cache}/maws-open, keyed by the sha256 of the dictionary.
"""

import contextlib
import functools
import io
import logging
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.files import atomic_write, sha256_bytes

log = logging.getLogger(__name__)

ARCHIVE: Final = Path(__file__).parent / "wordnet30" / "corpora" / "wordnet.zip"
TABLE_VERSION: Final = 1  # raise when the tables below are made differently

SYNSETS_SCHEMA: Final = pa.schema(
    [
        ("synset", pa.string()),
        ("wnid", pa.string()),
        ("lemmas", pa.list_(pa.string())),
        ("gloss", pa.string()),  # empty for the bundled files, which come without glosses
        ("hypernyms", pa.list_(pa.int32())),  # rows of this table
    ]
)
LEMMAS_SCHEMA: Final = pa.schema(
    [
        ("squashed", pa.string()),
        ("lemmas", pa.list_(pa.string())),  # spellings that squash to it: hot_dog, hotdog
        ("synsets", pa.list_(pa.int32())),  # rows of the synset table, in sense order
    ]
)
EXCEPTIONS_SCHEMA: Final = pa.schema([("plural", pa.string()), ("singular", pa.string())])

# WordNet's rules of detachment for nouns (morphy(7WN)): the first that gives a lemma holds.
DETACHMENTS: Final = (
    ("ches", "ch"), ("shes", "sh"), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ves", "f"), ("ies", "y"),
    ("men", "man"), ("s", ""),
)  # fmt: skip
MIN_SINGULAR: Final = 3  # letters; ours: #ups and #abs are not plurals of two-letter nouns

_SEPARATORS: Final = re.compile(r"[_\-'. ]")


@dataclass(frozen=True)
class Synset:
    name: str
    wnid: str
    lemmas: list[str]
    gloss: str


def squash(lemma: str) -> str:
    """The form in which a noun appears as a hashtag: no separators, case folded."""
    return _SEPARATORS.sub("", lemma).casefold()


class WordNet:
    """The noun tables; a synset is a row number of `synsets`."""

    def __init__(self, synsets: pa.Table, lemmas: pa.Table, exceptions: pa.Table) -> None:
        self.synsets = synsets
        self.lemmas = lemmas
        self.exceptions = exceptions
        self._rows = {squashed: row for row, squashed in enumerate(lemmas["squashed"].to_pylist())}
        singulars: dict[str, list[str]] = {}
        for plural, singular in zip(*(column.to_pylist() for column in exceptions.columns), strict=True):
            singulars.setdefault(plural, []).append(singular)
        self._singulars = singulars

    def __len__(self) -> int:
        return self.synsets.num_rows

    def synset(self, row: int) -> Synset:
        name, wnid, lemmas, gloss = (
            self.synsets[column][row].as_py() for column in ("synset", "wnid", "lemmas", "gloss")
        )
        return Synset(name, wnid, lemmas, gloss)

    def senses(self, hashtag: str) -> list[int]:
        """Synsets a hashtag can name, most usual first; none if it is no noun. It is never split into single words."""
        squashed = squash(hashtag)
        for candidate in (squashed, *self._reduce(squashed)):
            row = self._rows.get(candidate)
            if row is not None:
                return self.lemmas["synsets"][row].as_py()
        return []

    def _reduce(self, plural: str) -> Iterator[str]:
        """Singular forms, the ending belonging to the last word of a compound: polarbears, computermice."""
        yield from self._singulars.get(plural, [])
        for start in range(1, len(plural)):  # longest last word first
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
            squash(_SEPARATORS.split(lemma)[-1]) == word for lemma in self.lemmas["lemmas"][row].as_py()
        )

    def save(self, folder: Path) -> None:
        for name in _TABLES:
            with atomic_write(folder / f"{name}.parquet") as file:
                pq.write_table(getattr(self, name), file, compression="zstd", write_page_checksum=True)

    @staticmethod
    def load(folder: Path) -> "WordNet":
        tables = {
            name: pq.read_table(folder / f"{name}.parquet", schema=schema, page_checksum_verification=True)
            for name, schema in _TABLES.items()
        }
        return WordNet(**tables)


_TABLES: Final = {"synsets": SYNSETS_SCHEMA, "lemmas": LEMMAS_SCHEMA, "exceptions": EXCEPTIONS_SCHEMA}


def open_wordnet() -> WordNet:
    """The tables from the cache, built first where needed; without a writable cache they live in memory only."""
    folder = cache_folder() / f"wordnet-{archive_sha256()[:16]}-v{TABLE_VERSION}"
    with contextlib.suppress(OSError, pa.ArrowException):
        return WordNet.load(folder)
    log.info("reading the nouns of WordNet, once: about ten seconds")
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
    """Read all nouns with nltk. It refuses dictionaries that others may write to, so it reads a private copy."""
    with tempfile.TemporaryDirectory(prefix="maws-wordnet-") as folder:  # mode 0700
        try:
            _unpack(archive, Path(folder) / "corpora" / "wordnet")
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"cannot unpack {archive} ({error}); install the package again") from None
        with _reader(Path(folder)) as reader:
            return _tables(reader, (Path(folder) / "corpora" / "wordnet" / "noun.exc").read_text("utf-8"))


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            if not member.is_dir():  # base names only: nothing is written outside the folder
                target = folder / Path(member.filename).name
                target.touch(mode=0o600)
                target.write_bytes(file.read(member))


@contextlib.contextmanager
def _reader(root: Path) -> Iterator[Any]:
    import nltk.data  # here: two seconds that only building the tables pays
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    nltk.data.path.insert(0, str(root))  # nltk opens only what is on its path
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The multilingual functions are not available")
            yield WordNetCorpusReader(str(root / "corpora" / "wordnet"), None)
    finally:
        nltk.data.path.remove(str(root))


def _tables(reader: Any, exceptions: str) -> WordNet:
    found = list(reader.all_synsets("n"))
    rows = {synset.offset(): row for row, synset in enumerate(found)}
    synsets = [
        {
            "synset": synset.name(),
            "wnid": f"n{synset.offset():08d}",
            "lemmas": synset.lemma_names(),
            "gloss": synset.definition(),
            "hypernyms": [rows[parent.offset()] for parent in synset.hypernyms() + synset.instance_hypernyms()],
        }
        for synset in found
    ]
    spellings: dict[str, list[str]] = {}
    for lemma in sorted(reader.all_lemma_names(pos="n"), key=lambda name: (len(name), name)):  # unseparated form first
        if squashed := squash(lemma):
            spellings.setdefault(squashed, []).append(lemma)
    lemmas = []
    for squashed, names in sorted(spellings.items()):
        senses = [
            rows[synset.offset()]
            for name in names
            for synset in reader.synsets(name, "n")  # also gives synsets of reduced forms: men -> man.n.01
            if name in {lemma.lower() for lemma in synset.lemma_names()}
        ]
        lemmas.append({"squashed": squashed, "lemmas": names, "synsets": list(dict.fromkeys(senses))})
    pairs = [(plural, singular) for plural, *rest in map(str.split, io.StringIO(exceptions)) for singular in rest]
    return WordNet(
        pa.Table.from_pylist(synsets, schema=SYNSETS_SCHEMA),
        pa.Table.from_pylist(lemmas, schema=LEMMAS_SCHEMA),
        pa.table(
            {"plural": [squash(a) for a, _ in pairs], "singular": [squash(b) for _, b in pairs]}, EXCEPTIONS_SCHEMA
        ),
    )
