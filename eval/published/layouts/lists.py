"""Text lists, a picture a line.

    /a/airfield/00000001.jpg 0       label = "number"      Places, Oxford Pets (`first` = 1)
    1025794 707-320                  label = "name"        FGVC Aircraft: the rest of the line
    apple_pie/1005649                label = "folder"      Food-101, DTD, SUN397

options: `list` (files, one after the other; each may be several names of which the first that is there counts),
`folder` of the pictures (or several), `suffix` of their names, `label`, `first` number, `slash` (names begin with a
slash), `skip` letters of the folder that are no part of the class (SUN397: a/abbey), `classes`: a file with the class
names, a line each, with their numbers if `label` is "number"; "folder": the folders of the pictures are the names.
"""

from collections.abc import Sequence

from data_pipeline.errors import DataError
from eval.classes import Label
from eval.published.description import Published, Split
from eval.published.listing import Listing
from eval.published.text import number, read_lines
from eval.published.tree import Tree, first, first_file, safe


def read(tree: Tree, split: Split, published: Published) -> Listing:
    options = split.options
    what = f"{published.name} ({split.name})"
    folder = first(tree, options["folder"], f"pictures of {what}")
    start = f"{folder}/" if folder else ""
    lists = [first_file(tree, one, f"list of {what}") for one in options["list"]]
    listing = Listing([], [], [], lists=tuple(lists))
    named = options.get("classes", "folder")
    if named != "folder":
        name = first_file(tree, named, f"list of the classes of {published.name}")
        listing.class_names = _class_names(tree, name, options["label"] == "number")
        listing.lists += (name,)
    size = len(listing.class_names) or published.num_classes
    labels: list[Label | None] = []
    for name in lists:
        for line, text in enumerate(read_lines(tree, name), 1):
            if text.startswith("#"):
                continue
            picture, label = _entry(text, split, tree.root / name, line, size)
            listing.files.append(f"{start}{safe(picture)}{options.get('suffix', '')}")
            labels.append(label)
    if options["label"] == "name" and listing.class_names:
        labels = _numbered(labels, listing.class_names, lists)
    if options["label"] == "number" and options.get("classes") == "folder":
        listing.class_names = _folder_names(listing.files, labels, len(start) + int(options.get("skip", 0)))
    listing.labels = labels
    listing.keys = [file.removeprefix(start) for file in listing.files]
    return listing


def _entry(text: str, split: Split, where: object, line: int, size: int) -> tuple[str, Label]:
    """The picture of a line, below the folder, and its label."""
    kind, options = split.options["label"], split.options
    if kind == "folder":
        picture = text.removeprefix("/") if options.get("slash") else text
        folder = picture.rpartition("/")[0][int(options.get("skip", 0)) :]
        if not folder:
            raise DataError(f"line {line} of {where} is '{text[:80]}'; expected CLASS/PICTURE")
        return picture, folder
    picture, _, rest = text.partition(" ")
    picture = picture.removeprefix("/") if options.get("slash") else picture
    if not rest.strip():
        raise DataError(f"line {line} of {where} is '{text[:80]}'; expected a picture and its class")
    if kind == "name":
        return picture, rest.strip()
    label = number(rest.split()[0], where, line) - int(options.get("first", 0))
    if not 0 <= label < size:
        raise DataError(f"line {line} of {where} has class {rest.split()[0]}; there are {size} classes")
    return picture, label


def _class_names(tree: Tree, name: str, numbered: bool) -> tuple[str, ...]:
    """Names in the order of their numbers: `/a/airfield 0`, else a name a line."""
    lines = read_lines(tree, name)
    if not numbered:
        return tuple(lines)
    found: dict[int, str] = {}
    for line, text in enumerate(lines, 1):
        own, _, place = text.rpartition(" ")
        found[number(place, tree.root / name, line)] = own.strip().lstrip("/").partition("/")[2] or own.strip()
    if sorted(found) != list(range(len(lines))):
        raise DataError(f"{tree.root / name} must number its {len(lines)} classes 0 to {len(lines) - 1}, each once")
    return tuple(found[place] for place in range(len(lines)))


def _folder_names(files: Sequence[str], labels: Sequence[Label | None], skip: int) -> tuple[str, ...]:
    """The folder of each label's pictures, if every label has one."""
    found = {label: file.rpartition("/")[0][skip:] for file, label in zip(files, labels, strict=True)}
    return tuple(found[label] for label in range(len(found))) if found.keys() == set(range(len(found))) else ()


def _numbered(labels: Sequence[Label | None], names: Sequence[str], lists: Sequence[str]) -> list[Label | None]:
    places: dict[Label | None, int] = {name: place for place, name in enumerate(names)}
    if strange := next((label for label in labels if label not in places), None):
        raise DataError(f"{lists[0]} has the class '{str(strange)[:60]}', which the list of classes does not")
    return [places[label] for label in labels]
