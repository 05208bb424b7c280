"""Files of weights made elsewhere: .pth and .bin by torch.save, and .safetensors. What they say is never run."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maws.checkpoint import CheckpointError

ENTRIES = ("model", "state_dict", "base_model", "module", "trunk")  # where official codes put a model's tensors
PREFIXES = ("module.", "ema.", "_orig_mod.", "base_encoder.", "backbone.", "trunk.")  # wrappers around all of a model


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
    while isinstance(content, Mapping) and (inside := _inside(content, entry if not wrapper else "")):
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
    beside |= {str(name): "not a tensor" for name, value in content.items() if not isinstance(value, Tensor)}
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), ""):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None


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
        line = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is damaged, cut short, or no file of torch.save: {line}") from None
