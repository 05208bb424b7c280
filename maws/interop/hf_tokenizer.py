"""Our tokenizers as transformers reads them: tokenizer.json and tokenizer_config.json, which AutoTokenizer loads.

    write_tokenizer(release.folder / "tokenizer", output, context=100)

A small tokenizer of ours is a SentencePiece model; the tokenizers library computes the same from its pieces, their
scores and its table of characters. That table can only be had from the file, whose message (protobuf) is read here:

| message | field | what it is |
|---|---|---|
| ModelProto | 3 | NormalizerSpec |
| NormalizerSpec | 2 | precompiled_charsmap, bytes |

Field numbers: sentencepiece_model.proto of google/sentencepiece (Apache-2.0).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maws.data.tokenizer import JSON_FILE, MODEL_FILE, SPECIAL, CaptionTokenizer, load_tokenizer
from maws.files import write_json
from maws.models.text import BOS, EOS, UNKNOWN

MASK = "<mask>"  # the last id of XLM-R's numbering
NORMALIZER, CHARSMAP = 3, 2  # field numbers


def write_tokenizer(source: Path, folder: Path, context: int) -> None:
    """Write the tokenizer of a release. Raises DataError when there is none."""
    tokenizer = load_tokenizer(source, context)
    made = from_sentencepiece(tokenizer) if isinstance(tokenizer, CaptionTokenizer) else _read(source / JSON_FILE)
    _add_special(made)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / JSON_FILE))
    if isinstance(tokenizer, CaptionTokenizer):
        (folder / MODEL_FILE).write_bytes(tokenizer.model)
    write_json(folder / "tokenizer_config.json", _config(context))


def _config(context: int) -> dict[str, Any]:
    """XLM-R's, but for the class: that one would build the tokenizer anew in place of reading tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context + 2, "padding_side": "right",
        "bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<pad>", "mask_token": MASK, "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip


def _read(file: Path) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(file))


def _add_special(tokenizer: Any) -> None:
    """<s> before and </s> after, no padding or cut of its own: transformers does both."""
    from tokenizers import AddedToken, processors

    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (*SPECIAL, MASK)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )


def from_sentencepiece(tokenizer: CaptionTokenizer) -> Any:
    """A tokenizers.Tokenizer that gives the same ids: the unigram model, in fairseq's numbering (recipes §8.2)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = tokenizer.pieces
    own = [(pieces.id_to_piece(p), pieces.get_score(p)) for p in range(3, pieces.get_piece_size())]
    special = [(name, 0.0) for name, _ in sorted(SPECIAL.items(), key=lambda item: item[1])]
    made = Tokenizer(models.Unigram([*special, *own, (MASK, 0.0)], unk_id=UNKNOWN, byte_fallback=False))
    table = characters(tokenizer.model)
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    made.normalizer = normalizers.Sequence([normalizers.Precompiled(table), spaces] if table else [spaces])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return made


def characters(model: bytes) -> bytes:
    """The table by which a SentencePiece model changes characters before it looks for pieces; b"" when it has none."""
    spec = next((value for number, value in _fields(model) if number == NORMALIZER), b"")
    return next((value for number, value in _fields(spec) if number == CHARSMAP), b"")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and value of the fields of a protobuf message that have a length; others are passed over."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == 2:
            size, place = _varint(message, place)
            yield key >> 3, message[place : place + size]
            place += size
        elif kind == 0:
            _, place = _varint(message, place)
        else:
            place += 8 if kind == 1 else 4


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and the place after it."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
