"""One self-contained HTML page from a folder of runs: what was trained on what, and how well it does.

    python -m eval report runs/demo [--output FILE]

Reads run folders, results.jsonl and the shard set; draws with matplotlib, fills pages/report.html.j2. What is missing
becomes a line that says which command makes it. The page needs no network, no script and no other file.
"""

import argparse
import json
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from data_pipeline.errors import DataError, UserError
from data_pipeline.files import write_bytes
from data_pipeline.shardset import ShardSet
from eval import (
    contamination,
    figures,
    report_compare,
    report_look,
    report_papers,
    report_samples,
    report_zero_shot,
)
from eval.report_intervals import DRAWS, IMAGES, NOTHING, SEEDS
from eval.report_runs import Folder, Run, open_shards, read_folder
from eval.report_scores import Row, ScoreTable, score_table, verdict
from eval.report_tasks import DEFAULT_LANGUAGE, is_look, language
from eval.report_templates import fill
from eval.results import Result, version
from maws.config import STAGE_NAMES

if TYPE_CHECKING:  # torch comes with it, and only some parts of the page need that
    from eval.datasets import Data
    from eval.report_training import Course

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "deepspeed", "timm", "transformers", "nltk", "pyarrow", "numpy", "pillow")
SAMPLES, RECONSTRUCTIONS, GUESSES = 15, 8, 8  # pictures of each kind


@dataclass(frozen=True)
class Figure:
    """A figure, or the line that stands in its place."""

    image: str | None = None
    missing: Markup | None = None


def main(argv: Sequence[str], make_parser: Callable[..., argparse.ArgumentParser] = argparse.ArgumentParser) -> int:
    parser = make_parser(prog="python -m eval report", description="One HTML page from a folder of runs.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    print(write_report(args.folder, args.output))  # noqa: T201  the result of the command
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder of runs, such as runs/demo, or one run")
    parser.add_argument("--output", type=Path, help="the page; default FOLDER/report.html")


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Make the page and return its path. DataError when the folder holds nothing to report on."""
    output = output or folder / "report.html"
    page = render(folder)
    try:
        write_bytes(output, page.encode())
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror}; give another file with --output") from None
    return output


def render(path: Path) -> str:
    """The page as text."""
    folder = read_folder(path)
    shards = open_shards(folder)
    table = score_table(folder.results, [run.entrant() for run in folder.runs])
    values = dict(
        title=folder.path.resolve().name,
        intro=introduction(folder, shards, table),
        cards=cards(table),
        table=table,
        colours=figures.colours(table.columns),
        verdict=verdict(table, _wsp_steps(folder)) if table.rows else None,
        contamination=contamination.sentences(folder.results),
        over={SEEDS: "", DRAWS: "d", IMAGES: "i", NOTHING: ""},
        score_plot=_score_plot(table, path),
        score_rows=in_one_language(table.rows),
        **zero_shot_tables(folder, table),
        paper_rows=report_papers.pairs(folder.results),
        compare=_section("comparison", lambda: report_compare.section(folder, path), folder.notes),
        look=_section("spectra and attention", lambda: report_look.section(folder, path), folder.notes),
        loss=_loss(folder, path),
        courses=(courses := _courses(folder)),
        training_plot=_training_plot(courses),
        histogram=_histogram(shards, path),
        reconstruction=_optional("reconstructions", lambda: _reconstructions(folder, shards, path), folder.notes),
        zero_shot=_optional("zero-shot examples", lambda: _zero_shot(folder, path), folder.notes),
        samples=_optional("samples", lambda: _samples(shards, path), folder.notes),
        drops=drops(shards.manifest) if shards else None,
        shards=shards,
        runs=folder.runs,
        run_rows=[provenance(run) for run in folder.runs],
        result_hashes=_hashes(folder.results),
        notes=list(dict.fromkeys(folder.notes)),
        software=_software(),
    )
    return fill("report.html.j2", values, ours=report_papers.name)


def zero_shot_tables(folder: Folder, table: ScoreTable) -> dict[str, Any]:
    """What pages/zero_shot.html.j2 shows."""
    hierarchy = report_zero_shot.lines(table.hierarchy)
    within = {name.removeprefix("within_") for line in hierarchy for name in line.cells if name.startswith("within_")}
    return {
        "ways": report_zero_shot.ways(table),
        "zero_shot_rows": report_zero_shot.side_by_side(table),
        "mapped": report_zero_shot.mapped(folder.results),
        "recalls": report_zero_shot.recalls(table.retrieval),
        "retrieval_lines": report_zero_shot.lines(table.retrieval),
        "hierarchy_lines": hierarchy,
        "within": sorted(within, key=int),
        "confusions": report_zero_shot.confusions(folder),
    }


# --------------------------------------------------------------------------------------------------------------- words


def introduction(folder: Folder, shards: ShardSet | None, table: ScoreTable) -> list[str]:
    """What was trained on what, and tested on what, in sentences."""
    sentences: list[str] = []
    if shards:
        sources = _sources(shards)
        sentences.append(
            f"The training set has {len(shards):,} captioned pictures{sources}; their hashtags gave "
            f"{len(shards.vocabulary):,} noun synsets of WordNet."
        )
    by_title: dict[str, list[Run]] = {}
    for run in folder.runs:
        by_title.setdefault(run.title, []).append(run)
    parts = []
    for title, runs in by_title.items():
        steps = sorted({run.steps for run in runs})
        of = f" × {len(runs)} seeds" if len({run.seed for run in runs}) > 1 else ""
        unfinished = "" if all(run.is_done for run in runs) else ", not finished"
        parts.append(f"{title} ({'/'.join(f'{s:,}' for s in steps)} steps of its last stage{of}{unfinished})")
    if parts:
        model = next((m for run in folder.runs if (m := _model_words(run))), "")
        sentences.append(f"Trained{model}: {'; '.join(parts)}.")
    sizes = sorted({result.n for result in folder.results if not is_look(result.metric)})
    classes = sorted({c for r in folder.results if isinstance(c := r.config.get("num_classes"), int)})
    if sizes:
        of = f" of {'/'.join(map(str, classes))} classes" if classes else ""
        sentences.append(f"Every score is measured on {'/'.join(f'{n:,}' for n in sizes)} evaluation pictures{of}.")
    return sentences


def _sources(shards: ShardSet) -> str:
    inputs = shards.manifest.get("inputs")
    return (
        f" from {len(inputs)} input {'file' if len(inputs) == 1 else 'files'}"
        if isinstance(inputs, list) and inputs
        else ""
    )


def _model_words(run: Run) -> str:
    model = run.config.get("model")
    if not isinstance(model, dict) or not model.get("variant"):
        return ""
    size = model.get("image_size")
    return f" (a ViT {model['variant']}" + (f" at {size} px)" if size else ")")


def cards(table: ScoreTable) -> list[dict[str, str]]:
    """The numbers to remember: the best of each evaluator's main metric, with how far that is from guessing."""
    found = []
    for evaluator, metric, words in (
        ("linear", "top1", "linear probe, top-1"),
        ("lowshot", "5-shot/vpt/top1", "5 per class, VPT, top-1"),
        ("zeroshot", "top1", "zero-shot by name, top-1"),
        ("wsphead", "top1", "zero-shot by WSP head, top-1"),
    ):
        row = next((row for row in table.rows if (row.evaluator, row.metric) == (evaluator, metric)), None)
        if row is not None:
            column, cell = max(row.cells.items(), key=lambda item: item[1].mean)
            times = f"{cell.mean / row.chance:.0f} × chance" if row.chance else ""
            value = f"{100 * cell.mean:.1f} %"
            found.append({"value": value, "words": words + (f", {row.on}" if row.on else ""), "column": column,
                          "times": times})  # fmt: skip
    return found


def drops(manifest: dict[str, Any]) -> list[tuple[str, int]]:
    """Counts of the build as rows: what was read, kept, and dropped for which reason."""
    rows: list[tuple[str, int]] = []

    def walk(counts: dict[str, Any], prefix: str) -> None:
        for name, value in counts.items():
            words = f"{prefix}{str(name).replace('_', ' ')}"
            if isinstance(value, dict):
                walk(value, f"{words}: ")
            elif isinstance(value, int) and not isinstance(value, bool):
                rows.append((words, value))

    counts = manifest.get("counts")
    walk(counts if isinstance(counts, dict) else {}, "")
    return rows


def provenance(run: Run) -> dict[str, Any]:
    """One line about a run, and its whole config."""
    speed = run.series("train/images_per_second")[1]
    versions = run.config.get("versions")
    return {
        "name": run.name,
        "title": run.title,
        "preset": run.config.get("preset", ""),
        "seed": run.seed,
        "steps": run.steps,
        "loss": run.last("train/loss"),
        "speed": sorted(speed)[len(speed) // 2] if speed else None,
        "revision": str(run.config.get("revision") or ""),
        "weights": run.weights_sha256 or "",
        "versions": versions if isinstance(versions, dict) else {},
        "config": json.dumps(run.config, indent=2, ensure_ascii=False, sort_keys=True),
    }


def _hashes(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """Distinct hashes behind the scores: of data, classes, prompts. Weights stand with their run."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        for name, value in result.hashes.items():
            if name != "weights":
                found.setdefault(name, {})[str(value)] = None
    return [(name, list(values)) for name, values in sorted(found.items())]


def _software() -> list[tuple[str, str]]:
    found = [(name, version(name)) for name in LIBRARIES]
    return [("Python", platform.python_version()), *((name, one) for name, one in found if one)]


def _wsp_steps(folder: Folder) -> int | None:
    steps = {run.steps for run in folder.runs if run.lineage in (("wsp",), ("mae", "wsp"))}
    return steps.pop() if len(steps) == 1 else None


# ------------------------------------------------------------------------------------------------------------- figures


def _missing(text: str, command: str) -> Markup:
    return Markup("{} <code>{}</code>").format(text, command)


def _score_plot(table: ScoreTable, path: Path) -> Figure:
    if not table.everything:
        command = f"python -m eval linear --run {path}/RUN --train TRAIN --data DATA --classes classes.json"
        return Figure(missing=_missing("No results yet. An evaluation adds some:", command))
    if not table.rows:
        return Figure(missing=Markup("Only retrieval was measured: see below."))
    return Figure(figures.score_plot(plotted(table.rows), table.columns))


def plotted(rows: Sequence[Row]) -> list[Row]:
    """Top-1 rows; the table has the rest."""
    rows = in_one_language(rows)
    return [row for row in rows if "top1" in row.metric] or rows


def in_one_language(rows: Sequence[Row]) -> list[Row]:
    """The other languages stand side by side in a table of their own."""
    return [row for row in rows if row.task.language == DEFAULT_LANGUAGE] or list(rows)


def _loss(folder: Folder, path: Path) -> Figure:
    panels: dict[str, list[figures.Curve]] = {}
    for run in folder.runs:
        steps, values = run.series("train/loss")
        if steps:
            panel = STAGE_NAMES.get(run.stage, run.stage)
            panels.setdefault(panel, []).append(figures.Curve(run.title, steps, values))
    if not panels:
        command = f"python maws/train.py --stage mae --preset demo --run {path}/mae data.shards=SHARDS"
        return Figure(missing=_missing("No run has logged a loss yet. Training does:", command))
    return Figure(figures.loss_curves(panels))


def _courses(folder: Folder) -> "list[Course]":
    """A part that cannot be read must not cost the page."""
    from eval.report_training import course

    found = []
    for run in folder.runs:
        try:
            if run.metrics:
                found.append(course(run))
        except (OSError, ValueError, KeyError, TypeError) as error:
            folder.notes.append(f"{run.name}: how its training went could not be read ({error})")
    return found


def _training_plot(courses: "Sequence[Course]") -> Figure:
    from eval.report_training import panels

    found = panels(courses)
    if not found:
        return Figure(missing=Markup("No run has logged its speed or gradients."))
    return Figure(figures.training_curves(found))


def _histogram(shards: ShardSet | None, path: Path) -> Figure:
    if shards is None or not shards.vocabulary:
        command = f"python -m data_pipeline build --input DIR_OR_FILES --output {path}/shards"
        return Figure(missing=_missing("No shard set with a vocabulary was found. Building makes one:", command))
    entries = shards.vocabulary
    return Figure(figures.label_histogram([e.count for e in entries], [e.synset for e in entries]))


@dataclass(frozen=True)
class Pictures:
    """Pictures of one kind, or the line that stands in their place."""

    items: Sequence[Any] = ()
    words: str = ""
    missing: Markup | None = None


def _section(what: str, make: Callable[[], Markup | None], notes: list[str]) -> Markup | None:
    """A section that is made elsewhere; None where there is nothing to show, and where it cannot be made."""
    try:
        return make()
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("warning: the report has no %s: %s", what, error)
        notes.append(f"{what}: {error}")
        return None


def _optional(what: str, make: Callable[[], Pictures], notes: list[str]) -> Pictures:
    """A part that cannot be made must not cost the page; its reason goes on it."""
    try:
        return make()
    except (UserError, OSError, ValueError, RuntimeError, KeyError) as error:
        log.warning("warning: the report has no %s: %s", what, error)
        notes.append(f"{what}: {error}")
        return Pictures(missing=Markup("Could not be made: {}").format(str(error)))


def _samples(shards: ShardSet | None, path: Path) -> Pictures:
    if shards is None:
        command = f"python -m data_pipeline build --input DIR_OR_FILES --output {path}/shards"
        return Pictures(missing=_missing("No shard set was found. Building makes one:", command))
    return Pictures(report_samples.draw(shards, SAMPLES))


def _reconstructions(folder: Folder, shards: ShardSet | None, path: Path) -> Pictures:
    run = next((run for stage in ("mae", "lc_mae") for run in folder.of_stage(stage) if run.is_done), None)
    if run is None:
        command = f"python maws/train.py --stage mae --preset demo --run {path}/mae data.shards=SHARDS"
        return Pictures(missing=_missing("No finished MAE run yet. Training makes one:", command))
    from eval import report_pictures

    data = _evaluation_data([*(r for r in folder.results if r.run == run.name), *folder.results])
    pictures = report_pictures.some_pictures(data, shards, RECONSTRUCTIONS)
    if not pictures:
        return Pictures(missing=Markup("Neither evaluation data nor a shard set was found to take pictures from."))
    seen = "evaluation pictures, never trained on" if data else "training pictures"
    return Pictures(report_pictures.reconstructions(run.folder, pictures), f"run {run.name}, {seen}")


def _zero_shot(folder: Folder, path: Path) -> Pictures:
    results = [result for result in folder.results if result.evaluator == "zeroshot" and result.metric == "top1"]
    runs = {run.name: run for run in folder.runs if run.is_done}
    result = next((result for result in reversed(results) if result.run in runs), None)
    if result is None:
        lit = next((run.name for run in folder.of_stage("lit")), "lit")
        command = f"python -m eval zeroshot --run {path}/{lit} --data DATA --classes classes.json"
        return Pictures(missing=_missing("No zero-shot result of a finished LiT run yet. This makes one:", command))
    from eval import report_pictures

    data = _evaluation_data([result])
    if data is None:
        return Pictures(missing=Markup("The evaluation data of the zero-shot result is no longer where it was."))
    templates = str(result.config.get("zeroshot", {}).get("templates", "default"))
    items = report_pictures.guesses(runs[result.run].folder, data, templates, GUESSES)
    words = f"Run {result.run}: {100 * result.value:.1f} % of {result.n:,} pictures are right, "
    words += f"{sum(item.is_right for item in items)} of the {len(items)} shown."
    return Pictures(items, words)


def _evaluation_data(results: Sequence[Result]) -> "Data | None":
    """The evaluation set of the first result whose files are still there and still the same."""
    from eval.classes import read_classes
    from eval.datasets import expanded, open_data

    for result in results:
        paths = result.config.get("paths")
        paths = paths if isinstance(paths, dict) else {}
        test = [Path(path) for path in paths.get("data") or []]
        if not test or not all(path.exists() for path in expanded(test)):
            continue
        try:
            classes = read_classes(paths["classes"], language(result)) if paths.get("classes") else None
        except UserError:  # their file is gone
            continue
        data = open_data(test, classes=classes)
        if data.test.sha256 == result.hashes.get("data", data.test.sha256):
            return data
    return None
