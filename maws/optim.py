"""Parameter rules: (pattern, treatment) per parameter name, the first match wins, None freezes.

    rules = [(r".*pos_embed", None), (r".*(bias|norm\\d?\\.weight)", NO_DECAY), (r".*", BASE)]
    rules = layer_wise(rules, "autoencoder.", depth=24, decay=0.75)     # optim.layer_decay

Names decide, never the number of axes: under ZeRO-3 a partitioned parameter has one axis of length zero.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from maws.config import ConfigError

EMBEDDINGS = ("patch_embed", "cls_token", "pos_embed")


@dataclass(frozen=True)
class Layers:
    """Learning rates that fall towards the input of one tower (BEiT, Bao et al., 2022; MAE's fine-tuning).

    Embeddings are layer 0, block i (from 0) is layer i + 1, and everything else, which is above the blocks or outside
    the tower, layer depth + 1, whose scale is 1.
    """

    tower: str  # what the names of its parameters begin with
    depth: int
    decay: float
    embeddings: tuple[str, ...] = EMBEDDINGS

    def scale(self, name: str) -> float:
        """decay ** (depth + 1 - layer) of a parameter."""
        own = name.removeprefix(self.tower) if name.startswith(self.tower) else ""
        if block := re.match(r"blocks\.(\d+)\.", own):
            return self.decay ** (self.depth - int(block[1]))
        return self.decay ** (self.depth + 1) if own.split(".")[0] in self.embeddings else 1.0


@dataclass(frozen=True)
class Treatment:
    """Weight decay as a multiple of `optim.weight_decay`, learning rate as a multiple of `optim.lr`, and of what
    `layers` says for the parameter."""

    decay: float = 1.0
    lr: float = 1.0
    layers: Layers | None = None

    def of(self, name: str) -> "Treatment":
        """What it is for one parameter."""
        return Treatment(self.decay, self.lr * self.layers.scale(name)) if self.layers else self


BASE, NO_DECAY = Treatment(), Treatment(decay=0.0)
Rules = Sequence[tuple[str, Treatment | None]]


def layer_wise(rules: Rules, tower: str, depth: int, decay: float, embeddings: tuple[str, ...] = EMBEDDINGS) -> Rules:
    """The rules of a stage with `optim.layer_decay` on the tower whose names begin with `tower`.

    Raises ConfigError for a decay that is not more than 0 and at most 1.
    """
    if not 0 < decay <= 1:
        raise ConfigError(
            f"optim.layer_decay={decay} must be more than 0 and at most 1 (no decay); MAE fine-tunes with 0.65 to 0.75"
        )
    if decay == 1:
        return rules
    layers = Layers(tower, depth, decay, embeddings)
    return [(pattern, t and replace(t, layers=layers)) for pattern, t in rules]


def treat(name: str, rules: Rules) -> Treatment | None:
    """The treatment of one parameter. Raises KeyError when no rule matches."""
    for pattern, treatment in rules:
        if re.fullmatch(pattern, name):
            return treatment and treatment.of(name)
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
    """For people: (pattern, treatment, tensors, parameters) of each rule, in order; its layers in one row."""
    found: dict[str, list[tuple[str, int]]] = {pattern: [] for pattern, _ in rules}
    for name, param in module.named_parameters():
        pattern = next(p for p, _ in rules if re.fullmatch(p, name))
        found[pattern].append((name, getattr(param, "ds_numel", param.numel())))
    return [
        (p, _words(t, [name for name, _ in found[p]]), len(found[p]), sum(n for _, n in found[p]))
        for p, t in rules
        if found[p]
    ]


def _words(treatment: Treatment | None, names: list[str]) -> str:
    if treatment is None:
        return "frozen"
    rates = sorted({treatment.of(name).lr for name in names})
    several = f"{rates[0]:.2g} to {rates[-1]:g} in {len(rates)} layers"
    return f"decay x{treatment.decay:g}, lr x{several if len(rates) > 1 else f'{rates[0]:g}'}"
