"""CUB-200-2011 and NABirds: lists that share the id of a picture.

    images.txt               1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg
    image_class_labels.txt   1 1
    train_test_split.txt     1 0             1 is training
    classes.txt              1 001.Black_footed_Albatross

Class numbers are positions in the sorted ids of the classes that pictures have: NABirds lists groups of classes too.
options: `base`, the folder of the lists, or several; `training`, whether the split is.
"""

from data_pipeline.errors import DataError
from eval.published.description import Published, Split
from eval.published.listing import Listing
from eval.published.text import number, plain, read_lines
from eval.published.tree import Tree, first_file, safe

LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def read(tree: Tree, split: Split, published: Published) -> Listing:
    bases = split.options["base"]
    found = first_file(tree, [f"{base}/{LISTS[0]}".lstrip("/") for base in bases], f"list of {published.name}")
    start = found.removesuffix(LISTS[0])
    files, classes, parts, names = (_table(tree, start + name) for name in LISTS)
    if gaps := (files.keys() ^ classes.keys()) | (files.keys() ^ parts.keys()):
        raise DataError(f"{len(gaps):,} pictures of {tree.root / found} are not in all of {', '.join(LISTS[:3])}")
    ids = {
        own: number(text, tree.root / (start + LISTS[1]), line) for line, (own, text) in enumerate(classes.items(), 1)
    }
    by_number = {
        number(own, tree.root / (start + LISTS[3]), line): text for line, (own, text) in enumerate(names.items(), 1)
    }
    if strange := next((one for one in ids.values() if one not in by_number), None):
        raise DataError(f"{tree.root / (start + LISTS[1])} has the class {strange}, which {LISTS[3]} does not list")
    if marks := set(parts.values()) - {"0", "1"}:
        raise DataError(f"{tree.root / (start + LISTS[2])} marks pictures with {min(marks)[:20]}; expected 0 and 1")
    order = {one: place for place, one in enumerate(sorted(set(ids.values())))}
    wanted = "1" if split.options["training"] else "0"
    chosen = [own for own in files if parts[own] == wanted]
    return Listing(
        [f"{start}images/{safe(files[own])}" for own in chosen],
        [order[ids[own]] for own in chosen],
        [files[own] for own in chosen],
        class_names=tuple(plain(by_number[one]) for one in order),
        lists=tuple(start + name for name in LISTS),
    )


def _table(tree: Tree, name: str) -> dict[str, str]:
    """What a list says of each id."""
    if tree.size(name) is None:
        raise DataError(f"{tree.root} has no {name}; unpack the published archive whole")
    found: dict[str, str] = {}
    for line, text in enumerate(read_lines(tree, name), 1):
        own, _, rest = text.partition(" ")
        if not rest.strip() or found.setdefault(own, rest.strip()) != rest.strip():
            raise DataError(
                f"line {line} of {tree.root / name} is '{text[:80]}'; expected an id, once, and what it has"
            )
    return found
