"""A small shard set made on the spot, and `maws/train.py` in processes of its own, as a launcher starts it."""

import contextlib
import io
import json
import os
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from forks import TESTS, Forked, content
from PIL import Image

from data_pipeline.__main__ import main as build_main
from maws.dist import free_port
from maws.files import json_lines
from maws.launch import Command, environments

ROOT = TESTS.parent
CAPTIONS = [
    "a red #dog", "the #cat at home", "two #birds #tree", "#goldenretriever #dog", "fresh #apple", "#tree #mountain",
    "an old #house", "no tag here",
]  # fmt: skip


# What each stage starts from: the chain of MAWS, and what stands beside it.
BEFORE = {"mae": "", "simmim": "", "lc_mae": "", "wsp": "mae", "lit": "wsp", "finetune": "mae"}
LABELLED = ("finetune",)  # stages that train on one class each


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


class Training:
    """`maws/train.py` on `ranks` processes over gloo, as a launcher starts them; each is forked, see forks.py.

    Given a `command`, a fresh process of that for each rank. Given a `target`, a function "module:name" other than
    `main` of maws/train.py, and `arguments` are what that is called with.
    """

    def __init__(
        self,
        arguments: Sequence[Any],
        ranks: int = 1,
        command: list[str] | None = None,
        folder: Path = ROOT,
        target: str = "",
    ) -> None:
        self.processes: list[Forked | Fresh] = []
        call, given = (target, arguments) if target else ("maws.train:main", [arguments])
        for env in environments(ranks):
            env |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
            self.processes.append(
                Fresh(command, env, folder) if command
                else Forked(call, given, env=env, cwd=folder, path=[str(TESTS / "maws"), str(TESTS)])
            )  # fmt: skip

    def wait(self, seconds: float = 170) -> tuple[list[int], str]:
        """(exit codes, what was printed by all ranks)."""
        until = time.monotonic() + seconds
        try:
            codes = [p.wait(max(0.0, until - time.monotonic())) for p in self.processes]
        finally:
            self.signal(signal.SIGKILL)
        printed = "\n".join(p.printed() for p in self.processes)
        assert None not in codes, f"not done after {seconds} s:\n{printed}"
        return [code for code in codes if code is not None], printed

    def wait_for_steps(self, run: Path, steps: int, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while len(metrics(run)) < steps:
            assert time.monotonic() < until and self.processes[0].poll() is None, self.processes[0].printed()
            time.sleep(0.01)

    def signal(self, number: int, rank: int | None = None) -> None:
        for i, p in enumerate(self.processes):
            if rank in (None, i) and p.poll() is None:
                os.killpg(p.pid, number)


class Fresh(Command):
    """A command whose stderr is kept; it has the methods of `Forked`."""

    def __init__(self, command: list[str], env: dict[str, str], folder: Path) -> None:
        self._kept = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        weakref.finalize(self, self._kept.close)
        super().__init__(command, env, subprocess.DEVNULL, self._kept.fileno(), folder)

    def printed(self) -> str:
        return content(self._kept)


def forked(arguments: Sequence[str], env: Mapping[str, str], output: int) -> Forked:
    """A starter for `maws.launch.start_ranks`: each rank of `maws/train.py` is forked."""
    env = {**env, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    return Forked("maws.train:main", [list(arguments)], env=env, cwd=ROOT, output=output, stdout=True)


def one_after_another(runs: list[list[str]], ports: list[int]) -> int:
    """In a rank: `maws/train.py` again and again, up to a run that fails."""
    from maws.train import main

    for arguments, port in zip(runs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(
            port
        )  # a rank may ask for the next group while the last one's store still answers
        if code := main(arguments):
            return code
    return 0


def train_in_turn(runs: list[list[str]], ranks: int = 1, folder: Path = ROOT) -> None:
    """Several trainings one after another in the same processes."""
    ports = [free_port() for _ in runs]
    codes, printed = Training([runs, ports], ranks, folder=folder, target="training:one_after_another").wait()
    assert codes == [0] * ranks, printed


def each(runs: list[list[str]], out: str) -> int:
    """In a rank: `maws/train.py` again and again; what each returned and printed goes to `out`."""
    from maws.train import main

    found = []
    for arguments in runs:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            code = main(arguments)
        found.append([code, printed.getvalue()])
    Path(out).write_text(json.dumps(found))
    return 0


def run_each(runs: list[list[str]]) -> list[tuple[int, str]]:
    """(exit code, what was printed) of several calls of `maws/train.py` in one process; a failure must be the last."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        codes, printed = Training([runs, str(out)], target="training:each").wait()
        assert codes == [0], printed
        return [(code, printed) for code, printed in json.loads(out.read_text())]


def metrics(run: Path) -> list[dict[str, Any]]:
    return json_lines(run / "metrics.jsonl")


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in metrics(run)}


def arguments(stage: str, run: Path, shards: Path, *more: str, preset: str = "debug") -> list[str]:
    return ["--stage", stage, "--preset", preset, "--run", str(run), f"data.shards={shards}", *more]
