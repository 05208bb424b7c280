"""ILSVRC2012_val_00000001.JPEG … with the labels of real.json, which go by the number in the name.

The pictures may lie together or in class folders. A picture's label here is the first of its list (all of them count as
right: eval/robust/real.py); one with an empty list has none and is left out.

options: `folder`, or several of which the first that is there counts.
"""

from eval.classes import Label
from eval.published.description import Published, Split
from eval.published.listing import Listing
from eval.published.tree import Tree, first
from eval.robust.real import number, picture, read_lists

LABELS = "real.json"


def read(tree: Tree, split: Split, published: Published) -> Listing:
    base = first(tree, split.options.get("folder", ""), f"{split.name} pictures of {published.name}")
    found = {number(file): file for file in tree.pictures(base) if number(file) is not None}
    places = [place for place in range(1, len(read_lists()) + 1) if place in found]
    lists = [read_lists()[place - 1] for place in places]
    labels: list[Label | None] = [own[0] if own else None for own in lists]
    listing = Listing([found[place] for place in places], labels, [picture(place) for place in places])
    listing.left_out["no_real_label"] = sum(not own for own in lists)
    if tree.size(LABELS) is not None:
        tree.read_list(LABELS)  # which is hashed: ours is asked, and theirs must be the same
        listing.lists = (LABELS,)
    return listing
