"""Releases from the ranks' files of a checkpoint, and weights in several files; no training, no engine."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from releases import same, write_run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training import ROOT

from data_pipeline.errors import DataError
from maws import export
from maws.__main__ import main
from maws.checkpoint import CheckpointError
from maws.config import ConfigError
from maws.files import sha256, write_json
from maws.handover import load_backbone
from maws.models import init
from maws.models.pos_embed import resize_positions, sincos_2d
from maws.models.vit import VisionTransformer
from maws.release import load_image_tower, load_masked_autoencoder, open_release, read_weights
from maws.tensor_file import TensorFile
from maws.weight_files import parse_size

STAGES = (
    "mae",
    "simmim",
    "lc_mae",
    "wsp",
)  # lit is exported in test_training.py, where transformers is imported anyway


def released(objective: nn.Module, stage: str) -> dict[str, Tensor]:
    """Names and values that a release holds, said once more."""
    prefixes = {"mae": "autoencoder.", "simmim": "model.", "lc_mae": "online.encoder.", "wsp": "backbone."}
    named = dict(objective.named_parameters())
    if stage == "lc_mae":
        named = {n: p for n, p in named.items() if n.startswith("online.encoder.")}
    return {n.removeprefix(prefixes[stage]): p.detach() for n, p in named.items()}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_from_any_number_of_ranks_to_the_bit(stage, ranks, shards, tmp_path):
    objective = write_run(tmp_path / "run", stage, ranks, shards if stage == "wsp" else None)
    export.export(tmp_path / "run", tmp_path / "out")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), released(objective, stage))
    release = open_release(tmp_path / "out")
    assert release.stage == stage and release.config["train"]["steps"] == 7
    load_image_tower(release)
    if stage == "wsp":
        ours, theirs = (tmp_path / "out", shards.path)
        assert (ours / "vocabulary.parquet").read_bytes() == (theirs / "vocabulary.parquet").read_bytes()


class TestFrozen:
    def test_fixed_positions_are_computed_anew(self, tmp_path):
        write_run(tmp_path / "run")
        export.export(tmp_path / "run", tmp_path / "out")
        (table,) = read_weights(open_release(tmp_path / "out"), "pos_embed").values()
        assert torch.equal(table[0], sincos_2d(32, (4, 4)))

    def test_what_was_handed_over_comes_from_that_release_made_to_fit_as_it_was(self, tmp_path):
        write_run(tmp_path / "first")
        export.export(tmp_path / "first", tmp_path / "start")
        weights = load_file(tmp_path / "start" / "model.safetensors")
        weights["pos_embed"] = torch.randn(weights["pos_embed"].shape)  # no formula gives these
        save_file(weights, tmp_path / "start" / "model.safetensors")
        run = tmp_path / "second"
        objective = write_run(run, "mae", 2, None, False, "model.image_size=48", init_from=str(tmp_path / "start"))
        export.export(run, tmp_path / "out")
        got = load_file(tmp_path / "out" / "model.safetensors")
        assert same(got, released(objective, "mae"))
        assert torch.equal(got["pos_embed"], resize_positions(weights["pos_embed"], 1, (4, 4), (6, 6)))

    def test_another_release_in_its_place_is_refused_and_a_moved_one_is_found(self, tmp_path):
        write_run(tmp_path / "first")
        export.export(tmp_path / "first", tmp_path / "start")
        write_run(tmp_path / "second", init_from=str(tmp_path / "start"))
        (tmp_path / "start").rename(tmp_path / "moved")
        with pytest.raises(CheckpointError, match="holds no trained model"):
            export.export(tmp_path / "second", tmp_path / "out")
        export.export(tmp_path / "second", tmp_path / "out", init_from=str(tmp_path / "moved"))
        weights = load_file(tmp_path / "moved" / "model.safetensors")
        save_file(weights | {"cls_token": weights["cls_token"] + 1}, tmp_path / "moved" / "model.safetensors")
        with pytest.raises(CheckpointError, match="is not what the run started from: its hash is"):
            export.export(tmp_path / "second", tmp_path / "out2", init_from=str(tmp_path / "moved"))

    def test_shards_that_moved_are_asked_for(self, tmp_path, shards, shards_path):
        write_run(tmp_path / "run", "wsp", 1, shards)
        record = json.loads((tmp_path / "run" / "config.json").read_text())
        record["data"]["shards"] = str(tmp_path / "nowhere")
        write_json(tmp_path / "run" / "config.json", record)
        with pytest.raises(DataError, match="say where the shards are with --shards"):
            export.export(tmp_path / "run", tmp_path / "out")
        export.export(tmp_path / "run", tmp_path / "out", shards=str(shards_path))
        write_json(tmp_path / "run" / "config.json", record | {"shards_sha256": "0" * 64})
        with pytest.raises(DataError, match="another shard set than the run was trained on"):
            export.export(tmp_path / "run", tmp_path / "out2", shards=str(shards_path))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """One model in one file, and the same in many."""
    write_run(tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "whole")
    export.export(tmp_path / "run", tmp_path / "many", max_shard=40_000)
    return tmp_path / "many"


class TestShards:
    def test_they_hold_what_the_single_file_holds_in_hugging_faces_layout(self, sharded):
        index = json.loads((sharded / "model.safetensors.index.json").read_text())
        files = sorted(set(index["weight_map"].values()))
        assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        assert len(files) > 4 and not (sharded / "model.safetensors").exists()
        found = {file: load_file(sharded / file) for file in files}
        assert all(sum(t.nbytes for t in tensors.values()) <= 40_000 for tensors in found.values())
        assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in found.values() for t in tensors.values())
        want = load_file(sharded.parent / "whole" / "model.safetensors")
        assert same({name: found[file][name] for name, file in index["weight_map"].items()}, want)

    def test_all_readers_take_both_forms(self, sharded):
        whole, many = open_release(sharded.parent / "whole"), open_release(sharded)
        assert same(read_weights(many), read_weights(whole))
        for load in (load_image_tower, lambda release: load_masked_autoencoder(release).autoencoder):
            assert same(load(many).state_dict(), load(whole).state_dict())
        tower = VisionTransformer(whole.shape, 32)
        handover = load_backbone(tower, many, init._dense)
        assert torch.equal(tower.blocks[1].mlp.fc2.weight, load_image_tower(whole).blocks[1].mlp.fc2.weight)
        assert "decoder_pred.weight" in handover.dropped

    def test_their_hash_is_that_of_a_line_for_each(self, sharded):
        lines = [f"{sha256(p)}  {p.name}\n" for p in sorted(sharded.glob("model-*.safetensors"))]
        assert open_release(sharded).sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
        assert open_release(sharded.parent / "whole").sha256 == sha256(sharded.parent / "whole" / "model.safetensors")

    def test_a_tensor_that_is_larger_than_a_file_may_be_has_one_for_itself(self, sharded):
        export.export(sharded.parent / "run", sharded.parent / "tiny", max_shard=1)
        release = open_release(sharded.parent / "tiny")
        assert len(list(release.folder.glob("model-*.safetensors"))) == len(read_weights(release))

    def test_an_index_that_points_elsewhere_or_is_none_is_refused(self, sharded):
        names = ("../whole/model.safetensors", "/etc/x.safetensors", "config.json", "", 3, None, ["a.safetensors"])
        for places in (*({"a": name} for name in names), {}, [], None, "a"):
            (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
            with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
                read_weights(open_release(sharded))
            with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
                _ = open_release(sharded).sha256

    def test_a_file_that_is_missing_cut_or_another_is_named(self, sharded):
        first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
        kept = first.read_bytes()
        shutil.copy(second, first)
        with pytest.raises(CheckpointError, match=f"{first.name} has no "):
            read_weights(open_release(sharded))
        first.write_bytes(kept[:-1])
        with pytest.raises(CheckpointError, match=first.name):
            read_weights(open_release(sharded))
        first.unlink()
        with pytest.raises(CheckpointError, match=first.name):
            read_weights(open_release(sharded))
        with pytest.raises(CheckpointError, match=f"{first.name} is missing"):
            _ = open_release(sharded).sha256

    def test_sizes_are_read_as_people_write_them(self):
        assert [parse_size(t) for t in ("5GB", "1.5 mb", "2KiB", "17")] == [5 * 10**9, 1_500_000, 2048, 17]
        for text in ("", "5 apples", "-1GB", "0", "GB"):
            with pytest.raises(ConfigError, match="is not a size"):
                parse_size(text)


class TestForms:
    def test_bfloat16_is_the_nearest_value_in_half_the_bytes_and_can_be_used(self, tmp_path):
        objective = write_run(tmp_path / "run")
        export.export(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
        got = load_file(tmp_path / "out" / "model.safetensors")
        assert same(got, {n: p.bfloat16() for n, p in released(objective, "mae").items()})
        assert load_image_tower(open_release(tmp_path / "out")).cls_token.dtype == torch.float32
        assert "bfloat16" in (tmp_path / "out" / "README.md").read_text()

    def test_the_mean_stands_beside_the_weights_or_in_their_place(self, tmp_path):
        objective = write_run(tmp_path / "run", ema=True)
        weights = released(objective, "mae")
        mean = {n: p if "pos_embed" in n else p + 1 for n, p in weights.items()}
        export.export(tmp_path / "run", tmp_path / "out", max_shard=40_000)
        release = open_release(tmp_path / "out")
        assert release.ema is not None and release.ema.sha256 != release.sha256
        assert same(read_weights(release), weights) and same(read_weights(release.ema), mean)
        named = open_release(tmp_path / "out" / "ema.safetensors.index.json")
        assert same(load_image_tower(named).state_dict(), load_image_tower(release.ema).state_dict())
        export.export(tmp_path / "run", tmp_path / "alone", ema=True)
        alone = open_release(tmp_path / "alone")
        assert same(read_weights(alone), mean) and alone.ema is None and alone.config["weights"] == "ema"

    def test_a_run_without_a_mean_has_none_to_give(self, tmp_path):
        write_run(tmp_path / "run")
        with pytest.raises(ConfigError, match=r"holds no mean of the weights; the run had optim\.ema=0"):
            export.export(tmp_path / "run", tmp_path / "out", ema=True)
        export.export(tmp_path / "run", tmp_path / "out")
        assert open_release(tmp_path / "out").ema is None
        with pytest.raises(CheckpointError, match=r"looked for ema\.safetensors"):
            open_release(tmp_path / "out" / "ema.safetensors")


class TestRefusals:
    def test_what_is_there_stays_unless_it_is_a_release_and_said(self, tmp_path, capsys):
        write_run(tmp_path / "run")
        command = ["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
        assert main(command) == 0
        before = sha256(tmp_path / "out" / "model.safetensors")
        assert main(command) == 2 and "add --overwrite to replace it" in capsys.readouterr().err
        assert main([*command, "--overwrite", "--dtype", "bfloat16"]) == 0
        assert sha256(tmp_path / "out" / "model.safetensors") != before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]
        other = ["--output", str(tmp_path / "run" / "checkpoints"), "--overwrite"]
        assert main([*command[:2], *other]) == 2
        assert "is no release, so --overwrite does not delete it" in capsys.readouterr().err

    def test_a_full_disk_leaves_the_old_release_and_nothing_of_the_new(self, tmp_path):
        write_run(tmp_path / "run")
        export.export(tmp_path / "run", tmp_path / "out")
        before = sha256(tmp_path / "out" / "model.safetensors")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # half of the file that is to be written
        try:
            with pytest.raises(CheckpointError, match=r"out could not be written: .*File too large; nothing of it is"):
                export.export(tmp_path / "run", tmp_path / "out", overwrite=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sha256(tmp_path / "out" / "model.safetensors") == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]

    def test_wrong_words_and_wrong_folders(self, tmp_path):
        with pytest.raises(ConfigError, match="--dtype float16 is not known; did you mean bfloat16"):
            export.export(tmp_path, tmp_path / "out", dtype="float16")
        with pytest.raises(CheckpointError, match=r"is no run with checkpoints: looked for config\.json"):
            export.export(tmp_path, tmp_path / "out")

    def test_a_damaged_checkpoint_is_named_and_one_of_another_model_too(self, tmp_path):
        write_run(tmp_path / "run")
        folder = tmp_path / "run" / "checkpoints" / "step_0000007"
        record = json.loads((tmp_path / "run" / "config.json").read_text())
        write_json(tmp_path / "run" / "config.json", config_with(record, "decoder", width=16))
        with pytest.raises(CheckpointError, match=r"elements of .*: they are not of one run"):
            export.export(tmp_path / "run", tmp_path / "out")
        (folder / "rank_00001.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"--checkpoint .*rank_00001.*use --checkpoint latest"):
            export.export(tmp_path / "run", tmp_path / "out", which=str(folder))


def test_a_release_that_cannot_be_written_says_that_the_checkpoints_are_whole(tmp_path, monkeypatch):
    run = tmp_path / "run"
    objective = write_run(run)
    record, cfg, stage = export.read_run(run)
    export.publish(objective, stage, cfg, None, run, record, 7)
    assert same(load_file(run / "release" / "model.safetensors"), released(objective, "mae"))
    shutil.rmtree(run / "release")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_release", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*go on with --resume auto"):
        export.publish(objective, stage, cfg, None, run, record, 7)
    assert not (run / "release").exists()


def config_with(record: dict[str, Any], group: str, **values: object) -> dict[str, Any]:
    return record | {group: record[group] | values}


def test_no_more_than_one_value_is_alive_at_a_time(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    real, alive, most = export.Source.value, set(), []

    def value(self: export.Source, name: str, shape: torch.Size, ema: bool) -> Tensor:
        most.append(len(alive))  # of those that were made before
        made = real(self, name, shape, ema)
        alive.add(id(made))
        weakref.finalize(made, alive.discard, id(made))
        return made

    monkeypatch.setattr(export.Source, "value", value)
    export.export(tmp_path / "run", tmp_path / "out", max_shard=40_000)
    assert len(most) > 40 and max(most) <= 1  # the one that was just written


def test_a_file_that_lies_about_itself_is_refused(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4)}
    save_file(tensors, tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]

    def read(entries: Any, behind: bytes = values, size: int | None = None) -> dict[str, Tensor]:
        text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        path = tmp_path / "bad"
        path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + behind)
        with TensorFile(path) as file:
            return {name: file.read(name) for name in file.keys()}  # noqa: SIM118 - not a dict

    assert same(read(header), tensors)
    entry = header["a"]
    lies: list[Any] = [
        b"", b"[]", b"{", b"\xff", b"[" * 50_000, {"a": 1}, {"a": {}}, *(header | {"a": entry | change} for change in (
            {"dtype": "F99"}, {"shape": [2, 4]}, {"shape": [-2, -3]}, {"shape": ["2", 3]}, {"shape": [2.0, 3]},
            {"data_offsets": [0, 10**12]}, {"data_offsets": [-8, 16]}, {"data_offsets": [24, 0]}, {"data_offsets": [0]},
        )),
    ]  # fmt: skip
    for lie in lies:
        with pytest.raises(ValueError, match=r"its header (cannot be used|does not fit)|its size is not"):
            read(lie)
    for size in (0, len(data) * 2, 2**63):
        with pytest.raises(ValueError, match="header does not fit"):
            read(header, size=size)
    for behind in (values[:-1], values + b"x"):
        with pytest.raises(ValueError, match=r"its size is not|outside"):
            read(header, behind)


LIMITED = """
import re, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from maws.export import export
used = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[3]),) * 2)
export(Path(sys.argv[1]), Path(sys.argv[2]), max_shard=100_000_000)
"""


@pytest.mark.slow  # writes a gigabyte
@pytest.mark.timeout(900)
def test_a_vit_b_of_447_megabytes_is_exported_in_64_megabytes_of_memory(tmp_path):
    objective = write_run(tmp_path / "run", ranks=4, preset="vit_b16", moments=False)
    assert sum(p.numel() for p in objective.parameters()) * 4 > 440e6

    def exported(folder: Path, memory: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, str(tmp_path / "run"), str(folder), str(memory)]
        one = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=one)

    done = exported(tmp_path / "out", 64 << 20)
    assert done.returncode == 0, done.stderr
    assert same(read_weights(open_release(tmp_path / "out")), released(objective, "mae"))
    assert exported(tmp_path / "none", 4 << 20).returncode  # less than the largest tensor: the limit is a real one
