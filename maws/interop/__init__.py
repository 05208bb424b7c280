"""Weights of other projects, read and written: one file per layout, which is found by file name.

    found = read_foreign("mae_pretrain_vit_base.pth")      # layout, sizes and names by what is in the file
    model = found.build()                                  # VisionTransformer, MaskedAutoencoder or TwoTower, strictly
    print("\n".join(found.report()))

A layout of a file has `detect(keys)`, `to_ours(tensors, heads)`, `from_ours(converted)` and WRAPPER, the entry of the
file that the official code puts the tensors in ("" if none). A layout of a library's folder has `read_folder(path)`.
"""

import importlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.config import nearest
from maws.interop.archive import read_archive
from maws.interop.converted import Converted, ConvertedClip
from maws.tensor_file import specs_of, write_tensors

LAYOUTS = ("maws_clip", "swag", "lut", "long_seq_mae", "mae", "maws")  # of files; the more particular first
FOLDERS = ("timm", "open_clip")  # what these libraries save: a folder, or the file of weights in it
OURS = "ours"
SAVED = r"(model|ema|pytorch_model|open_clip_model|open_clip_pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin|pth)"


class Layout(Protocol):
    WRAPPER: str

    def detect(self, keys: Collection[str]) -> bool:
        """Do these names of tensors follow the layout?"""
        ...

    def to_ours(self, tensors: Mapping[str, Tensor], heads: int = 0) -> Converted | ConvertedClip:
        """Under our names. `heads` of the encoder's attention, which no file says (0: by the width, models/vit.py).

        Raises CheckpointError for tensors that are missing, unknown, or of another shape than the rest implies.
        """
        ...

    def from_ours(self, converted: Converted) -> dict[str, Tensor]:
        """What the official code loads strictly. Raises CheckpointError where the layout has no place for a tensor."""
        ...


class FolderLayout(Protocol):
    def read_folder(self, path: Path, heads: int = 0) -> Converted | ConvertedClip:
        """A folder of the library, or its file of weights, under our names. Raises CheckpointError as Layout does."""
        ...


def load_layout(name: str) -> Layout:
    """A layout of files by name. Raises CheckpointError for an unknown one, with the nearest."""
    if name not in LAYOUTS:
        raise CheckpointError(f"there is no weight layout {name!r}; {nearest(name, (*LAYOUTS, *FOLDERS))}")
    return importlib.import_module(f"maws.interop.{name}")  # type: ignore[return-value]


def load_folder_layout(name: str) -> FolderLayout:
    assert name in FOLDERS
    return importlib.import_module(f"maws.interop.{name}_layout")  # type: ignore[return-value]


def detect_layout(keys: Collection[str], wrapper: str = "") -> str:
    """The layout whose names these are. Raises CheckpointError when none is.

    An encoder alone has the same names in MAE's and in MAWS's files: MAE's lie in an entry `model`.
    """
    found = [name for name in LAYOUTS if load_layout(name).detect(keys)]
    if not found:
        some = ", ".join(sorted(keys)[:6])
        raise CheckpointError(
            f"the names of the tensors follow none of the layouts {', '.join(LAYOUTS)}; there are {len(keys)}, such as "
            f"{some}; name the layout if one of them is meant"
        )
    in_it = [name for name in found if wrapper == load_layout(name).WRAPPER]
    return (in_it or found)[0]


def saved_by(folder: Path) -> str:
    """The library that saved a folder, OURS for a run or a release, "" for another one."""
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    try:
        said = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        said = {}
    if isinstance(said, dict) and "architecture" in said:
        return "timm"
    if isinstance(said, dict) and {"stage", "lineage"} <= said.keys():
        return OURS
    return ""


def detect_folder(path: Path) -> str:
    """The library that saved a folder, or the file of weights in it, whose config.json says how its images are made.

    "" for other files. Raises CheckpointError for another folder, and for a release of ours or its files.
    """
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and not re.fullmatch(SAVED, path.name):
        return ""
    if (library := saved_by(folder)) == OURS:
        raise CheckpointError(f"{folder} is a release of ours already; use it as it is")
    if path.is_dir() and not library:
        raise CheckpointError(
            f"{path} is not a file; give one file of weights: .pth, .pt, .bin or .safetensors, or a folder that timm "
            f"or open_clip saved"
        )
    return library


def read_foreign(path: str | Path, layout: str = "auto", entry: str = "", heads: int = 0) -> Converted | ConvertedClip:
    """What another project saved under our names; tensors stay on the disk until they are used.

    `entry` of a file that holds several sets of weights, such as model_ema; `heads` where the width does not tell.
    Raises CheckpointError, naming the file, for whatever cannot be read.
    """
    return open_foreign(path, layout, entry, heads).converted


class Foreign(NamedTuple):
    """What a file holds: under our names, and under its own (nothing for a library's folder)."""

    converted: Converted | ConvertedClip
    tensors: Mapping[str, Tensor]


def open_foreign(path: str | Path, layout: str = "auto", entry: str = "", heads: int = 0) -> Foreign:
    """`read_foreign` for those who also look at the file's own names."""
    path = Path(path)
    if layout == "auto":
        layout = detect_folder(path) or layout
    if layout in FOLDERS:
        if not path.exists():
            raise CheckpointError(f"{path} is not there; give a folder that {layout} saved, or its file of weights")
        return Foreign(load_folder_layout(layout).read_folder(path, heads), {})
    archive = read_archive(path, entry)
    try:
        name = detect_layout(archive.tensors, archive.wrapper) if layout == "auto" else layout
        converted = load_layout(name).to_ours(archive.tensors, heads)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    converted.dropped.update(archive.beside)
    return Foreign(converted, archive.tensors)


def write_foreign(path: str | Path, converted: Converted | ConvertedClip, layout: str) -> None:
    """Write what the official code of `layout` loads: .safetensors, or with torch.save in the entry it looks for.

    The file is there whole or not at all.
    """
    path, chosen = Path(path), load_layout(layout)
    if converted.shape.pool == "mean_norm" and layout != "mae":
        raise CheckpointError(
            f"{layout}'s models norm every token and this one the mean of its patches; write it as mae"
        )
    tensors = chosen.from_ours(converted)  # type: ignore[arg-type]
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        if path.suffix == ".safetensors":
            specs = specs_of(tensors)
            write_tensors(tmp, specs, ((name, tensors[name]) for name in specs), {"format": "pt"})
        else:
            tensors = {name: value.contiguous() for name, value in tensors.items()}
            torch.save({chosen.WRAPPER: tensors} if chosen.WRAPPER else tensors, tmp)
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
