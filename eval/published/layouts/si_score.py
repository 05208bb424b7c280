"""FOLDER/CLASS/….jpg for each factor that SI-Score varies; keys are FACTOR/CLASS/….jpg, however the folder is called.

options: `factors`, the folders that each may lie in (the first that is there counts); `images`, how many each has.
"""

from data_pipeline.errors import DataError
from eval.classes import Label
from eval.published.description import Published, Split
from eval.published.listing import Listing
from eval.published.tree import Tree
from eval.sources.source import some


def read(tree: Tree, split: Split, published: Published) -> Listing:
    listing = Listing([], [], [])
    keys: list[str] = []
    labels: list[Label | None] = []
    for factor, folders in split.options["factors"].items():
        folder = next((name for name in folders if tree.has_folder(name)), None)
        if folder is None:
            listing.problems.append(f"object {factor} is not there: expected {' or '.join(f'{f}/' for f in folders)}")
            continue
        files = list(tree.pictures(folder))
        names = [file.removeprefix(f"{folder}/") for file in files]
        _refuse_strangers([name.split("/")[0] for name in names], tree, folder, published)
        listing.files += files
        labels += [name.split("/")[0] for name in names]
        keys += [f"{factor}/{name}" for name in names]
        expected = split.options.get("images", {}).get(factor)
        if expected is not None and len(files) != expected:
            listing.problems.append(f"object {factor} has {len(files):,} pictures, published are {expected:,}")
    if not keys:
        raise DataError(f"{tree.root} holds no pictures of {published.name}: {'; '.join(listing.problems)}")
    listing.labels, listing.keys = labels, keys
    return listing


def _refuse_strangers(names: list[str], tree: Tree, folder: str, published: Published) -> None:
    assert not isinstance(published.classes, str) and published.classes is not None
    if strange := set(names) - set(published.classes):
        raise DataError(f"{tree.root / folder} has what is no class of {published.name}: {some(strange)}")
