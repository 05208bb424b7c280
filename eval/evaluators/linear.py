"""Evaluator linear: a linear classifier on frozen features, by one or several protocols.

    python -m eval linear --run runs/demo/mae_wsp --train demo/emoji --data demo/emoji/eval-emojione.parquet
    python -m eval linear … --set linear.protocol=mae,wsp linear.features=cls,mean linear.mae.batch=256

logistic  features of one centre view are extracted once; multinomial logistic regression by L-BFGS. Standardising
          stands for the batch norm of MAE's probe; there are no augmented views, so it is no published protocol, and
          its difference from one on ImageNet is not measured
mae       MAE's probe: batch norm without parameters, LARS, 90 epochs of random crops (recipes 9.1)
wsp       SWAG's settings: SGD, 28 epochs of random crops; all rates learn side by side in one pass of the trunk
ridge     closed form, in seconds: a smoke test (recipes 9.2)

Scores of `logistic` have plain names (top1), those of others begin with the protocol (mae/top1); of features that are
asked for by name, with the name (cls/top1, mae/mean/top1). Whatever is chosen (l2, the rate) is chosen on images held
out from the training data, never on the evaluation data.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, NamedTuple, cast

import torch
from torch import Tensor

from data_pipeline.errors import UsageError
from eval import logistic, mae_probe, ridge, wsp_probe
from eval.base import EvaluatorConfig, File, Score
from eval.correct import packed
from eval.datasets import Data, check_classes
from eval.features import Encoder, Features, Kind, extract
from eval.held_out import Choice as Choice
from eval.held_out import choose_l2 as choose_l2
from eval.held_out import hold_out as hold_out
from eval.held_out import positions_in_class as positions_in_class
from eval.mae_probe import MaeConfig
from eval.metrics import classification, ranks
from eval.probes import Learnt, Task
from eval.wsp_probe import WspConfig
from maws.config import to_json
from maws.data.transforms import Preprocess

PROTOCOLS: Final = ("logistic", "mae", "wsp", "ridge")
KINDS: Final = ("pooled", "cls", "mean", "mean_norm")


@dataclass(frozen=True, kw_only=True)
class RidgeConfig:
    """big_vision's few-shot evaluation (recipes 9.2)."""

    l2: float = ridge.L2
    bias: float = ridge.BIAS


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    protocol: tuple[str, ...] = ("logistic",)
    """Of logistic, mae, wsp, ridge."""
    features: tuple[str, ...] = ("pooled",)
    """pooled (what the tower was trained with), cls, mean."""
    l2: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    """logistic: strengths to choose from (recipes 9.2); one is used as it is. Relative to the mean loss of an image."""
    held_out: float = 0.2
    """Share of the training images of every class, at least one of a class with two, on which l2 or lr is chosen."""
    iterations: int = 100
    """logistic: of L-BFGS for the final fit, which starts from the best solution of the search."""
    tolerance: float = 1e-4
    """logistic: the fit ends when no entry of the gradient is larger (scikit-learn's default)."""
    search_iterations: int = 10
    """logistic: for each strength tried, starting from the solution of the stronger one."""
    search_images: int = 10_000
    """logistic: l2 is chosen on so many of a larger set, a share of every class, with the same l2 times images."""
    mae: MaeConfig = field(default_factory=MaeConfig)
    wsp: WspConfig = field(default_factory=WspConfig)
    ridge: RidgeConfig = field(default_factory=RidgeConfig)

    def __post_init__(self) -> None:
        for what, asked, known in (("protocol", self.protocol, PROTOCOLS), ("features", self.features, KINDS)):
            if not asked or set(asked) - set(known):
                raise ValueError(f"{what} must be one or more of {', '.join(known)}")
        if not self.l2 or min(self.l2) < 0 or self.ridge.l2 <= 0:
            raise ValueError("l2 must be one or more numbers from 0, and ridge.l2 above 0")
        if not 0 < self.held_out < 1:
            raise ValueError("held_out must be between 0 and 1")
        if min(self.iterations, self.search_iterations, self.search_images) < 1:
            raise ValueError("iterations, search_iterations and search_images must be 1 or more")


class Result(NamedTuple):
    """What a protocol gives for one kind of features."""

    head: Callable[[Tensor], Tensor]  # N D -> N S
    test: Features
    chosen: dict[str, Any]
    facts: dict[str, Any]


class Linear:
    needs_train: ClassVar[bool] = True
    needs_text: ClassVar[bool] = False

    def __init__(self, cfg: Config, data: Data, seed: int) -> None:
        self.cfg, self.data, self.seed = cfg, data, seed
        self.classes = len(data.classes)
        if not 0 <= cfg.mae.warmup < cfg.mae.epochs and "mae" in cfg.protocol:
            raise UsageError(
                f"linear.mae.warmup={cfg.mae.warmup} leaves nothing of linear.mae.epochs={cfg.mae.epochs}; "
                f"set linear.mae.warmup={cfg.mae.epochs // 9}"
            )

    def run(self, encode: Encoder) -> Iterator[Score | File]:
        protocols = {"logistic": self._logistic, "mae": self._mae, "wsp": self._wsp, "ridge": self._ridge}
        kinds = cast(tuple[Kind, ...], tuple(dict.fromkeys(self.cfg.features)))
        for kind in kinds:
            encode.own(kind)
        for protocol in dict.fromkeys(self.cfg.protocol):
            for kind, result in protocols[protocol](encode, kinds):
                name = f"{protocol}/" * (protocol != "logistic") + f"{kind}/" * (kind != "pooled")
                yield from self._scores(name, result, {"protocol": f"linear/{protocol}", "features": encode.own(kind)})

    def _scores(self, name: str, result: Result, facts: dict[str, Any]) -> Iterator[Score]:
        test = result.test
        scores = torch.cat([result.head(query) for query, _ in test.split(4096)])  # N S
        right = packed(ranks(scores, test.labels) == 0)
        for metric, value in classification(scores, test.labels).items():
            bits = right if metric == "top1" else b""
            yield Score(name + metric, value, len(test), chosen=result.chosen, facts=facts | result.facts, right=bits)

    def _sets(self, encode: Encoder, kind: Kind) -> tuple[Features, Features]:
        """Training and evaluation data as the encoder sees them."""
        assert self.data.train is not None
        learn, test = extract(encode, self.data.train, kind), extract(encode, self.data.test, kind)
        check_classes(self.data, test.labels.cpu().numpy(), learn.labels.cpu().numpy())
        return learn, test

    # ----------------------------------------------------------------------------------------------- on cached features

    def _logistic(self, encode: Encoder, kinds: Sequence[Kind]) -> Iterator[tuple[Kind, Result]]:
        for kind in kinds:
            learn, test = self._sets(encode, kind)
            head, chosen = self.fitted(learn.features, learn.labels)
            yield kind, Result(head, test, chosen, {})

    def fitted(self, features: Tensor, labels: Tensor) -> tuple[logistic.LinearHead, dict[str, Any]]:
        """The classifier of `logistic` on features N D, and what was chosen for it."""
        choice, images = self._search(features, labels)
        options = {"start": choice.head, "iterations": self.cfg.iterations, "tolerance": self.cfg.tolerance}
        head = logistic.fit(features, labels, self.classes, choice.l2, **options)
        return head, {"l2": choice.l2, **images, "held_out_top1": choice.top1}

    def _search(self, features: Tensor, labels: Tensor) -> tuple[Choice, dict[str, int]]:
        """A strength chosen on part of the training images, and how many those are."""
        part = torch.ones_like(labels, dtype=torch.bool)
        if len(labels) > self.cfg.search_images:
            part = hold_out(labels, self.cfg.search_images / len(labels), self.seed)
        held = hold_out(labels[part], self.cfg.held_out, self.seed)
        # What is learnt from fewer images is held back by the same penalty, beside the sum of their losses.
        strengths = {l2 * len(labels) / max(1, int(part.sum())): l2 for l2 in self.cfg.l2}
        found = choose_l2(
            features[part], labels[part], held, self.classes, list(strengths), self.cfg.search_iterations,
            self.cfg.tolerance,
        )  # fmt: skip
        count = {"search_images": int(part.sum()), "held_out_images": int(held.sum())}
        return found._replace(l2=strengths[found.l2]), count

    def _ridge(self, encode: Encoder, kinds: Sequence[Kind]) -> Iterator[tuple[Kind, Result]]:
        cfg = self.cfg.ridge
        for kind in kinds:
            learn, test = self._sets(encode, kind)
            head = ridge.fit(learn.features, learn.labels, self.classes, cfg.l2, cfg.bias)
            yield kind, Result(head, test, {}, {"l2": cfg.l2})

    # ----------------------------------------------------------------------------------------------- on augmented views

    def _mae(self, encode: Encoder, kinds: Sequence[Kind]) -> Iterator[tuple[Kind, Result]]:
        yield from self._on_views(encode, kinds, self.cfg.mae.resize, lambda task: mae_probe.run(task, self.cfg.mae))

    def _wsp(self, encode: Encoder, kinds: Sequence[Kind]) -> Iterator[tuple[Kind, Result]]:
        cfg = self.cfg
        yield from self._on_views(
            encode, kinds, cfg.wsp.resize, lambda task: wsp_probe.run(task, cfg.wsp, cfg.held_out)
        )

    def _on_views(
        self, encode: Encoder, kinds: Sequence[Kind], resize: float, run: Callable[[Task], Iterator[Learnt]]
    ) -> Iterator[tuple[Kind, Result]]:
        """Train on views of the training data; evaluate on the protocol's own centre views."""
        assert self.data.train is not None
        encode = replace(encode, preprocess=centre_view(encode.preprocess, resize))
        sets: dict[Kind, tuple[Features, Features]] = {kind: self._sets(encode, kind) for kind in kinds}
        readable: dict[Kind, Features] = {kind: sets[kind][0] for kind in kinds}
        view = {"preprocess": to_json(encode.preprocess)}
        for learnt in run(Task(encode, self.data.train, readable, self.classes, self.seed)):
            test = sets[learnt.kind][1]
            yield learnt.kind, Result(learnt.probe.scores, test, learnt.chosen, learnt.facts | view)


def centre_view(preprocess: Preprocess, resize: float) -> Preprocess:
    """The crop in the middle after the short side is resized to `resize` crops, bicubically."""
    size = preprocess.image_size
    side = round(size * resize)
    same = side == (preprocess.resize or size)  # then also written in the same way, for the cache of features
    side = preprocess.resize if same else side
    return replace(preprocess, resize=side, interpolation="bicubic", squash=False)
