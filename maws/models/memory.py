"""Bytes of GPU memory that training needs, by formulas whose constants were measured (deepspeed.md §5).

    states(6_475_383_884) / 2**30          # 96.5 GiB of weights, gradients and optimizer for ViT-6.5B's MAE, on one GPU
    activations(257, 4096, 32) / 1e6       # 1078 MB for one image of its WSP

Letters: T tokens, D width.
"""

from collections.abc import Sequence

GIB = 2**30

PER_PARAMETER = 16  # bf16: weights 2, gradients 2, fp32 master and two moments 12; fp32: 4 + 4 + 8
PER_TARGET_PARAMETER = 6  # of a momentum target: its mean in fp32, and in bf16 the weights that forward reads
PER_UNIT = 32  # what a pre-norm block keeps in bf16 with SDPA, per token and width unit; 32.04 measured


def states(parameters: int, target: int = 0, ranks: int = 1) -> float:
    """Model states of one rank under ZeRO-3, in bytes; `target` parameters follow a momentum target."""
    return (PER_PARAMETER * parameters + PER_TARGET_PARAMETER * target) / ranks


def activations(tokens: int, width: int, depth: int) -> int:
    """What `depth` blocks keep of one sample for the backward pass, in bytes (bf16)."""
    return PER_UNIT * tokens * width * depth


def checkpointed(stacks: Sequence[tuple[int, int, int]]) -> int:
    """The same for stacks of (T, D, depth) whose blocks are all recomputed: the bf16 inputs of every block, and what
    the largest block keeps, one block at a time."""
    inputs = sum(2 * tokens * width * depth for tokens, width, depth in stacks)
    return inputs + max(PER_UNIT * tokens * width for tokens, width, _ in stacks)
