"""Files under the official key names and shapes: found out, read, converted, written; and what is refused."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from official import ATTO, B16, EVERY, OFFICIAL, drawn, long_shapes, lut_shapes, mae_shapes, maws_shapes, small
from safetensors.torch import save_file

from maws import interop
from maws.checkpoint import CheckpointError
from maws.config import IMAGENET_MEAN, IMAGENET_STD
from maws.interop import FOLDERS, LAYOUTS, detect_layout, load_layout, lut, read_foreign, write_foreign
from maws.models.guided import GuidedAutoencoder
from maws.models.mae import MaskedAutoencoder
from maws.models.vit import VARIANTS, VisionTransformer
from maws.objectives.momentum_guidance import Guidance, MomentumGuidance


def test_each_layout_is_a_file():
    files = {path.stem for path in Path(str(interop.__file__)).parent.glob("*.py")}
    assert files >= {*LAYOUTS, *(f"{name}_layout" for name in FOLDERS)}
    assert {*OFFICIAL, "maws_clip"} == {*LAYOUTS}  # a pair of towers: test_maws_clip.py


@pytest.mark.parametrize("layout", OFFICIAL)
def test_every_size_loads_strictly_and_goes_back_under_the_same_names_and_shapes(layout):
    for variant, size in EVERY.items():
        shapes = OFFICIAL[layout](**size)
        official = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        assert detect_layout(official, load_layout(layout).WRAPPER) == layout
        found = load_layout(layout).to_ours(official)
        assert (found.variant, found.image_size, found.dropped) == (variant, 224, {})
        assert found.kind == ("autoencoder" if layout in ("mae", "lut", "long_seq_mae") else "encoder")
        module = found.build()  # strictly
        assert isinstance(module, MaskedAutoencoder if found.kind == "autoencoder" else VisionTransformer)
        back = load_layout(layout).from_ours(found)
        assert {name: tuple(value.shape) for name, value in back.items()} == shapes


def test_a_maws_file_of_a_real_vit_b_is_read_from_the_disk_and_loads_strictly(tmp_path):
    official = drawn(maws_shapes(**B16), torch.float16)
    torch.save(official, tmp_path / "vit_b16.pt")
    found = read_foreign(tmp_path / "vit_b16.pt")
    (tmp_path / "vit_b16.pt").unlink()
    assert (found.layout, found.kind, found.variant) == ("maws", "encoder", "vit_b16")
    assert found.shape == VARIANTS["vit_b16"]
    state = found.build().state_dict()
    assert len(state) == 150  # recipes §1.1
    assert all(torch.equal(state[name], value) for name, value in official.items())
    assert "150 tensors, 85,798,656 parameters" in " ".join(found.report())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", OFFICIAL)
def test_written_and_read_again_nothing_has_changed(tmp_path, layout, suffix):
    found = load_layout(layout).to_ours(small(layout))
    write_foreign(tmp_path / f"weights{suffix}", found, layout)
    again = read_foreign(tmp_path / f"weights{suffix}", layout)
    assert (again.shape, again.image_size, again.decoder) == (found.shape, found.image_size, found.decoder)
    for one, other in ((found.weights, again.weights), (found.heads, again.heads)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert again.dropped == {}


@pytest.mark.parametrize("layout", OFFICIAL)
def test_a_file_says_itself_which_layout_it_has(tmp_path, layout):
    tensors = small(layout)
    wrapper = load_layout(layout).WRAPPER
    torch.save({wrapper: tensors} if wrapper else tensors, tmp_path / "some.pth")
    assert read_foreign(tmp_path / "some.pth").layout == layout


def test_an_encoder_alone_is_maes_in_an_entry_and_maws_without(tmp_path):
    encoder = drawn(maws_shapes(**ATTO))
    torch.save({"model": encoder}, tmp_path / "mae_pretrain_vit.pth")
    torch.save(encoder, tmp_path / "vit_mae.pt")
    assert read_foreign(tmp_path / "mae_pretrain_vit.pth").layout == "mae"
    assert read_foreign(tmp_path / "vit_mae.pt").layout == "maws"


def test_what_lies_beside_the_model_is_dropped_by_name_and_its_command_line_is_no_code(tmp_path):
    """As the official codes save: optimizer, epoch and argparse's namespace beside a model in DataParallel."""
    model = {f"module.{name}": value for name, value in small("mae").items()}
    beside = {"optimizer": {"state": {}}, "epoch": 799, "scaler": {}, "args": argparse.Namespace(lr=2.4e-3)}
    torch.save({"state_dict": model, **beside}, tmp_path / "checkpoint-799.pth", _use_new_zipfile_serialization=False)
    found = read_foreign(tmp_path / "checkpoint-799.pth")
    assert found.layout == "mae"
    assert [name.split()[0] for name in found.dropped] == list(beside)
    assert sum(line.startswith("dropped: ") for line in found.report()) == len(beside)


def test_the_momentum_target_of_a_lut_file_is_read_by_its_entry(tmp_path):
    online, target = small("lut"), drawn(lut_shapes(**ATTO, hidden=20, e=16, deep=1), seed=1)
    file = {"model": online, "model_ema": {f"ema.{name}": value for name, value in target.items()}}
    torch.save(file, tmp_path / "checkpoint-last.pth")
    for entry, tensors in (("", online), ("model_ema", target)):
        found = read_foreign(tmp_path / "checkpoint-last.pth", entry=entry)
        assert torch.equal(found.weights["blocks.1.attn.qkv.weight"], tensors["blocks.1.attn.qkv.weight"])
        assert torch.equal(found.heads["projector.3.weight"], tensors["head.3.weight"])
    with pytest.raises(CheckpointError, match="no entry model_emma with weights in it; it holds model, model_ema"):
        read_foreign(tmp_path / "checkpoint-last.pth", entry="model_emma")


def test_online_and_target_of_a_lut_file_load_strictly_into_the_objective_of_lc_mae():
    names = lut_shapes(**B16)
    converted = load_layout("lut").to_ours({name: torch.empty(size, device="meta") for name, size in names.items()})
    assert converted.decoder is not None
    state = lut.objective_state(online=converted, target=converted)
    with torch.device("meta"):
        online = GuidedAutoencoder(converted.shape, 224, converted.decoder)
        target = VisionTransformer(converted.shape, 224)
        objective = MomentumGuidance(online, target, 49, IMAGENET_MEAN, IMAGENET_STD, reconstruction, Guidance())
    objective.load_state_dict(state, strict=True, assign=True)


def reconstruction(*_: object) -> torch.Tensor:
    """None is needed to hold weights."""
    raise NotImplementedError


def test_of_a_clip_file_the_image_tower_is_taken_and_the_rest_listed(tmp_path):
    tower = drawn(maws_shapes(**ATTO))
    rest = {
        "logit_scale": torch.zeros(()),
        "text_projection": torch.zeros(32, 24),
        "vision_projection": torch.zeros(32, 24),
    }
    torch.save({f"vision_encoder.{name}": value for name, value in tower.items()} | rest, tmp_path / "clip.pt")
    found = read_foreign(tmp_path / "clip.pt")
    assert found.layout == "maws" and found.weights.keys() == tower.keys()
    assert found.dropped.keys() == rest.keys()


@pytest.mark.parametrize(
    ("n", "p", "pixels"), [(1024, 16, 512), (1369, 14, 518), (784, 16, 448), (1024, 7, 224)]
)  # finetuned MAWS (recipes §11.2), long sequences (§3.2)
def test_the_image_size_follows_from_the_position_table(n, p, pixels):
    shapes = maws_shapes(d=32, depth=1, p=p, n=n, classes=1000)
    found = load_layout("maws").to_ours({name: torch.empty(size, device="meta") for name, size in shapes.items()})
    assert (found.image_size, found.kind, list(found.heads)) == (pixels, "classifier", ["head.weight", "head.bias"])


# What is refused


class Trap:
    def __reduce__(self):
        return os.mkdir, (Trap.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_wants_to_run_code_is_refused_and_nothing_ran(tmp_path, zipped):
    Trap.folder = str(tmp_path / "was here")
    torch.save({"model": small("mae"), "args": Trap()}, tmp_path / "trap.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"trap\.pth wants to run (posix|nt|os)\.mkdir"):
        read_foreign(tmp_path / "trap.pth")
    assert not Path(Trap.folder).exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_named(tmp_path, name, share):
    tensors = small("maws")
    (save_file if name.endswith("safetensors") else torch.save)(tensors, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=rf"{name} is damaged"):
        read_foreign(tmp_path / name)


def test_what_is_no_file_of_weights_is_said_to_be_none(tmp_path):
    with pytest.raises(CheckpointError, match="is not a file"):
        read_foreign(tmp_path)
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(CheckpointError, match=r"page\.pth is damaged"):
        read_foreign(tmp_path / "page.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list; weights are a dictionary"):
        read_foreign(tmp_path / "list.pth")
    torch.save({"net": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"no tensors where they are looked for \(its entries: net"):
        read_foreign(tmp_path / "other.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"follow none of the layouts .* such as conv1\.weight"):
        read_foreign(tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match="there is no weight layout 'mea'; did you mean mae"):
        read_foreign(tmp_path / "resnet.pth", layout="mea")


@pytest.mark.parametrize(
    ("layout", "theirs", "ours", "size"),
    [
        ("mae", "decoder_blocks.0.mlp.fc1.weight", "decoder_blocks.0.mlp.fc1.weight", (64, 16)),
        ("long_seq_mae", "decoder_downsample.bias", "decoder_reduce.bias", (16,)),
        ("lut", "predictor.1.running_var", "predictor.1.running_var", (20,)),
        ("maws", "blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.weight", (96, 32)),
        ("swag", "encoder.layers.layer_1.mlp.linear_2.weight", "blocks.1.mlp.fc2.weight", (32, 128)),
    ],
)
def test_a_wrong_shape_an_unknown_and_a_missing_tensor_are_named(layout, theirs, ours, size):
    convert, tensors = load_layout(layout).to_ours, small(layout)
    with pytest.raises(CheckpointError) as wrong:
        convert(tensors | {theirs: torch.zeros(5, 3)})
    assert f"{ours} is (5, 3), expected {size}" in str(wrong.value)
    with pytest.raises(CheckpointError, match=r"unknown: blocks\.0\.ls1\.gamma"):
        convert(tensors | {"blocks.0.ls1.gamma": torch.zeros(32)})
    with pytest.raises(CheckpointError, match=f"missing: {ours}"):
        convert({name: value for name, value in tensors.items() if name != theirs})


def test_sizes_that_no_variant_has_are_said_and_heads_can_be_given():
    convert, tensors = load_layout("maws").to_ours, drawn(maws_shapes(d=48, depth=1, p=8, n=9))
    with pytest.raises(CheckpointError, match=r"width 48, 1 blocks, patch 8, 9 positions .* give heads"):
        convert(tensors)
    assert (convert(tensors, heads=6).shape.heads, convert(tensors, heads=6).variant) == (6, "")
    with pytest.raises(CheckpointError, match="5 heads do not divide the width"):
        convert(tensors, heads=5)
    with pytest.raises(CheckpointError, match="10 patches are not those of a square image"):
        convert(drawn(maws_shapes(d=32, depth=1, p=8, n=10)))
    with pytest.raises(CheckpointError, match="a decoder of width 24 beside an encoder of width 32"):
        load_layout("mae").to_ours(drawn(mae_shapes(**ATTO, e=24, deep=1)))
    medium = {name: torch.empty(size, device="meta") for name, size in lut_shapes(d=512, depth=12, p=16, n=196).items()}
    assert load_layout("lut").to_ours(medium).shape.heads == 8  # its ViT-M


def test_a_layout_without_a_place_for_a_tensor_refuses_to_drop_it():
    mae, lut, reduced = (load_layout(name).to_ours(small(name)) for name in ("mae", "lut", "long_seq_mae"))
    classifier = load_layout("maws").to_ours(drawn(maws_shapes(**ATTO, classes=7)))
    for layout, converted in [
        ("maws", mae), ("swag", mae), ("mae", lut), ("mae", reduced), ("lut", mae), ("lut", reduced), ("maws", lut),
        ("mae", classifier), ("long_seq_mae", classifier),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError):
            load_layout(layout).from_ours(converted)


def test_a_weight_that_is_there_twice_under_two_names_is_not_chosen_from():
    tensors = small("swag")
    twin = {"encoder.layers.encoder_layer_0.ln_1.bias": tensors["encoder.layers.layer_0.ln_1.bias"]}
    with pytest.raises(CheckpointError, match="there twice"):
        load_layout("swag").to_ours(tensors | twin)
    halved = drawn(long_shapes(**ATTO, deep=1, split=True))
    del halved["blocks.1.attn.v_bias"]
    with pytest.raises(CheckpointError, match=r"no blocks\.1\.attn\.v_bias beside it"):
        load_layout("long_seq_mae").to_ours(halved)
