"""The figures of the data page: plain numbers in, an SVG for light and one for dark screens out, as data URIs."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global state, no display
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray


@dataclass(frozen=True)
class Picture:
    light: str
    dark: str


@dataclass(frozen=True)
class Colours:
    """Okabe and Ito's palette where the ground allows: told apart by colour-blind readers and in grey print."""

    ink: str
    soft: str
    grid: str
    main: str
    second: str
    third: str


LIGHT: Final = Colours("#23272e", "#5b616b", "#e6e8ec", "#0072B2", "#D55E00", "#009E73")
DARK: Final = Colours("#e4e7ec", "#a2a9b4", "#30353d", "#56B4E9", "#E69F00", "#2fbf96")
SHARES: Final = (0.5, 0.9)  # of the labels, marked in the coverage figure


def _style(colours: Colours) -> dict[Any, Any]:
    return {
        "font.family": "sans-serif",
        "font.size": 10,
        "svg.fonttype": "path",  # the same letters on every machine
        "svg.hashsalt": "maws",  # the same bytes for the same data
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": colours.soft,
        "axes.labelcolor": colours.soft,
        "text.color": colours.ink,
        "xtick.color": colours.soft,
        "ytick.color": colours.soft,
        "axes.grid": True,
        "grid.color": colours.grid,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "legend.frameon": False,
        "legend.labelcolor": colours.ink,
    }


def draw(width: float, height: float, columns: int, paint: Callable[[Sequence[Axes], Colours], None]) -> Picture:
    """Paint the same figure on a light and on a dark ground."""
    pages = []
    for colours in (LIGHT, DARK):
        with mpl.rc_context(_style(colours)):
            figure = Figure(figsize=(width, height), layout="constrained")
            paint(figure.subplots(1, columns, squeeze=False)[0], colours)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        pages.append(f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return Picture(*pages)


def zipf(images: Sequence[int], seen: NDArray[np.float64]) -> Picture:
    """Left: images per label by rank, and how often an epoch shows it. Right: the share of labels the first k cover."""
    ranked = np.sort(np.asarray(images, float))[::-1]
    order = np.argsort(-np.asarray(images, float), kind="stable")
    ranks = np.arange(1, len(ranked) + 1)

    def paint(axes: Sequence[Axes], colours: Colours) -> None:
        left, right = axes
        marker = "o" if len(ranked) == 1 else None
        if np.any(seen > 0) and not np.allclose(seen[order], ranked, rtol=1e-3):
            left.loglog(ranks, seen[order], color=colours.second, linewidth=1.2, alpha=0.8, label="samples of an epoch")
        left.loglog(ranks, ranked, color=colours.main, linewidth=2, label="images", marker=marker)
        left.set_xlabel("label, by rank")
        left.set_ylabel("images, samples")
        left.set_title("How often each label is there", loc="left", fontsize=11, fontweight="bold")
        left.legend(loc="lower left", fontsize=9)
        covered = np.cumsum(ranked) / ranked.sum()
        right.semilogx(ranks, 100 * covered, color=colours.main, linewidth=2, marker=marker)
        for share in SHARES:
            rank = needed(ranked, share)
            right.plot([rank, rank], [0, 100 * covered[rank - 1]], color=colours.second, linewidth=1, linestyle=":")
            right.annotate(
                f" {rank:,}: {100 * covered[rank - 1]:.0f} %",
                (rank, 100 * covered[rank - 1]),
                xytext=(3, -12),
                textcoords="offset points",
                fontsize=9,
                color=colours.soft,
            )
        right.set_ylim(0, 102)
        right.set_xlabel("the first so many labels")
        right.set_ylabel("% of all labels of images")
        right.set_title("Coverage of the head", loc="left", fontsize=11, fontweight="bold")

    return draw(10.4, 3.5, 2, paint)


def needed(ranked: NDArray[np.float64], share: float) -> int:
    """How many of the most frequent labels make up this share of all."""
    covered = np.cumsum(ranked) / ranked.sum()
    return int(np.searchsorted(covered, share - 1e-12)) + 1


def histogram(values: dict[int, int], what: str, title: str) -> Picture:
    """Bars over small whole numbers."""

    def paint(axes: Sequence[Axes], colours: Colours) -> None:
        axes[0].bar(list(values), list(values.values()), color=colours.main, width=0.8)
        axes[0].set_xlabel(what)
        axes[0].set_ylabel("images")
        axes[0].set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes[0].grid(False, axis="x")
        axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw(5.1, 2.7, 1, paint)
