"""FOLDER/NUMBER/picture.jpg: folders named by class numbers (ImageNetV2), sorted as numbers and not as text.

options: `folder`, or several of which the first that is there counts; `first`, the number of the first class (0).
"""

import re

from data_pipeline.errors import DataError
from eval.classes import Label
from eval.published.description import Published, Split
from eval.published.listing import Listing
from eval.published.tree import Tree, first
from eval.sources.source import some


def read(tree: Tree, split: Split, published: Published) -> Listing:
    base = first(tree, split.options.get("folder", ""), f"{split.name} pictures of {published.name}")
    start = f"{base}/" if base else ""
    begin = int(split.options.get("first", 0))
    names = tree.folders(base)
    if strange := [name for name in names if not re.fullmatch(r"\d{1,6}", name)]:
        raise DataError(
            f"{tree.root / base} has folders that are no class numbers: {some(strange)}; "
            f"{published.name} names its folders {begin} to {begin + published.num_classes - 1}"
        )
    listing = Listing([], [], [])
    labels: list[Label | None] = []
    for name in sorted(names, key=int):
        pictures = list(tree.pictures(start + name))
        if not pictures:
            listing.problems.append(f"the class folder {start}{name} holds no pictures")
        if not begin <= int(name) < begin + published.num_classes:
            raise DataError(f"{tree.root / base} has the folder {name}, outside {begin} to "
                            f"{begin + published.num_classes - 1} of {published.name}")  # fmt: skip
        listing.files += pictures
        labels += [int(name) - begin] * len(pictures)
    listing.labels = labels
    listing.keys = [file.removeprefix(start) for file in listing.files]
    return listing
