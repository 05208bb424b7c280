"""The loss of masked autoencoding against loops over images and patches in float64 (recipes §2.2, §3.3)."""

import pytest
import torch
from torch.testing import assert_close

from maws.config import IMAGENET_MEAN, IMAGENET_STD
from maws.models import init
from maws.models.mae import DecoderShape, MaskedAutoencoder
from maws.models.vit import Shape
from maws.objectives.masked_patches import MaskedPatches, reconstruct
from maws.objectives.targets import Pixels

SIDE, PATCH, GRID = 24, 4, 6  # 36 patches
CLOSE = {"rtol": 1e-6, "atol": 0.0}


def objective(norm: bool = True, keep: int = 10, reduction: str = "none", restore: bool = False) -> MaskedPatches:
    shape = Shape(patch=PATCH, depth=1, width=16, heads=2, image=SIDE)
    mae = MaskedAutoencoder(shape, SIDE, DecoderShape(16, 1, 2, reduction, restore))
    made = MaskedPatches(mae, keep, IMAGENET_MEAN, IMAGENET_STD, Pixels(mae.prediction_patch, norm))
    init.fill(made, made.init_rules(), seed=0)
    return made.eval()


def batch(images: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(images)
    return {
        "image": torch.randint(0, 256, (images, 3, SIDE, SIDE), dtype=torch.uint8, generator=g),
        "ids_shuffle": torch.rand(images, GRID**2, generator=g).argsort(dim=1),
    }


def pixels_of(image: torch.Tensor, patch: int, number: int, norm: bool) -> torch.Tensor:
    """One patch's target: row, column, channel, the last one fastest, in float64."""
    per_row = SIDE // patch
    top, left = number // per_row * patch, number % per_row * patch
    values = [
        (float(image[c, top + y, left + x]) / 255 - IMAGENET_MEAN[c]) / IMAGENET_STD[c]
        for y in range(patch)
        for x in range(patch)
        for c in range(3)
    ]
    values = torch.tensor(values, dtype=torch.float64)
    if not norm:
        return values
    centred = values - values.sum() / len(values)
    return centred / ((centred**2).sum() / (len(values) - 1) + 1e-6).sqrt()


@torch.no_grad()
def predictions(made: MaskedPatches, given: dict[str, torch.Tensor]) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    images = ((given["image"].float() / 255 - mean) / std).to(made.autoencoder.dtype)
    return made.autoencoder(images, given["ids_shuffle"], made.keep).double()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("reduction", ["none", "restored"])
def test_the_loss_is_the_mean_over_masked_patches_only(norm, reduction):
    made = objective(norm, reduction="none" if reduction == "none" else "conv", restore=reduction == "restored")
    given = batch()
    prediction, errors = predictions(made, given), []
    for i in range(3):
        for place, patch in enumerate(given["ids_shuffle"][i, 10:].tolist()):
            errors.append((prediction[i, place] - pixels_of(given["image"][i], PATCH, patch, norm)).square().mean())
    assert len(errors) == 3 * 26
    assert_close(made(given)["loss"].double(), torch.stack(errors).mean(), **CLOSE)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("reduction", ["conv", "average"])
def test_a_patch_of_two_by_two_counts_by_the_share_of_it_that_was_masked(norm, reduction):
    made, given = objective(norm, reduction=reduction), batch()
    prediction = predictions(made, given)
    total = weights = 0.0
    shares = set()
    for i in range(3):
        visible = set(given["ids_shuffle"][i, :10].tolist())
        for cell in range(9):
            row, col = 2 * (cell // 3), 2 * (cell % 3)
            share = sum((row + r) * GRID + col + c not in visible for r in (0, 1) for c in (0, 1)) / 4
            target = pixels_of(given["image"][i], 2 * PATCH, cell, norm)
            total += share * float((prediction[i, cell] - target).square().mean())
            weights, shares = weights + share, shares | {share}
    assert len(shares) > 2  # single patches were masked: some cells are masked in part
    assert made(given)["loss"].item() == pytest.approx(total / weights, rel=1e-6)


def test_the_prediction_of_a_wholly_visible_cell_does_not_matter():
    made, given = objective(reduction="conv", keep=8), batch(1)
    seen = [0, 1, 6, 7, 2, 3, 8, 9]  # the first two cells, patch by patch
    given["ids_shuffle"] = torch.tensor([seen + [p for p in range(36) if p not in seen]])
    loss = made(given)["loss"]
    painted = given["image"].clone()
    painted[:, :, :8, :16] = 255 - painted[:, :, :8, :16]  # other targets there; predictions are held below
    prediction = predictions(made, given).float()
    made.autoencoder.forward = lambda *_: prediction
    assert_close(made(given | {"image": painted})["loss"], loss)


def test_targets_and_loss_stay_in_float32_when_the_weights_do_not():
    made, given = objective(), batch()
    made.bfloat16()
    prediction, want = predictions(made, given), []
    for i in range(3):
        for place, patch in enumerate(given["ids_shuffle"][i, 10:].tolist()):
            want.append((prediction[i, place] - pixels_of(given["image"][i], PATCH, patch, True)).square().mean())
    loss = made(given)["loss"]
    assert loss.dtype == torch.float32
    assert_close(loss.double(), torch.stack(want).mean(), **CLOSE)


def test_the_loss_has_the_gradient_of_finite_differences():
    made, given = objective(reduction="conv"), batch(2)
    made.double()
    bias = made.autoencoder.decoder_pred.bias
    made(given)["loss"].backward()
    for k in (0, 100):
        losses = []
        for step in (0.05, -0.05):  # the loss is a parabola of the bias: any step is exact
            with torch.no_grad():
                bias[k] += step
                losses.append(float(made(given)["loss"]))
                bias[k] -= step
        assert (losses[0] - losses[1]) / 0.1 == pytest.approx(float(bias.grad[k]), rel=1e-3, abs=1e-6)


def patches_of(images: torch.Tensor) -> torch.Tensor:
    """B 3 H W -> B N 4 4 3."""
    return images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1).flatten(1, 2)


@pytest.mark.parametrize("reduction", ["none", "conv"])
def test_reconstruction_keeps_visible_patches_and_gives_masked_ones_their_own_statistics_back(reduction):
    made = objective(reduction=reduction)
    x, ids = torch.randn(2, 3, SIDE, SIDE), batch(2)["ids_shuffle"]
    filled, mask = reconstruct(made.autoencoder, x, ids, 10)
    before, after = patches_of(x), patches_of(filled)
    assert mask.sum(dim=1).tolist() == [26, 26]
    assert torch.equal(after[mask == 0], before[mask == 0])
    patch = int(ids[1, 12])
    row, col = divmod(patch, GRID)
    prediction = made.autoencoder(x, ids, 10)[1]
    if reduction == "none":
        own, painted = before[1, patch], prediction[2].view(PATCH, PATCH, 3)
    else:  # the quarter of the cell's 8 x 8 prediction that this patch is
        top, left = row // 2 * 8, col // 2 * 8
        own = x[1, :, top : top + 8, left : left + 8]
        cell = prediction[row // 2 * 3 + col // 2].view(8, 8, 3)
        painted = cell[row % 2 * 4 : row % 2 * 4 + 4, col % 2 * 4 : col % 2 * 4 + 4]
    assert_close(after[1, patch], painted * (own.var() + 1e-6).sqrt() + own.mean())


def test_reconstruction_of_plain_pixels_pastes_the_prediction():
    made = objective(norm=False)
    x, ids = torch.randn(2, 3, SIDE, SIDE), batch(2)["ids_shuffle"]
    filled, _ = reconstruct(made.autoencoder, x, ids, 10, norm_pix=False)
    prediction = made.autoencoder(x, ids, 10)
    assert_close(patches_of(filled)[0, ids[0, 35]], prediction[0, 25].view(PATCH, PATCH, 3))
