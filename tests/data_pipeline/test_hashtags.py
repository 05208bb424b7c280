import pytest

from data_pipeline import hashtags


@pytest.mark.parametrize(
    ("caption", "tags"),
    [
        ("no tags here, not even # alone", []),
        ("Our #Dog and #DOG and #dog", ["dog"]),
        ("full-width ＃ｄｏｇ", ["dog"]),
        ("small number sign ﹟dog", ["dog"]),
        ("decomposed #cafe\u0301 equals composed #caf\u00e9", ["café"]),
        ("Indic marks belong to the word: #हिन्दी!", ["हिन्दी"]),
        ("#golden\u200bretriever\u200d \u2060#snow\ufe0f", ["goldenretriever", "snow"]),
        ("keycap #\ufe0f\u20e3 is no tag", []),
        ("sharp s #Straße", ["strasse"]),
        ("numbers #2024 #1_500 #１２ but #a1", ["a1"]),
        ("#dog#cat,#snow.", ["dog", "cat", "snow"]),
        ("##dog", ["dog"]),
        ("#golden_retriever", ["golden_retriever"]),
        ("C#major, page.html/#top and &#39;quoted&#x27;", []),
        ("stops at the picture: #dog🐶#cat", ["dog", "cat"]),
        ("order stays: #snow #bear #ant", ["snow", "bear", "ant"]),
        ("#" + "a" * 101, []),
    ],
)
def test_hashtags_of_a_caption(caption, tags):
    assert hashtags.extract(caption) == tags


def test_a_column_of_hashtags_may_carry_signs_and_spaces():
    assert hashtags.from_column(["#Dog", "Golden Retriever", "dog", "12", ""]) == ["dog", "golden_retriever"]


def test_a_hostile_caption_takes_no_long_time():
    assert hashtags.extract("#" * 20_000 + "&" * 20_000 + "#a" * 20_000) == []  # after `&` nothing is a tag
    assert hashtags.extract("#" + "\u0301" * 20_000) == []
