"""Captions to token ids: XLM-R's numbering, of a sentencepiece.bpe.model or a tokenizer.json, or a small one of ours.

tok = load_tokenizer(folder, context=100); ids, mask = tok(["a red fox", "лиса"])        # B T, B T

Of a caption at most `context` pieces are kept, between <s> and </s>; the rest of a row is <pad>, which the mask leaves
out (recipes §8.2). A caption cannot name a special token: `</s>` in it is four letters and signs, or unknown.

Axes: B captions, T = context + 2 tokens.
"""

import io
import logging
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from maws.config import ConfigError
from maws.data.captions import clean_caption
from maws.hub import find_folder
from maws.models.text import BOS, EOS, PAD, UNKNOWN

log = logging.getLogger(__name__)

MODEL_FILE = "sentencepiece.bpe.model"  # the name XLM-R's own folder uses
JSON_FILE = "tokenizer.json"  # the tokenizers library's form of the same
MAX_FILE = 2**28  # bytes; XLM-R's own tokenizer.json has 17 million
CHARACTERS = 200  # read of a caption for each piece of the context: no piece of XLM-R's has more than 16
COVERAGE = 0.9995  # share of the characters that are pieces of their own, as for XLM-R; the rest is unknown
SPECIAL = {"<s>": BOS, "<pad>": PAD, "</s>": EOS, "<unk>": UNKNOWN}


class Tokenizer(ABC):
    """Captions in, ids and mask out."""

    context: int

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Ids that can occur, and those that the numbering reserves."""

    @abstractmethod
    def encode(self, caption: str) -> list[int]:
        """The ids of a caption's pieces, without special tokens and as many as there are."""

    @abstractmethod
    def save(self, folder: Path) -> None: ...

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both B T: at most `context` pieces between <s> and </s>."""
        ids = torch.full((len(captions), self.context + 2), PAD)
        mask = torch.zeros_like(ids)
        for row, there, caption in zip(ids, mask, captions, strict=True):  # one by one: a list would start threads
            pieces = self.encode(_readable(caption[: CHARACTERS * self.context]))[: self.context]
            row[: len(pieces) + 2] = torch.tensor([BOS, *pieces, EOS])
            there[: len(pieces) + 2] = 1
        return ids, mask


class CaptionTokenizer(Tokenizer):
    """SentencePiece in fairseq's numbering: <s> 0, <pad> 1, </s> 2, <unk> 3, piece p is id p + 1 (recipes §8.2)."""

    def __init__(self, model: bytes, context: int) -> None:
        """Raises DataError when that is no SentencePiece model, or one of another numbering."""
        import sentencepiece

        self.model, self.context = model, context
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as e:
            raise DataError(f"it is no SentencePiece model, or damaged: {e}") from None
        found = (self.pieces.unk_id(), self.pieces.bos_id(), self.pieces.eos_id())
        if found != (0, 1, 2):
            raise DataError(
                f"its pieces <unk>, <s>, </s> are numbers {found}; XLM-R's, which the text towers here read, 0, 1, 2"
            )

    @property
    def vocabulary(self) -> int:
        """The pieces, <pad>, and XLM-R's <mask>."""
        return self.pieces.get_piece_size() + 2

    def encode(self, caption: str) -> list[int]:
        return [p + 1 if p else UNKNOWN for p in self.pieces.encode(caption)]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self.model)

    def __reduce__(self) -> tuple[type["CaptionTokenizer"], tuple[bytes, int]]:
        return CaptionTokenizer, (self.model, self.context)


class PretrainedTokenizer(Tokenizer):
    """A tokenizer.json of transformers with XLM-R's special tokens, cut and padded in the same way."""

    def __init__(self, text: str, context: int) -> None:
        """Raises DataError when that is no tokenizer.json, or one of another numbering."""
        import tokenizers

        self.text, self.context = text, context
        try:
            self.tokenizer: Any = tokenizers.Tokenizer.from_str(text)
        except Exception as e:  # the library raises nothing narrower
            raise DataError(f"it is no tokenizer of the tokenizers library, or damaged: {str(e)[:200]}") from None
        found = {name: self.tokenizer.token_to_id(name) for name in SPECIAL}
        if found != SPECIAL:
            raise DataError(f"its special tokens are {found}; XLM-R's, which the text towers here read, {SPECIAL}")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "</s>" of a caption is text, but XLM-R has that piece
        added = self.tokenizer.get_added_tokens_decoder().items()
        self._special = {*SPECIAL.values(), *(number for number, token in added if token.special)}

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, caption: str) -> list[int]:
        ids = self.tokenizer.encode(caption, add_special_tokens=False).ids
        return [UNKNOWN if number in self._special else number for number in ids]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JSON_FILE).write_text(self.text, encoding="utf-8")

    def __reduce__(self) -> tuple[type["PretrainedTokenizer"], tuple[str, int]]:
        return PretrainedTokenizer, (self.text, self.context)


def _readable(caption: str) -> str:
    """Halves of surrogate pairs, which are no characters, made whole or replaced."""
    try:
        caption.encode()
        return caption
    except UnicodeEncodeError:
        return caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def fits(tokenizer: Tokenizer, rows: int) -> bool:
    """Whether it can be that of an embedding of so many rows: a few may be to spare (multilingual-e5-small has 35)."""
    return 0 <= rows - tokenizer.vocabulary <= rows // 1000


def train_tokenizer(
    captions: Iterable[str], vocabulary: int, context: int, clean: Callable[[str], str] = clean_caption
) -> CaptionTokenizer:
    """A unigram SentencePiece model of about `vocabulary` ids, the same for the same captions.

    It has fewer when the captions do not give so many pieces, and more when their scripts have too many characters.

    Raises DataError when there is no caption to learn from.
    """
    import sentencepiece

    lines = [_readable(line) for line in map(clean, captions) if line]
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
    """The tokenizer of a folder, such as that of a release. Raises DataError when it holds none, or a damaged one."""
    for name in (MODEL_FILE, JSON_FILE):
        file = folder / name
        if not file.is_file():
            continue
        try:
            if (size := file.stat().st_size) > MAX_FILE:
                raise DataError(f"it has {size:,} bytes, more than any tokenizer needs ({MAX_FILE:,})")
            if name == MODEL_FILE:
                return CaptionTokenizer(file.read_bytes(), context)
            return PretrainedTokenizer(file.read_text(encoding="utf-8"), context)
        except (DataError, OSError, UnicodeDecodeError) as e:
            raise DataError(f"{file} cannot be used: {e}") from None
    raise DataError(f"{folder} holds no tokenizer: expected {MODEL_FILE} or {JSON_FILE}")


def load_pretrained_tokenizer(name: str, context: int) -> Tokenizer:
    """The tokenizer of a folder of transformers, a name on the hub, or one of our LiT runs or releases.

    Raises ConfigError when there is no such folder, or no tokenizer in it; DataError for one that cannot be used.
    """
    folder = find_folder(name, [MODEL_FILE, JSON_FILE])
    for place in (folder, folder / "release" / "tokenizer", folder / "tokenizer"):
        if (place / MODEL_FILE).is_file() or (place / JSON_FILE).is_file():
            return load_tokenizer(place, context)
    raise ConfigError(
        f"text.pretrained={name}: it holds no tokenizer ({MODEL_FILE} or {JSON_FILE}), and the weights mean nothing "
        f"without theirs; copy it there, or leave text.pretrained empty to train a small tokenizer from the captions"
    )
