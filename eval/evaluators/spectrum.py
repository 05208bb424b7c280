"""Evaluator spectrum: how many directions features use: their singular values, layer by layer (LC-MAE §5.3).

    python -m eval spectrum --run runs/demo/mae --data demo/emoji/eval-emojione.parquet

Scores are in dimensions (effective rank) and in % of variance, no accuracies. The file spectrum/….json has all singular
values; the report draws runs over each other and their differences. The maths: moments.py, spectra.py.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data_pipeline.errors import DataError, UsageError
from eval.base import EvaluatorConfig, File, Score
from eval.encoder import Encoder
from eval.moments import Moments
from eval.pictures import Pictures, about, shown, spread
from eval.spectra import effective_rank, variance_share
from maws.models.vit import VisionTransformer

TOKENS = ("mean", "cls")


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    token: str = "mean"
    """What stands for a picture in each layer: the mean of its patches (suggested; the paper does not say, recipes
    9.10), or cls."""
    k: tuple[int, ...] = (1, 10)
    """Directions whose share of the variance is a score; ours."""
    images: int = 0
    """That many pictures at even distances; 0: all. The paper takes the 50,000 of IN1k's validation set."""

    def __post_init__(self) -> None:
        if self.token not in TOKENS:
            raise ValueError(f"token is {' or '.join(TOKENS)}, not '{self.token}'")
        if min(self.k, default=1) < 1 or self.images < 0 or self.images == 1:
            raise ValueError("k must be whole numbers from 1, images 0 (all) or 2 and more")


class Spectrum:
    needs_train: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False
    data: ClassVar[str] = "pictures"

    def __init__(self, cfg: Config, data: Pictures, seed: int) -> None:
        self.cfg, self.test = cfg, data.test

    def run(self, encode: Encoder) -> Iterator[Score | File]:
        layers = self._moments(encode)
        spectra: dict[str, list[float]] = {}
        count = next(iter(layers.values())).count
        facts = {"protocol": f"spectrum/{self.cfg.token}", "image_size": encode.tower.image_size}
        for layer, moments in layers.items():
            try:
                spectra[layer] = values = moments.singular_values().tolist()
            except ValueError as error:
                raise DataError(f"{layer} of the encoder has no spectrum: {error}") from None
            yield Score(f"effective_rank/{layer}", effective_rank(values), count, facts=facts)
            for k in self.cfg.k:
                yield Score(f"variance@k={k}/{layer}", 100 * variance_share(values, k), count, facts=facts)
        yield self._file(encode, spectra, count)

    def _moments(self, encode: Encoder) -> dict[str, Moments]:
        """One pass over the pictures; only a D D matrix per layer is kept."""
        if self.cfg.token == "cls" and not encode.tower.class_tokens:
            raise UsageError("--set spectrum.token=cls: this encoder has no class token; use mean")
        layers: dict[str, Moments] = {}
        rows = spread(self.test, self.cfg.images)
        for batch in shown(encode, self.test, rows, "spectrum"):
            for layer, features in by_layer(encode, batch.images, self.cfg.token).items():
                known = layers.setdefault(layer, Moments(features.shape[1], encode.device))
                known.add(features[: len(batch.rows)])
        return {layer: moments.of_all_ranks() for layer, moments in layers.items()}

    def _file(self, encode: Encoder, spectra: dict[str, list[float]], count: int) -> File:
        content = about(encode, self.test) | {
            "token": self.cfg.token,
            "images": count,
            "layers": {layer: [float(f"{value:.7g}") for value in values] for layer, values in spectra.items()},
        }
        name = f"{self.test.sha256[:8]}-{encode.sha256[:8]}-{self.cfg.token}-{encode.tower.image_size}px"
        return File(f"spectrum/{name}.json", json.dumps(content) + "\n")


def by_layer(encode: Encoder, images: Tensor, token: str) -> dict[str, Tensor]:
    """uint8 B 3 H W -> B D after each block (block=1 is the first) and after the final norm (`norm`)."""
    found: dict[str, Tensor] = {}
    with _outputs(encode.tower, token, found):
        last = encode.all(images)["cls" if token == "cls" else "mean"]
    return {**found, "norm": last}


@contextmanager
def _outputs(tower: VisionTransformer, token: str, found: dict[str, Tensor]) -> Iterator[None]:
    """While open, a forward puts what each block gives into `found`."""
    tokens: Any = slice(tower.class_tokens) if token == "cls" else slice(tower.class_tokens, None)
    blocks: Sequence[nn.Module] = list(tower.blocks)

    def after(block: nn.Module, args: tuple[Any, ...], x: Tensor) -> None:
        found[f"block={blocks.index(block) + 1}"] = x[:, tokens].float().mean(dim=1)  # B D

    handles = [block.register_forward_hook(after) for block in blocks]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
