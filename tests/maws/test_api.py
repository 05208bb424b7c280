"""maws.create_model and maws.create_clip: what people who use the weights see of this project."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import official
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import maws
from maws.checkpoint import CheckpointError
from maws.config import ConfigError
from maws.data.tokenizer import train_tokenizer
from maws.data.transforms import Preprocess
from maws.exporting import write_for
from maws.models.init import fill
from maws.models.text import TEXT_VARIANTS, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import VARIANTS, build_vit
from maws.release import open_release, write_release

CAPTIONS = ["a red fox", "two blue birds", "a house on a hill", "un renard roux"]


def released(folder: Path, weights: dict[str, torch.Tensor], stage: str, **more: object) -> Path:
    extras = {"tokenizer": folder / "tokenizer"} if stage == "lit" else {}
    config = {"stage": stage, "lineage": [stage], "variant": "atto", "model": asdict(VARIANTS["atto"])}
    config |= {"image_size": 32, "train": {}, **more}
    values = {name: value.detach().clone() for name, value in weights.items()}
    write_release(folder / "release", values, config, Preprocess(32), extras)
    return folder


@pytest.fixture(scope="module")
def wsp(tmp_path_factory):
    """A release of a trunk with a linear head of 7 synsets."""
    generator = torch.Generator().manual_seed(1)
    head = {
        "head.0.weight": torch.randn(7, 32, generator=generator),
        "head.0.bias": torch.randn(7, generator=generator),
    }
    weights = build_vit("atto", seed=4).state_dict() | head
    return released(tmp_path_factory.mktemp("wsp"), weights, "wsp", classes=7, head="linear")


@pytest.fixture(scope="module")
def towers():
    tokenizer = train_tokenizer(CAPTIONS * 5, 80, 14)
    shape = replace(TEXT_VARIANTS["atto"], vocabulary=tokenizer.vocabulary)
    towers = TwoTower(build_vit("atto", seed=None), TextTower(shape), 16)
    fill(towers, towers.init_rules(), 3)
    return towers.eval(), tokenizer


@pytest.fixture(scope="module")
def lit(tmp_path_factory, towers):
    folder = tmp_path_factory.mktemp("lit")
    towers[1].save(folder / "tokenizer")
    config = {"text": asdict(towers[0].text.shape), "joint_width": 16}
    return released(folder, towers[0].state_dict(), "lit", **config)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def test_a_run_gives_the_class_token_of_its_tower_for_pictures_made_its_way(wsp, picture):
    model = maws.create_model("atto", pretrained=wsp)
    image = model.preprocess(picture)
    cut = picture.resize((44, 32), Image.Resampling.BICUBIC).crop((6, 0, 38, 32))
    pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert_close(image, (pixels - mean) / std)
    tower = build_vit("atto", seed=4).eval()
    assert_close(model(image[None]), tower.forward_features(image[None])[:, 0])
    assert not model.training and model.forward_features(image[None]).shape == (1, 17, 32)


def test_pictures_of_any_kind_are_seen_as_in_training(wsp):
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    model = maws.create_model("atto", wsp)
    assert_close(model.preprocess(clear), model.preprocess(Image.new("L", (40, 40), 255)))


@pytest.mark.parametrize("size", [(50, 70), (333, 257), (64, 191), (41, 40)])
def test_evaluation_pictures_are_cut_as_torchvision_cuts_them(size):
    from torchvision.transforms import v2

    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = v2.Compose(
        [v2.Resize(32, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(32), v2.PILToTensor()]
    )
    assert torch.equal(Preprocess(32)(image), theirs(image))


def test_a_classifier_is_kept_when_it_is_asked_for(wsp):
    images = torch.randn(3, 3, 32, 32)
    features, scores = (maws.create_model("atto", wsp, classifier=asked)(images) for asked in (False, True))
    head = maws.create_model("atto", wsp, classifier=True).head
    assert features.shape == (3, 32) and scores.shape == (3, 7)
    assert_close(scores, features @ head.weight.T + head.bias)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(head.weight, torch.randn(7, 32, generator=generator))


def test_a_classifier_behind_another_layer_is_not_taken_for_a_linear_one(tmp_path):
    more = {"head.layers.pre_logits.weight": (32, 32), "head.layers.pre_logits.bias": (32,)}
    shapes = official.swag_shapes(**official.ATTO, classes=7) | more
    torch.save(official.drawn(shapes, torch.float32), tmp_path / "swag.pth")
    assert maws.create_model("atto", tmp_path / "swag.pth")(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    with pytest.raises(CheckpointError, match="no linear classifier"):
        maws.create_model("atto", tmp_path / "swag.pth", classifier=True)


def test_a_folder_that_timm_saved_serves_too_and_a_file_of_ours_does_not(tmp_path, wsp):
    write_for("timm", open_release(wsp), tmp_path / "timm", check=False)
    images = torch.randn(2, 3, 32, 32)
    assert_close(maws.create_model("atto", tmp_path / "timm")(images), maws.create_model("atto", wsp)(images))
    with pytest.raises(CheckpointError, match="is a release of ours already"):
        maws.create_model("atto", wsp / "release" / "model.safetensors")


def test_another_image_size_resizes_the_positions_and_the_preprocessing(wsp, picture):
    model = maws.create_model("atto", wsp, image_size=48)
    same = maws.create_model("atto", wsp)
    assert model.pos_embed.shape == (1, 37, 32) and model(model.preprocess(picture)[None]).shape == (1, 32)
    assert_close(model.pos_embed[:, 0], same.pos_embed[:, 0])
    corners = model.pos_embed[0, 1:].view(6, 6, 32), same.pos_embed[0, 1:].view(4, 4, 32)
    assert (corners[0][0, 0] - corners[1][0, 0]).abs().max() < 0.2 < (corners[0][0, 0] - corners[1][3, 3]).abs().max()


def test_a_file_of_another_project_serves_as_well_as_a_release(tmp_path):
    tensors = official.drawn(official.maws_shapes(**official.ATTO), torch.float32)
    torch.save(tensors, tmp_path / "vit.pth")
    model = maws.create_model("atto", tmp_path / "vit.pth")
    assert_close(model.blocks[1].mlp.fc2.weight.detach(), tensors["blocks.1.mlp.fc2.weight"])
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 32)


def test_without_weights_the_values_follow_from_the_seed():
    first, again, other = (maws.create_model("atto", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.patch_embed.proj.weight, again.patch_embed.proj.weight)
    assert not torch.equal(first.patch_embed.proj.weight, other.patch_embed.proj.weight)


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("vit_b17", {}, "vit_b16"),
        ("vit_b16", {"pretrained": "wsp"}, "width 32 there and 768 here.*; it is atto"),
        ("atto", {"pretrained": "wsp", "image_size": 33}, "not a multiple of the patch size 8"),
        ("atto", {"classifier": True}, "give the weights"),
        ("atto", {"pretrained": "lit", "classifier": True}, "no linear classifier"),
    ],
)
def test_what_cannot_be_made_is_said_with_the_way_out(wsp, lit, name, more, said):
    if "pretrained" in more:
        more = more | {"pretrained": {"wsp": wsp, "lit": lit}[more["pretrained"]]}
    with pytest.raises((ConfigError, CheckpointError), match=said):
        maws.create_model(name, **more)


def test_both_towers_of_a_lit_run_embed_as_in_training(lit, towers, picture):
    model, preprocess, tokenizer = maws.create_clip(pretrained=lit)
    ids, mask = towers[1](CAPTIONS)
    images = preprocess(picture)[None]
    with torch.no_grad():
        want = towers[0].encode_image(images), towers[0].encode_text(ids, mask)
    assert_close(model.encode_image(images), want[0])
    assert_close(model.encode_text(tokenizer(CAPTIONS)), want[1])
    image, text, scale = model(images, tokenizer(CAPTIONS[0]))
    assert text.shape == (1, 16) and scale.shape == () and scale == pytest.approx(1 / 0.07)
    assert_close((image**2).sum(), torch.tensor(1.0))


def test_a_pair_that_is_not_the_one_named_is_refused(lit):
    with pytest.raises(CheckpointError, match=r"is no vit_b16_xlmr_b: .*width 32 there and 768.*joint width 16 there"):
        maws.create_clip("vit_b16_xlmr_b", lit)
    with pytest.raises(ConfigError, match="vit_l16_xlmr_l"):
        maws.create_clip("vit_l16_xlmr", lit)


def test_a_release_without_tokenizer_says_which_one_it_wants(lit, tmp_path, towers):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (lit / "release").iterdir():
        if file.is_file():
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=r"sentencepiece\.bpe\.model"):
        maws.create_clip(pretrained=bare)
    model, _, tokenizer = maws.create_clip(pretrained=bare, tokenizer=lit / "tokenizer")
    assert model.encode_text(tokenizer(CAPTIONS)).shape == (4, 16)
    train_tokenizer(["other words"] * 3, 30, 14).save(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"ids, the text tower of .* knows"):
        maws.create_clip(pretrained=bare, tokenizer=tmp_path / "other")


def test_importing_maws_takes_no_time_until_a_model_is_made():
    code = "import sys, maws; print(maws.__version__, 'torch' in sys.modules, sorted(maws.__all__))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split(maxsplit=2)[1] == "False" and "create_clip" in out
