"""Were the evaluation pictures in the training data? What the shard sets behind a run know of it.

A shard set that was built with --exclude-eval lists the pictures of these sets with their copies in its training data
(evaluation.parquet). Here the pictures of an evaluation are looked up in the lists of every shard set that the weights
have seen, the run's own and those of the runs it started from; by their bytes, so that file names and parts of a set do
not matter. No torch.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.files import sha256_file
from data_pipeline.shardset import read_manifest
from eval.datasets import Dataset
from eval.results import Result
from eval.sources.shards import CLASSES

FILE = "evaluation.parquet"
RUNS = 20  # of a lineage; a longer one is a circle


class Unknown(Exception):
    """Why nothing can be said."""


def look_up(run: Path, test: Dataset) -> dict[str, Any]:
    """What goes into every result: `status` is checked, partly checked or not checked."""
    try:
        lists = [(sha256, _read_list(folder, sha256)) for folder, sha256 in _shard_sets(run)]
    except Unknown as why:
        return {"status": "not checked", "why": str(why)}
    contents = [hashlib.sha256(test.read(position)).digest() for position in range(len(test))]  # all pictures are read
    listed = [content for content in contents if all(content in copies for _, copies in lists)]
    if not listed:
        return {"status": "not checked", "why": "the shard set was built with --exclude-eval for other pictures only"}
    kinds = [{kind for _, copies in lists for kind, _ in copies[content]} for content in listed]
    left = [any(action == "reported" for _, copies in lists for _, action in copies[content]) for content in listed]
    return {
        "status": "checked" if len(listed) == len(contents) else "partly checked",
        "pictures": len(contents),
        "checked": len(listed),
        "exact": sum("exact" in found for found in kinds),
        "near": sum(found == {"near"} for found in kinds),
        "left_in_training": sum(left),
        "shards": [sha256 for sha256, _ in lists],
    }


def sentence(found: dict[str, Any]) -> str:
    """For people."""
    if not found:
        return "copies of evaluation pictures in the training data: not checked (the result is older than the check)"
    if found["status"] == "not checked":
        return f"copies of evaluation pictures in the training data: not checked ({found['why']})"
    of = f"{found['checked']:,} of {found['pictures']:,}" if found["status"] != "checked" else f"{found['pictures']:,}"
    copies = found["exact"] + found["near"]
    start = f"copies of evaluation pictures in the training data: {of} pictures were looked for, "
    if not copies:
        return start + "none has one"
    words = f"{copies:,} had one ({found['exact']:,} exact, {found['near']:,} near)"
    if not found["left_in_training"]:
        return f"{start}{words}, which was removed before training"
    return f"{start}{words}; of {found['left_in_training']:,} it was left in: their scores count as training scores"


def by_set(found: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """One line for all sets of which the same is known; where something else is known of another, with their names."""
    names: dict[str, list[str]] = {}
    for name, one in found:
        names.setdefault(sentence(one), []).append(name)
    return [f"{', '.join(own)}: {text}" if len(names) > 1 else text for text, own in names.items()]


def sentences(results: Iterable[Result]) -> list[str]:
    """One line for all runs of which the same is known; a run that several things are known of with its sets."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for result in results:
        sets = found.setdefault(sentence(result.contamination), {}).setdefault(result.run, {})
        sets.update(dict.fromkeys(_sets(result)))
    times = Counter(run for runs in found.values() for run in runs)
    return [f"{', '.join(_named(run, sets, times[run]) for run, sets in runs.items())}: {text}."
            for text, runs in found.items()]  # fmt: skip


def _named(run: str, sets: Iterable[str], times: int) -> str:
    return f"{run} ({', '.join(sets)})" if times > 1 and sets else run


def _sets(result: Result) -> list[str]:
    """What was evaluated on, in short: `imagenet-v2:test`, `eval-emojione.parquet`."""
    paths = result.config.get("paths")
    listed = paths.get("data") if isinstance(paths, dict) else None
    texts = [text for text in listed if isinstance(text, str)] if isinstance(listed, list) else []
    return [text.partition("=")[0] if "=" in text else Path(text).name for text in texts]


# ---------------------------------------------------------------------------------------------------------- shard sets


def _shard_sets(run: Path) -> list[tuple[Path, str]]:
    """Folder and sha256 of the shard sets of a run and of those it started from."""
    found: dict[str, Path] = {}
    for config, folder in _lineage(run):
        data = config.get("data")
        shards, sha256 = data.get("shards") if isinstance(data, dict) else None, config.get("shards_sha256")
        if not isinstance(shards, str) or not isinstance(sha256, str):
            raise Unknown(f"the config of {folder} names no shard set")
        found.setdefault(sha256, _find(shards, folder))
    return [(folder, sha256) for sha256, folder in found.items()]


def _find(shards: str, run: Path) -> Path:
    """As the config names it, or beside the run."""
    for place in (Path(shards), run.parent / Path(shards).name):
        if (place / "manifest.json").is_file():
            return place
    raise Unknown(f"the shard set {shards} is no longer there")


def _lineage(run: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    for _ in range(RUNS):
        weights = any((run / f"model.safetensors{more}").is_file() for more in ("", ".index.json"))
        folder = run if (run / "config.json").is_file() and not weights else run.parent
        try:
            config = json.loads((folder / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            raise Unknown(f"{run} has no run folder that says which shard set it was trained on") from None
        if not isinstance(config, dict):
            raise Unknown(f"{folder / 'config.json'} is damaged")
        yield config, folder
        if not config.get("init_from"):
            return
        run = Path(str(config["init_from"]))
    raise Unknown(f"{run} starts from itself")


def _read_list(folder: Path, sha256: str) -> dict[bytes, list[tuple[str | None, str | None]]]:
    """The pictures that were looked for, with kind and action of each copy."""
    try:
        manifest, found = read_manifest(folder)
    except DataError as error:
        raise Unknown(str(error)) from None
    if found != sha256:
        raise Unknown(f"the shard set {folder} has changed since the run was trained on it")
    if manifest.get("kind") == CLASSES:  # `python -m eval shards` has no --exclude-eval
        raise Unknown(f"the shard set {folder} is a labelled set, in which no evaluation pictures are looked for")
    if FILE not in manifest.get("files", {}):
        raise Unknown(f"the shard set {folder} was built without --exclude-eval")
    path = folder / FILE
    try:
        if sha256_file(path) != manifest["files"][FILE]:
            raise Unknown(f"{path} is damaged: its sha256 is not the one in the manifest")
        table = pq.read_table(path, columns=["content_sha256", "kind", "action"])
    except (OSError, pa.ArrowException) as error:
        raise Unknown(f"cannot read {path}: {error}") from None
    copies: dict[bytes, list[tuple[str | None, str | None]]] = {}
    for content, kind, action in zip(*(column.to_pylist() for column in table.columns), strict=True):
        if content is not None:
            copies.setdefault(content, []).extend([(kind, action)] if kind else [])
    return copies
