"""What strangers call their columns, and values of any kind as fields of schema.SOURCE.

caption   caption, text, alt, alt_text, description, in any case; or --caption-column
image     image, jpg, jpeg, png, webp, img; or --image-column
path      path, file_name, filename, image_path, image, file, image_url, url (tables that name pictures)
hashtags  hashtags, tags, keywords: a list, a JSON list, or one text: split at commas and semicolons if it has any, else
          at spaces
the rest  key, __key__ · language, lang · source · licence, license · url, image_url, source_url

A value that cannot be used marks its record, and only that.
"""

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from data_pipeline.sources.location import Reading

MAX_TEXT: Final = 1 << 20  # bytes of one caption, or of one record of a text file; --max-caption is far below
MAX_TAGS: Final = 10_000
SUCCESS: Final = "success"  # img2dataset's word for a picture that it has
FAILURES: Final = ("failed_to_download", "failed_to_resize")  # and for those it has not

CAPTION: Final = ("caption", "text", "alt", "alt_text", "description")
IMAGE: Final = ("image", "jpg", "jpeg", "png", "webp", "img")
PATH: Final = ("path", "file_name", "filename", "image_path", "image", "file", "image_url", "url")
ALIASES: Final = {
    "key": ("key", "__key__"),
    "hashtags": ("hashtags", "tags", "keywords"),
    "language": ("language", "lang"),
    "source": ("source",),
    "licence": ("licence", "license"),
    "url": ("url", "image_url", "source_url"),
    "status": ("status",),
}
SHORT_TEXTS: Final = ("language", "source", "licence", "url")


class BadRecord(ValueError):
    """A record that is left out; its text is the word it is counted under."""


class Columns(NamedTuple):
    """The names, among those that are there, of each field."""

    image: str | None = None
    caption: str | None = None
    key: str | None = None
    hashtags: str | None = None
    language: str | None = None
    source: str | None = None
    licence: str | None = None
    url: str | None = None
    status: str | None = None

    @property
    def all(self) -> list[str]:
        return list(dict.fromkeys(name for name in self if name is not None))


@functools.lru_cache(maxsize=4096)
def find_columns(names: tuple[str, ...], reading: Reading, images: tuple[str, ...] = IMAGE) -> Columns:
    """First the exact names in the order above, then the same in any case."""
    found = {
        "image": _chosen(reading.image_column, names) or _first(images, names),
        "caption": _chosen(reading.caption_column, names) or _first(CAPTION, names),
    }
    return Columns(**found, **{name: _first(aliases, names) for name, aliases in ALIASES.items()})


def _chosen(asked: str | None, names: Sequence[str]) -> str | None:
    return asked if asked in names else None


def _first(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    exact = next((name for name in wanted if name in names), None)
    if exact is not None:
        return exact
    folded = {name.casefold(): name for name in reversed(names)}
    return next((folded[name] for name in wanted if name in folded), None)


# ----------------------------------------------------------------------------------------------------------- one record


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object; NaN and infinities, which JSON does not have, are nulls."""
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=lambda _: None)
    except UnicodeDecodeError:
        raise BadRecord("caption_not_utf8") from None
    except (ValueError, RecursionError):  # also numbers of more digits than Python reads
        raise BadRecord("bad_json") from None
    if not isinstance(value, dict):
        raise BadRecord("bad_json")
    return value


def from_record(record: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """The texts of a record as fields of SOURCE; BadRecord says why not, after what is known of it went into `name`."""
    row: dict[str, Any] = {}
    try:
        if columns.key is not None and record.get(columns.key) is not None:
            row["key"] = key(record[columns.key])
        for name in SHORT_TEXTS:
            row[name] = text(record.get(getattr(columns, name) or ""), name)
        failure = status_problem(record.get(columns.status or "")) if columns.url is not None else None
        if failure is not None:
            raise BadRecord(failure)
        row["caption"] = text(record.get(columns.caption or ""), "caption")
        row["hashtags"] = tags(record.get(columns.hashtags or ""))
    except BadRecord as error:
        row["problem"] = str(error)
    return row


def key(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value or len(value) > MAX_TEXT:
        raise BadRecord("bad_key")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord("bad_key") from None
    return value


def text(value: Any, name: str = "caption") -> str | None:
    """As text; of numbers and the like too, except for captions."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (int, float)) and name != "caption":
        value = str(value)
    if not isinstance(value, str):
        raise BadRecord("caption_not_text" if name == "caption" else "field_not_text")
    if len(value) > MAX_TEXT:
        raise BadRecord("caption_too_long" if name == "caption" else "text_too_long")
    if "\0" in value:
        raise BadRecord("nul_byte")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, from JSON
        raise BadRecord("caption_not_utf8") from None
    return value.strip() if name == "caption" else value or None


def caption_file(data: bytes) -> str | None:
    """What a .txt beside a picture says."""
    if len(data) > MAX_TEXT:
        raise BadRecord("caption_too_long")
    try:
        return text(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BadRecord("caption_not_utf8") from None


def tags(value: Any) -> list[str] | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        value = split_tags(value)
    if not isinstance(value, (list, tuple)):
        raise BadRecord("hashtags_not_text")
    if len(value) > MAX_TAGS:
        raise BadRecord("too_many_hashtags")
    found = [text(str(tag) if isinstance(tag, int) else tag, "caption") for tag in value if tag is not None]
    return [tag for tag in found if tag]


def split_tags(value: str) -> list[Any]:
    if value.lstrip().startswith("["):
        try:
            found = json.loads(value)
            if isinstance(found, list):
                return found
        except (ValueError, RecursionError):
            pass
    return [tag.strip() for tag in re.split(r"[,;]+" if re.search("[,;]", value) else r"\s+", value) if tag.strip()]


def status_problem(value: Any) -> str | None:
    """Of a row that img2dataset wrote."""
    if value is None or value == SUCCESS:
        return None
    return value if value in FAILURES else "failed"
