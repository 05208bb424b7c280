"""The report's figures of features and attention: plain values in, a data URI out, as figures.py makes them.

Axes: h w a grid of patches.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from eval.figures import STYLE, png, svg

TITLE: Final[dict[str, Any]] = {"loc": "left", "fontsize": 11, "fontweight": "bold", "color": "#23272e"}
WIDTH: Final = 10.4  # inches, as all figures of the page
ACROSS: Final = 3  # panels of a row
TILE: Final = 120  # pixels of a map's picture
SHADES: Final = "viridis_r"  # of blocks: later ones darker
MARK: Final = np.array([0, 255, 120])  # colour of the patch that asks: in no colour of the maps


@dataclass(frozen=True)
class Line:
    """A run's values; runs of one label share a colour and one legend entry."""

    label: str
    values: Sequence[float]


@dataclass(frozen=True)
class Heads:
    """A run's mean distance of every head, by block: L H."""

    label: str
    distances: Sequence[Sequence[float]]
    uniform: float  # what even attention over all patches would give


def spectra(panels: Mapping[str, Sequence[Line]], colour: Mapping[str, str]) -> str:
    """A panel per layer: singular values over their rank, logarithmic."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (title, lines) in zip(axes, panels.items(), strict=True):
            for line in lines:
                values = [value for value in line.values if value > 0]
                ax.plot(range(1, len(values) + 1), values, color=colour[line.label], linewidth=1.6)
            ax.set_yscale("log")
            ax.set_title(title, **TITLE)
            ax.set_xlabel("rank")
            ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            ax.margins(x=0.02)
        low, high = axes[0].get_ylim()
        if high < 100 * low:  # few powers of ten to write beside the axis
            axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes[0].yaxis.set_major_formatter("{x:g}")
            axes[0].yaxis.set_minor_locator(NullLocator())
        axes[0].set_ylabel("singular value")
        _legend(figure, axes[0], colour)
        return svg(figure)


def by_layer(panels: Mapping[str, Sequence[Line]], layers: Sequence[str], colour: Mapping[str, str]) -> str:
    """A panel per quantity: a line per run over the layers."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (title, lines) in zip(axes, panels.items(), strict=True):
            for line in lines:
                ax.plot(range(len(line.values)), line.values, "o-", color=colour[line.label], markersize=4)
            shown = sorted(range(len(layers) - 1, -1, -max(1, math.ceil(len(layers) / 8))))  # the norm is the last
            ax.set_xticks(shown, [layers[place] for place in shown])
            ax.set_title(title, **TITLE)
            ax.set_xlabel("after block (norm: the final one)")
            values = [value for line in lines for value in line.values]
            if title.startswith("%"):  # these may all be near 100
                margin = max(0.5, 0.06 * (max(values) - min(values)))
                ax.set_ylim(max(0, min(values) - margin), min(100.5, max(values) + margin))
            else:
                ax.set_ylim(0, 1.08 * max(values) or 1)
        _legend(figure, axes[0], colour)
        return svg(figure)


def differences(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A panel per pair of runs: differences of ln singular values over rank, a line per block, the norm's dashed."""
    with mpl.rc_context(STYLE):
        rows = math.ceil(len(panels) / ACROSS)
        across = min(ACROSS, len(panels))
        figure = Figure(figsize=(WIDTH, 3.0 * rows), layout="constrained")
        axes = figure.subplots(rows, across, sharey=True, squeeze=False).flatten()
        depth = max(len(_blocks(layers)) for layers in panels.values())
        scale = Normalize(1, max(2, depth))
        for ax, (title, layers) in zip(axes, panels.items(), strict=False):
            ax.axhline(0, color="#333333", linewidth=1)
            for number, values in enumerate(_blocks(layers), start=1):
                ax.plot(range(1, len(values) + 1), values, color=mpl.colormaps[SHADES](scale(number)), linewidth=1.3)
            if norm := layers.get("norm"):
                ax.plot(range(1, len(norm) + 1), norm, color="#333333", linewidth=1.3, linestyle="--")
            ax.set_title(title, **TITLE)
            ax.set_xlabel("rank")
            ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            ax.margins(x=0.02)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        for place in range(0, len(axes), across):
            axes[place].set_ylabel("difference of ln singular values")
        bar = figure.colorbar(ScalarMappable(scale, SHADES), ax=list(axes), label="block", pad=0.01)
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        return svg(figure)


def _blocks(layers: Mapping[str, Sequence[float]]) -> list[Sequence[float]]:
    return [values for name, values in layers.items() if name != "norm"]


def distances(runs: Sequence[Heads], colour: Mapping[str, str]) -> str:
    """A panel per label: a dot per head over the blocks, their mean as a line, even attention dotted."""
    labels = list(dict.fromkeys(run.label for run in runs))
    top = 1.06 * max(max(heads) for run in runs for heads in [*run.distances, [run.uniform]]) or 1
    with mpl.rc_context(STYLE):
        rows, across = math.ceil(len(labels) / ACROSS), min(ACROSS, len(labels))
        figure = Figure(figsize=(WIDTH, 3.0 * rows), layout="constrained")
        axes = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False).flatten()
        for ax, label in zip(axes, labels, strict=False):
            for run in (run for run in runs if run.label == label):
                _heads(ax, run, colour[label])
            ax.set_title(label, **TITLE)
            ax.set_xlabel("block")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_ylim(0, top)
        for ax in axes[len(labels) :]:
            ax.set_visible(False)
        for place in range(0, len(axes), across):
            axes[place].set_ylabel("mean distance, pixels")
        return svg(figure)


def _heads(ax: Any, run: Heads, shade: str) -> None:
    blocks = range(1, len(run.distances) + 1)
    for block, heads in zip(blocks, run.distances, strict=True):
        ax.plot([block] * len(heads), heads, "o", color=shade, markersize=4.5, alpha=0.55, markeredgewidth=0)
    ax.plot(blocks, [float(np.mean(heads)) for heads in run.distances], color=shade, linewidth=1.6)
    ax.axhline(run.uniform, color="#333333", linewidth=1.1, linestyle=":")


def _legend(figure: Figure, ax: Any, colour: Mapping[str, str]) -> None:
    handles = [ax.plot([], [], color=shade, linewidth=2, label=label)[0] for label, shade in colour.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=max(1, len(colour)), fontsize=10)


# --------------------------------------------------------------------------------------------------------------- tiles


def heat(values: np.ndarray) -> str:
    """A map h w as a picture, its own maximum the brightest; upsampled bicubically."""
    scaled = np.clip(values / (values.max() or 1.0), 0, 1).astype(np.float32)
    fine = Image.fromarray(scaled).resize(_fit(values.shape[1], values.shape[0]), Image.Resampling.BICUBIC)
    return png((mpl.colormaps["inferno"](np.clip(np.asarray(fine), 0, 1))[..., :3] * 255).round().astype(np.uint8))


def marked(picture: Image.Image, cell: tuple[int, int], grid: tuple[int, int]) -> str:
    """The picture with a frame around the patch in this row and column."""
    width, height = _fit(grid[1], grid[0])
    pixels = np.array(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    top, bottom = (round((cell[0] + more) * height / grid[0]) for more in (0, 1))
    left, right = (round((cell[1] + more) * width / grid[1]) for more in (0, 1))
    inner = slice(max(2, top), min(height - 2, bottom)), slice(max(2, left), min(width - 2, right))
    inside = pixels[inner].copy()
    pixels[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = MARK
    pixels[inner] = inside
    return png(pixels)


def _fit(width: int, height: int) -> tuple[int, int]:
    """Width and height of a tile of this shape."""
    scale = TILE / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
