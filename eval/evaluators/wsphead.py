r"""Evaluator wsphead: zero-shot from the head of a WSP run, without a text tower.

    python -m eval wsphead --run runs/demo/mae_wsp \
        --data demo/emoji/eval-emojione.parquet --classes demo/emoji/classes.json

The classes are mapped to synsets of the vocabulary that the head predicts (synset_match.py), and the score of a class
is the posterior of its synsets divided by their prior (head.py). A class that no synset stands for counts as wrong. The
mapping and what was taken for what are kept beside the results.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from data_pipeline.errors import UsageError
from eval.base import EvaluatorConfig, File, Score
from eval.confusion import confusion
from eval.datasets import Data
from eval.features import Encoder, extract
from eval.head import Settings, head_scores, release_vocabulary
from eval.hierarchy import hierarchy_scores
from eval.metrics import classification
from eval.synset_match import Match, as_text, counts, match_classes

log = logging.getLogger(__name__)

LISTED = 8  # classes named in a message


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    tau: float = 1.0
    """How much of the prior is divided out: 1 all of it, 0 nothing."""
    temperature: float = 1.0
    prior: str = "counts"
    """Images per synset in training; or mean: of the posterior over the evaluation pictures, without their labels."""
    below: bool = False
    """Let hyponyms in the vocabulary speak for a class that is in it itself: corgi and poodle for dog."""

    def __post_init__(self) -> None:
        self.settings()

    def settings(self) -> Settings:
        return Settings(tau=self.tau, temperature=self.temperature, prior=self.prior)


class Wsphead:
    needs_train: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False

    def __init__(self, cfg: Config, data: Data, seed: int) -> None:
        if not data.classes.named and not any(data.classes.synsets):
            raise UsageError("wsphead maps classes to synsets; give their names or synsets with --classes classes.json")
        self.cfg, self.data = cfg, data

    def run(self, encode: Encoder) -> Iterator[Score | File]:
        assert encode.release is not None
        classes, test = self.data.classes, self.data.test
        matches = match_classes(classes, release_vocabulary(encode.release), self.cfg.below)
        report(matches)
        features = extract(encode, test)
        scores = head_scores(features.features, encode.release, classes, self.cfg.settings(), matches)
        chosen = {"matched": counts(matches), "language": classes.language}
        name = f"{classes.sha256[:8]}-{test.sha256[:8]}"
        yield File(f"synsets/{name}.json", as_text(matches))
        yield File(f"confusion/wsphead-{name}.json", confusion(scores, features.labels, classes))
        for metric, value in classification(scores, features.labels).items():
            yield Score(metric, value, len(features), chosen=chosen)
        for metric, value in hierarchy_scores(scores, features.labels, classes).items():
            yield Score(metric, value, len(features), chosen=chosen)


def report(matches: list[Match]) -> None:
    """How the classes were mapped, and which could not be."""
    listed = ", ".join(f"{count} {matched}" for matched, count in counts(matches).items() if count)
    log.info("classes as synsets of the vocabulary: %s", listed)
    if strangers := [match.name for match in matches if not match.indices]:
        more = f" and {len(strangers) - LISTED} more" if len(strangers) > LISTED else ""
        log.warning("warning: no synset stands for %s%s; they count as wrong", ", ".join(strangers[:LISTED]), more)
