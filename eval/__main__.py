"""Evaluate a run, or make the report.

    python -m eval linear knn lowshot --run runs/demo/mae_wsp --train demo/emoji \\
        --data demo/emoji/eval-emojione.parquet --classes demo/emoji/classes.json
    python -m eval zeroshot --run runs/demo/lit \\
        --data demo/emoji/eval-emojione.parquet --classes demo/emoji/classes.json
    python -m eval report runs/demo --output report.html

Several evaluators share one process and one extraction of features. Scores are appended to RUN/results.jsonl.
"""

import argparse
import datetime
import importlib.metadata
import logging
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from data_pipeline.ending import leave, told
from data_pipeline.errors import UsageError

if TYPE_CHECKING:  # torch and the models take seconds to import: a wrong flag is told at once
    import torch

    from eval.base import Entry, Evaluator, Score
    from eval.datasets import Data
    from eval.features import Encoder
    from eval.results import Result

log = logging.getLogger("eval")

WITH_TEXT = ("lit",)  # stages whose release has a text tower
LIBRARIES = ("torch", "timm", "pyarrow", "pillow", "maws-open")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `python -m eval --help`")


def parser() -> Parser:
    found = sorted(file.stem for file in (Path(__file__).parent / "evaluators").glob("[a-z]*.py"))
    p = Parser("python -m eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.allow_abbrev = False
    p.add_argument("evaluators", nargs="+", metavar="EVALUATOR", help=f"{', '.join(found)}; or report RUN_FOLDER")
    p.add_argument("--run", type=Path, required=True, help="run folder or release folder")
    p.add_argument("--data", type=Path, nargs="+", required=True, metavar="PATH", help="evaluation data")
    p.add_argument("--train", type=Path, nargs="+", default=[], metavar="PATH", help="training data of the probes")
    p.add_argument("--train-labels", type=Path, metavar="FILE", help="Parquet of key, label for --train")
    p.add_argument("--classes", type=Path, metavar="FILE", help="classes.json: label, name or names, synset")
    p.add_argument("--templates", metavar="FILE", help="zero-shot prompts: a file, or default or drawings")
    p.add_argument("--results", type=Path, metavar="FILE", help="default: RUN/results.jsonl")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--set", dest="settings", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    return told(lambda: _run(arguments), "interrupted; scores that are already in the results file stay")


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["report"]:
        from eval import report

        return int(report.main(arguments[1:]) or 0)
    return evaluate(parser().parse_args(arguments))


def evaluate(args: argparse.Namespace) -> int:
    from eval import base, contamination
    from eval.datasets import open_data
    from eval.features import open_encoder

    entries = configured(args)
    device = pick_device(args.device)
    encode = open_encoder(args.run, device)
    release = encode.release
    assert release is not None
    data = open_data(args.data, args.train, args.classes, args.train_labels)
    describe(encode, data, device)
    output = args.results or args.run / "results.jsonl"
    if blind := [entry.name for entry in entries if entry.make.needs_text and release.stage not in WITH_TEXT]:
        raise UsageError(
            f"{', '.join(blind)} needs a text tower, and {args.run} is a {' -> '.join(release.lineage)} run; "
            f"stages with a text tower: {', '.join(WITH_TEXT)} (maws/train.py --stage lit --init-from {args.run})"
        )
    evaluators = [entry.make(entry.config, data, args.seed) for entry in entries]  # files are read before any work
    found = contamination.look_up(args.run, data.test)
    table: list[tuple[str, base.Score]] = []
    for entry, evaluator in zip(entries, evaluators, strict=True):
        table += [(entry.name, score) for score in keep(entry, evaluator, encode, data, found, output, args)]
    show(table, len(data.classes))
    print(contamination.sentence(found))
    print(f"results: {output}")
    return 0


def configured(args: argparse.Namespace) -> "list[Entry]":
    """The evaluators asked for with their settings; what they need is there."""
    from eval import base

    wanted = dict.fromkeys(name for text in args.evaluators for name in text.split(",") if name)
    entries = base.configure([base.load(name) for name in wanted], args.settings)
    for number, entry in enumerate(entries):
        if entry.make.needs_train and not args.train:
            raise UsageError(f"{entry.name} learns from labelled images: give them with --train PATH…")
        if args.templates is not None and "templates" in base.keys(entry.config):
            entries[number] = replace(entry, config=replace(entry.config, templates=args.templates))  # type: ignore[call-arg]
    if args.templates is not None and not any("templates" in base.keys(entry.config) for entry in entries):
        raise UsageError(f"--templates belongs to zeroshot, which is not among {', '.join(wanted)}")
    return entries


def pick_device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try auto") from None
    return device


def describe(encode: "Encoder", data: "Data", device: "torch.device") -> None:
    """What is about to be evaluated, and what was checked."""
    assert encode.release is not None
    log.info(
        "encoder: %s, weights sha256 %s, on %s",
        " -> ".join(encode.release.lineage),
        encode.sha256[:12],
        device,
    )
    for dataset in (data.train, data.test):
        if dataset is not None:
            left = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dataset.left_out.items()))
            log.info("%s data: %s pictures%s", dataset.name, f"{len(dataset):,}", f"; left out: {left}" if left else "")
    classes = len(data.classes)
    log.info("classes: %d from %s; chance top-1 is %.2f %%", classes, data.classes.source, 100 / classes)


def keep(
    entry: "Entry",
    evaluator: "Evaluator",
    encode: "Encoder",
    data: "Data",
    contamination: dict[str, Any],
    output: Path,
    args: argparse.Namespace,
) -> "list[Score]":
    """Run one evaluator; every score is in the results file as soon as it is known."""
    from data_pipeline.files import write_bytes
    from eval.base import File
    from eval.results import append

    config = common_config(entry, encode, data, args)
    scores: list[Score] = []
    for item in evaluator.run(encode):
        if isinstance(item, File):
            write_bytes(output.parent / item.name, item.text.encode())
            continue
        result = as_result(entry, item, config, encode, data, args)
        append(output, [replace(result, contamination=contamination)])
        scores.append(item)
    return scores


def common_config(entry: "Entry", encode: "Encoder", data: "Data", args: argparse.Namespace) -> dict[str, Any]:
    """All that the scores of one evaluator share: enough to make them again."""
    from maws.config import to_json

    sets = {name: dataset for name, dataset in (("train", data.train), ("data", data.test)) if dataset is not None}
    return {
        entry.name: to_json(entry.config),
        "chance": 1 / len(data.classes),
        "num_classes": len(data.classes),
        "paths": {
            "train": [str(path) for path in args.train],
            "train_labels": str(args.train_labels) if args.train_labels else None,
            "data": [str(path) for path in args.data],
            "classes": str(args.classes) if args.classes else None,
        },
        "images": {name: len(dataset) for name, dataset in sets.items()},
        "left_out": {name: dataset.left_out for name, dataset in sets.items()},
        "precision": "fp32",
        "preprocess": to_json(encode.preprocess),
        "device": str(encode.device),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }


def as_result(
    entry: "Entry", score: "Score", config: dict[str, Any], encode: "Encoder", data: "Data", args: argparse.Namespace
) -> "Result":
    from eval.results import Result

    hashes = {"weights": encode.sha256, "data": data.test.sha256, "classes": data.classes.sha256}
    if data.train is not None and entry.make.needs_train:
        hashes["train"] = data.train.sha256
    assert encode.release is not None
    return Result(
        run=os.path.normpath(args.run),
        evaluator=entry.name,
        metric=score.metric,
        value=score.value,
        n=score.n,
        seed=args.seed if score.seed is None else score.seed,
        config=config | ({"chosen": dict(score.chosen)} if score.chosen else {}),
        hashes=hashes | dict(score.hashes),
        lineage=list(encode.release.lineage),
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(table: "list[tuple[str, Score]]", classes: int) -> None:
    """One line per metric; several seeds as mean and standard deviation."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for name, score in table:
        groups.setdefault((name, score.metric), []).append(score)
    print(f"\n{'evaluator':<10} {'metric':<20} {'%':>6} {'sd':>5} {'seeds':>5} {'n':>7}")
    for (name, metric), scores in groups.items():
        values = [100 * score.value for score in scores]
        mean = sum(values) / len(values)
        spread = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
        deviation = "" if spread is None else f"{spread:.1f}"
        print(f"{name:<10} {metric:<20} {mean:6.1f} {deviation:>5} {len(values):>5} {scores[0].n:>7,}")
    print(f"{'chance':<10} {'top1':<20} {100 / classes:6.2f}")


if __name__ == "__main__":
    leave(main())
