"""A small shard set made on the spot, and `maws/train.py` in processes of its own, as a user runs it."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_pipeline.__main__ import main as build_main
from maws.dist import free_port

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = [
    "a red #dog", "the #cat at home", "two #birds #tree", "#goldenretriever #dog", "fresh #apple", "#tree #mountain",
    "an old #house", "no tag here",
]  # fmt: skip


# What each stage starts from: the chain of MAWS, and what stands beside it.
BEFORE = {"mae": "", "simmim": "", "lc_mae": "", "wsp": "mae", "lit": "wsp"}


def picture(number: int, size: tuple[int, int] = (40, 36)) -> bytes:
    """A coloured shape on a coloured ground, unlike any other number's."""
    rng = np.random.default_rng(number)
    array = np.empty((size[1], size[0], 3), np.uint8)
    array[:] = rng.integers(0, 255, 3)
    top, left = rng.integers(0, 16, 2)
    array[top : top + 18, left : left + 18] = rng.integers(0, 255, 3)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def build_shards(folder: Path, samples: int = 120, per_shard: int = 17) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"key": f"k{i:03}", "image": picture(i), "caption": CAPTIONS[i % len(CAPTIONS)], "language": "en"}
        for i in range(samples)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "corpus.parquet")
    out = folder / "shards"
    arguments = ["build", "--input", str(folder / "corpus.parquet"), "--output", str(out), "--keep-unlabelled"]
    assert build_main([*arguments, "--workers", "1", "--samples-per-shard", str(per_shard), "--min-count", "1"]) == 0
    return out


ONE_AFTER_ANOTHER = """
import json, os, sys
from data_pipeline.ending import leave
from maws.train import main
for arguments, port in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = port  # a rank may ask for the next group while the last one's store still answers
    if code := main(arguments):
        leave(code)
leave(0)
"""


class Training:
    """`maws/train.py` in processes of its own, `ranks` of them over gloo, as a launcher starts them."""

    def __init__(
        self, arguments: list[str], ranks: int = 1, command: list[str] | None = None, folder: Path = ROOT
    ) -> None:
        command = command or [sys.executable, str(ROOT / "maws" / "train.py"), *arguments]
        base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
        base |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = []
        for rank in range(ranks):
            env = base | (common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=env,
                    cwd=folder,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )

    def wait(self, seconds: float = 170) -> tuple[list[int], str]:
        """(exit codes, what was printed by all ranks)."""
        try:
            printed = [p.communicate(timeout=seconds)[1] for p in self.processes]
        finally:
            self.signal(signal.SIGKILL)
        return [p.returncode for p in self.processes], "\n".join(printed)

    def wait_for_steps(self, run: Path, steps: int, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while len(metrics(run)) < steps:
            assert time.monotonic() < until and self.processes[0].poll() is None, self.processes[0].stderr.read()  # type: ignore[union-attr]
            time.sleep(0.01)

    def signal(self, number: int, rank: int | None = None) -> None:
        for i, p in enumerate(self.processes):
            if rank in (None, i) and p.poll() is None:
                os.killpg(p.pid, number)


def train_in_turn(runs: list[list[str]], ranks: int = 1, folder: Path = ROOT) -> None:
    """Several trainings one after another in the same processes: starting those is most of a short run's time."""
    own_ports = [(arguments, str(free_port())) for arguments in runs]
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(own_ports)]
    codes, printed = Training([], ranks, command, folder).wait()
    assert codes == [0] * ranks, printed


EACH = """
import contextlib, io, json, sys
from data_pipeline.ending import leave
from maws.train import main
found = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        code = main(arguments)
    found.append([code, printed.getvalue()])
print(json.dumps(found), flush=True)
leave(0)
"""


def run_each(runs: list[list[str]]) -> list[tuple[int, str]]:
    """(exit code, what was printed) of several calls of `maws/train.py` in one process; a failure must be the last."""
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(runs)], cwd=ROOT, capture_output=True, text=True, timeout=170,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(code, printed) for code, printed in json.loads(done.stdout.splitlines()[-1])]


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in metrics(run)}


def arguments(stage: str, run: Path, shards: Path, *more: str, preset: str = "debug") -> list[str]:
    return ["--stage", stage, "--preset", preset, "--run", str(run), f"data.shards={shards}", *more]
