"""What a score takes with it into RUN/results.jsonl: all that it depends on, so that it can be made again.

scores = keep(entry, evaluator, encode, data, copies, output, args)     # runs the evaluator; each score is kept at once
"""

import argparse
import datetime
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from data_pipeline.errors import DataError
from data_pipeline.files import write_bytes
from eval import correct, distributed
from eval.base import Entry, Evaluated, Evaluator, File, Score
from eval.encoder import Encoder
from eval.results import Result, append, version
from maws.config import to_json

LIBRARIES: Final = ("torch", "timm", "pyarrow", "pillow", "maws-open")


def keep(
    entry: Entry, evaluator: Evaluator, encode: Encoder, data: Evaluated, copies: Mapping[str, dict[str, Any]],
    output: Path, args: argparse.Namespace,
) -> list[Score]:  # fmt: skip
    """Run one evaluator; every score is in the results file as soon as it is known. `copies` are what is known of
    copies of the pictures in the training data, for each set."""
    config = common_config(entry, encode, data, args)
    scores: list[Score] = []
    for item in evaluator.run(encode):
        scores += [] if isinstance(item, File) else [item]
        if not distributed.is_first():  # all ranks have the same, and rank 0 writes it
            continue
        if isinstance(item, File):
            write(output.parent, item)
            continue
        result = as_result(entry, item, config, encode, data, args)
        result = correct.keep(output.parent, result, item.right) if item.right else result
        append(output, [replace(result, contamination=copies[item.dataset])])
    return scores


def write(folder: Path, file: File) -> None:
    try:
        write_bytes(folder / file.name, file.text.encode())
    except OSError as error:
        raise DataError(f"{error}: give --results in a folder that can be written to") from None


def common_config(entry: Entry, encode: Encoder, data: Evaluated, args: argparse.Namespace) -> dict[str, Any]:
    """All that the scores of one evaluator share."""
    assert encode.release is not None
    return {
        entry.name: to_json(entry.config),
        **data.facts,
        "paths": asked_for(entry, args),
        "language": args.language,
        "images": {name: len(dataset) for name, dataset in data.sets.items()},
        "left_out": {name: dataset.left_out for name, dataset in data.sets.items()},
        "precision": encode.precision,
        "extraction": encode.extraction,
        "model": {"variant": encode.release.config.get("variant"), "image_size": encode.preprocess.image_size},
        "image_size_asked": args.image_size,
        "preprocess": to_json(encode.preprocess),
        "device": str(encode.device),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    return {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def asked_for(entry: Entry, args: argparse.Namespace) -> dict[str, Any]:
    """The paths that were given, as they were written."""
    if entry.data == "captioned":
        paths = {"captions": args.captions, "images": args.images, "split": args.split}
    else:
        paths = {"train": args.train, "train_labels": args.train_labels, "data": args.data, "classes": args.classes}
    return {
        name: [str(one) for one in path] if isinstance(path, list) else str(path) if path else None
        for name, path in paths.items()
    }


def as_result(
    entry: Entry, score: Score, config: dict[str, Any], encode: Encoder, data: Evaluated, args: argparse.Namespace
) -> Result:
    hashes = {"weights": encode.sha256, **data.hashes}
    if score.dataset != "data":  # one of several
        hashes["data"] = data.sets[score.dataset].sha256
        config = config | {"paths": config["paths"] | {"data": [score.dataset]}}
    if "train" in data.sets and entry.make.needs_train:
        hashes["train"] = data.sets["train"].sha256
    assert encode.release is not None
    return Result(
        run=os.path.normpath(args.run),
        evaluator=entry.name,
        metric=score.metric,
        value=score.value,
        n=score.n,
        seed=args.seed if score.seed is None else score.seed,
        config=config | dict(score.facts) | ({"chosen": dict(score.chosen)} if score.chosen else {}),
        hashes=hashes | dict(score.hashes),
        lineage=list(encode.release.lineage),
        time=now(),
    )
