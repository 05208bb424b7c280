"""The data page: one HTML file that shows what a shard set holds, what was left out, and where it comes from.

    python -m data_pipeline report SHARDS [--output FILE]

Reads the shard set and nothing else. The page needs no network, no script and no other file; every text that came with
the pictures is escaped, and pictures are decoded and encoded anew. The same set gives the same page.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
from markupsafe import Markup

from data_pipeline import hashtags, report_figures, report_tables
from data_pipeline.errors import DataError
from data_pipeline.files import write_bytes
from data_pipeline.report_survey import Survey, draw_samples, picture, survey
from data_pipeline.report_words import CHANGES, REASONS, STEPS, step_of
from data_pipeline.shardset import ShardSet, VocabularyEntry
from data_pipeline.summary import format_bytes, repeat_bin

SAMPLES: Final = 25
TOP: Final = 15  # labels from each end
SOURCES: Final = 40  # rows of the tables of languages, sources and licences
MAX_TEXT: Final = 300  # characters of one text on the page


@dataclass(frozen=True)
class FlowRow:
    """A step of the way from what was read to what is in the set."""

    words: str
    left: int  # pictures after it
    dropped: int
    share: float  # of what was read, after it
    lost: float  # of what was read, in it
    reasons: list[tuple[str, str, int]]  # code, words, pictures


@dataclass(frozen=True)
class Label:
    entry: VocabularyEntry
    bar: float
    samples: float | None  # of an epoch


@dataclass(frozen=True)
class Bar:
    words: str
    count: int
    share: float
    bar: float


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Make the page and return its path."""
    page = render(ShardSet.open(folder))
    output = output or folder / "report.html"
    try:
        write_bytes(output, page.encode())
    except OSError as error:
        raise DataError(f"cannot write {output} ({error.strerror}); give another file with --output") from None
    return output


def render(shards: ShardSet) -> str:
    """The page as text."""
    report_tables.check(shards)
    manifest, found = shards.manifest, survey(shards)
    counts: dict[str, Any] = manifest["counts"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("data_pipeline", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=printable,
    )
    environment.filters.update(
        thousands=lambda number: f"{number:,.0f}", percent=percent, short=short, bytes=format_bytes, json=as_json
    )
    return environment.get_template("report.html.j2").render(
        title="/".join(shards.path.resolve().parts[-2:]).lstrip("/"),
        shards=shards,
        manifest=manifest,
        counts=counts,
        found=found,
        cards=list(cards(shards)),
        size=sum(entry["bytes"] for entry in manifest["shards"]),
        flow=flow(counts),
        unaccounted=counts["read"] - counts["kept"] - sum(counts["dropped"].values()),
        drops=report_tables.drops(shards),
        unlabelled=[(code, REASONS.get(code, code), n) for code, n in largest(counts.get("unlabelled", {})) if n],
        changed=[(CHANGES.get(code, code.replace("_", " ")), n) for code, n in largest(counts.get("changed", {})) if n],
        labels=labels(shards, found),
        tags=report_tables.tags(shards),
        resampling=manifest["resampling"],
        repeats=repeats(found),
        duplicates=report_tables.duplicates(shards),
        contamination=report_tables.contamination(shards),
        texts=[(name, bars(found.texts[name])) for name in ("source", "licence", "language")],
        samples=list(samples(shards)),
        quarantine=report_tables.lines(shards, "quarantine.jsonl"),
        tombstones=report_tables.lines(shards, "tombstones.jsonl"),
        parameters=manifest.get("parameters", {}),
        rest={name: value for name, value in manifest.items() if name not in ("shards", "inputs", "skipped_inputs")},
    )


# ------------------------------------------------------------------------------------------------------------ contents


def cards(shards: ShardSet) -> Iterator[tuple[str, str]]:
    counts, resampling = shards.manifest["counts"], shards.manifest["resampling"]
    labelled = counts["labelled"]
    yield (
        f"{counts['kept']:,}",
        "pictures" + (f" of {counts['read']:,} read" if counts["read"] != counts["kept"] else ""),
    )
    least = counts.get("min_count")
    words = f"labels: synsets of {least:,} pictures or more" if least else "labels, of a vocabulary that was given"
    yield f"{len(shards.vocabulary):,}", words
    if labelled:
        yield f"{labelled:,}", f"pictures with labels, {counts['labels'] / labelled:.2f} each"
    yield f"{resampling['samples_per_epoch']:,.0f}", "samples in an epoch, after resampling"


def flow(counts: Mapping[str, Any]) -> list[FlowRow]:
    """What was read, and what each step left of it; reasons are put to the step that gives them."""
    read = counts["read"]
    by_step: dict[str, list[tuple[str, str, int]]] = {name: [] for name in STEPS}
    for code, number in largest(counts["dropped"]):
        if number:
            by_step[step_of(code)].append((code, REASONS.get(code, code.replace("_", " ")), number))
    rows = [FlowRow("read", read, 0, 1.0, 0.0, [])]
    left = read
    for name, reasons in by_step.items():
        dropped = sum(number for _, _, number in reasons)
        if dropped:
            left -= dropped
            rows.append(FlowRow(name, left, dropped, left / max(1, read), dropped / max(1, read), reasons))
    rows.append(FlowRow("in the set", counts["kept"], 0, counts["kept"] / max(1, read), 0.0, []))
    rows.append(FlowRow("with labels", counts["labelled"], 0, counts["labelled"] / max(1, read), 0.0, []))
    return rows


def labels(shards: ShardSet, found: Survey) -> dict[str, Any] | None:
    vocabulary = shards.vocabulary
    images = [entry.count for entry in vocabulary]
    if not sum(images):
        return None
    seen = found.seen * (found.total / max(1, found.samples))
    order = sorted(range(len(images)), key=lambda index: (-images[index], vocabulary[index].synset))
    ranked = np.array(sorted(images, reverse=True), float)

    def row(index: int) -> Label:
        return Label(vocabulary[index], images[index] / ranked[0], float(seen[index]) if found.samples else None)

    tail = order[max(TOP, len(order) - TOP) :]
    half = report_figures.needed(ranked, 0.5)
    return {
        "figure": report_figures.zipf(images, seen),
        "per_image": report_figures.histogram(
            dict(sorted(found.labels_per_image.items())), "labels of a picture", "Labels per picture"
        ),
        "head": [row(index) for index in order[:TOP]],
        "tail": [row(index) for index in tail],
        "half": half,
        "half_share": half / len(order),
        "rare": sum(0 < count < 10 for count in images),
        "empty": sum(count == 0 for count in images),
    }


def repeats(found: Survey) -> list[dict[str, Any]]:
    most = max(found.repeats.values(), default=1)
    epoch = sum(found.repeated) or 1.0
    return [
        {
            "words": repeat_bin(number) if number or found.is_repeating else "up to 1",
            "count": count,
            "share": count / max(1, found.samples),
            "epoch": found.repeated[number] / epoch,
            "bar": count / most,
        }
        for number, count in sorted(found.repeats.items())
    ]


def bars(counter: Counter[str | None]) -> list[Bar]:
    """The most frequent values, what is left summed up."""
    total, most = sum(counter.values()), max(counter.values(), default=1)
    ordered = sorted(counter.items(), key=lambda item: (-item[1], item[0] or ""))
    rows = [Bar(name or "not said", n, n / total, n / most) for name, n in ordered[:SOURCES]]
    if rest := sum(n for _, n in ordered[SOURCES:]):
        rows.append(Bar(f"{len(ordered) - SOURCES:,} others", rest, rest / total, min(1.0, rest / most)))
    return rows


def samples(shards: ShardSet) -> Iterator[dict[str, Any]]:
    glosses = {entry.index: entry for entry in shards.vocabulary}
    for place in draw_samples(shards, SAMPLES):
        record = shards.record(*place)
        chosen = [glosses[index] for index in record["labels"] if index in glosses]
        names = {entry.synset for entry in chosen}
        written = hashtags.extract(record["caption"])
        yield {
            "image": picture(shards, place),
            "record": record,
            "hashtags": [tag for tag in record["hashtags"] if tag not in written],  # of a column of their own
            "labels": chosen,
            "others": [name for name in record["synsets"] if name not in names],
        }


# ----------------------------------------------------------------------------------------------------------- rendering


def printable(value: object) -> object:
    """Of every text on the page: no characters that control their surroundings or that UTF-8 cannot hold."""
    if isinstance(value, Markup) or not isinstance(value, str) or value.startswith("data:image/"):
        return value
    return "".join(character if _shown(character) else "\N{REPLACEMENT CHARACTER}" for character in value)


def _shown(character: str) -> bool:
    return character.isprintable() or character in "\n\t\u200c\u200d"  # joiners hold scripts and emoji together


def largest(counts: Mapping[str, int]) -> Sequence[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def percent(part: float, digits: int = 1) -> str:
    text = f"{100 * part:.{digits}f}"
    if part and float(text) == 0:
        return f"<{10**-digits:g} %"
    return f">{100 - 10**-digits:g} %" if part < 1 and float(text) == 100 else f"{text} %"


def short(text: str, length: int = MAX_TEXT) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def as_json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)
