"""Patches to vectors: timm's patch embedding that can skip masked patches, and its kernel for another patch size.

Axes: B images, N patches, K visible patches, D width, p and q sides of a patch.
"""

from typing import Any

import torch.nn.functional as F
from timm.layers import PatchEmbed as TimmPatchEmbed
from timm.layers import resample_patch_embed
from torch import Tensor, nn

RESAMPLING = ("bicubic", "pinv")


class PatchProjection(nn.Conv2d):
    """The patch convolution, which can also embed only some of the patches; weights and names are the convolution's."""

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Map B 3 H W to B D h w, or, given `ids_keep` (B K), to B K D for those patches alone."""
        if ids_keep is None:
            return super().forward(images)
        patches = self.patches(images).take_along_dim(ids_keep[..., None], dim=1)  # B K 3pp
        return F.linear(patches, self.weight.flatten(1), self.bias)

    def patches(self, images: Tensor) -> Tensor:
        """Cut B 3 H W into B N 3pp, channel first inside a patch, as the convolution's weight is laid out."""
        b, c, h, w = images.shape
        p, q = self.kernel_size
        x = images.reshape(b, c, h // p, p, w // q, q).permute(0, 2, 4, 1, 3, 5)  # B h w C p q
        return x.reshape(b, (h // p) * (w // q), c * p * q)


class PatchEmbed(TimmPatchEmbed):
    """timm's patch embedding with a projection that can skip masked patches."""

    def __init__(self, *args: Any, in_chans: int = 3, embed_dim: int = 768, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, in_chans=in_chans, embed_dim=embed_dim, bias=bias, **kwargs)
        patch = int(self.patch_size[0])
        self.proj = PatchProjection(in_chans, embed_dim, kernel_size=patch, stride=patch, bias=bias)

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Embed B 3 H W as B N D, or B K D for the patches in `ids_keep`."""
        x = self.proj(images, ids_keep)
        return x if ids_keep is not None else x.flatten(2).transpose(1, 2)


def resample_patches(weight: Tensor, patch: int, method: str = "bicubic") -> Tensor:
    """A patch kernel (D 3 p p) for patches of another side (D 3 q q).

    `bicubic` resizes the kernel as the picture it is (long-sequence MAE §4.1); `pinv` is the kernel whose answers to
    resized patches are nearest to the old one's (FlexiViT, Beyer et al., 2023, eq. 3; timm's code).
    Raises ValueError for another method. The same side gives the kernel itself.
    """
    if method not in RESAMPLING:
        raise ValueError(f"patch kernels are resampled by {' or '.join(RESAMPLING)}, not {method!r}")
    if tuple(weight.shape[-2:]) == (patch, patch):
        return weight
    if method == "pinv":
        return resample_patch_embed(weight.float(), [patch, patch]).to(weight.dtype)
    resized = F.interpolate(weight.float(), size=(patch, patch), mode="bicubic", align_corners=False)
    return resized.to(weight.dtype)
