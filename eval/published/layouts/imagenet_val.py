"""The validation pictures of ImageNet-1k: as class folders, or flat as in the archive with a list of their classes.

    val/n01440764/ILSVRC2012_val_00000293.JPEG       class folders
    val/ILSVRC2012_val_00000001.JPEG                 flat, with the first of these that is there:
      imagenet_2012_validation_synset_labels.txt     a wnid a line, in the order of the files
      LOC_val_solution.csv                           ILSVRC2012_val_00048981,n03995372 85 1 499 272 …
      val.txt                                        ILSVRC2012_val_00000001.JPEG 65       sorted wnids count from 0
      ILSVRC2012_devkit_t12/data/…_ground_truth.txt  490       ids of the devkit, which data/meta.mat explains

options: `folder`, or several.
"""

import re
from typing import Final

from data_pipeline.errors import DataError
from eval.classes import read_classes
from eval.published.description import Published, Split
from eval.published.layouts import class_folders
from eval.published.listing import Listing
from eval.published.mat import load, squeezed
from eval.published.text import number, read_lines
from eval.published.tree import Tree, first, is_picture

WNIDS: Final = ("imagenet_2012_validation_synset_labels.txt",)
KAGGLE: Final = ("LOC_val_solution.csv",)
CAFFE: Final = ("val.txt",)
DEVKIT: Final = tuple(
    f"{folder}ILSVRC2012_validation_ground_truth.txt"
    for folder in ("ILSVRC2012_devkit_t12/data/", "devkit/data/", "data/", "")
)
_NUMBER: Final = re.compile(r"_(\d{8})\.JPEG", re.IGNORECASE)


def read(tree: Tree, split: Split, published: Published) -> Listing:
    base = first(tree, split.options.get("folder", ""), f"{split.name} pictures of {published.name}")
    if any(re.fullmatch(r"n\d{8}", name) for name in tree.folders(base)):
        return class_folders.read(tree, split, published)
    start = f"{base}/" if base else ""
    names = [name for name in tree.files(base) if is_picture(name)]
    if not names:
        raise DataError(f"{tree.root / base} holds neither class folders (n01440764 …) nor ILSVRC2012_val_*.JPEG")
    places = {name: _place(name, tree) for name in names}
    wnids, lists = _wnids(tree, published)
    if missing := [name for name, place in places.items() if place not in wnids]:
        raise DataError(f"{lists[0]} in {tree.root} has {len(wnids):,} lines, and none for {missing[0]}")
    listed = {place: name for name, place in places.items()}
    files = [start + listed.get(place, f"ILSVRC2012_val_{place:08d}.JPEG") for place in sorted(wnids)]
    keys = [file.removeprefix(start) for file in files]
    return Listing(files, [wnids[place] for place in sorted(wnids)], keys, lists=lists)


def _place(name: str, tree: Tree) -> int:
    fits = _NUMBER.search(name)
    if fits is None:
        raise DataError(
            f"{tree.root} holds {name} among the validation pictures; they are ILSVRC2012_val_00000001.JPEG …"
        )
    return int(fits[1])


def _wnids(tree: Tree, published: Published) -> tuple[dict[int, str], tuple[str, ...]]:
    """The wnid of each picture by its number from 1, and the lists that say so."""
    for kind, names in ((_plain, WNIDS), (_kaggle, KAGGLE), (_caffe, CAFFE), (_devkit, DEVKIT)):
        for name in names:
            if tree.size(name) is not None:
                return kind(tree, name)
    raise DataError(
        f"{tree.root} holds the validation pictures of {published.name} without their classes: put {DEVKIT[0]} and "
        f"{DEVKIT[0].rpartition('/')[0]}/meta.mat of ILSVRC2012_devkit_t12.tar.gz there, or {WNIDS[0]}, or "
        f"{KAGGLE[0]}, or move each picture into the folder of its class"
    )


def _plain(tree: Tree, name: str) -> tuple[dict[int, str], tuple[str, ...]]:
    return dict(enumerate(read_lines(tree, name), 1)), (name,)


def _kaggle(tree: Tree, name: str) -> tuple[dict[int, str], tuple[str, ...]]:
    found: dict[int, str] = {}
    for line, text in enumerate(read_lines(tree, name)[1:], 2):
        picture, comma, boxes = text.partition(",")
        if not comma or not boxes.split():
            raise DataError(f"line {line} of {tree.root / name} is not PICTURE,WNID X Y X Y")
        found[number(picture.rpartition("_")[2], tree.root / name, line)] = boxes.split()[0]
    return found, (name,)


def _caffe(tree: Tree, name: str) -> tuple[dict[int, str], tuple[str, ...]]:
    order = [synset for synset in read_classes("imagenet1k").synsets if synset]  # sorted wnids
    found: dict[int, str] = {}
    for line, text in enumerate(read_lines(tree, name), 1):
        picture, _, label = text.rpartition(" ")
        place = number(label, tree.root / name, line)
        if place >= len(order):
            raise DataError(f"line {line} of {tree.root / name} has class {place}, outside 0..{len(order) - 1}")
        found[_place(picture, tree)] = order[place]
    return found, (name,)


def _devkit(tree: Tree, name: str) -> tuple[dict[int, str], tuple[str, ...]]:
    """The devkit numbers classes in an order of its own: meta.mat has ILSVRC2012_ID and WNID of each."""
    meta = f"{name.rpartition('/')[0]}/meta.mat".lstrip("/")
    if tree.size(meta) is None:
        raise DataError(f"{tree.root / name} has ids of the devkit, and {meta}, which explains them, is not there")
    rows = squeezed(load(tree, meta), "synsets", tree.root / meta)
    try:
        wnids = {int(row["ILSVRC2012_ID"].item()): str(row["WNID"].item()) for row in rows}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise DataError(f"{tree.root / meta} is not the devkit's: {error}; copy or download it again") from None
    ids = [number(text, tree.root / name, line) for line, text in enumerate(read_lines(tree, name), 1)]
    if strange := next((one for one in ids if one not in wnids), None):
        raise DataError(f"{tree.root / name} has the class {strange}, which {meta} does not list")
    return {place: wnids[one] for place, one in enumerate(ids, 1)}, (name, meta)
