"""Real runs of maws/train.py on the debug presets: learning, resuming, stopping, refusing."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import BEFORE, CAPTIONS, ROOT, arguments, losses, metrics, run_each

from maws import checkpoint, stages
from maws.checkpoint import CheckpointError
from maws.export import export
from maws.release import load_image_tower, load_masked_autoencoder, load_tokenizer, load_two_tower, open_release
from maws.train import main

pytestmark = pytest.mark.timeout(600)  # real processes: seconds on an idle machine, minutes on a busy one

# What the mean loss of the last four of 40 steps must fall under; the first four are far above (see the test).
BOUNDS = {"mae": 0.85, "simmim": 0.9, "lc_mae": 1.35, "wsp": 2.04, "lit": 2.9, "finetune": 1.2}
# How far two ranks may be from one process: sums of floats in another order, which batch norm and Adam make larger.
TOLERANCE = {"mae": 2e-5, "simmim": 3e-4, "lc_mae": 5e-3, "wsp": 2e-5, "lit": 5e-5, "finetune": 2e-5}
LINEAGE = {"mae": ("mae",), "simmim": ("simmim",), "lc_mae": ("lc_mae",), "wsp": ("mae", "wsp"),
           "lit": ("mae", "wsp", "lit"), "finetune": ("mae", "finetune")}  # fmt: skip


def first_and_last(run: Path, n: int = 4) -> tuple[float, float]:
    values = [v for _, v in sorted(losses(run).items())]
    return sum(values[:n]) / n, sum(values[-n:]) / n


@pytest.mark.parametrize("stage", stages.names())
def test_the_debug_preset_learns_in_less_than_a_minute_and_its_release_can_be_used(stage, trained):
    first, last = first_and_last(trained[stage])
    assert last < BOUNDS[stage] < first - 0.03
    lines = metrics(trained[stage])
    assert lines[-1]["time"] - lines[0]["time"] < 60
    release = open_release(trained[stage])
    assert release.lineage == LINEAGE[stage]
    images = torch.stack([release.preprocess(picture) for picture in pictures()])
    assert load_image_tower(release).forward_features(images.float() / 255).isfinite().all()


# What two ranks make of LC-MAE, and where a run of theirs goes on, is in test_momentum.py, in fewer steps.
ON_TWO = [pytest.param(s, marks=pytest.mark.slow) if s == "lc_mae" else s for s in stages.names()]


@pytest.mark.parametrize("stage", ON_TWO)
def test_two_ranks_train_like_one_process(stage, trained, trained_on_two):
    one, two = losses(trained[stage]), losses(trained_on_two[stage])
    assert list(one) == list(two) == list(range(1, 41))
    for step in one:
        assert two[step] == pytest.approx(one[step], abs=TOLERANCE[stage]), step
    assert first_and_last(trained_on_two[stage])[1] < BOUNDS[stage]


def pictures():
    from PIL import Image

    return [Image.new("RGB", (48, 40), colour) for colour in ("red", "blue")]


def test_each_stage_starts_from_what_the_one_before_it_learned(trained):
    mae, wsp, lit = (open_release(trained[s]) for s in ("mae", "wsp", "lit"))
    assert wsp.config["train"]["init_from"] == str(trained["mae"])
    assert json.loads((trained["wsp"] / "config.json").read_text())["init_sha256"] == mae.sha256
    locked, source = load_image_tower(lit).state_dict(), load_image_tower(wsp).state_dict()
    assert all(torch.equal(locked[k], source[k]) for k in source)  # LiT never touches the image tower
    learned, origin = load_image_tower(wsp).state_dict(), load_image_tower(mae).state_dict()
    near = (learned["blocks.0.attn.qkv.weight"] - origin["blocks.0.attn.qkv.weight"]).abs().mean()
    assert 0 < near < 0.1 * origin["blocks.0.attn.qkv.weight"].abs().mean()
    assert not torch.equal(learned["pos_embed"], origin["pos_embed"])  # frozen in MAE, trained in WSP


def test_releases_hold_what_evaluation_needs(trained):
    for stage in ("mae", "lc_mae"):
        painter = load_masked_autoencoder(open_release(trained[stage]))
        filled, mask = painter.reconstruct(torch.randn(2, 3, 32, 32), seed=1)
        assert filled.shape == (2, 3, 32, 32) and mask.sum(dim=1).tolist() == [12, 12]
    lit = open_release(trained["lit"])
    ids, attention = load_tokenizer(lit)(CAPTIONS)
    assert load_two_tower(lit).encode_text(ids, attention).shape == (len(CAPTIONS), 32)
    assert (trained["wsp"] / "release" / "vocabulary.parquet").exists()
    with pytest.raises(CheckpointError, match="has no text tower"):
        load_two_tower(open_release(trained["wsp"]))
    with pytest.raises(CheckpointError, match="only those of mae and lc_mae keep a decoder"):
        load_masked_autoencoder(lit)


def test_an_mae_release_holds_the_names_of_the_mae_repository(trained):
    names = set(load_file(trained["mae"] / "release" / "model.safetensors"))
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.mlp.fc2.bias", "norm.weight", "mask_token",
            "decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight", "decoder_norm.bias",
            "decoder_pred.weight"} <= names  # fmt: skip


def test_a_run_killed_on_two_ranks_goes_on_on_one(trained, shards_path, tmp_path, start):
    run = tmp_path / "run"
    training = start(arguments("mae", run, shards_path), ranks=2)
    training.wait_for_steps(run, 22)
    training.signal(signal.SIGKILL)
    training.wait()
    assert not (run / "release").exists()
    codes, printed = start(arguments("mae", run, shards_path, "--resume", "auto")).wait()
    assert codes == [0] and "resumed from" in printed, printed
    one = losses(trained["mae"])
    assert losses(run).keys() == one.keys()
    for step, loss in losses(run).items():
        assert loss == pytest.approx(one[step], abs=TOLERANCE["mae"]), step


# test_momentum.py does the same for lc_mae, on two ranks and on one, in fewer processes.
SLOW = [
    pytest.param(stage, ranks, marks=pytest.mark.slow)
    for stage, ranks in (("wsp", 1), ("lc_mae", 2), ("simmim", 1), ("finetune", 2))
]


@pytest.mark.parametrize(("stage", "ranks"), [("mae", 2), ("lit", 1), *SLOW])
def test_a_killed_run_goes_on_as_if_it_had_never_stopped(stage, ranks, trained, trained_on_two, sets, tmp_path, start):
    straight = (trained if ranks == 1 else trained_on_two)[stage]
    source = ["--init-from", str(straight.parent / BEFORE[stage])] if BEFORE[stage] else []
    killed = tmp_path / "killed"
    training = start(arguments(stage, killed, sets[stage], *source), ranks=ranks)
    training.wait_for_steps(killed, 12)
    training.signal(signal.SIGKILL)
    training.wait()
    assert not (killed / "release").exists()
    codes, printed = start(arguments(stage, killed, sets[stage], *source, "--resume", "auto"), ranks=ranks).wait()
    assert codes == [0] * ranks and "resumed from" in printed, printed
    assert losses(killed) == losses(straight)  # to the bit
    assert [line["step"] for line in metrics(killed)] == list(range(1, 41))
    ours, theirs = (load_file(run / "release" / "model.safetensors") for run in (killed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_sigterm_on_one_rank_saves_on_all_and_exits_75(shards_path, tmp_path, start):
    run = tmp_path / "run"
    command = arguments("mae", run, shards_path, "optim.length=3000 steps", "checkpoint.every=3000 steps")
    training = start(command, ranks=2)
    training.wait_for_steps(run, 3)
    training.signal(signal.SIGTERM, rank=1)
    codes, printed = training.wait()
    assert codes == [75, 75], printed
    assert "continue with --resume auto" in printed
    saved = checkpoint.find(run, "latest")
    assert saved is not None
    assert json.loads((saved / "state.json").read_text())["step"] == metrics(run)[-1]["step"] >= 3


def test_what_a_run_refuses_and_when_it_stops(trained, shards_path, tmp_path):
    """One process for all: to start one takes longer than a run."""
    mae, broken = trained["mae"], tmp_path / "broken"
    again, other, no_tower, not_finite = run_each(
        [
            arguments("mae", mae, shards_path),
            arguments("mae", mae, shards_path, "mask.ratio=0.5"),
            arguments("lit", tmp_path / "lit", shards_path),
            arguments("mae", broken, shards_path, "optim.lr=1e30", "optim.warmup=0 steps"),
        ]
    )
    assert again[0] == 0 and "is finished" in again[1]
    assert other[0] == 2 and "holds a run with other settings (mask.ratio: 0.75 -> 0.5)" in other[1]
    assert no_tower[0] == 2 and "add --init-from RUN" in no_tower[1]
    assert not_finite[0] == 1
    assert "error: loss is" in not_finite[1] and "the sample keys are in" in not_finite[1]
    (written,) = broken.glob("not_finite_step_*_rank_0.json")
    assert len(json.loads(written.read_text())["keys"]) == 16


@pytest.mark.parametrize("stage", stages.names())
def test_an_export_of_the_last_checkpoint_is_the_release(stage, trained, trained_on_two, tmp_path):
    for number, run in enumerate(chain[stage] for chain in (trained, trained_on_two) if stage in chain):
        folder = tmp_path / str(number)
        export(run, folder)
        files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
        assert files == sorted(p.relative_to(run / "release") for p in (run / "release").rglob("*") if p.is_file())
        for file in files:
            assert (folder / file).read_bytes() == (run / "release" / file).read_bytes(), file


@pytest.mark.slow  # test_readme.py uses it too
def test_the_deepspeed_launcher_starts_two_ranks(shards_path, tmp_path, free_port):
    import subprocess
    import sys

    launcher = Path(sys.executable).parent / "deepspeed"
    run = tmp_path / "run"
    command = [
        sys.executable, str(launcher), "--num_gpus", "2", "--master_port", str(free_port),
        str(ROOT / "maws" / "train.py"), *arguments("mae", run, shards_path, "optim.length=3 steps"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "started by deepspeed: 2 rank(s) on cpu" in done.stderr
    assert (run / "release" / "model.safetensors").exists()


class TestRefusals:
    """Wrong input ends at once, with one line that says what would be right."""

    def test_unknown_preset(self, capsys, tmp_path):
        assert main(["--stage", "mae", "--preset", "vit_b6", "--run", str(tmp_path / "r")]) == 2
        assert capsys.readouterr().err == "error: stage mae has no preset 'vit_b6'; did you mean vit_b16?\n"

    def test_wrong_flag(self, capsys, tmp_path):
        with pytest.raises(SystemExit) as e:
            main(["--stage", "mae", "--preset", "debug", "--run", str(tmp_path), "--batch", "3"])
        assert e.value.code == 2 and "--batch" in capsys.readouterr().err

    def test_no_shards(self, capsys, tmp_path):
        assert main(["--stage", "mae", "--preset", "debug", "--run", str(tmp_path / "r")]) == 2
        assert "no shard set given; add data.shards=FOLDER" in capsys.readouterr().err
        assert not (tmp_path / "r").exists()

    def test_missing_shards(self, capsys, tmp_path):
        assert main(arguments("mae", tmp_path / "r", tmp_path / "nowhere")) == 1
        assert "nowhere" in capsys.readouterr().err

    def test_missing_checkpoint(self, capsys, tmp_path, shards_path):
        code = main(arguments("wsp", tmp_path / "r", shards_path, "--init-from", str(tmp_path / "no_run")))
        assert code == 1
        assert "no_run holds no trained model: looked for model.safetensors" in capsys.readouterr().err
