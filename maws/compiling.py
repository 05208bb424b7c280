"""torch.compile of the blocks' attention and MLP (`engine.compile=blocks`).

Only what lies between ZeRO-3's hooks is compiled: a block's parameters are gathered as it is entered, so its attention
and MLP see plain tensors and their graphs do not break. Drop path, residual sums and recomputation
(`model.checkpoint_blocks`) stay outside the compiled parts. The backend is torch's own, inductor, which needs a
compiler: C++ on a CPU, C for Triton's launcher on a GPU. Text towers are not compiled.
"""

import os
import shutil

from timm.models.vision_transformer import Block
from torch import nn

from maws.config import ConfigError, nearest

CHOICES = ("none", "blocks")


def check(choice: str, device: str) -> None:
    """Raises ConfigError for an unknown choice, or when inductor would find no compiler."""
    if choice not in CHOICES:
        raise ConfigError(f"engine.compile={choice} is not known; {nearest(choice, CHOICES)}")
    if choice == "none":
        return
    variable, names = ("CXX", ("g++", "clang++")) if device == "cpu" else ("CC", ("gcc", "clang", "cc"))
    candidates = [os.environ[variable]] if os.environ.get(variable) else list(names)
    if not any(shutil.which(name) for name in candidates):
        raise ConfigError(
            f"engine.compile={choice} needs a compiler ({' or '.join(candidates)}) and there is none; install one "
            f"(Debian and Ubuntu: apt-get install g++), set {variable}, or use engine.compile=none"
        )


def compile_blocks(module: nn.Module) -> int:
    """Have every ViT block's attention and MLP compiled when they are first called; how many parts that are."""
    parts = [part for block in module.modules() if isinstance(block, Block) for part in (block.attn, block.mlp)]
    for part in parts:
        part.compile()
    return len(parts)
