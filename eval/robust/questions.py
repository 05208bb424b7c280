"""What a set asks of a classifier: among which outputs, and which of them are right for each picture.

    question("objectnet", dataset, classes, classifier, known)     built before any picture is decoded: it may refuse

Letters: N pictures of the data set, M outputs that may be right (padded with -1), A outputs that are asked.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import DataError
from eval.classes import Classes
from eval.classifier import Classifier
from eval.datasets import Dataset
from eval.robust.head_classes import head_outputs, imagenet_numbers, refuse_unknown
from eval.robust.mappings import objectnet_numbers, si_score_numbers
from eval.robust.real import number, read_lists
from eval.robust.top1 import padded
from eval.sources.source import some

log = logging.getLogger(__name__)

RESTRICTED: Final = ("imagenet-a", "imagenet-r", "imagenet-o")  # only the outputs of the set's classes are asked
OWN_CLASSES: Final = ("corrupted",)  # the data says what they are; no mapping to ImageNet-1k


@dataclass(frozen=True)
class Question:
    """For one data set and one head."""

    accepted: Tensor  # N M
    outputs: int  # of the head
    asked: Tensor | None  # A, ascending; None: all
    own: Tensor  # A, ascending: the outputs of the set's classes
    unknown: int  # classes of the set that the head lacks; none of them has a picture


def question(
    name: str, dataset: Dataset, classes: Classes, classifier: Classifier, of_imagenet: Mapping[int, int]
) -> Question:
    """`of_imagenet` is head_outputs of ImageNet-1k's classes, which most sets ask for. Raises UsageError where a class
    that has pictures is not among the head's outputs.
    """
    numbers = class_numbers(name, classes)
    outputs = head_outputs(classes, classifier) if name in OWN_CLASSES else of_imagenet
    answers = [[outputs[one] for one in own if one in outputs] for own in numbers]
    seen = np.unique(dataset.labels).tolist()
    refuse_unknown((classes.name(label) for label in seen if not answers[label]), dataset.name, classifier)
    own = torch.tensor(sorted({output for answer in answers for output in answer}), dtype=torch.long)
    unknown = sum(not answer for answer in answers)
    if unknown and name in RESTRICTED:
        log.warning(
            "warning: the head lacks %d of the %d classes of %s, without pictures here; it is asked among the others",
            unknown, len(answers), dataset.name,
        )  # fmt: skip
    table = padded(_of_pictures(dataset, outputs) if name == "imagenet-real" else answers)
    rows = torch.arange(len(dataset)) if name == "imagenet-real" else torch.from_numpy(dataset.labels)
    asked = own if name in RESTRICTED else None
    return Question(table[rows], classifier.classes, asked, own, unknown)


def class_numbers(name: str, classes: Classes) -> list[Sequence[int]]:
    """The ImageNet-1k classes of each class of the set; of a set with its own classes, their own numbers."""
    if name in RESTRICTED:
        return [[number] for number in imagenet_numbers(classes.name(label) for label in range(len(classes)))]
    if name == "objectnet":
        known = objectnet_numbers()
        return [known[classes.name(label)] for label in range(len(classes))]
    if name == "si-score":
        mapped = si_score_numbers()
        return [[mapped[classes.name(label)]] for label in range(len(classes))]
    return [[label] for label in range(len(classes))]


def _of_pictures(dataset: Dataset, outputs: Mapping[int, int]) -> list[list[int]]:
    """ReaL: the outputs of the classes in each picture's list."""
    lists = read_lists()
    places = [number(key) for key in dataset.keys]
    if strange := [key for key, place in zip(dataset.keys, places, strict=True) if place is None]:
        raise DataError(f"{some(strange)} of {dataset.name} are no validation pictures of ILSVRC2012")
    return [[outputs[one] for one in lists[place - 1] if one in outputs] for place in places if place is not None]
