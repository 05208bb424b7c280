r"""Evaluator robustness: a classifier of ImageNet-1k on the sets made to mislead it, each by its published rule.

    python -m eval robustness --run runs/finetune --data imagenet1k=/data/imagenet imagenet-v2=/data/imagenetv2 \
        imagenet-real=/data/imagenet imagenet-a=/data/imagenet-a imagenet-o=/data/imagenet-o \
        imagenet-r=/data/imagenet-r imagenet-sketch=/data/sketch imagenet-c=/data/imagenet-c \
        objectnet=/data/objectnet si-score=/data/si-score

Nothing is trained. Any release with a head of the 1000 classes will do, finetuned here or imported; of another head the
classes must cover those that have pictures. Scores, all shares of pictures (recipes 9.6):

    top1                            imagenet1k, V2, Sketch; A and R among their 200 classes; ObjectNet, convention b
    centre-occlusion                top-1 on imagenet1k with the centre of each picture painted over
    real/top1                       right if any of ReaL's labels
    objectnet/a  objectnet/b        among the outputs of its 113 classes; among all, where others are wrong
    aupr                            ImageNet-O against the validation pictures of its 200 classes
    corruption/NAME/SEVERITY  corruption/NAME  ce/NAME  mean-error  mce       errors: lower is better
    size/top1  location/top1  rotation/top1                                   SI-Score
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from data_pipeline.errors import DataError, UsageError
from eval.base import EvaluatorConfig, File, Score
from eval.classifier import Classifier, load_classifier
from eval.correct import packed
from eval.datasets import Dataset
from eval.features import Encoder
from eval.published.sets import Sets
from eval.robust.ask import answers
from eval.robust.corruption_error import CorruptionErrors, corruption_errors
from eval.robust.detection import anomaly, average_precision
from eval.robust.head_classes import head_outputs, imagenet
from eval.robust.mappings import alexnet_errors
from eval.robust.parts import grouped
from eval.robust.questions import Question, question
from eval.robust.top1 import chance, predictions, right
from eval.robust.views import FILLS, bordered, occluded
from eval.sources.source import some

log = logging.getLogger(__name__)

PLAIN: Final = ("imagenet1k", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-real")
SETS: Final = (*PLAIN, "imagenet-o", "imagenet-c", "corrupted", "objectnet", "si-score")
KNOWN: Final = "imagenet1k:val"  # whose pictures ImageNet-O's are told from
LOWER: Final = {"better": "lower"}


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    occlusion: int = 112  # pixels of 224; suggested: the papers do not give the size (recipes 9.6)
    """Side of the square painted over in the centre, for a picture of 224 pixels; 0: no centre occlusion."""
    occlusion_fill: str = "black"  # "zeroes the centre patch" (LC-MAE, 5.1) of the picture: pixels of 0
    """black: pixels of 0; mean: the mean colour, which is 0 after normalisation."""
    border: int = 2  # pixels (imagenet-testbed, objectnet.py)
    """Cut off each side of ObjectNet's pictures, which have a red frame."""
    resize_corrupted: bool = False
    """Resize ImageNet-C's pictures as the release does. They are published at 224 pixels, and its authors only crop
    (hendrycks/robustness, test.py): without this they are resized to the model's size, which at 224 changes nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.occlusion <= 224:
            raise ValueError("occlusion must be 0 to 224 pixels")
        if self.occlusion_fill not in FILLS:
            raise ValueError(f"occlusion_fill must be {' or '.join(FILLS)}")
        if self.border < 0:
            raise ValueError("border must be 0 or more pixels")


@dataclass(frozen=True)
class Asked:
    """One data set with what it asks of the head, and what its scores say of it."""

    encode: Encoder
    classifier: Classifier
    dataset: Dataset
    question: Question
    reference: str  # NAME:SPLIT
    facts: dict[str, Any]

    def right(self, asked: Tensor | None, accepted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whether each picture that can be read is answered right (N), and its position (N)."""
        device_asked = None if asked is None else asked.to(self.encode.device)
        rule = partial(predictions, asked=device_asked)
        predicted, rows = answers(self.encode, self.classifier, self.dataset, rule)
        return right(predicted, (self.question.accepted if accepted is None else accepted)[rows]), rows

    def score(self, metric: str, value: float, n: int, unread: int = 0, **facts: Any) -> Score:
        """Where pictures could not be read, it is on a part of the set."""
        facts = self.facts | facts
        if unread:
            facts |= {"complete": False, "published": {"data": facts["published"]["data"] | {"whole": False}}}
        return Score(metric, value, n, dataset=self.reference, facts=facts)

    def top1(self, metric: str, asked: Tensor | None, **facts: Any) -> Score:
        hits, rows = self.right(asked)
        size = self.question.outputs if asked is None else len(asked)
        by_chance = chance(self.question.accepted[rows], size)
        facts |= {"chance": by_chance, "asked_outputs": size}
        unread = len(self.dataset) - len(hits)
        found = self.score(metric, hits.double().mean().item(), len(hits), unread, **facts)
        return found._replace(right=packed(hits))


class Robustness:
    data: ClassVar[str] = "published"
    needs_train: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False

    def __init__(self, cfg: Config, data: Sets, seed: int) -> None:
        names = {reference: published.name for reference, published in data.published.items()}
        if strange := [name for name in names.values() if name not in SETS]:
            raise UsageError(f"robustness has no rule for {some(strange)}; it scores {', '.join(SETS)}")
        if "imagenet-o" in names.values() and KNOWN not in data.sets:
            raise UsageError(
                "imagenet-o asks whether its pictures are told from those of known classes: give the validation set as "
                "well, as in --data imagenet-o=… imagenet1k=/data/imagenet"
            )
        self.cfg, self.sets, self.names = cfg, data, names

    def run(self, encode: Encoder) -> Iterator[Score | File]:
        classifier = load_classifier(encode)
        of_imagenet = head_outputs(imagenet(), classifier)
        asked = {name: self._ask(encode, classifier, of_imagenet, name) for name in self.sets.sets}
        for reference, one in asked.items():
            yield from self._rule(reference)(one)

    def _ask(self, encode: Encoder, classifier: Classifier, of_imagenet: dict[int, int], reference: str) -> Asked:
        """Refuses a head that does not fit before any picture is decoded."""
        name, dataset, classes = self.names[reference], self.sets.sets[reference], self.sets.classes[reference]
        asks = question(name, dataset, classes, classifier, of_imagenet)
        whole = self.sets.whole[reference]
        facts = {
            "protocol": name,
            "published": {"data": {"name": name, "split": self.sets.splits[reference], "whole": whole}},
            "complete": whole,
            "num_classes": len(classes),
            "head_outputs": classifier.classes,
            "unknown_classes": asks.unknown,
        }
        return Asked(encode, classifier, dataset, asks, reference, facts)

    def _rule(self, reference: str) -> Callable[[Asked], Iterator[Score]]:
        name = self.names[reference]
        own = {
            "imagenet1k": self._imagenet, "imagenet-real": self._real, "imagenet-o": self._unknown_objects,
            "imagenet-c": self._corruptions, "corrupted": self._corruptions, "objectnet": self._objectnet,
            "si-score": self._factors,
        }  # fmt: skip
        return own.get(name, self._plain)

    # ----------------------------------------------------------------------------------------------------------- rules

    def _plain(self, one: Asked) -> Iterator[Score]:
        yield one.top1("top1", one.question.asked)

    def _real(self, one: Asked) -> Iterator[Score]:
        yield one.top1("real/top1", None)

    def _imagenet(self, one: Asked) -> Iterator[Score]:
        yield from self._plain(one)
        if self.cfg.occlusion:
            view = occluded(one.encode.preprocess, self.cfg.occlusion, self.cfg.occlusion_fill)
            yield seen(one, view).top1("centre-occlusion", None, protocol="centre-occlusion", preprocess=view.to_json())

    def _objectnet(self, one: Asked) -> Iterator[Score]:
        view = bordered(one.encode.preprocess, self.cfg.border)
        one = seen(one, view)
        among_all = one.top1("objectnet/b", None, preprocess=view.to_json(), convention="b: among all outputs")
        yield among_all._replace(metric="top1")  # the stricter one
        yield among_all
        convention = "a: among the outputs of its classes"
        yield one.top1("objectnet/a", one.question.own, preprocess=view.to_json(), convention=convention)

    def _factors(self, one: Asked) -> Iterator[Score]:
        """SI-Score: each factor is a set of its own."""
        published = self.sets.published[one.reference]
        for factor, rows in grouped(one.dataset, 1).items():
            expected = published.split(self.sets.splits[one.reference]).options["images"].get(factor)
            whole = len(rows) == expected
            known = {"data": {"name": f"si-score-{factor}", "split": "test", "whole": whole}}
            yield section(one, rows, factor).top1(f"{factor}/top1", None, published=known, complete=whole)

    def _unknown_objects(self, one: Asked) -> Iterator[Score]:
        """ImageNet-O: positives are its pictures, negatives the validation pictures of its 200 classes."""
        known = self.sets.sets[KNOWN]
        rule = partial(anomaly, asked=one.question.own.to(one.encode.device))
        strangers, _ = answers(one.encode, one.classifier, one.dataset, rule)
        every, rows = answers(one.encode, one.classifier, known, rule)
        friends = every[torch.isin(torch.from_numpy(known.labels)[rows], torch.tensor(self._validation_labels(one)))]
        if not len(friends):
            raise DataError(f"{KNOWN} has no pictures of the classes of imagenet-o to tell its pictures from")
        positive = torch.cat([torch.ones(len(strangers)), torch.zeros(len(friends))]).bool()
        share = positive.double().mean().item()
        facts = {"known_pictures": len(friends), "chance": share, "known_sha256": known.sha256}
        complete = self.sets.whole[one.reference] and self.sets.whole[KNOWN]
        known_as = one.facts["published"]["data"] | {"whole": complete}
        value = average_precision(torch.cat([strangers, friends]), positive)
        unread = len(one.dataset) - len(strangers) + len(known) - len(every)
        facts |= {"published": {"data": known_as}, "complete": complete}
        yield one.score("aupr", value, len(positive), unread, **facts)

    def _validation_labels(self, one: Asked) -> list[int]:
        """The set's classes as class numbers of the validation set."""
        classes = self.sets.classes[one.reference]
        wnids = [classes.name(label) for label in range(len(classes))]
        return [number for number in self.sets.classes[KNOWN].numbers(wnids) if number is not None]

    def _corruptions(self, one: Asked) -> Iterator[Score]:
        is_published = self.names[one.reference] == "imagenet-c"
        facts: dict[str, Any] = dict(LOWER)
        if is_published and not self.cfg.resize_corrupted:
            view = dataclasses.replace(one.encode.preprocess, resize=0)
            one, facts = seen(one, view), facts | {"preprocess": view.to_json()}
        errors: dict[str, dict[int, float]] = {}
        counts: Counter[str] = Counter()
        unread: Counter[str] = Counter()
        for name, rows in grouped(one.dataset, 2).items():
            corruption, severity = name.split("/")
            hits, _ = section(one, rows, name.replace("/", "-")).right(None)
            errors.setdefault(corruption, {})[int(severity)] = error = 1 - hits.double().mean().item()
            counts[corruption] += len(hits)
            unread[corruption] += len(rows) - len(hits)
            yield one.score(f"corruption/{name}", error, len(hits), len(rows) - len(hits), **facts)
        found = corruption_errors(errors, alexnet_errors() if is_published else {})
        yield from self._means(one, found, counts, unread, facts)

    def _means(
        self, one: Asked, found: CorruptionErrors, counts: Counter[str], unread: Counter[str], facts: dict[str, Any]
    ) -> Iterator[Score]:
        is_published = self.names[one.reference] == "imagenet-c"
        for name, value in found.mean.items():
            yield one.score(f"corruption/{name}", value, counts[name], unread[name], **facts)
        for name, value in found.normalised.items():
            yield one.score(f"ce/{name}", value, counts[name], unread[name], **facts)
        names = alexnet_errors() if is_published else counts
        n, lost = sum(counts[name] for name in names), sum(unread[name] for name in names)
        if not is_published:
            yield one.score("mean-error", fmean(found.mean.values()), n, lost, **facts)
        elif found.mce is None or found.mean_error is None:
            log.warning(
                "warning: %s lacks %d of its 75 folders (%s): no mean corruption error; the others are scored",
                one.reference, len(found.missing), some(found.missing),
            )  # fmt: skip
        else:
            yield one.score("mean-error", found.mean_error, n, lost, **facts)
            yield one.score("mce", found.mce, n, lost, **facts)


def seen(one: Asked, view: Any) -> Asked:
    """The same with pictures seen in another way; the cache keeps them apart."""
    return dataclasses.replace(one, encode=dataclasses.replace(one.encode, preprocess=view))


def section(one: Asked, rows: list[int], name: str) -> Asked:
    """A part of the pictures."""
    dataset = one.dataset.part(rows, name=f"{one.dataset.name}-{name}", left_out={})
    asks = dataclasses.replace(one.question, accepted=one.question.accepted[rows])
    return dataclasses.replace(one, dataset=dataset, question=asks)
