"""What an imported model computes, compared with what its file's own tensors do, on fixed images and texts.

The file's side is plain float32 operations that hold one block at a time: tower_file.reference_tokens for images, for
text interop/text_reference.py under the names that the file has. The other side is the release as everybody loads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.checks.machine import free_memory
from maws.devices import GIB
from maws.handover import fixed_images
from maws.interop.converted import Converted, ConvertedClip
from maws.interop.text_reference import our_names, text_features, torchtext_names
from maws.models.text import BOS, EOS, PAD, TextShape
from maws.models.vit import Shape
from maws.release import Release, load_image_tower, load_masked_autoencoder, load_two_tower
from maws.seeding import generator
from maws.tower_file import EPS, Fit, reference_tokens

TOLERANCE = 1e-4  # largest difference, as a share of the largest value; float32 adds in another order (handover.py)
COPIES = 2  # of the weights while a release is loaded: as they are read, and in the module
BYTES = 4  # of a value, whatever the file has
CAPTIONS = 3


@dataclass(frozen=True)
class Difference:
    """Of two computations of one thing."""

    what: str
    largest: float
    scale: float  # largest value

    @property
    def passes(self) -> bool:
        return self.largest <= TOLERANCE * self.scale  # not for nan either

    def __str__(self) -> str:
        return f"{self.what}: largest difference {self.largest:.1e}, of values up to {self.scale:.3g}"


@dataclass(frozen=True)
class FileTower:
    """A file's image tower, read tensor by tensor and rounded to what a release keeps."""

    shape: Shape
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype

    def read(self, name: str, fit: Fit | None = None) -> Tensor:
        return self.tensors[name].to(self.dtype)


def check(
    release: Release, converted: Converted | ConvertedClip, original: Mapping[str, Tensor], dtype: torch.dtype
) -> list[str]:
    """What was found, a line each. Raises CheckpointError when the release computes something else than the file.

    A model that does not fit into this machine's memory is not computed, and the lines say so.
    """
    parameters = sum(value.numel() for value in converted.weights.values())
    if (need := COPIES * BYTES * parameters) > (free := free_memory()):
        return [f"not computed here: loading it takes {need / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"]
    if isinstance(converted, ConvertedClip):
        found = _clip(release, converted, original, dtype)
    else:
        found = _trunk(release, converted, dtype)
    if wrong := [str(difference) for difference in found if not difference.passes]:
        raise CheckpointError(
            f"the release does not compute what the file does ({'; '.join(wrong)}; allowed is a share of "
            f"{TOLERANCE:.0e}), so it was not kept; please report the file's source and this line"
        )
    return [str(difference) for difference in found]


def fixed_captions(shape: TextShape) -> tuple[Tensor, Tensor]:
    """Ids and mask (CAPTIONS T each) of captions that are the same for ever: the longest, a short one, one piece."""
    draw, longest = generator(0, "import"), shape.context + 2
    ids = torch.full((CAPTIONS, longest), PAD)
    for row, length in zip(ids, (longest, min(9, longest), 3), strict=True):
        row[:length] = torch.randint(min(4, shape.vocabulary - 1), shape.vocabulary, (length,), generator=draw)
        row[0], row[length - 1] = BOS, EOS
    return ids, (ids != PAD).long()


@torch.no_grad()
def _trunk(release: Release, converted: Converted, dtype: torch.dtype) -> list[Difference]:
    if converted.decoder is not None:
        load_masked_autoencoder(release)  # strictly
    tower, images = load_image_tower(release), fixed_images(converted.image_size)
    want = _tokens(converted.shape, converted.weights, images, tower.grid, dtype)
    found = [difference("tokens of two images", tower(images), want)]
    if tower.norms_the_mean:
        weight, bias = (converted.weights[f"norm.{part}"].to(dtype).float() for part in ("weight", "bias"))
        mean = want[:, tower.class_tokens :].mean(dim=1)
        pooled = F.layer_norm(mean, mean.shape[1:], weight, bias, EPS)
        found.append(difference("features of two images", tower.pooled(tower(images)), pooled))
    return found


@torch.no_grad()
def _clip(
    release: Release, converted: ConvertedClip, original: Mapping[str, Tensor], dtype: torch.dtype
) -> list[Difference]:
    towers, weights = load_two_tower(release), converted.weights
    vision, text = (weights[f"{name}_projection"].to(dtype).float() for name in ("vision", "text"))
    images, (ids, mask) = fixed_images(converted.image_size), fixed_captions(converted.text)
    own = {n.removeprefix("image."): v for n, v in weights.items() if n.startswith("image.")}
    tokens = _tokens(converted.shape, own, images, towers.image.grid, dtype)
    seen = towers.image.pooled(tokens) @ vision
    names = torchtext_names(original) if converted.layout == "maws_clip" else our_names(weights)
    read = text_features(names, converted.text, ids, dtype) @ text
    return [
        difference("embeddings of two images", towers.encode_image(images), F.normalize(seen, dim=-1)),
        difference("embeddings of three texts", towers.encode_text(ids, mask), F.normalize(read, dim=-1)),
    ]


def _tokens(
    shape: Shape, weights: Mapping[str, Tensor], images: Tensor, grid: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    return reference_tokens(FileTower(shape, weights, dtype), images, Fit(shape, grid))


def difference(what: str, got: Tensor, want: Tensor) -> Difference:
    return Difference(what, (got.float() - want).abs().max().item(), want.abs().max().item())
