"""Where a pretrained text tower comes from: a folder of transformers, a name on the hub, or one of our LiT releases.

    shape = shape_from("models/xlm-roberta-base")
    load_pretrained(TextTower(shape), "models/xlm-roberta-base", gather, writer=dist.rank() == 0)

A folder of transformers has a config.json (model_type xlm-roberta or bert) and the weights: model.safetensors, several
with an index, or pytorch_model.bin, whose pickle is read without running anything of it. The names may stand behind
`roberta.` or `bert.`; heads and poolers are left there and listed. Of a hub name only such files are fetched.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maws import dist
from maws.checkpoint import CheckpointError
from maws.config import ConfigError, load_json
from maws.files import sha256
from maws.hub import find_folder
from maws.interop.archive import read_archive
from maws.models.init import Gather
from maws.models.text import LAYOUTS, TextShape, TextTower
from maws.release import Release, open_release
from maws.weight_files import WeightFiles, find_weights, weights_sha256

log = logging.getLogger(__name__)

CONFIG_FILES = ["config.json", "1_Pooling/config.json"]
WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
PICKLE = "pytorch_model.bin"
PREFIXES = ("", "roberta.", "bert.", "text.encoder.")  # of a tower alone, of one with a head, and of a LiT release
WORDS, TYPES = "embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"
LAYOUT_OF = {"xlm-roberta": "xlmr", "bert": "bert"}  # transformers' model_type -> ours
DEFAULT_CONTEXT = 100  # pieces, where the position table has so many rows (recipes §8.2)
MAX_SIZE = 10**7  # of any one size in a config.json: more than any tower has
MAX_CONFIG = 2**20  # bytes of a config.json
SHOWN = 4  # reasons in an error


def shape_from(name: str) -> TextShape:
    """The shape of a pretrained text tower, from its config.json alone.

    The context is 100 pieces or as many as there are positions for. The pool is "first", or what sentence-transformers'
    1_Pooling/config.json says. Raises CheckpointError for a model that is no such tower, ConfigError for no folder.
    """
    folder = find_folder(name, CONFIG_FILES)
    if release := _release(folder):
        return _released_shape(release)
    config = _config(folder / "config.json")
    try:
        sizes = _sizes(config)
        longest = sizes["positions"] - LAYOUTS[sizes["layout"]] - 2
        return TextShape(**sizes, context=min(DEFAULT_CONTEXT, longest), pool=_pool(folder))
    except ValueError as e:
        raise CheckpointError(f"{folder / 'config.json'}: {e}") from None


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """What a config.json of transformers says in our words. Raises ValueError for what a text tower cannot be."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in LAYOUT_OF:
        raise ValueError(f"model_type is {kind!r}; text towers are of {' or '.join(LAYOUT_OF)}")
    for key, only in (
        ("hidden_act", "gelu"), ("position_embedding_type", "absolute"), ("is_decoder", False),
        ("add_cross_attention", False), ("quantization_config", None),
    ):  # fmt: skip
        if config.get(key, only) != only:
            raise ValueError(f"{key} is {config[key]!r}; text towers here have {only!r}")
    if kind == "xlm-roberta" and config.get("pad_token_id", 1) != 1:
        raise ValueError(f"pad_token_id is {config['pad_token_id']!r}; XLM-R counts its positions from padding being 1")
    return {
        "width": _whole(config, "hidden_size"),
        "depth": _whole(config, "num_hidden_layers"),
        "heads": _whole(config, "num_attention_heads"),
        "vocabulary": _whole(config, "vocab_size"),
        "mlp": _whole(config, "intermediate_size"),
        "positions": _whole(config, "max_position_embeddings"),
        "types": _whole(config, "type_vocab_size"),
        "dropout": _share(config, "hidden_dropout_prob", 0.1),
        "eps": _share(config, "layer_norm_eps", 1e-12),
        "layout": LAYOUT_OF[kind],
    }


def _whole(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value <= MAX_SIZE:
        raise ValueError(f"{key} is {value!r}; expected a whole number from 1 to {MAX_SIZE:,}")
    return value


def _share(config: dict[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError(f"{key} is {value!r}; expected a number from 0 to below 1")
    return float(value)


def _pool(folder: Path) -> str:
    """How sentence-transformers pools this tower. Raises CheckpointError for a way that we have not."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return "first"
    modes = [key for key, value in _config(file).items() if key.startswith("pooling_mode_") and value is True]
    known = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean"}
    if len(modes) != 1 or modes[0] not in known:
        raise CheckpointError(
            f"{file} pools by {', '.join(modes) or 'nothing'}; text towers here pool by one of {', '.join(known)}. "
            f"Remove the file to have captions read at their first token"
        )
    return known[modes[0]]


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(
            f"{file.parent} holds no {file.name}; a pretrained text tower is a folder of transformers "
            f"(config.json and model.safetensors), or a LiT run or release"
        )
    if file.stat().st_size > MAX_CONFIG:
        raise CheckpointError(f"{file} has {file.stat().st_size:,} bytes; a config.json has at most {MAX_CONFIG:,}")
    try:
        return load_json(file)
    except (ConfigError, RecursionError) as e:
        raise CheckpointError(str(e)) from None


def _release(folder: Path) -> Release | None:
    """The LiT release a folder is, or the one of the run it is. Raises CheckpointError for that of another stage."""
    ours = (folder / "release").is_dir() or (folder / "preprocess.json").is_file()
    if not ours and ((folder / "config.json").is_file() and (folder / "checkpoints").is_dir()):
        ours = "stage" in _config(folder / "config.json")  # a run without a release: opening it says what to do
    if not ours:
        return None
    release = open_release(folder)
    if "text" not in release.config:
        raise CheckpointError(f"{folder} is a {' → '.join(release.lineage)} release, which has no text tower")
    return release


def _released_shape(release: Release) -> TextShape:
    try:
        return TextShape(**release.config["text"])
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{release.folder / 'config.json'}: its text cannot be used: {e}") from None


class _Source(Protocol):
    """Tensors by name."""

    @property
    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> Tensor: ...


class _Pickled:
    """The tensors of a pytorch_model.bin."""

    def __init__(self, path: Path) -> None:
        self._tensors = read_archive(path).tensors
        self.names = sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class TextWeights(AbstractContextManager["TextWeights"]):
    """The tensors of a pretrained text tower under the names of `TextTower.encoder`, read one at a time.

    Raises CheckpointError when there is no text tower in the files, or they are damaged.
    """

    def __init__(self, name: str) -> None:
        self.path = weights_path(name)
        self._source: _Source = _Pickled(self.path) if self.path.suffix == ".bin" else WeightFiles(self.path)
        names = self._source.names
        prefix = next((p for p in PREFIXES if p + WORDS in names), None)
        if prefix is None:
            raise CheckpointError(
                f"{self.path} holds no text tower: looked for {WORDS}, also behind "
                f"{', '.join(filter(None, PREFIXES))}; it has {len(names)} tensors, such as {', '.join(names[:3])}"
            )
        self._prefix = prefix
        self.names = {n.removeprefix(prefix) for n in names if n.startswith(prefix)}

    def __exit__(self, *exc: object) -> None:
        if isinstance(self._source, WeightFiles):
            self._source.__exit__(*exc)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._prefix + name)

    def read(self, name: str) -> Tensor:
        return self._source.read(self._prefix + name)

    def besides(self, taken: set[str]) -> list[str]:
        """What else is in the files, under the names it has there."""
        files = {self._prefix + name for name in taken}
        return [n for n in self._source.names if n not in files]


def weights_path(name: str) -> Path:
    """The file of a pretrained text tower's weights, or the index of several. Raises CheckpointError for none."""
    folder = find_folder(name, WEIGHT_FILES)
    if release := _release(folder):
        return release.weights
    if found := find_weights(folder):
        return found
    folder = find_folder(name, [PICKLE])
    if (folder / PICKLE).is_file():
        return folder / PICKLE
    raise CheckpointError(
        f"{folder} holds no weights: looked for {', '.join((*WEIGHT_FILES[:2], PICKLE))}; weights in other forms "
        f"(several .bin files, TensorFlow's) become model.safetensors by transformers' save_pretrained"
    )


def pretrained_sha256(name: str) -> str:
    """Hash of the files that the weights of a text tower come from (several: weight_files.py)."""
    path = weights_path(name)
    return sha256(path) if path.suffix == ".bin" else weights_sha256(path)


@torch.no_grad()
def load_pretrained(tower: TextTower, name: str, gather: Gather, writer: bool) -> list[str]:
    """Give a (possibly partitioned) text tower pretrained weights, tensor by tensor; all ranks take part.

    Only the `writer`, one rank, opens the files of weights; it returns the names of tensors that were left in them.
    Raises CheckpointError on every rank when they do not fit.
    """
    own = [(n, p) for n, p in tower.encoder.named_parameters()]
    reasons, dropped, weights = list[str](), list[str](), None
    if writer:
        try:
            weights = TextWeights(name)
            reasons = different_shape(shape_from(name), tower.shape) or _different_tensors(weights, own, tower.shape)
            dropped = weights.besides({n for n, _ in own})
        except (CheckpointError, ConfigError) as e:
            reasons = [str(e)]
    if reasons := dist.broadcast(reasons):
        raise CheckpointError(f"{name} does not fit this text tower: {'; '.join(reasons[:SHOWN])}")
    for key, param in own:
        with gather([param]):
            if weights is not None:
                param.copy_(weights.read(key) if key in weights.names else torch.zeros(param.shape))
    if weights is not None:
        weights.__exit__()
        listed = Counter(re.sub(r"\.\d+(?=\.)", ".*", n) for n in dropped)
        log.info("text tower: %d tensors from %s", len(own), weights.path)
        log.info("  dropped %d tensors: %s", len(dropped), ", ".join(listed) or "none")
    return dropped


def different_shape(there: TextShape, here: TextShape) -> list[str]:
    """Why weights of one shape would compute something else in another; empty when they would not."""
    a, b = (asdict(shape) | {"mlp": shape.mlp or 4 * shape.width} for shape in (there, here))
    free = ("context", "dropout", "pool")  # not of the weights
    wrong = [f"{k} {a[k]} there and {b[k]} here" for k in a if k not in free and a[k] != b[k]]
    return [f"{', '.join(wrong)}: leave text.variant empty to take its own sizes"] if wrong else []


def _different_tensors(weights: TextWeights, own: Sequence[tuple[str, nn.Parameter]], shape: TextShape) -> list[str]:
    """Tensors that are missing, of another size, no floating-point numbers, or not finite."""
    zeros = {TYPES} if shape.layout == "xlmr" and shape.types == 1 else set()  # torchtext's has none (recipes §11.5)
    reasons = []
    for name, param in own:
        if name not in weights.names:
            reasons += [] if name in zeros else [f"it has no tensor {name}"]
            continue
        there, here = weights.shape(name), tuple(getattr(param, "ds_shape", param.shape))
        if there != here:
            reasons.append(f"{name} is {there} there and {here} here")
        elif not _numbers(weights.read(name)):
            reasons.append(f"{name} holds no floating-point numbers, or some that are not finite")
    return reasons


def _numbers(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())
