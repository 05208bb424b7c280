"""Evaluate a run, or make the report.

    python -m eval linear knn lowshot --run runs/demo/mae_wsp --train demo/emoji \\
        --data demo/emoji/eval-emojione.parquet --classes demo/emoji/classes.json
    python -m eval zeroshot --run runs/demo/lit \\
        --data demo/emoji/eval-emojione.parquet --classes demo/emoji/classes.json
    python -m eval zeroshot --run RUN --data imagenet/val --classes imagenet1k --language it
    python -m eval classes imagenet1k
    python -m eval retrieval --run runs/demo/lit --captions dataset_coco.json --images coco/
    python -m eval classify photo.jpg --run runs/demo/lit --classes "dog, cat, piano"
    python -m eval prepare imagenet1k --source /data/imagenet
    python -m eval robustness --run RUN --data imagenet-v2=/data/imagenetv2 imagenet-r=/data/imagenet-r
    python -m eval report runs/demo --output report.html

Several evaluators share one process and one extraction of features. Scores are appended to RUN/results.jsonl.
"""

import argparse
import ast
import importlib
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from data_pipeline.ending import leave, told
from data_pipeline.errors import DataError, UsageError

if TYPE_CHECKING:  # torch and the models take seconds to import: a wrong flag is told at once
    import torch

    from eval.base import Entry, Evaluated, Score
    from eval.classes import Classes
    from eval.features import Encoder

log = logging.getLogger("eval")

WITH_TEXT = ("lit",)  # stages whose release has a text tower
# Not evaluators: a module of eval/ each, with main(argv, Parser) -> exit code.
COMMANDS = ("report", "classes", "classify", "prepare", "shards", "compare", "transfer")
MODULES = {"classes": "listing", "shards": "write_shards"}  # where the name is taken


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def parser() -> Parser:
    found = {file.stem: file for file in sorted((Path(__file__).parent / "evaluators").glob("[a-z]*.py"))}
    epilog = "\n".join(["evaluators:", *(f"  {name:<12} {purpose(file)}" for name, file in found.items())])
    form = argparse.RawDescriptionHelpFormatter
    p = Parser("python -m eval", description=__doc__, epilog=epilog, formatter_class=form)
    p.allow_abbrev = False
    p.add_argument(
        "evaluators",
        nargs="+",
        metavar="EVALUATOR",
        help=f"{', '.join(found)}; or one of {', '.join(COMMANDS)} (each has a --help)",
    )
    p.add_argument("--run", type=Path, required=True, help="run folder or release folder")
    p.add_argument(
        "--data", type=Path, nargs="+", default=[], metavar="PATH", help="evaluation data: PATH, or SET=PATH"
    )
    p.add_argument("--train", type=Path, nargs="+", default=[], metavar="PATH", help="of the probes, alike")
    p.add_argument("--train-labels", type=Path, metavar="FILE", help="Parquet of key, label for --train")
    p.add_argument("--classes", metavar="NAME|FILE", help="a bundled class set (`python -m eval classes`) or a file")
    p.add_argument("--language", metavar="LANGUAGE", help="class names and templates in it, such as fr")
    p.add_argument("--templates", metavar="NAME|FILE", help="zero-shot prompts; default: those of the classes")
    p.add_argument(
        "--captions", type=Path, metavar="FILE", help="retrieval: COCO, Karpathy, Flickr, Parquet, shard set"
    )
    p.add_argument("--images", type=Path, metavar="FOLDER", help="retrieval: the pictures that --captions names")
    p.add_argument("--split", metavar="NAME", help="retrieval: a split of --captions, or a file of picture names")
    p.add_argument("--results", type=Path, metavar="FILE", help="default: RUN/results.jsonl")
    p.add_argument("--seed", type=int, default=0, help="of splits, views and probes; default: 0")
    p.add_argument(
        "--set", dest="settings", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="a setting of an evaluator, such as knn.k=1,5; a wrong name is answered with the nearest",
    )  # fmt: skip
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …; a rank of several takes its own GPU")
    p.add_argument("--precision", default="fp32", help="of the image tower: fp32 or bf16 (autocast); default: fp32")
    p.add_argument("--image-size", type=int, metavar="PIXELS", help="another than the run's: positions interpolated")
    p.add_argument("--batch", type=int, metavar="PICTURES", help="of one forward on one device; default: 128")
    p.add_argument("--partition", default="auto", help="split the towers over the ranks: auto, none or zero3")
    return p


def purpose(file: Path) -> str:
    """The first line of a module's docstring, read without importing it."""
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return said.partition("\n")[0].removeprefix(f"Evaluator {file.stem}: ").rstrip(".")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    interrupted = "interrupted; scores that are already in the results file stay"
    return told(lambda: _on_ranks(arguments, interrupted), interrupted)


def _on_ranks(arguments: list[str], interrupted: str) -> int:
    """As the only process, or as one of several that a launcher started (eval/distributed.py)."""
    from maws import launchers

    if arguments and re.match(r"--local[-_]rank=", arguments[0]):  # the deepspeed launcher puts it there
        arguments = arguments[1:]
    if launchers.started_alone():
        return _run(arguments)
    from eval.distributed import as_one

    return as_one(lambda: _run_ranks(arguments), interrupted)


def _run_ranks(arguments: list[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        raise UsageError(f"`python -m eval {arguments[0]}` is one process; start it without a launcher")
    return _run(arguments)


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        return int(
            importlib.import_module(f"eval.{MODULES.get(arguments[0], arguments[0])}").main(arguments[1:], Parser)
        )
    return evaluate(parser().parse_args(arguments))


def evaluate(args: argparse.Namespace) -> int:
    listed = asked_classes(args)  # before torch is imported
    from eval import contamination, distributed, record
    from eval.features import home, open_encoder, pick_device
    from maws import launchers

    entries = configured(args)
    kinds = {entry.data for entry in entries}
    device = pick_device(args.device) if launchers.started_alone() else distributed.start(args.device)
    check_flags(args, kinds)
    encode = open_encoder(args.run, device, args.image_size, args.precision, args.batch, args.partition)
    release = encode.release
    assert release is not None
    if blind := [entry.name for entry in entries if entry.make.needs_text and release.stage not in WITH_TEXT]:
        raise UsageError(
            f"{', '.join(blind)} needs a text tower, and {args.run} is a {' -> '.join(release.lineage)} run; "
            f"stages with a text tower: {', '.join(WITH_TEXT)} (maws/train.py --stage lit --init-from {args.run})"
        )
    data = open_sets(args, listed, kinds)
    distributed.same_everywhere(hashes_of(encode, data.values()))
    describe(encode, data.values(), device)
    output = args.results or home(release) / "results.jsonl"
    # Files are read before any work.
    evaluators = [entry.make(entry.config, cast(Any, data[entry.data]), args.seed) for entry in entries]
    found = {kind: looked_up(home(release), one) for kind, one in data.items()}
    table: list[tuple[str, Score]] = []
    for entry, evaluator in zip(entries, evaluators, strict=True):
        mine = data[entry.data], found[entry.data]
        table += [(entry.name, score) for score in record.keep(entry, evaluator, encode, *mine, output, args)]
    show(table, data["labelled"].facts["chance"] if "labelled" in data else None)
    for sentence in contamination.by_set((name, one) for sets in found.values() for name, one in sets.items()):
        print(sentence)
    print(f"results: {output}")
    return 0


def asked_classes(args: argparse.Namespace) -> "Classes | None":
    """Those of --classes in their --language; a misspelt name, or templates that cannot be read, are told here."""
    from eval.classes import read_classes
    from eval.templates import AUTO, read_templates

    if args.language and not args.classes:
        raise UsageError("--language translates class names: say which with --classes")
    if args.templates not in (None, AUTO):
        read_templates(args.templates)
    return read_classes(args.classes, args.language) if args.classes else None


def check_flags(args: argparse.Namespace, kinds: set[str]) -> None:
    """What is told before weights and data are read, which may take minutes."""
    if kinds - {"captioned"} and not args.data:
        raise UsageError("the following arguments are required: --data; see `python -m eval --help`")
    if "captioned" in kinds and args.captions is None:
        raise UsageError("retrieval needs pictures with captions: give them with --captions FILE and --images FOLDER")
    if "captioned" not in kinds and (args.captions or args.images or args.split):
        raise UsageError("--captions, --images and --split belong to retrieval, which is not among the evaluators")
    for flag in ("data", "train"):
        for path in getattr(args, flag):
            if not path.exists() and not {"=", "{"} & set(str(path)):  # a published set, several files
                raise DataError(f"--{flag} {path}: no such file or folder")


def open_sets(args: argparse.Namespace, listed: "Classes | None", kinds: set[str]) -> "dict[str, Evaluated]":
    """The pictures that the evaluators are about, by what comes with them: labels or captions."""
    from eval.captions import open_captions
    from eval.datasets import open_data

    data: dict[str, Evaluated] = {}
    if "labelled" in kinds:
        data["labelled"] = open_data(args.data, args.train, listed, args.train_labels)
    if "captioned" in kinds:
        data["captioned"] = open_captions(args.captions, args.images, args.split)
    if "pictures" in kinds:
        from eval.pictures import open_pictures

        data["pictures"] = open_pictures(args.data)
    if "published" in kinds:
        from eval.published.sets import open_published

        data["published"] = open_published(args.data)
    return data


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


def describe(encode: "Encoder", data: "Iterable[Evaluated]", device: "torch.device") -> None:
    """What is about to be evaluated, and what was checked."""
    assert encode.release is not None
    log.info(
        "encoder: %s, weights sha256 %s, on %s%s",
        " -> ".join(encode.release.lineage),
        encode.sha256[:12],
        device,
        encode.manner,
    )
    for one in data:
        for dataset in one.sets.values():
            left = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dataset.left_out.items()))
            log.info("%s data: %s pictures%s", dataset.name, f"{len(dataset):,}", f"; left out: {left}" if left else "")
        log.info("%s", one.summary())


def looked_up(run: Path, data: "Evaluated") -> dict[str, dict[str, Any]]:
    """What is known of copies in the training data, for each set that is evaluated on."""
    from eval import contamination

    return {name: contamination.look_up(run, dataset) for name, dataset in data.sets.items() if name != "train"}


def hashes_of(encode: "Encoder", data: "Iterable[Evaluated]") -> dict[str, str]:
    """What all ranks must agree on."""
    sets = {f"{name} data": dataset.sha256 for one in data for name, dataset in one.sets.items()}
    return {"weights": encode.sha256, **sets}


def show(table: "list[tuple[str, Score]]", chance: float | None) -> None:
    """One line per metric, in % or in its own unit; several seeds as mean and standard deviation."""
    from eval.report_tasks import SHARE, unit

    groups: dict[tuple[str, str], list[Score]] = {}
    for name, score in table:
        label = score.metric if score.dataset == "data" else f"{score.dataset} {score.metric}"  # one of several sets
        groups.setdefault((name, label), []).append(score)
    width = max([20, *(len(metric) for _, metric in groups)])
    print(f"\n{'evaluator':<10} {'metric':<{width}} {'%':>6} {'sd':>5} {'seeds':>5} {'n':>7}")
    for (name, metric), scores in groups.items():
        values = [score.value * (100 if unit(scores[0].metric) == SHARE else 1) for score in scores]
        mean = sum(values) / len(values)
        spread = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
        deviation = "" if spread is None else f"{spread:.1f}"
        other = "" if unit(scores[0].metric) == SHARE else f"  {unit(scores[0].metric)}"
        print(f"{name:<10} {metric:<{width}} {mean:6.1f} {deviation:>5} {len(values):>5} {scores[0].n:>7,}{other}")
    if chance is not None:
        print(f"{'chance':<10} {'top1':<{width}} {100 * chance:6.2f}")


if __name__ == "__main__":
    leave(main())
