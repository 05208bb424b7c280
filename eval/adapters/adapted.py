"""A classifier on a frozen trunk: an adapter, and a head on the features it gives.

Letters: B images, D width, S classes.
"""

import torch
from torch import Tensor, nn

from data_pipeline.errors import UsageError
from eval.features import Encoder
from eval.logistic import LinearHead
from maws.models.vit import VisionTransformer


class Standardise(nn.Module):
    """(x - mean) / scale with values that stay: a BatchNorm without affine whose statistics are those of a split."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("scale", scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


class Head(nn.Module):
    """What is done to the features before a linear layer, and the layer."""

    def __init__(self, norm: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(weight.clone())  # S D
        self.bias = nn.Parameter(bias.clone())  # S

    def forward(self, features: Tensor) -> Tensor:
        """B D -> B S."""
        return nn.functional.linear(self.norm(features), self.weight, self.bias)


def solved(head: LinearHead) -> Head:
    """A head that starts from a linear solution; the standardisation stays as it is."""
    return Head(Standardise(head.mean, head.scale), head.weight, head.bias)


def fresh(width: int, classes: int, style: str, draw: torch.Generator) -> Head:
    """A head as the methods' own codes start it; biases are 0.

    `vpt`: Kaiming-normal by its outputs, on the features as they are; its code starts every bias at one value, which a
    softmax does not see. `adaptformer`: normal of deviation 0.01 after a BatchNorm without affine.
    """
    norm = nn.Identity() if style == "vpt" else nn.BatchNorm1d(width, affine=False, eps=1e-6)
    deviation = (2 / classes) ** 0.5 if style == "vpt" else 0.01
    return Head(norm, torch.randn(classes, width, generator=draw) * deviation, torch.zeros(classes))


class Adapted(nn.Module):
    """An adapter and a head that are trained, and the frozen trunk they share with others."""

    def __init__(self, trunk: VisionTransformer, adapter: nn.Module, head: Head) -> None:
        super().__init__()
        self.adapter, self.head = adapter, head
        # Not a submodule: parameters(), train() and zero_grad() do not reach it.
        self.trunk: VisionTransformer
        object.__setattr__(self, "trunk", trunk)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised B 3 H W -> B S."""
        return self.head(self.adapter(self.trunk, images))

    def scores(self, encode: Encoder, images: Tensor) -> Tensor:
        """uint8 B 3 H W -> B S, in the encoder's precision but for the head, which is float32."""
        return self.head(features(self.adapter, encode, images))


def features(adapter: nn.Module, encode: Encoder, images: Tensor) -> Tensor:
    """uint8 B 3 H W -> float32 B D, as the encoder's own features are computed."""
    with encode.arithmetic():
        return adapter(encode.tower, encode.prepare(images)).float()


def check_whole(encode: Encoder) -> None:
    """Raises UsageError for an encoder whose weights are split over the ranks."""
    if encode.partition is not None:
        raise UsageError(
            "VPT, AdaptFormer and LoRA train inside a tower that is whole on every rank, and this one is split; "
            "give --partition none, or --set lowshot.methods=linear,ridge,msn"
        )


def refuse_relative(trunk: VisionTransformer, what: str) -> None:
    """Raises UsageError for a trunk with relative positions."""
    if trunk.rel_pos_bias is not None:
        raise UsageError(
            f"{what} does not know relative positions, which this encoder has: use linear, ridge, msn, lora"
        )
