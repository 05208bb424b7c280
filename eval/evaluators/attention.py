"""Evaluator attention: how far each head of an encoder looks, and maps of what some patches look at.

    python -m eval attention --run runs/demo/mae --data demo/emoji/eval-emojione.parquet
    python -m eval attention --run RUN --data photos/ --set attention.at=0.5:0.5,0.2:0.7 attention.pictures=6

Scores are in pixels, no accuracies: the mean attention distance of each block over its heads. The file
attention/….json has every head's, and the maps with their pictures; the report draws both. The maths:
attention_maps.py. Axes: B images, H heads, R queries, h w the grid.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from data_pipeline.errors import DataError, UsageError
from eval.attention_maps import Attended, Reach, maps, patch_distances, reach, watch
from eval.base import EvaluatorConfig, File, Score
from eval.encoder import Encoder
from eval.pictures import Pictures, about, data_uri, shown, spread
from maws import dist
from maws.seeding import stream

BATCH: Final = 16  # pictures; ours: their queries and keys at 518 px are 0.3 GB in a ViT-L
SHOWN: Final = 224  # sides of the picture in the file, pixels


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    images: int = 128
    """Pictures for the distances, at even distances in the data; 0: all. Dosovitskiy et al. (2021, app. D.7) take 128;
    LC-MAE does not say (recipes 9.11)."""
    renormalise: bool = True
    """Are a query's weights on the patches brought to a sum of 1 (a mean of distances), or does a class token count as
    no distance? Scores and figures follow; the file has both."""
    pictures: int = 4
    """Pictures for the maps, at even distances in the data; ours."""
    keys: tuple[str, ...] = ()
    """Their keys, instead."""
    at: tuple[str, ...] = ()
    """Queries as x:y in shares of the input's width and height, such as 0.5:0.5; none: the centre and `seeded`."""
    seeded: int = 3
    """Random places that ask beside the centre; the same for every encoder. Ours."""
    block: int = 0
    """Whose maps: 1 is the first block; 0: the last, as the paper's (recipes 9.11)."""

    def __post_init__(self) -> None:
        if min(self.images, self.pictures, self.seeded, self.block) < 0:
            raise ValueError("images, pictures, seeded and block must be 0 or more")
        for text in self.at:
            point(text)


def point(text: str) -> tuple[float, float]:
    """x:y in 0..1; ValueError for anything else."""
    x, _, y = text.partition(":")
    try:
        place = float(x), float(y)
    except ValueError:
        place = (-1.0, -1.0)
    if not all(0 <= share <= 1 for share in place):
        raise ValueError(f"a query is x:y in shares of width and height, such as 0.5:0.25, not '{text}'")
    return place


class Attention:
    needs_train: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False
    data: ClassVar[str] = "pictures"

    def __init__(self, cfg: Config, data: Pictures, seed: int) -> None:
        self.cfg, self.test, self.seed = cfg, data.test, seed
        self.rows = self._rows()

    def run(self, encode: Encoder) -> Iterator[Score | File]:
        depth, block = len(encode.tower.blocks), self.cfg.block
        if block > depth:
            raise UsageError(f"--set attention.block={block}: this encoder has {depth} blocks, 1 to {depth}")
        found, count = self._distances(encode)
        distances = found.over_patches if self.cfg.renormalise else found.over_all  # L H
        facts = {"protocol": "attention/distance", "image_size": encode.tower.image_size}
        for number, mean in enumerate(distances.mean(dim=1).tolist(), start=1):
            yield Score(f"attention_distance/block={number}", mean, count, facts=facts)
        content = about(encode, self.test) | {
            "images": count,
            "renormalised": self.cfg.renormalise,
            "distance": {"over_patches": rounded(found.over_patches), "over_all": rounded(found.over_all)},
            "class_share": rounded(found.class_share),
            "uniform": patch_distances(encode.tower.grid, encode.tower.shape.patch).mean().item(),
            "block": block or depth,
            "maps": self._maps(encode, (block or depth) - 1),
        }
        name = f"{self.test.sha256[:8]}-{encode.sha256[:8]}-{encode.tower.image_size}px"
        yield File(f"attention/{name}.json", json.dumps(content) + "\n")

    def _rows(self) -> list[int]:
        """Positions of the pictures for the maps."""
        if not self.cfg.keys:
            return spread(self.test, self.cfg.pictures) if self.cfg.pictures else []
        place = {key: row for row, key in enumerate(self.test.keys)}
        if unknown := [key for key in self.cfg.keys if key not in place]:
            raise UsageError(
                f"--set attention.keys: the data has no picture '{unknown[0]}'; keys are such as "
                f"{', '.join(self.test.keys[:3])}"
            )
        return [place[key] for key in self.cfg.keys]

    # ------------------------------------------------------------------------------------------------------- distances

    def _distances(self, encode: Encoder) -> tuple[Reach, int]:
        """Means over pictures, L H each, and how many pictures."""
        tower = encode.tower
        far = patch_distances(tower.grid, tower.shape.patch).to(encode.device)  # N N
        total: dict[int, Tensor] = {}  # by block, 3 H

        def see(block: int, attended: Attended) -> None:
            of = reach(attended, far, tower.class_tokens)
            sums = torch.stack([getattr(of, field.name)[:real].sum(0) for field in fields(Reach)])  # 3 H
            total[block] = total[block] + sums if block in total else sums

        count = real = 0
        for batch in shown(encode, self.test, spread(self.test, self.cfg.images), "attention", BATCH):
            real = len(batch.rows)
            with watch(tower, range(len(tower.blocks)), see):
                encode.all(batch.images)
            count += real
        count = sum(dist.gather_objects(count))
        means = dist.sum_with_grad(torch.stack([total[block] for block in sorted(total)], dim=1)) / count  # 3 L H
        if not torch.isfinite(means).all():
            raise DataError("the encoder's attention holds nan or infinity; its weights are damaged")
        return Reach(*means.cpu()), count

    # ------------------------------------------------------------------------------------------------------------ maps

    def places(self) -> list[tuple[float, float]]:
        """Where to ask: x, y in shares of the input."""
        if self.cfg.at:
            return [point(text) for text in self.cfg.at]
        random = stream(self.seed, "attention queries").uniform(size=(self.cfg.seeded, 2)).round(4)
        return [(0.5, 0.5), *((x, y) for x, y in random.tolist())]

    def _maps(self, encode: Encoder, block: int) -> list[dict[str, Any]]:
        """One entry a picture: as the encoder sees it, and for every query each head's map."""
        tower, places = encode.tower, self.places()
        h, w = tower.grid
        cells = [(min(int(y * h), h - 1), min(int(x * w), w - 1)) for x, y in places]  # row, column
        found: list[Tensor] = []

        def see(_: int, attended: Attended) -> None:
            found.append(maps(attended, [row * w + col for row, col in cells], tower.grid, tower.class_tokens))

        entries: list[dict[str, Any]] = []
        for batch in shown(encode, self.test, self.rows, "attention maps", BATCH, shared=False):
            found.clear()
            with watch(tower, [block], see):
                encode.all(batch.images)
            for row, image, of_heads in zip(batch.rows, batch.images, found[0].cpu(), strict=False):
                queries = [
                    {"x": x, "y": y, "row": cell[0], "column": cell[1], "heads": rounded(of_heads[:, number])}
                    for number, ((x, y), cell) in enumerate(zip(places, cells, strict=True))
                ]
                entries.append({"key": self.test.keys[row], "picture": data_uri(image, SHOWN), "queries": queries})
        return entries


def rounded(values: Tensor) -> list[Any]:
    """As lists, with four digits: more than a picture shows, and a third of the file."""
    if values.ndim == 1:
        return [float(f"{value:.4g}") for value in values.tolist()]
    return [rounded(part) for part in values]
