"""A safetensors file written one tensor at a time, hashed on its way to the disk, and read part by part.

    size, digest = write_tensors(path, {"norm.weight": Spec(torch.float32, (768,))}, [("norm.weight", tensor)])
    with TensorFile(path) as file: tensor = file.read("norm.weight")

The layout is the format's own (eight bytes with the length of a JSON header, the header, the values without gaps), as
safetensors' `save_file` writes it; but that wants all tensors in memory at once, and the file read again for its hash.
Its reader maps the whole file as private memory, which a machine smaller than the file refuses; this one maps nothing.
"""

import hashlib
import json
import math
import os
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 24  # bytes written and hashed at a time
MAX_HEADER = 100_000_000  # bytes; the format's own limit
NAMES = {  # the format's names of those types that weights, moments and buffers have
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Spec(NamedTuple):
    """What a tensor will be, known before its values are."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Wide types first: each value then begins at a multiple of its size, which readers of mapped files rely on."""
    wide_first = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    return {name: Spec(t.dtype, tuple(t.shape)) for name, t in wide_first}


def write_tensors(
    path: Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] = {}
) -> tuple[int, str]:
    """Write tensors, which come in the order of `specs`, and wait until they are on the disk: (bytes, sha256).

    Tensors are on the CPU; those of another type are converted. More than `specs` names are left where they are.
    Raises OSError when the disk is full and the like; what was written by then stays.
    """
    digest, size = hashlib.sha256(), 0
    source = iter(tensors)
    with path.open("wb", buffering=0) as file:
        size += _put(file, digest, header(specs, metadata))
        for name, spec in specs.items():
            got, value = next(source)
            assert got == name and tuple(value.shape) == spec.shape, f"{got} {tuple(value.shape)} in place of {name}"
            flat = value.detach().to(spec.dtype).contiguous().reshape(-1)
            size += _put(file, digest, memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def header(specs: Mapping[str, Spec], metadata: Mapping[str, str] = {}) -> bytes:
    """What stands before the values: padded with blanks, so that those begin at a multiple of eight bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, spec in specs.items():
        entries[name] = {
            "dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [place, place + spec.bytes]
        }  # fmt: skip
        place += spec.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _put(file: BinaryIO, digest: "hashlib._Hash", data: bytes | memoryview) -> int:
    """Both steps let other threads of this process work meanwhile."""
    view = memoryview(data)
    for start in range(0, len(view), CHUNK):
        part = view[start : start + CHUNK]
        digest.update(part)
        while part:
            part = part[file.write(part) :]
    return len(view)


class TensorFile(AbstractContextManager["TensorFile"]):
    """The tensors of a file, which is not trusted. Raises ValueError when it is not what it should be, and OSError."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._descriptor)  # also for those who read on and on
        self._start, self._entries = _read_header(self._descriptor)

    def __exit__(self, *exc: object) -> None:
        self._close()

    def keys(self) -> set[str]:
        return set(self._entries)

    @property
    def names(self) -> list[str]:
        """In the order of the header."""
        return list(self._entries)

    def place(self, name: str) -> int:
        """Where the values of a tensor begin, in bytes from the start of the file."""
        return self._start + self._entries[name][1]

    def spec(self, name: str) -> Spec:
        """Raises KeyError for a tensor that is not there, as the functions below do."""
        return self._entries[name][0]

    def read(self, name: str) -> Tensor:
        spec = self.spec(name)
        return self.read_flat(name, 0, math.prod(spec.shape)).view(spec.shape)

    def read_flat(self, name: str, first: int, last: int) -> Tensor:
        """Elements [first, last) of a tensor seen as one row."""
        spec = self.spec(name)
        out = torch.empty(last - first, dtype=spec.dtype)
        view = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
        offset = self.place(name) + first * spec.dtype.itemsize
        while view:
            got = os.preadv(self._descriptor, [view], offset)
            if not got:
                raise ValueError(f"it ends inside {name}")
            view, offset = view[got:], offset + got
        return out


TYPES = {name: dtype for dtype, name in NAMES.items()}


def _read_header(descriptor: int) -> tuple[int, dict[str, tuple[Spec, int]]]:
    """Where the values begin; and what each tensor is, and its place among them."""
    size, length = os.fstat(descriptor).st_size, int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or not 0 < length <= min(MAX_HEADER, size - 8):
        raise ValueError("it is no safetensors file: its header does not fit in it")
    start, entries = 8 + length, dict[str, tuple[Spec, int]]()
    try:
        for name, entry in json.loads(os.pread(descriptor, length, 8)).items():
            if name != "__metadata__":
                entries[name] = _entry(entry, size - start)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"its header cannot be used: {e!r}") from None
    if start + sum(spec.bytes for spec, _ in entries.values()) != size:
        raise ValueError("its size is not what its header says")
    return start, entries


def _entry(entry: dict[str, Any], room: int) -> tuple[Spec, int]:
    spec = Spec(TYPES[entry["dtype"]], tuple(entry["shape"]))
    first, last = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*spec.shape, first, last)) or not first <= last <= room:
        raise ValueError("it names places outside of the file")
    if last - first != spec.bytes:
        raise ValueError("a tensor's shape does not fill its place")
    return spec, first
