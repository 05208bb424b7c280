r"""Evaluator zeroshot: classify by the names of the classes alone, with the text tower of a LiT run.

    python -m eval zeroshot --run runs/demo/lit \
        --data demo/emoji/eval-emojione.parquet --classes demo/emoji/classes.json
    python -m eval zeroshot --run RUN --data imagenet/val --classes imagenet1k --language it

The score of an image is its cosine with the class (class_embeddings.py), without the logit scale. Beside top-1, top-5
and the mean per class there is what was taken for what (confusion.py) and, where classes have synsets, how far off the
mistakes are in WordNet (hierarchy.py). Letters: E joint width, B images, S classes.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from data_pipeline.errors import UsageError
from eval.base import EvaluatorConfig, File, Score
from eval.class_embeddings import class_embeddings
from eval.confusion import confusion
from eval.datasets import Data
from eval.features import Encoder, extract
from eval.hierarchy import hierarchy_scores
from eval.metrics import classification
from eval.templates import AUTO, templates_for

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    templates: str = AUTO
    """A bundled set (eval/prompts/) or a file; auto: those that come with the classes, else default. --templates sets
    it."""


class Zeroshot:
    needs_train: ClassVar[bool] = False
    needs_text: ClassVar[bool] = True

    def __init__(self, cfg: Config, data: Data, seed: int) -> None:
        if not data.classes.named:
            raise UsageError(
                "zeroshot classifies by the names of the classes; give them with --classes classes.json, or one of "
                "the sets that `python -m eval classes` lists"
            )
        self.data = data
        self.templates = templates_for(data.classes, cfg.templates)

    def run(self, encode: Encoder) -> Iterator[Score | File]:
        classes, texts = self.data.classes, len(self.templates.texts)
        log.info("templates: %d, %s; language: %s", texts, self.templates.name, classes.language)
        classifier = class_embeddings(encode, classes, self.templates)  # S E; first: it may refuse
        test = extract(encode, self.data.test, "joint")
        scores = test.features @ classifier.T  # B S
        found = classification(scores, test.labels)
        if any(classes.synsets):
            found |= hierarchy_scores(scores, test.labels, classes)
        chosen = {"templates": self.templates.name, "language": classes.language}
        hashes = {"templates": self.templates.sha256}
        for metric, value in found.items():
            yield Score(metric, value, len(test), chosen=chosen, hashes=hashes)
        name = f"{classes.sha256[:8]}-{self.data.test.sha256[:8]}"
        yield File(f"confusion/zeroshot-{name}.json", confusion(scores, test.labels, classes))
