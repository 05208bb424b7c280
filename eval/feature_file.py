"""The cache of features: RUN/features/*.safetensors, one file for each thing that features depend on.

    identity = identity_of(encode, dataset, "tower")       # everything that a feature depends on, as text
    write(path, identity, Table({"cls": features}, rows, broken)); read(path, identity, "cls")

The name of a file is only where to look: what it is of stands in it whole, with the hash of each tensor, and a file
that is not of exactly this, or not as it was written, counts as not there. Written under another name and then renamed,
so that two processes that make the same file only do so twice.
"""

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import features as codecs
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.files import sync_folder
from eval.datasets import Dataset
from maws.tensor_file import TensorFile, specs_of, write_tensors

if TYPE_CHECKING:
    from eval.encoder import Encoder

log = logging.getLogger(__name__)

FORMAT: Final = 4  # of the cache
ROWS: Final = "rows"
CODECS: Final = ("libjpeg_turbo", "jpg", "webp", "littlecms2", "libtiff")  # in Pillow's wheels: their pixels differ
LIBRARIES: Final = ("torch", "timm", "pillow")
ROOT: Final = Path(__file__).resolve().parent.parent
CODE: Final = (  # what turns bytes into pixels and pixels into features
    "data_pipeline/images.py", "data_pipeline/srgb.py", "eval/decode.py", "eval/encoder.py", "eval/resolution.py",
    "maws/data/photo.py", "maws/data/transforms.py", "maws/models/attention.py", "maws/models/patch_embed.py",
    "maws/models/pos_embed.py", "maws/models/two_tower.py", "maws/models/vit.py",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Features of the readable pictures of a data set, and which these are."""

    features: dict[str, Tensor]  # N D of each kind, float32, on the CPU
    rows: Tensor  # N, positions in the data set
    broken: dict[str, int]  # the others, by reason


def identity_of(encode: "Encoder", dataset: Dataset, source: str) -> str:
    """All that features depend on, but for the size of a batch, which changes last bits."""
    config: Mapping[str, Any] = encode.release.config if encode.release else {}
    facts = {
        "format": FORMAT,
        "source": source,
        "weights": encode.sha256,
        "model": config.get("model"),  # heads and pooling are not in the weights
        "trained_at": config.get("image_size"),  # positions are interpolated from there
        "preprocess": asdict(encode.preprocess),
        "precision": encode.precision,
        "device": encode.device.type,
        "data": dataset.sha256,
        "software": software(),
    }
    return json.dumps(facts, sort_keys=True)


@cache
def software() -> dict[str, str]:
    """Versions of what decodes and computes, and the hash of our own code for it."""
    own = hashlib.sha256()
    for name in CODE:
        own.update(f"{name}\0".encode() + (ROOT / name).read_bytes() + b"\0")
    found = {name: version(name) for name in LIBRARIES}
    return found | {name: str(codecs.version(name)) for name in CODECS} | {"code": own.hexdigest()}


def place(folder: Path, source: str, dataset: Dataset, identity: str) -> Path:
    name = re.sub(r"[^\w.-]", "_", dataset.name)[:60]
    return folder / f"{source}-{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"


def read(path: Path, identity: str, kind: str) -> Table | None:
    """One kind of features of a file; None for a file that is not there, of something else, or damaged (a warning)."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:  # checks the header, and that the file is as long as that says
            metadata = stored.metadata() or {}
        if metadata.get("identity") != identity:
            return None
        with TensorFile(path) as file:
            found = {name: file.read(name) for name in (kind, ROWS)}
        hashes = json.loads(metadata["sha256"])
        if wrong := [name for name, tensor in found.items() if hashes[name] != _sha256(tensor)]:
            raise ValueError(f"{wrong[0]} is not as it was written")
        return Table({kind: found[kind]}, found[ROWS], json.loads(metadata["broken"]))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        log.warning("warning: the cached features %s are damaged (%s) and are made again", path, error)
        return None


def write(path: Path, identity: str, table: Table) -> None:
    """Tensor after tensor, without a second copy of them. A cache that cannot be written is only a warning."""
    tensors = {**table.features, ROWS: table.rows}
    specs = specs_of(tensors)
    metadata = {
        "identity": identity,
        "broken": json.dumps(table.broken),
        "sha256": json.dumps({name: _sha256(tensor) for name, tensor in tensors.items()}),
    }
    temporary = path.with_name(f".{path.name}.{secrets.randbits(64)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_tensors(temporary, specs, ((name, tensors[name]) for name in specs), metadata)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        log.warning("warning: features are not cached, cannot write %s (%s)", path, error)


def _sha256(tensor: Tensor) -> str:
    array = np.ascontiguousarray(tensor.numpy())
    return hashlib.sha256(memoryview(array.reshape(-1).view(np.uint8))).hexdigest()  # type: ignore[arg-type]
