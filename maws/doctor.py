"""python -m maws doctor: is this machine ready to train? Each finding says what was seen, and what to do about it.

    python -m maws doctor --shards shards/ --run runs/mae

Looks for seconds, changes nothing, asks no network. Exit code 0 when there is no problem; warnings are none.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from maws.checks import OK, PROBLEM, WARNING, Check, Finding, data, found, machine, software

WIDTH = 110  # columns, where there is no terminal to ask
STYLES = {OK: "green", WARNING: "yellow", PROBLEM: "bold red"}


def run(options: argparse.Namespace) -> int:
    """The command `doctor`: 0 without a problem, 1 with one."""
    findings = [f for subject, check in checks(options) for f in found(subject, check)]
    if options.json:
        sys.stdout.write(json.dumps([asdict(f) for f in findings], indent=1) + "\n")
    else:
        show(findings)
    return 1 if any(f.level == PROBLEM for f in findings) else 0


def checks(options: argparse.Namespace) -> Iterator[tuple[str, Check]]:
    """What is looked at, in the order in which it is printed."""
    folder = Path(options.run) if options.run else Path()
    yield "python", software.python
    yield "packages", software.packages
    yield "torch", software.torch_and_vision
    yield "gpus", software.gpus
    yield "nccl", software.nccl
    yield "deepspeed", software.deepspeed
    yield "gloo", machine.gloo
    yield "processors", machine.cores
    yield "memory", machine.memory
    yield "shared memory", machine.shared_memory
    yield "open files", machine.open_files
    yield "disk", partial(machine.disk, folder, kept_bytes(folder))
    yield "file system", partial(machine.durability, folder)
    yield "clock", machine.clock
    yield "port", machine.port
    if options.shards:
        yield "shards", partial(data.shards, Path(options.shards), options.full)
    if options.tokenizer:
        yield "tokenizer", partial(data.tokenizer, Path(options.tokenizer))
    if options.run:
        yield "run", partial(data.run, folder)


def kept_bytes(run: Path) -> float:
    """What the checkpoints of a run will take: those it keeps and one under way, by the size of the newest there is."""
    sizes = {folder: sum(f.stat().st_size for f in folder.iterdir()) for folder in (run / "checkpoints").glob("step_*")}
    if not sizes:
        return 0.0
    try:
        keep = json.loads((run / "config.json").read_text())["checkpoint"]["keep"]
    except (OSError, ValueError, KeyError, TypeError):
        keep = 2
    return max(0, keep + 1 - len(sizes)) * sizes[max(sizes)]


def show(findings: Iterable[Finding]) -> None:
    """A line for each finding, and below it what to do; then how many there are of each kind."""
    terminal, findings = sys.stdout.isatty(), list(findings)
    console = Console(width=None if terminal else WIDTH, highlight=False, markup=False, emoji=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for width in (7, max(len(f.subject) for f in findings)):
        table.add_column(min_width=width, no_wrap=True)
    table.add_column(overflow="fold")
    for f in findings:
        table.add_row(Text(f.level, STYLES[f.level]), f.subject, f.seen)
        if f.do:
            table.add_row("", "", Text(f"-> {f.do}", "bold"))
    console.print(table)
    count = {level: sum(f.level == level for f in findings) for level in (PROBLEM, WARNING)}
    console.print(f"\n{count[PROBLEM]} problems, {count[WARNING]} warnings, {len(findings)} findings")
