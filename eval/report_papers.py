"""Scores beside the papers' own, where the data are the papers' data: whole published sets (`NAME=PATH`), same metric;
of probes also the pictures that they learnt from.

    ours MAE→WSP, vit_b16, linear 81.9     MAWS (arXiv 2303.13496), Table 9: vit_b16 82.8     -0.9

The figures, each with its table: papers/figures.json. Weights and training data differ, so a difference of points says
how far apart two numbers are and not why. No torch.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Final

from eval.report_scores import lineage_name, newest
from eval.report_settings import differing, setting
from eval.report_tasks import DEFAULT_LANGUAGE, identity, language
from eval.results import Result

FIGURES: Final = Path(__file__).parent / "papers/figures.json"
PROBES: Final = ("linear", "lowshot")  # they learn from pictures, which are part of what the papers evaluate


@dataclass(frozen=True)
class Figure:
    """One number of a paper."""

    paper: str
    where: str  # table or section
    task: str
    data: str  # published set and split
    metric: str
    model: str
    lineage: tuple[str, ...]
    variant: str
    value: float  # %
    resolution: int
    note: str = ""


@dataclass(frozen=True)
class Ours:
    """Scores of one run, of one name and by one setting, that a paper has a counterpart of; the mean over draws and
    seeds.
    """

    run: str
    lineage: tuple[str, ...]
    variant: str
    task: str
    metric: str
    data: str
    protocol: str
    resolution: int
    score: str  # its own name: `cls/top1`, `5-shot/vpt/top1`
    how: str = ""  # the settings that set it apart from others of its kind
    value: float = 0.0  # %
    count: int = 0


@dataclass(frozen=True)
class Pair:
    """A score of ours and one of a paper."""

    ours: Ours
    paper: Figure

    @property
    def delta(self) -> float:
        """Points of a percent."""
        return self.ours.value - self.paper.value

    @property
    def alike(self) -> bool:
        """The same size, after the same stages, at the same number of pixels."""
        ours, paper = self.ours, self.paper
        mine, theirs = (ours.variant, ours.lineage), (paper.variant, paper.lineage)
        return mine == theirs and ours.resolution in (paper.resolution, _for_patch_16(paper.resolution))


def _for_patch_16(resolution: int) -> int:
    """The papers give 518 for patches of 14 where those of 16 have 512."""
    return 512 if resolution == 518 else resolution


@cache
def figures() -> tuple[Figure, ...]:
    """Every figure of the file."""
    found: list[Figure] = []
    for group in json.loads(FIGURES.read_bytes()):
        common = {key: value for key, value in group.items() if key != "figures"}
        found += [Figure(**common, **one | {"lineage": tuple(one["lineage"])}) for one in group["figures"]]
    return tuple(found)


def pairs(results: Iterable[Result]) -> list[Pair]:
    """Each score with the figures of its data, task and metric that are of its size or have its lineage."""
    return [
        Pair(ours, paper)
        for ours in comparable(results)
        for paper in figures()
        if (paper.task, paper.data, paper.metric) == (ours.task, ours.data, ours.metric)
        and (paper.variant == ours.variant or paper.lineage == _without_tuning(ours.lineage))
    ]


def comparable(results: Iterable[Result]) -> Iterator[Ours]:
    """Scores on whole published sets by a protocol that papers report; those under other settings stand apart."""
    groups: dict[Ours, dict[tuple[str, ...], list[float]]] = {}
    for result in newest(results):
        data, kind = published(result), task(result)
        if data is None or kind is None or not (_all_were_read(result) and _learnt_from_its_training_split(result)):
            continue
        apart = (setting(result), language(result), *identity(result))
        groups.setdefault(_ours(result, kind, data), {}).setdefault(apart, []).append(100 * result.value)
    for ours, by_setting in groups.items():
        words = differing(apart[0] for apart in by_setting)
        for apart, values in by_setting.items():
            spoken = apart[1] if apart[1] != DEFAULT_LANGUAGE else ""
            how = ", ".join(filter(None, (words[apart[0]], spoken)))
            yield replace(ours, how=how, value=fmean(values), count=len(values))


def _ours(result: Result, kind: tuple[str, str], data: str) -> Ours:
    """Without its value."""
    model = result.config.get("model")
    model = model if isinstance(model, dict) else {}
    return Ours(
        result.run, _without_tuning(tuple(result.lineage)), str(model.get("variant", "")), *kind, data,
        str(result.config.get("protocol", "")), int(model.get("image_size") or 0), result.metric,
    )  # fmt: skip


def _all_were_read(result: Result) -> bool:
    """A set of which some pictures are damaged is a part of it."""
    images = result.config.get("images")
    return not isinstance(images, dict) or images.get("data", result.n) == result.n


def _learnt_from_its_training_split(result: Result) -> bool:
    """Of a probe: from the set's own training pictures, all of them; few labels of another set are another task."""
    if result.evaluator not in PROBES:
        return True
    known = result.config.get("published", {})
    data, train = known.get("data", {}), known.get("train")
    if not isinstance(train, dict) or train.get("whole") is not True:
        return False
    return train.get("name") == data.get("name") and train.get("split") != data.get("split")


def published(result: Result) -> str | None:
    """The published set and split that a score is on; None for other data, and for a part of it."""
    known = result.config.get("published")
    data = known.get("data") if isinstance(known, dict) else None
    if not isinstance(data, dict) or data.get("whole") is not True:
        return None
    return f"{data.get('name')}/{data.get('split')}"


def task(result: Result) -> tuple[str, str] | None:
    """What a paper calls this evaluation, and its metric; None for one that none of them reports."""
    metric = result.metric
    if shots := re.fullmatch(r"(\d+)-shot/.+/top1", metric):
        return f"lowshot-{shots[1]}", "top1"
    last = metric.rpartition("/")[2]
    if result.evaluator == "finetune" and metric == "top1":
        part = result.config.get("trainable")
        partial = {"none": "0", "half": "half"}.get(str(part), str(part).removeprefix("last "))
        return ("finetune" if part in (None, "all") else f"partial-{partial}"), "top1"
    if result.evaluator in ("linear", "zeroshot") and last == "top1":
        return result.evaluator, "top1"
    if result.evaluator == "robustness":
        return "robustness", last
    return None


def _without_tuning(lineage: tuple[str, ...]) -> tuple[str, ...]:
    """Papers name a model by its pretraining."""
    return tuple(stage for stage in lineage if stage != "finetune")


def name(ours: Ours) -> str:
    """For people."""
    return f"{lineage_name(ours.lineage)}, {ours.variant or ours.run}"
