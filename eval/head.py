"""Zero-shot from the head of a WSP run: its posterior of a class's synsets, divided by their prior. No text tower.

    scores = head_scores(features, release, classes)            # B S, higher is better

    score = log Σ p(s | image) - τ log Σ p(s)        both sums over the vocabulary's synsets of the class

The head learned from tags as frequent as they are: p(s | image) is proportional to p(image | s) p(s), and an evaluation
set's classes are about equally frequent, so the prior is divided out (Platt-like; log-odds against a prior, and with a
τ as in Menon et al., 2021, "Long-tail learning via logit adjustment"). p(s | image) is the head's softmax, or the
sigmoid of a head that was trained with it: the sum is then the expected number of the class's tags.

Letters: B images, D width, S classes, V synsets of the vocabulary, M outputs that belong to a class.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import UsageError
from data_pipeline.shardset import VocabularyEntry
from eval.classes import Classes
from eval.metrics import NEVER
from eval.synset_match import FILE, Match, match_classes, read_vocabulary
from maws.checkpoint import CheckpointError
from maws.objectives.multi_label import Head
from maws.release import Release, read_weights

PRIORS = ("counts", "mean")
MOST_SCORES = 2**22  # of a batch of rows: 16 MiB of float32 and a few times that; ours


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How posteriors become scores."""

    tau: float = 1.0  # of the prior: 0 leaves it in
    temperature: float = 1.0  # the head's scores are divided by it first
    prior: str = "counts"  # images per synset in training; or mean: of the posterior over the pictures themselves

    def __post_init__(self) -> None:
        if self.prior not in PRIORS:
            raise ValueError(f"prior must be {' or '.join(PRIORS)}")
        if self.temperature <= 0:
            raise ValueError("temperature must be above 0")


def head_scores(
    features: Tensor, release: Release, classes: Classes, settings: Settings | None = None,
    matches: Sequence[Match] | None = None,
) -> Tensor:  # fmt: skip
    """B S of pooled features B D, on their device. Raises CheckpointError for a release without head and vocabulary,
    UsageError when no class has a synset in the vocabulary.
    """
    settings = settings or Settings()
    head, vocabulary = load_head(release).to(features.device), release_vocabulary(release)
    matches = match_classes(classes, vocabulary) if matches is None else matches
    refuse_strangers(matches, classes, release)
    groups = Groups(matches, features.device)
    batches = posteriors(head, features, release.config.get("loss", "softmax"), settings.temperature)
    posterior = torch.cat([groups.logsumexp(batch) for batch in batches])  # B S
    return groups.fill(posterior - settings.tau * prior(posterior, groups, vocabulary, settings))


def prior(posterior: Tensor, groups: "Groups", vocabulary: Sequence[VocabularyEntry], settings: Settings) -> Tensor:
    """Log of each class's share (S): of the training images' tags, or of the posterior over the images at hand."""
    if settings.prior == "mean":
        return posterior.logsumexp(dim=0) - torch.tensor(len(posterior)).log()
    images = torch.tensor([max(1, entry.count) for entry in vocabulary], dtype=torch.float64)
    return groups.logsumexp((images / images.sum()).log().float()[None].to(posterior.device))[0]


@torch.no_grad()
def posteriors(head: Head, features: Tensor, loss: str, temperature: float) -> Iterator[Tensor]:
    """Log p(s | image), some rows at a time (b V): all of B V would be hundreds of gigabytes for a large set."""
    rows = max(1, MOST_SCORES // head[-1].out_features)  # type: ignore[union-attr, operator]
    for batch in features.split(rows):
        scores = head(batch).float() / temperature
        yield scores.log_softmax(dim=1) if loss == "softmax" else torch.nn.functional.logsigmoid(scores)


class Groups:
    """Which outputs belong to which class, for sums over them."""

    def __init__(self, matches: Sequence[Match], device: torch.device) -> None:
        self.classes = len(matches)
        self.outputs = torch.tensor([i for match in matches for i in match.indices], device=device)  # M
        of = [match.label for match in matches for _ in match.indices]
        self.of = torch.tensor(of, device=device)  # M, the class of each
        self.empty = torch.tensor([not match.indices for match in matches], device=device)  # S

    def logsumexp(self, values: Tensor) -> Tensor:
        """Of the outputs of each class; B V -> B S, 0 for a class without."""
        values, of = values[:, self.outputs], self.of.expand(len(values), -1)  # B M
        top = values.new_full((len(values), self.classes), -torch.inf).scatter_reduce(1, of, values, "amax")
        top = top.masked_fill(self.empty, 0.0)
        sums = torch.zeros_like(top).scatter_add(1, of, (values - top.gather(1, of)).exp())
        return top + sums.masked_fill(self.empty, 1.0).log()

    def fill(self, scores: Tensor) -> Tensor:
        """B S with the classes that have no outputs out of the running."""
        return scores.masked_fill(self.empty, NEVER)


def load_head(release: Release) -> Head:
    """The head of a WSP release, as it was trained. Raises CheckpointError for a release without."""
    config, weights = release.config, read_weights(release, r"head\..*")
    if not weights or "head" not in config:
        raise CheckpointError(
            f"{release.folder} is a {' → '.join(release.lineage)} release without a head over synsets; zero-shot from "
            f"the head needs the release of a wsp run, and a lit run is asked by name: python -m eval zeroshot"
        )
    head = Head(release.shape.width, config["classes"], config["head"], config.get("loss", "softmax"))
    try:
        head.load_state_dict({name.removeprefix("head."): value for name, value in weights.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{release.weights} does not fit its config.json: {error}") from None
    return head.float().eval().requires_grad_(False)


def release_vocabulary(release: Release) -> list[VocabularyEntry]:
    """What the head's outputs mean. Raises CheckpointError when the release lacks it or it is another's."""
    file = release.folder / FILE
    if not file.is_file():
        raise CheckpointError(f"{release.folder} has no {FILE}, so nobody knows what its head's outputs mean")
    vocabulary = read_vocabulary(file)
    if len(vocabulary) != release.config["classes"]:
        raise CheckpointError(
            f"{file} has {len(vocabulary):,} synsets and the head {release.config['classes']:,} outputs; "
            f"use the {FILE} that the run was trained with"
        )
    return vocabulary


def refuse_strangers(matches: Sequence[Match], classes: Classes, release: Release) -> None:
    if not any(match.indices for match in matches):
        raise UsageError(
            f"none of the {len(classes)} classes of {classes.source} is a synset of the vocabulary of "
            f"{release.folder}, nor above or below one; give the classes their 'synset' or English names"
        )
