"""Every kind of mask, target, decoder and view of stage mae learns, and its release gives the same model back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from maws import config, optim
from maws.config import DataConfig
from maws.data.order import Part
from maws.data.transforms import Preprocess
from maws.files import write_json
from maws.models import init
from maws.pca import fit
from maws.release import load_masked_autoencoder, open_release, write_release
from maws.stages import mae, shape_of

VARIANTS = {
    "default": (),
    "pixels": ("target.kind=pixels",),
    "hog": ("target.kind=hog",),
    "pca": ("target.kind=pca", "target.components=20", "target.file={basis}"),
    "block mask": ("mask.kind=block", "mask.ratio=0.5"),
    "grid mask": ("mask.kind=grid",),
    "encoder with mask tokens": ("encode_mask_tokens=yes",),
    "units and a short decoder": ("mask.kind=unit", "mask.unit=2", "decoder.reduction=conv"),
    "average": ("decoder.reduction=average",),
    "restored": ("decoder.reduction=conv", "decoder.restore=yes"),
    "eight class tokens": ("model.class_tokens=8", "model.image_size=64", "mask.kind=unit", "mask.unit=4"),
    "no class token": ("model.class_tokens=0", "model.pool=mean"),
    "colours": ("data.crop=fixed", "data.jitter=0.4,0.4,0.2,0.1"),
}
PAINTS = [name for name, settings in VARIANTS.items() if "target.kind=hog" not in settings and name != "pca"]


@pytest.fixture(scope="module")
def basis(shards_path, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("pca") / "p8.safetensors"
    fit(DataConfig(shards=str(shards_path)), 8, 20, 1000, image_size=32).write(file, {})
    return file


def started(name: str, shards, tmp_path: Path, basis: Path | str = "") -> tuple[mae.Config, mae.MaskedPatches]:
    settings = [s.format(basis=basis) for s in VARIANTS[name]]
    cfg = mae.prepare(config.override(mae.PRESETS["debug"], settings), shards, tmp_path)
    objective = mae.objective(cfg, shards)
    init.fill(objective, objective.init_rules(), seed=0)
    return cfg, objective


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_of_every_variant_falls(name, shards, tmp_path, basis):
    cfg, objective = started(name, shards, tmp_path, basis)
    adam = torch.optim.AdamW(optim.groups(objective, mae.param_rules(cfg), 3e-3, 0.05), betas=(0.9, 0.95))
    batch, losses = mae.dataset(cfg, shards, tmp_path, Part())[0], []
    for _ in range(15):
        losses.append(objective(batch)["loss"])
        adam.zero_grad()
        losses[-1].backward()
        adam.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", PAINTS)
def test_the_release_of_every_variant_paints_what_the_objective_predicts(name, shards, tmp_path):
    cfg, objective = started(name, shards, tmp_path)
    parts = mae.release(objective, cfg, shards, tmp_path)
    side = cfg.model.image_size or 32
    facts = {"stage": "mae", "lineage": ["mae"], "variant": "atto", "model": vars(shape_of(cfg.model)),
             "image_size": side, "train": {}, "shards_sha256": "", "init_sha256": ""}  # fmt: skip
    weights = {parts.rename(n): p.detach().contiguous() for n, p in objective.named_parameters()}
    facts["train"] = {"preset": "debug", "steps": 0, "batch_size": 1, "seed": 0, "init_from": "", "revision": ""}
    write_release(tmp_path / "release", weights, facts | parts.config, Preprocess(side))
    read = load_masked_autoencoder(open_release(tmp_path))
    batch = mae.dataset(cfg, shards, tmp_path, Part())[1]
    images, ids = torch.randn(len(batch["image"]), 3, side, side), batch["ids_shuffle"]
    with torch.no_grad():
        assert_close(
            read.autoencoder(images, ids, objective.keep), objective.eval().autoencoder(images, ids, objective.keep)
        )
    painted, mask = read.reconstruct(images, seed=4)
    assert painted.shape == images.shape and mask.sum() == len(images) * (ids.shape[1] - objective.keep)


def test_a_release_from_before_there_were_targets_can_still_be_painted(shards, tmp_path):
    _, objective = started("default", shards, tmp_path)
    (tmp_path / "release").mkdir()
    save_file({n[12:]: p.detach() for n, p in objective.named_parameters()}, tmp_path / "release/model.safetensors")
    old = {"format": 1, "stage": "mae", "lineage": ["mae"], "variant": "atto", "image_size": 32,
           "model": {"patch": 8, "depth": 2, "width": 32, "heads": 2, "image": 32},
           "decoder": {"width": 32, "depth": 1, "heads": 2}, "mask_ratio": 0.5, "norm_pix": False}  # fmt: skip
    write_json(tmp_path / "release" / "config.json", old)
    (tmp_path / "release" / "preprocess.json").write_text(json.dumps(Preprocess(32).to_json()))
    read = load_masked_autoencoder(open_release(tmp_path))
    assert (read.masking.ratio, read.masking.kind, read.norm_pix) == (0.5, "random", False)
    assert read.reconstruct(torch.randn(1, 3, 32, 32), seed=0)[1].sum() == 8
