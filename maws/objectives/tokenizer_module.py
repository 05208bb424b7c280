"""A tokenizer of images that somebody else wrote, named by `package.module:factory`: frozen, and part of no model.

The factory returns an nn.Module that maps float32 pictures B 3 S S to token ids B N or B rows cols, row-major. It is
built at the first batch, on every rank alike and outside of the objective's parameters, so that it is in no optimizer,
checkpoint or release, and whole under ZeRO-3.

Axes: B images, N patches.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from maws.config import ConfigError
from maws.models.vit import normalise

Pixels = Callable[[Tensor], Tensor]  # uint8 B 3 S S -> float32


def _unit(images: Tensor) -> Tensor:
    return images.float() / 255


# What tokenizers want their pixels to be, made from the data's mean and deviation.
PIXELS: dict[str, Callable[[tuple[float, ...], tuple[float, ...]], Pixels]] = {
    "normalised": lambda mean, std: lambda images: normalise(images, mean, std),
    "unit": lambda mean, std: _unit,
    "dalle": lambda mean, std: lambda images: (1 - 2 * 0.1) * _unit(images) + 0.1,  # logit-Laplace, eps 0.1
}


class TokenizerModule:
    """uint8 pictures to the ids of their patches' tokens."""

    def __init__(
        self, factory: str, weights: str, classes: int, side: int, grid: tuple[int, int], pixels: Pixels
    ) -> None:
        self.factory, self.weights, self.classes = factory, weights, classes
        self.side, self.grid, self.pixels = side, grid, pixels
        self._module: nn.Module | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 B 3 S S -> int64 B N. Raises ConfigError for ids that are not of this grid, or not below `classes`."""
        first = self._module is None
        if self._module is None:
            self._module = build(self.factory, self.weights).to(images.device)
        ids = self._module(self.pixels(images)).flatten(1).long()
        self._check_shape(ids)
        if first and not 0 <= int(ids.min()) <= int(ids.max()) < self.classes:  # once: it waits for the device
            raise ConfigError(
                f"target.tokenizer={self.factory} gives ids from {int(ids.min())} to {int(ids.max())}; "
                f"they must lie below target.classes={self.classes}"
            )
        return ids

    def check(self) -> None:
        """Build it once and show it a grey picture, where there is still nothing to lose."""
        with torch.no_grad():
            grey = torch.full((1, 3, self.side, self.side), 128, dtype=torch.uint8)
            self._check_shape(build(self.factory, self.weights)(self.pixels(grey)).flatten(1))

    def _check_shape(self, ids: Tensor) -> None:
        rows, cols = self.grid
        if ids.shape[1] != rows * cols:
            raise ConfigError(
                f"target.tokenizer={self.factory} gives {ids.shape[1]} tokens for a picture of {self.side} pixels, "
                f"the model predicts {rows} x {cols}; set target.image_size so that they agree "
                f"(BEiT: 112 for DALL-E's tokenizer and 14 x 14 patches)"
            )


def build(factory: str, weights: str = "") -> nn.Module:
    """The module of a factory, frozen and in evaluation mode; random values in it are the same on every rank.

    Raises ConfigError when the name leads to none, or the weights are not its own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _find(factory)()
    if not isinstance(module, nn.Module):
        raise ConfigError(f"target.tokenizer={factory} returned {type(module).__name__}, not an nn.Module")
    if weights:
        try:
            module.load_state_dict(load_file(weights), strict=True)
        except (OSError, SafetensorError, RuntimeError) as e:
            raise ConfigError(f"target.weights={weights} cannot be loaded into {factory}: {e}") from None
    return module.eval().requires_grad_(False)


def _find(factory: str) -> Callable[[], Any]:
    name, _, attribute = factory.partition(":")
    if not name or not attribute:
        raise ConfigError(
            f"target.tokenizer={factory or '(empty)'}: write package.module:factory, the name of a function that "
            f"returns a module; none is shipped"
        )
    try:
        found = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"target.tokenizer={factory} cannot be imported: {e}; is it on PYTHONPATH?") from None
    if not callable(found):
        raise ConfigError(f"target.tokenizer={factory} is a {type(found).__name__}, not a function")
    return found
