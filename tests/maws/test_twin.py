"""The twin of a training is the same training: what is shrunk is said, all else stays, and real ones hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.shardset import ShardSet
from maws import stages, twin
from maws.config import ConfigError, override
from maws.data.loader import make_order
from maws.ds_config import ds_config
from maws.plan_memory import filled
from maws.rehearsal import on_meta
from maws.train import parse
from maws.twin_config import RANKS, donor, settings, shrink, shrink_ds_config
from maws.twin_data import make_shards

PRESETS = [(stage, name) for stage in stages.names() for name in stages.load(stage).PRESETS]
FEW = [
    ("mae", "vit_6.5b14"),
    ("mae", "long_b16_448_ld196"),
    ("lc_mae", "lc_simmim"),
    ("wsp", "vit_2b14"),
    ("lit", "vit_b16"),
]

NO_SHARDS: Any = None


def build(stage: str, cfg: Any) -> int:
    objective = on_meta(lambda: stages.load(stage).objective(filled(cfg)[0], NO_SHARDS), torch.float32)
    return sum(p.numel() for p in objective.parameters())


@pytest.mark.parametrize(("stage", "name"), FEW, ids=str)
def test_a_shrunk_training_can_be_built_and_says_what_was_changed(stage, name):
    cfg = stages.preset(stage, name)
    tiny, changed = shrink(stage, cfg)
    assert build(stage, tiny) < 1_000_000
    assert any(line.startswith("model.variant: ") and line.endswith("-> atto") for line in changed)
    for kept in ("seed", "model.class_tokens", "model.positions", "model.checkpoint_blocks", "optim.schedule"):
        assert not any(line.startswith(f"{kept}:") for line in changed)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "name"), PRESETS, ids=str)
def test_every_preset_of_every_stage_can_be_shrunk(stage, name, tmp_path):
    cfg = stages.preset(stage, name)
    tiny, _ = shrink(stage, cfg)
    assert build(stage, tiny) < 1_000_000
    shrink_ds_config(cfg, tmp_path / "ds.json")


def test_masks_decoder_accumulation_and_means_stay():
    cfg: Any = override(
        stages.preset("mae", "long_b16_448_ld196"),
        ["optim.micro_batch=32", "optim.ema=0.999", "optim.layer_decay=0.75", "model.checkpoint_blocks=every 2",
         "mask.unit=4", "optim.clip=0.5"],
    )  # fmt: skip
    found = shrink("mae", cfg)
    tiny: Any = found[0]
    assert (tiny.mask, tiny.target) == (cfg.mask, cfg.target)
    assert tiny.decoder.reduction == "conv"
    assert tiny.optim.batch_size // RANKS // tiny.optim.micro_batch == 2
    assert (tiny.optim.ema, tiny.optim.layer_decay, tiny.optim.clip) == (0.999, 0.75, 0.5)
    assert tiny.model.checkpoint_blocks == "every 2"
    assert tiny.model.image_size // 8 % 4 == 0, "masks of 4 x 4 patches"
    assert "optim.micro_batch: 32 -> 4" in found[1]


@pytest.mark.parametrize("stage", stages.names())
def test_the_settings_of_a_twin_ask_for_exactly_it(stage):
    """The twin's ranks are ordinary calls of maws/train.py: preset and settings must give the tiny config back."""
    base = next(iter(stages.load(stage).PRESETS.values()))
    tiny, _ = shrink(stage, override(base, ["data.jitter=0.4,0.4,0.2,0.1", "data.flip=no", "optim.ema=0.5"]))
    assert override(base, settings(base, tiny)) == tiny
    arguments = parse(["--stage", stage, "--preset", "x", "--run", "r", *settings(base, tiny)])
    assert override(base, arguments.settings) == tiny


@pytest.mark.parametrize("name", ["auto", "zero3_offload", "zero3_hpz", "zero3_zeropp"])
def test_a_ds_config_keeps_its_meaning_and_loses_what_a_cpu_lacks(name, tmp_path, monkeypatch):
    cfg = override(stages.preset("mae", "vit_6.5b14"), [f"engine.ds_config={name}"])
    changed = shrink_ds_config(cfg, tmp_path / "ds.json")
    tiny = ds_config(replace(cfg.engine, ds_config=str(tmp_path / "ds.json")), "cpu")["zero_optimization"]
    assert tiny["stage"] == 3
    assert not tiny["overlap_comm"]
    assert tiny.get("offload_optimizer", {}).get("device", "none") == ("cpu" if name == "zero3_offload" else "none")
    assert tiny.get("zero_hpz_partition_size", 1) == (RANKS if name in ("zero3_hpz", "zero3_zeropp") else 1)
    assert not any("quantized" in key for key in tiny)
    assert any("overlap_comm: True -> False" in line for line in changed)


def test_a_donor_has_the_tower_that_is_asked_for():
    for stage, name in (("lit", "vit_b16"), ("lc_mae", "lc_simmim")):
        tiny, _ = shrink(stage, stages.preset(stage, name))
        of, cfg = donor(tiny)
        assert of == ("simmim" if tiny.model.positions == "relative" else "mae")
        assert stages.shape_of(cfg.model) == stages.shape_of(tiny.model)
        assert stages.image_side(cfg.model) == stages.image_side(tiny.model)


def test_the_set_made_on_the_spot_is_a_shard_set(tmp_path):
    found = ShardSet.open(make_shards(tmp_path / "shards"))
    assert list(found.verify()) == []
    cfg = stages.preset("wsp", "debug")
    order = make_order(replace(cfg.data, streams=2), found, 0, 16, labelled=True)
    assert order.samples == len(found) == 96
    assert found.record(0, 1)["caption"] == "a green square on grey"


def test_a_folder_that_no_twin_made_is_left_alone(tmp_path):
    kept = tmp_path / "mine.twin" / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("years of work")
    with pytest.raises(ConfigError, match="no twin made it"):
        twin.run("mae", "debug", stages.preset("mae", "debug"), tmp_path / "mine")
    assert kept.read_text() == "years of work"


def test_under_a_launcher_the_first_rank_alone_rehearses(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert twin.run("mae", "debug", stages.preset("mae", "debug"), tmp_path / "run") == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stage", "name", "more"),
    [
        ("mae", "vit_6.5b14", []),
        ("mae", "long_b16_448_ld196", ["optim.micro_batch=64", "optim.ema=0.99", "model.checkpoint_blocks=all"]),
        ("lc_mae", "vit_b16", []),
        ("wsp", "vit_2b14", ["engine.ds_config=zero3_offload"]),
        ("lit", "vit_b16", []),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_real_twins_hold(stage, name, more, tmp_path, caplog):
    cfg = override(stages.preset(stage, name), more)
    with caplog.at_level("INFO"):
        assert twin.run(stage, name, cfg, tmp_path / "run") == 0, caplog.text
    said = [line for line in caplog.text.splitlines() if "ok  " in line]
    for part in ("stepped and saved", "resumed to the bit", "loss fell", "released", "exported"):
        assert any(part in line for line in said)


def test_a_resume_that_is_not_to_the_bit_is_seen(tmp_path):
    """The judge is honest: a loss that differs in its last digit fails."""
    tiny, _ = shrink("mae", stages.preset("mae", "debug"))
    one = twin.Twin("mae", "debug", tiny, tmp_path, starts_from=False)
    folder = tmp_path / "run" / "checkpoints" / "step_0000008"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    write(tmp_path / "run", {9: 0.5, 10: 0.25})
    one.before = {9: {"train/loss": 0.5}, 10: {"train/loss": 0.25000000001}}
    one._ranks = lambda arguments: pytest.MonkeyPatch.context()  # type: ignore[method-assign]  # nobody trains here
    one._ended = lambda ranks: None  # type: ignore[method-assign]
    with pytest.raises(twin.Failed, match="train/loss of step 10"):
        one._resume()
    one.before[10]["train/loss"] = 0.25
    assert "2 steps are the same" in one._resume()


def write(run: Path, losses: dict[int, float]) -> None:
    lines = [json.dumps({"step": step, "train/loss": loss}) for step, loss in losses.items()]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
