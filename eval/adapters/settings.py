"""The settings of the evaluator lowshot: `python -m eval lowshot … --set lowshot.KEY=VALUE`."""

from dataclasses import dataclass, field
from itertools import product
from typing import Final

from eval.adapters.training import Fast, Paper
from eval.base import EvaluatorConfig
from eval.chosen import Values

FITTED: Final = ("linear", "ridge", "msn")  # on features
ADAPTERS: Final = ("vpt", "vpt-shallow", "adaptformer", "lora")  # on pictures
METHODS: Final = (*FITTED, *ADAPTERS)
BUDGETS: Final = ("fast", "paper")


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Logistic regression on standardised features (recipes 9.2)."""

    l2: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    """To choose from. Relative to the mean loss of an image."""
    iterations: int = 60
    search_iterations: int = 30


@dataclass(frozen=True, kw_only=True)
class RidgeConfig:
    l2: tuple[float, ...] = (1024.0,)  # big_vision's 2^10 (recipes 9.2)


@dataclass(frozen=True, kw_only=True)
class MsnConfig:
    l2: tuple[float, ...] = (0.0025,)
    """Divided by the number of images; 0.00025 is MSN's default, 0.0025 what it uses (recipes 9.2)."""


@dataclass(frozen=True, kw_only=True)
class VptConfig(Fast):
    """Of vpt and vpt-shallow."""

    prompts: int = 8  # recipes 9.2, suggested
    paper: Paper = field(default_factory=Paper)  # recipes 9.2 [VPT]


@dataclass(frozen=True, kw_only=True)
class AdaptformerConfig(Fast):
    lr: tuple[float, ...] = (1e-3,)
    bottleneck: int = 64  # this and the next two: recipes 9.2 [AF]
    dropout: float = 0.1
    scale: float = 0.1
    paper: Paper = field(default_factory=lambda: Paper(lr=(0.1,), weight_decay=(0.0,), warmup_epochs=20))


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Fast):
    """No published schedule: rank, alpha and rate are suggestions (recipes 9.2), the epochs those of VPT."""

    lr: tuple[float, ...] = (1e-3,)
    rank: int = 8
    alpha: float = 8.0
    paper: Paper = field(default_factory=lambda: Paper(optimiser="adamw", lr=(1e-3,), weight_decay=(0.0,)))


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    k: tuple[int, ...] = (1, 5, 10)
    seeds: int = 5
    """Splits per K: --seed, --seed + 1, …"""
    methods: tuple[str, ...] = ("linear", "vpt")
    """Of linear, ridge, msn, vpt (deep), vpt-shallow, adaptformer, lora."""
    budget: str = "fast"
    """Of the adapters: fast, or paper."""
    splits: str | None = None
    """A folder of split files to use, instead of drawing them."""
    chosen: str | None = None
    """A file of choices (lowshot/chosen-….json) to use, instead of choosing."""
    choose_on: int | None = None
    """The K whose split of the first seed hyper-parameters are chosen on; default: 5 if asked for, else the largest."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    msn: MsnConfig = field(default_factory=MsnConfig)
    vpt: VptConfig = field(default_factory=VptConfig)
    adaptformer: AdaptformerConfig = field(default_factory=AdaptformerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(f"unknown method '{min(unknown)}', there are: {', '.join(METHODS)}")
        if self.budget not in BUDGETS:
            raise ValueError(f"unknown budget '{self.budget}', there are: {', '.join(BUDGETS)}")
        if not self.k or min(self.k) < 1 or self.seeds < 1 or not self.methods:
            raise ValueError("k must be one or more whole numbers from 1, seeds at least 1, and methods at least one")
        if self.choose_on is not None and self.choose_on < 2:
            raise ValueError("choose_on must be 2 or more: with one image per class there is nothing to hold out")

    @property
    def choice_k(self) -> int:
        return self.choose_on or (5 if 5 in self.k else max(self.k))

    @property
    def tuned(self) -> tuple[str, ...]:
        """Methods whose values are chosen; adapters of the fast budget start from a linear solution."""
        starts = self.budget == "fast" and any(method in ADAPTERS for method in self.methods)
        return tuple(m for m in METHODS if m in self.methods or (m == "linear" and starts))

    def adapter(self, method: str) -> VptConfig | AdaptformerConfig | LoraConfig:
        return self.vpt if method.startswith("vpt") else self.adaptformer if method == "adaptformer" else self.lora

    def candidates(self, method: str) -> list[Values]:
        """What can be chosen for a method, the most regularised first."""
        if method in FITTED:
            strengths = {"linear": self.linear, "ridge": self.ridge, "msn": self.msn}[method].l2
            return [{"l2": l2} for l2 in sorted(strengths, reverse=True)]
        cfg = self.adapter(method)
        schedule = cfg.paper if self.budget == "paper" else cfg
        pairs = product(sorted(schedule.lr), sorted(schedule.weight_decay, reverse=True))
        return [{"lr": lr, "weight_decay": weight_decay} for lr, weight_decay in pairs]
