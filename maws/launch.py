"""Ranks of one training on this machine, started as a launcher starts them; all end with the `with`.

    with start_ranks(2, ["--stage", "mae", "--preset", "debug", "--run", "runs/mae", ...], log=Path("log")) as ranks:
        codes = ranks.wait(seconds=600)
        ranks.kill(1)

They meet over gloo and see no GPU: what is compared or rehearsed here must not depend on how many there are.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from maws.launchers import ALWAYS, free_port

TRAIN = Path(__file__).resolve().parent / "train.py"
# A rank must not take itself for a task of the job in which it was started.
LAUNCHERS = (*ALWAYS, "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_", "TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_", "MPI_")


class Process(Protocol):
    """A rank: the leader of a session of its own."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, -N for death by signal N; None while it runs."""

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit code; None if it still runs after `timeout` seconds."""


Starter = Callable[[Sequence[str], Mapping[str, str], int], Process]  # arguments, environment, where output goes


class Ranks:
    """The processes of one start, and what they print: LOG/rank_00000.log, which every start of a run appends to."""

    def __init__(self, processes: Sequence[Process], logs: Sequence[Path], begins: Sequence[int]) -> None:
        self.processes, self.logs, self._begins = list(processes), list(logs), begins

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes by rank; None for a rank that still runs after so long."""
        until = time.monotonic() + seconds
        return [p.wait(max(0.0, until - time.monotonic())) for p in self.processes]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, and not to the loader's workers it has started."""
        if self.processes[rank].poll() is None:
            os.kill(self.processes[rank].pid, number)

    def printed(self, rank: int = 0) -> str:
        """What a rank has printed since this start."""
        return self.logs[rank].read_bytes()[self._begins[rank] :].decode(errors="replace")

    def end(self) -> None:
        """Kill what is left of all sessions, and wait until it is gone."""
        for p in self.processes:
            try:
                os.killpg(p.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for p in self.processes:
            p.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class Command:
    """A command in a session of its own; output goes to descriptors."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], stdout: int, stderr: int, folder: Path | None = None
    ) -> None:
        self._process = subprocess.Popen(
            command, env=env, cwd=folder,
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int | None:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None


class Script(Command):
    """`python maws/train.py` with these arguments."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], output: int) -> None:
        super().__init__([sys.executable, str(TRAIN), *arguments], env, output, output)


def start_ranks(
    ranks: int,
    arguments: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    log: Path,
    starter: Starter = Script,
) -> Ranks:
    """Start `maws/train.py` on so many ranks; `env` is added to this process's environment.

    `log` is a folder. `starter` makes one rank.
    """
    log.mkdir(parents=True, exist_ok=True)
    logs = [log / f"rank_{rank:05}.log" for rank in range(ranks)]
    started = Ranks([], logs, [path.stat().st_size if path.exists() else 0 for path in logs])
    try:
        for path, own in zip(logs, environments(ranks), strict=True):
            with path.open("ab") as output:
                started.processes.append(
                    starter(arguments, {**own, "CUDA_VISIBLE_DEVICES": "", **(env or {})}, output.fileno())
                )
    except BaseException:
        started.end()
        raise
    return started


def environments(ranks: int) -> list[dict[str, str]]:
    """The environment of each rank: this process's, and what a launcher sets; nothing of the latter for one rank."""
    base = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    if ranks == 1:
        return [base]
    base |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [base | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
