"""Which patches are hidden: every strategy is a permutation whose first entries stay visible (recipes §2.3, §3.2).

    random   any patch, each as likely as another (MAE §3)
    block    rectangles are hidden, as BEiT hides them (MAE Table 1f)
    grid     one patch of every 2 x 2 is seen, always the same ones (MAE Table 1f)
    unit     squares of u x u patches are seen or hidden together (long-sequence MAE §3, SimMIM, Pixio)

A grid has rows x cols = N patches, numbered row by row. Masks are drawn per image in the loader, so they are a
function of (seed, epoch, key) and the same on any number of ranks.
"""

import math
from dataclasses import dataclass

import numpy as np

from maws.config import ConfigError, nearest

Grid = tuple[int, int]  # rows, columns

KINDS = ("random", "block", "grid", "unit")
BLOCK_TRIES = 10
BLOCK_MIN, BLOCK_MIN_OF = 16, 196  # smallest block and the patches of the grid it was chosen for (BEiT, 14 x 14)
BLOCK_LOG_ASPECT = math.log(0.3), math.log(1 / 0.3)


@dataclass(frozen=True)
class Masking:
    """How a stage hides patches: its config group `mask.`."""

    kind: str = "random"  # random, block, grid or unit
    ratio: float = 0.75  # share of patches that is hidden
    unit: int = 1  # side of a unit in patches, for kind=unit
    # kind=unit: hide ceil(ratio x units) units and split none (SimMIM); else patches are counted, as in long-sequence
    # MAE, and one unit may be half seen, half hidden
    whole_units: bool = False

    def keep(self, grid: Grid) -> int:
        """How many patches of a grid stay visible."""
        rows, cols = grid
        if self.kind == "grid":
            return math.ceil(rows / 2) * math.ceil(cols / 2)
        if self.whole_units:
            units = math.ceil(rows / self.unit) * math.ceil(cols / self.unit)
            return (units - math.ceil(units * self.ratio)) * self.unit**2
        return visible_patches(rows * cols, self.ratio)

    def check(self, grid: Grid) -> None:
        """Raises ConfigError where there is no such masking, or nothing of the grid would be seen or nothing hidden."""
        if self.kind not in KINDS:
            raise ConfigError(f"mask.kind={self.kind} is not known; {nearest(self.kind, KINDS)}")
        if not 0 < self.ratio < 1:
            raise ConfigError(f"mask.ratio={self.ratio} must lie between 0 and 1; MAE's is 0.75")
        if self.kind == "grid" and self.ratio != 0.75:
            raise ConfigError(
                f"mask.ratio={self.ratio}, but kind=grid sees one patch of every 2 x 2; set mask.ratio=0.75 or take "
                f"another mask.kind"
            )
        self._check_unit(grid)
        patches, keep = grid[0] * grid[1], self.keep(grid)
        if not 0 < keep < patches:
            raise ConfigError(
                f"mask.ratio={self.ratio} leaves {keep} of {patches} patches visible; some must be visible and some "
                f"hidden: change mask.ratio, lower mask.unit, or take a larger model.image_size"
            )

    def _check_unit(self, grid: Grid) -> None:
        rows, cols = grid
        if self.kind != "unit" and (self.unit != 1 or self.whole_units):
            raise ConfigError(
                f"mask.unit={self.unit} and mask.whole_units={self.whole_units} mean nothing to kind={self.kind}; "
                f"set mask.kind=unit, or leave them at 1 and False"
            )
        if not 1 <= self.unit <= min(rows, cols):
            raise ConfigError(
                f"mask.unit={self.unit} must be at least 1 and at most {min(rows, cols)}, the shorter side of a grid "
                f"of {rows} x {cols} patches"
            )
        if self.whole_units and (rows % self.unit or cols % self.unit):
            raise ConfigError(
                f"mask.unit={self.unit} must divide a grid of {rows} x {cols} patches when mask.whole_units is set, "
                f"else images would see different numbers of patches; change mask.unit or model.image_size"
            )


def make_mask(masking: Masking, rng: np.random.Generator, grid: Grid) -> np.ndarray:
    """A permutation of the N patches (int64); the first `masking.keep(grid)` are visible, the rest hidden."""
    if masking.kind == "random":
        return random_mask(rng, grid[0] * grid[1])
    if masking.kind == "unit":
        return unit_mask(rng, grid, masking.unit)
    if masking.kind == "grid":
        return grid_mask(grid)
    return block_mask(rng, grid, grid[0] * grid[1] - masking.keep(grid))


def visible_patches(patches: int, mask_ratio: float) -> int:
    """How many patches stay visible: the whole part of N (1 - ratio), as MAE's code rounds."""
    return int(patches * (1 - mask_ratio))


def random_mask(rng: np.random.Generator, patches: int) -> np.ndarray:
    """Uniformly random: a permutation of the N patches (int64)."""
    return rng.permutation(patches)


def unit_mask(rng: np.random.Generator, grid: Grid, unit: int) -> np.ndarray:
    """Units in random order, each written out column by column (recipes §3.2).

    Units at the right and lower edge of a grid that `unit` does not divide are smaller: what lies outside is left out.
    """
    rows, cols = grid
    across = math.ceil(cols / unit)
    units = rng.permutation(math.ceil(rows / unit) * across)
    offset = np.arange(unit)
    row = (units // across * unit)[:, None, None] + offset[None, None, :]  # U 1 u, the inner loop
    col = (units % across * unit)[:, None, None] + offset[None, :, None]  # U u 1, the outer loop
    ids = row * cols + col  # U u u
    if rows % unit == 0 and cols % unit == 0:
        return ids.reshape(-1)
    return ids[(row < rows) & (col < cols)]


def grid_mask(grid: Grid) -> np.ndarray:
    """The same for every image: first the upper left patch of every 2 x 2, then upper right, lower left, lower right.

    Each of the four in row order. Cells that the edge of an odd grid cuts keep their upper left patch as well.
    """
    ids = np.arange(grid[0] * grid[1]).reshape(grid)
    return np.concatenate([ids[row::2, col::2].reshape(-1) for row in (0, 1) for col in (0, 1)])


def block_mask(rng: np.random.Generator, grid: Grid, masked: int) -> np.ndarray:
    """Hide rectangles until `masked` patches are hidden or one adds nothing; random patches make up the rest.

    Order: the visible patches, the hidden ones of no block, those of blocks; random within each. A block never adds
    more than is missing, so there is never one to take back.
    """
    hidden = np.zeros(grid, bool)
    missing = masked
    while missing:
        added = _add_block(rng, hidden, missing)
        if not added:
            break
        missing -= added
    ids = rng.permutation(hidden.size)
    in_block = hidden.reshape(-1)[ids]
    return np.concatenate([ids[~in_block], ids[in_block]])


def _add_block(rng: np.random.Generator, hidden: np.ndarray, missing: int) -> int:
    """Hide one more rectangle (rows cols, bool, in place); the number of patches it adds, 0 after ten failed tries.

    As BEiT's masking_generator: the area lies between the smallest block and what is missing (either may be larger),
    and a block is shorter than the grid in both directions. The smallest block is BEiT's 16 patches from its grid of
    14 x 14 on; on smaller grids it is the same share of the grid (ours).
    """
    rows, cols = hidden.shape
    smallest = max(1, min(BLOCK_MIN, hidden.size * BLOCK_MIN // BLOCK_MIN_OF))
    low, high = BLOCK_LOG_ASPECT
    for draws in rng.random((BLOCK_TRIES, 4)).tolist():  # all at once: a call a number would take most of the time
        area = smallest + (missing - smallest) * draws[0]
        aspect = math.exp(low + (high - low) * draws[1])
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= cols:
            continue
        top, left = int(draws[2] * (rows - height + 1)), int(draws[3] * (cols - width + 1))
        block = hidden[top : top + height, left : left + width]
        added = block.size - int(np.count_nonzero(block))
        if 0 < added <= missing:
            block[:] = True
            return added
    return 0
