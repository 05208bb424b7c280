"""What a checkpoint costs: how long training stands still for a save, and how fast files are written and read.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py [FOLDER] [--preset vit_b16] [--rounds 5]

The state is that of MAE with AdamW on one rank: weights and two moments in float32, 12 bytes a parameter. It needs no
training: the same saver copies it from tensors in memory. Each round times one save of each kind, in turns, because
disk and machine vary; between the start and the end of an asynchronous save a step's arithmetic goes on.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.ending import leave
from maws import checkpoint, config, export, manifest, optim, stages
from maws.config import CheckpointConfig
from maws.files import write_json
from maws.host_copy import copy_to_host
from maws.models import init
from maws.saver import Saver


class State:
    """The state of an engine that has stopped."""

    def __init__(self, objective: torch.nn.Module, rules: optim.Rules) -> None:
        trained = {n: p.detach() for n, p in objective.named_parameters() if optim.treat(n, rules) is not None}
        self.tensors = {f"{kind}/{n}": p + i for i, kind in enumerate(("weight", "exp_avg", "exp_avg_sq"))
                        for n, p in trained.items()}  # fmt: skip
        self.bytes = sum(t.nbytes for t in self.tensors.values())

    def partitions(self) -> dict[str, Tensor]:
        return self.tensors

    def partition(self, p: Tensor) -> tuple[int, int]:
        return p.numel(), p.numel()

    def buffers(self) -> dict[str, Tensor]:
        return {}

    def local_state(self, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        return copy_to_host({k: t.flatten() for k, t in self.tensors.items()}, into)

    def load_local_state(self, state: dict[str, Tensor], steps: int) -> None:
        for key, value in state.items():
            self.tensors[key].view(-1).copy_(value)


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    stage, cfg = stages.load("mae"), stages.preset("mae", options.preset)
    objective: Any = stage.objective(cfg, None)  # type: ignore[arg-type]
    init.fill(objective, objective.init_rules(), cfg.seed)
    state = State(objective, stage.param_rules(cfg))
    print(f"{options.preset}: {state.bytes / 1e9:.2f} GB on one rank, {options.rounds} rounds, in {options.folder}")
    run = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.folder))
    try:
        write_json(run / "config.json", record(cfg, options.preset))
        saves(state, run, options.rounds)
        reads(state, run, options.rounds)
    finally:
        shutil.rmtree(run)


def record(cfg: Any, preset: str) -> dict[str, Any]:
    facts = {"stage": "mae", "preset": preset, "lineage": ["mae"], "shards_sha256": "", "revision": ""}
    return facts | config.to_json(cfg)


def saves(state: Any, run: Path, rounds: int) -> None:
    """Seconds for which save() held training up, and until the files were on the disk."""
    held: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}
    done: dict[str, list[float]] = {kind: [] for kind in held}
    savers = {
        kind: Saver(state, run / "checkpoints", CheckpointConfig(asynchronous=kind == "asynchronous"), {"order": ""})
        for kind in held
    }
    for round_ in range(rounds + 1):
        for number, (kind, saver) in enumerate(savers.items()):
            begun = time.perf_counter()
            saver.save(2 * round_ + number, {})
            blocked = time.perf_counter() - begun
            if kind == "asynchronous":
                busy(0.5)  # a step: the next save must not be the first to wait
            saver.finish()
            if round_:  # the first makes the buffers
                held[kind].append(blocked)
                done[kind].append(time.perf_counter() - begun)
    for kind, seconds in held.items():
        whole = statistics.median(done[kind])
        print(
            f"{kind:13} save: training stands still {statistics.median(seconds):7.3f} s of {whole:6.2f} s "
            f"({min(seconds):.3f} to {max(seconds):.3f}); {state.bytes / whole / 1e6:5.0f} MB/s to the disk"
        )
    ratios = [a / b for a, b in zip(held["asynchronous"], held["synchronous"], strict=True)]
    share = 100 * statistics.median(ratios)
    print(f"an asynchronous save holds training up for {share:.1f} % of the time of a synchronous one")


def busy(seconds: float) -> None:
    """Arithmetic on this core, as a step would do."""
    until, a = time.perf_counter() + seconds, torch.randn(256, 256)
    while time.perf_counter() < until:
        a = (a @ a).tanh()


def reads(state: Any, run: Path, rounds: int) -> None:
    """Verifying, loading, and exporting; the files are in the system's cache."""
    (found,) = checkpoint.complete(run / "checkpoints")[-1:]
    size = sum(p.numel() * 4 for p in state.tensors.values())
    report("verify (all hashes)", size, rounds, lambda: manifest.problems(found))
    report("load", size, rounds, lambda: checkpoint.load(state, found, ""))
    weights = size // 3
    report("export (weights alone)", weights, rounds, lambda: export.export(run, run / "out", overwrite=True))


def report(name: str, size: int, rounds: int, act: Callable[[], object]) -> None:
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begun)
    middle = statistics.median(seconds)
    print(f"{name:24} {middle:6.2f} s, {size / middle / 1e6:5.0f} MB/s ({min(seconds):.2f} to {max(seconds):.2f} s)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=tempfile.gettempdir(), help="on the disk that is measured")
    parser.add_argument("--preset", default="vit_b16")
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args())
    leave(0)
