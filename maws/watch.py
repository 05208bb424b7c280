"""Runs in the terminal, while they train: progress, curves, speed, what went wrong, and whether they are still alive.

    python -m maws watch runs/mae runs/wsp
    python -m maws watch runs/mae --once | tee frame.txt

Reads what the run writes into its folder, so it works from any machine that sees the disk, disturbs nothing, and can be
started before the run and stopped at any time.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from maws.config import STAGE_NAMES, ConfigError
from maws.follow import Followed, ago

WIDTH = 78  # columns of one run's frame; more runs than fit beside each other go below
CHART = 34  # columns of a curve
LOSS = 54, 4  # columns and rows of the loss
BARS = "▁▂▃▄▅▆▇█"
COLOUR = {"waiting": "yellow", "running": "green", "silent": "red", "stopped": "yellow", "done": "cyan"}


def run(options: argparse.Namespace) -> int:
    if options.interval <= 0:
        raise ConfigError(f"--interval {options.interval:g} must be a number of seconds above 0")
    runs = [Followed(Path(folder)) for folder in options.runs]
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH
    if options.once:
        console.print(frame(runs))
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        follow(runs, console, options.interval)
    return 0


def follow(runs: Sequence[Followed], console: Console, interval: float) -> None:
    """Frame after frame, in place on a terminal and below each other elsewhere; until Ctrl-C."""
    if not console.is_terminal:
        while True:
            console.print(frame(runs))
            time.sleep(interval)
    with Live(frame(runs), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(frame(runs), refresh=True)


def frame(runs: Sequence[Followed], now: float | None = None) -> RenderableType:
    """All runs as they are now."""
    for one in runs:
        one.look()
    panels = [panel(one, now) for one in runs]
    return panels[0] if len(panels) == 1 else Columns(panels, padding=(0, 1))


def panel(one: Followed, now: float | None = None) -> Panel:
    state = one.state(now)
    model = ""
    if one.config:
        variant = one.config.get("model", {}).get("variant", "")
        model = f"  {STAGE_NAMES.get(one.config.get('stage', ''), '?')} {variant}"
    name, room = str(one.folder), max(8, WIDTH - 6 - len(model))
    title = Text(name if len(name) <= room else f"…{name[1 - room :]}", style="bold")  # a path's end tells runs apart
    title.append(model, style="not bold")
    words = Text(state.words, style=COLOUR[state.mood])
    if state.mood == "running" and (left := one.last("run/seconds_left")):
        words.append(f", {ago(left)} left")
    parts: list[RenderableType] = [words]
    if one.config:
        parts = [progress(one), words, loss(one), curves(one), facts(one)]
    return Panel(Group(*parts), title=title, title_align="left", width=WIDTH, border_style=COLOUR[state.mood])


def progress(one: Followed) -> Text:
    """`step 480 of 5,000  ━━━━━─────  10 %`."""
    total, text = one.total(), Text(f"step {one.step:,}")
    if not total:
        return text
    share = min(1.0, one.step / total)
    filled = round(CHART * share)
    text.append(f" of {total:,}  ")
    text.append("━" * filled, style="green").append("─" * (CHART - filled), style="dim")
    text.append(f"  {100 * share:.0f} %")
    return text


def loss(one: Followed) -> RenderableType:
    """The loss as dots, its scale on the right and its newest value on the left."""
    if (value := one.last("train/loss")) is None:
        return Text("no step yet", style="dim")
    width, height = LOSS
    rows, low, high = dots(one.curve("train/loss"), width, height)
    table = Table.grid(padding=(0, 1))
    table.add_row(
        Text(f"loss\n{value:.4f}", style="bold"),
        Text("\n".join(rows), style="magenta"),
        Text("\n".join([f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]), style="dim"),
    )
    return table


# metric, its name here, how its newest value is written
CURVES: tuple[tuple[str, str, str], ...] = (
    ("train/lr", "lr", "{:.2e}"),
    ("train/grad_norm", "grad norm", "{:.3g}"),
    ("train/images_per_second", "images/s", "{:,.0f}"),
    ("data/wait_share", "data wait", "{:.1%}"),
    ("train/mfu", "MFU", "{:.1%}"),
)


def curves(one: Followed) -> Table:
    table = Table.grid(padding=(0, 2))
    probes = [(n, n.removeprefix("probe/").replace("_", " "), "{:.1%}") for n in one.curves if _is_score(n)]
    for name, words, form in (*CURVES, *probes):
        if (value := one.last(name)) is None:
            continue
        said = form.format(value)
        if (chance := one.last(_chance(name))) is not None:
            said += f" (chance {chance:.1%})"
        table.add_row(words, Text(sparkline(one.curve(name), CHART), style="cyan"), said)
    return table


def _is_score(name: str) -> bool:
    return name.startswith("probe/") and not name.endswith("_chance")


def _chance(score: str) -> str:
    return score.rpartition("_")[0] + "_chance"


def facts(one: Followed) -> Text:
    """Where it runs, and what happened so far."""
    starts, rewinds, saves = (one.of_kind(kind) for kind in ("start", "rewind", "save"))
    where = []
    if starts:
        where.append(f"{_times(starts[-1].get('ranks', 1), 'rank')} ({starts[-1].get('launcher', '?')})")
    memory = one.last("memory/device_gib") or one.last("memory/process_gib")
    if memory is not None:
        where.append(f"{memory:.1f} GiB")
    if (goodput := one.last("run/goodput")) is not None:
        where.append(f"goodput {goodput:.1%}")
    if saves:
        where.append(f"checkpoint at step {saves[-1]['step']:,}")
    happened = [
        _times(max(0, len(starts) - 1), "restart"), _times(len(rewinds), "rewind"),
        _times(one.bad_samples, "bad sample"),
    ]  # fmt: skip
    for kind, words in (("worker_restart", "worker restart"), ("save_failed", "failed save")):
        if number := len(one.of_kind(kind)):
            happened.append(_times(number, words))
    lines = [" · ".join(line) for line in (where, happened) if line]
    if rewinds:
        newest = rewinds[-1]
        lines.append(f"set back from step {newest['step']:,} to {newest.get('to', 0):,}: {newest.get('why', '')}")
    if failed := [e for e in one.of_kind("save_failed") if not saves or e["step"] > saves[-1]["step"]]:
        lines.append(f"the newest save failed: {failed[-1].get('failure', '')}")
    return Text("\n".join(lines), style="dim")


def _times(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as bars of eight heights, the oldest left."""
    values, low, high = scaled(values, width)
    if high == low:
        return BARS[3] * len(values)
    return "".join(BARS[round(v * (len(BARS) - 1))] for v in values)


def dots(values: Sequence[float], width: int, height: int) -> tuple[list[str], float, float]:
    """Values as dots in `height` rows of characters, each 2 dots wide and 4 high (braille); lowest and highest of the
    scale."""
    values, low, high = scaled(values, 2 * width)
    cells = [[0] * width for _ in range(height)]
    for x, value in enumerate(values):
        y = round((1 - value) * (4 * height - 1))  # from the top
        cells[y // 4][x // 2] |= BRAILLE[y % 4][x % 2]
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells], low, high


BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bit of each dot: row, column


def scaled(values: Sequence[float], number: int) -> tuple[list[float], float, float]:
    """At most `number` values between 0 and 1 (more are averaged in groups), and what 0 and 1 stand for.

    The highest and lowest twentieth are outside of the scale and drawn at its ends: one spike must not flatten the
    rest.
    """
    if len(values) > number:
        edges = [i * len(values) // number for i in range(number + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    ranked = sorted(values)
    outside = len(ranked) // 20
    low, high = (ranked[outside], ranked[-1 - outside]) if ranked else (0.0, 0.0)
    width = (high - low) or 1.0
    return [min(1.0, max(0.0, (v - low) / width)) for v in values], low, high
