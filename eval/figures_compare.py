"""Figures of a comparison: scores against training FLOPs, and differences with their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure

from eval.figures import STYLE, colours, svg


@dataclass(frozen=True)
class Line:
    """One arm: a point per rung, with its interval where there is one."""

    label: str
    flops: Sequence[float]  # 0: not trained, drawn as a line across
    means: Sequence[float]  # shares
    lows: Sequence[float]
    highs: Sequence[float]


@dataclass(frozen=True)
class Difference:
    label: str
    value: float
    low: float | None
    high: float | None
    is_clear: bool


def learning_curves(lines: Sequence[Line], name: str, chance: float | None) -> str:
    """Score against training FLOPs, a band for the interval; an untrained arm is a dashed line."""
    shade = colours([line.label for line in lines])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        ax = figure.subplots()
        for line in lines:
            colour = shade[line.label]
            if not any(line.flops):
                ax.axhline(100 * line.means[0], color=colour, linestyle="--", linewidth=1.5, label=line.label)
                ax.axhspan(100 * line.lows[0], 100 * line.highs[0], color=colour, alpha=0.08, linewidth=0)
                continue
            ax.plot(line.flops, [100 * v for v in line.means], "o-", color=colour, linewidth=1.8, label=line.label)
            low, high = [100 * v for v in line.lows], [100 * v for v in line.highs]
            if len(line.flops) > 1:
                ax.fill_between(line.flops, low, high, color=colour, alpha=0.13, linewidth=0)
            ax.vlines(line.flops, low, high, color=colour, linewidth=1.5, alpha=0.6)
        if chance is not None:
            ax.axhline(100 * chance, color="#333333", linestyle=":", linewidth=1.2, label="chance")
        ax.set_xscale("log")
        ax.set_xlabel("training FLOPs (2 x multiply-adds), logarithmic")
        ax.set_ylabel(f"{name}, %")
        ax.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=len(lines) + 1, fontsize=9)
        return svg(figure)


def difference_plot(rows: Sequence[Difference]) -> str:
    """A line per pair: the difference, its interval, and 0."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.8 + 0.38 * len(rows)), layout="constrained")
        ax = figure.subplots()
        for place, row in enumerate(rows):
            colour = "#009E73" if row.is_clear else "#8a8f98"
            if row.low is not None and row.high is not None:
                ax.plot([100 * row.low, 100 * row.high], [place, place], color=colour, linewidth=2.5, alpha=0.5)
            ax.plot(100 * row.value, place, "o", color=colour, markersize=6)
        ax.axvline(0, color="#333333", linewidth=1)
        ax.set_yticks(range(len(rows)), [row.label for row in rows])
        ax.invert_yaxis()
        ax.grid(False, axis="y")
        ax.set_xlabel("points of a percent, with 95 % bootstrap interval over seeds and images")
        return svg(figure)
