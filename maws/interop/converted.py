"""Foreign weights under our names, and the checks that every layout makes of them."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.data.transforms import Preprocess
from maws.models.mae import DecoderShape, MaskedAutoencoder
from maws.models.text import TEXT_VARIANTS, TextShape, TextTower
from maws.models.two_tower import CLIP_VARIANTS, TwoTower
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
    preprocess: Preprocess | None = None  # None: ImageNet's mean and deviation, short side to the image size, bicubic

    @property
    def kind(self) -> str:
        """`autoencoder` with a decoder, else `classifier` with a classifier's head, else `encoder`."""
        if self.decoder is not None:
            return "autoencoder"
        return "classifier" if any(name.startswith("head.") for name in self.heads) else "encoder"

    @property
    def variant(self) -> str:
        """The name of these sizes in models/vit.py, or "" for others."""
        return variant_of(self.shape)

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
        return lines + dropped_lines(self.dropped)


@dataclass(frozen=True)
class ConvertedClip:
    """An image tower and a text tower; `weights` have the names of our LiT releases and load strictly into TwoTower.

    `image.*` (timm's names), `text.encoder.*` (transformers'), `vision_projection`, `text_projection`, `logit_scale`
    (1,) and, of a model trained with SigLIP's loss, `logit_bias` (1,). `dropped` says why the rest was left out.
    """

    layout: str
    shape: Shape
    image_size: int
    text: TextShape
    joint_width: int
    weights: dict[str, Tensor]
    dropped: dict[str, str] = field(default_factory=dict)
    preprocess: Preprocess | None = None

    @property
    def kind(self) -> str:
        return "clip"

    @property
    def variant(self) -> str:
        """The name of the image tower's sizes in models/vit.py, or ""."""
        return variant_of(self.shape)

    @property
    def released_as(self) -> str:
        """The name of a released pair of these sizes (models/two_tower.py), or ""."""
        sizes = [(name, (VARIANTS[c.image], TEXT_VARIANTS[c.text], c.joint_width)) for name, c in CLIP_VARIANTS.items()]
        own = (_sizes(self.shape), _text_sizes(self.text), self.joint_width)
        return next((n for n, (image, text, e) in sizes if (_sizes(image), _text_sizes(text), e) == own), "")

    def build(self) -> TwoTower:
        """The module, in evaluation mode, with these very tensors (not copies)."""
        module = empty_clip(self.shape, self.image_size, self.text, self.joint_width, "logit_bias" in self.weights)
        module.load_state_dict(self.weights, strict=True, assign=True)
        fill_buffers(module.text)
        return module.eval()

    def report(self) -> list[str]:
        """What was taken and what was dropped, a line each."""
        parameters, s, t = sum(value.numel() for value in self.weights.values()), self.shape, self.text
        return [
            f"{self.layout}: image and text tower{f' ({self.released_as})' if self.released_as else ''}",
            f"  image: {self.variant or 'of its own size'}, {s.depth} blocks of width {s.width}, {s.heads} heads, "
            f"patch {s.patch}, {self.image_size} px",
            f"  text: {t.depth} layers of width {t.width}, {t.heads} heads, {t.vocabulary:,} ids, "
            f"{t.positions} positions; both are projected to {self.joint_width}",
            f"taken: {len(self.weights)} tensors, {parameters:,} parameters",
            *dropped_lines(self.dropped),
        ]


def empty_clip(shape: Shape, image_size: int, text: TextShape, width: int, bias: bool = False) -> TwoTower:
    """Both towers without memory for their values (torch's meta device)."""
    with torch.device("meta"):
        return TwoTower(VisionTransformer(shape, image_size), TextTower(text), width, bias=bias)


def fill_buffers(tower: TextTower) -> None:
    """Give a tower that was made without memory its constant tables, which no file of weights holds.

    They are those of a tower of the same number of positions and no other size.
    """
    tiny = TextTower(replace(tower.shape, width=2 * tower.shape.heads, depth=0, vocabulary=4, mlp=2))
    values = dict(tiny.named_buffers())
    for path, module in tower.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(name, values[f"{path}.{name}"], persistent=False)


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
    check_numbers(weights)
    if "fc_norm.weight" in weights and "norm.weight" not in weights:
        raise CheckpointError(
            "fc_norm.*: it averages its patches before the last norm, as finetuned MAE and LC-MAE models do; "
            "import it with --from mae"
        )
    problems = differences(weights, wanted)
    if problems:
        raise CheckpointError(
            f"the tensors do not make {_said(shape, image_size, decoder)}: {'; '.join(problems[:SHOWN])}"
        )


def check_numbers(weights: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for integers: quantised weights mean something else than their values."""
    if odd := [f"{name} ({value.dtype})" for name, value in weights.items() if not value.is_floating_point()]:
        raise CheckpointError(
            f"weights are floating-point numbers, and these are not: {', '.join(odd[:SHOWN])}; of a quantised model "
            f"take the file it was made from"
        )


def check_head(head: Mapping[str, Tensor], width: int) -> None:
    """A linear layer from the width to any number of classes, or nothing."""
    if not head:
        return
    check_numbers(head)
    shapes = {name: tuple(value.shape) for name, value in head.items()}
    classes = shapes.get("head.bias", ())
    if len(classes) != 1 or shapes.get("head.weight") != (*classes, width):
        raise CheckpointError(
            f"the head has {', '.join(f'{name} {shape}' for name, shape in shapes.items())}; expected head.weight "
            f"(classes, {width}) and head.bias (classes,)"
        )


def check_clip(weights: Mapping[str, Tensor], shape: Shape, image_size: int, text: TextShape, width: int) -> None:
    """`check` of a pair of towers."""
    check_numbers(weights)
    wanted = clip_names_and_shapes(shape, image_size, text, width, "logit_bias" in weights)
    if problems := differences(weights, wanted):
        raise CheckpointError(
            f"the tensors do not make {_said(shape, image_size, None)} beside a text tower of {text.depth} layers of "
            f"width {text.width}, both projected to {width}: {'; '.join(problems[:SHOWN])}"
        )


@cache
def clip_names_and_shapes(
    shape: Shape, image_size: int, text: TextShape, width: int, bias: bool
) -> dict[str, torch.Size]:
    """Of the tensors of both towers and what joins them."""
    return {name: value.shape for name, value in empty_clip(shape, image_size, text, width, bias).state_dict().items()}


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


def dropped_lines(dropped: Mapping[str, str]) -> list[str]:
    """What was left out and why, a line for each pattern of names."""
    counts = Counter((pattern(name), reason) for name, reason in dropped.items())
    return [f"dropped: {name}{times(count)}: {reason}" for (name, reason), count in counts.items()]


def pattern(name: str) -> str:
    """A tensor's name without the number of its block or layer."""
    return re.sub(r"(\.|layer_)\d+(?=\.)", r"\1*", name, count=1)


def times(count: int) -> str:
    return f" ({count} tensors)" if count > 1 else ""


def variant_of(shape: Shape) -> str:
    """The name of these sizes in models/vit.py, or "" for others."""
    return next((name for name, known in VARIANTS.items() if _sizes(known) == _sizes(shape)), "")


def _sizes(shape: Shape) -> tuple[int, ...]:
    return shape.patch, shape.depth, shape.width, shape.heads


def _text_sizes(shape: TextShape) -> tuple[object, ...]:
    return shape.width, shape.depth, shape.heads, shape.vocabulary, shape.layout
