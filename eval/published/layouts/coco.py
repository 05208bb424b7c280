"""COCO's json with categories (iNaturalist as published, and others): images, annotations, categories.

    train_val2018/Plantae/7477/3b60c9486db1d2ee875f11a669fbde4a.jpg      images[].file_name, below the set's folder
    train2018.json                                                       annotations[].image_id, .category_id

A picture's class is its one category. With several, `several` = "refuse" (default) is an error, "most_frequent" takes
the one with most annotations and leaves ties out. Class numbers are positions in the sorted ids of the categories.
options: `annotations`, `images` (folders that file names are below), or several of each; `several`.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import DataError
from eval.published.description import Published, Split
from eval.published.listing import Listing
from eval.published.text import read_json
from eval.published.tree import Tree, first_file, safe

Id = int | str


def read(tree: Tree, split: Split, published: Published) -> Listing:
    name = first_file(tree, split.options["annotations"], f"annotations of {published.name} ({split.name})")
    where = str(tree.root / name)
    content = read_json(tree, name)
    parts = [content.get(part) if isinstance(content, dict) else None for part in ("images", "categories")]
    if not all(isinstance(part, list) and part and all(isinstance(one, dict) for one in part) for part in parts):
        raise DataError(f"{where} needs 'images', 'annotations' and 'categories' as COCO has them")
    names = {_id(one, "id", where): str(one.get("name", "")) for one in content["categories"]}
    order = {one: place for place, one in enumerate(sorted(names, key=lambda one: (isinstance(one, str), one)))}
    of_image = _categories(content.get("annotations"), order, where)
    files = [_file_name(one, where) for one in content["images"]]
    if (twice := len(files) - len(set(files))) > 0:
        raise DataError(f"{where} lists {twice:,} pictures twice; copy or download it again")
    ids = [_id(one, "id", where) for one in content["images"]]
    several = split.options.get("several", "refuse")
    listing = Listing(files, [], list(files), tuple(names[one] or str(one) for one in order), (name,))
    listing.labels = [
        _label(of_image.get(one), file, several, listing, where) for one, file in zip(ids, files, strict=True)
    ]
    prefix = _prefix(tree, split.options.get("images", [""]), files)
    listing.files = [prefix + file for file in files]
    return listing


def _categories(annotations: Any, order: Mapping[Id, int], where: str) -> dict[Id, Counter[int]]:
    """How often each picture has each category."""
    if not isinstance(annotations, list) or not annotations:
        raise DataError(f"{where} has no annotations: the classes of this split are not published; use another split")
    found: dict[Id, Counter[int]] = {}
    for one in annotations:
        if not isinstance(one, dict) or "category_id" not in one:
            raise DataError(f"{where} holds annotations without 'category_id'; give the file with categories")
        category = _id(one, "category_id", where)
        if category not in order:
            raise DataError(f"{where}: an annotation has the category {str(category)[:40]}, which is not listed")
        found.setdefault(_id(one, "image_id", where), Counter())[order[category]] += 1
    return found


def _label(counts: Counter[int] | None, file: str, several: str, listing: Listing, where: str) -> int | None:
    if not counts:
        listing.left_out["no_category"] += 1
        return None
    best = counts.most_common(2)
    if len(best) == 1:
        return best[0][0]
    if several == "refuse":
        raise DataError(
            f"{where}: {file} has {len(counts)} categories, and a picture can have one class; coco_most_frequent takes "
            f"the one with most annotations"
        )
    if best[0][1] == best[1][1]:
        listing.left_out["several_categories"] += 1
        return None
    return best[0][0]


def _id(one: Mapping[str, Any], key: str, where: str) -> Id:
    value = one.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise DataError(f"{where} holds an entry whose '{key}' is {str(value)[:40]}; expected a number or text")
    return value


def _file_name(one: Mapping[str, Any], where: str) -> str:
    name = one.get("file_name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} holds an image without 'file_name'")
    return safe(name)


def _prefix(tree: Tree, folders: Any, files: list[str]) -> str:
    """The folder that holds the first few pictures that are looked for; the set's own if none does."""
    for folder in [folders] if isinstance(folders, str) else folders:
        start = f"{folder}/" if folder else ""
        if any(tree.size(start + file) is not None for file in files[:100]):
            return start
    return ""
