"""Does the folder of another library compute what our release does? Both are given the same images and texts.

    theirs = layout.outputs(folder, inputs); differences(ours(release, inputs, theirs, torch.float32), theirs)

| output | shape | of |
|---|---|---|
| tokens | B 1+N D | the image tower, after its norm |
| features | B D | its pooled tokens |
| images, texts | B E | the two towers, normalised |
| scores | B S or B B | a linear head; or all pairs of the two towers |
| predictions | B M P | an autoencoder's masked patches |

One of the two models is in memory at a time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.interop.outgoing import Inputs, linear_head
from maws.models.text import BOS, EOS, PAD, TextShape
from maws.release import Release, load_image_tower, load_masked_autoencoder, load_two_tower
from maws.weight_files import WeightFiles

TOLERANCE = 1e-4  # of the largest output; float32's rounding in another order of operations stays far below
IMAGES = 2


def fixed_inputs(release: Release) -> Inputs:
    """Two images of noise and, for LiT, two texts of which the first is padded on the right."""
    side, generator = release.config["image_size"], torch.Generator().manual_seed(0)
    pixels = torch.randn(IMAGES, 3, side, side, generator=generator)
    noise = torch.rand(IMAGES, (side // release.shape.patch) ** 2, generator=generator)
    if release.stage != "lit":
        return Inputs(pixels, noise)
    text = TextShape(**release.config["text"])
    length = min(text.context + 2, 16)
    ids = torch.randint(EOS + 2, text.vocabulary, (IMAGES, length), generator=generator)  # no special tokens
    ids[:, 0], ids[1, -1] = BOS, EOS
    ids[0, length // 2 :] = torch.tensor([EOS] + [PAD] * (length - length // 2 - 1))
    return Inputs(pixels, noise, ids, (ids != PAD).long())


@torch.no_grad()
def ours(release: Release, inputs: Inputs, wanted: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Our outputs of the same names, computed in float32 from weights rounded to `dtype`."""

    def rounded(module: Any) -> Any:
        return module.to(dtype).float().eval()

    if "images" in wanted:
        towers = rounded(load_two_tower(release))
        image, text, scale, *bias = towers(inputs.pixels, inputs.ids, inputs.mask)
        return {"images": image, "texts": text, "scores": scale * image @ text.T + (bias[0] if bias else 0)}
    if "predictions" in wanted:
        model = rounded(load_masked_autoencoder(release).autoencoder)
        keep = inputs.noise.shape[1] - wanted["predictions"].shape[1]
        return {"predictions": model(inputs.pixels, inputs.noise.argsort(dim=1), keep)}
    tower = rounded(load_image_tower(release))
    tokens = tower(inputs.pixels)
    found = {"tokens": tokens, "features": tower.pooled(tokens)}
    if "scores" in wanted:
        with WeightFiles(release.weights) as files:
            weight, bias = (files.read(linear_head(release, files)[n]).to(dtype).float() for n in ("weight", "bias"))
        found["scores"] = F.linear(found["features"], weight, bias)
    return {name: found[name] for name in wanted}


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each output, against the largest value of ours. Raises CheckpointError above TOLERANCE.

    Also for values that are not finite.
    """
    found: dict[str, float] = {}
    for name, value in theirs.items():
        if value.shape != ours[name].shape:
            raise CheckpointError(f"{name} are {tuple(value.shape)}, and ours {tuple(ours[name].shape)}")
        found[name] = float((value - ours[name]).abs().max() / ours[name].abs().max().clamp(min=1e-12))
        if not found[name] <= TOLERANCE:
            raise CheckpointError(
                f"{name} differ by {found[name]:.2g} of the largest, more than {TOLERANCE:.0e}: the folder does not "
                f"hold the same model, so it is not kept"
            )
    return found
