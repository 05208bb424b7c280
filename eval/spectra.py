"""What is read off singular values (moments.py makes them): how many directions count, and how two runs differ.

effective_rank([2.0, 2.0, 0.0]) -> 2.0         no torch, for the report reads them from files
"""

from collections.abc import Sequence

import numpy as np


def effective_rank(singular_values: Sequence[float]) -> float:
    """exp of the entropy of the singular values over their sum (Roy and Vetterli, 2007, def. 1): 1 .. D, not whole.

    0 where nothing varies: there the definition has no value.
    """
    values = np.asarray(singular_values, dtype=float)
    values = values[values > 0]
    if not len(values):
        return 0.0
    share = values / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def variance_share(singular_values: Sequence[float], k: int) -> float:
    """How much of the variance the first k directions hold, 0..1; 1 where nothing varies."""
    variance = np.asarray(singular_values, dtype=float) ** 2
    return float(variance[:k].sum() / variance.sum()) if variance.sum() > 0 else 1.0


def log_difference(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """ln ours - ln theirs at every rank where both are more than 0 (LC-MAE §5.3: ours LC-MAE, theirs MAE)."""
    common = min(sum(value > 0 for value in values) for values in (ours, theirs))
    return (np.log(ours[:common]) - np.log(theirs[:common])).tolist()
