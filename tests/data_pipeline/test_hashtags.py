import random
import re
import sys
import unicodedata

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline import hashtags
from data_pipeline.hashtags import extract, extract_batch, first_of_each, from_column, unique

STRINGS = pa.list_(pa.string())


@pytest.mark.parametrize(
    ("caption", "tags"),
    [
        ("no tags here, not even # alone", []),
        ("Our #Dog and #DOG and #dog", ["dog"]),
        ("full-width ＃ｄｏｇ", ["dog"]),
        ("small number sign ﹟dog", ["dog"]),
        ("decomposed #cafe\u0301 equals composed #caf\u00e9", ["café"]),
        ("#golden\u200bretriever\u200d \u2060#snow\ufe0f", ["goldenretriever", "snow"]),
        ("sharp s #Straße", ["strasse"]),
        ("numbers #2024 #1_500 #１２ but #a1", ["a1"]),
        ("#dog#cat,#snow.", ["dog", "cat", "snow"]),
        ("##dog", ["dog"]),
        ("#golden_retriever", ["golden_retriever"]),
        ("camel case: #GoldenRetriever", ["goldenretriever"]),
        ("C#major, page.html/#top and &#39;quoted&#x27;", []),
        ("order stays: #snow #bear #ant", ["snow", "bear", "ant"]),
        ("#" + "a" * 100 + " #" + "b" * 101, ["a" * 100]),
        # scripts
        ("Indic marks belong to the word: #हिन्दी!", ["हिन्दी"]),
        ("#แมวน่ารัก ครับ", ["แมวน่ารัก"]),
        ("#كلب، #قطة", ["كلب", "قطة"]),
        ("\u200f#كلب\u200f \u202b#می\u200cخواهم\u202c", ["كلب", "میخواهم"]),
        ("#Köpek #KÖPEK #ışık #İstanbul #ISTANBUL", ["köpek", "ışık", "istanbul"]),
        ("#ΟΔΟΣ #οδος", ["οδοσ"]),
        ("#개 #ｶﾀｶﾅ #犬", ["개", "カタカナ", "犬"]),
        ("no spaces: 今日は#犬と散歩 แมว#แมว", ["犬と散歩", "แมว"]),
        ("今日はC#major", []),
        # emoji
        ("stops at the picture: #dog🐶#cat", ["dog", "cat"]),
        ("skips it after the sign: #🐶🐾dog #❤️love", ["dog", "love"]),
        ("a family #👨‍👩‍👧‍👦 is no tag, nor is #🇫🇷", []),
        ("skin #👍🏽thumb", ["thumb"]),
        ("keycap #\ufe0f\u20e3 is no tag, nor is it part of one: #\u20e3dog #top1\ufe0f\u20e3", ["top1"]),
        ("#Nike™ #nike℠", ["nike"]),
    ],
)
def test_hashtags_of_a_caption(caption, tags):
    assert extract(caption) == tags
    assert extract_batch(pa.array([caption])).to_pylist() == [tags]


def test_a_column_of_hashtags_may_carry_signs_and_spaces():
    assert from_column(["#Dog", "Golden Retriever", "dog", "12", "", "🐶"]) == ["dog", "golden_retriever"]


def test_a_hostile_caption_takes_no_long_time():
    after_and = "#" * 20_000 + "&" * 20_000 + "#a" * 20_000  # after `&` nothing is a tag
    for caption in (after_and, "#" + "\u0301" * 20_000, "#" + "🐶" * 20_000, "#1" * 20_000):
        assert extract(caption) == []
        assert extract_batch(pa.array([caption])).to_pylist() == [[]]


def slow(captions, columns=None):
    """What the readable functions give."""
    columns = columns or [None] * len(captions)
    return [
        unique([*extract(caption or ""), *from_column(tag for tag in column or () if tag is not None)])
        for caption, column in zip(captions, columns, strict=True)
    ]


def random_text(rng: random.Random) -> str:
    """Of characters that matter here, and of any."""
    pools = (
        "##＃﹟&/_ .,\n\0",
        "abcXYZ019",
        "éÜßıİIi\u0307\u0301\u0323ǰΐςΣ",
        "हिन्दीแมวน่ารักكلبًـ犬猫カタｶﾞ개ᄀ\u1161\u11a8",
        "🐶🐾❤\ufe0f\u200d\u20e3🏽🇫🇷👨ℹ™℠Ⓜ½…\u00ad\u200b\u2066\U000e0061",
    )
    chars = []
    for _ in range(rng.randrange(40)):
        if rng.random() < 0.9:
            chars.append(rng.choice(rng.choice(pools)))
        else:
            chars.append(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, sys.maxunicode + 1)])))
    return "".join(chars)


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_gives_the_same_tags_as_one_caption_at_a_time(seed, monkeypatch):
    monkeypatch.setattr(hashtags, "BATCH_BYTES", 20_000)  # several batches
    rng = random.Random(seed)
    captions = [random_text(rng) if rng.random() > 0.05 else None for _ in range(3000)]
    columns = [
        [random_text(rng)[:9] for _ in range(rng.randrange(4))] if rng.random() > 0.3 else None for _ in captions
    ]
    found = extract_batch(pa.array(captions))
    assert found.type == STRINGS
    assert found.to_pylist() == slow(captions)
    assert sum(map(len, found.to_pylist())) > 500
    assert extract_batch(pa.array(captions), pa.array(columns, STRINGS)).to_pylist() == slow(captions, columns)


@pytest.mark.parametrize("seed", range(2))
def test_captions_in_ascii_are_the_same_too(seed):
    rng = random.Random(seed)
    captions = ["".join(rng.choices("##&/_ aB1\n\0", k=rng.randrange(30))) for _ in range(5000)]
    assert extract_batch(pa.array(captions)).to_pylist() == slow(captions)


@pytest.mark.slow
def test_every_character_of_unicode_is_treated_the_same_in_a_batch():
    characters = [chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]
    for texts in ([f"#a{c}B {c}#x #{c}y" for c in characters], [f"#{c}\u0301#e{c}\u093c" for c in characters]):
        found = extract_batch(pa.array(texts)).to_pylist()
        assert [text for text, tags in zip(texts, found, strict=True) if tags != extract(text)] == []


def test_all_number_signs_are_known():
    signs = {chr(point) for point in range(sys.maxunicode + 1) if "#" in unicodedata.normalize("NFKC", chr(point))}
    assert signs == set("#＃﹟")


def test_marks_and_emoji_are_those_of_all_planes():
    everywhere = hashtags.marks_and_emoji(np.arange(128, sys.maxunicode + 1))
    assert everywhere == (hashtags._MARKS, hashtags._EMOJI)
    mark, emoji = (re.compile(f"[{ranges}]") for ranges in everywhere)
    for point in range(128, sys.maxunicode + 1, 7):
        category = unicodedata.category(chr(point))
        assert bool(mark.match(chr(point))) == (category in ("Mn", "Mc", "Me") and point != 0x20E3)
        assert bool(emoji.match(chr(point))) == (category == "So" or 0x1F3FB <= point <= 0x1F3FF)


def test_arrays_of_all_kinds_are_read():
    captions, columns = ["#dog", None, "cat", "#犬 #dog"], [["#Cat"], ["Dog", None], None, ["dog", "猫"]]
    expected = [["dog", "cat"], ["dog"], [], ["犬", "dog", "猫"]]
    plain = pa.array(captions), pa.array(columns, STRINGS)
    large = pa.array(captions, pa.large_string()), pa.array(columns, pa.large_list(pa.large_string()))
    chunked = tuple(pa.chunked_array([array.slice(0, 1), array.slice(1)]) for array in plain)
    for pair in (plain, large, chunked, (plain[0].dictionary_encode(), plain[1])):
        assert extract_batch(*pair).to_pylist() == expected
    assert extract_batch(plain[0].slice(1, 3), plain[1].slice(1, 3)).to_pylist() == expected[1:]
    assert extract_batch(pa.array([], pa.string())).to_pylist() == []
    assert extract_batch(pa.array([None, None], pa.string()), plain[1].slice(1, 2)).to_pylist() == [["dog"], []]


@pytest.mark.parametrize("most", [5, 60])
def test_the_first_of_equal_values_of_an_image_stays(most):
    rng = random.Random(most)
    rows = [[rng.randrange(8) for _ in range(rng.randrange(most))] for _ in range(400)]
    image = np.array([number for number, row in enumerate(rows) for _ in row])
    first = first_of_each(image, np.array([value for row in rows for value in row]))
    assert first.tolist() == [value not in row[:place] for row in rows for place, value in enumerate(row)]


def test_a_column_alone_is_enough():
    nothing = pa.nulls(2, pa.string())
    assert extract_batch(nothing, pa.array([["Golden Retriever"], []], STRINGS)).to_pylist() == [
        ["golden_retriever"],
        [],
    ]
