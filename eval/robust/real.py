"""ReaL (Beyer et al., 2020): every class that raters saw in a picture counts as right, and a picture in which they saw
none of the 1000 is left out.

eval/mappings/real.json is the published file: 50,000 lists of class numbers, the first for picture 00000001.
"""

import re
from functools import cache
from typing import Final

from eval.robust.mappings import read

_NAME: Final = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.[^./]+")


@cache
def read_lists() -> tuple[tuple[int, ...], ...]:
    """The classes of each picture, in the order of their numbers."""
    return tuple(tuple(own) for own in read("real"))


def picture(place: int) -> str:
    """The name of the validation picture of that number, from 1."""
    return f"ILSVRC2012_val_{place:08d}.JPEG"


def number(name: str) -> int | None:
    """The number of a validation picture, whatever folders it lies in; None for another file."""
    fits = _NAME.fullmatch(name)
    return int(fits[1]) if fits else None
