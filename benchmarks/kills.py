"""Kill a training again and again, in every way that comes to mind, and see whether anything is lost.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 100 --shards runs/demo/shards

MAE's debug preset, 120 steps, a checkpoint every 5, on one or two CPU ranks at random. Each start is killed in one of
many ways (or stopped, where SIGTERM is sent), and the next one resumes with `--resume auto`, until the run is done;
then another run begins. Most ranks are forked (tests/forks.py), `--real` of the kills hit `python maws/train.py`,
torchrun and the deepspeed launcher.

After each kill: are all its processes gone, and how soon; does the next start go back less than one checkpoint interval
before the newest checkpoint that was due. After each run: the same samples, losses, learning rates, gradient norms and
weights as a run that nobody disturbed, and no temporary file left.
"""

import argparse
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from processes import children, is_alive, processes  # noqa: E402
from sabotage import dying  # noqa: E402
from training import forked  # noqa: E402

from maws.compare_runs import compare  # noqa: E402
from maws.history import read as events_of  # noqa: E402
from maws.launch import TRAIN, environments, start_ranks  # noqa: E402
from maws.launchers import free_port  # noqa: E402
from maws.verify_resume import TOLERANCES, newest_step  # noqa: E402

STEPS, INTERVAL = 120, 5
SETTINGS = ("log.keys=yes", "log.every=1", f"optim.length={STEPS} steps", f"checkpoint.every={INTERVAL} steps")
BOUND = 60.0  # seconds after which what still runs counts as left running
START = 300.0  # seconds for a start to come to its first step, on a busy machine


@dataclass
class Kill:
    """One start and how it ended."""

    kind: str
    run: Path
    ranks: int
    began_at: int | None = None  # the step it began with; none: it was dead before
    reached: int = 0  # the last step it logged; 0: none
    seconds: float | None = None  # from the kill until nothing was left of the start; None: it still ran after BOUND
    codes: tuple[int | None, ...] = ()
    resumed_at: int | None = None  # the step with which the run went on
    sound: bool = True  # the run it belongs to ended as the straight one

    @property
    def counts(self) -> bool:
        return self.kind != FINISH and any(self.codes)  # else the run was done first


@dataclass
class Report:
    """All starts, and what should not have been."""

    starts: list[Kill] = field(default_factory=list)
    runs: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> list[Kill]:
        return [k for k in self.starts if k.counts]


class Start:
    """A start of the run and all its processes, whoever their parent is."""

    def __init__(self, run: Path, ranks: list[int], codes: Callable[[], tuple[int | None, ...]], mark: str) -> None:
        self.run, self.leaders, self.codes, self.mark, self.begun = run, ranks, codes, mark, time.time()

    def alive(self) -> list[int]:
        """Those of the leaders' sessions, and those with the mark in their environment."""
        return [p for p in processes() if is_alive(p) and (session(p) in self.leaders or self.mark in environ(p))]

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Did it come true before the start ended?"""
        until = time.monotonic() + seconds
        while time.monotonic() < until and None in self.codes():
            if condition():
                return True
            time.sleep(0.002)
        return False

    def wait_for_steps(self, steps: int) -> bool:
        """Take so many further ones."""
        first = 0

        def taken() -> bool:
            nonlocal first
            newest = newest_step(self.run, self.begun)
            first = first or newest
            return bool(newest) and newest - first >= steps

        return self.wait(taken, START)


def session(process: int) -> int:
    try:
        return os.getsid(process)
    except OSError:
        return 0


def environ(process: int) -> str:
    try:
        return Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def one_rank(start: Start, rng: random.Random) -> None:
    start.wait_for_steps(rng.randrange(1, 20))
    kill(rng.choice(start.leaders))


def in_a_save(start: Start, rng: random.Random) -> None:
    folder = start.run / "checkpoints"
    start.wait_for_steps(rng.randrange(1, 10))
    start.wait(lambda: any(folder.glob("tmp-step_*")), START)
    kill(rng.choice(start.leaders))


def while_it_starts(start: Start, rng: random.Random) -> None:
    time.sleep(rng.uniform(0.05, 1.5))
    kill(rng.choice(start.leaders))


def a_worker(start: Start, rng: random.Random) -> None:
    """The run goes on; what ends the start is SIGTERM."""
    start.wait_for_steps(rng.randrange(1, 8))
    if workers := children(rng.choice(start.leaders)):
        kill(rng.choice(workers))
    start.wait_for_steps(6)
    kill(rng.choice(start.leaders), signal.SIGTERM)


def asked_to_stop(start: Start, rng: random.Random) -> None:
    start.wait_for_steps(rng.randrange(1, 15))
    kill(rng.choice(start.leaders), rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]))


def let_it_finish(start: Start, rng: random.Random) -> None:
    start.wait(lambda: False, 600)


def by_itself(start: Start, rng: random.Random) -> None:
    """Sabotaged ranks: one dies at an exact moment."""
    start.wait(lambda: False, START)


def the_launcher(start: Start, rng: random.Random) -> None:
    start.wait_for_steps(rng.randrange(1, 20))
    kill(start.leaders[0])


def one_of_the_launchers_ranks(start: Start, rng: random.Random) -> None:
    start.wait_for_steps(rng.randrange(1, 20))
    ranks = [p for p in start.alive() if str(TRAIN) in cmdline(p)[1:3]]
    kill(rng.choice(ranks or start.leaders))


def cmdline(process: int) -> list[str]:
    try:
        return [*Path(f"/proc/{process}/cmdline").read_text().split("\0"), "", ""]
    except OSError:
        return ["", ""]


def kill(process: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:  # the run was done before
        return


MOMENTS = {  # of tests/sabotage.py, and how often in a hundred
    "part": 5, "manifest": 5, "latest": 4, "prune": 4, "step": 5, "load": 7,
}  # fmt: skip
FORKED = {
    "a rank": (one_rank, 24), "in a save": (in_a_save, 14), "while it starts": (while_it_starts, 14),
    "a loader worker": (a_worker, 9), "SIGTERM, USR1, INT": (asked_to_stop, 9),
}  # fmt: skip
LAUNCHERS = ("script", "torchrun", "deepspeed")
REAL = [
    ("script", "killed", the_launcher), ("torchrun", "its rank", one_of_the_launchers_ranks),
    ("deepspeed", "its rank", one_of_the_launchers_ranks), ("torchrun", "killed", the_launcher),
    ("deepspeed", "killed", the_launcher),
]  # fmt: skip


FINISH = "left to finish"
SAVED = ("SIGTERM, USR1, INT", "a loader worker")  # ends by a signal that asks for a save


def draw(rng: random.Random) -> tuple[str, Callable[[Start, random.Random], None], str]:
    """(kind, what ends the start, moment of tests/sabotage.py or nothing)."""
    kinds = [(name, act, "", weight) for name, (act, weight) in FORKED.items()]
    kinds += [(f"at a moment: {name}", by_itself, name, weight) for name, weight in MOMENTS.items()]
    kind, act, moment, _ = rng.choices(kinds, [weight for *_, weight in kinds])[0]
    return kind, act, moment


def forked_start(kind: str, act: Callable, moment: str, run: Path, asked: list[str], rng: random.Random) -> Kill:
    count = rng.choice([1, 2])
    asked = [*asked, f"data.workers={2 if kind == 'a loader worker' else rng.choice([0, 0, 2])}"]
    rank = 0 if moment in ("manifest", "latest", "prune") else rng.randrange(count)
    starter = dying(moment, 1 if moment in ("step", "load") else rng.randrange(1, 4), rank) if moment else forked
    killed, starts = Kill(kind, run, count), len(begins(run))
    with start_ranks(count, asked, log=run.parent / f"log_{run.name}", starter=starter) as ranks:
        leaders = [p.pid for p in ranks.processes]
        start = Start(run, leaders, lambda: tuple(p.poll() for p in ranks.processes), "no mark")
        act(start, rng)
        _watch_it_end(killed, start)
    killed.began_at = next(iter(begins(run)[starts:]), None)
    return killed


def real_start(launcher: str, what: str, act: Callable, run: Path, asked: list[str], rng: random.Random) -> Kill:
    """`python maws/train.py` or a launcher with two ranks, marked by a variable that all its processes have."""
    mark, port = f"KILLS_MARK={uuid.uuid4().hex}", str(free_port())
    own = Path(sys.executable).parent
    command = {
        "script": [sys.executable, str(TRAIN)],
        "torchrun": [
            str(own / "torchrun"),
            "--nproc-per-node",
            "2",
            "--master-port",
            port,
            "--",
            str(TRAIN),
        ],  # else it takes --run for its own --run-path
        "deepspeed": [str(own / "deepspeed"), "--num_gpus", "2", "--master_port", port, str(TRAIN)],
    }[launcher]
    env = environments(1)[0] | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", mark.partition("=")[0]: mark[11:]}
    killed, starts = Kill(f"{launcher}: {what}", run, 1 if launcher == "script" else 2), len(begins(run))
    with (run.parent / f"log_{run.name}.txt").open("ab") as out:
        process = subprocess.Popen(
            [*command, *asked], env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    start = Start(run, [process.pid], lambda: (process.poll(),), mark)
    act(start, rng)
    _watch_it_end(killed, start)
    killed.began_at = next(iter(begins(run)[starts:]), None)
    return killed


def begins(run: Path) -> list[int]:
    """The step each start of a run began with, as far as it came to that."""
    return [e["step"] for e in events_of(run / "events.jsonl") if e["event"] == "start"]


def _watch_it_end(killed: Kill, start: Start) -> None:
    """How long it takes until nothing is left; what is left after BOUND is killed."""
    struck = time.monotonic()
    killed.reached = newest_step(start.run, start.begun)
    while time.monotonic() < struck + BOUND:
        if not (left := start.alive()) and None not in start.codes():
            killed.seconds = time.monotonic() - struck
            break
        time.sleep(0.02)
    else:
        for process in left:
            kill(process)
    killed.codes = start.codes()
    killed.reached = max(killed.reached, newest_step(start.run, start.begun))


def harness(shards: Path, folder: Path, kills: int, real: int, seed: int) -> Report:
    """Run after run until there were so many kills, `real` of them of real processes and launchers."""
    rng, report = random.Random(seed), Report()
    base = ["--stage", "mae", "--preset", "debug", f"data.shards={shards}", *SETTINGS]
    straight = folder / "straight"
    with start_ranks(1, [*base, "--run", str(straight)], log=folder / "log_straight", starter=forked) as ranks:
        assert ranks.wait(600) == [0], ranks.printed()
    while True:
        run, number = folder / f"run_{report.runs:02}", len(report.kills)
        if number >= kills and not run.exists():
            return report
        asked = [*base, "--run", str(run), "--resume", "auto"]
        made = sum(k.kind in {": ".join(way[:2]) for way in REAL} for k in report.kills)
        if number >= kills:
            start = forked_start(FINISH, let_it_finish, "", run, asked, rng)
        elif made < real * (number + 1) // kills:
            start = real_start(*REAL[made % len(REAL)], run, asked, rng)
        else:
            start = forked_start(*draw(rng), run, asked, rng)
        report.starts.append(start)
        print(f"{number + 1:>4} {run.name} {start.kind}: {start}"[:150], file=sys.stderr, flush=True)
        _judge(report, start)
        if (run / "release").exists():
            _compare(report, straight, run)
            report.runs += 1


def _judge(report: Report, start: Kill) -> None:
    """What may not be, whatever was killed."""
    where = (
        f"{start.run.name}, start {len(report.starts)} ({start.kind}, {start.ranks} ranks, exit codes {start.codes})"
    )
    if start.seconds is None:
        report.wrong.append(f"{where}: processes still ran after {BOUND:g} s")
    if start.kind == FINISH and any(start.codes):
        raise SystemExit(f"{where}: a start that nobody disturbed did not end well; see {start.run.parent}")
    if start.kind in SAVED and set(start.codes) - {75, 130, 0}:
        report.wrong.append(f"{where}: it should have saved and left with 75 or 130")
    if start.began_at is None:
        return
    before = [k for k in report.starts[:-1] if k.run == start.run and k.resumed_at is None]
    for kill in before:
        kill.resumed_at = start.began_at
        saved = kill.reached // INTERVAL * INTERVAL - INTERVAL  # the newest may have been under way
        if start.began_at < max(saved, kill.began_at or 0):
            report.wrong.append(
                f"{where}: began at step {start.began_at}, and the one before had reached {kill.reached}"
            )


def _compare(report: Report, straight: Path, run: Path) -> None:
    """A run that is done: as if nobody had disturbed it?"""
    wrong = compare(straight, run).beyond(TOLERANCES["mae"])
    wrong += [f"{p} is left" for p in run.rglob("*") if p.name.startswith("tmp-") or p.name.endswith(".tmp")]
    report.wrong += [f"{run.name}: {line}" for line in wrong]
    for kill in (k for k in report.starts if k.run == run):
        kill.sound = not wrong
        if kill.resumed_at is None:  # what was left of the last start went on to the end
            kill.resumed_at = kill.reached


def table(report: Report) -> Iterator[str]:
    head = f"{'killed':<28}{'kills':>6}{'resumed':>9}{'lost steps: mean':>18}{'max':>5}"
    yield head + f"{'gone after: median':>20}{'max':>8}"
    for kind in [*sorted({k.kind for k in report.kills}), ""]:
        of = [k for k in report.kills if kind in ("", k.kind)]
        lost = [k.reached - k.resumed_at for k in of if k.resumed_at is not None and k.reached]
        gone = [k.seconds for k in of if k.seconds is not None]
        late = f"  ({len(of) - len(gone)} still ran after {BOUND:g} s)" if len(gone) < len(of) else ""
        yield (
            f"{kind or 'all':<28}{len(of):>6}{sum(k.sound and k.resumed_at is not None for k in of):>9}"
            f"{statistics.mean(lost) if lost else 0:>18.1f}{max(lost, default=0):>5}"
            f"{statistics.median(gone) if gone else 0:>18.2f} s{max(gone, default=0):>6.2f} s{late}"
        )
    real = sum(":" in k.kind and k.kind.partition(":")[0] in LAUNCHERS for k in report.kills)
    yield f"{len(report.kills) - real} kills of forked ranks, {real} of python maws/train.py, torchrun and deepspeed"
    yield f"{report.runs} runs finished, each compared with one that nobody disturbed; wrong: {len(report.wrong)}"
    yield from report.wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--real", type=int, default=10, help="of them, of real processes and launchers (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=Path, required=True, metavar="FOLDER", help="any small shard set")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="keep runs and logs (default: a temporary folder)"
    )
    options = parser.parse_args()
    logging.disable()
    folder = options.output or Path(tempfile.mkdtemp(prefix="kills_"))
    begun = time.monotonic()
    report = harness(options.shards.resolve(), folder.resolve(), options.kills, options.real, options.seed)
    print("\n".join(table(report)))
    print(f"{time.monotonic() - begun:.0f} s; logs: {folder}")
    (folder / "kills.json").write_text(json.dumps([{**k.__dict__, "run": k.run.name} for k in report.starts], indent=1))
    return int(bool(report.wrong))


if __name__ == "__main__":
    sys.exit(main())
