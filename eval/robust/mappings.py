"""What the sets' own classes are in ImageNet-1k: eval/mappings/*.json, each with its sources.

Numbers of ImageNet-1k classes are places in the order of sorted wnids, as everywhere.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, Final

MAPPINGS: Final = Path(__file__).parents[1] / "mappings"


@cache
def read(name: str) -> Any:
    return json.loads((MAPPINGS / f"{name}.json").read_text(encoding="utf-8"))


def objectnet_numbers() -> dict[str, tuple[int, ...]]:
    """ObjectNet's folders whose class overlaps with ImageNet-1k: the classes that count as it."""
    return {folder: tuple(one["imagenet"]) for folder, one in read("objectnet")["classes"].items()}


def objectnet_labels() -> dict[str, str]:
    """What ObjectNet calls the class of a folder."""
    return {folder: one["label"] for folder, one in read("objectnet")["classes"].items()}


def si_score_numbers() -> dict[str, int]:
    """SI-Score's folders: the ImageNet-1k class of each."""
    return dict(read("si-score")["classes"])


def alexnet_errors() -> dict[str, float]:
    """AlexNet's error on each corruption of ImageNet-C, averaged over the severities, 0..1."""
    return dict(read("alexnet-errors")["errors"])
