"""What a batch holds and what an objective returns.

Axes: B samples of this rank, N patches, K visible patches, M most synsets of a sample, T tokens.
"""

from typing import NotRequired, TypedDict

from torch import Tensor


class BadSample(TypedDict):
    """A sample that was left out, for quarantine.jsonl."""

    key: str
    shard: str
    reason: str


class Batch(TypedDict):
    """One step's samples on one rank; each stage adds what its objective needs.

    Every tensor has a row for each sample and none speaks of another row: the engine cuts a batch into micro-batches
    between any two.
    """

    keys: list[str]
    image: Tensor  # B 3 H W, uint8; normalised on the device
    bad: list[BadSample]  # samples that could not be read and were replaced


class MaskedBatch(Batch):
    """For the objectives that predict masked patches."""

    ids_shuffle: Tensor  # B N, a permutation of patches whose first ones are visible
    image_second: NotRequired[Tensor]  # B 3 H' W', uint8: the same region at the size that a tokenizer wants


class ViewsBatch(Batch):
    """For momentum_guidance: `image` is the view that is reconstructed."""

    image_other: Tensor  # B 3 H W, uint8: another view of the same picture
    ids_shuffle: Tensor  # B N, one permutation for both views


class LabelledBatch(Batch):
    """For multi_label."""

    synset_ids: Tensor  # B M, label indices padded with -1
    ids_keep: NotRequired[Tensor]  # B K, the patches that the image tower sees; all where it is not there
    image_other: NotRequired[Tensor]  # B 3 H W, uint8: the picture that is mixed in
    synset_ids_other: NotRequired[Tensor]  # B M, its synsets
    mix_weight: NotRequired[Tensor]  # B, weight of the sample's own pixels and synsets


class ClassBatch(Batch):
    """For classification; mixed images have two labels."""

    label: Tensor  # B, the class
    label_other: NotRequired[Tensor]  # B, the class of what was mixed in
    mix_weight: NotRequired[Tensor]  # B, weight of `label`


class PairBatch(Batch):
    """For contrastive; `features` stands in the place of `image` where they are cached."""

    features: NotRequired[Tensor]  # B D, what the locked image tower makes of the images
    token_ids: Tensor  # B T
    token_mask: Tensor  # B T, 1 = a token


Losses = dict[str, Tensor]
