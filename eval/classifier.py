"""The head of a finetuned classifier on cached features: scores of pictures without another pass of the tower.

    classifier = load_classifier(encode)                    # of a finetuned or an imported release
    found = logits(encode, classifier, data.test)           # found.features N S: a score of every class

What the outputs mean is told by the release's vocabulary.parquet; a release without one whose head has 1000 outputs is
taken for an ImageNet-1k classifier in the order of its wnids, as all published ones are.

Letters: N and B images, D width, S classes.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from eval.classes import Classes, read_classes
from eval.datasets import Dataset
from eval.features import Encoder, Features, extract
from eval.synset_match import FILE, read_vocabulary
from maws.checkpoint import CheckpointError
from maws.interop.outgoing import linear_head
from maws.release import Release
from maws.weight_files import WeightFiles

IMAGENET = "imagenet1k"  # eval/prompts/


@dataclass(frozen=True)
class Classifier:
    """A linear head, and what its outputs mean as far as that is known."""

    weight: Tensor  # S D, float32
    bias: Tensor  # S
    names: tuple[str, ...]  # one for each output
    wnids: tuple[str | None, ...]
    spellings: tuple[frozenset[str], ...]  # every name of each output; none where nobody knows what it means

    @property
    def classes(self) -> int:
        return len(self.bias)

    def head_logits(self, features: Tensor) -> Tensor:
        """Pooled features B D to scores B S, on the features' device."""
        return F.linear(features.float(), self.weight.to(features.device), self.bias.to(features.device))


def load_classifier(encode: Encoder) -> Classifier:
    """The head of the encoder's release. Raises CheckpointError for one without, or one that is not of one layer."""
    release = encode.release
    if release is None:
        raise CheckpointError("this encoder comes from no release, so it has no classifier's head")
    weight, bias = _head(release)
    file = release.folder / FILE
    if file.is_file():
        return _named_by_vocabulary(weight, bias, file)
    if len(bias) == 1000:
        return _named_by_classes(weight, bias, read_classes(IMAGENET))
    unknown = tuple(f"class {i}" for i in range(len(bias)))
    return Classifier(weight, bias, unknown, (None,) * len(bias), (frozenset(),) * len(bias))


def logits(encode: Encoder, classifier: Classifier, dataset: Dataset) -> Features:
    """Scores N S of a data set in the place of features, from the same cache."""
    found = extract(encode, dataset)
    return dataclasses.replace(found, features=classifier.head_logits(found.features))


def _head(release: Release) -> tuple[Tensor, Tensor]:
    """Weight S D and bias S."""
    chain = " → ".join(release.lineage)
    if "head" in release.config:
        raise CheckpointError(
            f"{release.folder} is a {chain} release, whose head predicts synsets of captions and not the classes of a "
            f"labelled set; ask it with python -m eval wsphead, or finetune it: "
            f"deepspeed maws/train.py --stage finetune --init-from {release.folder.parent} …"
        )
    with WeightFiles(release.weights) as files:
        names = linear_head(release, files)
        if not names or "classes" not in release.config:
            raise CheckpointError(
                f"{release.folder} is a {chain} release without a classifier's head; finetune it on a labelled set "
                f"(deepspeed maws/train.py --stage finetune --init-from {release.folder.parent} …), or probe its "
                f"features: python -m eval linear"
            )
        weight, bias = (files.read(names[part]).float() for part in ("weight", "bias"))
    expected = release.config["classes"], release.shape.width
    if tuple(weight.shape) != expected or tuple(bias.shape) != expected[:1]:
        raise CheckpointError(
            f"{release.weights} has a head of {tuple(weight.shape)} and {tuple(bias.shape)}, its config.json says "
            f"{expected[0]} classes and width {expected[1]}; the release is damaged"
        )
    return weight, bias


def _named_by_vocabulary(weight: Tensor, bias: Tensor, file: Path) -> Classifier:
    entries = read_vocabulary(file)
    if len(entries) != len(bias):
        raise CheckpointError(
            f"{file} has {len(entries):,} classes and the head {len(bias):,} outputs; "
            f"use the {FILE} that the run was trained with"
        )
    names = tuple((entry.lemmas[0] if entry.lemmas else entry.synset).replace("_", " ") for entry in entries)
    wnids = tuple(entry.wnid or None for entry in entries)
    spellings = (frozenset(map(folded, (*e.lemmas, e.synset, e.wnid))) - {""} for e in entries)
    return Classifier(weight, bias, names, wnids, tuple(spellings))


def _named_by_classes(weight: Tensor, bias: Tensor, classes: Classes) -> Classifier:
    wnids = tuple(next((f for f in folders if is_wnid(f)), None) for folders in classes.folders)
    names = tuple(classes.name(i) for i in range(len(classes)))
    return Classifier(weight, bias, names, wnids, spellings_of(classes))


def spellings_of(classes: Classes) -> tuple[frozenset[str], ...]:
    """Every name of each class: its names, synset, folders and wnid, without capitals and separators."""
    folders = classes.folders or ((),) * len(classes)
    parts = zip(classes.names, classes.synsets, folders, strict=True)
    return tuple(frozenset(map(folded, (*names, synset or "", *own))) - {""} for names, synset, own in parts)


def folded(text: str) -> str:
    """A name without capitals and separators: Golden_retriever and golden retriever are one."""
    return "".join(c for c in text.casefold() if c.isalnum())


def is_wnid(text: str) -> bool:
    return len(text) == 9 and text[0] == "n" and text[1:].isdigit()
