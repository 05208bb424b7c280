"""The image tower in a release, read one tensor at a time: whoever uses it holds no more than it needs at once.

    with TowerFile(release) as tower: weight = tower.read("blocks.0.attn.qkv.weight")

Axes: B images, C class tokens, N patches, T = C + N tokens, D width, H heads, d width of a head.
"""

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.models.patch_embed import resample_patches
from maws.models.pos_embed import relative_index, resize_positions
from maws.models.vit import Shape
from maws.release import ENCODER, Release
from maws.weight_files import WeightFiles

POSITIONS, KERNEL, RELATIVE = "pos_embed", "patch_embed.proj.weight", "rel_pos_bias.relative_position_bias_table"
EPS = 1e-6  # of every norm, recipes §1.2


@dataclass(frozen=True)
class Fit:
    """How a tower's tensors become those of a model with another image or patch size (recipes §3.5)."""

    shape: Shape  # of the model they are for
    grid: tuple[int, int]
    align_corners: bool = False
    patch: str = "bicubic"

    def takes(self, name: str, there: Shape) -> bool:
        """Is a tensor of a tower of shape `there` one for this model? A norm of tokens is none for their mean, and the
        other way round: then the model's is new, as in MAE's finetuning (recipes §9.4)."""
        norm = name.startswith("norm.")
        return not norm or (self.shape.pool == "mean_norm") == (there.pool == "mean_norm")


class TowerFile(AbstractContextManager["TowerFile"]):
    """The tensors of a release; those of the image tower under timm's names, whatever the stage that wrote them."""

    def __init__(self, release: Release) -> None:
        """Raises CheckpointError when the file is damaged."""
        self.release, self.shape = release, release.shape
        prefix = "image." if release.stage == "lit" else ""
        self._file = WeightFiles(release.weights)
        self.all_names = self._file.names
        own = re.escape(prefix) + ENCODER
        self._stored = {k.removeprefix(prefix): k for k in self.all_names if re.fullmatch(own, k)}

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.release.config["image_size"] // self.shape.patch
        return side, side

    def stored(self, name: str) -> str:
        """The name in the file."""
        return self._stored[name]

    def size(self, name: str, fit: Fit) -> tuple[int, ...]:
        """The shape that `read` would give; only what has to be adapted is read for it."""
        if name in (POSITIONS, KERNEL):
            return tuple(self.read(name, fit).shape)
        return self._file.shape(self._stored[name])

    def read(self, name: str, fit: Fit | None = None) -> Tensor:
        """A tensor, made to fit if asked. Raises CheckpointError when it is not there, damaged, or not as promised."""
        if name not in self._stored:
            raise CheckpointError(f"{self.release.weights} has no {name}, which its config.json promises")
        value = self._file.read(self._stored[name])
        if fit is None:
            return value
        if name == POSITIONS:
            try:
                return resize_positions(value, self.shape.class_tokens, self.grid, fit.grid, fit.align_corners)
            except ValueError as e:
                raise CheckpointError(f"{self.release.weights} does not fit its config.json: {e}") from None
        if name == KERNEL and self.shape.patch != fit.shape.patch:
            return resample_patches(value, fit.shape.patch, fit.patch)
        return value


class Tower(Protocol):
    """What can be read tensor by tensor: TowerFile, or a file of another project (import_check.py)."""

    @property
    def shape(self) -> Shape: ...

    def read(self, name: str, fit: Fit | None = None) -> Tensor: ...


@torch.no_grad()
def reference_tokens(tower: Tower, images: Tensor, fit: Fit) -> Tensor:
    """Tokens (B T D) of normalised images (B 3 H W), after the final norm unless that is for their mean: the ViT of
    recipes §1.2 in plain float32 operations, with one block's weights in memory at a time, on the images' device.
    """

    def read(name: str) -> Tensor:
        return tower.read(name, fit).to(images.device, torch.float32)

    shape, b = tower.shape, len(images)
    x = F.conv2d(images.float(), read(KERNEL), read("patch_embed.proj.bias"), stride=fit.shape.patch)
    x = x.flatten(2).transpose(1, 2)  # B N D
    if shape.class_tokens:
        x = torch.cat([read("cls_token").expand(b, -1, -1), x], dim=1)  # B T D
    mask = None
    if shape.positions == "relative":
        mask = read(RELATIVE)[relative_index(fit.grid, shape.class_tokens).to(images.device)].permute(2, 0, 1)  # H T T
    else:
        x = x + read(POSITIONS)
    for i in range(shape.depth):
        x = _block(x, {n: read(f"blocks.{i}.{n}") for n in BLOCK}, shape.heads, mask)
    if fit.shape.pool == "mean_norm":
        return x
    return F.layer_norm(x, (shape.width,), read("norm.weight"), read("norm.bias"), EPS)


BLOCK = [
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]


def _block(x: Tensor, p: dict[str, Tensor], heads: int, mask: Tensor | None) -> Tensor:
    """x + attention(norm1(x)), then x + mlp(norm2(x)); B T D to B T D."""
    b, t, width = x.shape

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), p[f"{name}.weight"], p[f"{name}.bias"], EPS)

    q, k, v = linear(norm(x, "norm1"), "attn.qkv").view(b, t, 3, heads, -1).permute(2, 0, 3, 1, 4)  # B H T d each
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # B H T T
    attention = (logits if mask is None else logits + mask).softmax(dim=-1)
    x = x + linear((attention @ v).transpose(1, 2).reshape(b, t, width), "attn.proj")
    return x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")
