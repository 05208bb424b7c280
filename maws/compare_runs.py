"""How far apart two finished runs of one configuration are: samples, metrics, released weights, saved state.

    found = compare(Path("runs/straight"), Path("runs/interrupted"))
    found.same()                      # to the bit
    found.beyond(tolerance)           # what is further apart than allowed, in words

Both need `log.keys=yes` and `log.every=1`. The runs may have been on different numbers of ranks.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from maws import checkpoint
from maws.checkpoint import CheckpointError, RankFiles
from maws.files import json_lines
from maws.release import open_release
from maws.weight_files import WeightFiles

# Of metrics.jsonl's `train/`: how fast it went, and where; all else there are losses.
NOT_LOSSES = ("images_per_second", "step_ms", "mfu", "lr", "grad_norm", "epoch")


@dataclass(frozen=True)
class Tolerance:
    """The largest differences that are allowed."""

    loss: float = 0.0  # of any logged loss, absolute
    grad_norm: float = 0.0  # relative
    weights: float = 0.0  # of any released weight, absolute

    def times(self, factor: float) -> "Tolerance":
        return replace(self, **{name: value * factor for name, value in asdict(self).items()})


@dataclass
class Difference:
    """The largest one of a kind, and where it is: a step, or the name of a tensor."""

    largest: float = 0.0
    where: str = ""

    def add(self, value: float, where: str) -> None:
        value = math.inf if math.isnan(value) else value
        if value > self.largest:
            self.largest, self.where = value, where


@dataclass
class Found:
    """What `compare` has found."""

    steps: int
    faults: list[str] = field(default_factory=list)  # steps that are missing or written twice
    samples: str = ""  # the first step with other samples, and which; empty: there is none
    loss: Difference = field(default_factory=Difference)
    lr: Difference = field(default_factory=Difference)
    grad_norm: Difference = field(default_factory=Difference)
    weights: Difference = field(default_factory=Difference)
    state: Difference = field(default_factory=Difference)  # what only a checkpoint has: moments, means, statistics

    def same(self) -> bool:
        """Are the runs the same to the bit?"""
        kinds = (self.loss, self.lr, self.grad_norm, self.weights, self.state)
        return not self.faults and not self.samples and all(kind.largest == 0 for kind in kinds)

    def beyond(self, allowed: Tolerance) -> list[str]:
        """What is further apart than allowed, in words. The schedule and the samples must be the same in any case."""
        out = self.faults + ([self.samples] if self.samples else [])
        limits = {"loss": allowed.loss, "lr": 0.0, "grad_norm": allowed.grad_norm, "weights": allowed.weights}
        for name, limit in limits.items():
            kind: Difference = getattr(self, name)
            if kind.largest > limit:
                out.append(f"{name} differs by {kind.largest:.2g} ({kind.where}), {limit:.2g} is allowed")
        return out

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(one: Path, other: Path) -> Found:
    """Raises CheckpointError when a run is not finished or was trained without what is compared."""
    lines, others = lines_of(one), lines_of(other)
    found = Found(steps=max(lines))
    for run, of in ((one, lines), (other, others)):
        if missing := sorted(set(range(1, found.steps + 1)) ^ set(of)):
            found.faults.append(f"metrics.jsonl of {run} lacks or adds step {missing[0]}")
        if doubled := [step for step, entries in of.items() if len(entries) > 1]:
            found.faults.append(f"metrics.jsonl of {run} has step {doubled[0]} {len(of[doubled[0]])} times")
    for step in sorted(set(lines) & set(others)):
        _add_metrics(found, step, lines[step][-1], others[step][-1])
    found.samples = _other_samples(samples_of(one), samples_of(other), found.steps)
    for name, a, b in _weights(one, other):
        found.weights.add(_distance(a, b), name)
    for name, a, b in _state(one, other):
        found.state.add(_distance(a, b), name)
    return found


def lines_of(run: Path) -> dict[int, list[dict[str, Any]]]:
    """The lines of training in metrics.jsonl, by step."""
    path, out = run / "metrics.jsonl", dict[int, list[dict[str, Any]]]()
    for line in json_lines(path):
        if "train/loss" in line:
            out.setdefault(line["step"], []).append(line)
    if not out:
        raise CheckpointError(f"{path} has no line of training: the run was not started, or not here")
    return out


def _add_metrics(found: Found, step: int, a: dict[str, Any], b: dict[str, Any]) -> None:
    where = f"step {step}"
    values = {k for k in a.keys() | b.keys() if k.startswith("train/")}
    for name in {k.removeprefix("train/") for k in values}.difference(NOT_LOSSES):
        found.loss.add(_gap(a, b, f"train/{name}"), f"{where}, {name}")
    found.lr.add(_gap(a, b, "train/lr"), where)
    size = abs(a.get("train/grad_norm") or 0.0)
    found.grad_norm.add(_gap(a, b, "train/grad_norm") / (size or 1.0), where)


def _gap(a: dict[str, Any], b: dict[str, Any], name: str) -> float:
    """Infinite where one of them has no such number."""
    x, y = a.get(name), b.get(name)
    return math.inf if x is None or y is None else abs(x - y)


def samples_of(run: Path) -> dict[int, Counter[str]]:
    """Which samples each step had (steps from 0), on all ranks together; a sample may be there twice."""
    out: dict[int, Counter[str]] = {}
    for path in sorted((run / "keys").glob("rank_*.jsonl")):
        for line in json_lines(path):
            out.setdefault(line["step"], Counter()).update(line["keys"])
    if not out:
        raise CheckpointError(f"{run} has no list of the samples of its steps; it needs log.keys=yes")
    return out


def _other_samples(one: dict[int, Counter[str]], other: dict[int, Counter[str]], steps: int) -> str:
    for step in range(max(steps, len(one), len(other))):
        a, b = one.get(step), other.get(step)
        if a is None or b is None:
            return f"the samples of step {step + 1} are not listed"
        if a != b:
            lost, new = sorted((a - b).elements()), sorted((b - a).elements())
            return f"step {step + 1} has other samples: {', '.join(new[:3]) or 'none'} for {', '.join(lost[:3])}"
    return ""


def _weights(one: Path, other: Path) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    with WeightFiles(open_release(one).weights) as a, WeightFiles(open_release(other).weights) as b:
        for name in sorted(set(a.names) | set(b.names)):
            yield name, a.read(name) if name in a.names else None, b.read(name) if name in b.names else None


def _state(one: Path, other: Path) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Every tensor of the newest checkpoints, put together from the parts of their ranks."""
    states, files, newest = [], [], []
    for run in (one, other):
        found = checkpoint.complete(run / "checkpoints")
        if not found:
            raise CheckpointError(f"{run / 'checkpoints'} holds no checkpoint")
        newest.append(found[-1])
        states.append(checkpoint.read_state(found[-1]))
        files.append(RankFiles(found[-1], states[-1]["ranks"]))
    if states[0]["step"] != states[1]["step"]:
        raise CheckpointError(f"{newest[0]} and {newest[1]} cannot be compared: they are of different steps")
    names = [f.keys() for f in files]
    for name in sorted(names[0] | names[1]):
        parts = [_whole(f, s, name) if name in n else None for f, s, n in zip(files, states, names, strict=True)]
        yield name, parts[0], parts[1]


def _whole(files: RankFiles, state: dict[str, Any], name: str) -> Tensor:
    if name in state["buffers"]:
        return files.whole(name)
    elements = state["elements"][name.partition("/")[2]]
    return files.cut(name, 0, elements, elements)


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None or a.shape != b.shape:
        return math.inf
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
