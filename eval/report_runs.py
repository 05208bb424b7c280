"""What a folder of runs holds, for the report: run folders, their curves, their results, the shard set behind them.

    runs/demo/{mae,wsp,…}/config.json, metrics.jsonl, results.jsonl · runs/demo/results.jsonl · runs/demo/shards/

Nothing here fails on a half-written or missing file: the report says what is missing. No torch.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.files import sha256_file
from data_pipeline.shardset import ShardSet
from eval import results as results_file
from eval.report_scores import Entrant, lineage_name
from eval.results import Result

# What may differ between two runs that are repeats of each other.
NOT_RECIPE = {"seed", "order", "run", "init_from", "init_sha256", "features_sha256", "resume"}
NOT_RECIPE |= {"revision", "versions", "lineage", "world_size", "ds_config"}


@dataclass(frozen=True)
class Run:
    """A run folder as far as it got."""

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]] = field(repr=False)
    weights_sha256: str | None  # of its release, one file or several; None while the run is not done

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def stage(self) -> str:
        return str(self.config.get("stage", "?"))

    @property
    def lineage(self) -> tuple[str, ...]:
        return tuple(map(str, self.config.get("lineage") or [self.stage]))

    @property
    def title(self) -> str:
        return lineage_name(self.lineage)

    @property
    def seed(self) -> int:
        seed = self.config.get("seed", 0)
        return seed if isinstance(seed, int) else 0

    @property
    def steps(self) -> int:
        return max((int(line["step"]) for line in self.metrics), default=0)

    @property
    def is_done(self) -> bool:
        return self.weights_sha256 is not None

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, in order; a step logged twice (after a resume) counts once, the later one."""
        points = {int(line["step"]): float(line[name]) for line in self.metrics if _is_number(line.get(name))}
        steps = sorted(points)
        return steps, [points[step] for step in steps]

    def last(self, name: str) -> float | None:
        return self.series(name)[1][-1] if self.series(name)[1] else None

    def entrant(self) -> Entrant:
        recipe = {key: value for key, value in self.config.items() if key not in NOT_RECIPE}
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()
        return Entrant(self.name, self.lineage, self.seed, digest, self.steps)


@dataclass(frozen=True)
class Folder:
    """Everything the report is made from."""

    path: Path
    runs: list[Run]
    results: list[Result]
    notes: list[str]  # what was left out and why, for the page

    def of_stage(self, stage: str) -> list[Run]:
        return [run for run in self.runs if run.stage == stage]


def read_folder(path: Path) -> Folder:
    """Read a folder of runs, or one run; DataError when there is nothing at all to report on."""
    if not path.is_dir():
        raise DataError(f"no folder at {path}; give the folder that holds your runs, for example runs/demo")
    places = [path] if (path / "config.json").is_file() else sorted(p for p in path.iterdir() if p.is_dir())
    notes: list[str] = []
    runs = [run for place in places if (run := _read_run(place, notes)) is not None]
    runs.sort(key=lambda run: (len(run.lineage), run.lineage, run.seed, run.name))
    files = dict.fromkeys([path / "results.jsonl", *(place / "results.jsonl" for place in places)])
    results = [result for file in files if file.is_file() for result in results_file.read(file)]
    if not runs and not results and find_shards(path, runs) is None:
        raise DataError(
            f"{path} holds no run, no results and no shard set; make a run with "
            f"`python maws/train.py --stage mae --preset demo --run {path}/mae data.shards=SHARDS`"
        )
    return Folder(path, runs, list(_current(results, runs, notes)), notes)


def _read_run(folder: Path, notes: list[str]) -> Run | None:
    file = folder / "config.json"
    if not file.is_file() or not ((folder / "metrics.jsonl").is_file() or (folder / "release").is_dir()):
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{folder.name}: its config.json cannot be read ({error}), the run is left out")
        return None
    return Run(folder, config, list(_read_metrics(folder)), _weights_sha256(folder, notes))


def _weights_sha256(run: Path, notes: list[str]) -> str | None:
    """The identity of a finished run's weights, one file or several; None while it is not done."""
    single = run / "release" / "model.safetensors"
    if single.is_file():
        return sha256_file(single)
    if not (run / "release" / "model.safetensors.index.json").is_file():
        return None
    from maws.checkpoint import CheckpointError  # torch: only runs of more than 5 GB need it
    from maws.weight_files import find_weights, weights_sha256

    try:
        index = find_weights(run / "release")
        return weights_sha256(index) if index else None
    except (CheckpointError, OSError) as error:
        notes.append(f"{run.name}: its weights cannot be read ({error})")
        return None


def _read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # half a line of a killed writer
        if isinstance(entry, dict) and _is_number(entry.get("step")):
            yield entry


def _current(results: list[Result], runs: list[Run], notes: list[str]) -> Iterator[Result]:
    """Results under the name of their run; those of weights that the run no longer has are left out and counted."""
    by_name = {run.name: run for run in runs}
    stale = 0
    for result in results:
        name = Path(result.run).name
        run = by_name.get(name)
        weights = result.hashes.get("weights")
        if run is not None and run.weights_sha256 and weights and weights != run.weights_sha256:
            stale += 1
            continue
        yield replace(result, run=name)
    if stale:
        notes.append(f"{stale} results of weights that have since been trained again are left out")


def find_shards(path: Path, runs: list[Run]) -> Path | None:
    """The shard set the runs were trained on: as their config names it, or `shards` in the folder."""
    named = [run.config.get("data", {}).get("shards") for run in runs if isinstance(run.config.get("data"), dict)]
    flat = [one for value in named for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
    candidates = [path / "shards", *(Path(one) for one in dict.fromkeys(flat))]
    candidates += [path / Path(one).name for one in dict.fromkeys(flat)]
    return next((place for place in candidates if (place / "manifest.json").is_file()), None)


def open_shards(folder: Folder) -> ShardSet | None:
    path = find_shards(folder.path, folder.runs)
    if path is None:
        return None
    try:
        return ShardSet.open(path)
    except DataError as error:
        folder.notes.append(f"shard set left out: {error}")
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
