"""Position tables: fixed 2-D sine-cosine (recipes §1.3), resized to another grid, and relative ones (recipes §4.7).

Axes: N patches in row-major order, C class tokens, T = C + N, K tokens that are there, D width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maws.models.init import Constant, InitRules


def sincos_2d(width: int, grid: tuple[int, int], class_tokens: int = 1) -> Tensor:
    """The table of shape (C+N, D), float32; class tokens have rows of zeros.

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
    return torch.cat([table.new_zeros(class_tokens, width), table]).float()


def resize_positions(
    table: Tensor, class_tokens: int, old: tuple[int, int], new: tuple[int, int], align_corners: bool = False
) -> Tensor:
    """A table (1 C+N D) for another grid: bicubic over the patches, the class tokens' rows untouched (recipes §3.5).

    MAE interpolates with `align_corners` false, SWAG with true (recipes §9.4). The same grid gives the table itself.
    Raises ValueError when the table does not have the rows of the old grid.
    """
    if table.shape[1] != class_tokens + old[0] * old[1]:
        raise ValueError(
            f"a position table of {table.shape[1]} rows is not that of {class_tokens} class token(s) and "
            f"{old[0]} x {old[1]} patches"
        )
    if old == new:
        return table
    cls, places = table[:, :class_tokens], table[:, class_tokens:]
    exact = places.to(torch.promote_types(places.dtype, torch.float32))
    image = exact.reshape(1, *old, -1).permute(0, 3, 1, 2)  # 1 D h w
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=align_corners)
    return torch.cat([cls, image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


class RelativePositionBias(nn.Module):
    """What is added to each head's attention logits for a pair of tokens, learned per offset (BEiT's and SimMIM's).

    One row of `relative_position_bias_table` for each of (2h-1)(2w-1) offsets; with a class token three more: from it
    to patches, from patches to it, and to itself. One module serves all blocks. Raises ValueError for several class
    tokens.
    """

    relative_position_index: Tensor

    def __init__(self, grid: tuple[int, int], heads: int, class_tokens: int = 1) -> None:
        super().__init__()
        if class_tokens > 1:
            raise ValueError(f"relative positions know at most one class token, not {class_tokens}")
        index = relative_index(grid, class_tokens)
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets(grid, class_tokens), heads))
        self.register_buffer("relative_position_index", index, persistent=False)  # follows from the grid

    def forward(self, ids: Tensor | None = None) -> Tensor:
        """1 H T T, or B H K K for the tokens `ids` (B K, class token counted)."""
        index = self.relative_position_index  # T T
        if ids is not None:
            index = index[ids[:, :, None], ids[:, None, :]]  # B K K
        bias = self.relative_position_bias_table[index]  # … K K H
        return bias.movedim(-1, -3) if ids is not None else bias.permute(2, 0, 1)[None]

    def init_rules(self, p: str = "") -> InitRules:
        return [(p + r"relative_position_bias_table", Constant(0.0))]


def offsets(grid: tuple[int, int], class_tokens: int) -> int:
    """Rows of a relative table."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 * class_tokens


def relative_index(grid: tuple[int, int], class_tokens: int) -> Tensor:
    """Which row of the table belongs to (from, to): T T, int64. Offsets row by row, then the class token's three."""
    h, w = grid
    row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    down = row.reshape(-1, 1) - row.reshape(1, -1) + h - 1  # N N
    right = col.reshape(-1, 1) - col.reshape(1, -1) + w - 1
    index = down * (2 * w - 1) + right
    if not class_tokens:
        return index
    last = offsets(grid, class_tokens) - 1
    whole = torch.empty(1 + h * w, 1 + h * w, dtype=index.dtype)
    whole[1:, 1:] = index
    whole[0, :], whole[:, 0], whole[0, 0] = last - 2, last - 1, last
    return whole
