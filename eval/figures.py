"""The report's figures: plain values in, an SVG or PNG out as a data URI, so that the page needs no other file."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure  # not pyplot: no global state, no display
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from eval.report_scores import Row

# Okabe and Ito's palette: told apart by colour-blind readers and in grey print.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
KNOWN = {"MAE": "#0072B2", "WSP": "#D55E00", "MAE→WSP": "#009E73", "MAE→WSP→LiT": "#CC79A7"}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "path",  # the same letters on every machine
    "svg.hashsalt": "maws",  # the same bytes for the same data
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#3a3f47",
    "xtick.color": "#5b616b",
    "ytick.color": "#5b616b",
    "axes.grid": True,
    "grid.color": "#e6e8ec",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """One line of a panel over steps."""

    label: str  # runs of one label share a colour and one legend entry
    steps: Sequence[int]
    values: Sequence[float]
    marks: Sequence[int] = ()  # steps to draw a dotted upright line at


def colours(labels: Sequence[str]) -> dict[str, str]:
    """A fixed colour for the lineages everybody meets, the next free one for the others."""
    free = [colour for colour in PALETTE if colour not in KNOWN.values()]
    found: dict[str, str] = {}
    for label in labels:
        found[label] = KNOWN.get(label) or free[sum(known not in KNOWN for known in found) % len(free)]
    return found


def loss_curves(panels: dict[str, list[Curve]]) -> str:
    """A panel per stage: every logged value faint, a running mean over 5 % of the run on top."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.1), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        colour = colours([curve.label for curves in panels.values() for curve in curves])
        for ax, (title, curves) in zip(axes, panels.items(), strict=True):
            labels = _draw(ax, title, curves, colour)
            ax.set_ylabel("loss")
            if len(labels) > 1:
                ax.legend(fontsize=9)
        return svg(figure)


def training_curves(panels: dict[str, list[Curve]]) -> str:
    """A panel per quantity, three beside each other; one legend for all."""
    with mpl.rc_context(STYLE):
        rows = -(-len(panels) // 3)
        figure = Figure(figsize=(10.4, 0.3 + 2.6 * rows), layout="constrained")
        axes = figure.subplots(rows, min(3, len(panels)), squeeze=False).flatten()
        colour = colours(list(dict.fromkeys(curve.label for curves in panels.values() for curve in curves)))
        for ax, (title, curves) in zip(axes, panels.items(), strict=False):
            _draw(ax, title, curves, colour)
            if "norm" in title and all(value > 0 for curve in curves for value in curve.values):
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_locator(NullLocator())
            else:
                ax.set_ylim(bottom=0)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        if len(colour) > 1:
            handles = [axes[0].plot([], [], color=shade, label=label)[0] for label, shade in colour.items()]
            figure.legend(handles=handles, loc="outside upper left", ncols=len(colour), fontsize=9)
        return svg(figure)


def _draw(ax: Any, title: str, curves: Sequence[Curve], colour: dict[str, str]) -> set[str]:
    """Every value faint, a running mean over 5 % of the run on top; the labels that were drawn."""
    seen: set[str] = set()
    for curve in curves:
        shade = colour[curve.label]
        ax.plot(curve.steps, curve.values, color=shade, alpha=0.22, linewidth=0.8)
        label = curve.label if curve.label not in seen else None
        seen.add(curve.label)
        ax.plot(curve.steps, _running_mean(curve.values), color=shade, linewidth=1.7, label=label)
        for step in curve.marks:
            ax.axvline(step, color=shade, linewidth=1, linestyle=":")
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#23272e")
    ax.set_xlabel("step")
    ax.margins(x=0.01)
    return seen


def _running_mean(values: Sequence[float]) -> np.ndarray:
    width = max(1, len(values) // 20)
    total = np.cumsum(np.insert(np.asarray(values, dtype=float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (total[ends] - total[starts]) / (ends - starts)


def label_histogram(counts: Sequence[int], names: Sequence[str]) -> str:
    """Left: how many images each synset has, by rank, both axes logarithmic. Right: the head and the tail by name."""
    order = sorted(range(len(counts)), key=lambda index: (-counts[index], names[index]))
    ranked = [counts[index] for index in order]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.7), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
        left.loglog(range(1, len(ranked) + 1), ranked, color="#0072B2", linewidth=2)
        left.fill_between(range(1, len(ranked) + 1), ranked, 0.8, color="#0072B2", alpha=0.12)
        left.set_ylim(bottom=max(0.8, min(ranked, default=1) * 0.8))
        left.set_xlabel("synset, by rank")
        left.set_ylabel("images")
        left.set_title(f"{len(ranked):,} synsets", loc="left", fontsize=11, fontweight="bold", color="#23272e")
        head = order[:12]
        tail = order[-6:] if len(order) > 18 else []
        shown = head + tail
        places = [row + (1 if row >= len(head) else 0) for row in range(len(shown))]
        right.barh(
            places, [counts[i] for i in shown], color=["#0072B2"] * len(head) + ["#E69F00"] * len(tail), height=0.72
        )
        right.set_yticks(places, [names[i] for i in shown], fontsize=9)
        right.invert_yaxis()
        right.set_xscale("log")
        right.set_xlabel("images")
        right.grid(False, axis="y")
        right.set_title("head and tail", loc="left", fontsize=11, fontweight="bold", color="#23272e")
        for place, index in zip(places, shown, strict=True):
            right.annotate(f" {counts[index]:,}", (counts[index], place), va="center", fontsize=8, color="#5b616b")
        right.margins(x=0.08)
        return svg(figure)


def score_plot(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A line per metric, a dot with its interval per lineage, a tick at chance."""
    colour = colours(columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 0.9 + 0.42 * len(rows)), layout="constrained")
        ax = figure.subplots()
        for place, row in enumerate(rows):
            present = [column for column in columns if column in row.cells]
            for number, column in enumerate(present):
                cell = row.cells[column]
                y = place + (number - (len(present) - 1) / 2) * 0.2
                ax.plot(
                    [100 * max(0, cell.low), 100 * min(1, cell.high)],
                    [y, y],
                    color=colour[column],
                    linewidth=2,
                    alpha=0.45,
                )
                ax.plot(100 * cell.mean, y, "o", color=colour[column], markersize=6)
            if row.chance is not None:
                ax.plot(
                    [100 * row.chance] * 2, [place - 0.36, place + 0.36], color="#333333", linewidth=1.2, linestyle=":"
                )
        ax.set_yticks(range(len(rows)), [" · ".join(filter(None, (row.evaluator, row.metric, row.on))) for row in rows])
        ax.invert_yaxis()
        ax.set_xlim(left=0)
        ax.set_xlabel("% right, with 95 % intervals; dotted: chance")
        ax.grid(False, axis="y")
        for column in columns:
            ax.plot([], [], "o", color=colour[column], label=column)
        figure.legend(loc="outside upper left", ncols=len(columns), fontsize=10)
        return svg(figure)


def png(pixels: np.ndarray) -> str:
    """H W 3, uint8 -> data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return _uri("image/png", buffer.getvalue())


def thumbnail(image: Image.Image, side: int = 112) -> str:
    """A picture at most `side` pixels wide and high; small ones keep their pixels."""
    image = image.convert("RGB")
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return png(np.asarray(image))


def svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _uri("image/svg+xml", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
