"""Foreign weights under our names, and the checks that every layout makes of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.models.mae import DecoderShape, MaskedAutoencoder
from maws.models.vit import VARIANTS, Shape, VisionTransformer

SHOWN = 5  # names in an error


@dataclass(frozen=True)
class Converted:
    """A trunk, with or without MAE's decoder; `weights` load strictly into the module of these sizes.

    `heads` are tensors of other modules by name: a classifier `head.*`, LC-MAE's `projector.*` and `predictor.*`.
    `dropped` says of everything else why it was left out.
    """

    layout: str
    shape: Shape
    image_size: int
    weights: dict[str, Tensor]
    decoder: DecoderShape | None = None
    heads: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`autoencoder` with a decoder, else `classifier` with a classifier's head, else `encoder`."""
        if self.decoder is not None:
            return "autoencoder"
        return "classifier" if any(name.startswith("head.") for name in self.heads) else "encoder"

    @property
    def variant(self) -> str:
        """The name of these sizes in models/vit.py, or "" for others."""
        sizes = _sizes(self.shape)
        return next((name for name, shape in VARIANTS.items() if _sizes(shape) == sizes), "")

    def build(self) -> VisionTransformer | MaskedAutoencoder:
        """The module, in evaluation mode, with these very tensors (not copies)."""
        module = empty(self.shape, self.image_size, self.decoder)
        module.load_state_dict(self.weights, strict=True, assign=True)
        return module.eval()

    def report(self) -> list[str]:
        """What was taken and what was dropped, a line each."""
        parameters = sum(value.numel() for value in self.weights.values())
        s = self.shape
        lines = [
            f"{self.layout}: {self.kind} {self.variant or 'of its own size'}, {s.depth} blocks of width {s.width}, "
            f"{s.heads} heads, patch {s.patch}, {self.image_size} px",
            f"taken: {len(self.weights)} tensors, {parameters:,} parameters",
        ]
        if self.decoder is not None:
            lines.append(f"  decoder: {self.decoder}")
        if self.heads:
            lines.append(f"taken as heads: {', '.join(self.heads)}")
        return lines + [f"dropped: {name}: {reason}" for name, reason in self.dropped.items()]


def empty(shape: Shape, image_size: int, decoder: DecoderShape | None = None) -> VisionTransformer | MaskedAutoencoder:
    """The module of these sizes without memory for its values (torch's meta device)."""
    with torch.device("meta"):
        if decoder is None:
            return VisionTransformer(shape, image_size)
        return MaskedAutoencoder(shape, image_size, decoder)


@cache
def names_and_shapes(shape: Shape, image_size: int, decoder: DecoderShape | None) -> dict[str, torch.Size]:
    """Of the tensors of the module of these sizes."""
    return {name: value.shape for name, value in empty(shape, image_size, decoder).state_dict().items()}


def check(weights: Mapping[str, Tensor], shape: Shape, image_size: int, decoder: DecoderShape | None = None) -> None:
    """Raises CheckpointError unless names and shapes are those of the module, naming those that are not."""
    try:
        wanted = names_and_shapes(shape, image_size, decoder)
    except ValueError as error:  # sizes that go into no module, such as a reduced decoder on an odd grid
        raise CheckpointError(f"tensors of {_said(shape, image_size, decoder)} fit no model: {error}") from None
    problems = differences(weights, wanted)
    if problems:
        raise CheckpointError(
            f"the tensors do not make {_said(shape, image_size, decoder)}: {'; '.join(problems[:SHOWN])}"
        )


def differences(tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> list[str]:
    """What is missing, unknown, and of another shape than wanted, in words."""
    return [
        *_some("missing: {}", [name for name in wanted if name not in tensors]),
        *_some("unknown: {}", [name for name in tensors if name not in wanted]),
        *(
            f"{name} is {tuple(tensors[name].shape)}, expected {tuple(size)}"
            for name, size in wanted.items()
            if name in tensors and tensors[name].shape != size
        ),
    ]


def _said(shape: Shape, image_size: int, decoder: DecoderShape | None) -> str:
    first = f"{shape.depth} blocks of width {shape.width} with patch {shape.patch} for {image_size} px"
    return first if decoder is None else f"{first} and a decoder of {decoder.depth} blocks of width {decoder.width}"


def _some(sentence: str, names: list[str]) -> list[str]:
    """A sentence about names, of which the first few are given; nothing about none."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [sentence.format(", ".join(names[:SHOWN]) + more)] if names else []


def _sizes(shape: Shape) -> tuple[int, ...]:
    return shape.patch, shape.depth, shape.width, shape.heads
