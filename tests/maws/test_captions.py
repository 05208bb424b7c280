"""Captions are cleaned as asked, every change is counted, and the default is what it always was."""

import html
import random
import re

import pytest

from maws.config import ConfigError, override
from maws.data.captions import CaptionCleaner, CaptionConfig, NoCaption, clean_caption
from maws.stages import lit

CAPTION = "Ben &amp; <b>I</b> @home see https://x.y/z #red_fox\u200b  Ｆox"


def cleaned(text: str, **settings: object) -> str:
    return CaptionCleaner(CaptionConfig(**settings)).clean(text)  # type: ignore[arg-type]


def test_the_defaults_are_recipes_5_2_step_10():
    """The same four steps written down once more, on text made of everything they look for."""
    rng, parts = (
        random.Random(0),
        ["&amp;", "&lt;b&gt;", "@jo", "a@b.c", "#fox", "C#", "http://x#y", "WWW.z", "ö", " ", "\t", "\u3000", "<i>"],
    )
    for _ in range(300):
        text = "".join(rng.choice(parts) for _ in range(12))
        want = re.sub(r"(?i)(https?://|www\.)\S+", " ", html.unescape(text))
        want = re.sub(r"(?<!\w)@\w+", " ", want).replace("#", " ")
        assert clean_caption(text) == re.sub(r"\s+", " ", want).strip()


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, "Ben & <b>I</b> see red_fox\u200b Ｆox"),
        ({"html": "keep"}, "Ben &amp; <b>I</b> see red_fox\u200b Ｆox"),
        ({"tags": "drop"}, "Ben & I see red_fox\u200b Ｆox"),
        ({"urls": "keep"}, "Ben & <b>I</b> see https://x.y/z red_fox\u200b Ｆox"),
        ({"mentions": "words"}, "Ben & <b>I</b> home see red_fox\u200b Ｆox"),
        ({"mentions": "keep"}, "Ben & <b>I</b> @home see red_fox\u200b Ｆox"),
        ({"hashtags": "keep"}, "Ben & <b>I</b> see #red_fox\u200b Ｆox"),
        ({"hashtags": "drop"}, "Ben & <b>I</b> see Ｆox"),
        ({"controls": "drop"}, "Ben & <b>I</b> see red_fox Ｆox"),
        ({"unicode": "nfkc", "case": "lower"}, "ben & <b>i</b> see red_fox\u200b fox"),
        ({"max_length": 5}, "Ben &"),
        ({"min_length": 60}, ""),
    ],
)
def test_each_setting_changes_its_part_alone(settings, want):
    assert cleaned(CAPTION, **settings) == want


def test_a_dropped_hashtag_goes_with_its_vowel_signs():
    assert cleaned("लोमड़ी #लाललोमड़ी है", hashtags="drop") == "लोमड़ी है"


def test_a_hashtag_in_full_width_is_one_as_for_the_shards():
    text = "a ＃fox and a ﹟dog"
    assert [cleaned(text, hashtags=how) for how in ("words", "drop", "keep")] == ["a fox and a dog", "a and a", text]


def test_joiners_that_words_and_emoji_are_made_with_stay_when_controls_are_dropped():
    family, persian = "👩\u200d👧", "می\u200cخواهم"
    assert cleaned(f"{family}\x00\u202e {persian}\ufeff", controls="drop") == f"{family} {persian}"


def test_every_caption_is_counted_once_for_each_reason_it_was_changed_for():
    clean = CaptionCleaner(CaptionConfig(min_length=3, max_length=40))
    for text in ("a fox", "@a @b @c and #d", "see http://x &amp; #y", "  ", "#ab", "x" * 50):
        clean(text)
    assert clean.counts == {
        "captions": 6, "mentions": 1, "hashtags": 3, "urls": 1, "html": 1, "spaces": 1, "short": 1, "empty": 2, "cut": 1
    }  # fmt: skip


def test_a_sample_whose_caption_is_empty_trains_on_that_or_is_skipped_with_a_reason():
    assert CaptionCleaner()("@jo http://x") == ""
    with pytest.raises(NoCaption) as error:
        CaptionCleaner(CaptionConfig(empty="skip"))("@jo http://x")
    assert error.value.reason == "empty_caption"


def test_the_command_line_of_stage_lit_sets_them_and_refuses_others():
    cfg = override(lit.PRESETS["debug"], ["captions.hashtags=keep", "captions.max_length=300"])
    assert cfg.captions == CaptionConfig(hashtags="keep", max_length=300)
    with pytest.raises(ConfigError, match=r"captions.hashtags=kep is not known; did you mean keep\?"):
        override(lit.PRESETS["debug"], ["captions.hashtags=kep"])
    with pytest.raises(ConfigError, match="0 <= min_length <= max_length"):
        CaptionConfig(min_length=9, max_length=5)


def test_hostile_captions_are_cleaned_in_no_time():
    for text in ("<!--" * 10**6, "@" * 10**6, "&" * 10**6, "#" * 10**6, "\ud800" * 5000, "http://" * 10**5, "\x00" * 9):
        for settings in ({}, {"tags": "drop", "unicode": "nfkc", "controls": "drop", "hashtags": "drop"}):
            assert len(cleaned(text, **settings)) <= 2000
