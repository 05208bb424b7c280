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
import glob
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from eval.chain import Runner, guarded, only_one, say
from eval.processes import Children, count_gpus, environment_for
from eval.steps import Ledger, Step, evaluators_in

ROOT = Path(__file__).resolve().parents[1]
EMOJI = Path("demo/emoji")
EVALUATION = EMOJI / "eval-emojione.parquet"
SEEDS = (0, 1)
PROBES = ("linear", "knn", "lowshot")
LOOKS = ("spectrum", "attention")
DATA_CODE = (
    "data_pipeline/**/*.py",
    "data_pipeline/wordnet30/**/*",
    "data_pipeline/deny_list.yaml",
    "!data_pipeline/report*.py",
)
PAGE_CODE = ("data_pipeline/report*.py", "data_pipeline/pages/*")
TRAIN_CODE = ("maws/**/*.py", "ds_configs/*.json", "data_pipeline/shardset.py", "data_pipeline/images.py")
REPORT_CODE = ("eval/report*.py", "eval/figures*.py", "eval/pages/*", "eval/papers/*")
EVAL_CODE = (
    "eval/**/*.py",
    "eval/prompts/*",
    "eval/published/data/*",
    "maws/models/*.py",
    "maws/data/*.py",
    "maws/release.py",
    *DATA_CODE[:1],
)
EVAL_CODE += tuple(f"!{pattern}" for pattern in REPORT_CODE)  # a change of the page asks for no new scores


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
        evaluate(run, (*PROBES, *heads, *LOOKS), settings=("lowshot.k=1,5", "lowshot.vpt.batch=32"))  # for time
    for run in (name for pair in pairs[1:] for name in pair[:2]):
        # VPT costs more than all else; the first seed has it
        evaluate(run, (*PROBES, "wsphead"), settings=("lowshot.k=1,5", "lowshot.methods=linear"))
    evaluate("lit", ("zeroshot",), train_on=None, templates="drawings")
    report = ("python", "-m", "eval", "report", out)
    inputs = (manifest, f"{out}/*/results.jsonl", f"{out}/*/metrics.jsonl", f"{out}/*/config.json")
    steps.append(Step("report", report, inputs, (f"{out}/report.html",), REPORT_CODE))
    return steps


def run_name(lineage: str, seed: int) -> str:
    return f"{lineage}_seed{seed}" if seed else lineage


def _is_label_file(name: str) -> bool:
    return Path(name).name.startswith(("eval-", "train-labels"))


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

    def chain_and_scores() -> None:
        if args.fresh:
            say(f"starting over: removing {args.folder}")
            empty(folder)
        say(f"the demo: {len(steps)} steps into {args.folder}, on {devices}")
        runner.run()
        say(score_lines(folder))
        say("", f"report: {folder / 'report.html'}")

    return guarded(runner, folder, "`make demo`", chain_and_scores, start_over=", `make demo FRESH=1` starts over")


def empty(folder: Path) -> None:
    """Remove everything but the lock that this call holds."""
    for path in folder.iterdir():
        if path.name == ".lock":
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


if __name__ == "__main__":
    sys.exit(main())
