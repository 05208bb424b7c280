"""MATLAB files (version 5) that some sets publish their lists in; scipy reads them: `pip install "maws-open[mat]"`.

Nothing in such a file is run. Sizes are bounded: the largest list here has half a megabyte.
"""

import io
from typing import Any, Final

import numpy as np

from data_pipeline.errors import DataError, UsageError
from eval.published.tree import Tree

MAX_MAT: Final = 8 << 20  # bytes; ours: what it unpacks to is bounded with it


def load(tree: Tree, name: str) -> dict[str, Any]:
    """Its variables by name. Raises DataError for a file that is none, UsageError without scipy."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UsageError(
            f"{tree.root / name} is a MATLAB file, which scipy reads: pip install 'maws-open[mat]'"
        ) from None
    size = tree.size(name)
    if size is not None and size > MAX_MAT:
        raise DataError(f"{tree.root / name} has {size:,} bytes; a list of a published set has at most {MAX_MAT:,}")
    try:
        return loadmat(io.BytesIO(tree.read_list(name)))
    except DataError:
        raise
    except Exception as error:  # scipy raises what it happens to meet in a damaged file
        raise DataError(f"{tree.root / name} is not a MATLAB file that can be read ({error}); copy it again") from None


def squeezed(variables: dict[str, Any], name: str, where: object) -> np.ndarray:
    """One variable as a list of its elements."""
    value = variables.get(name)
    if not isinstance(value, np.ndarray):
        held = ", ".join(sorted(own for own in variables if not own.startswith("__"))) or "nothing"
        raise DataError(f"{where} has no variable '{name}' but {held}; copy or download it again")
    return value.ravel()


def numbers(variables: dict[str, Any], name: str, where: object) -> list[int]:
    """A variable of whole numbers from 1."""
    values = squeezed(variables, name, where)
    if values.dtype.kind not in "uif" or not np.all((values >= 1) & (values < 10**9) & (values == np.floor(values))):
        raise DataError(f"'{name}' of {where} must hold whole numbers from 1; copy or download it again")
    return [int(value) for value in values]


def texts(values: np.ndarray, where: object) -> list[str]:
    """A cell array of text."""
    found = [value.item() if isinstance(value, np.ndarray) and value.size == 1 else value for value in values]
    if strange := next((value for value in found if not isinstance(value, str)), None):
        raise DataError(f"{where} holds {str(strange)[:40]!r} where text is expected; copy or download it again")
    return [str(value) for value in found]
