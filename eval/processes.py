"""The commands of a chain as processes, each with its group: ended together, and none left behind by a killed call."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

GRACE = 40.0  # seconds: longer than a rank needs to save, shorter than a person waits
TOKEN = "MAWS_CHAIN_FOLDER"  # in the environment of all that is started: what a killed call left behind is known by it


class Stopped(BaseException):
    """A signal asked for the end. BaseException: no `except Exception` on the way may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass
class Children:
    """The commands that run now. Each leads its own process group, so that one call ends a launcher with its ranks."""

    root: Path
    environment: dict[str, str]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: Sequence[str], output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
        )
        self.running.append(child)
        return child

    def finish(self, child: subprocess.Popen[bytes]) -> int:
        """Its exit code. What is left of its group then (ranks without their launcher) is ended too."""
        code = child.wait()
        if _signal_group(child.pid, signal.SIGTERM):
            self.wait_for_group(child, grace=5)
        self.running.remove(child)
        return code

    def end_all(self) -> None:
        """SIGTERM to every group, so that training saves; SIGKILL to what is still there after the grace period."""
        for child in self.running:
            _signal_group(child.pid, signal.SIGTERM)
        for child in self.running:
            self.wait_for_group(child, GRACE)
        self.running.clear()

    def wait_for_group(self, child: subprocess.Popen[bytes], grace: float) -> None:
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline:
            child.poll()  # a dead leader that nobody waits for would look like a live group
            if not _signal_group(child.pid, 0):
                return
            time.sleep(0.05)
        _signal_group(child.pid, signal.SIGKILL)
        child.wait()


def _signal_group(group: int, number: int) -> bool:
    """False when the group has no process left."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def end_leftovers(folder: Path) -> int:
    """End what an earlier call, killed outright, left running on this folder; returns how many process groups."""
    mark = f"{TOKEN}={folder}".encode()
    groups: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if entry.stat().st_uid == os.getuid() and mark in (entry / "environ").read_bytes().split(b"\0"):
                groups.add(os.getpgid(int(entry.name)))
        except (OSError, ValueError):
            continue  # gone meanwhile, or not ours to read
    groups.discard(os.getpgid(0))
    for group in groups:
        _signal_group(group, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while any(_signal_group(group, 0) for group in groups) and time.monotonic() < deadline:
        time.sleep(0.1)
    for group in groups:
        _signal_group(group, signal.SIGKILL)
    return len(groups)


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal all become `Stopped`, once; later ones do not cut the cleaning up short."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def count_gpus() -> int:
    """0 without importing torch on the machines where that is plain to see."""
    if not any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/kfd")):
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(answer.stdout) if answer.returncode == 0 else 0


def environment_for(folder: Path, ranks: int, cores: int, gpus: int) -> dict[str, str]:
    environment = {**os.environ, TOKEN: str(folder), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))  # the launcher would let every rank take all
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not gpus:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment
