"""The whole chain on the demo corpus, step by step: what `make demo` runs.

    make demo                 # every step that is not done or no longer up to date
    make demo FRESH=1         # from the beginning: removes runs/demo first
    .venv/bin/python demo/run.py --list

captions ─▶ shards ─▶ MAE ─▶ WSP (from MAE, and from random) ─▶ LiT ─▶ evaluations ─▶ runs/demo/report.html

Every step is one command that works by itself and is printed as you would type it. A step is done when its command
ended well; what it depended on (command, input files, code, versions) is then written to runs/demo/.steps/NAME.json,
and the step is skipped for as long as none of that changes. Interrupted anywhere, the same call goes on: training from
its last checkpoint, all else from the start of its step.
"""

import argparse
import fcntl
import fnmatch
import glob
import hashlib
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
EMOJI = Path("demo/emoji")
EVALUATION = EMOJI / "eval-emojione.parquet"
SEEDS = (0, 1)
PROBES = ("linear", "knn", "lowshot")
SIDE_BY_SIDE = 2  # commands at a time: more would share one GPU, or memory, for little
GRACE = 40.0  # seconds: longer than a rank needs to save, shorter than a person waits
TOKEN = (
    "MAWS_DEMO_FOLDER"  # in the environment of everything started here: what a killed call left behind is known by it
)
LIBRARIES = ("torch", "torchvision", "deepspeed", "timm", "transformers", "nltk", "pyarrow", "pillow", "numpy")
DATA_CODE = (
    "data_pipeline/**/*.py",
    "data_pipeline/wordnet30/**/*",
    "data_pipeline/deny_list.yaml",
    "!data_pipeline/report*.py",
)
PAGE_CODE = ("data_pipeline/report*.py", "data_pipeline/pages/*")
TRAIN_CODE = ("maws/**/*.py", "ds_configs/*.json", "data_pipeline/shardset.py", "data_pipeline/images.py")
REPORT_CODE = ("eval/report*.py", "eval/figures.py", "eval/pages/*")
EVAL_CODE = ("eval/**/*.py", "eval/prompts/*", "maws/models/*.py", "maws/data/*.py", "maws/release.py", *DATA_CODE[:1])
EVAL_CODE += tuple(f"!{pattern}" for pattern in REPORT_CODE)  # a change of the page asks for no new scores


@dataclass(frozen=True)
class Step:
    """One command of the chain. Paths are relative to the repository."""

    name: str
    command: tuple[str, ...]  # as a user would type it
    inputs: tuple[str, ...]  # files that it reads; a pattern stands for all files it matches
    outputs: tuple[str, ...]  # files that exist when it is done
    code: tuple[str, ...]  # patterns of the source files that it runs
    folder: str | None = None  # its own: removed when the step must start over
    side_by_side: bool = False  # needs one core only: runs beside others that do too
    done: Callable[[Path], bool] | None = None  # a look into the outputs, where that they exist is not enough


class StepFailed(Exception):
    """A step ended badly: its name and exit code."""

    def __init__(self, step: Step, code: int, log: Path | None = None) -> None:
        super().__init__(step.name)
        self.step, self.code, self.log = step, code, log


class Stopped(BaseException):
    """A signal asked for the end. BaseException: no `except Exception` on the way may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# --------------------------------------------------------------------------------------------------------------- chain


def chain(out: str, ranks: int, gpus: int = 0, preset: str = "demo", seeds: Sequence[int] = SEEDS) -> list[Step]:
    """All steps in order. `out` is the folder of the demo, `ranks` how many processes train together.

    Without GPUs, MAE is trained by two ranks, and all that follows by one process each, two steps at a time: on two
    cores that is faster than two ranks each.
    """
    vendors = [name for name in glob.glob(str(EMOJI / "*.parquet"), root_dir=ROOT) if not _is_label_file(name)]
    shards, manifest = f"{out}/shards", f"{out}/shards/manifest.json"
    # MAE, LiT and the probes use pictures without a synset too; WSP passes over them
    build = ("python", "-m", "data_pipeline", "build", "--input", str(EMOJI), "--output", shards, "--keep-unlabelled",
             "--exclude-eval", str(EVALUATION))  # fmt: skip
    page = ("python", "-m", "data_pipeline", "report", shards)
    steps = [
        Step("shards", build, (*sorted(vendors), str(EVALUATION)), (manifest,), DATA_CODE, folder=shards),
        Step("data-page", page, (manifest,), (f"{shards}/report.html",), PAGE_CODE, side_by_side=True),
    ]

    def train(stage: str, run: str, seed: int = 0, init_from: str | None = None, alone: bool = False) -> None:
        command = ["python"] if alone else ["deepspeed", "--num_gpus", str(ranks)]
        command += ["maws/train.py", "--stage", stage, "--preset", preset, "--run", f"{out}/{run}"] + (
            ["--init-from", f"{out}/{init_from}"] if init_from else []
        )
        command += (["--seed", str(seed)] if seed else []) + ["--resume", "auto", f"data.shards={shards}"]
        inputs = (manifest, *([weights(init_from)] if init_from else []))
        steps.append(Step(run, tuple(command), inputs, (weights(run),), TRAIN_CODE, f"{out}/{run}", side_by_side=alone))

    def weights(run: str) -> str:
        return f"{out}/{run}/release/model.safetensors"

    def evaluate(
        run: str, evaluators: Sequence[str], train_on: str | None = shards, settings: Sequence[str] = (),
        templates: str | None = None,
    ) -> None:  # fmt: skip
        data, classes, labels = EVALUATION, EMOJI / "classes.json", EMOJI / "train-labels.parquet"
        command = ["python", "-m", "eval", *evaluators, "--run", f"{out}/{run}"]
        command += ["--train", train_on, "--train-labels", str(labels)] if train_on else []
        command += ["--data", str(data), "--classes", str(classes)] + (["--set", *settings] if settings else [])
        command += ["--templates", templates] if templates else []
        inputs = [weights(run), str(data), str(classes)] + ([manifest, str(labels)] if train_on else [])
        results = f"{out}/{run}/results.jsonl"
        steps.append(
            Step(
                f"eval-{run}",
                tuple(command),
                tuple(inputs),
                (results,),
                EVAL_CODE,
                side_by_side=True,
                done=lambda root: set(evaluators) <= evaluators_in(root / results),
            )
        )

    pairs = [(run_name("mae_wsp", seed), run_name("wsp", seed), seed) for seed in seeds]
    train("mae", "mae")
    for from_mae, from_random, seed in pairs:
        train("wsp", from_mae, seed, init_from="mae", alone=not gpus)
        train("wsp", from_random, seed, alone=not gpus)
    train("lit", "lit", init_from="mae_wsp", alone=not gpus)
    for run in ("mae", *pairs[0][:2]):
        heads = () if run == "mae" else ("wsphead",)
        evaluate(run, (*PROBES, *heads), settings=("lowshot.vpt.batch=32",))  # half of the default's work
    for run in (name for pair in pairs[1:] for name in pair[:2]):
        # VPT costs more than all else; the first seed has it
        evaluate(run, (*PROBES, "wsphead"), settings=("lowshot.methods=linear",))
    evaluate("lit", ("zeroshot",), train_on=None, templates="drawings")
    report = ("python", "-m", "eval", "report", out)
    inputs = (manifest, f"{out}/*/results.jsonl", f"{out}/*/metrics.jsonl", f"{out}/*/config.json")
    steps.append(Step("report", report, inputs, (f"{out}/report.html",), REPORT_CODE))
    return steps


def run_name(lineage: str, seed: int) -> str:
    return f"{lineage}_seed{seed}" if seed else lineage


def _is_label_file(name: str) -> bool:
    return Path(name).name.startswith(("eval-", "train-labels"))


def evaluators_in(results: Path) -> set[str]:
    """The evaluators with at least one whole line in a results file."""
    found: set[str] = set()
    for line in results.read_text(encoding="utf-8", errors="replace").splitlines() if results.is_file() else []:
        try:
            found.add(json.loads(line)["evaluator"])
        except (ValueError, KeyError, TypeError):
            continue  # half a line of a killed writer
    return found


# ---------------------------------------------------------------------------------------------------------- up to date


@dataclass
class Ledger:
    """What each step depended on when it was started and when it was done, in runs/demo/.steps/."""

    root: Path  # the repository
    folder: Path
    digests: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def fingerprint(self, step: Step) -> dict[str, Any]:
        """Everything the outputs are a function of. Kept readable, so that one can see what changed."""
        versions = {name: _version(name) for name in LIBRARIES}
        return {
            "command": list(step.command),
            "inputs": {name: self.digest(name) for pattern in step.inputs for name in self.matches(pattern)},
            "code": self.code(step.code),
            "versions": versions | {"python": f"{sys.version_info.major}.{sys.version_info.minor}"},
        }

    def matches(self, pattern: str) -> list[str]:
        return sorted(glob.glob(pattern, root_dir=self.root, recursive=True)) if "*" in pattern else [pattern]

    def code(self, patterns: Sequence[str]) -> str:
        """One digest of all files that the patterns match, less those of patterns that begin with `!`."""
        wanted = {name for pattern in patterns if pattern[0] != "!" for name in self.matches(pattern)}
        names = sorted(
            wanted - {name for pattern in patterns if pattern[0] == "!" for name in self.matches(pattern[1:])}
        )
        total = hashlib.sha256()
        for name in names:
            if (self.root / name).is_file():
                total.update(f"{name} {self.digest(name)}\n".encode())
        return total.hexdigest()

    def digest(self, name: str) -> str | None:
        """sha256 of a file, computed once for as long as it does not change; None when it is not there."""
        path = self.root / name
        try:
            stat = path.stat()
        except OSError:
            return None
        key = (name, stat.st_size, stat.st_mtime_ns)
        if key not in self.digests:
            with path.open("rb") as file:
                self.digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self.digests[key]

    def is_done(self, step: Step) -> bool:
        return (
            self.read(step, "done") == self.fingerprint(step)
            and all((self.root / name).exists() for name in step.outputs)
            and (step.done is None or step.done(self.root))
        )

    def was_started(self, step: Step) -> bool:
        """True when what is there was begun by the very same step: it may be continued."""
        return self.read(step, "started") == self.fingerprint(step)

    def mark(self, step: Step, what: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{step.name}.{what}.json" if what != "done" else self.folder / f"{step.name}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.fingerprint(step), indent=1))
        os.replace(temporary, path)

    def forget(self, step: Step) -> None:
        for suffix in (".json", ".started.json"):
            (self.folder / f"{step.name}{suffix}").unlink(missing_ok=True)

    def read(self, step: Step, what: str) -> Any:
        path = self.folder / (f"{step.name}.{what}.json" if what != "done" else f"{step.name}.json")
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# ----------------------------------------------------------------------------------------------------------- processes


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


# -------------------------------------------------------------------------------------------------------------- runner


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
        print(line, flush=True)


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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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


def score_lines(folder: Path) -> str:
    from data_pipeline.errors import DataError
    from eval.report_runs import read_folder
    from eval.report_scores import as_text, score_table, verdict

    try:
        runs = read_folder(folder)
    except DataError as error:
        return f"no scores: {error}"
    table = score_table(runs.results, [run.entrant() for run in runs.runs])
    legend = "% right ± half of a 95 % interval: over training seeds; d over low-shot draws; i over evaluation pictures"
    return "\n".join(["", as_text(table), "", legend, "", verdict(table)])


# ---------------------------------------------------------------------------------------------------------------- main


def main(
    argv: Sequence[str] | None = None, make: Callable[[str, int, int], list[Step]] = chain, root: Path = ROOT
) -> int:
    parser = argparse.ArgumentParser(prog="make demo", description="Run the whole chain on the demo corpus.")
    parser.add_argument("--fresh", action="store_true", help="start over: remove the folder first")
    parser.add_argument("--folder", default="runs/demo", help="where everything goes, inside the repository")
    parser.add_argument("--list", action="store_true", help="print the steps and whether they are done, run nothing")
    args = parser.parse_args(argv)
    folder = (root / args.folder).resolve()
    if root.resolve() not in folder.parents:
        parser.error(f"--folder {args.folder} must be a folder inside {root}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = count_gpus()
    ranks = 1 << (min(gpus, 8).bit_length() - 1) if gpus else 2  # a power of two divides the streams of any shard set
    steps = make(str(folder.relative_to(root.resolve())), ranks, gpus)
    ledger = Ledger(root, folder / ".steps")
    if args.list:
        for step in steps:
            say(f"{'done' if ledger.is_done(step) else 'to do':<6} {step.name:<18} {shlex.join(step.command)}")
        return 0
    with only_one(folder) as lock_is_ours:
        if not lock_is_ours:
            print(f"error: another `make demo` is at work in {args.folder}; wait for it or stop it", file=sys.stderr)
            return 1
        return _run(args, folder, steps, ledger, Children(root, environment_for(folder, ranks, cores, gpus)), cores)


def _run(
    args: argparse.Namespace, folder: Path, steps: list[Step], ledger: Ledger, children: Children, cores: int
) -> int:
    devices = "GPUs" if children.environment.get("DS_ACCELERATOR") != "cpu" else f"{cores} CPU cores"
    runner = Runner(steps, ledger, children, cores)
    try:
        with stopping_on_signals():
            if left := end_leftovers(folder):
                say(f"ended {left} process group(s) that an earlier, killed call had left running")
            if args.fresh:
                say(f"starting over: removing {args.folder}")
                empty(folder)
            say(f"the demo: {len(steps)} steps into {args.folder}, on {devices}")
            runner.run()
            say(score_lines(folder))
            say("", f"report: {folder / 'report.html'}")
            return 0
    except StepFailed as failure:
        what = f"step {steps.index(failure.step) + 1}/{len(steps)}, {failure.step.name}, failed"
        children.end_all()
        where = f"its output: {failure.log}" if failure.log else "its last lines are above"
        if failure.code == 75:
            print(f"stopped: {failure.step.name} was asked to stop and has saved; `make demo` goes on", file=sys.stderr)
            return 75
        code = f"signal {-failure.code}" if failure.code < 0 else f"exit code {failure.code}"
        print(f"error: {what} ({code}); {where}. `make demo` goes on from this step", file=sys.stderr)
        return 1
    except Stopped as stop:
        print("\nstopping: running steps save what they have …", file=sys.stderr, flush=True)
        children.end_all()
        print("stopped. `make demo` goes on from here, `make demo FRESH=1` starts over", file=sys.stderr)
        return 130 if stop.number == signal.SIGINT else 128 + stop.number


def empty(folder: Path) -> None:
    """Remove everything but the lock that this call holds."""
    for path in folder.iterdir():
        if path.name == ".lock":
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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


if __name__ == "__main__":
    sys.exit(main())
