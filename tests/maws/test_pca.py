"""`python -m maws fit-pca` against numpy's singular value decomposition of the same patches."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open

from maws.__main__ import main
from maws.config import IMAGENET_MEAN, IMAGENET_STD, ConfigError, DataConfig
from maws.data.loader import LoadImage
from maws.data.order import Item
from maws.objectives.targets import Basis
from maws.pca import Moments, RandomPatches, fit, principal_components


def rows(n: int, values: int = 12, seed: int = 0) -> np.ndarray:
    """Correlated rows with a mean that is large beside their spread."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, values)) @ rng.normal(size=(values, values)) + 1e4


def svd(data: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    _, singular, directions = np.linalg.svd(data - data.mean(axis=0), full_matrices=False)
    return directions[:components], (singular**2 / (len(data) - 1))[:components]


def test_moments_of_pieces_are_those_of_the_whole():
    data, moments = rows(997), Moments(12)
    for piece in np.split(data, [1, 3, 200, 201, 800]):
        moments.add(piece)
    assert moments.count == 997
    np.testing.assert_allclose(moments.mean, data.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(data.T), rtol=1e-6)


def test_components_are_the_singular_vectors_with_a_sign_of_their_own():
    data, moments = rows(300), Moments(12)
    moments.add(data)
    got, variance = principal_components(moments.covariance, 5)
    want, want_variance = svd(data, 5)
    np.testing.assert_allclose(variance, want_variance, rtol=1e-6)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine * np.sign(mine @ theirs), theirs, atol=1e-6)
        assert mine[np.abs(mine).argmax()] > 0 or np.sort(np.abs(mine))[-2] > 0.99 * np.abs(mine).max()
    np.testing.assert_allclose(got @ got.T, np.eye(5), atol=1e-12)


def test_the_sign_does_not_change_with_the_last_bits_of_two_equal_entries():
    covariance = np.eye(4) + 0.0
    covariance[0, 1] = covariance[1, 0] = -0.5  # the first direction is (1, -1, 0, 0)
    for disturbed in (0, 1):
        other = covariance.copy()
        other[disturbed, disturbed] += 1e-9
        np.testing.assert_allclose(principal_components(other, 1)[0][0], [0.5**0.5, -(0.5**0.5), 0, 0], atol=1e-6)


def test_the_fit_equals_the_svd_of_the_patches_it_drew(shards, shards_path):
    cfg = DataConfig(shards=str(shards_path))
    got = fit(cfg, 4, 9, 230, each=5, image_size=16)
    source = RandomPatches(cfg, shards, 46, 5, 4, 16, 0)
    data = torch.cat([source[i] for i in range(46)])[:230].double().numpy()
    directions, variance = svd(data, 9)
    np.testing.assert_allclose(got.mean, data.mean(axis=0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(got.variance, variance, rtol=1e-6)
    np.testing.assert_allclose(np.abs((got.components * directions).sum(axis=1)), 1, rtol=1e-6)
    assert got.total_variance == pytest.approx(data.var(axis=0, ddof=1).sum())
    assert (got.patches, got.patch, got.colours) == (230, 4, (IMAGENET_MEAN, IMAGENET_STD))


def test_patches_are_normalised_patches_of_the_training_view(shards, shards_path):
    cfg = DataConfig(shards=str(shards_path), crop_scale=(0.5, 0.6))
    source = RandomPatches(cfg, shards, 20, 16, 4, 16, seed=3)
    assert len(set(source.places.tolist())) == 20 and sorted(source.places) == source.places.tolist()
    shard, row = [(s, r) for s, size in enumerate(shards.shard_sizes) for r in range(size)][source.places[7]]
    item = Item(shard, row, shards.record(shard, row)["key"], epoch=0, copy=0)
    image = LoadImage(cfg, shards, 3, 16)(item)["image"].double()
    want = {  # all 16 patches of the image, as sets: their order is drawn
        tuple(
            round((float(image[c, top + y, left + x]) / 255 - IMAGENET_MEAN[c]) / IMAGENET_STD[c], 4)
            for y in range(4) for x in range(4) for c in range(3)
        )
        for top in range(0, 16, 4) for left in range(0, 16, 4)
    }  # fmt: skip
    got = {tuple(round(v, 4) for v in patch.tolist()) for patch in source[7].double()}
    assert got == want


def test_the_command_writes_the_same_basis_every_time_whatever_the_workers(shards, shards_path, tmp_path, caplog):
    files = [tmp_path / f"{n}.safetensors" for n in range(3)]
    ask = ["fit-pca", "--shards", str(shards_path), "--patch", "4", "--components", "6", "--patches", "500",
           "--per-image", "8", "--image-size", "16"]  # fmt: skip
    with caplog.at_level("INFO"):
        for file, more in zip(
            files, (["--workers", "0"], ["--workers", "2"], ["--workers", "0", "--seed", "1"]), strict=True
        ):
            assert main([*ask, "--output", str(file), *more]) == 0
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    with safe_open(files[0], "numpy") as f:
        facts = json.loads(f.metadata()["maws.pca"])
    assert (facts["patch"], facts["patches"], facts["shards_sha256"]) == (4, 500, shards.sha256)
    share = 100 * Basis.read(files[0]).variance.sum() / facts["total_variance"]
    assert f"   6 components explain {share:5.1f}% of the variance" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--shards", "nowhere"], "nowhere"),
        (["--patches", "40"], "--patches 40 must be more than the 48 values of a patch"),
        (["--patches", "5000"], "--patches 5000 at --per-image 16 needs 313 images and .* has 120; try --patches 1920"),
        (["--components", "49"], "--components 49 must be from 1 to the 48 values of a patch"),
        (["--patch", "5"], "--patch 5 must be at least 1 and divide --image-size 16"),
        (["--per-image", "17"], "--per-image 17 must be from 1 to the 16 patches of an image"),
        (["data.crop=middle"], "data.crop=middle is not known"),
        (["data.crp=centre"], "unknown setting crp; did you mean crop?"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(shards_path, tmp_path, capsys, changes, message):
    ask = ["fit-pca", "--shards", str(shards_path), "--patch", "4", "--components", "6", "--patches", "500",
           "--image-size", "16", "--workers", "0", "--output", str(tmp_path / "x.safetensors")]  # fmt: skip
    assert main([*ask, *changes]) in (ConfigError.exit_code, 1)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "x.safetensors").exists()
