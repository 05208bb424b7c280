r"""Evaluator finetune: how often the head of a finetuned classifier is right; nothing is trained here.

    python -m eval finetune --run runs/finetune \
        --data demo/emoji/eval-emojione.parquet --classes demo/emoji/classes.json

The release is one of `maws/train.py --stage finetune` or an imported classifier. Its outputs must be the classes of the
data, in their order. `top1`, `top5` (of more than five classes) and `mean_per_class` of the whole set.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from data_pipeline.errors import UsageError
from eval.base import EvaluatorConfig, File, Score
from eval.classes import Classes
from eval.classifier import Classifier, is_wnid, load_classifier, logits, spellings_of
from eval.correct import packed
from eval.datasets import Data
from eval.features import Encoder
from eval.metrics import classification, ranks

PROTOCOL = "finetune"


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    """Nothing to set: how pictures are seen is the release's own preprocess.json."""


class Finetune:
    needs_train: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False

    def __init__(self, cfg: Config, data: Data, seed: int) -> None:
        self.data = data

    def run(self, encode: Encoder) -> Iterator[Score | File]:
        classifier = load_classifier(encode)
        refuse_other_classes(classifier, self.data.classes)
        found = logits(encode, classifier, self.data.test)
        facts = {"protocol": PROTOCOL}
        if encode.release and (part := encode.release.config.get("trainable")):
            facts["trainable"] = part
        right = packed(ranks(found.features, found.labels) == 0)
        for metric, value in classification(found.features, found.labels).items():
            yield Score(metric, value, len(found), facts=facts, right=right if metric == "top1" else b"")


def refuse_other_classes(classifier: Classifier, classes: Classes) -> None:
    """Raises UsageError unless the head's outputs are the classes, in their order, as far as both say what they are."""
    if classifier.classes != len(classes):
        raise UsageError(
            f"the head has {classifier.classes:,} outputs and the data {len(classes):,} classes ({classes.source}): "
            f"evaluate on the data set it was finetuned for, with the --classes its shard set was written with"
        )
    if not classes.named and not all(is_wnid(classes.name(i)) for i in range(len(classes))):
        return  # numbers say nothing
    ours, theirs = spellings_of(classes), classifier.spellings
    if not all(ours) or not all(theirs):
        return
    wrong = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a.isdisjoint(b)]
    moved = [(i, j) for i in wrong if (j := _place(ours[i], theirs)) >= 0]
    if moved:
        i, j = moved[0]
        raise UsageError(
            f"the classes of the data stand in another order than the head's outputs: class {i} of {classes.source} is "
            f"'{classes.name(i)}', which is output {j} ({len(moved):,} classes are elsewhere); give --classes the file "
            f"that the shard set was written with (python -m eval shards --classes)"
        )
    if len(wrong) == len(classes):
        raise UsageError(
            f"none of the {len(classes):,} classes of {classes.source} is what the head was finetuned for: class 0 is "
            f"'{classes.name(0)}' in the data and '{classifier.names[0]}' in the release; "
            f"evaluate on the data set it was finetuned for"
        )


def _place(spellings: frozenset[str], outputs: Sequence[frozenset[str]]) -> int:
    """The output that a class is; -1 where none is, or more than one."""
    places = [j for j, own in enumerate(outputs) if not own.isdisjoint(spellings)]
    return places[0] if len(places) == 1 else -1
