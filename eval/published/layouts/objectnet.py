"""FOLDER/CLASS/….png of ObjectNet: pictures of the classes that the set lists; those of the others are left out.

options: `folder`, or several of which the first that is there counts; `mappings`, folders that may hold the set's own
mapping to ImageNet-1k (folder_to_objectnet_label.json, objectnet_to_imagenet_1k.json), which is compared with ours.
"""

import json
from collections.abc import Mapping

from data_pipeline.errors import DataError
from eval.classes import Label
from eval.published.description import Published, Split
from eval.published.listing import Listing
from eval.published.tree import Tree, first
from eval.robust.mappings import objectnet_labels, objectnet_numbers
from eval.sources.source import some

FOLDERS, CLASSES = "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"


def read(tree: Tree, split: Split, published: Published) -> Listing:
    base = first(tree, split.options.get("folder", ""), f"pictures of {published.name}")
    start = f"{base}/" if base else ""
    known = objectnet_labels()
    listing = Listing([], [], [])
    labels: list[Label | None] = []
    for name in tree.folders(base):
        pictures = list(tree.pictures(start + name))
        if name not in known:
            listing.left_out["no_imagenet_class"] += len(pictures)
            continue
        listing.files += pictures
        labels += [name] * len(pictures)
    listing.labels = labels
    listing.keys = [file.removeprefix(start) for file in listing.files]
    if missing := known.keys() - {str(label) for label in labels}:
        listing.problems.append(f"{len(missing)} classes have no picture: {some(missing)}")
    _compare(tree, split, listing)
    return listing


def _compare(tree: Tree, split: Split, listing: Listing) -> None:
    """The set's own mapping, if it is there, against ours: the same classes, each with as many of ImageNet's."""
    for folder in split.options.get("mappings", ()):
        files = f"{folder}/{FOLDERS}", f"{folder}/{CLASSES}"
        if any(tree.size(file) is None for file in files):
            continue
        names, classes = (_read(tree, file) for file in files)
        theirs = {name: (label, len(classes[label].split("; "))) for name, label in names.items() if label in classes}
        ours = {name: (label, len(objectnet_numbers()[name])) for name, label in objectnet_labels().items()}
        if strange := {name for name in theirs | ours if theirs.get(name) != ours.get(name)}:
            listing.problems.append(f"{folder}/ maps {len(strange)} classes in another way than ours: {some(strange)}")
        return


def _read(tree: Tree, file: str) -> Mapping[str, str]:
    try:
        found = json.loads(tree.read_list(file))
    except (ValueError, RecursionError):
        raise DataError(f"{tree.root / file} is not JSON; copy it again") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise DataError(f"{tree.root / file} is not a mapping of names to names; copy it again")
    return found
