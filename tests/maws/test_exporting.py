"""The command `export` for what is no run, and for other libraries: what it accepts, refuses, and leaves behind."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from releases import TINY, image_release, lit_release, mae_release, randomise, same, write_run
from safetensors.torch import load_file, save_file

from maws import exporting, weight_files
from maws.__main__ import main
from maws.data.transforms import Preprocess
from maws.files import sha256
from maws.interop import timm_layout
from maws.models.vit import VisionTransformer
from maws.release import load_image_tower, open_release


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def export(*words: object) -> int:
    return main(["export", *map(str, words)])


class TestRelease:
    def test_is_written_again_with_all_that_lies_beside_its_weights(self, tmp_path):
        (tmp_path / "vocabulary.parquet").write_bytes(b"words")
        extras = {"vocabulary.parquet": tmp_path / "vocabulary.parquet"}
        release = image_release(tmp_path / "release", extras=extras)
        assert export(release.folder, "--output", tmp_path / "out") == 0
        again = open_release(tmp_path / "out")
        assert again.sha256 == release.sha256 and again.preprocess == release.preprocess
        assert again.config == release.config | {"dtype": "float32"}
        assert (tmp_path / "out" / "vocabulary.parquet").read_bytes() == b"words"

    def test_the_card_of_an_import_goes_with_the_weights(self, tmp_path):
        (tmp_path / "README.md").write_text("weights of somebody, CC-BY-NC 4.0")
        extras = {"README.md": tmp_path / "README.md"}
        release = image_release(tmp_path / "release", extras=extras, train={"imported_from": "x.pth"})
        assert export(release.folder, "--output", tmp_path / "out") == 0
        assert export(release.folder, "--output", tmp_path / "timm", "--to", "timm", "--no-check") == 0
        cards = [(tmp_path / "out" / "README.md").read_text(), (tmp_path / "timm" / "MODEL_CARD.md").read_text()]
        assert cards == ["weights of somebody, CC-BY-NC 4.0"] * 2

    def test_in_another_type_and_in_files_of_a_size(self, tmp_path):
        release = image_release(tmp_path / "release")
        assert export(release.folder, "--output", tmp_path / "out", "--dtype", "bfloat16", "--max-shard", "20kB") == 0
        again = open_release(tmp_path / "out")
        assert again.weights.name == "model.safetensors.index.json"
        before = load_image_tower(release).state_dict()
        after = load_image_tower(again).state_dict()
        assert same(after, {name: value.bfloat16().float() for name, value in before.items()})

    def test_the_mean_of_the_weights_stands_in_for_them_where_there_is_one(self, tmp_path, capsys):
        release = image_release(tmp_path / "release")
        assert export(release.folder, "--output", tmp_path / "out", "--ema") == 2
        assert "holds no mean of the weights" in capsys.readouterr().err
        mean = dict(randomise(VisionTransformer(TINY, 32), seed=7).named_parameters())
        save_file({name: p.detach() for name, p in mean.items()}, release.folder / "ema.safetensors")
        assert export(release.folder, "--output", tmp_path / "out", "--ema", "--to", "timm") == 0
        assert same(load_file(tmp_path / "out" / "model.safetensors"), {n: p.detach() for n, p in mean.items()})
        assert export(release.folder, "--output", tmp_path / "again", "--ema") == 0
        assert sha256(tmp_path / "again" / "model.safetensors") != release.sha256

    def test_what_is_no_run_and_no_release_is_refused(self, tmp_path, capsys):
        assert export(tmp_path, "--output", tmp_path / "out", "--to", "timm") == 1
        assert "config.json and checkpoints/" in capsys.readouterr().err

    def test_a_file_of_weights_is_sent_to_import(self, tmp_path, capsys):
        (tmp_path / "maws.pt").write_bytes(b"weights")
        assert export(tmp_path / "maws.pt", "--output", tmp_path / "out", "--to", "timm") == 2
        assert f"python -m maws import {tmp_path / 'maws.pt'}" in capsys.readouterr().err

    def test_two_towers_without_a_tokenizer_are_refused_before_anything_is_written(self, tmp_path, capsys):
        release = lit_release(tmp_path / "release")
        shutil.rmtree(release.folder / "tokenizer")
        assert export(release.folder, "--output", tmp_path / "out", "--to", "hf") == 1
        assert (
            "holds no tokenizer: expected sentencepiece.bpe.model" in capsys.readouterr().err
            and not (tmp_path / "out").exists()
        )


class TestRun:
    def test_an_unfinished_one_is_taken_from_its_newest_checkpoint(self, tmp_path):
        objective = write_run(tmp_path / "run")
        assert export(tmp_path / "run", "--output", tmp_path / "out", "--to", "timm") == 0
        wanted = {
            name.removeprefix("autoencoder."): p.detach()
            for name, p in objective.named_parameters()
            if "decoder" not in name and "mask_token" not in name
        }
        assert same(load_file(tmp_path / "out" / "model.safetensors"), wanted)
        assert names(tmp_path) == ["out", "run"] and names(tmp_path / "out") == [
            "MODEL_CARD.md",
            "config.json",
            "model.safetensors",
        ]

    def test_a_finished_one_is_taken_from_its_release_unless_a_checkpoint_is_named(self, tmp_path):
        write_run(tmp_path / "run")
        mae_release(tmp_path / "run" / "release")
        assert export(tmp_path / "run", "--output", tmp_path / "finished", "--to", "timm") == 0
        checkpoint = tmp_path / "run" / "checkpoints" / "step_0000007"
        command = (tmp_path / "run", "--output", tmp_path / "named", "--to", "timm", "--checkpoint", checkpoint)
        assert export(*command) == 0
        finished, named = (load_file(tmp_path / n / "model.safetensors") for n in ("finished", "named"))
        released = load_file(tmp_path / "run" / "release" / "model.safetensors")
        assert same(finished, {name: released[name] for name in finished})
        assert not torch.equal(named["cls_token"], finished["cls_token"])


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--to", "tim"), "--to tim is not known; did you mean timm"),
            (("--to", "timm", "--dtype", "float16"), "--dtype float16 is not known"),
            (("--to", "timm", "--max-shard", "1GB"), "reads one file of weights"),
            (("--to", "timm", "--checkpoint", "x"), "--checkpoint is for a run"),
        ],
    )
    def test_of_what_cannot_be_done_as_asked(self, words, said, tmp_path, capsys):
        release = image_release(tmp_path / "release")
        assert export(release.folder, "--output", tmp_path / "out", *words) == 2
        assert said in capsys.readouterr().err and names(tmp_path) == ["release"]

    def test_what_is_there_stays_unless_it_is_an_export_and_said(self, tmp_path, capsys):
        release = image_release(tmp_path / "release")
        (tmp_path / "mine").mkdir()
        command = (release.folder, "--to", "timm", "--output")
        assert export(*command, tmp_path / "mine", "--overwrite") == 2
        assert "does not delete it" in capsys.readouterr().err
        assert export(*command, release.folder, "--overwrite") == 2
        assert "would replace what is exported" in capsys.readouterr().err
        assert export(*command, tmp_path / "out") == 0 and export(*command, tmp_path / "out") == 2
        assert export(*command, tmp_path / "out", "--overwrite", "--dtype", "bfloat16") == 0
        assert load_file(tmp_path / "out" / "model.safetensors")["norm.weight"].dtype == torch.bfloat16


class TestFailedWrite:
    @pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
    def test_leaves_nothing_and_keeps_what_was_there(self, error, tmp_path, monkeypatch):
        release = image_release(tmp_path / "release")
        export(release.folder, "--to", "timm", "--output", tmp_path / "out")
        before = sha256(tmp_path / "out" / "model.safetensors")
        written = weight_files.write_tensors

        def fails(path, *rest):
            written(path, *rest)
            raise error

        monkeypatch.setattr(weight_files, "write_tensors", fails)
        assert export(release.folder, "--to", "timm", "--output", tmp_path / "out", "--overwrite") != 0
        assert export(release.folder, "--to", "timm", "--output", tmp_path / "new") != 0
        assert names(tmp_path) == ["out", "release"] and sha256(tmp_path / "out" / "model.safetensors") == before

    def test_what_a_kill_left_is_in_nobodys_way(self, tmp_path):
        release = image_release(tmp_path / "release")
        (tmp_path / "tmp-out").mkdir()
        (tmp_path / "tmp-out" / "half.safetensors").write_bytes(b"half")
        assert export(release.folder, "--to", "timm", "--output", tmp_path / "out") == 0
        assert names(tmp_path) == ["out", "release"] and names(tmp_path / "out") == [
            "MODEL_CARD.md",
            "config.json",
            "model.safetensors",
        ]


class TestCheck:
    def test_the_largest_difference_is_told(self, tmp_path, caplog):
        caplog.set_level("INFO")
        export(image_release(tmp_path / "release").folder, "--to", "timm", "--output", tmp_path / "out")
        assert "loaded back with timm; largest differences, of the largest value: features " in caplog.text

    def test_without_the_library_or_without_memory_the_folder_is_kept_and_that_is_told(
        self, tmp_path, caplog, monkeypatch
    ):
        caplog.set_level("INFO")
        release = image_release(tmp_path / "release")

        def missing(folder, inputs):
            raise ImportError("No module named 'timm'")

        monkeypatch.setattr(timm_layout, "outputs", missing)
        assert exporting.write_for("timm", release, tmp_path / "first") == {}
        monkeypatch.setattr(exporting, "free_memory", lambda: 1000)
        assert exporting.write_for("timm", release, tmp_path / "second") == {}
        assert "pip install timm" in caplog.text and "not checked: that takes about" in caplog.text
        assert names(tmp_path) == ["first", "release", "second"]

    def test_a_release_rounded_to_bfloat16_is_compared_with_its_rounded_self(self, tmp_path):
        release = image_release(tmp_path / "release")
        found = exporting.write_for("timm", release, tmp_path / "out", "bfloat16")
        assert 0 <= found["features"] < 1e-5


@pytest.mark.parametrize(("side", "resize"), [(224, 256), (518, 592), (518, 518), (384, 439), (30, 31), (224, 0)])
def test_timms_share_of_the_crop_gives_our_resize_to_the_pixel(side, resize):
    share = json.loads(json.dumps(timm_layout.crop_share(Preprocess(side, resize))))
    assert math.floor(side / share) == (resize or side)
