"""Which names of a file became which of ours, by patterns: `blocks.*.attn.qkv.weight` stands for those of all blocks.

A tensor of ours that was only renamed, cut out or turned is a view of the file's: where it lies says what it is.
"""

from bisect import bisect
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from maws.interop.converted import pattern, times


def renamed(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> list[str]:
    """Lines about the tensors whose name was kept, those that were renamed, and those that had to be made."""
    places = sorted((value.data_ptr(), name) for name, value in theirs.items() if value.numel())
    kept, changed, made = 0, Counter[tuple[str, str]](), Counter[str]()
    for name, value in ours.items():
        source = _source(value, places, theirs)
        if not source:
            made[pattern(name)] += 1
        elif source == name:
            kept += 1
        else:
            changed[pattern(source), pattern(name)] += 1
    return [
        *([f"names kept: {kept} tensors"] if kept else []),
        *([f"renamed: {changed.total()} tensors"] if changed else []),
        *(f"  {old} -> {new}{times(count)}" for (old, new), count in changed.items()),
        *(f"made: {name}{times(count)}: the file has it in another form, or not" for name, count in made.items()),
    ]


def _source(value: Tensor, places: list[tuple[int, str]], theirs: Mapping[str, Tensor]) -> str:
    """The name of the tensor in whose memory a value lies, or ""."""
    at = value.data_ptr()
    number = bisect(places, at, key=lambda place: place[0]) - 1
    if number < 0:
        return ""
    start, name = places[number]
    return name if at < start + theirs[name].nbytes else ""
