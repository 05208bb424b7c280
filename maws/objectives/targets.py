"""What a masked autoencoder predicts of a patch: pixels, PCA coefficients, tokens or HOG (recipes §2.3).

    deepspeed maws/train.py --stage mae --preset vit_l16_pca … target.file=runs/pca.safetensors
    deepspeed maws/train.py --stage mae --preset vit_l16_tokens … target.tokenizer=package.module:factory

A target is no nn.Module: what it holds (a basis, a tokenizer) is never trained, saved or partitioned. It is put on the
device at the first batch, because an objective is built where ZeRO-3 may split and cast every tensor that is made.

Axes: B images, N patches, M predicted patches, P values of a patch (3pp), K components.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from maws.config import ConfigError, nearest
from maws.data.batch import MaskedBatch
from maws.files import write_whole
from maws.models.mae import normalise_patches, patchify
from maws.objectives.hog import HOG
from maws.objectives.tokenizer_module import PIXELS, TokenizerModule

KINDS = ("norm_pixels", "pixels", "pca", "tokens", "hog")
FIT = "python -m maws fit-pca --shards SHARDS"
Colours = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    kind: str = "norm_pixels"  # norm_pixels (each patch's own mean and deviation taken out), pixels, pca, tokens or hog
    file: str = ""  # pca: what `python -m maws fit-pca` wrote
    components: int = 96  # pca: how many of the file's are predicted, largest first
    tokenizer: str = ""  # tokens: package.module:factory, a function that returns a module, B 3 S S -> B N token ids
    weights: str = ""  # tokens: a safetensors file of the module's state; empty: what the factory gives
    classes: int = 8192  # tokens: how many different ones there are; DALL-E's
    image_size: int = 0  # tokens: side of a second picture of the same crop, Lanczos; 0: the encoder's own picture
    pixels: str = "dalle"  # tokens: what the tokenizer wants: normalised, unit (0..1) or dalle (0.8 x + 0.1)


class Target(Protocol):
    """What is predicted of a patch, and how far off a prediction is."""

    outputs: int  # values that are predicted of a patch

    def of(self, batch: MaskedBatch, images: Tensor, ids: Tensor) -> Tensor:
        """The targets of patches `ids` (B M) of the prediction grid, float32 B M P or ids B M.

        `images` is batch["image"] with mean and deviation taken out, float32.
        """
        ...

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The errors of a float32 prediction (B M `outputs`): B M, or B M P where a patch's error is their mean."""
        ...

    def check(self) -> None:
        """Raises ConfigError when the target cannot be used; called once, before anything is built."""


class Pixels:
    """The pixels of a patch; with `norm`, less its own mean and over its own deviation (recipes §2.2)."""

    def __init__(self, patch: int, norm: bool = True) -> None:
        self.patch, self.norm, self.outputs = patch, norm, 3 * patch**2

    def of(self, batch: MaskedBatch, images: Tensor, ids: Tensor) -> Tensor:
        patches = patchify(images, self.patch).take_along_dim(ids[..., None], dim=1)  # B M P
        return normalise_patches(patches)[0] if self.norm else patches

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square()

    def check(self) -> None:
        """There is nothing that could be wrong."""


@dataclass(frozen=True)
class Basis:
    """Principal components of patches, and of which patches they are."""

    mean: np.ndarray  # P
    components: np.ndarray  # K P, orthonormal rows, the one of the largest variance first
    variance: np.ndarray  # K
    patch: int
    colours: tuple[Colours, Colours]  # mean and deviation that were taken out of the pixels
    patches: int  # how many it was fitted to
    total_variance: float  # of all P directions

    def write(self, path: Path, facts: dict[str, object]) -> None:
        """One safetensors file; what the numbers belong to, and `facts`, are its metadata."""
        known = {name: getattr(self, name) for name in ("patch", "colours", "patches", "total_variance")}
        tensors = {"mean": self.mean, "components": self.components, "explained_variance": self.variance}
        floats = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save(floats, metadata={"maws.pca": json.dumps(known | facts)}))

    @classmethod
    def read(cls, path: Path) -> "Basis":
        """Raises ConfigError when the file is not there or is not one of `fit-pca`."""
        try:
            with safe_open(path, "numpy") as file:
                facts = json.loads((file.metadata() or {})["maws.pca"])
                mean, components, variance = (
                    file.get_tensor(n) for n in ("mean", "components", "explained_variance")
                )  # fmt: skip
            colours = tuple(facts["colours"][0]), tuple(facts["colours"][1])
            return cls(mean, components, variance, facts["patch"], colours, facts["patches"], facts["total_variance"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError) as e:
            raise ConfigError(f"target.file={path} is no basis of patches ({e}); make one with `{FIT}`") from None


class PrincipalComponents:
    """The largest PCA coefficients of a patch, not whitened: those of more variance weigh more (recipes §2.3)."""

    def __init__(self, basis: Basis, components: int) -> None:
        self.basis, self.outputs = basis, components
        self._mean = self._components = torch.empty(0)

    @classmethod
    def read(cls, cfg: TargetConfig, patch: int, mean: Colours, std: Colours) -> "PrincipalComponents":
        """Raises ConfigError when the file is missing, or was fitted to other patches or other colours."""
        if not cfg.file:
            raise ConfigError(f"target.kind=pca needs target.file; make one with `{FIT} --patch {patch}`")
        basis = Basis.read(Path(cfg.file))
        if basis.patch != patch:
            raise ConfigError(
                f"target.file={cfg.file} is for patches of {basis.patch} pixels, this model predicts {patch}; "
                f"fit another with `{FIT} --patch {patch}`"
            )
        if basis.colours != (tuple(mean), tuple(std)):
            raise ConfigError(
                f"target.file={cfg.file} was fitted with data.mean, data.std = {basis.colours}, "
                f"this run has {(tuple(mean), tuple(std))}; give both the same"
            )
        if not 0 < cfg.components <= len(basis.components):
            raise ConfigError(
                f"target.components={cfg.components} must be from 1 to the {len(basis.components)} of {cfg.file}"
            )
        return cls(basis, cfg.components)

    def of(self, batch: MaskedBatch, images: Tensor, ids: Tensor) -> Tensor:
        if self._mean.device != images.device or not len(self._mean):
            self._mean = torch.from_numpy(self.basis.mean).to(images)
            self._components = torch.from_numpy(self.basis.components[: self.outputs]).to(images)
        patches = patchify(images, self.basis.patch).take_along_dim(ids[..., None], dim=1)  # B M P
        return (patches - self._mean) @ self._components.T  # B M K

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square()

    def check(self) -> None:
        """Everything was checked when the file was read."""


class Tokens:
    """Tokens of a frozen tokenizer, as BEiT has them: cross-entropy on the predicted positions (recipes §2.3)."""

    def __init__(self, tokenizer: TokenizerModule, classes: int) -> None:
        self.tokenizer, self.outputs = tokenizer, classes

    @classmethod
    def read(cls, cfg: TargetConfig, image_size: int, grid: tuple[int, int], mean: Colours, std: Colours) -> "Tokens":
        if cfg.pixels not in PIXELS:
            raise ConfigError(f"target.pixels={cfg.pixels} is not known; {nearest(cfg.pixels, list(PIXELS))}")
        if cfg.classes < 2:
            raise ConfigError(f"target.classes={cfg.classes} must be at least 2; DALL-E's tokenizer has 8192")
        if cfg.image_size < 0:
            raise ConfigError(f"target.image_size={cfg.image_size} cannot be less than 0; 0 is the encoder's own")
        side, pixels = cfg.image_size or image_size, PIXELS[cfg.pixels](mean, std)
        return cls(TokenizerModule(cfg.tokenizer, cfg.weights, cfg.classes, side, grid, pixels), cfg.classes)

    def of(self, batch: MaskedBatch, images: Tensor, ids: Tensor) -> Tensor:
        return self.tokenizer(batch.get("image_second", batch["image"])).gather(1, ids)  # B M

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)

    def check(self) -> None:
        self.tokenizer.check()


def make_target(
    cfg: TargetConfig, patch: int, image_size: int, grid: tuple[int, int], mean: Colours, std: Colours
) -> Target:
    """The target of a config for a model that predicts patches of `patch` pixels on `grid`.

    Raises ConfigError for an unknown kind and for what a kind needs and does not get.
    """
    if cfg.kind in ("norm_pixels", "pixels"):
        return Pixels(patch, norm=cfg.kind == "norm_pixels")
    if cfg.kind == "pca":
        return PrincipalComponents.read(cfg, patch, mean, std)
    if cfg.kind == "tokens":
        return Tokens.read(cfg, image_size, grid, mean, std)
    if cfg.kind == "hog":
        return HOG(patch)
    raise ConfigError(f"target.kind={cfg.kind} is not known; {nearest(cfg.kind, KINDS)}")
