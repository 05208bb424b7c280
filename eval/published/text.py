"""Lists as published sets write them, read without trust: UTF-8, numbers of a sane size, one complaint per mistake."""

import json
import re
from typing import Any, Final

from data_pipeline.errors import DataError
from eval.published.tree import Tree

MAX_LINE: Final = 4096  # characters; ours: a path and a few numbers


def read_lines(tree: Tree, name: str) -> list[str]:
    """Lines that are not empty, without the space around them."""
    where = tree.root / name
    try:
        text = tree.read_list(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text (byte {error.start}); copy or download it again") from None
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if not lines:
        raise DataError(f"{where} is empty; copy or download it again")
    if long := next((number for number, line in enumerate(lines, 1) if len(line) > MAX_LINE), None):
        raise DataError(f"line {long} of {where} has more than {MAX_LINE:,} characters: this is no list of pictures")
    return lines


def number(text: str, where: object, line: int) -> int:
    """A whole number of at most nine digits."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise DataError(f"line {line} of {where}: expected a number and found '{text[:40]}'")
    return int(text)


def read_json(tree: Tree, name: str) -> Any:
    try:
        return json.loads(tree.read_list(name))
    except (ValueError, RecursionError, MemoryError) as error:  # also what is not UTF-8, and numbers without an end
        raise DataError(f"{tree.root / name} is not JSON ({error}); copy or download it again") from None


def plain(name: str) -> str:
    """`001.Black_footed_Albatross` and `n02085620-Chihuahua` as words."""
    return re.sub(r"^(\d+\.|n\d{8}-)", "", name).replace("_", " ")
