"""Sets whose lists are MATLAB files (mat.py).

    flowers   jpg/image_00001.jpg · imagelabels.mat (labels from 1) · setid.mat (trnid, valid, tstid)
    cars      cars_train/00001.jpg · devkit/cars_train_annos.mat (annotations: fname, class from 1)
    dogs      Images/n02085620-Chihuahua/….jpg · train_list.mat (file_list, labels from 1)

options: `kind`, one of these; `folder` of the pictures and `list`, or several of each; `ids` (flowers: in setid.mat).
"""

from data_pipeline.errors import DataError
from eval.published.description import Published, Split
from eval.published.listing import Listing
from eval.published.mat import load, numbers, squeezed, texts
from eval.published.text import plain
from eval.published.tree import Tree, first, first_file, safe


def read(tree: Tree, split: Split, published: Published) -> Listing:
    folder = first(tree, split.options["folder"], f"pictures of {published.name} ({split.name})")
    name = first_file(tree, split.options["list"], f"list of {published.name} ({split.name})")
    kinds = {"flowers": _flowers, "cars": _cars, "dogs": _dogs}
    listing = kinds[split.options["kind"]](tree, split, name)
    if outside := [label for label in listing.labels if isinstance(label, int) and label >= published.num_classes]:
        size = published.num_classes
        raise DataError(f"{tree.root / name} has class {max(outside) + 1}; {published.name} has {size}")
    listing.files = [f"{folder}/{safe(file)}" for file in listing.files]
    return listing


def _flowers(tree: Tree, split: Split, name: str) -> Listing:
    where = tree.root / name
    ids_name = f"{name.rpartition('/')[0]}/setid.mat".lstrip("/")
    labels = numbers(load(tree, name), "labels", where)
    parts = load(tree, first_file(tree, ids_name, "list of its splits"))
    ids = [one for part in split.options["ids"] for one in numbers(parts, part, tree.root / ids_name)]
    if outside := next((one for one in ids if one > len(labels)), None):
        raise DataError(f"{tree.root / ids_name} names picture {outside}, and {where} has labels of {len(labels):,}")
    files = [f"image_{one:05d}.jpg" for one in ids]
    return Listing(files, [labels[one - 1] - 1 for one in ids], list(files), lists=(name, ids_name))


def _cars(tree: Tree, split: Split, name: str) -> Listing:
    where = tree.root / name
    rows = squeezed(load(tree, name), "annotations", where)
    if rows.dtype.names is None or not {"fname", "class"} <= set(rows.dtype.names):
        raise DataError(
            f"the annotations of {where} have no 'fname' and 'class'; cars_test_annos.mat has no classes: "
            f"the test set's are in cars_test_annos_withlabels.mat"
        )
    labels = numbers({"class": _stacked(rows["class"], where)}, "class", where)
    return Listing(texts(rows["fname"], where), [label - 1 for label in labels], lists=(name,))


def _stacked(values, where: object):  # noqa: ANN001, ANN202  arrays of one number each
    import numpy as np

    try:
        return np.array([value.item() for value in values], dtype=np.float64)
    except (ValueError, AttributeError, TypeError):
        raise DataError(f"'class' of {where} must hold a number for each picture; copy or download it again") from None


def _dogs(tree: Tree, split: Split, name: str) -> Listing:
    where = tree.root / name
    variables = load(tree, name)
    files = texts(squeezed(variables, "file_list", where), where)
    labels = [label - 1 for label in numbers(variables, "labels", where)]
    if len(files) != len(labels):
        raise DataError(f"{where} has {len(files):,} pictures and {len(labels):,} labels; copy or download it again")
    folders = {label: file.partition("/")[0] for file, label in zip(files, labels, strict=True)}
    whole = sorted(folders) == list(range(len(folders)))
    names = tuple(plain(folders[label]) for label in range(len(folders))) if whole else ()
    return Listing(files, labels, list(files), class_names=names, lists=(name,))
