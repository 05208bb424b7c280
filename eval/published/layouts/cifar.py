"""CIFAR-10 and CIFAR-100 in their binary version: label bytes, then 3 x 32 x 32 bytes of red, green and blue.

    cifar-10-batches-bin/data_batch_1.bin … test_batch.bin      1 + 3072 bytes a picture; batches.meta.txt
    cifar-100-binary/train.bin, test.bin                        coarse, fine + 3072; fine_label_names.txt

The version for Python is refused: it is pickled, and unpickling a file runs whatever is in it. Pictures are given as
PNG, which keeps every pixel. options: `files`, `folder` (or several), `labels` (bytes before a picture; the last is the
class), `names`: the file with the class names.
"""

import io
from typing import Final

import numpy as np
from PIL import Image

from data_pipeline.errors import DataError
from eval.published.description import Published, Split
from eval.published.listing import Listing
from eval.published.text import read_lines
from eval.published.tree import Tree, first

SIDE: Final = 32
PIXELS: Final = 3 * SIDE * SIDE
PYTHON: Final = ("cifar-10-batches-py", "cifar-100-python")
PICKLED: Final = ("data_batch_1", "test_batch", "train", "test")  # files of the version for Python


def read(tree: Tree, split: Split, published: Published) -> Listing:
    options = split.options
    base = _folder(tree, split, published)
    start = f"{base}/" if base else ""
    before = int(options["labels"])
    listing = Listing([], [], [], lists=(start + options["names"],))
    if tree.size(start + options["names"]) is None:
        raise DataError(f"{tree.root} has no {start}{options['names']}; unpack the published archive whole")
    names = read_lines(tree, start + options["names"])
    if len(names) != published.num_classes:
        raise DataError(
            f"{tree.root / start / options['names']} lists {len(names)} classes, not {published.num_classes}"
        )
    batches: list[np.ndarray] = []
    for name in options["files"]:
        if tree.size(start + name) is None:
            raise DataError(f"{tree.root} has no {start}{name}; unpack the published archive whole")
        batches.append(_batch(tree, start + name, before))
        listing.files += [start + name] * len(batches[-1])
    rows = np.concatenate(batches)
    labels = rows[:, before - 1].astype(int)
    if labels.max(initial=0) >= len(names):
        raise DataError(f"{tree.root / start} has label {labels.max()}; {published.name} has {len(names)} classes")
    listing.labels = labels.tolist()
    places = [(name, row) for name, batch in zip(options["files"], batches, strict=True) for row in range(len(batch))]
    listing.keys = [f"{name}/{row}" for name, row in places]
    listing.read = lambda position: _png(rows[position, before:])
    return listing


def _folder(tree: Tree, split: Split, published: Published) -> str:
    """Where the binary files lie; pickled ones are told apart by their names."""
    wanted = split.options["folder"]
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    found = [name for name in names if tree.size(f"{name}/{split.options['files'][0]}".lstrip("/")) is not None]
    if found:
        return found[0]
    pickled = any(tree.has_folder(name) for name in PYTHON) or any(tree.size(name) is not None for name in PICKLED)
    if pickled:
        raise DataError(
            f"{tree.root} holds the version of {published.title} for Python, which is pickled: unpickling a file can "
            f"run any program in it, so it is not read. Get the binary version, {published.archives[0].name}, from "
            f"{published.source}"
        )
    return first(tree, [name for name in names if name], f"{split.name} pictures of {published.name}")


def _batch(tree: Tree, name: str, before: int) -> np.ndarray:
    """N (labels + pixels), bytes."""
    data = np.frombuffer(tree.read_list(name), dtype=np.uint8)
    if not len(data) or len(data) % (before + PIXELS):
        raise DataError(
            f"{tree.root / name} has {len(data):,} bytes, no multiple of {before + PIXELS:,}: it is cut off; "
            f"copy it again"
        )
    return data.reshape(-1, before + PIXELS)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.reshape(3, SIDE, SIDE).transpose(1, 2, 0)).save(buffer, "png", compress_level=1)
    return buffer.getvalue()
