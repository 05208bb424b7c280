"""`python -m maws import`: files under official names become releases that compute the same; all else is refused."""

import dataclasses
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import e5
import pytest
import releases
import timm
import torch
from official import (
    ATTO,
    clip_shapes,
    drawn,
    long_shapes,
    lut_shapes,
    mae_shapes,
    maws_shapes,
    older_text_names,
    small,
    swag_shapes,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import maws
from data_pipeline.errors import UserError
from eval.features import open_encoder
from maws import config, import_check, import_tokenizer, importing, stages
from maws.__main__ import main, parser
from maws.checkpoint import CheckpointError
from maws.data.tokenizer import MODEL_FILE, train_tokenizer
from maws.data.transforms import Preprocess
from maws.interop import read_foreign, write_foreign
from maws.interop.archive import read_archive
from maws.interop.ours import from_release
from maws.models.init import fill
from maws.release import load_image_tower, load_masked_autoencoder, load_tokenizer, load_two_tower, open_release

CAPTIONS = ["a red fox and a dog", "two birds on a tree", "eine Katze im Haus", "лиса и заяц", "fresh apples"]
CONTEXT = 12


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A small one in XLM-R's numbering."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CAPTIONS, 90, CONTEXT).save(folder)
    return folder


@pytest.fixture(scope="module")
def ids(tokenizer) -> int:
    return import_tokenizer.load_tokenizer(tokenizer, CONTEXT).vocabulary


def clip(v: int = 60) -> dict[str, Tensor]:
    return drawn(clip_shapes(**ATTO, e=24, dt=32, layers=2, v=v, positions=CONTEXT + 4))


def saved(path: Path, tensors: dict[str, Tensor], entry: str = "") -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({entry: tensors} if entry else tensors, path)
    return path


def imported(file: Path, output: Path, *more: str | Path) -> Path:
    """Through the command's own parser; errors are raised, not told."""
    asked = ["import", str(file), "--output", str(output), *map(str, more)]
    options = parser().parse_args(asked)
    assert importing.run(options) == 0
    return output


def pixels(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize(
    ("layout", "file", "shapes", "stage", "lineage"),
    [
        ("mae", "mae.pth", mae_shapes(**ATTO, e=16, deep=1), "mae", ["mae"]),
        ("long_seq_mae", "long.pth", long_shapes(**ATTO, deep=1, split=True), "mae", ["mae"]),
        ("lut", "lut.pth", lut_shapes(**ATTO, hidden=20, e=16, deep=1), "lc_mae", ["lc_mae"]),
        ("maws", "maws.safetensors", maws_shapes(**ATTO), "imported", ["imported"]),
        ("swag", "swag.bin", swag_shapes(**ATTO, classes=7), "imported", ["wsp"]),
    ],
)
def test_a_file_becomes_a_release_with_the_same_tokens(tmp_path, caplog, layout, file, shapes, stage, lineage):
    caplog.set_level(logging.INFO)
    file = saved(tmp_path / file, drawn(shapes, torch.float32), "model" if layout in ("mae", "lut") else "")
    release = open_release(imported(file, tmp_path / "release", "--from", layout))
    assert (release.stage, list(release.lineage), release.shape.width) == (stage, lineage, 32)
    assert release.config["train"] == {
        "imported_from": file.name, "layout": layout, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()
    }  # fmt: skip
    found = read_foreign(file, layout)
    tokens = found.build().forward_features(pixels())
    assert torch.equal(load_image_tower(release)(pixels()), tokens)
    assert "tokens of two images: largest difference " in caplog.text
    if found.decoder is not None:
        reconstructor = load_masked_autoencoder(release)
        assert reconstructor.autoencoder.state_dict().keys() == found.weights.keys()
        assert reconstructor.reconstruct(pixels(), seed=0)[0].isfinite().all()
    else:
        stored = load_file(release.weights)
        assert stored.keys() == found.weights.keys() | found.heads.keys()
    encoder = open_encoder(release.folder, torch.device("cpu"))
    image = Image.effect_noise((50, 40), 60).convert("RGB")
    assert encoder(encoder.preprocess(image)[None]).shape == (1, 32)


def test_the_report_says_what_was_kept_renamed_made_and_dropped(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = drawn(long_shapes(**ATTO, deep=1, split=True))
    torch.save({"model": model, "epoch": 3, "args": Namespace(lr=1.0)}, tmp_path / "long.pth")
    imported(tmp_path / "long.pth", tmp_path / "release")
    for line in (
        "long_seq_mae: autoencoder atto, 2 blocks of width 32, 2 heads, patch 8, 32 px",
        "names kept: 47 tensors",
        "  decoder_downsample.weight -> decoder_reduce.weight",
        "made: blocks.*.attn.qkv.bias (2 tensors): the file has it in another form, or not",
        "dropped: epoch (entry of the file): not weights of the model asked for",
    ):
        assert line in caplog.text
    caplog.clear()
    saved(tmp_path / "lut.pth", drawn(lut_shapes(**ATTO, hidden=20, e=16, deep=1)), "model")
    imported(tmp_path / "lut.pth", tmp_path / "lut")
    assert "dropped: predictor.*.weight (3 tensors): releases of autoencoders hold encoder and decoder" in caplog.text


def test_a_finetuned_classifier_keeps_its_head_and_sees_squashed_pictures(tmp_path):
    tensors = drawn(maws_shapes(d=32, depth=2, p=16, n=1024, classes=7), torch.float32)  # 512 px, as the released ones
    release = open_release(imported(saved(tmp_path / "ft.pt", tensors), tmp_path / "release"))
    assert release.config["classes"] == 7 and release.preprocess == Preprocess(512, squash=True)
    stored = load_file(release.weights)
    assert torch.equal(stored["head.weight"], tensors["head.weight"])
    assert torch.equal(stored["head.bias"], tensors["head.bias"])
    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (32, 0, 64, 32))
    seen = release.preprocess(wide)  # 3 512 512: both halves are there, to the edges
    assert seen[0, 256, 0] == 255 and seen[2, 256, -1] == 255
    small = drawn(maws_shapes(**ATTO, classes=7), torch.float32)  # of somebody else, who says nothing of squashing
    assert not open_release(imported(saved(tmp_path / "s.pt", small), tmp_path / "small")).preprocess.squash
    plain = open_release(imported(saved(tmp_path / "m.pt", drawn(maws_shapes(**ATTO))), tmp_path / "plain"))
    assert not plain.preprocess.squash and "classes" not in plain.config


@pytest.mark.parametrize("older", [False, True])
def test_a_clip_file_becomes_a_release_that_reads_images_and_text(tmp_path, caplog, tokenizer, ids, older):
    caplog.set_level(logging.INFO)
    tensors = older_text_names(clip(ids)) if older else clip(ids)
    file = saved(tmp_path / "clip.pth", {n: v.float() for n, v in tensors.items()})
    out = imported(file, tmp_path / "release", "--from", "maws_clip", "--tokenizer", tokenizer)
    release = open_release(out)
    assert (release.stage, release.lineage) == ("lit", ("mae", "wsp", "lit"))
    towers, (words, mask) = load_two_tower(release), load_tokenizer(release)(CAPTIONS)
    found = read_foreign(file).build()
    assert torch.equal(towers.encode_text(words, mask), found.encode_text(words, mask))
    assert torch.equal(towers.encode_image(pixels()), found.encode_image(pixels()))
    assert "embeddings of two images: largest" in caplog.text
    assert "embeddings of three texts: largest" in caplog.text
    assert sorted(path.name for path in (out / "tokenizer").iterdir()) == [MODEL_FILE]


def test_a_folder_of_timm_becomes_a_release_with_its_classifier(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    halves = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    made = {"depth": 1, "img_size": 32, "num_classes": 5, "pretrained_cfg_overlay": halves}
    model = timm.create_model("vit_tiny_patch16_224", **made).eval()
    timm.models.save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    release = open_release(imported(tmp_path / "timm", tmp_path / "release"))
    assert (release.stage, release.config["classes"], release.config["image_size"]) == ("imported", 5, 32)
    assert release.config["train"]["layout"] == "timm" and "tokens of two images: largest" in caplog.text
    assert_close(load_image_tower(release)(pixels()), model.forward_features(pixels()), rtol=0, atol=1e-5)
    file = tmp_path / "timm" / "model.safetensors"
    for more in (("--from", "timm"), ()):  # the file alone: how its images are made is in the config.json beside it
        again = open_release(imported(file, tmp_path / "again", "--overwrite", *more))
        assert again.sha256 == release.sha256 and again.config["train"]["layout"] == "timm"
        assert again.preprocess == release.preprocess and again.preprocess.mean == halves["mean"]
    refused(file, tmp_path, "5 heads are asked for, and its config.json makes 3", "--heads", "5")


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["first", "mean"])
def test_a_folder_of_open_clip_becomes_a_release_with_its_tokenizer(tmp_path, caplog, pool):
    """Also of a tower in BERT's layout: both are computed in two ways."""
    caplog.set_level(logging.INFO)
    text = dataclasses.replace(releases.TEXT, pool=pool, layout="bert" if pool == "mean" else "xlmr")
    ours = releases.lit_release(tmp_path / "lit", text=text)
    assert main(["export", str(ours.folder), "--to", "open_clip", "--output", str(tmp_path / "open_clip")]) == 0
    release = open_release(imported(tmp_path / "open_clip", tmp_path / "release"))
    assert "embeddings of three texts: largest" in caplog.text
    ids, mask = load_tokenizer(release)(CAPTIONS)
    assert torch.equal(ids, load_tokenizer(ours)(CAPTIONS)[0])
    want, got = (load_two_tower(one).encode_text(ids, mask) for one in (ours, release))
    assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "tensors"),
    [
        ("mae", drawn(mae_shapes(**ATTO, e=16, deep=1), torch.float32)),
        ("long_seq_mae", drawn(long_shapes(**ATTO, deep=1), torch.float32)),
        ("maws", drawn(maws_shapes(**ATTO, classes=7), torch.float32)),
        ("swag", drawn(swag_shapes(**ATTO, classes=7), torch.float32)),
        ("maws_clip", {name: value.float() for name, value in clip().items()}),
    ],
)
def test_a_release_goes_back_to_the_official_names_unchanged(tmp_path, layout, tensors):
    out = imported(saved(tmp_path / "there.pth", tensors), tmp_path / "release", "--from", layout)
    write_foreign(tmp_path / "back.safetensors", from_release(open_release(out)), layout)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


def test_a_wsp_runs_linear_head_goes_out_as_a_classifier(tmp_path):
    release = releases.image_release(tmp_path / "wsp", classes=5)
    write_foreign(tmp_path / "out.safetensors", from_release(release), "maws")
    out, own = load_file(tmp_path / "out.safetensors"), load_file(release.weights)
    assert torch.equal(out["head.weight"], own["head.0.weight"]) and torch.equal(out["head.bias"], own["head.0.bias"])


def test_without_a_tokenizer_it_warns_and_reading_text_says_the_way_out(tmp_path, caplog):
    out = imported(saved(tmp_path / "clip.pth", clip()), tmp_path / "release")
    assert "--tokenizer FOLDER --overwrite" in caplog.text
    with pytest.raises(CheckpointError, match=r"clip\.pth holds none: import it again with --tokenizer"):
        load_tokenizer(open_release(out))


def test_a_tokenizer_of_another_tower_is_refused(tmp_path, monkeypatch, tokenizer, ids):
    file = saved(tmp_path / "clip.pth", clip(ids + 1))
    refused(file, tmp_path, f"has {ids:,} ids, the text tower {ids + 1:,} rows", "--tokenizer", tokenizer)
    monkeypatch.setattr(import_tokenizer, "XLMR_IDS", ids)  # as if the tower had XLM-R's
    fits = saved(tmp_path / "fits.pth", clip(ids))
    refused(fits, tmp_path, "XLM-R's number of ids and not its numbering: 'Hello world!' is", "--tokenizer", tokenizer)
    refused(fits, tmp_path, "is neither sentencepiece.bpe.model nor tokenizer.json", "--tokenizer", tmp_path / "no")
    trunk = saved(tmp_path / "trunk.pth", drawn(maws_shapes(**ATTO)))
    refused(trunk, tmp_path, "has no text tower that would read it", "--tokenizer", tokenizer)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_release_holds_the_rounded_values(tmp_path, dtype):
    tensors = drawn(maws_shapes(**ATTO))
    out = imported(saved(tmp_path / "maws.pt", tensors), tmp_path / "release", "--dtype", dtype)
    stored = load_file(out / "model.safetensors")
    assert all(torch.equal(stored[name], value.to(getattr(torch, dtype))) for name, value in tensors.items())
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_a_large_release_is_split_and_read_again(tmp_path):
    file = saved(tmp_path / "maws.pt", drawn(maws_shapes(**ATTO), torch.float32))
    release = open_release(imported(file, tmp_path / "release", "--max-shard", "40kB"))
    assert len(list(release.folder.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(load_image_tower(release)(pixels()), read_foreign(file).build()(pixels()))


@pytest.mark.parametrize("stage", ["mae", "wsp", "lit"])
def test_stages_start_from_an_imported_release(tmp_path, stage):
    out = imported(saved(tmp_path / "maws.pt", drawn(maws_shapes(**ATTO), torch.float32)), tmp_path / "release")
    cfg = dataclasses.replace(stages.preset(stage, "debug"), init_from=str(out))
    if stage == "wsp":
        cfg = dataclasses.replace(cfg, synsets=7)
    if stage == "lit":
        cfg = config.override(cfg, ["text.vocabulary=60"])
    made = stages.load(stage)
    objective = made.objective(cfg, SimpleNamespace(vocabulary=[SimpleNamespace(count=2)] * 7))
    fill(objective, objective.init_rules(), seed=0)
    handover = made.initialise(objective, cfg, lambda params: torch.no_grad())
    assert handover is not None and len(handover.taken) == 30
    tower = load_image_tower(open_release(out))
    assert all(torch.equal(value, handover.tower.state_dict()[name]) for name, value in tower.state_dict().items())


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(file: Path, folder: Path, said: str, *more: str | Path) -> None:
    """With these words; and nothing of a release is left."""
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError) as error:
        imported(file, folder / "refused", *more)
    assert said in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_settings_that_cannot_be_used_are_refused_before_the_file_is_read(tmp_path):
    file = tmp_path / "not there.pth"
    refused(file, tmp_path, "--from maws_klip is no known layout; did you mean maws_clip", "--from", "maws_klip")
    refused(file, tmp_path, "--dtype float8 is not known; ", "--dtype", "float8")
    refused(file, tmp_path, "--target pixel is not known; did you mean pixels", "--target", "pixel")
    refused(file, tmp_path, "--lineage wps is no stage; did you mean wsp", "--lineage", "mae,wps")
    refused(file, tmp_path, "'5 chairs' is not a size", "--max-shard", "5 chairs")
    refused(file, tmp_path, "--heads -2 is no number", "--heads", "-2")
    refused(file, tmp_path, "--entry ema is for files of torch.save", "--entry", "ema", "--from", "timm")
    refused(file, tmp_path, "is not a file; give one file of weights")
    (tmp_path / "taken").mkdir()
    for more, said in (((), "is there already; add --overwrite"), (("--overwrite",), "is no release")):
        with pytest.raises(UserError, match=said):
            imported(file, tmp_path / "taken", *more)


def test_files_that_are_not_whole_or_not_weights_are_refused(tmp_path):
    tensors = small("maws")
    for name in ("cut.pth", "cut.safetensors"):
        whole = saved(tmp_path / name, tensors).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        refused(tmp_path / name, tmp_path, f"{name} is damaged")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", tmp_path, "is not a file; give one file of weights")
    refused(tmp_path / "folder", tmp_path, "is not a file; give one file of weights", "--from", "maws")
    saved(tmp_path / "resnet.pth", {"conv1.weight": torch.zeros(1)})
    refused(tmp_path / "resnet.pth", tmp_path, "follow none of the layouts")
    release = imported(saved(tmp_path / "maws.pt", tensors), tmp_path / "release")
    refused(release, tmp_path, "is a release of ours already")
    refused(release / "model.safetensors", tmp_path, "is a release of ours already")
    refused(tmp_path / "maws.pt", tmp_path, "has no decoder that would predict it", "--target", "pixels")


def test_a_release_is_not_replaced_by_a_file_that_lies_in_it(tmp_path):
    out = imported(saved(tmp_path / "maws.pt", small("maws")), tmp_path / "release")
    (tmp_path / "maws.pt").rename(out / "maws.pt")
    with pytest.raises(UserError, match="would replace what is imported"):
        imported(out / "maws.pt", out, "--overwrite")
    assert (out / "maws.pt").is_file()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"norm.bias": torch.zeros(32, device="meta")}, "'norm.bias' is no plain tensor (torch.strided on meta)"),
        ({"norm.bias": torch.zeros(32).to_sparse()}, "'norm.bias' is no plain tensor"),
        ({"norm.bias\x1b[31m": torch.zeros(32)}, r"'norm.bias\x1b[31m' is no plain tensor"),
        ({"norm.bias": torch.zeros(32, dtype=torch.complex64)}, "norm.bias (torch.complex64)"),
        ({"blocks.1.attn.qkv.weight": torch.zeros(96, 32, dtype=torch.int8)}, "blocks.1.attn.qkv.weight (torch.int8)"),
        (
            {"head.weight": torch.zeros(7, 32, dtype=torch.int8), "head.bias": torch.zeros(7)},
            "head.weight (torch.int8)",
        ),
        ({"blocks.999999999.norm1.bias": torch.zeros(32)}, "there is a blocks.999999999, and 31 tensors in all"),
        ({"patch_embed.proj.weight": torch.zeros(32, 3, 0, 0)}, "patch_embed.proj.weight is empty"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_tensors_that_are_no_weights_are_refused_by_name(tmp_path, changed, said):
    refused(saved(tmp_path / "odd.pt", small("maws") | changed), tmp_path, said)


def test_a_file_that_holds_itself_ends(tmp_path):
    content: dict[str, object] = {}
    content["model"] = content
    torch.save(content, tmp_path / "ring.pt")
    refused(tmp_path / "ring.pt", tmp_path, "has no tensors where they are looked for")


class Trap:
    def __reduce__(self):
        return os.mkdir, (Trap.folder,)


def test_a_file_that_wants_to_run_code_is_refused_and_nothing_ran(tmp_path):
    Trap.folder = str(tmp_path / "was here")
    torch.save({"model": small("mae"), "args": Trap()}, tmp_path / "trap.pth")
    refused(tmp_path / "trap.pth", tmp_path, "wants to run posix.mkdir while it is opened")
    assert not Path(Trap.folder).exists()


@pytest.mark.parametrize("missing", ["norm.bias", "blocks.1.attn.proj.weight", "decoder_blocks.0.mlp.fc2.bias"])
def test_no_file_is_taken_in_part(tmp_path, missing):
    tensors = small("mae")
    short = {name: value for name, value in tensors.items() if name != missing}
    refused(saved(tmp_path / "short.pth", short, "model"), tmp_path, f"missing: {missing}")
    wrong = tensors | {missing: torch.zeros(3, 5)}
    said = f"{missing} is (3, 5), expected {tuple(tensors[missing].shape)}"
    refused(saved(tmp_path / "wrong.pth", wrong, "model"), tmp_path, said)


def finetuned() -> dict[str, Tensor]:
    """What MAE's code saves after finetuning with global pooling: fc_norm in the place of norm, and a head."""
    tensors = drawn(maws_shapes(**ATTO, classes=7), torch.float32)
    return {f"fc_{name}" if name.startswith("norm.") else name: value for name, value in tensors.items()}


def test_a_finetuned_mae_file_is_a_classifier_that_scores_as_timm_does_and_goes_back(tmp_path):
    file = saved(tmp_path / "mae_finetuned.pth", tensors := finetuned(), "model")
    release = open_release(imported(file, tmp_path / "release", "--heads", "2"))
    assert (release.shape.pool, release.config["classes"], release.lineage) == ("mean_norm", 7, ("mae", "finetune"))
    assert (release.preprocess.resize, release.preprocess.image_size) == (36, 32)  # 256/224
    theirs = timm.create_model(
        "vit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=7,
        global_pool="avg", fc_norm=True,
    ).eval()  # fmt: skip
    theirs.load_state_dict(tensors)
    ours = maws.create_model("atto", release.folder, classifier=True)
    with torch.no_grad():
        assert_close(ours(pixels()), theirs(pixels()), rtol=0, atol=1e-5)
    write_foreign(tmp_path / "back.pth", from_release(release), "mae")
    back = torch.load(tmp_path / "back.pth")["model"]
    assert back.keys() == tensors.keys() and all(torch.equal(back[n], tensors[n]) for n in back)
    with pytest.raises(CheckpointError, match="write it as mae"):
        write_foreign(tmp_path / "back.pt", from_release(release), "maws")
    refused(file, tmp_path, "import it with --from mae", "--from", "maws")


def test_a_clip_file_without_one_of_its_tensors_is_refused(tmp_path):
    tensors = clip()
    for name in ("text_projection", "logit_scale", "vision_encoder.norm.bias"):
        short = {n: v for n, v in tensors.items() if n != name}
        refused(saved(tmp_path / "short.pth", short), tmp_path, f"missing: {name.removeprefix('vision_encoder.')}")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (float("inf"), "float32"), (1e6, "float16")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, value, dtype):
    tensors = small("maws")
    tensors["blocks.1.mlp.fc2.weight"][3, 4] = value
    file = saved(tmp_path / "maws.pt", tensors)
    refused(file, tmp_path, "blocks.1.mlp.fc2.weight has values that are nan or infinite", "--dtype", dtype)


def test_a_release_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    """As if a tensor had been lost on the way to the disk."""
    streamed = importing.streamed
    for file, lost in (
        (saved(tmp_path / "maws.pt", small("maws")), "blocks.1.attn.proj.weight"),
        (saved(tmp_path / "clip.pth", clip()), "image.norm.bias"),
        (saved(tmp_path / "clip.pth", clip()), "text.encoder.embeddings.LayerNorm.bias"),
        (saved(tmp_path / "clip.pth", clip()), "text.encoder.encoder.layer.1.attention.self.value.bias"),
    ):
        zeros = torch.zeros_like(read_foreign(file).weights[lost])
        with monkeypatch.context() as change:
            change.setattr(importing, "streamed", lambda t, dtype, n=lost, z=zeros: streamed({**t, n: z}, dtype))
            refused(file, tmp_path, "the release does not compute what the file does")


def test_an_old_release_stays_when_the_new_one_fails(tmp_path):
    file = saved(tmp_path / "maws.pt", small("maws"))
    out = imported(file, tmp_path / "release")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    saved(file, small("maws") | {"norm.bias": torch.full((32,), torch.nan)})
    with pytest.raises(CheckpointError, match=r"norm\.bias has values that are nan"):
        imported(file, out, "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maws.pt", "release"]


def test_a_terminated_import_leaves_nothing(tmp_path, monkeypatch):
    """SIGTERM while the release is compared, the last step; and the signal's handler is the caller's again."""
    monkeypatch.setattr(importing, "check", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before, file = signal.getsignal(signal.SIGTERM), saved(tmp_path / "maws.pt", small("maws"))
    with pytest.raises(SystemExit) as ended:
        imported(file, tmp_path / "release")
    assert ended.value.code == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["maws.pt"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_tells_an_error_in_one_line(tmp_path, capsys):
    assert main(["import", str(tmp_path / "no.pth"), "--output", str(tmp_path / "out")]) != 0
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_an_encoder_alone_cannot_reconstruct_and_it_says_why(tmp_path):
    out = imported(saved(tmp_path / "mae_pretrain.pth", drawn(maws_shapes(**ATTO)), "model"), tmp_path / "release")
    with pytest.raises(
        CheckpointError, match=r"mae_pretrain\.pth, which holds an encoder and no decoder.*encoders only"
    ):
        load_masked_autoencoder(open_release(out))


def test_a_model_too_large_for_this_machine_is_written_and_not_computed(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(import_check, "free_memory", lambda: 1000)
    out = imported(saved(tmp_path / "maws.pt", small("maws")), tmp_path / "release")
    assert "not computed here: loading it takes 0.0 GiB" in caplog.text
    assert load_image_tower(open_release(out))(pixels()).isfinite().all()


# --------------------------------------------------------------------------------------------------------------- memory


def anonymous() -> int:
    """Bytes of this process's own memory: pages of mapped files, which the system can take back, do not count."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_is_opened_without_being_read(tmp_path, suffix):
    tensors = {f"layer.{i}": torch.full((1024, 1024), float(i)) for i in range(16)}  # 64 MiB
    file = saved(tmp_path / f"weights{suffix}", tensors)
    del tensors
    before = anonymous()
    found = read_archive(file).tensors
    total = sum(float(value.sum()) for value in found.values())  # every value is looked at
    assert total == 1024 * 1024 * sum(range(16))
    assert anonymous() - before < 16 * 2**20


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_done_to_a_model_leaves_its_file_alone(tmp_path, suffix):
    file = saved(tmp_path / f"maws{suffix}", small("maws"))
    before, model = file.read_bytes(), read_foreign(file).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(model.norm.bias, small("maws")["norm.bias"] + 1.0)
    assert file.read_bytes() == before


MEASURE = """
import sys, threading, time
from pathlib import Path
from maws import import_check, importing

def anonymous():
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

import_check.free_memory = lambda: 0
importing.log.warning("warm")
peak = start = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
importing.import_weights(importing.Import(file=Path(sys.argv[1]), output=Path(sys.argv[2]), dtype=sys.argv[3]))
done.set()
thread.join()
print(peak - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_import_takes_the_memory_of_a_few_tensors(tmp_path, suffix, dtype):
    """A file of 340 MB, whose largest tensor has 9.4 MB; with what Python and torch take for themselves."""
    file = saved(tmp_path / f"b16{suffix}", drawn(maws_shapes(d=768, depth=12, p=16, n=196), torch.float32))
    command = [sys.executable, "-c", MEASURE, str(file), str(tmp_path / "out"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert file.stat().st_size > 340e6
    assert int(done.stdout) < 60e6, done.stdout


@pytest.mark.slow
def test_xlm_rs_own_tokenizer_is_taken_for_a_tower_of_its_size(tmp_path):
    e5.write_tokenizer(tmp_path / "xlmr")
    tensors = drawn(clip_shapes(**ATTO, e=24, dt=32, layers=1, v=250_002, positions=514), torch.float32)
    file = saved(tmp_path / "clip.pth", tensors)
    for name in (MODEL_FILE, "tokenizer.json"):
        out = imported(file, tmp_path / "release", "--tokenizer", tmp_path / "xlmr" / name, "--overwrite")
        words, mask = load_tokenizer(open_release(out))(["Hello world!"])
        assert words[0, :5].tolist() == [0, 35378, 8999, 38, 2]
        assert int(mask.sum()) == 5


KILLED = """
import sys, time
from pathlib import Path
from maws import importing

importing.check = lambda *_: (print("compares", flush=True), time.sleep(60))
importing.import_weights(importing.Import(file=Path(sys.argv[1]), output=Path(sys.argv[2])))
"""


@pytest.mark.slow
def test_an_import_killed_without_warning_leaves_no_release_and_the_next_one_cleans_up(tmp_path):
    file = saved(tmp_path / "maws.pt", small("maws"))
    command = [sys.executable, "-c", KILLED, str(file), str(tmp_path / "release")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "compares\n"
        process.kill()
    assert not (tmp_path / "release").exists()
    imported(file, tmp_path / "release")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maws.pt", "release"]
