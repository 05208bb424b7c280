"""demo/run.py keeps its promises: skips what is done, goes on where it stopped, leaves nobody running.

The chain here is made of tiny commands, so that only the runner is tested; each test has a repository of its own.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "demo" / "run.py"

# A script like demo/run.py, with another chain: steps.json lists what each step writes and which Python it runs.
DRIVER = f"""
import importlib.util, json, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("demo_run", {str(RUN)!r})
demo = importlib.util.module_from_spec(spec)
sys.modules["demo_run"] = demo
spec.loader.exec_module(demo)
root = Path(sys.argv[1])

def chain(out, ranks, gpus):
    return [
        demo.Step(
            name=step["name"], command=("python", "-c", step["code"]), inputs=tuple(step.get("inputs", ())),
            outputs=tuple(step.get("outputs", ())), code=("code/*.py",), folder=step.get("folder"),
            side_by_side=step.get("side_by_side", False),
        )
        for step in json.loads((root / "steps.json").read_text())
    ]

sys.exit(demo.main(sys.argv[2:], make=chain, root=root))
"""


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_run", RUN)
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_run"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo_run"]


class Repository:
    """A folder with a chain in it, and ways to run that."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "code").mkdir()
        (root / "code" / "a.py").write_text("1")
        (root / "driver.py").write_text(DRIVER)
        self.started: list[subprocess.Popen] = []

    def write(self, *steps: dict) -> None:
        (self.root / "steps.json").write_text(json.dumps(steps))

    def start(self, *flags: str) -> subprocess.Popen:
        command = [sys.executable, str(self.root / "driver.py"), str(self.root), *flags]
        with (self.root / "out.txt").open("a") as out:
            child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        self.started.append(child)
        return child

    def run(self, *flags: str) -> tuple[int, str]:
        (self.root / "out.txt").unlink(missing_ok=True)
        code = self.start(*flags).wait(timeout=60)
        return code, self.output()

    def output(self) -> str:
        return (self.root / "out.txt").read_text()

    def ran(self, output: str) -> list[str]:
        """Names of the steps that were run, in order."""
        return re.findall(r"^==> \[\d+/\d+\] (\S+) \(", output, re.MULTILINE)


@pytest.fixture
def repository(tmp_path):
    repository = Repository(tmp_path)
    yield repository
    for child in repository.started:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def writes(name: str, path: str, inputs: tuple[str, ...] = (), **more) -> dict:
    """A step that writes its name and its inputs' contents to `path`."""
    code = f"""
import pathlib
path = pathlib.Path({path!r})
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text({name!r} + "".join(pathlib.Path(p).read_text() for p in {inputs!r}))
print("hello from {name}")
"""
    return {"name": name, "code": code, "inputs": list(inputs), "outputs": [path], **more}


def wait_for(condition, seconds: float = 30.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------------------ skipping


def test_a_second_call_skips_everything_and_says_so(repository):
    repository.write(writes("one", "runs/demo/one/a"), writes("two", "runs/demo/two/b", ("runs/demo/one/a",)))
    code, output = repository.run()
    assert (code, repository.ran(output)) == (0, ["one", "two"])
    assert "hello from one" in output
    assert f"report: {repository.root}/runs/demo/report.html" in output
    code, output = repository.run()
    assert (code, repository.ran(output)) == (0, [])
    assert "==> [1/2] one: done and up to date, skipped" in output
    assert "==> [2/2] two: done and up to date, skipped" in output


def test_a_changed_input_runs_its_step_again_and_those_that_use_its_output(repository):
    (repository.root / "corpus").write_text("1")
    repository.write(
        writes("one", "runs/demo/one/a", ("corpus",)),
        writes("aside", "runs/demo/aside/a"),
        writes("two", "runs/demo/two/b", ("runs/demo/one/a",)),
    )
    repository.run()
    (repository.root / "corpus").write_text("2")
    code, output = repository.run()
    assert (code, repository.ran(output)) == (0, ["one", "two"])
    assert (repository.root / "runs/demo/two/b").read_text() == "twoone2"


def test_changed_code_and_a_changed_command_and_a_lost_output_are_noticed(repository):
    repository.write(writes("one", "runs/demo/one/a"))
    repository.run()
    (repository.root / "code" / "a.py").write_text("2")
    assert repository.ran(repository.run()[1]) == ["one"]
    repository.write({**writes("one", "runs/demo/one/a"), "code": "open('runs/demo/one/a', 'w').write('new')"})
    assert repository.ran(repository.run()[1]) == ["one"]
    (repository.root / "runs/demo/one/a").unlink()
    assert repository.ran(repository.run()[1]) == ["one"]
    assert repository.ran(repository.run()[1]) == []


def test_what_another_version_of_a_step_left_in_its_folder_is_removed(repository):
    step = writes("one", "runs/demo/one/a", folder="runs/demo/one")
    repository.write(step)
    repository.run()
    stray = repository.root / "runs/demo/one/stray"
    stray.write_text("")
    repository.write({**step, "code": step["code"] + "# another version"})
    code, output = repository.run()
    assert code == 0
    assert not stray.exists()
    assert "starting it over" in output


def test_fresh_starts_over_and_touches_nothing_but_its_folder(repository):
    repository.write(writes("one", "runs/demo/one/a"))
    repository.run()
    mine = repository.root / "runs" / "mine"
    mine.write_text("")
    (repository.root / "runs/demo/stray").write_text("")
    code, output = repository.run("--fresh")
    assert (code, repository.ran(output)) == (0, ["one"])
    assert mine.exists()
    assert not (repository.root / "runs/demo/stray").exists()


# ------------------------------------------------------------------------------------------------------------- failing


def test_a_failing_step_stops_the_chain_with_one_line_and_the_next_call_goes_on_there(repository):
    fails = {"name": "two", "code": "import sys; sys.exit('the disk is full')"}
    last = writes("three", "runs/demo/three")
    repository.write(writes("one", "runs/demo/one/a"), fails, last)
    code, output = repository.run()
    assert code == 1
    assert "the disk is full" in output
    line = output.rstrip().splitlines()[-1]
    assert line == (
        "error: step 2/3, two, failed (exit code 1); its last lines are above. `make demo` goes on from this step"
    )
    assert not (repository.root / "runs/demo/three").exists()
    repository.write(writes("one", "runs/demo/one/a"), writes("two", "runs/demo/two"), last)
    code, output = repository.run()
    assert (code, repository.ran(output)) == (0, ["two", "three"])


def test_a_step_that_forgets_its_output_has_failed(repository):
    repository.write({"name": "one", "code": "pass", "outputs": ["runs/demo/one/a"]})
    code, output = repository.run()
    assert code == 1
    assert "one ended without error but did not write runs/demo/one/a" in output


def test_a_second_runner_on_the_same_folder_is_refused(repository):
    repository.write({"name": "one", "code": "import time; print('up', flush=True); time.sleep(60)"})
    first = repository.start()
    wait_for(lambda: "up" in repository.output())
    second = subprocess.run(
        [sys.executable, "driver.py", str(repository.root)], cwd=repository.root, capture_output=True, text=True
    )
    assert second.returncode == 1
    assert second.stderr == "error: another `make demo` is at work in runs/demo; wait for it or stop it\n"
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=30) == 130


# --------------------------------------------------------------------------------------------------------- interrupted

# Like the deepspeed launcher: a child that starts another process and, on SIGTERM, dies without ending it. The other
# one saves on SIGTERM, as a rank does.
RANK = """
import pathlib, signal, sys, time
folder = pathlib.Path("runs/demo/one")
def save(number, frame):
    (folder / "saved").write_text("")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(folder / "ready").write_text("")
time.sleep(100)
"""
LAUNCHER = f"""
import os, pathlib, subprocess, sys
folder = pathlib.Path("runs/demo/one")
if (folder / "saved").exists():
    print("resumed")
    (folder / "done").write_text("")
    sys.exit(0)
folder.mkdir(parents=True, exist_ok=True)
rank = subprocess.Popen([sys.executable, "-c", {RANK!r}])
(folder / "pids").write_text(f"{{os.getpid()}} {{rank.pid}}")
rank.wait()
"""


@pytest.fixture
def launched(repository):
    """A runner whose first step has started a process that started another."""
    step = {"name": "one", "code": LAUNCHER, "outputs": ["runs/demo/one/done"], "folder": "runs/demo/one"}
    repository.write(step)
    runner = repository.start()
    wait_for(lambda: (repository.root / "runs/demo/one/ready").exists())
    pids = [int(pid) for pid in (repository.root / "runs/demo/one/pids").read_text().split()]
    yield runner, pids
    for pid in pids:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_lets_steps_save_leaves_no_process_and_the_next_call_goes_on(repository, launched, number, code):
    runner, pids = launched
    runner.send_signal(number)  # to the runner alone, as a terminal's Ctrl-C reaches it but not its children's sessions
    assert runner.wait(timeout=30) == code
    assert "`make demo` goes on from here" in repository.output()
    assert "Traceback" not in repository.output()
    assert not any(map(is_alive, pids))
    assert (repository.root / "runs/demo/one/saved").exists()
    code, output = repository.run()
    assert code == 0
    assert "resumed" in output


def test_what_a_killed_runner_left_running_is_ended_before_the_next_one_starts(repository, launched):
    runner, pids = launched
    runner.kill()
    runner.wait(timeout=30)
    assert all(map(is_alive, pids))
    code, output = repository.run()
    assert code == 0
    assert "ended 1 process group(s) that an earlier, killed call had left running" in output
    assert not any(map(is_alive, pids))


# -------------------------------------------------------------------------------------------------------- side by side


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_steps_that_may_run_side_by_side_do_and_their_output_does_not_mix(repository):
    meets = """
import pathlib, time
pathlib.Path("runs/demo/{name}").write_text("")
print("{name} first")
end = time.monotonic() + 20
while not pathlib.Path("runs/demo/{other}").exists():
    assert time.monotonic() < end, "alone"
    time.sleep(0.02)
print("{name} second")
"""
    repository.write(
        {"name": "a", "code": meets.format(name="a", other="b"), "outputs": ["runs/demo/a"], "side_by_side": True},
        {"name": "b", "code": meets.format(name="b", other="a"), "outputs": ["runs/demo/b"], "side_by_side": True},
        writes("c", "runs/demo/c"),
    )
    code, output = repository.run()
    assert code == 0
    assert "a first\na second\n" in output
    assert "b first\nb second\n" in output
    assert repository.ran(output) == ["a", "b", "c"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_step_waits_for_what_it_reads_and_others_go_past_it(repository):
    beside = {"side_by_side": True}
    slow = writes("slow", "runs/demo/slow", **beside)
    slow["code"] = "import time; time.sleep(1.5)" + slow["code"]
    after = writes("after", "runs/demo/after", ("runs/demo/slow",), **beside)
    total = writes("total", "runs/demo/total", ("runs/demo/after", "runs/demo/other"))
    repository.write(slow, after, writes("other", "runs/demo/other", **beside), total)
    code, output = repository.run()
    assert code == 0, output
    assert repository.ran(output) == ["slow", "other", "after", "total"]
    assert (repository.root / "runs/demo/total").read_text() == "totalafterslowother"
    slow["code"] = slow["code"].replace("'slow'", "'changed'")
    repository.write(slow, after, writes("other", "runs/demo/other", **beside), total)
    code, output = repository.run()  # whether `after` is up to date is asked once `slow` is done, not before
    assert repository.ran(output) == ["slow", "after", "total"], output
    assert (repository.root / "runs/demo/total").read_text() == "totalafterchangedother"


# ------------------------------------------------------------------------------------------------------- the real chain


def test_the_chain_hands_every_step_what_an_earlier_one_made(demo):
    steps = demo.chain("runs/demo", ranks=2)
    made: set[str] = set()
    for step in steps:
        for name in step.inputs:
            assert "*" in name or name in made or (ROOT / name).is_file(), (
                f"{step.name} reads {name}, which nobody made"
            )
        made.update(step.outputs)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert names[0] == "shards" and names[-1] == "report"
    assert {"mae", "mae_wsp", "wsp", "mae_wsp_seed1", "wsp_seed1", "lit", "eval-lit"} <= set(names)


def test_the_chain_never_trains_on_evaluation_pictures(demo):
    """The build takes every file with captions; the evaluation file has none, and no probe is given it to train on."""
    assert "caption" not in pq.read_schema(ROOT / "demo/emoji/eval-emojione.parquet").names
    for step in demo.chain("runs/demo", ranks=2):
        words = list(step.command)
        if "--train" in words:
            assert words[words.index("--train") + 1] == "runs/demo/shards"
            assert "eval-" not in " ".join(words[: words.index("--data")])


def test_wsp_from_mae_and_from_random_differ_only_in_where_they_start(demo):
    commands = {step.name: " ".join(step.command) for step in demo.chain("runs/demo", ranks=2)}
    for seed in ("", "_seed1"):
        ours = commands[f"mae_wsp{seed}"].replace(" --init-from runs/demo/mae", "").replace("mae_wsp", "wsp")
        assert ours == commands[f"wsp{seed}"]
