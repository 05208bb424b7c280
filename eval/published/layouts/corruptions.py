"""FOLDER/CORRUPTION/SEVERITY/CLASS/picture.jpg, as ImageNet-C lies; keys are that path.

options: `folder`, or several of which the first with corruptions in it counts; `corruptions`, the names that belong to
the set, and `extra` ones that may be there as well (with neither, every folder is a corruption); `severities`, how many
each has; `images`, how many pictures each of them has.
"""

from collections.abc import Iterable, Sequence

from data_pipeline.errors import DataError
from eval.classes import Label
from eval.published.description import Published, Split
from eval.published.listing import Listing
from eval.published.tree import Tree
from eval.sources.source import some


def read(tree: Tree, split: Split, published: Published) -> Listing:
    wanted = tuple(split.options.get("corruptions", ()))
    known = (*wanted, *split.options.get("extra", ()))
    base, names = _corruptions(tree, split.options.get("folder", ""), known, published)
    listing = Listing([], [], [])
    labels: list[Label | None] = []
    for name in names:
        for severity in _severities(tree, f"{base}{name}"):
            before = len(labels)
            for folder in tree.folders(f"{base}{name}/{severity}"):
                pictures = list(tree.pictures(f"{base}{name}/{severity}/{folder}"))
                listing.files += pictures
                labels += [folder] * len(pictures)
            _count(listing, f"{name}/{severity}", len(labels) - before, split.options.get("images"))
    listing.labels = labels
    listing.keys = [file.removeprefix(base) for file in listing.files]
    _missing(listing, tree, base, wanted, int(split.options.get("severities", 0)))
    return listing


def _corruptions(
    tree: Tree, folders: str | Sequence[str], known: Sequence[str], published: Published
) -> tuple[str, list[str]]:
    """Where corruptions lie, with the slash, and their names: folders with numbered folders in them."""
    for folder in [folders] if isinstance(folders, str) else folders:
        base = f"{folder}/" if folder else ""
        inside = tree.folders(folder) if tree.has_folder(folder) else []
        names = [name for name in inside if (not known or name in known) and _severities(tree, f"{base}{name}")]
        if names:
            return base, names
    expected = f"such as {known[0]}/1/" if known else "such as fog/3/"
    raise DataError(f"{tree.root} holds no corruptions of {published.name}: expected CORRUPTION/SEVERITY/, {expected}")


def _severities(tree: Tree, folder: str) -> list[str]:
    return sorted((name for name in tree.folders(folder) if name.isdecimal()), key=int)


def _count(listing: Listing, where: str, images: int, published: int | None) -> None:
    if not images:
        listing.problems.append(f"{where} holds no pictures")
    elif published is not None and images != published:
        listing.problems.append(f"{where} has {images:,} pictures, published are {published:,}")


def _missing(listing: Listing, tree: Tree, base: str, wanted: Iterable[str], severities: int) -> None:
    """Severities that belong to the set and have no folder."""
    missing = [
        f"{name}/{severity}"
        for name in wanted
        for severity in range(1, severities + 1)
        if not tree.has_folder(f"{base}{name}/{severity}")
    ]
    if missing:
        listing.problems.append(f"{len(missing)} folders are not there: {some(missing)}")
