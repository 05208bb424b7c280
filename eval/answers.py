"""What a model says is in a picture, by what it has: a text tower, a head over synsets, or a classifier's head.

    answers = find_answers(encode, classes, templates)
    answers(encode(images, answers.kind), top=5)              # per picture: name, synset, probability, cosine

Letters: B pictures, D width, E joint width, S classes, K kept.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from data_pipeline.errors import UsageError
from eval.class_embeddings import class_embeddings
from eval.classes import Classes
from eval.features import Encoder, Kind
from eval.head import head_scores, load_head, posteriors, refuse_strangers, release_vocabulary
from eval.sources.source import some
from eval.synset_match import match_classes
from eval.templates import AUTO, templates_for
from maws.checkpoint import CheckpointError
from maws.release import read_weights

log = logging.getLogger("eval")

ROWS: Final = 256  # pictures ranked at once: 28,000 synsets of them are 29 MB

Scores = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # B D -> probabilities B S, cosines B S where there are any


class Answer(NamedTuple):
    name: str
    synset: str | None
    probability: float
    cosine: float | None  # of a text tower


@dataclass(frozen=True)
class Answers:
    """Ranks classes for pictures."""

    kind: Kind  # of features it wants
    names: tuple[str, ...]
    synsets: tuple[str | None, ...]
    scores: Scores
    about: str  # what the probabilities are, in a sentence

    def __call__(self, features: Tensor, top: int) -> list[list[Answer]]:
        """The `top` best classes of each picture; equal ones by index."""
        return [row for part in features.split(ROWS) for row in self._rank(part, top)]

    def _rank(self, features: Tensor, top: int) -> list[list[Answer]]:
        probability, cosine = self.scores(features)
        best = probability.argsort(dim=1, descending=True, stable=True)[:, :top]  # B K
        values = probability.gather(1, best).tolist()
        cosines = cosine.gather(1, best).tolist() if cosine is not None else [[None] * best.shape[1]] * len(best)
        return [
            [Answer(self.names[i], self.synsets[i], p, c) for i, p, c in zip(*columns, strict=True)]
            for columns in zip(best.tolist(), values, cosines, strict=True)
        ]


def find_answers(encode: Encoder, classes: Classes | None, templates: str | None) -> Answers:
    """The way this release has of naming things. Raises UsageError when it has none, or none for these classes."""
    assert encode.release is not None
    config, lineage = encode.release.config, " → ".join(encode.release.lineage)
    if encode.release.stage == "lit":
        if classes is None:
            raise UsageError(
                f"{encode.release.folder} is asked by the names of classes; give them with --classes "
                f'"dog, cat, …", a bundled set (imagenet1k) or a file'
            )
        return _by_text(encode, classes, templates or AUTO)
    if templates is not None:
        raise UsageError(f"--templates are sentences for a text tower, and {lineage} has none; leave them out")
    if "head" in config:
        return _by_synsets(encode) if classes is None else _by_head(encode, classes)
    if "classes" in config:
        return _by_classifier(encode, classes)
    raise UsageError(
        f"{encode.release.folder} is a {lineage} release: it has neither a text tower nor a head, so nothing in it has "
        f"a name for what a picture shows. Train a text tower on it (maws/train.py --stage lit --init-from "
        f"{encode.release.folder}), or synsets (--stage wsp), and give that run"
    )


def _by_text(encode: Encoder, classes: Classes, asked: str) -> Answers:
    templates = templates_for(classes, asked)
    classifier = class_embeddings(encode, classes, templates)  # S E
    scale = encode.two_tower.scale()

    def scores(features: Tensor) -> tuple[Tensor, Tensor]:
        cosine = features @ classifier.T  # B S
        return (scale * cosine).softmax(dim=1), cosine

    about = f"softmax of {scale.item():.1f} x cosine over {len(classes)} classes; templates: {templates.name}"
    return Answers("joint", tuple(map(classes.name, range(len(classes)))), classes.synsets, scores, about)


def _by_head(encode: Encoder, classes: Classes) -> Answers:
    """A WSP head's posterior of each class's synsets, divided by their prior; classes without a synset are left out."""
    release = encode.release
    assert release is not None
    matches = match_classes(classes, release_vocabulary(release))
    refuse_strangers(matches, classes, release)
    known = [match.label for match in matches if match.indices]
    if len(known) < len(classes):
        log.warning("warning: the head has no synset for %s", some(m.name for m in matches if not m.indices))

    def scores(features: Tensor) -> tuple[Tensor, None]:
        return head_scores(features, release, classes, matches=matches)[:, known].softmax(dim=1), None

    about = f"posterior / prior of the head's synsets, softmax over {len(known)} classes"
    synsets = tuple(matches[label].synset for label in known)
    return Answers("cls", tuple(map(classes.name, known)), synsets, scores, about)


def _by_synsets(encode: Encoder) -> Answers:
    assert encode.release is not None
    vocabulary, head = release_vocabulary(encode.release), load_head(encode.release).to(encode.device)
    loss = encode.release.config.get("loss", "softmax")

    def scores(features: Tensor) -> tuple[Tensor, None]:
        return torch.cat(list(posteriors(head, features, loss, 1.0))).exp(), None

    names = tuple(", ".join(entry.lemmas).replace("_", " ") or entry.synset for entry in vocabulary)
    about = f"{'softmax' if loss == 'softmax' else 'sigmoid'} of the head over {len(vocabulary):,} synsets"
    return Answers("cls", names, tuple(entry.synset for entry in vocabulary), scores, about)


def _by_classifier(encode: Encoder, classes: Classes | None) -> Answers:
    """A linear head over classes that the weights do not name, as finetuned classifiers are released."""
    release = encode.release
    assert release is not None
    weights, count = read_weights(release, r"head\.(weight|bias)"), release.config["classes"]
    if set(weights) != {"head.weight", "head.bias"} or len(weights["head.weight"]) != count:
        raise CheckpointError(f"{release.weights} has no head.weight and head.bias of {count} classes")
    if classes is not None and len(classes) != count:
        raise UsageError(f"{release.folder} tells {count} classes apart, and {classes.source} has {len(classes)}")
    weight, bias = (weights[f"head.{name}"].float().to(encode.device) for name in ("weight", "bias"))

    def scores(features: Tensor) -> tuple[Tensor, None]:
        return (features @ weight.T + bias).softmax(dim=1), None

    names = tuple(classes.name(i) if classes else f"class {i}" for i in range(count))
    synsets = classes.synsets if classes else (None,) * count
    unnamed = "" if classes else "; their names come with --classes, such as imagenet1k"
    return Answers("cls", names, synsets, scores, f"softmax over the classifier's {count} classes{unnamed}")
