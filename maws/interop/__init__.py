"""Weights of other projects, read and written: one file per layout, which is found by file name.

    found = read_foreign("mae_pretrain_vit_base.pth")      # layout, sizes and names by what is in the file
    tower = found.build()                                  # VisionTransformer or MaskedAutoencoder, loaded strictly
    print("\\n".join(found.report()))

A layout file has `detect(keys)`, `to_ours(tensors, heads)`, `from_ours(converted)` and WRAPPER, the entry of the file
that the official code puts the tensors in ("" if none).
"""

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.config import nearest
from maws.interop.archive import read_archive
from maws.interop.converted import Converted

LAYOUTS = ("swag", "lut", "long_seq_mae", "mae", "maws")  # the more particular first


class Layout(Protocol):
    WRAPPER: str

    def detect(self, keys: Collection[str]) -> bool:
        """Do these names of tensors follow the layout?"""
        ...

    def to_ours(self, tensors: Mapping[str, Tensor], heads: int = 0) -> Converted:
        """Under our names. `heads` of the encoder's attention, which no file says (0: by the width, models/vit.py).

        Raises CheckpointError for tensors that are missing, unknown, or of another shape than the rest implies.
        """
        ...

    def from_ours(self, converted: Converted) -> dict[str, Tensor]:
        """What the official code loads strictly. Raises CheckpointError where the layout has no place for a tensor."""
        ...


def load_layout(name: str) -> Layout:
    """A layout by name. Raises CheckpointError for an unknown one, with the nearest."""
    if name not in LAYOUTS:
        raise CheckpointError(f"there is no weight layout {name!r}; {nearest(name, LAYOUTS)}")
    return importlib.import_module(f"maws.interop.{name}")  # type: ignore[return-value]


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


def read_foreign(path: str | Path, layout: str = "auto", entry: str = "", heads: int = 0) -> Converted:
    """A file of another project under our names; tensors of a .pth stay on the disk until they are used.

    `entry` of a file that holds several sets of weights, such as model_ema; `heads` where the width does not tell.
    Raises CheckpointError, naming the file, for whatever cannot be read.
    """
    archive = read_archive(Path(path), entry)
    try:
        name = detect_layout(archive.tensors, archive.wrapper) if layout == "auto" else layout
        converted = load_layout(name).to_ours(archive.tensors, heads)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    converted.dropped.update(archive.beside)
    return converted


def write_foreign(path: str | Path, converted: Converted, layout: str) -> None:
    """Write what the official code of `layout` loads: .safetensors, or with torch.save in the entry it looks for."""
    path, chosen = Path(path), load_layout(layout)
    tensors = {name: value.contiguous() for name, value in chosen.from_ours(converted).items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save({chosen.WRAPPER: tensors} if chosen.WRAPPER else tensors, path)
