"""FOLDER/CLASS/…/picture.jpg: a folder per class; what a folder's name means, the class set of the set says.

options: `folder`, or several of which the first that is there counts ("" is the set's own folder); `labels`, the names
of folders in the order of class numbers, where the class set does not know them; `skip`, folders that are no classes;
`depth`, how many levels of folders name a class (2: a/abbey), by default 1.
"""

from collections.abc import Iterator

from data_pipeline.errors import DataError
from eval.classes import Label
from eval.published.description import Published, Split
from eval.published.listing import Listing
from eval.published.tree import Tree, first
from eval.sources.folders import SPLITS


def read(tree: Tree, split: Split, published: Published) -> Listing:
    base = first(tree, split.options.get("folder", ""), f"{split.name} pictures of {published.name}")
    start = f"{base}/" if base else ""
    skip = set(split.options.get("skip", ()))
    names = [name for name in _classes(tree, base, int(split.options.get("depth", 1))) if name not in skip]
    if not names:
        raise DataError(f"{tree.root / base} holds no class folders of {published.name}")
    if not base and {name.lower() for name in names} <= SPLITS:
        raise DataError(f"{tree.root} holds the parts {', '.join(names)} and none that is {split.name}")
    order: dict[str, int] = {name: number for number, name in enumerate(split.options.get("labels", ()))}
    listing = Listing([], [], [], class_names=tuple(order))
    labels: list[Label | None] = []
    for name in names:
        pictures = list(tree.pictures(start + name))
        if not pictures:
            listing.problems.append(f"the class folder {start}{name} holds no pictures")
        if order and name not in order:
            raise DataError(f"{tree.root / base} has the folder {name}, which is no class of {published.name}")
        listing.files += pictures
        labels += [order[name] if order else name] * len(pictures)
    listing.labels = labels
    listing.keys = [file.removeprefix(start) for file in listing.files]  # the same wherever the folder lies
    return listing


def _classes(tree: Tree, base: str, depth: int) -> Iterator[str]:
    for name in tree.folders(base):
        inside = _classes(tree, f"{base}/{name}" if base else name, depth - 1) if depth > 1 else ()
        yield from (f"{name}/{one}" for one in inside) if depth > 1 else (name,)
