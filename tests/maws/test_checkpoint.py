"""A checkpoint is read whole or refused by the name of what is wrong, on any number of ranks."""

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoints import SIZES, StateOnly, names, save_steps
from safetensors.torch import load_file, save_file

from maws import checkpoint, manifest
from maws.checkpoint import CheckpointError, RankFiles
from maws.files import sha256


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Whole checkpoints of steps 5 and 10, and what a killed save of step 15 left."""
    save_steps(tmp_path, 5, 10)
    (tmp_path / "checkpoints" / "tmp-step_0000015.0-1").mkdir()
    return tmp_path


@pytest.fixture
def newest(run: Path) -> Path:
    return run / "checkpoints" / "step_0000010"


def falls_back(run: Path) -> bool:
    return checkpoint.find(run, "auto") == run / "checkpoints" / "step_0000005"


class TestDamage:
    """A checkpoint that is not whole is named and passed over."""

    def test_the_newest_whole_one_is_taken(self, run, newest):
        assert checkpoint.find(run, "auto") == checkpoint.find(run, "latest") == newest
        assert checkpoint.find(run, str(run / "checkpoints" / "step_0000005")).name == "step_0000005"

    def test_a_higher_step_is_newer_also_with_more_digits(self, run):
        save_steps(run, 9_999_999, 10_000_000)
        assert checkpoint.find(run, "auto").name == "step_10000000"

    @pytest.mark.parametrize("name", ["rank_00000.safetensors", "state.json"])
    def test_a_flipped_bit_of_any_file_is_named_and_the_older_one_is_taken(self, run, newest, name, caplog):
        path = newest / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert falls_back(run)
        assert "checkpoint refused" in caplog.text and "falling back to an older one" in caplog.text
        assert f"{path} does not have the hash it was written with" in caplog.text
        with pytest.raises(CheckpointError, match="use --resume latest for the newest whole one"):
            checkpoint.find(run, str(newest))

    @pytest.mark.parametrize("name", ["rank_00000.safetensors", "state.json"])
    def test_a_truncated_and_a_missing_file_are_named(self, run, newest, name, caplog):
        path = newest / name
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-1])
        assert falls_back(run) and f"{path} has {size - 1} bytes, {size} were written" in caplog.text
        path.unlink()
        assert falls_back(run) and f"{path} is missing" in caplog.text

    def test_all_damaged_files_are_named_at_once(self, run, newest, caplog):
        for path in newest.iterdir():
            if path.name != manifest.NAME and path.name != "state.json":
                path.write_bytes(b"")
        (newest / "state.json").write_bytes((newest / "state.json").read_bytes().replace(b"same", b"SAME"))
        assert falls_back(run) and "rank_00000" in caplog.text and "state.json" in caplog.text

    def test_nothing_to_resume(self, tmp_path):
        assert checkpoint.find(tmp_path, "auto") is None
        with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
            checkpoint.find(tmp_path, "latest")
        with pytest.raises(CheckpointError, match="no checkpoint there"):
            checkpoint.find(tmp_path, str(tmp_path / "step_9"))

    @pytest.mark.parametrize("content", [b"", b"step_0000099\n", b"../../etc\n", bytes(range(256)) * 9])
    def test_a_latest_that_means_nothing_is_said_and_the_newest_is_taken(self, run, newest, content, caplog):
        (run / "checkpoints" / "latest").write_bytes(content)
        assert checkpoint.find(run, "latest") == newest
        assert f"{run / 'checkpoints' / 'latest'} " in caplog.text and "taking the newest whole" in caplog.text

    def test_latest_names_the_newest(self, run, caplog):
        assert (run / "checkpoints" / "latest").read_text() == "step_0000010\n"
        checkpoint.find(run, "auto")
        assert not caplog.text


def entry(path: Path, **changes: object) -> dict[str, object]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} | changes


HOSTILE = {
    "empty": b"",
    "not JSON": b"{",
    "not text": b"\xff\xfe\x00",
    "a list": b"[]",
    "a number": b"7",
    "nothing in it": b"{}",
    "files are a word": b'{"format": 1, "files": "rank_00000.safetensors"}',
    "files are words": b'{"format": 1, "files": ["state.json"]}',
    "deep": b"[" * 100_000,
    "no files": b'{"format": 1, "files": []}',
    "later format": b'{"format": 2, "files": []}',
    "format is a word": b'{"format": "one", "files": []}',
}
WRONG_ENTRIES = [
    {"name": "../step_0000005/state.json"}, {"name": "/etc/hostname"}, {"name": ".."}, {"name": ""}, {"name": "a/b"},
    {"name": "state.json\n"}, {"name": 3}, {"name": None}, {"bytes": "12"}, {"bytes": None}, {"sha256": "0"},
    {"sha256": None}, {"sha256": ["0" * 64]},
]  # fmt: skip


class TestManifest:
    """A manifest is believed only where it can be checked."""

    @pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
    def test_one_that_is_damaged_is_refused_by_name(self, run, newest, content, caplog):
        (newest / "manifest.json").write_bytes(content)
        assert falls_back(run) and str(newest / "manifest.json") in caplog.text

    @pytest.mark.parametrize("change", WRONG_ENTRIES, ids=str)
    def test_an_entry_that_points_elsewhere_or_is_none_is_refused(self, run, newest, change, caplog):
        files = [entry(newest / "state.json"), entry(newest / "rank_00000.safetensors")]
        manifest_of(newest, [*files, files[0] | change])
        assert falls_back(run) and "manifest.json cannot be used" in caplog.text

    @pytest.mark.parametrize("left_out", ["state.json", "rank_00000.safetensors"])
    def test_a_file_that_it_does_not_list_is_missed(self, run, newest, left_out, caplog):
        manifest_of(newest, [entry(p) for p in newest.iterdir() if p.name not in (left_out, "manifest.json")])
        assert falls_back(run) and f"does not list {left_out}" in caplog.text

    def test_a_rank_too_few_is_missed(self, run, newest, caplog):
        state = json.loads((newest / "state.json").read_text())
        (newest / "state.json").write_text(json.dumps(state | {"ranks": 3}))
        manifest_of(newest, [entry(p) for p in newest.iterdir() if p.name != "manifest.json"])
        assert falls_back(run)
        assert "does not list rank_00001.safetensors, rank_00002.safetensors" in caplog.text

    @pytest.mark.parametrize("ranks", [0, -1, 10**12, "2", None, 1.5])
    def test_a_number_of_ranks_that_is_none_is_refused(self, run, newest, ranks):
        state = json.loads((newest / "state.json").read_text())
        (newest / "state.json").write_text(json.dumps(state | {"ranks": ranks}))
        manifest_of(newest, [entry(p) for p in newest.iterdir() if p.name != "manifest.json"])
        with pytest.raises(CheckpointError, match="as the number of its ranks"):
            checkpoint.load(StateOnly(), newest, "same")  # type: ignore[arg-type]

    def test_a_link_in_place_of_a_file_is_refused_even_to_the_same_bytes(self, run, newest, caplog):
        path = newest / "rank_00000.safetensors"
        path.rename(run / "elsewhere")
        path.symlink_to(run / "elsewhere")
        assert falls_back(run) and f"{path} is a link" in caplog.text


def manifest_of(folder: Path, files: list[dict[str, object]]) -> None:
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


@pytest.mark.parametrize("written", [1, 2, 3, 5])
@pytest.mark.parametrize("read", [1, 2, 4])
def test_parts_written_by_any_number_of_ranks_are_cut_anew_for_any_other(written, read, tmp_path):
    values = torch.arange(1.0, 24)  # 23 elements: no number of ranks divides them
    there, here = math.ceil(23 / written), math.ceil(23 / read)
    padded = torch.cat([values, torch.full((there * written - 23,), 99.0)])
    for rank, part in enumerate(padded.split(there)):
        save_file({"weight/a": part.clone()}, tmp_path / f"rank_{rank:05}.safetensors")
    files = RankFiles(tmp_path, written)
    parts = [files.cut("weight/a", rank * here, here, 23) for rank in range(read)]
    assert torch.cat(parts).tolist() == values.tolist() + [0.0] * (here * read - 23)


def test_only_the_files_that_are_needed_are_opened(tmp_path):
    for rank in range(3):
        save_file({"weight/a": torch.full((4,), float(rank))}, tmp_path / f"rank_{rank:05}.safetensors")
    (tmp_path / "rank_00001.safetensors").unlink()
    files = RankFiles(tmp_path, 3)
    assert files.cut("weight/a", 8, 4, 12).tolist() == [2.0] * 4
    with pytest.raises(CheckpointError, match="cannot be read"):
        files.cut("weight/a", 4, 4, 12)


class TestLoad:
    def test_what_was_saved_is_given_back(self, run, newest):
        engine, fresh = save_steps(run, 11), StateOnly(seed=7)
        assert checkpoint.load(fresh, newest.parent / "step_0000011", "same") == 11  # type: ignore[arg-type]
        assert fresh.steps == 11 and engine.has(fresh.loaded)

    def test_another_order_and_other_parameters_are_refused(self, newest):
        with pytest.raises(CheckpointError, match="another sample order"):
            checkpoint.load(StateOnly(), newest, "other")  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=r"other parameters than this model: b\.bias"):
            checkpoint.load(StateOnly(sizes=SIZES | {"b.bias": (4,)}), newest, "same")  # type: ignore[arg-type]

    def test_a_mean_of_weights_cannot_begin_in_the_middle_of_a_run(self, newest):
        with_mean = StateOnly(kinds=("weight", "ema"))
        with pytest.raises(CheckpointError, match=r"had optim\.ema=0; .* Continue with optim\.ema=0"):
            checkpoint.load(with_mean, newest, "same")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("content", "message"),
        [("{}", "cannot be used"), ("[1]", "cannot be used"), ('{"format": 9}', "has format 9, this version reads")],
    )
    def test_a_state_that_is_none_is_refused(self, newest, content, message):
        (newest / "state.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(StateOnly(), newest, "same")  # type: ignore[arg-type]


class TestNames:
    def test_one_that_is_being_read_is_not_deleted(self, newest):
        with manifest.reading(newest):
            assert not manifest.delete(newest) and newest.exists()
        assert manifest.delete(newest) and not newest.exists()

    def test_a_save_killed_before_its_renaming_is_finished_and_half_of_one_is_not(self, run, newest):
        left = newest.rename(newest.with_name("tmp-step_0000010.ab-3"))
        assert falls_back(run)
        checkpoint.recover(run / "checkpoints")
        assert checkpoint.find(run, "auto") == newest and not left.exists()
        assert (run / "checkpoints" / "tmp-step_0000015.0-1").exists()

    def test_the_newest_metrics_are_kept_beside_the_weights(self, newest):
        assert checkpoint.read_state(newest)["metrics"] == {"train/loss": 0.1}
        assert set(load_file(newest / "rank_00000.safetensors")) == {*(f"weight/{n}" for n in SIZES), "buffer/counter"}
        assert names(newest.parent.parent) == ["latest", "step_0000005", "step_0000010", "tmp-step_0000015.0-1"]
