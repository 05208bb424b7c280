"""python -m eval compare: scratch, MAE, WSP and MAE→WSP at equal training FLOPs, with seeds, intervals and a verdict.

    python -m eval compare --preset demo --output runs/compare
    python -m eval compare --shards SHARDS --train LABELLED --data EVALUATION --classes imagenet1k --output FOLDER \\
        --seeds 0 1 2 --set total="1 epochs" budgets=0.25,0.5,1
    python -m eval compare --preset demo --output runs/compare --plan        # says what it would do

The plan is printed first; then it runs `maws/train.py` and `python -m eval` as one would type them. Started again, it
skips what is done and goes on where it stopped. FOLDER/compare.json has everything, FOLDER/compare.html is for people.
"""

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError
from data_pipeline.files import write_bytes
from eval.chain import alone, run_chain, say
from eval.comparison import plan as plans
from eval.processes import count_gpus


def main(argv: Sequence[str], make_parser: Callable[..., argparse.ArgumentParser] = argparse.ArgumentParser) -> int:
    args = parser(make_parser).parse_args(argv)
    asked = plans.read_comparison(args.preset, args.config, args.settings, flags(args))
    return compare(asked, args.output, only_plan=args.plan)


def parser(make: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    p = make(prog="python -m eval compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="vit_b16", help=f"one of {', '.join(plans.PRESETS)}")
    p.add_argument("--config", type=Path, metavar="FILE", help="settings as JSON, on top of the preset")
    p.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="runs, compare.json and compare.html")
    p.add_argument("--shards", help="shard set that MAE and WSP are trained on")
    p.add_argument("--labelled", help="shard set with one label a picture: adds the arm supervised")
    p.add_argument("--data", nargs="+", help="evaluation pictures, as for python -m eval")
    p.add_argument("--train", nargs="+", help="labelled pictures that the probes learn from")
    p.add_argument("--train-labels", help="Parquet of key, label for --train")
    p.add_argument("--classes", help="a bundled class set or a file")
    p.add_argument("--seeds", nargs="+", type=int)
    p.add_argument("--arms", nargs="+", help=f"of {', '.join(plans.ARMS)}")
    p.add_argument("--set", dest="settings", nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    p.add_argument("--plan", action="store_true", help="print the plan and its cost, run nothing")
    return p


def flags(args: argparse.Namespace) -> dict[str, Any]:
    """Those that were given."""
    names = ("shards", "labelled", "data", "train", "train_labels", "classes", "seeds", "arms")
    return {name: getattr(args, name) for name in names if getattr(args, name)}


def compare(asked: plans.Comparison, output: Path, only_plan: bool = False) -> int:
    from eval.comparison.chain import chain, describe, estimate, launcher

    plan = plans.make_plan(asked, output)
    check_evaluation(asked)
    say(*describe(plan, output), estimate(plan))
    gpus = count_gpus()
    steps = chain(plan, launcher(gpus))
    if only_plan:
        say("", *(shlex.join(step.command) for step in steps))
        return 0
    with alone(output, "compare"):
        return run_chain(steps, output, lambda: finish(plan, output), gpus)


def check_evaluation(asked: plans.Comparison) -> None:
    """Refuse now, and not after the trainings, what `python -m eval` would refuse. Raises UsageError, DataError."""
    from eval import base
    from eval.datasets import open_data

    entries = base.configure([base.load(name) for name in asked.evaluators], asked.evaluator_settings)
    for entry in entries:
        if entry.data not in ("labelled", "pictures") or entry.make.needs_text:
            raise UsageError(
                f"evaluators={entry.name} needs more than an image tower, which is all that the arms share"
            )
        if entry.make.needs_train and not asked.train:
            raise UsageError(f"{entry.name} learns from labelled images: give them with --train PATH…")
    labels = Path(asked.train_labels) if asked.train_labels else None
    data = open_data(
        [Path(path) for path in asked.data], [Path(path) for path in asked.train], asked.classes or None, labels
    )
    say(data.summary())


def finish(plan: plans.Plan, output: Path) -> None:
    """Statistics of what was measured, as files and on the terminal."""
    from eval.comparison.outcome import collect
    from eval.comparison.record import as_json, as_text
    from eval.report_compare import page

    metrics = collect(plan)
    write_bytes(output / "compare.json", as_json(plan, metrics).encode())
    write_bytes(output / "compare.html", page(output).encode())
    say("", *as_text(plan, metrics), "", f"everything: {output / 'compare.json'}   page: {output / 'compare.html'}")
