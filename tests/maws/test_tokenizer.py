"""Captions become XLM-R's ids from either form of its tokenizer, whatever strangers write into captions and files."""

import copy
import json

import pytest
import torch

from data_pipeline.errors import DataError
from maws.config import ConfigError
from maws.data.tokenizer import (
    JSON_FILE,
    MAX_FILE,
    MODEL_FILE,
    CaptionTokenizer,
    PretrainedTokenizer,
    load_pretrained_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

HOSTILE = ["\ud800", "a\udfffb", "\x00" * 50, "\u202e" * 9, "😀" * 10**5, " " * 10**6, "x " * 10**6, "\U0010ffff"]


@pytest.fixture(scope="module")
def small() -> CaptionTokenizer:
    return train_tokenizer(["a red fox runs", "a dog and a cat", "the fox sees the dog"] * 9, 60, 6)


@pytest.fixture(scope="module")
def small_json() -> str:
    """A tokenizer.json of a few pieces."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "b", "▁ab"]
    return json.dumps({
        "version": "1.0", "padding": None,
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "normalizer": None, "post_processor": None, "decoder": None,
        "added_tokens": [{"id": i, "content": t, "special": True, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False} for i, t in enumerate(pieces[:4])],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 3, "vocab": [[t, -1.0 * (i > 3)] for i, t in enumerate(pieces)]},
    })  # fmt: skip


def test_a_caption_cannot_name_a_special_token(small, small_json):
    for tok in (small, PretrainedTokenizer(small_json, 6)):
        ids, mask = tok(["</s>a<pad><s>"])
        assert not {0, 1, 2} & set(ids[0][mask[0].bool()][1:-1].tolist())


def test_a_caption_is_cut_to_its_first_pieces_and_the_mask_covers_what_is_there(small):
    text = "the fox sees the dog and a cat"
    pieces = [p + 1 if p else 3 for p in small.pieces.encode(text)]
    ids, mask = small([text, "a"])
    assert len(pieces) > 6 and ids[0].tolist() == [0, *pieces[:6], 2] and mask[0].all()
    assert mask[1].tolist() == [1] * int(mask[1].sum()) + [0] * (8 - int(mask[1].sum()))
    assert ids[1][mask[1] == 0].eq(1).all() and ids[1][mask[1] == 1].ne(1).all()


def test_settings_of_a_tokenizer_json_that_cut_or_pad_are_not_followed(small_json):
    ids, mask = PretrainedTokenizer(small_json, 6)(["ab ab ab ab"])
    assert ids[0].tolist() == [0, 7, 7, 7, 7, 2, 1, 1] and mask.sum() == 6


@pytest.mark.parametrize("caption", HOSTILE)
def test_hostile_captions_become_rows_of_the_same_length(small, small_json, caption):
    for tok in (small, PretrainedTokenizer(small_json, 6)):
        ids, mask = tok([caption])
        assert ids.shape == (1, 8) and ids[0, 0] == 0 and ids.min() >= 0 and ids.max() < tok.vocabulary
        assert ids[0, int(mask.sum()) - 1] == 2


def test_tokenizers_travel_to_loader_processes_and_through_folders(small, small_json, tmp_path):
    for number, tok in enumerate((small, PretrainedTokenizer(small_json, 6))):
        tok.save(tmp_path / str(number))
        for again in (copy.deepcopy(tok), load_tokenizer(tmp_path / str(number), 6)):
            assert torch.equal(again(["a fox ab"])[0], tok(["a fox ab"])[0])


def test_a_tokenizer_that_numbers_otherwise_is_refused(small_json, tmp_path):
    (tmp_path / JSON_FILE).write_text(small_json.replace("<pad>", "[PAD]"))
    with pytest.raises(DataError, match=r"tokenizer.json cannot be used: its special tokens are .*'<pad>': None"):
        load_tokenizer(tmp_path, 6)


def test_a_sentencepiece_model_that_numbers_otherwise_is_refused(tmp_path):
    import io

    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"]), model_writer=out, vocab_size=9, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, unk_id=1, bos_id=2, eos_id=3,
    )  # fmt: skip
    (tmp_path / MODEL_FILE).write_bytes(out.getvalue())
    with pytest.raises(DataError, match=r"<unk>, <s>, </s> are numbers \(1, 2, 3\)"):
        load_tokenizer(tmp_path, 6)


@pytest.mark.parametrize("name", [MODEL_FILE, JSON_FILE])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[" * 10**5, b"\xff\xfe", b"null", b'{"model": {"type": "Unigram", "vocab": 7}}']
)
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} cannot be used"):
        load_tokenizer(tmp_path, 6)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / JSON_FILE).open("wb") as f:
        f.truncate(MAX_FILE + 1)
    with pytest.raises(DataError, match="more than any tokenizer needs"):
        load_tokenizer(tmp_path, 6)


def test_a_folder_without_a_tokenizer_and_a_name_that_is_no_folder_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="holds no tokenizer: expected sentencepiece"):
        load_tokenizer(tmp_path, 6)
    with pytest.raises(ConfigError, match="empty to train a small tokenizer from the captions"):
        load_pretrained_tokenizer(str(tmp_path), 6)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; give the folder"):
        load_pretrained_tokenizer(str(tmp_path / "file"), 6)
    with pytest.raises(ConfigError, match="no repository of the hub has such a name"):
        load_pretrained_tokenizer("../no/such/folder", 6)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="fetch it elsewhere and give its local folder"):
        load_pretrained_tokenizer("someone/something", 6)


def test_a_hub_name_is_read_from_the_hubs_cache(small, tmp_path, monkeypatch):
    """In the layout of the hub's own cache, as its library would have fetched it."""
    place = tmp_path / "models--someone--tower"
    small.save(place / "snapshots" / ("a" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert torch.equal(load_pretrained_tokenizer("someone/tower", 6)(["a fox"])[0], small(["a fox"])[0])


def test_the_tokenizer_of_a_lit_release_serves_another_run(small, tmp_path):
    small.save(tmp_path / "release" / "tokenizer")
    assert torch.equal(load_pretrained_tokenizer(str(tmp_path), 6)(["a fox"])[0], small(["a fox"])[0])
