"""The comparison on a page: FOLDER/compare.json as a section of the report, and as a page of its own."""

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from data_pipeline.errors import DataError
from eval import figures
from eval.figures_compare import Difference, Line, difference_plot, learning_curves
from eval.report_runs import Folder
from eval.report_templates import fill

CONCLUSIONS = {
    "apart": "apart",
    "apart for these weights": "apart for these weights; for the way of training: not shown",
    "not told apart": "not told apart",
}


def section(folder: Folder, path: Path) -> Markup | None:
    """The section of a folder with a finished comparison; None elsewhere."""
    return rendered(path, "compare.html.j2") if (path / "compare.json").is_file() else None


def page(path: Path) -> str:
    """The page of a folder with a finished comparison. Raises DataError when its compare.json cannot be read."""
    return str(rendered(path, "compare_page.html.j2"))


def rendered(path: Path, template: str) -> Markup:
    found = read(path / "compare.json")
    titles, headline = found["titles"], found["metrics"][0]
    values = {
        "found": found,
        "titles": titles,
        "colours": figures.colours(list(titles.values())),
        "headline": headline,
        "curves": curves(headline, titles),
        "differences": differences(headline, titles),
        "conclusions": CONCLUSIONS,
        "rungs": found["config"]["budgets"],
    }
    return fill(template, values, points=points, p=p_value, flops=flops)


def read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != 1 or not found["metrics"]:
            raise ValueError("not a comparison of this version")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read ({error}); `python -m eval compare` writes it again") from None
    return found


def curves(metric: dict[str, Any], titles: dict[str, str]) -> str:
    lines = []
    for arm, title in titles.items():
        cells = sorted((c for c in metric["cells"] if c["arm"] == arm), key=lambda c: c["multiply_adds"])
        means = [c["mean"] for c in cells]
        lows = [c["mean"] if c["low"] is None else c["low"] for c in cells]
        highs = [c["mean"] if c["high"] is None else c["high"] for c in cells]
        lines.append(Line(title, [2 * c["multiply_adds"] for c in cells], means, lows, highs))
    return learning_curves(lines, metric["name"], metric["chance"])


def differences(metric: dict[str, Any], titles: dict[str, str]) -> str:
    return difference_plot(
        [
            Difference(
                f"{titles[pair['first']]} - {titles[pair['second']]}",
                pair["difference"],
                pair["low"],
                pair["high"],
                pair["conclusion"] == "apart",
            )
            for pair in metric["pairs"]
            if pair["budget"] == 1.0
        ]
    )


def points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f}"


def p_value(value: float | None) -> str:
    return "–" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def flops(multiply_adds: float) -> str:
    return f"{2 * multiply_adds:.2e}".replace("e+", "e") if multiply_adds else "0"
