"""Caption text -> hashtags: "Our ＃Dog in the #snow #2024" -> ["dog", "snow"].

Rules, in order (what the papers leave open is said to be ours):
  NFKC, so that full-width and other compatibility forms are one; zero-width characters, joiners and variation selectors
  removed; case folded, and the dot of a Turkish capital İ with it: #İSTANBUL = #istanbul;
  `#` followed by letters, digits, underscores and combining marks, of any script; the capitals of #GoldenRetriever are
  one spelling of the word, and so are the underscores of #golden_retriever, which wordnet.py takes out;
  tags may follow each other directly (#dog#cat), but `#` after a letter, `&` or `/` is no tag (C#major, &#39;,
  page/#part: ours), unless that letter is of a script without spaces between words (今日は#犬: ours);
  an emoji ends a tag (#dog🐶), one right after the `#` is skipped (#🐶dog): ours; Instagram lets emoji be part of a
  tag, but none is part of a noun, and #dog🐶 would be lost; a tag of emoji only is none, nor is one without any letter;
  the first of equal tags stays.

`extract` is the definition, one caption at a time; `extract_batch` gives the same tags from an Arrow array of captions,
several times as fast (benchmarks/labels.py).
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

MAX_LENGTH: Final = 100  # characters of one tag; ours: longer ones are text without spaces, never a lemma
KEYCAP: Final = "\u20e3"  # a mark by its category, but it makes an emoji of what is before it
# Where Unicode has marks and symbols; the rest is ideographs and syllables.
BLOCKS: Final = ((0x80, 0x3400), (0x4DC0, 0x4E00), (0xA000, 0xAC00), (0xF900, 0x17000), (0x18D00, 0x20000),
                 (0xE0000, 0xE1000))  # fmt: skip


def marks_and_emoji(points: npt.NDArray[np.integer]) -> tuple[str, str]:
    """For a regular expression class each; emoji are symbols that are drawn, and the skin tones."""
    categories = np.array([*map(unicodedata.category, map(chr, points.tolist()))])
    marks = (categories.view("U1")[::2] == "M") & (points != ord(KEYCAP))
    emoji = (categories == "So") | ((points >= 0x1F3FB) & (points <= 0x1F3FF))
    return _ranges(points[marks]), _ranges(points[emoji])


def _ranges(points: npt.NDArray[np.integer]) -> str:
    breaks = np.flatnonzero(np.diff(points) != 1)
    starts, ends = points[np.append(0, breaks + 1)], points[np.append(breaks, len(points) - 1)]
    return "".join(f"{chr(start)}-{chr(end)}" for start, end in zip(starts.tolist(), ends.tolist(), strict=True))


_MARKS, _EMOJI = marks_and_emoji(np.concatenate([np.arange(*block) for block in BLOCKS]))
# Format characters (zero-width space, joiners, byte order mark, soft hyphen, direction marks, tag characters), fillers
# and variation selectors.
_INVISIBLE: Final = ("\u00ad\u034f\u061c\u115f\u1160\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
                     "\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff")  # fmt: skip
# Thai, Lao, Burmese, Khmer, kana and Han.
_UNSPACED: Final = ("\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\ua9e0-\ua9ff\uaa60-\uaa7f\u3005-\u3007\u3041-\u30ff"
                    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff")  # fmt: skip
_WORD: Final = rf"\w{_MARKS}"
_NOT_WORD: Final = re.compile(f"[^{_WORD}]+")
_NOT_SEEN: Final = re.compile(f"[{_INVISIBLE}]+")
_SIGN_AND_EMOJI: Final = re.compile(f"#[{_EMOJI}]+")
# Every character is looked at once: no input makes the search slower than its length.
_RUN: Final = re.compile(f"(?:(?<![&/#{_WORD}])|(?<=[{_UNSPACED}]))#[#{_WORD}]*")


def normalise(text: str) -> str:
    """One spelling for what looks the same."""
    if text.isascii():
        return text.lower()
    text = text.replace("™", "").replace("℠", "")  # NFKC would make letters of them
    text = _NOT_SEEN.sub("", unicodedata.normalize("NFKC", text))
    text = unicodedata.normalize("NFKC", text.casefold()).replace("i\u0307", "i")
    return _SIGN_AND_EMOJI.sub("#", text)


def extract(caption: str) -> list[str]:
    """The hashtags of a caption, normalised, without `#`, each once, in order."""
    return unique(tag for run in _RUN.findall(normalise(caption)) for tag in run.split("#"))


def from_column(tags: Iterable[str]) -> list[str]:
    """Hashtags that come in a column of their own, with or without `#`: "Golden Retriever" -> golden_retriever."""
    return unique(map(as_hashtag, tags))


def as_hashtag(text: str) -> str:
    """Golden Retriever -> golden_retriever."""
    return _NOT_WORD.sub("_", normalise(text)).strip("_")


def unique(tags: Iterable[str]) -> list[str]:
    """Usable tags, the first of each."""
    return list(dict.fromkeys(filter(_is_usable, tags)))


def _is_usable(tag: str) -> bool:
    return len(tag) <= MAX_LENGTH and any(map(str.isalpha, tag))


# --------------------------------------------------------------------------------------------------- many at a time

Codes = npt.NDArray[Any]  # code points: bytes where all text is ASCII, else 32 bits
Kinds = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

BATCH_BYTES: Final = 2 << 20  # of captions at a time: what is made of them should stay near the processor
SEPARATOR: Final = "\0"
FEW: Final = 30  # values of one image, up to which comparing each with each is faster than sorting
WORD, LETTER, UNSPACED, BLOCK, SIGN, BORDER, EMOJI, COMPLEX = (1 << bit for bit in range(8))  # kinds of characters
UNKNOWN: Final = 0xFF


def extract_batch(captions: pa.Array | pa.ChunkedArray, columns: pa.Array | pa.ChunkedArray | None = None) -> pa.Array:
    """list<string>: what `extract` gives for each caption and `from_column` for each list of `columns`, as one list.

    Nulls are texts and columns that nobody wrote. All captions are normalised as one text, whose characters are then
    looked at as an array of numbers.
    """
    captions, columns = _one(captions, pa.string()), _one(columns, pa.list_(pa.string()))
    step = max(1, len(captions) * BATCH_BYTES // max(1, captions.nbytes))
    parts = [_batch(captions.slice(n, step), columns and columns.slice(n, step)) for n in range(0, len(captions), step)]
    return pa.concat_arrays(parts) if parts else pa.array([], pa.list_(pa.string()))


def _one(array: pa.Array | pa.ChunkedArray | None, kind: pa.DataType) -> Any:
    """As one array of that type."""
    if array is None:
        return None
    chunks = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
    return pa.concat_arrays([chunk.cast(kind) for chunk in chunks] or [pa.array([], kind)])


def _batch(captions: pa.StringArray, columns: pa.ListArray | None) -> pa.ListArray:
    found = [*_from_captions(captions)] + ([] if columns is None else [_from_columns(columns)])
    tags = pa.concat_arrays([pa.array([], pa.string()), *(tags for tags, _ in found)])
    image = np.concatenate([np.zeros(0, np.int64), *(image for _, image in found)])
    if len(found) > 1:
        order = np.argsort(image, kind="stable")
        tags, image = tags.take(pa.array(order)), image[order]
    first = first_of_each(image, tags.dictionary_encode().indices.to_numpy())
    if not first.all():
        tags, image = tags.filter(pa.array(first)), image[first]
    ends = np.cumsum(np.bincount(image, minlength=len(captions)))
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]), pa.int32()), tags)


def first_of_each(image: Ints, value: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """False for what its image already has; `image` ascends."""
    first = np.ones(len(value), bool)
    most = np.bincount(image).max(initial=0)
    if most > FEW:
        first[:] = False
        first[np.unique(image << 32 | value, return_index=True)[1]] = True
        return first
    small = image.astype(np.int32)
    for step in range(1, most):  # the neighbours at that distance, all at once
        first[step:] &= (value[step:] != value[:-step]) | (small[step:] != small[:-step])
    return first


def _from_captions(captions: pa.StringArray) -> Iterator[tuple[pa.StringArray, Ints]]:
    """Tags and the numbers of their captions, captions that need the same work together."""
    plain = _true("string_is_ascii", captions)
    signs = _true("match_substring", captions, pc.MatchSubstringOptions("#"))
    if len(rows := np.flatnonzero(~plain & ~signs)):
        signs[rows] = _true("match_substring_regex", captions.take(pa.array(rows)), pc.MatchSubstringOptions("[＃﹟]"))
    if len(rows := np.flatnonzero(signs & plain)):
        yield _tags(_joined(captions, rows).lower(), rows)
    if len(rows := np.flatnonzero(signs & ~plain)):
        _, kinds = _kinds(_joined(captions, rows))
        hard = np.zeros(len(rows), bool)
        hard[np.searchsorted(np.flatnonzero(kinds == BORDER), np.flatnonzero(kinds & COMPLEX))] = True
        if not hard.all():
            yield _tags(_joined(captions, rows[~hard]).casefold(), rows[~hard])
        if hard.any():
            yield _tags(normalise(_joined(captions, rows[hard])), rows[hard])


def _true(function: str, captions: pa.StringArray, options: pc.FunctionOptions | None = None) -> npt.NDArray[np.bool_]:
    result = pc.call_function(function, [captions], options)
    return pc.fill_null(result, False).to_numpy(zero_copy_only=False).copy()


def _joined(captions: pa.StringArray, rows: Ints) -> str:
    """With a separator between, which nothing composes with, folds into or moves across."""
    texts = captions.take(pa.array(rows)) if len(rows) < len(captions) else captions
    for _ in range(2):
        lists = pa.ListArray.from_arrays([0, len(texts)], texts)
        text = pc.call_function("binary_join", [lists, SEPARATOR])[0].as_py()
        if text.count(SEPARATOR) == len(texts) - 1:
            break
        options = pc.ReplaceSubstringOptions(SEPARATOR, " ")  # as good as any character between words
        texts = pc.call_function("replace_substring", [texts], options)
    return text


def _tags(text: str, rows: Ints) -> tuple[pa.StringArray, Ints]:
    codes, kinds = _skip_emoji(*_kinds(text))
    start, length, caption = _find(kinds)
    return _gather(codes, start, length), rows[caption]


def _kinds(text: str) -> tuple[Codes, Kinds]:
    """The characters as numbers, and what each is."""
    table = _table()
    if text.isascii():
        data = text.encode("ascii")
        return np.frombuffer(data, np.uint8), np.frombuffer(data.translate(table[:256].tobytes()), np.uint8)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    kinds = table[codes]
    new = np.unique(codes[kinds == UNKNOWN])
    if len(new):
        table[new] = [_kind(chr(code)) for code in new.tolist()]
        kinds = table[codes]
    return codes, kinds


@functools.cache
def _table() -> Kinds:
    """Kind of every code point, filled as they are met."""
    table = np.full(0x110000, UNKNOWN, np.uint8)
    table[:128] = [_kind(chr(code)) for code in range(128)]
    return table


_SPECIAL: Final = {"#": SIGN, "&": BLOCK, "/": BLOCK, SEPARATOR: BORDER}


@functools.cache
def _patterns() -> tuple[dict[int, re.Pattern[str]], re.Pattern[str]]:
    """Compiled when first needed: it takes as long as importing the rest of this file."""
    classes = {WORD: _WORD, UNSPACED: _UNSPACED, EMOJI: _EMOJI}
    # What goes away or composes with its neighbours: marks, single letters of Hangul, vowels of Kirat Rai.
    unstable = f"{_MARKS}{KEYCAP}{_INVISIBLE}\u1100-\u11ff\ua960-\ua97f\ud7b0-\ud7ff\U00016d63-\U00016d6a"
    return {bit: re.compile(f"[{chars}]") for bit, chars in classes.items()}, re.compile(f"[{unstable}]")


def _kind(char: str) -> int:
    classes, unstable = _patterns()
    kind = _SPECIAL.get(char, 0) | (LETTER if char.isalpha() else 0)
    both = char + char.casefold()  # an ill letter can come of case folding, as the dot of İ does
    if unstable.search(both) or not all(unicodedata.is_normalized("NFKC", part) for part in both):
        kind |= COMPLEX
    return sum((bit for bit, pattern in classes.items() if pattern.match(char)), kind)


def _skip_emoji(codes: Codes, kinds: Kinds) -> tuple[Codes, Kinds]:
    """_SIGN_AND_EMOJI on arrays."""
    if codes.dtype == np.uint8:
        return codes, kinds
    emoji = np.flatnonzero(kinds & EMOJI)
    first = np.diff(emoji, prepend=-2) != 1  # of a row of them
    after_sign = (kinds[emoji - 1] & SIGN != 0) & first & (emoji > 0)
    number = np.arange(len(emoji))
    skipped = np.maximum.accumulate(np.where(first, 2 * number + after_sign, 0)) % 2 == 1  # as the first of the row
    keep = np.ones(len(kinds), bool)
    keep[emoji[skipped]] = False
    return codes[keep], kinds[keep]


def _find(kinds: Kinds) -> tuple[Ints, Ints, Ints]:
    """Start, length and caption of each usable tag: _RUN and `unique` on arrays.

    Words lie between the characters that are no part of one (`other`), so all questions about a sign are questions
    about its neighbours in that list.
    """
    other = np.concatenate([[-1], np.flatnonzero((kinds & WORD) == 0), [len(kinds)]])
    kind = np.concatenate([[0], kinds[other[1:-1]], [0]])
    sign = np.flatnonzero(kind & SIGN)  # places in `other`
    at = other[sign]
    length = other[sign + 1] - at - 1
    before, touches = kind[sign - 1], other[sign - 1] == at - 1
    begins = np.where(touches, (before & (BLOCK | SIGN)) == 0, (kinds[at - 1] & UNSPACED) != 0)
    number = np.arange(1, len(sign) + 1)
    run = np.maximum.accumulate(np.where(np.diff(sign, prepend=-1) != 1, number, 0))  # first sign of signs and words
    live = np.maximum.accumulate(np.where(begins, number, 0)) >= run  # this one or one before it in the run begins tags
    caption = np.cumsum((kind & BORDER) != 0)[sign]
    keep = live & (length > 0) & (length <= MAX_LENGTH)
    start, length, caption = at[keep] + 1, length[keep], caption[keep]
    lettered = (kinds[start] & LETTER) != 0
    for tag in np.flatnonzero(~lettered).tolist():
        lettered[tag] = (kinds[start[tag] : start[tag] + length[tag]] & LETTER).any()
    return start[lettered], length[lettered], caption[lettered]


def _gather(codes: Codes, start: Ints, length: Ints) -> pa.StringArray:
    """The pieces of a text as Arrow strings."""
    edge = np.zeros(len(codes) + 1, np.int8)
    edge[start] += 1
    edge[start + length] -= 1  # a sign or a space lies between any two
    picked = codes[np.cumsum(edge[:-1], dtype=np.int8).view(bool)]
    if codes.dtype == np.uint8:
        ends, data = np.cumsum(length), picked.tobytes()
    else:
        size = np.concatenate([[0], np.cumsum(1 + (picked > 0x7F) + (picked > 0x7FF) + (picked > 0xFFFF))])
        ends, data = size[np.cumsum(length)], picked.tobytes().decode("utf-32-le").encode()
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.StringArray.from_buffers(len(length), pa.py_buffer(offsets), pa.py_buffer(data))


def _from_columns(columns: pa.ListArray) -> tuple[pa.StringArray, Ints]:
    """Tags and the numbers of their rows; each spelling is looked at once."""
    lengths = pc.fill_null(columns.value_lengths(), 0).to_numpy(zero_copy_only=False)
    written = columns.flatten().dictionary_encode()
    spelled = [as_hashtag(tag) for tag in written.dictionary.to_pylist()]
    usable = pa.array([tag if _is_usable(tag) else None for tag in spelled], pa.string())
    tags = usable.take(written.indices)
    there = tags.is_valid().to_numpy(zero_copy_only=False)
    return tags.drop_null(), np.repeat(np.arange(len(columns)), lengths)[there]
