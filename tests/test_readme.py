"""Every command of the README does what the README says: the chain is run, on a small corpus with `--preset debug`.

A console block is preceded by a comment that says how it is tested: `run`, `check` (flags and settings are accepted) or
`dry run` (make -n).
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from forks import Forked
from pages import accept

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CORPUS = ROOT / "demo" / "emoji"
CLASSES = 12
FORKED = {("python", "maws/train.py"): "maws.train:main", ("python", "-m", "eval"): "eval.__main__:main"}
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
VENDORS = ("noto", "twemoji", "openmoji", "fluent-emoji")


def commands(kind: str) -> list[str]:
    """The lines of all blocks of one kind, in order."""
    blocks = re.findall(rf"^<!-- test: {kind} -->\n```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert lines and all(line.startswith("$ ") for line in lines)
    return [line.removeprefix("$ ") for line in lines]


def test_every_console_block_says_how_it_is_tested():
    marked = re.findall(r"^<!-- test: (?:run|check|dry run) -->\n```console$", README, re.MULTILINE)
    assert len(marked) == README.count("```console")
    assert len(marked) > 8


def test_links_and_files_of_the_repository_that_the_readme_names_exist():
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:maws|eval|data_pipeline|tests|ds_configs|demo)/[\w./-]*)`", README):
        assert (ROOT / name).exists(), name


def test_the_readme_starts_with_what_it_is_the_path_and_the_two_commands():
    top = README[: README.index("## Step by step")]
    places = [top.index(text) for text in ("# maws-open", "captions ─▶ synsets", "$ make demo", "$ make test")]
    assert places == sorted(places)
    assert len(top.splitlines()) < 50


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
@pytest.mark.parametrize("command", commands("dry run"))
def test_make_knows_its_targets(command):
    program, *arguments = shlex.split(command)
    assert program == "make"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", commands("check"))
def test_flags_and_settings_are_accepted(command):
    accept(command)


def test_the_demo_runs_the_commands_of_the_readme():
    spec = importlib.util.spec_from_file_location("demo_run_for_readme", ROOT / "demo" / "run.py")
    assert spec and spec.loader
    demo = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = demo
    spec.loader.exec_module(demo)
    documented = {frozenset(shlex.split(command)) for command in commands("run")}
    chain = {
        step.name: frozenset(word for word in step.command if word not in ("--resume", "auto"))
        for step in demo.chain("runs/demo", ranks=2)
    }
    for name in ("shards", "data-page", "mae", "mae_wsp", "lit", "eval-lit", "report"):
        assert chain[name] in documented, name


# ----------------------------------------------------------------------------------------------------------- the chain


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder like demo/emoji with the pictures of a few classes, and some others."""
    folder = tmp_path_factory.mktemp("readme") / "demo" / "emoji"
    folder.mkdir(parents=True)
    labels = pq.read_table(CORPUS / "train-labels.parquet")
    labels = labels.filter(pc.less(labels["label"], CLASSES))
    pq.write_table(labels, folder / "train-labels.parquet")
    for vendor in VENDORS:
        table = pq.read_table(CORPUS / f"{vendor}.parquet")
        labelled = table.filter(pc.is_in(table["key"], labels["key"].combine_chunks()))
        pq.write_table(pa.concat_tables([labelled, table.slice(300, 30)]), folder / f"{vendor}.parquet")
    test = pq.read_table(CORPUS / "eval-emojione.parquet")
    pq.write_table(test.filter(pc.less(test["label"], CLASSES)), folder / "eval-emojione.parquet")
    classes = json.loads((CORPUS / "classes.json").read_text())
    (folder / "classes.json").write_text(json.dumps([c for c in classes if c["label"] < CLASSES]))
    return folder


def run(command: str, corpus: Path, port: int) -> None:
    """Run one line of the README with this Python, on the small corpus, beside nothing else.

    What imports torch is forked from a process that has it (tests/forks.py), as if started: test_forks.py starts
    `maws/train.py` and tests/eval/test_cli.py `python -m eval`. A launcher is started as it is.
    """
    base = corpus.parents[1]
    words = shlex.split(command.replace("demo/emoji", str(corpus)).replace("runs/demo", str(base / "runs" / "demo")))
    words = ["debug" if before == "--preset" else word for before, word in zip([""] + words, words, strict=False)]
    for start, target in FORKED.items():
        if words[: len(start)] == [*start]:
            return fork(command, target, words[len(start) :])
    program = [sys.executable]
    if words[0] == "deepspeed":
        program += [str(Path(sys.executable).parent / "deepspeed"), "--master_port", str(port)]
    child = subprocess.Popen(
        [*program, *words[1:]],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=240)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)  # the launcher would leave its ranks behind
        child.wait()
        raise
    assert child.returncode == 0, f"$ {command}\n{output[-3000:]}"


def fork(command: str, target: str, words: list[str]) -> None:
    process = Forked(target, [words], env=ENVIRONMENT, cwd=ROOT, stdout=True)
    try:
        assert process.wait(240) == 0, f"$ {command}\n{process.printed()[-3000:]}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.timeout(900)
def test_the_chain_of_the_readme(corpus, free_port):
    for command in commands("run"):
        run(command, corpus, free_port)
    demo = corpus.parents[1] / "runs" / "demo"
    assert (demo / "shards" / "manifest.json").is_file()
    for name in ("mae", "mae_wsp", "wsp", "lit"):
        assert (demo / name / "release" / "model.safetensors").is_file()
        losses = [json.loads(line)["train/loss"] for line in (demo / name / "metrics.jsonl").read_text().splitlines()]
        assert len(losses) == 40
    results = [json.loads(line) for path in demo.glob("*/results.jsonl") for line in path.read_text().splitlines()]
    assert {result["evaluator"] for result in results} == {
        "linear", "knn", "lowshot", "wsphead", "zeroshot", "spectrum", "attention",
    }  # fmt: skip
    looks = ("spectrum", "attention")
    scores = [result for result in results if result["evaluator"] not in looks]
    shares = [result for result in scores if not result["metric"].startswith("hierarchy/")]
    assert all(0 <= result["value"] <= 1 and result["n"] == CLASSES for result in shares)
    page = (demo / "report.html").read_text()
    for missing in ("No finished MAE run", "No zero-shot result", "No results yet", "Could not be made"):
        assert missing not in page
    assert "MAE→WSP→LiT" in page
    assert page.count('class="tile guess') == 8
