r"""python -m eval transfer: one backbone on several data sets, each with a grid over learning rate and weight decay.

    python -m eval transfer --init-from RUN --output runs/transfer \
        --train inat2018=/data/inat18 cub200=/data/cub --data inat2018=/data/inat18 cub200=/data/cub
    python -m eval transfer --method linear --init-from RUN --output FOLDER \
        --train TRAIN --data EVALUATION --classes FILE

A set is a pair: the first --train with the first --data, and so on. The point of the grid is chosen on a held-out part
of the training data, never on the evaluation data; the best on the evaluation data, which the papers report, stands
beside it under that name. `--method finetune` runs `maws/train.py --stage finetune` and `python -m eval finetune` for
every point; `--method linear` trains a linear head on cached features. Started again, it skips what is done.
FOLDER/transfer.json has everything; FOLDER/results.jsonl a line per score.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UsageError
from eval import transfers
from eval.chain import alone, say
from eval.transfers import Done, Grid, Outcome
from maws.config import nearest

if TYPE_CHECKING:  # torch takes seconds to import: a wrong flag is told at once
    from eval.datasets import Data
    from eval.encoder import Encoder
    from maws.release import Release


@dataclass(frozen=True)
class Pair:
    """One data set of a call."""

    name: str
    train: str
    test: str
    classes: str
    train_labels: str


def main(argv: Sequence[str], make_parser: Callable[..., argparse.ArgumentParser] = argparse.ArgumentParser) -> int:
    args = parser(make_parser).parse_args(argv)
    grid, pairs = configured(args.settings), pairs_of(args)
    say(describe(args, grid, pairs))
    with alone(args.output, "transfer"):
        if args.method == "finetune":
            from eval.transfer_finetune import finetune

            return finetune(args, grid, pairs)
        return linear(args, grid, pairs)


def parser(make: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    p = make(prog="python -m eval transfer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--init-from", type=Path, required=True, metavar="RUN", help="run folder or release folder")
    p.add_argument("--train", nargs="+", required=True, metavar="REF|PATH", help="training data, one for each set")
    p.add_argument("--data", nargs="+", required=True, metavar="REF|PATH", help="evaluation data, one for each set")
    p.add_argument("--classes", nargs="+", default=[], help="one for each set; published sets know theirs")
    p.add_argument("--train-labels", nargs="+", default=[], metavar="FILE", help="Parquet of key, label; one a set")
    p.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    p.add_argument("--method", default="finetune", choices=transfers.METHODS)
    p.add_argument("--preset", default="vit_b16", help="of the stage finetune: a size of the backbone, demo, debug")
    p.add_argument("--set", dest="settings", nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    p.add_argument("--train-set", nargs="+", action="extend", default=[], metavar="group.name=value",
                   help="method finetune: settings of maws/train.py")  # fmt: skip
    p.add_argument("--device", default="auto", help="method linear: auto, cpu, cuda, …")
    return p


def configured(settings: Sequence[str]) -> Grid:
    """A grid with its settings changed."""
    values: dict[str, Any] = {}
    kinds = {item.name: item.default for item in dataclasses.fields(Grid)}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in kinds:
            raise UsageError(f"--set {setting}: expected name=value; {nearest(name, list(kinds))}")
        default = kinds[name]
        kind = type(default[0]) if isinstance(default, tuple) else type(default)
        try:
            if kind is bool:
                values[name] = {"true": True, "yes": True, "false": False, "no": False}[text.lower()]
            else:
                parts = [kind(part) for part in text.split(",") if part.strip()]
                values[name] = tuple(parts) if isinstance(default, tuple) else kind(text)
        except (ValueError, KeyError):
            raise UsageError(f"--set {setting}: {text!r} is not a {kind.__name__}") from None
    return Grid(**values)


def pairs_of(args: argparse.Namespace) -> list[Pair]:
    """The sets, in the order they were given. Raises UsageError where lists do not go together."""
    count = len(args.train)
    if len(args.data) != count:
        raise UsageError(f"--train names {count} sets and --data {len(args.data)}: give one of each for every set")
    several = {"--classes": args.classes, "--train-labels": args.train_labels}
    for flag, given in several.items():
        if len(given) not in (0, 1, count) or (len(given) == 1 < count and flag == "--train-labels"):
            raise UsageError(f"{flag} has {len(given)} values for {count} sets: give one for each")
    pairs = []
    for place in range(count):
        train, test = args.train[place], args.data[place]
        names = [_name(train), _name(test)]
        if "=" in train and "=" in test and names[0] != names[1]:
            raise UsageError(
                f"set {place + 1} is trained on {names[0]} and evaluated on {names[1]}: give them in order"
            )
        classes = args.classes[place if len(args.classes) > 1 else 0] if args.classes else ""
        labels = args.train_labels[place] if args.train_labels else ""
        pairs.append(Pair(names[1], train, test, classes, labels))
    if len({pair.name for pair in pairs}) != len(pairs):  # cub/test and cars/test
        pairs = [dataclasses.replace(pair, name=_name(pair.test, parent=True)) for pair in pairs]
    if len({pair.name for pair in pairs}) != len(pairs):
        raise UsageError(
            f"sets need names of their own, from their files and folders: {', '.join(pair.name for pair in pairs)}; "
            f"rename one, or give them to calls of their own"
        )
    return pairs


def _name(reference: str, parent: bool = False) -> str:
    """`inat2018` of inat2018:val=/data/inat; of a plain path its name, with that of its parent."""
    name, equals, _ = reference.partition("=")
    if equals and not Path(reference).exists():
        return name.partition(":")[0]
    path = Path(reference).resolve()  # `.` and `..` have no name
    return f"{path.parent.name}_{path.stem}" if parent else path.stem


def describe(args: argparse.Namespace, grid: Grid, pairs: Sequence[Pair]) -> str:
    each, names = len(grid.points) * len(grid.seeds), ", ".join(pair.name for pair in pairs)
    factors = f"{len(grid.lr)} lr x {len(grid.weight_decay)} weight decay x {len(grid.seeds)} seeds"
    return (
        f"transfer of {args.init_from} to {names} by {args.method}: {factors} = {each} trainings of {grid.epochs:g} "
        f"epochs for each set; the point is chosen on {100 * grid.held_out:g} % of the training pictures"
    )


# -------------------------------------------------------------------------------------------------------------- linear


def linear(args: argparse.Namespace, grid: Grid, pairs: Sequence[Pair]) -> int:
    """The grid on cached features, set after set; every finished point is kept."""
    from eval.features import open_encoder, pick_device
    from maws.config import to_json

    encode = open_encoder(args.init_from, pick_device(args.device))
    outcomes = []
    for pair in pairs:
        data = open_pair(pair)
        outcome = linear_grid(encode, data, pair, grid, args.output / pair.name)
        outcomes.append(outcome)
        how = {"precision": encode.precision, "preprocess": to_json(encode.preprocess)}
        assert encode.release is not None
        keep(args, outcome, pair, data, encode.release, grid, how)
    return tell(args, grid, outcomes)


def open_pair(pair: Pair) -> "Data":
    from eval.classes import read_classes
    from eval.datasets import open_data

    classes = read_classes(pair.classes) if pair.classes else None
    labels = Path(pair.train_labels) if pair.train_labels else None
    return open_data([Path(pair.test)], [Path(pair.train)], classes, labels)


def linear_grid(encode: "Encoder", data: "Data", pair: Pair, grid: Grid, folder: Path) -> Outcome:
    import torch

    from eval.features import extract
    from eval.transfer_linear import fit, point, top1

    assert data.train is not None
    train, test = extract(encode, data.train), extract(encode, data.test)
    held = torch.from_numpy(transfers.hold_out(train.labels.cpu().numpy(), grid)).to(train.labels.device)
    classes = len(data.classes)
    done = Done(folder / "points.jsonl", identity(encode.sha256, data, grid))
    there = done.points()
    ours, theirs = (train.features, train.labels), (test.features, test.labels)
    points = []
    for seed in grid.seeds:
        for lr, decay in grid.points:
            found = there.get((lr, decay, seed))
            if found is None:
                found = point(ours, held, theirs, classes, lr, decay, grid, seed)
                done.add(found)
            points.append(found)
            say(f"  {pair.name} lr={lr:g} wd={decay:g} seed {seed}: {100 * found.held_out:.1f} % of the held-out part")
    outcome = Outcome(pair.name, "linear", len(test), int(held.sum()), classes, tuple(points))
    if not grid.refit:
        return outcome
    heads = {seed: fit(*ours, classes, *outcome.chosen, grid, seed) for seed in grid.seeds}
    return dataclasses.replace(outcome, refits=tuple((seed, top1(head, *theirs)) for seed, head in heads.items()))


def identity(weights: str, data: "Data", grid: Grid) -> str:
    """Of what a point depends on beside its own lr, weight decay and seed."""
    assert data.train is not None
    what = [weights, data.train.sha256, data.test.sha256, data.classes.sha256]
    what += [grid.epochs, grid.batch, grid.held_out, grid.most_held_out]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------------------------------------- result


def keep(
    args: argparse.Namespace, outcome: Outcome, pair: Pair, data: "Data", release: "Release", grid: Grid,
    how: dict[str, Any],
) -> None:  # fmt: skip
    """The lines of a set in results.jsonl. `how`: precision and preprocessing of the evaluation; how it was trained."""
    from eval import contamination, record
    from eval.features import home

    assert data.train is not None
    training = {name: how[name] for name in ("preset", "settings") if name in how}
    common = {
        "run": str(args.init_from),
        "hashes": {"weights": release.sha256, "train": data.train.sha256, **data.hashes},
        "lineage": list(release.lineage),
        "time": record.now(),
        "contamination": contamination.look_up(home(release), data.test),
    }
    config = {
        "transfer": {"grid": dataclasses.asdict(grid), "method": outcome.method, **training},
        **data.facts,
        "paths": {"train": [pair.train], "data": [pair.test], "classes": pair.classes or None},
        "images": {name: len(one) for name, one in data.sets.items()},
        "precision": how["precision"],
        "preprocess": how["preprocess"],
        "versions": record.versions(),
    }
    transfers.write_results(args.output / "results.jsonl", outcome, common, config)


def tell(args: argparse.Namespace, grid: Grid, outcomes: Sequence[Outcome]) -> int:
    """The table, and everything as transfer.json."""
    settings = {"init_from": str(args.init_from), "method": args.method, "grid": dataclasses.asdict(grid)}
    transfers.write_summary(args.output / "transfer.json", outcomes, settings)
    say("", *transfers.table(outcomes), f"everything: {args.output / 'transfer.json'}")
    return 0
