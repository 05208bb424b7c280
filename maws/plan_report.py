"""What `python -m maws plan` prints: plain lines that read the same in a terminal and in a file."""

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from maws import stages
from maws.devices import GIB
from maws.planning import Result

WIDTH = 100  # columns, where there is no terminal to ask


def show(result: Result) -> None:
    """Print a plan."""
    out = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False, emoji=False)
    cfg, gpu = result.cfg, result.gpu
    out.print(
        f"{result.stage} {cfg.model.variant}, {stages.image_side(cfg.model)} pixels, on {result.ranks} x {gpu.name} "
        f"({gpu.memory:g} GB; {gpu.source})"
    )
    out.print(
        f"batch {cfg.optim.batch_size:,} = {result.ranks} ranks x {result.micro} samples x {result.accumulate} "
        f"micro-steps; {result.precision}; blocks recomputed: {cfg.model.checkpoint_blocks}; "
        f"ds_config {result.ds_config}"
    )
    out.print(f"parameters: {', '.join(f'{n:,} {kind}' for kind, n in result.parameters.items() if n)}")
    _table(out, "memory of one rank, GiB", memory_rows(result))
    _table(out, "time", time_rows(result))
    _table(out, "data", data_rows(result))
    _table(out, "checkpoints", checkpoint_rows(result))
    out.print("\nassumed")
    for line in result.assumed:
        out.print(Padding(f"- {line}", (0, 0, 0, 2)))
    _verdict(out, result)


def memory_rows(result: Result) -> Iterable[tuple[str, str]]:
    m = result.memory
    named = (
        ("weights", m.weights), ("frozen parameters", m.frozen), ("gradients", m.gradients),
        ("fp32 master weights", m.master), ("Adam's two moments", m.moments), ("momentum target, fp32", m.target),
        ("mean of the weights (optim.ema)", m.average), ("second copy within a node", m.secondary),
        ("parameters made whole", m.whole), ("gradient buckets", m.buckets), ("batch", m.batch),
        ("activations", m.activations), ("temporaries of forward and backward", m.passing),
    )  # fmt: skip
    yield from ((name, _gib(size)) for name, size in named if size)
    instead = m.step > m.whole + m.batch + m.activations + m.passing
    yield (
        f"temporaries of the optimizer's step, {'more than' if instead else 'in place of'} the last four",
        _gib(m.step),
    )
    yield "CUDA context and workspaces (a constant)", _gib(m.context)
    yield "most at any time", _gib(m.total)
    yield f"there is, less 5% for gaps between tensors ({result.gpu.memory:g} GB)", _gib(result.usable)
    for name, size in (
        ("on the host: offloaded", m.host), ("on NVMe: offloaded", m.disk),
        ("on the host: a copy while a checkpoint is written", m.saving),
    ):  # fmt: skip
        if size:
            yield name, _gib(size)


def time_rows(result: Result) -> Iterable[tuple[str, str]]:
    f, t = result.flops, result.time
    yield "a sample, forward", f"{f['forward_macs_per_sample'] / 1e9:,.4g} GMAC"
    yield "a sample, training (3 x forward of what is trained)", f"{f['training_flops_per_sample'] / 1e12:,.4g} TFLOP"
    if f["executed_flops_per_sample"] > f["training_flops_per_sample"]:
        yield "with recomputed blocks", f"{f['executed_flops_per_sample'] / 1e12:,.4g} TFLOP"
    yield "MFU, recomputing not counted", f"{f['model_flops_utilisation']:.1%}"
    yield "a step", _seconds(t["step_seconds"])
    yield "steps", f"{t['steps']:,.0f}"
    yield "all of it", f"{t['days']:,.1f} days" if t["days"] >= 1 else _seconds(t["seconds"])


def data_rows(result: Result) -> Iterable[tuple[str, str]]:
    d = result.data
    yield "samples seen", f"{_count(d['samples'])} ({d['samples'] / d['samples_per_epoch']:,.4g} epochs)"
    yield "tokens seen (patches and class tokens of those samples)", _count(d["tokens"])
    yield "samples a second", f"{d['samples_per_second']:,.0f}, {d['samples_per_second'] / result.ranks:,.0f} a rank"
    yield "read a second", f"{_bytes(d['bytes_per_second'])}, {_bytes(d['bytes_per_second'] / result.ranks)} a rank"


def checkpoint_rows(result: Result) -> Iterable[tuple[str, str]]:
    c, keep = result.checkpoints, result.cfg.checkpoint.keep
    yield "one checkpoint", f"{_bytes(c['bytes'])} in {result.ranks} files of {_bytes(c['bytes_per_rank'])}"
    yield f"written, every {result.cfg.checkpoint.every}", f"{c['writes']:,.0f} times, {_bytes(c['written_bytes'])}"
    yield f"on disk at most ({keep} kept and one under way)", _bytes(c["kept_bytes"])
    yield "release, fp32, at most", _bytes(c["release_bytes"])


def _verdict(out: Console, result: Result) -> None:
    if not result.refused:
        out.print(f"\nfits: {1 - result.memory.total / result.usable:.0%} of the memory is left")
        return
    out.print(f"\ndoes not fit: {'; '.join(result.refused)}")
    if not result.nearest:
        out.print("nothing near fits either: smaller micro-batches, recomputed blocks, offloading, more GPUs")
    for one in result.nearest:
        ranks = f"--gpus {one.ranks} " if one.ranks != result.ranks else ""
        host = f", {_gib(one.memory.host)} GiB a rank on the host" if one.memory.host else ""
        host += f", {_gib(one.memory.disk)} GiB a rank on NVMe" if one.memory.disk else ""
        out.print(f"  fits: {ranks}{' '.join(one.settings)}  ({one.change}: {_gib(one.memory.total)} GiB a rank{host})")


def _table(out: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2), pad_edge=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right" if "memory" in title else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out.print(f"\n{title}")
    out.print(table)


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size >= GIB else f"{size / GIB:.2g}" if size else "0"


def _bytes(size: float) -> str:
    """In the units of data sheets: 10^3."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:,.3g} {unit}"
        size /= 1000
    return f"{size:,.4g} PB"


def _count(number: float) -> str:
    for unit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:,.4g} {name}"
    return f"{number:,.0f}"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:,.3g} ms"
    return f"{seconds:,.3g} s" if seconds < 120 else f"{seconds / 60:,.3g} minutes" if seconds < 7200 else (
        f"{seconds / 3600:,.3g} hours"
    )  # fmt: skip
