"""Presets of stage mae: the papers' settings, sizes, and what each row changes (recipes §2.3-2.6, §3, §10.5)."""

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from maws import config
from maws.config import IMAGENET_MEAN, IMAGENET_STD, ConfigError
from maws.objectives.targets import Basis
from maws.optim import BASE, treat
from maws.stages import grid_of, mae, shape_of
from maws.stages.mae import ABLATIONS, LONG_DATA, LONG_SEQUENCE, PRESETS

ENCODERS = {  # width, and parameters with patches as named, 224 pixels and one class token (recipes §1.1)
    "vit_ti16": (192, 5_524_416), "vit_s16": (384, 21_665_664), "vit_b16": (768, 85_798_656),
    "vit_l16": (1024, 303_301_632), "vit_h14": (1280, 630_764_800),
    "vit_2b14": (2560, 1_890_408_960), "vit_6.5b14": (4096, 6_447_632_384),
}  # fmt: skip
# name: side, patch, patches seen by the encoder, tokens of the decoder's blocks (without class tokens) and its width
LONG_ROWS = {  # recipes §3.2, §3.3, §10.5
    "long_b16_224": (224, 16, 49, 196, 384), "long_b16_320": (320, 16, 100, 400, 384),
    "long_b16_384": (384, 16, 144, 576, 384), "long_b16_448": (448, 16, 196, 784, 384),
    "long_b16_512": (512, 16, 256, 1024, 384), "long_b16_448_m1": (448, 16, 196, 784, 384),
    "long_b16_448_m4": (448, 16, 196, 784, 384), "long_b16_448_le49": (448, 16, 49, 784, 384),
    "long_b16_448_ld196": (448, 16, 196, 196, 384), "long_b16_448_ld196_average": (448, 16, 196, 196, 384),
    "long_b16_448_ld196_restore": (448, 16, 196, 196, 384), "long_b8_224": (224, 8, 196, 784, 384),
    "long_b24_672": (672, 24, 196, 784, 384), "long_l16_224": (224, 16, 49, 196, 512),
    "long_l16_448": (448, 16, 196, 784, 512), "long_h14_224": (224, 14, 64, 256, 640),
    "long_h7_224": (224, 7, 256, 1024, 640), "pixio_h16": (256, 16, 64, 256, 512),
}  # fmt: skip


def settings_of(name: str) -> dict:
    return config.flatten(config.to_json(PRESETS[name]))


@pytest.fixture(scope="module")
def usable(tmp_path_factory) -> dict[str, tuple[str, ...]]:
    """What pca and tokens need from a user."""
    file = tmp_path_factory.mktemp("pca") / "p16.safetensors"
    Basis(np.zeros(768), np.eye(768)[:96], np.ones(96), 16, (IMAGENET_MEAN, IMAGENET_STD), 10**6, 768.0).write(file, {})
    return {"vit_l16_pca": (f"target.file={file}",), "vit_l16_tokens": ("target.tokenizer=here:Grid14",)}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_its_checks_and_has_the_size_of_its_parts(name, usable, monkeypatch):
    monkeypatch.setattr("maws.objectives.tokenizer_module._find", lambda _: Grid14)
    cfg = config.override(PRESETS[name], usable.get(name, ()))
    mae.prepare(cfg, None, Path())
    if name not in ("demo", "debug"):
        assert parameters(replaced(cfg)) == by_hand(cfg)


class Grid14(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), images.shape[2] // 8, images.shape[3] // 8)


def replaced(cfg: mae.Config) -> mae.Config:
    """Only what the model depends on, so that equal models are built once."""
    return dataclasses.replace(PRESETS["vit_b16"], model=cfg.model, decoder=cfg.decoder, target=cfg.target,
                               encode_mask_tokens=cfg.encode_mask_tokens, data=PRESETS["vit_b16"].data)  # fmt: skip


@cache
def parameters(cfg: mae.Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in mae.objective(cfg, None).parameters())


def by_hand(cfg: mae.Config) -> int:
    m, d = cfg.model, cfg.decoder
    width, encoder = ENCODERS[m.variant]
    own = int(m.variant[-2:])
    patch, side = m.patch or own, m.image_size or 224
    patches, e = (side // patch) ** 2, d.width
    encoder += (patches - (224 // own) ** 2) * width  # positions
    encoder += 3 * width * (patch**2 - own**2)  # patch projection
    encoder += (m.class_tokens - 1) * 2 * width  # tokens and their positions
    places = patches // 4 if d.reduction != "none" else patches
    predicted = patch if d.reduction == "none" or d.restore else 2 * patch
    outputs = {"pca": 96, "tokens": 8192}.get(cfg.target.kind, 3 * predicted**2)
    decoder = width * e + e + (width if cfg.encode_mask_tokens else e) + (m.class_tokens + places) * e
    decoder += d.depth * (12 * e**2 + 13 * e) + 2 * e + e * outputs + outputs
    decoder += (d.reduction == "conv") * (4 * e**2 + e) + d.restore * (4 * e**2 + e)
    return encoder + decoder


def test_the_papers_settings():
    for name in ENCODERS:  # recipes §2.5, MAWS
        cfg = PRESETS[name]
        assert cfg.optim.peak_lr == pytest.approx(2.4e-3)
        assert (cfg.optim.batch_size, cfg.optim.betas, cfg.optim.weight_decay) == (4096, (0.9, 0.95), 0.05)
        assert (cfg.mask.kind, cfg.mask.ratio, cfg.target.kind) == ("random", 0.75, "norm_pixels")
        assert (str(cfg.optim.length), cfg.data.crop, cfg.data.crop_scale) == ("1 epochs", "resized", (0.2, 1.0))
        assert (cfg.decoder.width, cfg.decoder.depth, cfg.decoder.heads) == (512, 8, 16)
        assert (cfg.model.drop_path, cfg.optim.clip, any(cfg.data.jitter)) == (0, 0, False)
        assert cfg.engine.precision == ("fp32" if name == "vit_6.5b14" else "auto")
    for name in ("vit_b16_in1k", "vit_l16_in1k", "vit_h14_in1k"):
        assert changed(name.removesuffix("_in1k"), name) == {
            "optim.length": "1600 epochs", "optim.warmup": "40 epochs", "data.resample": False,
        }  # fmt: skip


def changed(base: str, name: str) -> dict:
    a, b = settings_of(base), settings_of(name)
    return {k: b[k] for k in b if a[k] != b[k]}


@pytest.mark.parametrize("row", ABLATIONS)
def test_every_ablation_differs_from_its_base_in_what_it_says_and_nothing_else(row):
    base = PRESETS["vit_l16_ablation"]
    assert (str(base.optim.length), base.target.kind, base.model.variant) == ("800 epochs", "pixels", "vit_l16")
    assert_changes("vit_l16_ablation", f"vit_l16_{row}", ABLATIONS[row])


@pytest.mark.parametrize("row", LONG_SEQUENCE)
def test_every_long_sequence_row_differs_from_its_base_in_what_it_says_and_nothing_else(row):
    assert_changes("long_b16_448", row, LONG_SEQUENCE[row])


@pytest.mark.parametrize("data", LONG_DATA)
def test_other_data_sets_change_the_length_only(data):
    for base in ("long_b16_224", "long_b16_448", "long_l16_224", "long_l16_448"):
        assert set(changed(base, f"{base}_{data}")) <= {"optim.length", "optim.warmup"}


def assert_changes(base: str, name: str, settings: tuple[str, ...]) -> None:
    different = changed(base, name)
    assert set(different) == {s.partition("=")[0] for s in settings}
    for setting in settings:
        key, _, value = setting.partition("=")
        told = different[key]
        told = ",".join(map(str, told)) if isinstance(told, list) else "yes" if told is True else str(told)
        assert told == value


@pytest.mark.parametrize("name", LONG_ROWS)
def test_lengths_of_sequences_are_the_papers(name):
    side, patch, seen, decoded, width = LONG_ROWS[name]
    cfg = PRESETS[name]
    rows, cols = grid_of(cfg.model)
    assert (rows * patch, cols * patch) == (side, side) and shape_of(cfg.model).patch == patch
    assert cfg.mask.keep((rows, cols)) == seen
    assert rows * cols // (1 if cfg.decoder.reduction == "none" else 4) == decoded
    assert cfg.decoder.width == width
    if name.startswith("long"):  # half the encoder's width, as many heads
        shape = shape_of(cfg.model)
        assert (2 * width, cfg.decoder.heads, cfg.decoder.depth) == (shape.width, shape.heads, 8)


def test_pixio_has_a_deep_decoder_units_of_four_and_eight_class_tokens():
    cfg = PRESETS["pixio_h16"]
    assert dataclasses.astuple(cfg.decoder)[:3] == (512, 32, 16)
    assert (cfg.mask.kind, cfg.mask.unit, cfg.mask.ratio, cfg.model.class_tokens) == ("unit", 4, 0.75, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mask.ratio=1.5"], r"mask.ratio=1.5 must lie between 0 and 1"),
        (["mask.ratio=0.99"], r"mask.ratio=0.99 leaves 0 of 16 patches visible"),
        (["decoder.heads=3"], "decoder.width=32, depth=1, heads=3: the width must be a multiple of the heads"),
        (["decoder.width=6"], "decoder.width=6, depth=1, heads=2: the width must be a multiple of the heads and of 4"),
        (["decoder.depth=0"], "depth=0"),
        (["decoder.reduction=pool"], r"do not go together: decoder reductions are .* not 'pool'"),
        (["decoder.restore=yes"], "decoder.restore undoes a reduction, and there is none"),
        (["model.image_size=40", "decoder.reduction=conv"], "needs an even grid, not 5 x 5"),
        (["model.positions=relative"], "needs sincos or learned positions, not relative ones"),
        (["target.kind=pca"], "target.kind=pca needs target.file"),
        (["target.kind=tokens"], "write package.module:factory"),
        (["target.kind=colours"], "target.kind=colours is not known"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_built(settings, message):
    with pytest.raises(ConfigError, match=message):
        mae.prepare(config.override(PRESETS["debug"], settings), None, Path())


def test_learned_positions_are_trained_and_sine_cosine_ones_are_not():
    for positions, want in (("learned", BASE), ("sincos", None)):
        rules = mae.param_rules(config.override(PRESETS["debug"], [f"model.positions={positions}"]))
        assert treat("autoencoder.pos_embed", rules) == want
        assert treat("autoencoder.decoder_pos_embed", rules) is None
