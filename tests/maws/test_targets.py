"""What is predicted of a patch: PCA coefficients, tokens and HOG against slow re-computations; what is refused."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from training import arguments, losses

from maws import config, optim, stages
from maws.checkpoint import CheckpointError
from maws.config import IMAGENET_MEAN, IMAGENET_STD, ConfigError
from maws.data.order import Part
from maws.models import init
from maws.objectives.hog import histograms
from maws.objectives.targets import Basis, PrincipalComponents, Target, TargetConfig, make_target
from maws.objectives.tokenizer_module import PIXELS, build
from maws.release import load_masked_autoencoder, open_release

COLOURS = IMAGENET_MEAN, IMAGENET_STD
CLASSES = 6
TOKENIZER = """
import torch
import torch.nn.functional as F
from torch import nn

class NearestCentre(nn.Module):
    '''The number of the nearest of six colours of a patch's pixels, all of them together.'''

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(6, 192))

    def forward(self, images):
        patches = F.unfold(images, 8, stride=8).transpose(1, 2)
        return (patches[:, :, None] - self.centres).square().sum(-1).argmin(-1)

class Far(NearestCentre):
    def forward(self, images):
        return super().forward(images) + 4

rows = "not a function"
number = lambda: 7
"""


def target(patch: int = 8, grid: tuple[int, int] = (4, 4), side: int = 32, **changes) -> Target:
    return make_target(TargetConfig(**changes), patch, side, grid, *COLOURS)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in COLOURS)
    return (images.float() / 255 - mean) / std


def pictures(n: int, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


# ----------------------------------------------------------------------------------------------- principal components


@pytest.fixture
def basis(tmp_path) -> Path:
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(192, 10)))[0].T
    mean = np.random.default_rng(1).normal(size=192)
    Basis(mean, rows, np.arange(10, 0, -1.0), 8, COLOURS, 5000, 100.0).write(tmp_path / "pca" / "p8.safetensors", {})
    return tmp_path / "pca" / "p8.safetensors"


def test_pca_targets_are_the_coefficients_of_the_centred_patch(basis):
    made = target(kind="pca", file=str(basis), components=7)
    images, ids = normalised(pictures(2)), torch.tensor([[3, 0, 9], [15, 14, 1]])
    got = made.of({"image": pictures(2)}, images, ids)
    stored = load_file(basis)
    assert got.shape == (2, 3, 7) and made.outputs == 7
    for b in range(2):
        for m in range(3):
            row, col = divmod(int(ids[b, m]), 4)
            values = [
                float(images[b, c, 8 * row + y, 8 * col + x]) for y in range(8) for x in range(8) for c in range(3)
            ]
            centred = np.array(values) - stored["mean"].double().numpy()
            for k in range(7):
                want = float((centred * stored["components"][k].double().numpy()).sum())
                assert float(got[b, m, k]) == pytest.approx(want, rel=1e-4, abs=1e-5)
    prediction = torch.randn(2, 3, 7)
    assert_close(made.error(prediction, got), (prediction - got) ** 2)  # not whitened: every coefficient weighs alike


def test_a_basis_survives_its_file_and_knows_what_it_was_made_of(basis):
    read = Basis.read(basis)
    assert (read.patch, read.colours, read.patches, read.total_variance) == (8, COLOURS, 5000, 100.0)
    assert read.components.shape == (10, 192) and read.variance.tolist() == list(range(10, 0, -1))
    assert not list(basis.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": ""}, "target.kind=pca needs target.file; make one with `python -m maws fit-pca"),
        ({"file": "nowhere"}, "target.file=nowhere is no basis of patches"),
        ({"components": 11}, "target.components=11 must be from 1 to the 10 of"),
        ({"patch": 4}, "is for patches of 8 pixels, this model predicts 4; fit another with .* --patch 4"),
    ],
)
def test_a_basis_that_does_not_fit_is_refused(basis, changes, message):
    settings = {"kind": "pca", "file": str(basis), "components": 10} | changes
    with pytest.raises(ConfigError, match=message):
        target(**settings)


def test_a_basis_of_other_colours_or_another_file_is_refused(basis, tmp_path):
    with pytest.raises(ConfigError, match=r"was fitted with data.mean, data.std = .* give both the same"):
        PrincipalComponents.read(TargetConfig(file=str(basis), components=3), 8, (0.5, 0.5, 0.5), IMAGENET_STD)
    save_file({"mean": torch.zeros(192)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="is no basis of patches"):
        target(kind="pca", file=str(tmp_path / "other.safetensors"))


# ------------------------------------------------------------------------------------------------------------- tokens


@pytest.fixture
def tokenizer(tmp_path, monkeypatch) -> str:
    """A module on the path, as a user's tokenizer is."""
    (tmp_path / "some_tokenizer.py").write_text(TOKENIZER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "some_tokenizer:NearestCentre"


def patches_of(images: torch.Tensor) -> torch.Tensor:
    return F.unfold(images, 8, stride=8).transpose(1, 2).flatten(0, 1)  # B*N 192


def trained_weights(images: torch.Tensor, file: Path) -> str:
    """The centres of a few steps of k-means on the patches of unit pictures."""
    patches = patches_of(images.float() / 255)
    centres = patches[torch.linspace(0, len(patches) - 1, CLASSES).long()].clone()
    for _ in range(5):
        nearest = torch.cdist(patches, centres).argmin(1)
        for k in range(CLASSES):
            if (nearest == k).any():
                centres[k] = patches[nearest == k].mean(0)
    save_file({"centres": centres.contiguous()}, file)
    return str(file)


def test_token_errors_are_the_cross_entropies_of_the_ids_of_the_asked_patches(tokenizer, tmp_path):
    images, ids = pictures(2), torch.tensor([[3, 0, 9], [15, 14, 1]])
    weights = trained_weights(images, tmp_path / "centres.safetensors")
    made = target(kind="tokens", tokenizer=tokenizer, weights=weights, classes=CLASSES, pixels="unit")
    got = made.of({"image": images}, normalised(images), ids)
    centres, prediction = load_file(weights)["centres"].double(), torch.randn(2, 3, CLASSES)
    error = made.error(prediction, got)
    for b in range(2):
        for m in range(3):
            row, col = divmod(int(ids[b, m]), 4)
            patch = images[b, :, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8].double().flatten() / 255
            token = min(range(CLASSES), key=lambda k: float((patch - centres[k]).square().sum()))
            assert int(got[b, m]) == token
            scores = [math.exp(float(v)) for v in prediction[b, m]]
            assert float(error[b, m]) == pytest.approx(-math.log(scores[token] / sum(scores)), rel=1e-5)


def test_the_tokenizer_sees_the_second_picture_where_there_is_one(tokenizer):
    made = target(grid=(2, 2), patch=16, kind="tokens", tokenizer=tokenizer, classes=CLASSES, image_size=16)
    made.check()
    batch, ids = {"image": pictures(2), "image_second": pictures(3, side=16)[:2]}, torch.arange(4).expand(2, 4)
    want = build(tokenizer)(0.8 * batch["image_second"].float() / 255 + 0.1)
    assert torch.equal(made.of(batch, normalised(batch["image"]), ids), want)


def test_pixels_are_mapped_as_tokenizers_want_them():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    got = {name: make(*COLOURS)(images).flatten().tolist() for name, make in PIXELS.items()}
    assert got["unit"] == pytest.approx([0, 1, 0.2])
    assert got["dalle"] == pytest.approx([0.1, 0.9, 0.26])
    want = [(v - m) / s for v, m, s in zip((0, 1, 0.2), *COLOURS, strict=True)]
    assert got["normalised"] == pytest.approx(want, rel=1e-5)


def test_a_tokenizer_is_built_alike_everywhere_and_leaves_the_random_state_alone(tokenizer):
    torch.manual_seed(5)
    first = build(tokenizer)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    assert torch.equal(first.centres, build(tokenizer).centres)
    assert not first.training and not first.centres.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": ""}, "target.tokenizer=\\(empty\\): write package.module:factory"),
        ({"tokenizer": "some_tokenizer"}, "target.tokenizer=some_tokenizer: write package.module:factory"),
        ({"tokenizer": "no_such_module:f"}, "target.tokenizer=no_such_module:f cannot be imported: No module named"),
        ({"tokenizer": "some_tokenizer:nothing"}, "cannot be imported: .* has no attribute 'nothing'"),
        ({"tokenizer": "some_tokenizer:rows"}, "target.tokenizer=some_tokenizer:rows is a str, not a function"),
        ({"tokenizer": "some_tokenizer:number"}, "returned int, not an nn.Module"),
        ({"weights": "nowhere.safetensors"}, "target.weights=nowhere.safetensors cannot be loaded into"),
        ({"pixels": "dallee"}, "target.pixels=dallee is not known; did you mean dalle?"),
        ({"classes": 1}, "target.classes=1 must be at least 2"),
        ({"image_size": -1}, "target.image_size=-1 cannot be less than 0"),
        ({"image_size": 16}, "gives 4 tokens for a picture of 16 pixels, the model predicts 4 x 4"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_at_the_start(tokenizer, changes, message):
    settings = {"kind": "tokens", "tokenizer": tokenizer, "classes": CLASSES} | changes
    with pytest.raises(ConfigError, match=message):
        target(**settings).check()


def test_ids_that_are_no_classes_are_refused_at_the_first_batch(tokenizer):
    made = target(kind="tokens", tokenizer="some_tokenizer:Far", classes=4)  # its ids begin at 4
    with pytest.raises(ConfigError, match=r"gives ids from \d to \d; they must lie below target.classes=4"):
        made.of({"image": pictures(2)}, normalised(pictures(2)), torch.arange(16).expand(2, 16))


def test_tokens_are_learned_and_their_tokenizer_is_neither_trained_nor_kept(
    tokenizer, shards, shards_path, tmp_path, start
):
    module = stages.load("mae")
    settings = [
        "target.kind=tokens", f"target.tokenizer={tokenizer}", f"target.classes={CLASSES}", "target.image_size=32",
        "target.pixels=unit", "optim.length=30 steps", "optim.lr=1e-2", "checkpoint.every=30 steps",
    ]  # fmt: skip
    cfg = config.override(stages.preset("mae", "debug"), settings)
    images = torch.cat([module.dataset(cfg, shards, tmp_path, Part())[i]["image_second"] for i in range(2)])
    settings.append(f"target.weights={trained_weights(images, tmp_path / 'centres.safetensors')}")
    run = tmp_path / "run"
    codes, printed = start(arguments("mae", run, shards_path, *settings), ranks=2).wait()
    assert codes == [0, 0], printed
    values = losses(run)
    cfg = config.override(cfg, settings)
    dense = module.objective(cfg, shards)
    init.fill(dense, dense.init_rules(), cfg.seed)
    assert {n.split(".")[0] for n, _ in dense.named_parameters()} == {"autoencoder"}
    optim.groups(dense, module.param_rules(cfg), 1.0, 0.0)
    first = dense(module.dataset(cfg, shards, tmp_path, Part())[0])["loss"].item()
    assert values[min(values)] == pytest.approx(first, rel=1e-4)  # two ranks of ZeRO-3 have the same tokens as one
    last = [values[step] for step in sorted(values)[-5:]]
    assert sum(last) / 5 < 0.75 * first
    assert not any("centres" in name for name in load_file(run / "release" / "model.safetensors"))
    with pytest.raises(CheckpointError, match="predicts tokens, which cannot be painted"):
        load_masked_autoencoder(open_release(run))


# ---------------------------------------------------------------------------------------------------------------- HOG


def test_hog_targets_equal_a_loop_over_pixels():
    images = normalised(pictures(2, side=48)).double()
    made = target(kind="hog", patch=16, grid=(3, 3), side=48)
    ids = torch.tensor([[4, 8], [0, 5]])
    got = made.of({"image": pictures(2, side=48)}, images, ids)
    assert got.shape == (2, 2, 2 * 2 * 3 * 9) and made.outputs == 108
    for b, m in ((0, 0), (1, 1)):
        top, left = divmod(int(ids[b, m]), 3)
        want = []
        for cell_row in (2 * top, 2 * top + 1):
            for cell_col in (2 * left, 2 * left + 1):
                for c in range(3):
                    bins = cell_histogram(images[b, c], 8 * cell_row, 8 * cell_col)
                    length = math.sqrt(sum(v * v for v in bins))
                    want += [v / length for v in bins]
        assert_close(got[b, m], torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def cell_histogram(image: torch.Tensor, top: int, left: int) -> list[float]:
    last, bins = len(image) - 1, [0.0] * 9
    for y in range(top, top + 8):
        for x in range(left, left + 8):
            dx = float(image[y, min(x + 1, last)] - image[y, max(x - 1, 0)])
            dy = float(image[min(y + 1, last), x] - image[max(y - 1, 0), x])
            degrees = math.degrees(math.atan2(dy, dx)) % 180
            bins[min(8, int(degrees // 20))] += math.sqrt(dx * dx + dy * dy)
    return bins


def test_histograms_of_a_ramp_have_one_bin_and_flat_ones_none():
    ramp = torch.arange(16.0).expand(1, 3, 16, 16)  # brighter to the right: 0 degrees
    assert torch.equal(histograms(ramp)[0, 1, :, 1, 1], torch.tensor([1.0] + [0.0] * 8))
    assert not histograms(torch.ones(1, 3, 16, 16)).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "hog", "patch": 14}, "cells of 8 pixels, which do not fill a patch of 14"),
        ({"kind": "pixel"}, "target.kind=pixel is not known; did you mean pixels?"),
    ],
)
def test_targets_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        target(**changes)
