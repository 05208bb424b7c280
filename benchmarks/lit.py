"""LiT: steps from cached features against steps from pictures, and the loss of a global batch of 32,768 pairs.

    OMP_NUM_THREADS=2 python benchmarks/lit.py                 # both, about five minutes of two cores
    OMP_NUM_THREADS=2 python benchmarks/lit.py --only loss --rows 512 4096 32768

Steps: a ViT-B/16 image tower (random values) and the demo's text tower, forward, backward and AdamW on one process, the
batch read from a shard set each time; both kinds take turns, and their losses are compared. Loss: what one rank of
32768 / rows computes, E = 512, with all scores at once and in chunks; memory is the peak of a new process above what it
held before, and the plain way is left out where its matrices would not fit. Times are medians over rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.shardset import ShardSet
from maws import optim, stages
from maws.__main__ import main as maws
from maws.config import override
from maws.data.order import Part
from maws.data.transforms import Preprocess
from maws.models import init
from maws.models.vit import build_vit
from maws.objectives.chunked_pairs import sigmoid_of_pairs, softmax_of_pairs
from maws.objectives.chunked_softmax import chosen_chunk
from maws.release import describe, load_image_tower, open_release, write_release
from maws.stages import lit
from maws.twin_data import make_shards
from maws.weight_files import Weights

PAIRS, WIDTH, ROUNDS = 32_768, 512, 3
PLAIN_MATRICES = 4  # of rows x pairs that the plain loss holds at least: scores and their log-softmax, both ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=("steps", "loss"))
    parser.add_argument("--batch", type=int, default=16, help="pairs of a step (default: 16)")
    parser.add_argument("--variant", default="vit_b16", help="of the image tower (default: vit_b16)")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 4096], help="pairs of a rank (default: 512 4096)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    if options.only != "loss":
        with tempfile.TemporaryDirectory() as folder:
            steps(Path(folder), options.variant, options.batch, options.rounds)
    if options.only != "steps":
        for rows in options.rows:
            for loss in ("clip", "siglip"):
                compare_losses(loss, rows, options.rounds)


# --------------------------------------------------------------------------------------------------------------- steps


def steps(folder: Path, variant: str, batch: int, rounds: int) -> None:
    """Steps from pictures and from features, in turns."""
    shards = make_shards(folder / "shards", samples=4 * batch)
    tower = random_tower(folder / "tower", variant)
    begun = time.perf_counter()
    words = ["--run", str(tower), "--shards", str(shards), "--crops", "1", "--workers", "0", "data.flip=no"]
    assert maws(["cache-features", *words, "data.crop_scale=0.8,1.0"]) == 0
    caching = time.perf_counter() - begun
    trainings = {kind: Training(kind, variant, tower, shards, batch, folder / kind) for kind in ("images", "cache")}
    seconds: dict[str, list[float]] = {kind: [] for kind in trainings}
    for number in range(rounds + 1):  # the first round warms up
        found = {kind: training.step(number) for kind, training in trainings.items()}
        difference = abs(found["images"][0] - found["cache"][0])
        assert difference < 1e-3 * abs(found["images"][0]), found
        for kind in trainings if number else ():
            seconds[kind].append(found[kind][1])
    ratios = [a / b for a, b in zip(seconds["images"], seconds["cache"], strict=True)]
    sys.stdout.write(
        f"{variant} locked, batch {batch}, {torch.get_num_threads()} threads: a step from pictures "
        f"{statistics.median(seconds['images']):.2f} s, from features {statistics.median(seconds['cache']):.3f} s; "
        f"ratio {statistics.median(ratios):.0f} ({min(ratios):.0f} to {max(ratios):.0f} in {rounds} rounds); "
        f"caching took {1000 * caching / (4 * batch):.0f} ms a picture\n"
    )


def random_tower(folder: Path, variant: str) -> Path:
    tower = build_vit(variant, seed=None)
    init.fill(tower, tower.init_rules(), 0)
    facts = {
        "stage": "mae", "lineage": ["mae"], "variant": variant, "model": describe(tower.shape),
        "image_size": tower.image_size, "train": {},
    }  # fmt: skip
    write_release(folder, Weights.of(dict(tower.state_dict())), facts, Preprocess(tower.image_size))
    return folder


class Training:
    """Stage lit without the engine, so that nothing but the steps is measured."""

    def __init__(self, kind: str, variant: str, tower: Path, shards: Path, batch: int, run: Path) -> None:
        cfg: Any = override(stages.preset("lit", "demo"), [
            f"model.variant={variant}", f"data.shards={shards}", f"data.features={kind}", f"optim.batch_size={batch}",
        ])  # fmt: skip
        cfg = replace(cfg, init_from=str(tower), init_sha256=open_release(tower).sha256)
        cfg = lit.prepare(cfg, ShardSet.open(shards), run)
        self.dataset = lit.dataset(cfg, ShardSet.open(shards), run, Part())
        self.objective = lit.objective(cfg, ShardSet.open(shards))
        init.fill(self.objective, self.objective.init_rules(), 0)
        self.objective.towers.image.load_state_dict(load_image_tower(open_release(tower)).state_dict())
        groups = optim.groups(self.objective, lit.param_rules(cfg), cfg.optim.peak_lr, cfg.optim.weight_decay)
        self.adamw = torch.optim.AdamW(groups, betas=cfg.optim.betas, fused=True)
        self.objective.train()

    def step(self, number: int) -> tuple[float, float]:
        """The loss, and the seconds of reading the batch, forward, backward and update."""
        begun = time.perf_counter()
        loss = self.objective(self.dataset[number])["loss"]
        loss.backward()
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return loss.item(), time.perf_counter() - begun


# ---------------------------------------------------------------------------------------------------------------- loss


def compare_losses(loss: str, rows: int, rounds: int) -> None:
    one_matrix = 4 * rows * PAIRS
    ways = ["chunked"] if PLAIN_MATRICES * one_matrix > 0.8 * free_memory() else ["plain", "chunked"]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        found = {way: pool.submit(measure, way, loss, rows, rounds).result() for way in ways}
    said = [f"{way} {seconds:.2f} s, {peak:,.0f} MiB" for way, (seconds, peak) in found.items()]
    if "plain" in found:
        (a, whole), (b, parts) = found["plain"], found["chunked"]
        said.append(f"chunked / plain: time {b / a:.2f}, memory {parts / whole:.2f}")
    else:
        said.append(f"plain not run, one of its matrices has {one_matrix / 2**20:,.0f} MiB")
    sys.stdout.write(
        f"{loss}, {rows} rows against {PAIRS:,} pairs, E {WIDTH}, chunks of {chosen_chunk(rows, PAIRS)}, "
        f"{torch.get_num_threads()} threads: {'; '.join(said)}\n"
    )


def measure(way: str, loss: str, rows: int, rounds: int) -> tuple[float, float]:
    """Median seconds of forward and backward, and MiB at the peak of the first."""
    image, text = unit(rows, 0), unit(rows, 1)
    all_image, all_text = unit(PAIRS, 2), unit(PAIRS, 3)
    scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, peak, seconds = resident("VmRSS"), 0.0, []
    for number in range(rounds):
        begun = time.perf_counter()
        one_direction = plain if way == "plain" else chunked
        value = one_direction(loss, image, all_text, scale, bias)
        if loss == "clip":
            value = (value + one_direction(loss, text, all_image, scale, bias)) / 2
        value.backward()
        seconds.append(time.perf_counter() - begun)
        if number == 0:
            peak = (resident("VmHWM") - before) / 1024
    return statistics.median(seconds), peak


def plain(loss: str, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """As open_clip writes them, with all scores at once; the rows are those of rank 0."""
    scores = (scale * rows) @ columns.T
    if loss == "clip":
        return F.cross_entropy(scores, torch.arange(len(rows)))
    labels = -torch.ones_like(scores)
    labels.diagonal().fill_(1)
    return -F.logsigmoid(labels * (scores + bias)).sum() / len(rows)


def chunked(loss: str, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    if loss == "clip":
        return softmax_of_pairs(rows, columns, scale, 0)[0].mean()
    return sigmoid_of_pairs(rows, columns, scale, bias, 0)[0].mean()


def unit(rows: int, seed: int) -> Tensor:
    drawn = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn, dim=1).requires_grad_()


def resident(kind: str) -> int:
    """KiB of this process that are in memory: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind))


def free_memory() -> int:
    """Bytes that a new process can have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


if __name__ == "__main__":
    main()
