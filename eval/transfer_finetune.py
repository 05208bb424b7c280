"""A transfer's grid by finetuning: one `maws/train.py --stage finetune` and two `python -m eval finetune` a point.

FOLDER/SET/fit/                        the training data without what is held out, as a shard set
FOLDER/SET/held_out.parquet            what is held out; classes.json beside it
FOLDER/SET/lr0.001_wd0.05_s0/          a run: results.jsonl on the evaluation data, held_out.jsonl on the other
FOLDER/SET/all/, refit_lr…_wd…_s0/     all training data, and the training with the chosen point on it
"""

import argparse
import dataclasses
import glob
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError, UsageError
from data_pipeline.files import write_bytes
from eval import transfers
from eval.chain import run_chain, say
from eval.comparison.chain import WEIGHTS, launcher, train_py
from eval.processes import count_gpus
from eval.results import Result, read
from eval.steps import Step, evaluators_in
from eval.transfer import Pair, keep, open_pair, tell
from eval.transfers import Grid, Outcome, Point

if TYPE_CHECKING:
    from eval.datasets import Data, Dataset
    from maws.release import Release

TOP1, HELD_OUT, SPLIT = "top1", "held_out.jsonl", "split.json"
OF_THE_GRID = ("optim.lr", "optim.weight_decay", "optim.length", "data.shards")
ROWS = 256  # pictures of a Parquet row group


@dataclass(frozen=True)
class Prepared:
    """A set whose training data is split."""

    pair: Pair
    folder: Path
    images: int
    held_out: int
    classes: int


def finetune(args: argparse.Namespace, grid: Grid, pairs: Sequence[Pair]) -> int:
    """Split, train the grid, train once more with what was chosen, and tell."""
    release = check(args)
    gpus = count_gpus()
    start = launcher(gpus)
    prepared = [split(pair, grid, args.output) for pair in pairs]
    outcomes: list[Outcome] = []

    def chosen() -> None:
        outcomes.extend(outcome_of(one, grid) for one in prepared)

    steps = [step for one in prepared for step in grid_steps(one, grid, args, start)]
    code = run_chain(steps, args.output, chosen, gpus)
    if code or not grid.refit:
        return code or finish(args, grid, prepared, outcomes, release)
    both = list(zip(prepared, outcomes, strict=True))
    for one in prepared:
        write_all(one)
    again = [step for one, outcome in both for step in refit_steps(one, outcome, grid, args, start)]
    code = run_chain(again, args.output, lambda: None, gpus)
    again = [refitted(one, outcome, grid) for one, outcome in both]
    return code or finish(args, grid, prepared, again, release)


def check(args: argparse.Namespace) -> "Release":
    """The backbone, once all that every training will be asked for is known to be there. Raises UserError."""
    from maws import stages
    from maws.config import override
    from maws.release import open_release

    override(stages.preset("finetune", args.preset), args.train_set)
    if own := [text for text in args.train_set if text.partition("=")[0] in OF_THE_GRID]:
        raise UsageError(f"--train-set {own[0]}: the grid sets this itself; use --set lr, weight_decay or epochs")
    return open_release(args.init_from)


def finish(
    args: argparse.Namespace, grid: Grid, prepared: Sequence[Prepared], outcomes: Sequence[Outcome], release: "Release"
) -> int:
    for one, outcome in zip(prepared, outcomes, strict=True):
        point, seed = outcome.chosen, grid.seeds[0]
        evaluated = line_of(refit_of(one, *point, seed) if grid.refit else run_of(one, *point, seed)).config
        how = {name: evaluated.get(name) for name in ("precision", "preprocess")}
        how["preset"], how["settings"] = args.preset, list(args.train_set)
        keep(args, outcome, one.pair, open_pair(one.pair), release, grid, how)
    return tell(args, grid, outcomes)


# --------------------------------------------------------------------------------------------------------------- split


def split(pair: Pair, grid: Grid, output: Path) -> Prepared:
    """Write the two parts of the training data, once: the mark says which data and which split they are of."""
    from eval.write_shards import write

    data, folder = open_pair(pair), output / pair.name
    assert data.train is not None
    held = transfers.hold_out(data.train.labels, grid)
    found = Prepared(pair, folder, len(data.test), int(held.sum()), len(data.classes))
    what = [data.train.sha256, data.classes.sha256, hashlib.sha256(held.tobytes()).hexdigest()]
    mark = folder / SPLIT
    if mark.is_file() and json.loads(mark.read_text()) == what:
        return found
    if mark.is_file():
        raise DataError(
            f"{folder} holds a grid on other training data or another held-out part; give another --output, or remove "
            f"that folder"
        )
    say(f"{pair.name}: {int((~held).sum()):,} training pictures, {int(held.sum()):,} held out")
    shutil.rmtree(folder / "fit", ignore_errors=True)  # of a call that was killed before it could mark it
    write(part(data.train, ~held), data.classes, folder / "fit", [pair.train])
    write_parquet(part(data.train, held), folder / "held_out.parquet")
    write_classes(data, folder / "classes.json")
    write_bytes(mark, json.dumps(what).encode())
    return found


def write_all(one: Prepared) -> None:
    """All training pictures as a shard set, for the training with the chosen point."""
    from eval.write_shards import write

    if not (one.folder / "all" / "manifest.json").is_file():
        data = open_pair(one.pair)
        assert data.train is not None
        shutil.rmtree(one.folder / "all", ignore_errors=True)
        write(data.train, data.classes, one.folder / "all", [one.pair.train])


def part(dataset: "Dataset", chosen: np.ndarray) -> "Dataset":
    """The rows where `chosen` is true, as a data set of its own."""
    return dataset.part(np.flatnonzero(chosen).tolist(), published=None)


def write_parquet(dataset: "Dataset", path: Path) -> None:
    """key, image, label: pictures as they are."""
    schema = pa.schema([("key", pa.string()), ("image", pa.large_binary()), ("label", pa.int64())])
    temporary = path.with_suffix(".tmp")
    with pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(dataset), ROWS):
            rows = range(start, min(start + ROWS, len(dataset)))
            images = [dataset.read(row) for row in rows]
            columns = [[dataset.keys[row] for row in rows], images, dataset.labels[start : start + ROWS]]
            writer.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema))
    temporary.replace(path)


def write_classes(data: "Data", path: Path) -> None:
    """The classes of the set, for the evaluation of a part that may lack some."""
    classes = data.classes
    entries = [
        {"label": label, "names": list(names)} | ({"synset": synset} if synset else {})
        for label, (names, synset) in enumerate(zip(classes.names, classes.synsets, strict=True))
    ]
    write_bytes(path, json.dumps(entries).encode())


# ---------------------------------------------------------------------------------------------------------------- steps


def grid_steps(one: Prepared, grid: Grid, args: argparse.Namespace, start: Sequence[str]) -> list[Step]:
    steps = []
    for seed in grid.seeds:
        for lr, decay in grid.points:
            run = run_of(one, lr, decay, seed)
            steps += [
                train_step(run, f"{one.folder}/fit", lr, decay, seed, grid, args, start),
                eval_step(run, f"{one.folder}/held_out.parquet", f"{one.folder}/classes.json", HELD_OUT),
                eval_step(run, one.pair.test, classes_of(one), "results.jsonl"),
            ]
    return steps


def refit_steps(
    one: Prepared, outcome: Outcome, grid: Grid, args: argparse.Namespace, start: Sequence[str]
) -> list[Step]:
    lr, decay = outcome.chosen
    steps = []
    for seed in grid.seeds:
        run = refit_of(one, lr, decay, seed)
        steps.append(train_step(run, f"{one.folder}/all", lr, decay, seed, grid, args, start))
        steps.append(eval_step(run, one.pair.test, classes_of(one), "results.jsonl"))
    return steps


def run_of(one: Prepared, lr: float, decay: float, seed: int) -> str:
    return f"{one.folder}/lr{lr:g}_wd{decay:g}_s{seed}"


def refit_of(one: Prepared, lr: float, decay: float, seed: int) -> str:
    return f"{one.folder}/refit_lr{lr:g}_wd{decay:g}_s{seed}"


def classes_of(one: Prepared) -> str:
    """For --classes: what was given; a published set knows its own; else those of the training data."""
    return one.pair.classes or ("" if "=" in one.pair.test else f"{one.folder}/classes.json")


def train_step(
    run: str, shards: str, lr: float, decay: float, seed: int, grid: Grid, args: argparse.Namespace,
    start: Sequence[str],
) -> Step:  # fmt: skip
    command = [*start, train_py(), "--stage", "finetune", "--preset", args.preset, "--init-from", str(args.init_from)]
    command += ["--run", run, "--seed", str(seed), "--resume", "auto", f"data.shards={shards}", f"optim.lr={lr:g}"]
    command += [f"optim.weight_decay={decay:g}", f"optim.length={grid.epochs:g} epochs", *args.train_set]
    name = f"{Path(run).parent.name}-{Path(run).name}"
    inputs = (f"{shards}/manifest.json", *weights_of(args.init_from))
    return Step(name, tuple(command), inputs, (f"{run}/{WEIGHTS}",), code=(), side_by_side=start[0] == "python")


def weights_of(init_from: Path) -> list[str]:
    """Patterns of the files of a backbone: of a run, of a release folder, or the one file that is meant."""
    if init_from.is_file():
        return [str(init_from)]
    return [f"{glob.escape(str(folder))}/model*.safetensors" for folder in (init_from / "release", init_from)]


def eval_step(run: str, data: str, classes: str, results: str) -> Step:
    command = ["python", "-m", "eval", "finetune", "--run", run, "--data", data]
    command += ["--classes", classes] if classes else []
    command += ["--results", f"{run}/{results}"] if results != "results.jsonl" else []
    file = f"{run}/{results}"
    inputs = [f"{run}/{WEIGHTS}", *([data] if Path(data).is_file() else [])]
    return Step(
        f"eval-{Path(run).parent.name}-{Path(run).name}-{Path(results).stem}", tuple(command), tuple(inputs), (file,),
        code=(), side_by_side=True, done=lambda root: "finetune" in evaluators_in(root / file),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- result


def outcome_of(one: Prepared, grid: Grid) -> Outcome:
    points = [
        Point(lr, decay, seed, top1(run_of(one, lr, decay, seed), HELD_OUT), top1(run_of(one, lr, decay, seed)))
        for seed in grid.seeds
        for lr, decay in grid.points
    ]
    return Outcome(one.pair.name, "finetune", one.images, one.held_out, one.classes, tuple(points))


def refitted(one: Prepared, outcome: Outcome, grid: Grid) -> Outcome:
    scores = tuple((seed, top1(refit_of(one, *outcome.chosen, seed))) for seed in grid.seeds)
    return dataclasses.replace(outcome, refits=scores)


def top1(run: str, results: str = "results.jsonl") -> float:
    return line_of(run, results).value


def line_of(run: str, results: str = "results.jsonl") -> Result:
    """The newest top-1 of a results file; an evaluation that was started twice counts once."""
    file = Path(run) / results
    found = [one for one in read(file) if (one.evaluator, one.metric) == ("finetune", TOP1)]
    if not found:
        raise DataError(f"{file} has no top-1; remove it, and the same command evaluates {run} again")
    return found[-1]
