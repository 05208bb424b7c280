"""What a score was measured on, and in which unit: scores of two data sets or two languages never share a row.

    top1, R@5 -> "share" · hierarchy/mistake_height -> "edges"

No torch.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from eval.results import Result

SHARE, EDGES = "share", "edges"
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
    titles: dict[str, list[Identity]] = {}
    for key, task in found.items():
        titles.setdefault(task.title, []).append(key)
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
    """Lengths of ways in WordNet are no shares: they are not in %, have no Wilson interval, and less is better."""
    return EDGES if re.search(r"(?:^|/)(?:mistake_|chance_)?(?:height|distance)$", metric) else SHARE
