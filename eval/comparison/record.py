"""A comparison as compare.json, and as lines for the terminal."""

import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.comparison.outcome import Cell, Metric, Pair, reaches, title
from eval.comparison.plan import Plan
from eval.comparison.verdict import caveats, p, verdict
from eval.results import version

FORMAT = 1
LIBRARIES = ("torch", "timm", "deepspeed", "numpy", "maws-open")


def as_json(plan: Plan, metrics: Sequence[Metric]) -> str:
    """Everything: what was asked, what was trained, every score, every test, the words."""
    content = {
        "format": FORMAT,
        "config": dataclasses.asdict(plan.comparison),
        "total_multiply_adds": plan.total,
        "multiply_adds_of_a_step": plan.unit,
        "titles": {arm: title(arm) for arm in plan.comparison.arms},
        "entries": [_entry(entry) for entry in plan.entries],
        "metrics": [_metric(metric, plan) for metric in metrics],
        "verdict": verdict(metrics[0], plan),
        "caveats": caveats(plan),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _entry(entry: Any) -> dict[str, Any]:
    return {
        "arm": entry.arm,
        "budget": entry.budget,
        "seed": entry.seed,
        "run": Path(entry.run).name,
        "multiply_adds": entry.multiply_adds,
        "trainings": [dataclasses.asdict(training) for training in entry.trainings],
    }


def _metric(metric: Metric, plan: Plan) -> dict[str, Any]:
    return {
        "name": metric.name,
        "images": metric.images,
        "chance": metric.chance,
        "cells": [_cell(cell) for cell in metric.cells],
        "pairs": [_pair(pair) for pair in metric.pairs],
        "reaches": [dataclasses.asdict(one) for one in reaches(metric, plan.comparison.arms)],
    }


def _cell(cell: Cell) -> dict[str, Any]:
    return dataclasses.asdict(cell) | {"mean": cell.mean, "deviation": cell.deviation}


def _pair(pair: Pair) -> dict[str, Any]:
    return dataclasses.asdict(pair) | {"conclusion": pair.conclusion}


# ------------------------------------------------------------------------------------------------------------ terminal


def as_text(plan: Plan, metrics: Sequence[Metric]) -> list[str]:
    """Scores of the full budget, the pairs of the headline, the verdict."""
    asked = plan.comparison
    headline = metrics[0]
    width = max(len(metric.name) for metric in metrics)
    head = f"{'%, mean ± sd over seeds':<{max(24, width)}}" + "".join(f"{title(arm):>14}" for arm in asked.arms)
    lines = [head, "-" * len(head)]
    for metric in metrics:
        for budget in asked.budgets:
            cells = {cell.arm: cell for cell in metric.cells if cell.budget in (budget, 0.0)}
            name = metric.name if budget == asked.budgets[0] else ""
            label = f"{name:<{width}} {100 * budget:>4g} %"
            lines.append(f"{label:<{max(24, width)}}" + "".join(f"{cell_text(cells[arm]):>14}" for arm in asked.arms))
    lines += ["", f"{headline.name} at the full budget, points:"]
    lines += [pair_text(pair) for pair in headline.pairs if pair.budget == 1.0]
    return [*lines, "", *verdict(headline, plan), "", *caveats(plan)]


def cell_text(cell: Cell) -> str:
    spread = "" if cell.deviation is None else f" ± {100 * cell.deviation:.1f}"
    return f"{100 * cell.mean:.1f}{spread}"


def pair_text(pair: Pair) -> str:
    both = f"{title(pair.first)} - {title(pair.second)}"
    interval = "no interval" if pair.low is None else f"{100 * pair.low:+.1f} to {100 * (pair.high or 0):+.1f}"
    t = "t over seeds: –" if pair.over_seeds.t is None else f"t over seeds: {p(pair.holm['t'])}"
    images = "" if pair.images is None else f"   images: {p(pair.holm['images'])}"
    return f"  {both:<24} {100 * pair.difference:+6.1f}   {interval:<16} {t}{images}   {pair.conclusion}"
