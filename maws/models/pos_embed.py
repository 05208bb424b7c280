"""Fixed 2-D sine-cosine position tables, as MAE uses for encoder and decoder (recipes §1.3).

Axes: N patches in row-major order, D width.
"""

import torch
from torch import Tensor


def sincos_2d(width: int, grid: tuple[int, int], class_token: bool = True) -> Tensor:
    """The table of shape (N or 1+N, D), float32; the class token's row is zeros.

    The first D/2 channels encode the column, the last D/2 the row, each as all sines and then all cosines of
    position times 10000^(-k / (D/4)), k = 0 .. D/4 - 1. Computed in float64 (mae repo, util/pos_embed.py).

    Raises ValueError when D is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, not {width}")
    rows, cols = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    col, row = (axis.reshape(-1, 1) * frequency for axis in (cols, rows))  # N D/4
    table = torch.cat([col.sin(), col.cos(), row.sin(), row.cos()], dim=1)  # N D
    if class_token:
        table = torch.cat([table.new_zeros(1, width), table])
    return table.float()
