"""Hyper-parameters that were chosen on training images, kept so that another run can use them.

lowshot/chosen-fast-3f2a91c4-seed0.json
{"format": 1, "budget": "fast", "train": "…", "weights": "…",
 "methods": {"linear": {"values": {"l2": 0.01}, "on": "seed 0, 5-shot, 7 images held out", "held_out_top1": 0.4}}}
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from data_pipeline.errors import DataError, UsageError

FORMAT: Final = 1
FIXED: Final = "fixed"  # one candidate: nothing to choose

Values = Mapping[str, float]  # {"lr": 0.1, "weight_decay": 0.0}


@dataclass(frozen=True)
class Choice:
    """The values of one method, and what they were chosen on."""

    values: Values
    on: str
    top1: float | None = None  # on the held-out images

    def facts(self, method: str) -> dict[str, Any]:
        """As a score says it."""
        told = {f"{method}.{name}": value for name, value in self.values.items()} | {f"{method}.chosen_on": self.on}
        return told | ({f"{method}.held_out_top1": self.top1} if self.top1 is not None else {})


def choose(candidates: Sequence[Values], score: Callable[[Values], float], on: str) -> Choice:
    """The candidate with the highest score; of equal ones the first."""
    if len(candidates) == 1:
        return Choice(candidates[0], FIXED)
    scores = [score(values) for values in candidates]
    best = max(range(len(scores)), key=scores.__getitem__)  # the first of the highest
    return Choice(candidates[best], on, scores[best])


@dataclass(frozen=True)
class Given:
    """A file of choices."""

    choices: Mapping[str, Choice]  # by method
    sha256: str


def as_text(choices: Mapping[str, Choice], budget: str, train: str, weights: str) -> str:
    """What `read` reads."""
    methods = {
        name: {"values": dict(choice.values), "on": choice.on, "held_out_top1": choice.top1}
        for name, choice in choices.items()
    }
    content = {"format": FORMAT, "budget": budget, "train": train, "weights": weights, "methods": methods}
    return json.dumps(content, indent=1) + "\n"


def read(path: Path, budget: str, wanted: Mapping[str, Iterable[str]]) -> Given:
    """Choices made before. `wanted` are the methods asked for, with the names of their values.

    Raises UsageError for choices of another budget or without a method, and DataError for what is not such a file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"lowshot.chosen={path} cannot be read: {error}") from None
    methods = content.get("methods") if isinstance(content, dict) else None
    if not isinstance(methods, dict) or content.get("format") != FORMAT:
        raise DataError(f"lowshot.chosen={path} is not a file of choices; lowshot writes them as lowshot/chosen-….json")
    if missing := [method for method in wanted if method not in methods]:
        raise UsageError(
            f"lowshot.chosen={path} has no choice for {', '.join(missing)}, only for {', '.join(sorted(methods))}; "
            f"leave it out of lowshot.methods, or choose without lowshot.chosen"
        )
    if content.get("budget") != budget and any("lr" in names for names in wanted.values()):
        raise UsageError(
            f"lowshot.chosen={path} is of lowshot.budget={content.get('budget')}, and {budget} is asked for: rates of "
            f"one say nothing about the other"
        )
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Given({name: _choice(methods[name], names, path) for name, names in wanted.items()}, sha256)


def _choice(entry: Any, names: Iterable[str], path: Path) -> Choice:
    values = entry.get("values") if isinstance(entry, dict) else None
    if not isinstance(values, dict) or set(values) != set(names) or not all(map(_is_number, values.values())):
        raise DataError(f"lowshot.chosen={path}: expected numbers from 0 for {', '.join(names)}, found {values}")
    return Choice({name: float(value) for name, value in values.items()}, f"{path.name}: {entry.get('on')}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0
