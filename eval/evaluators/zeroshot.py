r"""Evaluator zeroshot: classify by the names of the classes alone, with the text tower of a LiT run.

    python -m eval zeroshot --run runs/demo/lit \
        --data demo/emoji/eval-emojione.parquet --classes demo/emoji/classes.json

Per class: all templates x all names, embedded, each l2-normalised, averaged, l2-normalised; the score of an image is
the cosine (recipes 9.3). Letters: T texts, E joint width, B images, S classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import UsageError
from eval.base import EvaluatorConfig, File, Score
from eval.classes import Classes
from eval.datasets import Data
from eval.features import Encoder, extract
from eval.metrics import classification
from eval.progress import Progress
from eval.templates import Templates, read_templates
from maws.release import load_tokenizer

TEXTS = 256  # texts encoded at once


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    templates: str = "default"
    """A bundled set (eval/prompts/) or a file; --templates sets it."""


class Zeroshot:
    needs_train: ClassVar[bool] = False
    needs_text: ClassVar[bool] = True

    def __init__(self, cfg: Config, data: Data, seed: int) -> None:
        if not data.classes.named:
            raise UsageError("zeroshot classifies by the names of the classes; give them with --classes classes.json")
        self.data = data
        self.templates = read_templates(cfg.templates)

    def run(self, encode: Encoder) -> Iterator[Score | File]:
        test = extract(encode, self.data.test, "joint")
        classifier = class_embeddings(encode, self.data.classes, self.templates)  # S E
        hashes = {"templates": self.templates.sha256}
        for metric, value in classification(test.features @ classifier.T, test.labels).items():
            yield Score(metric, value, len(test), hashes=hashes)


@torch.no_grad()
def class_embeddings(encode: Encoder, classes: Classes, templates: Templates) -> Tensor:
    """One unit vector per class, S E."""
    texts = [text for names in classes.names for name in names for text in templates(name)]
    counts = [len(names) * len(templates.texts) for names in classes.names]
    pieces = embed(encode, texts).split(counts)
    return F.normalize(torch.stack([piece.mean(dim=0) for piece in pieces]), dim=1)


def embed(encode: Encoder, texts: Sequence[str]) -> Tensor:
    """Unit vectors of texts, T E."""
    assert encode.release is not None
    tokenize = load_tokenizer(encode.release)
    pieces: list[Tensor] = []
    with Progress("texts", len(texts)) as progress:
        for start in range(0, len(texts), TEXTS):
            ids, mask = tokenize(list(texts[start : start + TEXTS]))
            pieces.append(encode.two_tower.encode_text(ids.to(encode.device), mask.to(encode.device)).float())
            progress.add(len(ids))
    return F.normalize(torch.cat(pieces), dim=1)
