"""nltk's own reader of the bundled nouns, to check ours against."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import wordnet


@contextmanager
def nltk_reader(folder: Path) -> Iterator[Any]:
    """The files are unpacked into a folder of nltk's data path: it opens no others."""
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    root = folder / "corpora" / "wordnet"
    root.mkdir(parents=True, mode=0o700)
    with zipfile.ZipFile(wordnet.ARCHIVE) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                (root / member.filename.rpartition("/")[2]).write_bytes(archive.read(member))
    nltk.data.path.insert(0, str(folder))
    try:
        with pytest.warns(UserWarning, match="multilingual functions are not available"):
            reader = WordNetCorpusReader(str(root), None)
        yield reader
    finally:
        nltk.data.path.remove(str(folder))
