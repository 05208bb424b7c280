r"""Evaluator occlusion: how much a classifier loses when the centre of every picture is painted over.

    python -m eval occlusion --run runs/finetune \
        --data demo/emoji/eval-emojione.parquet --classes demo/emoji/classes.json

For labelled data of any kind; `top1` of the pictures as they are and `centre-occlusion`, the same with a square in the
centre painted over. The head's outputs must cover the classes that have pictures, in whatever order. On ImageNet-1k's
validation pictures this is LC-MAE's centre occlusion (recipes 9.6), which `python -m eval robustness` scores as well.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from eval.base import EvaluatorConfig, File, Score
from eval.classifier import load_classifier
from eval.correct import packed
from eval.datasets import Data
from eval.features import Encoder
from eval.robust.ask import answers
from eval.robust.head_classes import head_outputs, refuse_unknown
from eval.robust.top1 import padded, predictions, right
from eval.robust.views import FILLS, occluded

PROTOCOL = "centre-occlusion"


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    side: int = 112  # pixels of 224; suggested: the papers do not give the size (recipes 9.6)
    """Of the square, for a picture of 224 pixels; it grows with the model's pictures."""
    fill: str = "black"  # "zeroes the centre patch" (LC-MAE, 5.1) of the picture: pixels of 0
    """black: pixels of 0; mean: the mean colour, which is 0 after normalisation."""

    def __post_init__(self) -> None:
        if not 0 < self.side <= 224:
            raise ValueError("side must be 1 to 224 pixels")
        if self.fill not in FILLS:
            raise ValueError(f"fill must be {' or '.join(FILLS)}")


class Occlusion:
    needs_train: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False

    def __init__(self, cfg: Config, data: Data, seed: int) -> None:
        self.cfg, self.data = cfg, data

    def run(self, encode: Encoder) -> Iterator[Score | File]:
        classifier = load_classifier(encode)
        classes, test = self.data.classes, self.data.test
        outputs = head_outputs(classes, classifier)
        seen = np.unique(test.labels).tolist()
        refuse_unknown((classes.name(label) for label in seen if label not in outputs), classes.source, classifier)
        table = padded([[outputs[label]] if label in outputs else [] for label in range(len(classes))])
        accepted = table[torch.from_numpy(test.labels)]
        view = occluded(encode.preprocess, self.cfg.side, self.cfg.fill)
        for metric, own in (("top1", encode), (PROTOCOL, dataclasses.replace(encode, preprocess=view))):
            predicted, rows = answers(own, classifier, test, partial(predictions, asked=None))
            hits = right(predicted, accepted[rows])
            facts = {"protocol": PROTOCOL, "preprocess": own.preprocess.to_json(), "chance": 1 / classifier.classes}
            yield Score(metric, hits.double().mean().item(), len(hits), facts=facts, right=packed(hits))
