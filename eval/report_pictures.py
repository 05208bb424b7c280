"""Pictures for the report that need a model: what an MAE paints, what a two-tower model says.

Everything is recomputed from run folders and data on disk, on the CPU. The only file of the report that imports torch.
Letters: B images, N patches, H W pixels, S classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.images import BadImage, decode
from data_pipeline.shardset import ShardSet
from eval.class_embeddings import class_embeddings
from eval.datasets import Data
from eval.features import extract, open_encoder
from eval.figures import png, thumbnail
from eval.templates import templates_for
from maws.data.transforms import Preprocess, normalise
from maws.release import load_masked_autoencoder, open_release

GREY = 0.86  # of a removed patch


@dataclass(frozen=True)
class Reconstruction:
    masked: str
    painted: str  # visible patches are the original's
    original: str


@dataclass(frozen=True)
class Guess:
    """A picture, its class, and what the model held most likely."""

    image: str
    truth: str
    top: list[tuple[str, float]]  # class name, probability; most likely first
    is_right: bool


def some_pictures(data: Data | None, shards: ShardSet | None, number: int) -> list[Image.Image]:
    """Evaluation pictures where there are any (no run has seen them), else training pictures."""
    if data is not None:
        test = data.test
        places = np.linspace(0, len(test) - 1, min(number, len(test))).astype(int)
        reads = [lambda place=int(place): test.read(place) for place in places]
    elif shards is not None:
        places = np.linspace(0, len(shards) - 1, min(number, len(shards))).astype(int)
        starts = np.cumsum([0, *shards.shard_sizes])
        reads = []
        for place in places:
            shard = int(np.searchsorted(starts, place, side="right")) - 1
            reads.append(lambda shard=shard, row=int(place - starts[shard]): shards.image_bytes(shard, row))
    else:
        return []
    found: list[Image.Image] = []
    for read in reads:
        try:
            found.append(decode(read()))
        except BadImage:
            continue
    return found


@torch.no_grad()
def reconstructions(run: Path, pictures: Sequence[Image.Image], seed: int = 0) -> list[Reconstruction]:
    """What the MAE of `run` paints over the removed patches."""
    release = open_release(run)
    model = load_masked_autoencoder(release).eval()
    images = normalise(torch.stack([release.preprocess(picture) for picture in pictures]), release.preprocess)
    painted, mask = model.reconstruct(images, seed)
    removed = pixel_mask(mask, images.shape[-1])  # B 1 H W
    original, painted = unnormalise(images, release.preprocess), unnormalise(painted, release.preprocess)
    masked = torch.where(removed, torch.full_like(original, GREY), original)
    pasted = torch.where(removed, painted, original)
    return [Reconstruction(*(_as_png(x) for x in three)) for three in zip(masked, pasted, original, strict=True)]


@torch.no_grad()
def guesses(run: Path, data: Data, templates: str, number: int) -> list[Guess]:
    """Half of them right, half wrong where there are enough of both; spread evenly over the evaluation pictures."""
    encode = open_encoder(run, torch.device("cpu"))
    test = extract(encode, data.test, "joint")
    cosine = test.features @ class_embeddings(encode, data.classes, templates_for(data.classes, templates)).T  # B S
    scale = encode.two_tower.scale()
    probability, best = (scale * cosine).softmax(dim=1).topk(min(3, len(data.classes)), dim=1)  # B 3
    right = best[:, 0] == test.labels
    rows_right, rows_wrong = right.nonzero().flatten().tolist(), (~right).nonzero().flatten().tolist()
    half = min(len(rows_right), max(number // 2, number - len(rows_wrong)))
    chosen = [*_spread(rows_right, half), *_spread(rows_wrong, number - half)]
    found: list[Guess] = []
    for row in chosen:
        picture = decode(data.test.read(int(test.rows[row])))
        top = [(data.classes.name(int(c)), float(p)) for c, p in zip(best[row], probability[row], strict=True)]
        found.append(Guess(thumbnail(picture), data.classes.name(int(test.labels[row])), top, bool(right[row])))
    return found


def _spread(items: list[int], number: int) -> list[int]:
    """`number` of the items at even distances, or all."""
    return [items[place] for place in np.linspace(0, len(items) - 1, min(number, len(items))).astype(int)]


def pixel_mask(mask: Tensor, side: int) -> Tensor:
    """B N with 1 for a removed patch -> B 1 H W, True on its pixels. Patches are in reading order, pictures square."""
    grid = round(mask.shape[1] ** 0.5)
    squares = mask.bool().view(-1, 1, grid, grid)
    return squares.repeat_interleave(side // grid, 2).repeat_interleave(side // grid, 3)


def unnormalise(images: Tensor, preprocess: Preprocess) -> Tensor:
    """Back to 0..1."""
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (images * std + mean).clamp(0, 1)


def _as_png(image: Tensor) -> str:
    return png((image * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
