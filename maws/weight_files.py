"""A model's weights on the disk: one safetensors file or, above a size, several with an index (Hugging Face's layout).

    model.safetensors
    model-00001-of-00003.safetensors …   and   model.safetensors.index.json: which tensor is in which file

Written and read one tensor at a time. The hash of a single file is its sha256; of several, the sha256 of one line
`HASH  NAME` for each, in the order of their names.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.config import ConfigError
from maws.files import PLAIN_NAME, sha256, write_json
from maws.tensor_file import Spec, TensorFile, specs_of, write_tensors

MAX_SHARD = 5 * 10**9  # bytes; Hugging Face's default
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


class Weights(NamedTuple):
    """Weights on their way to the disk: what each will be, and the values in the same order."""

    specs: Mapping[str, Spec]
    values: Iterable[tuple[str, Tensor]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Weights":
        specs = specs_of(tensors)
        return cls(specs, ((name, tensors[name]) for name in specs))

    @property
    def parameters(self) -> int:
        return sum(math.prod(spec.shape) for spec in self.specs.values())


def parse_size(text: str, plain: bool = True) -> int:
    """Bytes of `5GB` or `64GiB`; a number alone only where `plain`. Raises ConfigError for what is no size."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text.lower())
    unit = UNITS.get(found[2], 0) if found and (found[2] or plain) else 0
    if not found or not (size := round(float(found[1]) * unit)):
        raise ConfigError(f"{text!r} is not a size; write 5GB or 64GiB{', or a number of bytes' if plain else ''}")
    return size


def split(specs: Mapping[str, Spec], max_shard: int) -> list[dict[str, Spec]]:
    """Which tensors go into which file: in order, as many as fit, and always one."""
    shards: list[dict[str, Spec]] = [{}]
    room = max_shard
    for name, spec in specs.items():
        if spec.bytes > room and shards[-1]:
            shards.append({})
            room = max_shard
        shards[-1][name] = spec
        room -= spec.bytes
    return shards


def write_weights(folder: Path, stem: str, weights: Weights, max_shard: int = MAX_SHARD) -> None:
    """Write `stem`.safetensors or its shards into a folder; no more than one tensor is in memory here."""
    shards, values = split(weights.specs, max_shard), iter(weights.values)
    if len(shards) == 1:
        write_tensors(folder / f"{stem}.safetensors", shards[0], values, {"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, specs in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / name, specs, values, {"format": "pt"})
        places |= dict.fromkeys(specs, name)
    total = sum(spec.bytes for spec in weights.specs.values())
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def find_weights(folder: Path, stem: str = "model") -> Path | None:
    """The file, or the index of several; None when there is neither."""
    for path in (folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"):
        if path.is_file():
            return path
    return None


def weights_sha256(path: Path) -> str:
    """Hash of a file, or of those of an index. Raises CheckpointError for an index that is damaged."""
    if path.suffix == ".safetensors":
        return sha256(path)
    digest = hashlib.sha256()
    for name in sorted(set(_places(path).values())):
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path.parent / name} is missing, which {path.name} names")
        digest.update(f"{sha256(path.parent / name)}  {name}\n".encode())
    return digest.hexdigest()


class WeightFiles(AbstractContextManager["WeightFiles"]):
    """The tensors of a file or of an index, read one at a time. Raises CheckpointError when they are damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[Path, TensorFile] = {}
        if path.suffix == ".safetensors":
            self._places = dict.fromkeys(self._keys(path), path)
        else:
            self._places = {name: path.parent / file for name, file in _places(path).items()}
            for file in set(self._places.values()):
                if missing := [n for n, f in self._places.items() if f == file and n not in self._keys(file)]:
                    raise CheckpointError(f"{path} is damaged: {file.name} has no {missing[0]}")

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            file.__exit__()

    @property
    def names(self) -> list[str]:
        return sorted(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Read from the header alone."""
        return self._open(self._places[name]).spec(name).shape

    def read(self, name: str) -> Tensor:
        try:
            return self._open(self._places[name]).read(name)
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{self._places[name]} is damaged: {e}") from None

    def _keys(self, path: Path) -> set[str]:
        return self._open(path).keys()

    def _open(self, path: Path) -> TensorFile:
        if path not in self._files:
            try:
                self._files[path] = TensorFile(path)
            except (OSError, ValueError) as e:
                raise CheckpointError(f"{path} is damaged: {e}") from None
        return self._files[path]


def _places(index: Path) -> dict[str, str]:
    """Tensor -> file beside the index. Raises CheckpointError for an index that names others, or is not one."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        names = set(places.values())
        if not names or not all(re.fullmatch(PLAIN_NAME, name) and name.endswith(".safetensors") for name in names):
            raise ValueError("weight_map must name safetensors files in the folder of the index")
        return places
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{index} is damaged: {e!r}") from None
