"""What a score was measured on, and in which unit: scores of two data sets or two languages never share a row.

    top1, R@5 -> "share" · hierarchy/mistake_height -> "edges" · attention_distance/block=12 -> "pixels"

No torch.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from eval.results import Result

SHARE, EDGES = "share", "edges"
# What the evaluators `spectrum` and `attention` say of features: not right or wrong, and more is not better.
LOOKS = {"attention_distance": "pixels", "effective_rank": "dimensions", "variance@k": "% of variance"}
DEFAULT_LANGUAGE = "en"

Identity = tuple[str, str, str]  # hash of the data, hash of the classes or captions, language


class Task(NamedTuple):
    """One evaluation set with its classes and the language of their names."""

    data: str  # as a person calls it
    classes: str
    language: str
    number: int | None  # of classes
    hashes: tuple[str, str]  # of data and classes

    @property
    def order(self) -> tuple[str, bool, str]:
        """By name, the plain language before the others."""
        return self.data, self.language != DEFAULT_LANGUAGE, self.language

    @property
    def title(self) -> str:
        return self.data + ("" if self.language == DEFAULT_LANGUAGE else f" · {self.language}")


def identity(result: Result) -> Identity:
    texts = result.hashes.get("classes", result.hashes.get("captions", ""))
    return str(result.hashes.get("data", "")), str(texts), language(result)


def language(result: Result) -> str:
    """Of the class names."""
    chosen = result.config.get("chosen")
    found = chosen.get("language") if isinstance(chosen, dict) else None
    return found if isinstance(found, str) and found else DEFAULT_LANGUAGE


def tasks(results: Iterable[Result]) -> dict[Identity, Task]:
    """Every task by its identity; tasks that would have one title are told apart by their classes or their hash."""
    found: dict[Identity, Task] = {}
    for result in results:
        found.setdefault(identity(result), _task(result))
    titles: dict[tuple[bool, str], list[Identity]] = {}
    for key, task in found.items():  # pictures without classes or captions stand in other tables
        titles.setdefault((bool(key[1]), task.title), []).append(key)
    for same in (keys for keys in titles.values() if len(keys) > 1):
        names = {found[key].classes for key in same}
        for key in same:
            more = found[key].classes if len(names) == len(same) else "/".join(text[:8] for text in key[:2] if text)
            found[key] = found[key]._replace(data=f"{found[key].data} ({more})")
    return found


def _task(result: Result) -> Task:
    paths = result.config.get("paths")
    paths = paths if isinstance(paths, dict) else {}
    listed = paths.get("data", paths.get("captions"))
    listed = listed if isinstance(listed, list) else [listed]
    data = [_stem(path) for path in listed if isinstance(path, str)]
    if isinstance(split := paths.get("split"), str):
        data.append(_stem(split))
    classes = paths.get("classes")
    number = result.config.get("num_classes")
    return Task(
        " + ".join(data[:2]) + (" …" if len(data) > 2 else "") or "evaluation set",
        _stem(classes) if isinstance(classes, str) else "",
        language(result),
        number if isinstance(number, int) and not isinstance(number, bool) else None,
        identity(result)[:2],
    )


def _stem(path: str) -> str:
    return Path(path).stem or path


def unit(metric: str) -> str:
    """Lengths of ways in WordNet are no shares: they are not in %, have no Wilson interval, and less is better. What
    is said of features is in units of its own.
    """
    look = LOOKS.get(metric.partition("/")[0].partition("=")[0])
    return look or (EDGES if re.search(r"(?:^|/)(?:mistake_|chance_)?(?:height|distance)$", metric) else SHARE)


def is_look(metric: str) -> bool:
    """Does it describe features, and say nothing of how often they are right?"""
    return unit(metric) in LOOKS.values()


_ERRORS = re.compile(r"(?:^|/)(?:corruption|ce)/|(?:^|/)(?:mce|mean-error)$")
_MADE_OF_MANY = re.compile(r"(?:^|/)(?:ce/.*|mce|mean-error|aupr|corruption/[^/]+)$")
_SEVERITY = re.compile(r"(?:^|/)corruption/[^/]+/\d+$")


def less_is_better(metric: str) -> bool:
    """Errors (of eval/robust/corruption_error.py), and ways in WordNet."""
    return unit(metric) == EDGES or bool(_ERRORS.search(metric))


def is_of_images(metric: str) -> bool:
    """Is it the share of images that are right (or wrong), which has Wilson's interval?"""
    return unit(metric) == SHARE and not _MADE_OF_MANY.search(metric)


def is_detail(metric: str) -> bool:
    """One severity of a corruption: 75 of them make one score, and they stand in results.jsonl."""
    return bool(_SEVERITY.search(metric))
