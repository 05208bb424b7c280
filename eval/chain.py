"""A chain of commands that goes on where it stopped: each is printed as one would type it, and skipped once done.

    runner = Runner(steps, Ledger(root, folder / ".steps"), Children(root, environment), cores)
    with only_one(folder) as ours: guarded(runner, folder, "`make demo`", runner.run)

`make demo`, `python -m eval compare` and `python -m eval transfer` are such chains.
"""

import fcntl
import fnmatch
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import DataError
from eval.processes import Children, Stopped, end_leftovers, environment_for, stopping_on_signals
from eval.steps import Ledger, Step, StepFailed
from maws.launchers import free_port

SIDE_BY_SIDE = 2  # commands at a time: more would share one GPU, or memory, for little


@dataclass
class Running:
    """A step that shares the machine with others."""

    step: Step
    start: float
    log: Path


@dataclass
class Runner:
    """Runs the steps that need it, in order, and says what it does."""

    steps: Sequence[Step]
    ledger: Ledger
    children: Children
    cores: int
    began: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Each step when those before it have made what it reads; a step that must be alone waits for the others."""
        waiting, running = list(self.steps), dict[subprocess.Popen[bytes], Running]()
        said = time.monotonic()
        while waiting or running:
            while step := self.next_step(waiting, [run.step for run in running.values()]):
                waiting.remove(step)
                if self.skip(step):
                    continue
                if not self.shares(step):
                    self.run_alone(step)
                    continue
                child, run = self.start_beside(step)
                running[child] = run
            time.sleep(0.1)
            for child in [child for child in running if child.poll() is not None]:
                run = running.pop(child)
                code = self.children.finish(child)
                say(f"── {run.step.name} says:", run.log.read_text(errors="replace").rstrip())
                self.settle(run.step, code, time.monotonic() - run.start, run.log)
            if running and time.monotonic() - said > 10:
                said = time.monotonic()
                for run in running.values():
                    say(f"   … {run.step.name} {said - run.start:.0f} s: {last_line(run.log)}")

    def next_step(self, waiting: Sequence[Step], running: Sequence[Step]) -> Step | None:
        """The first whose inputs nobody is still to make, if there is room for it now."""
        for number, step in enumerate(waiting):
            if any(reads(step, other) for other in [*waiting[:number], *running]):
                continue
            room = min(self.cores, SIDE_BY_SIDE) if self.shares(step) else 1
            return step if len(running) < room else None
        return None

    def shares(self, step: Step) -> bool:
        return step.side_by_side and self.cores > 1

    def skip(self, step: Step) -> bool:
        if self.ledger.is_done(step):
            say(f"{self.place(step)} {step.name}: done and up to date, skipped")
            return True
        return False

    def run_alone(self, step: Step) -> None:
        self.announce(step)
        self.prepare(step)
        start = time.monotonic()
        code = self.children.finish(self.children.start(resolve(step.command)))
        self.settle(step, code, time.monotonic() - start)

    def start_beside(self, step: Step) -> tuple[subprocess.Popen[bytes], "Running"]:
        """Its output is shown when it ends, and kept in .steps/NAME.log."""
        self.announce(step)
        self.prepare(step)
        log = self.ledger.folder / f"{step.name}.log"
        with log.open("wb") as file:
            return self.children.start(resolve(step.command), file), Running(step, time.monotonic(), log)

    def prepare(self, step: Step) -> None:
        """Keep what the very same step began; remove what another version of it left."""
        if not self.ledger.was_started(step):
            self.ledger.forget(step)
            if step.folder and (self.ledger.root / step.folder).exists():
                say(f"   {step.folder} was made by another version of this step: starting it over")
                shutil.rmtree(self.ledger.root / step.folder)
        self.ledger.mark(step, "started")

    def settle(self, step: Step, code: int, seconds: float, log: Path | None = None) -> None:
        missing = [name for name in step.outputs if not (self.ledger.root / name).exists()]
        if code == 0 and missing:
            say(f"   {step.name} ended without error but did not write {missing[0]}")
            code = 1
        if code:
            raise StepFailed(step, code, log)
        self.ledger.mark(step, "done")
        say(f"   {step.name}: done in {seconds:.0f} s ({self.elapsed()} since the start)")

    def announce(self, step: Step) -> None:
        say("", f"{self.place(step)} {step.name} ({self.elapsed()} since the start)", f"$ {shlex.join(step.command)}")

    def place(self, step: Step) -> str:
        return f"==> [{self.steps.index(step) + 1}/{len(self.steps)}]"

    def elapsed(self) -> str:
        seconds = int(time.monotonic() - self.began)
        return f"{seconds // 60}:{seconds % 60:02d}"


def say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)  # noqa: T201  a chain talks to whoever started it


def resolve(command: Sequence[str]) -> list[str]:
    """The command with this environment's own programs, and a port of its own for the launcher."""
    program, *rest = command
    if program == "python":
        return [sys.executable, *rest]
    beside = Path(sys.executable).parent / program
    port = ["--master_port", str(free_port())] if program == "deepspeed" else []
    return [sys.executable, str(beside), *port, *rest] if beside.is_file() else [program, *port, *rest]


def reads(step: Step, other: Step) -> bool:
    """Does `step` read what `other` makes?"""
    return any(made == name or fnmatch.fnmatchcase(made, name) for made in other.outputs for name in step.inputs)


def last_line(log: Path) -> str:
    """What a command said last: of a line that is written over and over, its newest state."""
    lines = log.read_bytes()[-2000:].decode(errors="replace").replace("\r", "\n").rstrip().splitlines()
    return lines[-1] if lines else ""


@contextmanager
def only_one(folder: Path) -> Iterator[bool]:
    """False when another process holds the folder. The lock goes with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def guarded(runner: Runner, folder: Path, again: str, body: Callable[[], None], start_over: str = "") -> int:
    """Run `body`, which runs the chain; whatever ends it, no process is left, and the exit code says what happened.

    `again`: what a person types to go on; `start_over`: the end of the sentence that says so.
    """
    try:
        with stopping_on_signals():
            if left := end_leftovers(folder):
                say(f"ended {left} process group(s) that an earlier, killed call had left running")
            body()
            return 0
    except StepFailed as failure:
        runner.children.end_all()
        return told(runner, failure, again)
    except Stopped as stop:
        complain("\nstopping: running steps save what they have …")
        runner.children.end_all()
        complain(f"stopped. {again} goes on from here{start_over}")
        return 130 if stop.number == signal.SIGINT else 128 + stop.number
    except BaseException:  # of the body, which may have left commands running
        runner.children.end_all()
        raise


def told(runner: Runner, failure: StepFailed, again: str) -> int:
    """Say which step failed, and how to go on."""
    step, place = failure.step, list(runner.steps).index(failure.step) + 1
    if failure.code == 75:
        complain(f"stopped: {step.name} was asked to stop and has saved; {again} goes on")
        return 75
    where = f"its output: {failure.log}" if failure.log else "its last lines are above"
    code = f"signal {-failure.code}" if failure.code < 0 else f"exit code {failure.code}"
    what = f"step {place}/{len(runner.steps)}, {step.name}, failed ({code})"
    complain(f"error: {what}; {where}. {again} goes on from this step")
    return 1


def complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def alone(output: Path, name: str) -> Iterator[None]:
    """Hold `output` for `python -m eval NAME`. Raises DataError when another call is at work there, or it cannot be
    made."""
    try:
        with only_one(output) as ours:
            if not ours:
                raise DataError(f"another `python -m eval {name}` is at work in {output}; wait for it or stop it")
            yield
    except OSError as error:
        raise DataError(f"cannot write to {output}: {error.strerror}; give another --output") from None


def run_chain(steps: Sequence[Step], output: Path, finish: Callable[[], None], gpus: int = 0) -> int:
    """Run a chain into `output`, from the folder one is in, and then `finish`; the caller holds `output` (alone).

    What was trained is never removed: a step whose command changed asks maws/train.py, which refuses a folder that
    holds another run.
    """
    output, root = output.resolve(), Path.cwd()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    children = Children(root, environment_for(output, gpus or min(cores, SIDE_BY_SIDE), cores, gpus))
    runner = Runner(steps, Ledger(root, output / ".steps", libraries=()), children, cores)

    def chain_and_result() -> None:
        runner.run()
        finish()

    return guarded(runner, output, "the same command", chain_and_result)
