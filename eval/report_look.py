"""The report's look at features: spectra of all runs, their differences, how far heads look, and maps of attention.

    section(read_folder(path), path)       Markup, from spectrum/*.json and attention/*.json in the runs' folders

Runs stand over each other where their files are of the same pictures, at the same size and of the same token. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from markupsafe import Markup

from eval import figures_look
from eval.figures import colours
from eval.figures_look import Heads, Line
from eval.report_look_files import Looking, Map, Spectrum, as_looking, as_spectrum, label, look_files
from eval.report_runs import Folder
from eval.report_scores import score_table
from eval.report_tasks import tasks
from eval.report_templates import fill
from eval.spectra import effective_rank, log_difference, variance_share

K: Final = (1, 10)  # directions whose share of the variance is drawn
PICTURES, QUERIES, HEADS = 3, 2, 6  # that are shown of what the files have
BASELINE: Final = "MAE"  # LC-MAE §5.3 subtracts it


@dataclass(frozen=True)
class Named:
    """A file under the name and in the colour of its run."""

    label: str
    run: str
    spectrum: Spectrum


@dataclass(frozen=True)
class NamedLooking:
    label: str
    run: str
    looking: Looking


@dataclass(frozen=True)
class SpectraPart:
    """Runs whose spectra can be compared."""

    on: str
    token: str
    images: int
    image_size: int
    spectra: str
    by_layer: str
    differences: str | None
    baseline: str
    few: str  # a warning where there are no more pictures than dimensions


@dataclass(frozen=True)
class Tiles:
    """One run's maps of one query."""

    label: str
    mean: str
    heads: list[str]


@dataclass(frozen=True)
class Question:
    """A patch of a picture that asks, and what each run's heads answer."""

    key: str
    picture: str
    rows: list[Tiles]


@dataclass(frozen=True)
class AttentionPart:
    on: str
    images: int
    image_size: int
    distances: str
    renormalised: str  # words
    class_share: str  # words
    blocks: str  # words: whose maps
    heads: int  # of the run with the most
    questions: list[Question]


def section(folder: Folder, path: Path, baseline: str | None = None) -> Markup | None:
    """None for a folder without a finished run. `baseline` is the label or name of the run that others are compared to;
    by itself it is MAE, or the first.
    """
    columns = {
        run: column
        for column, runs in score_table(folder.results, [run.entrant() for run in folder.runs]).runs.items()
        for run in runs
    }
    spectra = [
        Named(label(found.about, run, mean, columns), run.name if run else "", found)
        for found, run, mean in look_files(folder, "spectrum", as_spectrum)
    ]
    looks = [
        NamedLooking(label(found.about, run, mean, columns), run.name if run else "", found)
        for found, run, mean in look_files(folder, "attention", as_looking)
    ]
    if not spectra and not looks and not any(run.is_done for run in folder.runs):
        return None
    on = {key[0]: task.data for key, task in tasks(folder.results).items()}
    shades = colours(list(dict.fromkeys([*columns.values(), *(one.label for one in [*spectra, *looks])])))
    values = {
        "spectra": _spectra_parts(spectra, on, shades, baseline),
        "attention": _attention_parts(looks, on, shades),
        "shades": shades,
        "command": f"python -m eval spectrum attention --run {path}/RUN --data DATA",
    }
    return fill("look.html.j2", values)


# ------------------------------------------------------------------------------------------------------------- spectra


def _spectra_parts(
    found: Sequence[Named], on: dict[str, str], shades: dict[str, str], baseline: str | None
) -> list[SpectraPart]:
    groups: dict[tuple[object, ...], list[Named]] = {}
    for one in found:
        groups.setdefault((*one.spectrum.about.kin, one.spectrum.token), []).append(one)
    return [_spectra_part(members, on, shades, baseline) for members in groups.values()]


def _spectra_part(
    members: Sequence[Named], on: dict[str, str], shades: dict[str, str], baseline: str | None
) -> SpectraPart:
    about, token = members[0].spectrum.about, members[0].spectrum.token
    colour = {one.label: shades[one.label] for one in members}
    deepest = max((list(one.spectrum.layers) for one in members), key=len)
    panels = {
        _words(layer): [Line(one.label, one.spectrum.layers[layer]) for one in members if layer in one.spectrum.layers]
        for layer in _some(deepest)
    }
    measures = {
        "effective rank": effective_rank,
        **{
            f"% of variance in the first {k if k > 1 else 'direction'}": (
                lambda values, k=k: 100 * variance_share(values, k)
            )
            for k in K
        },
    }
    layers = {
        title: [Line(one.label, [measure(values) for values in one.spectrum.layers.values()]) for one in members]
        for title, measure in measures.items()
    }
    base = _baseline(members, baseline)
    differences = _differences(members, base)
    return SpectraPart(
        on.get(about.data, "pictures"), token, about.images, about.image_size,
        figures_look.spectra(panels, colour),
        figures_look.by_layer(layers, [layer.removeprefix("block=") for layer in deepest], colour),
        figures_look.differences(differences) if differences else None,
        base.label, _few(members),
    )  # fmt: skip


def _baseline(members: Sequence[Named], asked: str | None) -> Named:
    """The run that was asked for, else MAE, else the first; of several seeds the first."""
    wanted = [one for name in (asked, BASELINE) if name for one in members if name in (one.label, one.run)]
    of_lineage = [one for one in members if one.spectrum.about.lineage == ("mae",)]
    return [*wanted, *of_lineage, *members][0]


def _differences(members: Sequence[Named], base: Named) -> dict[str, dict[str, list[float]]]:
    """By title, per layer: ln of the first run of each label minus ln of the baseline."""
    first = {one.label: one for one in reversed(members)}
    return {
        f"{name} minus {base.label}": {
            layer: log_difference(values, base.spectrum.layers[layer])
            for layer, values in first[name].spectrum.layers.items()
            if layer in base.spectrum.layers
        }
        for name in dict.fromkeys(one.label for one in members)
        if name != base.label
    }


def _some(layers: Sequence[str]) -> list[str]:
    """The first, the middle and the last block, and the norm."""
    blocks = [layer for layer in layers if layer != "norm"]
    chosen = dict.fromkeys([blocks[0], blocks[(len(blocks) - 1) // 2], blocks[-1]]) if blocks else {}
    return [*chosen, *(layer for layer in layers if layer == "norm")]


def _words(layer: str) -> str:
    return "after the final norm" if layer == "norm" else f"after block {layer.removeprefix('block=')}"


def _few(members: Sequence[Named]) -> str:
    """There are no more singular values than pictures."""
    width = max(len(values) for one in members for values in one.spectrum.layers.values())
    images = members[0].spectrum.about.images
    if images > width:
        return ""
    return f"There are no more pictures ({images:,}) than dimensions ({width:,}): the curves end where the pictures do."


# ----------------------------------------------------------------------------------------------------------- attention


def _attention_parts(found: Sequence[NamedLooking], on: dict[str, str], shades: dict[str, str]) -> list[AttentionPart]:
    groups: dict[tuple[object, ...], list[NamedLooking]] = {}
    for one in found:
        groups.setdefault((*one.looking.about.kin, one.looking.renormalised), []).append(one)
    return [_attention_part(members, on, shades) for members in groups.values()]


def _attention_part(members: Sequence[NamedLooking], on: dict[str, str], shades: dict[str, str]) -> AttentionPart:
    about = members[0].looking.about
    heads = [Heads(one.label, one.looking.distances.tolist(), one.looking.uniform) for one in members]
    first = {one.label: one for one in reversed(members)}
    ordered = [first[name] for name in dict.fromkeys(one.label for one in members)]
    blocks = dict.fromkeys(one.looking.block for one in ordered)
    shares = [f"{one.label} {100 * one.looking.class_share[-1].mean():.0f} %" for one in ordered]
    return AttentionPart(
        on.get(about.data, "pictures"), about.images, about.image_size, figures_look.distances(heads, shades),
        "its weights on the patches brought to a sum of 1" if members[0].looking.renormalised
        else "the weight on a class token counting as no distance",
        ", ".join(shares),
        "/".join(map(str, blocks)),
        max(one.looking.distances.shape[1] for one in ordered),
        _questions(ordered),
    )  # fmt: skip


def _questions(members: Sequence[NamedLooking]) -> list[Question]:
    """The first queries of the first pictures, with the maps of every run that has them."""
    asked: dict[str, dict[tuple[float, float], list[tuple[str, Map]]]] = {}
    for one in members:
        for found in one.looking.maps:
            asked.setdefault(found.key, {}).setdefault(found.at, []).append((one.label, found))
    questions = []
    for key in list(asked)[:PICTURES]:
        for answers in list(asked[key].values())[:QUERIES]:
            _, first = answers[0]
            grid = first.heads.shape[1], first.heads.shape[2]
            rows = [
                Tiles(name, figures_look.heat(one.heads.mean(0)), [figures_look.heat(m) for m in one.heads[:HEADS]])
                for name, one in answers
            ]
            questions.append(Question(key, figures_look.marked(first.picture, first.cell, grid), rows))
    return questions
