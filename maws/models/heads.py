"""Projector and predictor of LC-MAE: linear layers without bias, batch norm and ReLU after all but the last.

    projector = Head(width=768, hidden=4096, depth=2)        # 768 -> 4096 -> 768

Recipes §4.3. Layers are numbered as in a plain nn.Sequential (0 linear, 1 norm, 2 ReLU, 3 linear), as in the official
code, so that its `head.*` and `predictor.*` load by their numbers.
"""

import re

from torch import nn

from maws.models.batch_norm import BatchNorm1d
from maws.models.init import Constant, InitRules, XavierUniform

NORMS = r"\d*[147]\.weight"  # numbers of the norms of heads of up to four layers: every third from 1


class Head(nn.Sequential):
    """`depth` linear layers, width -> hidden -> ... -> width; R D to R D. Depth 0 changes nothing."""

    def __init__(self, width: int, hidden: int = 4096, depth: int = 2) -> None:
        layers: list[nn.Module] = []
        sizes = [width] + [hidden] * (depth - 1) + [width]
        for i in range(depth):
            layers.append(nn.Linear(sizes[i], sizes[i + 1], bias=False))
            if i < depth - 1:
                layers += [BatchNorm1d(sizes[i + 1]), nn.ReLU()]
        super().__init__(*layers)

    def init_rules(self, prefix: str) -> InitRules:
        """Xavier-uniform matrices; norms start as the identity."""
        p = re.escape(prefix)
        norms = [str(i) for i, layer in enumerate(self) if isinstance(layer, BatchNorm1d)]
        numbers = "|".join(norms) or "none"
        return [
            (p + rf"({numbers})\.weight", Constant(1.0)),
            (p + rf"({numbers})\.bias", Constant(0.0)),
            (p + r"\d+\.weight", XavierUniform()),
        ]
