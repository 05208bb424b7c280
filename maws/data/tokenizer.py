"""Captions to token ids: XLM-R's SentencePiece numbering, and a small tokenizer trained from a shard set's captions.

tok = load_tokenizer(folder); ids, mask = tok(["a red fox", "лиса"])        # B T, B T
"""

import io
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from maws.config import ConfigError
from maws.data.captions import clean_caption
from maws.models.text import BOS, EOS, PAD, UNKNOWN

log = logging.getLogger(__name__)

MODEL_FILE = "sentencepiece.bpe.model"  # the name XLM-R's own folder uses
COVERAGE = 0.9995  # share of the characters that are pieces of their own, as for XLM-R; the rest is unknown


class CaptionTokenizer:
    """SentencePiece in fairseq's numbering: <s> 0, <pad> 1, </s> 2, <unk> 3, piece p is id p + 1 (recipes §8.2)."""

    def __init__(self, model: bytes, context: int) -> None:
        import sentencepiece

        self.model, self.context = model, context
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)

    @property
    def vocabulary(self) -> int:
        """Ids that can occur, plus XLM-R's <mask>."""
        return self.pieces.get_piece_size() + 2

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both B T, T = context + 2: at most `context` pieces between <s> and </s>."""
        ids = torch.full((len(captions), self.context + 2), PAD)
        for row, caption in zip(ids, captions, strict=True):  # one by one: a list would start threads for each call
            known = [p + 1 if p else UNKNOWN for p in self.pieces.encode(caption)[: self.context]]
            row[: len(known) + 2] = torch.tensor([BOS, *known, EOS])
        return ids, (ids != PAD).long()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self.model)

    def __reduce__(self) -> tuple[type["CaptionTokenizer"], tuple[bytes, int]]:
        return CaptionTokenizer, (self.model, self.context)


class PretrainedTokenizer:
    """A tokenizer folder or hub name of transformers (XLM-R's, in practice), cut and padded in the same way."""

    def __init__(self, name: str, context: int) -> None:
        from transformers import AutoTokenizer

        self.name, self.context = name, context
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as e:
            raise ConfigError(
                f"text.pretrained={name}: no tokenizer could be loaded from it ({e}); give a local folder, "
                f"or leave text.pretrained empty to train a small tokenizer from the captions"
            ) from None

    @property
    def vocabulary(self) -> int:
        return len(self.tokenizer)

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        out = self.tokenizer(
            list(captions), max_length=self.context + 2, truncation=True, padding="max_length", return_tensors="pt"
        )
        return out["input_ids"], out["attention_mask"]

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


Tokenizer = CaptionTokenizer | PretrainedTokenizer


def train_tokenizer(captions: Iterable[str], vocabulary: int, context: int) -> CaptionTokenizer:
    """A unigram SentencePiece model of about `vocabulary` ids, the same for the same captions.

    It has fewer when the captions do not give so many pieces, and more when their scripts have too many characters.

    Raises DataError when there is no caption to learn from.
    """
    import sentencepiece

    lines = [line for line in map(clean_caption, captions) if line]
    if not lines:
        raise DataError("no sample has a caption, so no tokenizer can be trained; LiT needs images with captions")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        vocab_size=max(vocabulary, 2 * characters(lines)) - 2,  # fairseq's numbering adds <pad> and <mask>
        model_type="unigram",
        character_coverage=COVERAGE,
        hard_vocab_limit=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        num_threads=1,
        shuffle_input_sentence=False,
        minloglevel=2,
    )  # fmt: skip
    return CaptionTokenizer(out.getvalue(), context)


def characters(lines: Sequence[str]) -> int:
    """How many different characters make up the share of the text that every piece set must cover."""
    counts = sorted(Counter(unicodedata.normalize("NFKC", "".join(lines))).values(), reverse=True)
    total, seen = sum(counts), 0
    for n, count in enumerate(counts, start=1):
        seen += count
        if seen >= COVERAGE * total:
            return n
    return len(counts)


def load_tokenizer(folder: Path, context: int) -> Tokenizer:
    """The tokenizer a release was trained with. Raises DataError when the folder holds none."""
    if (folder / MODEL_FILE).is_file():
        return CaptionTokenizer((folder / MODEL_FILE).read_bytes(), context)
    if (folder / "tokenizer.json").is_file():
        return PretrainedTokenizer(str(folder), context)
    raise DataError(f"{folder} holds no tokenizer: expected {MODEL_FILE} or tokenizer.json")
