"""Captions as the text tower reads them (recipes §5.2-10).

clean = CaptionCleaner(CaptionConfig()); clean("Look! https://example.org #sunset @jo")    # "Look! sunset"
clean.counts                                   # captions 1, urls 1, mentions 1, hashtags 1: captions changed, by reason
"""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields

from data_pipeline.errors import DataError
from maws.config import ConfigError, nearest

_URL = re.compile(r"(https?://|www\.)\S+", re.IGNORECASE)
_MENTION = re.compile(r"(?<!\w)@(\w+)")
_HASHTAG = re.compile(r"[#＃﹟][^\s#＃﹟]+")  # up to a space: Python's \w stops at the vowel signs of Indic scripts
_TAG = re.compile(r"<(?:/?[a-z][^<>]*|!--.*?--)>", re.IGNORECASE | re.DOTALL)
# Cc without white space, and Cf without the joiners that emoji and Indic and Persian words are made with
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")

Change = Callable[[str], str]
# setting -> what it may be -> what is then done; None: nothing
CHANGES: dict[str, dict[str, Change | None]] = {
    "html": {"unescape": html.unescape, "keep": None},
    "tags": {"keep": None, "drop": lambda text: _TAG.sub(" ", text)},
    "urls": {"drop": lambda text: _URL.sub(" ", text), "keep": None},
    "mentions": {
        "drop": lambda text: _MENTION.sub(" ", text),
        "words": lambda text: _MENTION.sub(r"\1", text),
        "keep": None,
    },
    "hashtags": {
        "words": lambda text: re.sub("[#＃﹟]", " ", text),
        "drop": lambda text: _HASHTAG.sub(" ", text),
        "keep": None,
    },
    "controls": {"keep": None, "drop": lambda text: _CONTROL.sub("", text)},
    "unicode": {
        "keep": None,
        "nfc": lambda text: unicodedata.normalize("NFC", text),
        "nfkc": lambda text: unicodedata.normalize("NFKC", text),
    },
    "case": {"keep": None, "lower": str.lower},
}


@dataclass(frozen=True)
class CaptionConfig:
    """What is done to a caption before it is cut into pieces, in this order. White space always becomes one blank."""

    max_length: int = 2000  # characters: what is beyond them is not read; the context is far shorter anyway
    html: str = "unescape"  # `&amp;` and the like; or keep
    tags: str = "keep"  # `<b>`; or drop
    urls: str = "drop"  # or keep
    mentions: str = "drop"  # @name; words: without the sign; keep
    hashtags: str = "words"  # without their sign; keep; drop: with the word
    controls: str = "keep"  # control and direction characters, zero-width spaces; or drop
    unicode: str = "keep"  # or nfc, nfkc (XLM-R's own pieces are of nearly NFKC text: its tokenizer sees to that)
    case: str = "keep"  # or lower
    min_length: int = 0  # characters: what is left of a shorter one counts as nothing
    empty: str = "keep"  # nothing is left: train on that; or skip: the next sample stands in, within data.max_bad

    def __post_init__(self) -> None:
        for f in fields(self):
            value, known = getattr(self, f.name), [*CHANGES.get(f.name, ())] or ["keep", "skip"]
            if f.type in (str, "str") and value not in known:
                raise ConfigError(f"captions.{f.name}={value} is not known; {nearest(str(value), known)}")
        if not 0 <= self.min_length <= self.max_length or self.max_length < 1:
            raise ConfigError(
                f"captions.min_length={self.min_length} and captions.max_length={self.max_length} leave no caption; "
                f"it must be 0 <= min_length <= max_length"
            )


class NoCaption(DataError):
    """Nothing is left of a caption, and captions.empty=skip."""

    reason = "empty_caption"


class CaptionCleaner:
    """Cleans captions and counts what it changed: `captions` it was given, and those changed for each reason.

    The reasons are the settings of CaptionConfig, and `cut` (max_length), `spaces`, `short` (min_length), `empty`.
    """

    def __init__(self, cfg: CaptionConfig = CaptionConfig()) -> None:
        self.cfg, self.counts = cfg, Counter[str]()
        self._changes = [(name, change) for name, how in CHANGES.items() if (change := how[getattr(cfg, name)])]

    def __call__(self, text: str) -> str:
        """Raises NoCaption when nothing is left and such samples are to be skipped."""
        text = self.clean(text)
        if not text and self.cfg.empty == "skip":
            raise NoCaption("its caption is empty after cleaning")
        return text

    def clean(self, text: str) -> str:
        """The caption, which may be empty."""
        self.counts["captions"] += 1
        text = self._counted("cut", text, text[: self.cfg.max_length])
        text = self._counted("spaces", text, _one_blank(text))
        for name, change in self._changes:
            text = self._counted(name, text, _one_blank(change(text)))
        if len(text) < self.cfg.min_length:
            text = self._counted("short", text, "")
        self.counts["empty"] += not text
        return text

    def _counted(self, reason: str, before: str, after: str) -> str:
        if after != before:
            self.counts[reason] += 1
        return after


def clean_caption(text: str) -> str:
    """A caption cleaned by the default settings."""
    return CaptionCleaner().clean(text)


def _one_blank(text: str) -> str:
    return " ".join(text.split())
