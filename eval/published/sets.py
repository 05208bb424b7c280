"""Several published sets at once, for evaluators that ask one model about all of them (eval/evaluators/robustness.py).

python -m eval robustness --run RUN --data imagenet-v2=/data/imagenetv2 imagenet-r=/data/imagenet-r
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError
from eval.classes import Classes
from eval.datasets import Dataset, join, own_classes
from eval.published import registry
from eval.published.description import Published


@dataclass(frozen=True)
class Sets:
    """Data sets by their reference (NAME:SPLIT); labels are numbers of each set's own classes."""

    sets: dict[str, Dataset]
    published: dict[str, Published]
    splits: dict[str, str]
    classes: dict[str, Classes]
    whole: dict[str, bool]

    @property
    def hashes(self) -> dict[str, str]:
        """A score has its own set's as well."""
        return {"data": ",".join(dataset.sha256 for dataset in self.sets.values())}

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "published": {
                name: {"name": published.name, "split": self.splits[name], "whole": self.whole[name]}
                for name, published in self.published.items()
            },
            "num_classes": {name: published.num_classes for name, published in self.published.items()},
        }

    def summary(self) -> str:
        parts = [f"{name} ({len(dataset):,} pictures)" for name, dataset in self.sets.items()]
        return f"published sets: {', '.join(parts)}"


def open_published(paths: Sequence[Path]) -> Sets:
    """Open each NAME=PATH or NAME:SPLIT=PATH; a plain path is refused, since it does not say how it is scored."""
    found = Sets({}, {}, {}, {}, {})
    for path in paths:
        reference = registry.reference(path)
        if reference is None:
            raise UsageError(
                f"--data {path}: this evaluator scores published sets by their own rules, and has to know which one a "
                f"path is: give NAME=PATH, such as imagenet-v2={path}; names: {', '.join(registry.names())}"
            )
        published, split = reference.published, reference.split
        name = f"{published.name}:{split}"
        if name in found.sets:
            raise UsageError(f"--data {path}: {name} is given twice; give each set once")
        source = registry.open_split(published, split, reference.folder)
        classes = registry.classes_of(published) or own_classes([source])
        found.sets[name] = join(name, [source], classes)
        found.published[name], found.splits[name], found.classes[name] = published, split, classes
        found.whole[name] = bool((source.published or {}).get("whole"))
    return found
