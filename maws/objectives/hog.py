"""Histograms of oriented gradients as a target: 9 bins, cells of 8 x 8, by colour (MaskFeat: Wei et al., 2022).

Axes: B images, M predicted patches, G bins, c cells along a side of a patch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from maws.config import ConfigError
from maws.data.batch import MaskedBatch

BINS, CELL = 9, 8


class HOG:
    """The histograms of the cells of a patch, each of unit length: 9 x 3 x (p/8)^2 values, squared error.

    A pixel votes with its gradient's length for the bin of its gradient's direction modulo 180°. Colours are normalised
    ones, which changes no histogram: a colour's gradients are all scaled alike. MaskFeat's details are not in recipes:
    hard votes, replicated edges and cells that are normalised one by one are our choice.
    """

    def __init__(self, patch: int) -> None:
        if patch % CELL:
            raise ConfigError(f"target.kind=hog has cells of {CELL} pixels, which do not fill a patch of {patch}")
        self.cells = patch // CELL
        self.outputs = 3 * BINS * self.cells**2

    def of(self, batch: MaskedBatch, images: Tensor, ids: Tensor) -> Tensor:
        cells = histograms(images)  # B 3 G rows cols, of cells
        b, _, _, rows, cols = cells.shape
        c = self.cells
        x = cells.view(b, 3 * BINS, rows // c, c, cols // c, c).permute(0, 2, 4, 3, 5, 1)  # B h w c c 3G
        return x.reshape(b, -1, self.outputs).take_along_dim(ids[..., None], dim=1)  # B M c*c*3*G

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square()

    def check(self) -> None:
        """There is nothing more that could be wrong."""


def histograms(images: Tensor) -> Tensor:
    """B 3 H W -> B 3 G H/8 W/8: central differences (edges repeated), hard votes, L2 norm over a cell's bins."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    turns = torch.atan2(dy, dx) / math.pi  # direction in half turns, -1..1
    bins = (turns * BINS).floor().long() % BINS  # B 3 H W
    votes = images.new_zeros(*images.shape[:2], BINS, *images.shape[2:])  # B 3 G H W
    votes.scatter_(2, bins[:, :, None], dx.hypot(dy)[:, :, None])
    return F.normalize(F.avg_pool2d(votes.flatten(0, 1), CELL), dim=1).unflatten(0, images.shape[:2])
