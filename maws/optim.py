"""Parameter rules: (pattern, treatment) per parameter name, the first match wins, None freezes.

Names decide, never the number of axes: under ZeRO-3 a partitioned parameter has one axis of length zero.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Treatment:
    """Weight decay as a multiple of `optim.weight_decay`, learning rate as a multiple of `optim.lr`."""

    decay: float = 1.0
    lr: float = 1.0


BASE, NO_DECAY = Treatment(), Treatment(decay=0.0)
Rules = Sequence[tuple[str, Treatment | None]]


def treat(name: str, rules: Rules) -> Treatment | None:
    """The treatment of one parameter. Raises KeyError when no rule matches."""
    for pattern, treatment in rules:
        if re.fullmatch(pattern, name):
            return treatment
    raise KeyError(f"no parameter rule matches {name}")


def groups(module: nn.Module, rules: Rules, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Freeze what the rules freeze and sort the rest into optimizer groups, each with its `lr_scale`."""
    found: dict[Treatment, list[nn.Parameter]] = {}
    for name, param in module.named_parameters():
        treatment = treat(name, rules)
        param.requires_grad_(treatment is not None)
        if treatment is not None:
            found.setdefault(treatment, []).append(param)
    return [
        {"params": params, "lr": lr * t.lr, "lr_scale": t.lr, "weight_decay": weight_decay * t.decay}
        for t, params in found.items()
    ]


def table(module: nn.Module, rules: Rules) -> list[tuple[str, str, int, int]]:
    """For people: (pattern, treatment, tensors, parameters) of each rule, in order."""
    count: dict[str, list[int]] = {pattern: [0, 0] for pattern, _ in rules}
    for name, param in module.named_parameters():
        pattern = next(p for p, _ in rules if re.fullmatch(p, name))
        count[pattern][0] += 1
        count[pattern][1] += getattr(param, "ds_numel", param.numel())
    return [
        (p, "frozen" if t is None else f"decay x{t.decay:g}, lr x{t.lr:g}", count[p][0], count[p][1])
        for p, t in rules
        if count[p][0]
    ]
