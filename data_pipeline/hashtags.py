"""Caption text -> hashtags: "Our ＃Dog in the #snow #2024" -> ["dog", "snow"].

Rules, in order (recipes §5.2; what the papers leave open is said to be ours):
  NFKC, so that full-width and other compatibility forms are one; zero-width characters and variation selectors removed;
  case folded; `#` followed by letters, digits, underscores and combining marks; tags may follow each other directly
  (#dog#cat), but `#` after a letter, `&` or `/` is no tag (C#major, &#39;, page#part: ours); a tag needs a letter;
  the first of equal tags stays.
"""

import re
import sys
import unicodedata
from collections.abc import Iterable
from typing import Final

MAX_LENGTH: Final = 100  # characters of one tag; ours: longer ones are text without spaces, never a lemma


def _ranges(wanted: str) -> str:
    """A regular expression class of all characters whose general category starts with one of `wanted`."""
    points = [point for point in range(sys.maxunicode + 1) if unicodedata.category(chr(point)) in wanted.split()]
    parts: list[str] = []
    start = previous = points[0]
    for point in [*points[1:], -1]:
        if point != previous + 1:
            parts.append(f"\\U{start:08x}-\\U{previous:08x}")
            start = point
        previous = point
    return "".join(parts)


# Removed everywhere: format characters (zero-width space, joiners, byte order mark, soft hyphen, direction marks, tag
# characters) and variation selectors.
_INVISIBLE: Final = re.compile("[\u00ad\u034f\u061c\u115f\u1160\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
                               "\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff]")  # fmt: skip
_WORD: Final = r"\w" + _ranges("Mn Mc Me")
_NO_TAG: Final = ("&", "/")  # before `#`: a character reference, an address
_NOT_WORD: Final = re.compile(f"[^{_WORD}]+")
_RUN: Final = re.compile(f"[#{_WORD}]+")  # looked at once each: no input makes the search slower than its length


def normalise(text: str) -> str:
    """One spelling for what looks the same."""
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    return unicodedata.normalize("NFKC", text.casefold())


def extract(caption: str) -> list[str]:
    """The hashtags of a caption, normalised, without `#`, each once, in order."""
    text = normalise(caption)
    runs = [run for run in _RUN.finditer(text) if run[0].startswith("#") and not text.endswith(_NO_TAG, 0, run.start())]
    return unique(tag for run in runs for tag in run[0].split("#"))


def from_column(tags: Iterable[str]) -> list[str]:
    """Hashtags that come in a column of their own, with or without `#`: "Golden Retriever" -> golden_retriever."""
    return unique(_NOT_WORD.sub("_", normalise(tag)).strip("_") for tag in tags)


def unique(tags: Iterable[str]) -> list[str]:
    """Usable tags, the first of each."""
    return list(dict.fromkeys(tag for tag in tags if len(tag) <= MAX_LENGTH and any(map(str.isalpha, tag))))
