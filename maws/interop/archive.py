"""Files of weights made elsewhere: .pth and .bin by torch.save, and .safetensors. What they say is never run.

Tensors stay on the disk until they are used, and their memory is the system's to take back (both kinds are mapped).
"""

import argparse
import mmap
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.tensor_file import TensorFile

ENTRIES = ("model", "state_dict", "base_model", "module", "trunk")  # where official codes put a model's tensors
DEEPEST = 8  # entries inside each other; a pickle can hold itself
PREFIXES = ("module.", "ema.", "_orig_mod.", "base_encoder.", "backbone.", "trunk.")  # wrappers around all of a model


NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's number; Python names it from 3.13


@dataclass(frozen=True)
class Archive:
    """The tensors of a file by name; `wrapper` is the innermost entry they lay in ("" if none)."""

    tensors: dict[str, Tensor]
    wrapper: str = ""
    beside: dict[str, str] = field(default_factory=dict)  # what else is in the file, with the reason to leave it there


def read_archive(path: Path, entry: str = "") -> Archive:
    """Open a file and find the model in it: under `entry`, or else the entries that official codes use.

    Raises CheckpointError for a file that is missing, damaged, not a table of tensors, or would have to run code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; give one file of weights: .pth, .pt, .bin or .safetensors")
    content = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    wrapper, beside = "", dict[str, str]()
    for _ in range(DEEPEST):
        if not isinstance(content, Mapping) or not (inside := _inside(content, entry if not wrapper else "")):
            break
        beside |= {
            f"{name} (entry of the file)": "not weights of the model asked for" for name in content if name != inside
        }
        wrapper, content = inside, content[inside]
    if entry and not wrapper:
        held = ", ".join(map(str, content)) if isinstance(content, Mapping) and len(content) < 20 else "tensors"
        raise CheckpointError(f"{path} has no entry {entry} with weights in it; it holds {held}")
    return Archive(_tensors(path, content, beside), wrapper, beside)


def _inside(content: Mapping[Any, Any], entry: str) -> str:
    """The entry that holds the model, or "" where the tensors lie here."""
    names = (entry,) if entry else ENTRIES
    return next((name for name in names if isinstance(content.get(name), Mapping)), "")


def _tensors(path: Path, content: Any, beside: dict[str, str]) -> dict[str, Tensor]:
    """Names of tensors without a wrapper's prefix; what is not a tensor is noted in `beside`."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; weights are a dictionary of tensors by name")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path} has no tensors where they are looked for (its entries: {', '.join(map(str, content)) or 'none'}); "
            f"name the entry that holds the model"
        )
    for name, value in tensors.items():
        if not name.isprintable() or value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(f"{path}: {name!r} is no plain tensor ({value.layout} on {value.device}), or no name")
    beside |= {str(name): "not a tensor" for name, value in content.items() if not isinstance(value, Tensor)}
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), ""):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Views of the mapped file; what is written to them stays in memory. Safetensors' own reader maps so too, but a
    file larger than the machine's memory is refused there: nobody says that most of it will never be written to.
    """
    try:
        with TensorFile(path) as file, path.open("rb") as source:
            kind = mmap.MAP_PRIVATE | NORESERVE
            mapped = mmap.mmap(source.fileno(), 0, flags=kind, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            return {name: _view(file, name, mapped) for name in file.names}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None


def _view(file: TensorFile, name: str, mapped: mmap.mmap) -> Tensor:
    spec, place = file.spec(name), file.place(name)
    if not spec.bytes:
        return torch.empty(spec.shape, dtype=spec.dtype)
    count = spec.bytes // spec.dtype.itemsize
    return torch.frombuffer(mapped, dtype=spec.dtype, count=count, offset=place).view(spec.shape)


def _pickled(path: Path) -> Any:
    """What torch.save wrote, by torch's unpickler that only makes tensors and plain values.

    Official checkpoints also hold their command line: argparse.Namespace is an object that only has attributes.
    """
    mapped = zipfile.is_zipfile(path)  # the format of torch before 1.6 cannot stay on the disk
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        needed = re.search(r"GLOBAL ([\w.]+)|(?:unrecognized function|class) ([\w.<>]+)", str(error))
        if needed:
            raise CheckpointError(
                f"{path} wants to run {needed[1] or needed[2]} while it is opened; of a file that may come from anyone "
                f"only tensors and plain values are read. If you trust it, open it with the code that wrote it and "
                f"save its tensors alone, for example as .safetensors"
            ) from None
        if "TorchScript" in str(error):
            raise CheckpointError(f"{path} is a TorchScript archive, a program; save its state_dict() alone") from None
        lines = str(error).strip().splitlines()
        own = lines and not isinstance(error, pickle.UnpicklingError)  # that one's last line is about torch's manual
        reason = lines[-1] if own else type(error).__name__
        raise CheckpointError(f"{path} is damaged, cut short, or no file of torch.save: {reason}") from None
