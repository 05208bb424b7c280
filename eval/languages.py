"""Names of classes in other languages: a file beside the classes' own, else the nouns of nltk's multilingual WordNet.

    --classes imagenet1k --language it        eval/prompts/imagenet1k.it.json
    --classes cifar100 --language fr          synset -> French nouns; needs `python -m nltk.downloader omw-1.4`

The second way asks for classes with synsets. A class without a noun in that language keeps its own names.
"""

import logging
from collections.abc import Sequence
from typing import Final

from data_pipeline import languages as wordnets
from data_pipeline.errors import DataError, UsageError, UserError
from data_pipeline.wordnet import open_wordnet

log = logging.getLogger(__name__)

ENGLISH: Final = "en"
WORDNETS: Final = {  # ISO 639-1 -> the name nltk gives the language's WordNet
    "ar": "arb", "bg": "bul", "ca": "cat", "da": "dan", "el": "ell", "es": "spa", "eu": "eus", "fi": "fin", "fr": "fra",
    "gl": "glg", "he": "heb", "hr": "hrv", "id": "ind", "is": "isl", "it": "ita", "ja": "jpn", "lt": "lit",
    "ms": "zsm", "nb": "nob", "nl": "nld", "nn": "nno", "pl": "pol", "pt": "por", "ro": "ron", "sk": "slk", "sl": "slv",
    "sq": "als", "sv": "swe", "th": "tha", "zh": "cmn",
}  # fmt: skip


def canonical(language: str) -> str:
    """Two letters where there are such: fra is fr."""
    short = {long: two for two, long in WORDNETS.items()} | {"eng": ENGLISH}
    return short.get(language.lower(), language.lower())


def translate(
    names: Sequence[tuple[str, ...]], synsets: Sequence[str | None], language: str, source: str
) -> tuple[tuple[str, ...], ...]:
    """The names of each class in `language`, all nouns of its synset. Raises UsageError where none has one."""
    if not any(synsets):
        raise UsageError(f"--language {language}: the classes of {source} have no synsets to look up nouns by")
    nouns = _nouns(WORDNETS.get(language, language))
    wnid = dict(zip(*(open_wordnet().synsets[column].to_pylist() for column in ("synset", "wnid")), strict=True))
    found = [tuple(nouns.get(wnid.get(synset, synset), ())) if synset else () for synset in synsets]
    if not any(found):
        raise UsageError(
            f"--language {language}: no class of {source} has a synset with a noun in that language; give a file in "
            f"that language with --classes"
        )
    if missing := found.count(()):
        log.warning(
            "warning: %d of the %d classes of %s have no noun in language '%s' and keep their own name",
            missing,
            len(found),
            source,
            language,
        )
    return tuple(new or old for new, old in zip(found, names, strict=True))


def _nouns(language: str) -> dict[str, list[str]]:
    try:
        return wordnets.nouns(language)
    except (UsageError, DataError) as error:
        raise _renamed(error) from None


def _renamed(error: UserError) -> UserError:
    """data_pipeline's flag has another name."""
    return type(error)(str(error).replace("--languages", "--language"))
