"""The loss of many classes with the whole matrix of scores and chunk by chunk: peak memory and time, taking turns.

    OMP_NUM_THREADS=1 python benchmarks/softmax.py

Forward and backward of a linear layer and softmax cross-entropy against 1/k, float32, on this CPU. Memory is the peak
of a new process above what it held before and above the weight's gradient, which both make; times and their ratio are
medians over rounds, because speed varies.
"""

import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from maws.objectives.chunked_softmax import ClassScores, chosen_chunk, one_over_k

BATCH, WIDTH, MOST_SYNSETS, ROUNDS = 1024, 192, 5, 5


def main() -> None:
    torch.set_num_threads(1)
    for classes in (28_000, 100_000):
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            whole, parts = pool.map(peak, ("dense", "chunked"), (classes, classes))
        problem = Problem(classes)
        rounds = [(problem.seconds("dense"), problem.seconds("chunked")) for _ in range(ROUNDS + 1)][1:]
        ratios = [b / a for a, b in rounds]
        sys.stdout.write(
            f"{classes:,} classes, batch {BATCH}, width {WIDTH}, chunks of {chosen_chunk(BATCH, classes)}: "
            f"dense {statistics.median(a for a, _ in rounds):.2f} s, {whole:,.0f} MiB; "
            f"chunked {statistics.median(b for _, b in rounds):.2f} s, {parts:,.0f} MiB; chunked / dense: "
            f"time {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} in {ROUNDS} rounds), "
            f"memory {parts / whole:.2f}\n"
        )


class Problem:
    """A layer, features, and one to five synsets for each image."""

    def __init__(self, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layer = ClassScores(WIDTH, classes)
        self.features = torch.randn(BATCH, WIDTH, generator=generator).requires_grad_()
        self.ids = torch.randint(classes, (BATCH, MOST_SYNSETS), generator=generator)
        self.ids[:, 1:][torch.rand(BATCH, MOST_SYNSETS - 1, generator=generator) < 0.5] = -1

    def dense(self) -> Tensor:
        """As it would be written without chunks: gather from the log of the softmax (no dense target either)."""
        present = self.ids >= 0
        log_prob = self.layer(self.features).log_softmax(dim=1)
        per_synset = log_prob.gather(1, self.ids.clamp(min=0)) * present
        return -(per_synset.sum(dim=1) / present.sum(dim=1)).mean()

    def chunked(self) -> Tensor:
        return self.layer(self.features, *one_over_k(self.ids))[0].mean()

    def seconds(self, way: str) -> float:
        """Of one forward and backward."""
        self.layer.zero_grad(set_to_none=True)
        start = time.perf_counter()
        getattr(self, way)().backward()
        return time.perf_counter() - start


def peak(way: str, classes: int) -> float:
    """MiB of one forward and backward."""
    torch.set_num_threads(1)
    problem = Problem(classes)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    problem.seconds(way)
    weight = problem.layer.weight
    return (resident("VmHWM") - before) / 1024 - weight.numel() * weight.element_size() / 2**20


def resident(kind: str) -> int:
    """KiB of this process that are in memory: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind))


if __name__ == "__main__":
    main()
