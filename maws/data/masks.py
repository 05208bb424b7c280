"""Which patches are hidden: every strategy is a permutation whose first entries stay visible (recipes §2.3)."""

import numpy as np


def visible_patches(patches: int, mask_ratio: float) -> int:
    """How many patches stay visible: the whole part of N (1 - ratio), as MAE's code rounds."""
    return int(patches * (1 - mask_ratio))


def random_mask(rng: np.random.Generator, patches: int) -> np.ndarray:
    """Uniformly random: a permutation of the N patches (int64)."""
    return rng.permutation(patches)
