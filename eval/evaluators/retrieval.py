r"""Evaluator retrieval: find the caption of a picture and the picture of a caption, by cosine.

    python -m eval retrieval --run runs/demo/lit --captions dataset_flickr30k.json --images flickr30k-images/

Recall at k, as for COCO and Flickr30k: a picture is right when any of its own captions is among the k nearest of all
captions, a caption when its one picture is among the k nearest of all pictures. Letters: N pictures, M captions,
E joint width, P pictures and C captions of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from eval.base import EvaluatorConfig, File, Score
from eval.captions import Captioned
from eval.features import Encoder, extract
from eval.texts import embed

PICTURES: Final = 4096  # of a block
CAPTIONS: Final = 1024  # of a block: 16 MiB of float32 similarities at once
EQUAL: Final = 1e-6  # cosines nearer than this are equal: what float32 leaves of 1 (2**-24) times a few roundings


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    k: tuple[int, ...] = (1, 5, 10)
    captions_per_image: int = 0
    """The first so many captions of each picture; 0: all. Some papers take COCO's first five."""

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError("k must be one or more whole numbers from 1")
        if self.captions_per_image < 0:
            raise ValueError("captions_per_image must be 0 (all) or more")


class Retrieval:
    needs_train: ClassVar[bool] = False
    needs_text: ClassVar[bool] = True
    data: ClassVar[str] = "captioned"

    def __init__(self, cfg: Config, data: Captioned, seed: int) -> None:
        self.cfg, self.captioned = cfg, data

    def run(self, encode: Encoder) -> Iterator[Score | File]:
        data = self.captioned
        found = extract(encode, data.pictures, "joint")
        captions, owners = chosen(data, found.rows, self.cfg.captions_per_image)
        texts = embed(encode, [data.captions[caption] for caption in captions.tolist()])
        of_images, of_texts = recall_ranks(found.features, texts, owners.to(texts.device))
        for direction, ranks in (("image_to_text", of_images), ("text_to_image", of_texts)):
            for k in self.cfg.k:
                value = (ranks < k).double().mean().item()
                yield Score(f"{direction}/R@{k}", value, len(ranks))


def chosen(data: Captioned, rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Captions of the readable pictures (`rows`), M, and the place of each one's picture among these, M."""
    owners = torch.from_numpy(data.owners)  # in order, so the captions of a picture are neighbours
    place = torch.full((len(data.pictures),), -1).index_copy_(0, rows, torch.arange(len(rows)))
    first = torch.searchsorted(owners, torch.arange(len(data.pictures)))
    number = torch.arange(len(owners)) - first[owners]  # 0 for the first caption of a picture
    keep = place[owners] >= 0
    if most:
        keep &= number < most
    captions = keep.nonzero()[:, 0]
    return captions, place[owners[captions]]


def recall_ranks(images: Tensor, texts: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """How many captions come before a picture's best own one, N, and how many pictures before a caption's own, M.

    Unit vectors images N E and texts M E; `owners` M is the picture of each caption, and every picture has one. Equal
    similarities are ordered by index, so that an encoder that gives the same vector to all does not score. Only a block
    of the N x M similarities exists at a time. Raises ValueError for nan or infinity.
    """
    if not torch.isfinite(texts).all() or not torch.isfinite(images).all():
        raise ValueError("features hold nan or infinity; no recall can be read from them")
    own = torch.cat([(t * images[o]).sum(1) for t, o in _blocks(texts, owners)])  # M
    best, first = _best_caption(own, owners, len(images))  # N, N
    before_image = torch.zeros(len(images), dtype=torch.long, device=images.device)
    before_text = torch.zeros(len(texts), dtype=torch.long, device=images.device)
    number = torch.arange(len(texts), device=images.device)
    place = torch.arange(len(images), device=images.device)
    for p in range(0, len(images), PICTURES):
        pictures = slice(p, p + PICTURES)
        for c in range(0, len(texts), CAPTIONS):
            captions = slice(c, c + CAPTIONS)
            similarity = texts[captions] @ images[pictures].T  # C P
            earlier = place[pictures] < owners[captions, None]  # C P
            before_text[captions] += _before(similarity, own[captions, None], earlier).sum(1)
            earlier = number[captions, None] < first[pictures]  # C P
            before_image[pictures] += _before(similarity, best[pictures], earlier).sum(0)
    return before_image, before_text


def _blocks(texts: Tensor, owners: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(texts.split(CAPTIONS), owners.split(CAPTIONS), strict=True)


def _best_caption(own: Tensor, owners: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """The highest similarity of each picture to a caption of its own, N, and the first caption that reaches it, N."""
    best = own.new_full((images,), -torch.inf).scatter_reduce_(0, owners, own, "amax")
    reaches = torch.where(own >= best[owners] - EQUAL, torch.arange(len(own), device=own.device), len(own))
    first = reaches.new_full((images,), len(own)).scatter_reduce_(0, owners, reaches, "amin")
    return best, first


def _before(similarity: Tensor, right: Tensor, earlier: Tensor) -> Tensor:
    """What is nearer than the right one, or as near and earlier."""
    return (similarity > right + EQUAL) | ((similarity >= right - EQUAL) & earlier)
