"""Princeton's noun files -> tables: what wordnet.py looks things up in.

The files are lines of words, described in wndb(5WN); wordnet30/README.md says which they are. Reading them takes about
two seconds; nltk, which gives the same (tests/data_pipeline/test_wordnet.py), takes five times as long.
"""

import re
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from data_pipeline.errors import DataError

SYNSETS: Final = pa.schema(
    [
        ("synset", pa.string()),
        ("wnid", pa.string()),
        ("lemmas", pa.list_(pa.string())),
        ("gloss", pa.string()),
        ("examples", pa.list_(pa.string())),
        ("lexname", pa.string()),  # the lexicographers' file: noun.animal, noun.artifact, … (26 of them)
        ("hypernyms", pa.list_(pa.int32())),  # rows of this table; of instances too: rhine.n.01 -> river.n.01
    ]
)
LEMMAS: Final = pa.schema(
    [
        ("squashed", pa.string()),
        ("lemmas", pa.list_(pa.string())),  # spellings that squash to it: hot_dog, hotdog
        ("synsets", pa.list_(pa.int32())),  # rows of the synset table, in sense order
        ("uses", pa.list_(pa.int32())),  # of each in the texts that WordNet's makers tagged by hand; most have none
    ]
)
EXCEPTIONS: Final = pa.schema([("plural", pa.string()), ("singular", pa.string())])

FILES: Final = ("data.noun", "index.noun", "noun.exc", "cntlist.rev", "lexnames")
SEPARATORS: Final = re.compile(r"[_\-'./ ]")
_EXAMPLES: Final = re.compile('[;:] *"')  # where they begin
_QUOTED: Final = re.compile('"([^"]+)')


def squash(lemma: str) -> str:
    """The form in which a noun appears as a hashtag: no separators, case folded."""
    return (lemma if lemma.isalnum() else SEPARATORS.sub("", lemma)).casefold()


def read(archive: Path) -> tuple[pa.Table, pa.Table, pa.Table]:
    """SYNSETS, LEMMAS, EXCEPTIONS."""
    try:
        with zipfile.ZipFile(archive) as file:
            texts = [file.read(f"wordnet/{name}").decode() for name in FILES]
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read {archive} ({error}); install the package again") from None
    data, index, exceptions, uses, lexnames = (
        [line for line in text.splitlines() if not line.startswith(" ")]
        for text in texts  # without the licence
    )
    rows = {line[:8]: row for row, line in enumerate(data)}
    senses = dict(_index_entry(line, rows) for line in index)
    pairs = [(plural, singular) for plural, *rest in map(str.split, exceptions) for singular in rest]
    return (
        _synsets(data, rows, senses, [line.split()[1] for line in lexnames]),
        _lemmas(senses, _uses(uses)),
        pa.table([[squash(plural) for plural, _ in pairs], [squash(singular) for _, singular in pairs]], EXCEPTIONS),
    )


def _index_entry(line: str, rows: dict[str, int]) -> tuple[str, list[int]]:
    """lemma pos synset_cnt p_cnt [ptr_symbol...] sense_cnt tagsense_cnt synset_offset..., in sense order."""
    words = line.split()
    return words[0], [rows[word] for word in words[-int(words[2]) :]]


def _synsets(data: list[str], rows: dict[str, int], senses: dict[str, list[int]], lexnames: list[str]) -> pa.Table:
    """offset lex_filenum ss_type w_cnt [word lex_id...] p_cnt [symbol offset pos source/target...] | gloss"""
    columns: list[list[Any]] = [[] for _ in SYNSETS]
    for row, line in enumerate(data):
        fields, _, text = line.partition(" | ")
        words = fields.split()
        pointers = 5 + 2 * int(words[3], 16)
        lemmas = words[4 : pointers - 1 : 2]
        first = lemmas[0].lower()
        gloss, examples = _gloss(text)
        targets = zip(words[pointers::4], words[pointers + 1 :: 4], strict=True)
        hypernyms = [rows[offset] for symbol, offset in targets if symbol in ("@", "@i")]
        name, lexname = f"{first}.n.{senses[first].index(row) + 1:02d}", lexnames[int(words[1])]
        entry = (name, f"n{words[0]}", lemmas, gloss, examples, lexname, hypernyms)
        for column, value in zip(columns, entry, strict=True):
            column.append(value)
    return pa.table(columns, SYNSETS)


def _gloss(text: str) -> tuple[str, list[str]]:
    """The definition; "and the examples"; "that follow it"."""
    definition, *rest = _EXAMPLES.split(text.strip(), 1)
    return definition.strip("; "), _QUOTED.findall('"' + rest[0])[::2] if rest else []


def _uses(lines: list[str]) -> dict[tuple[str, int], int]:
    """sense_key sense_number tag_cnt, a key being lemma%..."""
    words = map(str.split, lines)
    return {(key.partition("%")[0], int(number) - 1): int(count) for key, number, count in words}


def _lemmas(senses: dict[str, list[int]], uses: dict[tuple[str, int], int]) -> pa.Table:
    """Lemmas that are one hashtag, in one row: hotdog before hot_dog."""
    spellings: dict[str, list[str]] = {}
    for lemma in sorted(senses, key=lambda name: (len(name), name)):
        if squashed := squash(lemma):
            spellings.setdefault(squashed, []).append(lemma)
    found = []
    for squashed in sorted(spellings):
        counts: Counter[int] = Counter()
        for name in spellings[squashed]:
            for number, row in enumerate(senses[name]):
                counts[row] += uses.get((name, number), 0)
        found.append((squashed, spellings[squashed], list(counts), list(counts.values())))
    return pa.table([list(column) for column in zip(*found, strict=True)], LEMMAS)
