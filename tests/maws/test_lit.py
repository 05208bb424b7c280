"""Stage lit: presets, losses, the three ways of locking, what is stored of a locked text tower, and what it costs."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from releases import untrained
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from training import CAPTIONS, arguments, losses, metrics, run_each

from maws import manifest, optim, stages
from maws.checkpoint import CheckpointError
from maws.config import ConfigError, TrainConfig, load_json, override
from maws.data.tokenizer import MODEL_FILE, train_tokenizer
from maws.export import export
from maws.models import init
from maws.models.flops import Cost
from maws.models.text import TextShape, TextTower
from maws.models.two_tower import CLIP_VARIANTS
from maws.objectives import contrastive
from maws.plan_memory import Subject, plan_memory
from maws.rehearsal import LiveBytes, on_meta
from maws.release import describe, load_two_tower, open_release
from maws.stages import lit

NO_SHARDS: Any = None
SHAPE = TextShape(width=32, depth=1, heads=2, vocabulary=400, context=30, mlp=48, positions=34, dropout=0.1)


def tiny(*settings: str) -> Any:
    return override(stages.preset("lit", "debug"), ["text.vocabulary=300", *settings])


def objective(*settings: str) -> Any:
    made = lit.objective(tiny(*settings), NO_SHARDS)
    init.fill(made, made.init_rules(), 0)
    return made.train()


def batch(pairs: int = 4) -> Any:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 300, (pairs, 16), generator=generator)
    images = torch.randint(0, 256, (pairs, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return {"image": images, "token_ids": ids, "token_mask": torch.ones_like(ids)}


def test_the_released_pairs_are_presets_with_their_towers_and_widths():
    for name, pair in CLIP_VARIANTS.items():
        cfg: Any = stages.preset("lit", name)
        assert (cfg.model.variant, cfg.text.variant, cfg.joint_width) == pair
        assert cfg.text.pretrained.endswith("-" + pair.text.removeprefix("xlmr_"))
        assert (cfg.lock, cfg.loss, cfg.optim.batch_size) == ("image", "clip", 32768)
    assert stages.preset("lit", "vit_b16") == stages.preset("lit", "vit_b16_xlmr_b")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("loss=sigmoid", "did you mean siglip"),
        ("lock=images", "did you mean image"),
        ("chunk=-1", "chunk=-1 must be"),
        ("text.variant=xlmr", "did you mean xlmr_"),
        ("text.variant=", "text.variant is empty"),
        ("init_from=", "needs one: add --init-from"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(tmp_path, shards, setting, says):
    with pytest.raises(ConfigError, match=says):
        lit.prepare(tiny("init_from=somewhere", setting), shards, tmp_path)


@pytest.mark.parametrize("lock", lit.LOCKS)
def test_a_locked_tower_is_not_trained_stays_in_evaluation_mode_and_keeps_nothing_for_backward(lock):
    cfg = tiny(f"lock={lock}")
    made = objective(f"lock={lock}")
    groups = optim.groups(made, lit.param_rules(cfg), 1e-3, 0.1)
    trained = {id(p) for group in groups for p in group["params"]}
    towers, given = made.towers, batch()
    for name in ("image", "text"):
        tower = getattr(towers, name)
        assert all((id(p) in trained) != (name == lock) for p in tower.parameters())
        assert all(m.training != (name == lock) for m in tower.modules())
    for p in made.parameters():
        p.requires_grad_(True)  # the rules aside, nothing flows
    made(given)["loss"].backward()
    for name in ("image", "text"):
        assert all((p.grad is None) == (name == lock) for p in getattr(towers, name).parameters())
    assert towers.vision_projection.grad is not None  # MAWS trains both projections, whatever is locked
    assert towers.text_projection.grad is not None


@pytest.mark.parametrize("lock", lit.LOCKS)
def test_no_row_of_the_printed_table_says_that_a_locked_tower_is_trained(lock):
    rows = optim.table(objective(f"lock={lock}"), lit.param_rules(tiny(f"lock={lock}")))
    patterns = [row[0] for row in rows]
    assert len(patterns) == len(set(patterns))


def test_dropout_of_a_locked_text_tower_is_off_in_training():
    made = objective("lock=text")
    for module in made.towers.text.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    given = batch()
    first, second = (made.towers.encode_text(given["token_ids"], given["token_mask"]) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(("loss", "scale"), [("clip", 1 / 0.07), ("siglip", 10.0)])
def test_each_loss_starts_at_its_own_temperature_and_bias_without_decay(loss, scale):
    made = objective(f"loss={loss}")
    assert made.towers.logit_scale.item() == pytest.approx(math.log(scale))
    names = {"logit_scale", "logit_bias"} & {n.rpartition(".")[2] for n, _ in made.named_parameters()}
    assert names == ({"logit_scale", "logit_bias"} if loss == "siglip" else {"logit_scale"})
    if loss == "siglip":
        assert made.towers.logit_bias.item() == -10.0
    for name in names:
        assert optim.treat(f"towers.{name}", lit.param_rules(tiny())) == optim.NO_DECAY


# --------------------------------------------------------------------------------------------- a pretrained text tower


def pretrained(folder: Path, seed: int = 0) -> Path:
    """A small text tower and its tokenizer as a folder of transformers."""
    tower = TextTower(SHAPE)
    init.fill(tower, tower.init_rules(), seed)
    train_tokenizer(CAPTIONS * 4, 300, SHAPE.context).save(folder)
    tower.encoder.config.save_pretrained(folder)
    save_file(tower.encoder.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards_path) -> dict[str, Any]:
    """lock=text from scratch against a pretrained text tower by SigLIP's loss; lock=none; as they ended."""
    root = tmp_path_factory.mktemp("locks")
    text, image = pretrained(root / "xlmr"), untrained(root / "image", seed=1)
    settings = ["text.variant=", f"text.pretrained={text}", "optim.length=12 steps", "checkpoint.every=4 steps"]
    commands = {
        "text": arguments("lit", root / "text", shards_path, *settings, "lock=text", "loss=siglip"),
        "none": arguments("lit", root / "none", shards_path, *settings, "lock=none", "--init-from", str(image)),
    }
    found = run_each(list(commands.values()))
    assert [code for code, _ in found] == [0, 0], found
    return {"root": root, "pretrained": text, "commands": commands, "printed": [said for _, said in found]}


def tensors(file: Path) -> dict[str, Tensor]:
    return load_file(file)


def test_a_locked_text_tower_is_in_no_checkpoint_and_whole_in_the_release(runs):
    run, text = runs["root"] / "text", tensors(runs["pretrained"] / "model.safetensors")
    kept = [name for path in (run / "checkpoints").glob("*/*.safetensors") for name in load_file(path)]
    assert any("towers.image" in name for name in kept)
    assert not any("towers.text." in name for name in kept)
    release = open_release(run)
    there = tensors(release.weights)
    assert {n for n in there if n.startswith("text.")} == {f"text.encoder.{n}" for n in text}
    for name, value in text.items():
        assert_close(there[f"text.encoder.{name}"], value, rtol=0, atol=0)
    assert load_json(run / "config.json")["text_sha256"]


def test_an_unlocked_text_tower_starts_from_the_pretrained_weights_and_is_trained(runs):
    there, text = (
        tensors(open_release(runs["root"] / "none").weights),
        tensors(runs["pretrained"] / "model.safetensors"),
    )
    assert there["text.encoder.embeddings.LayerNorm.weight"].sub(text["embeddings.LayerNorm.weight"]).abs().max() > 0
    for name, value in text.items():  # of the shape that the folder says, and still near
        assert (there[f"text.encoder.{name}"] - value).abs().max() < 0.2


def test_a_siglip_release_is_loaded_with_its_bias_and_scores_as_in_training(runs):
    release = open_release(runs["root"] / "text")
    assert release.config["loss"] == "siglip"
    towers = load_two_tower(release)
    assert towers.logit_bias is not None
    last = metrics(runs["root"] / "text")[-1]
    assert towers.logit_bias.item() == pytest.approx(last["train/logit_bias"], abs=0.1)
    assert towers.logit_bias.item() != -10.0
    assert release.config["text"] == describe(SHAPE)
    found = losses(runs["root"] / "text")
    assert found[12] < found[1]
    assert towers(torch.zeros(1, 3, 32, 32), torch.tensor([[0, 5, 2]]), torch.ones(1, 3).long())[0].shape == (1, 32)


def test_resuming_or_exporting_with_another_text_tower_is_refused(runs, tmp_path):
    run, text = tmp_path / "run", runs["pretrained"]
    shutil.copytree(runs["root"] / "text", run)
    out = export(run, tmp_path / "good")
    assert open_release(out).sha256 == open_release(run).sha256
    own = text.with_name("kept")
    text.rename(own)
    try:
        pretrained(text, seed=1)
        with pytest.raises(CheckpointError, match="is not what the run locked"):
            export(run, tmp_path / "bad")
        shutil.rmtree(run / "release")
        command = [str(run) if word == str(runs["root"] / "text") else word for word in runs["commands"]["text"]]
        ((code, printed),) = run_each([[*command, "--resume", "auto"]])
        assert code == 2
        assert "text_sha256: " in printed
    finally:
        shutil.rmtree(text)
        own.rename(text)


def test_what_cleaning_changes_of_the_captions_is_in_the_log_and_beside_the_run(runs):
    found = json.loads((runs["root"] / "text" / "captions.json").read_text())
    assert found == {"captions": 120, "changed": {"hashtags": 105}}  # all of CAPTIONS but the last
    assert "cleaning 120 of them changed: hashtags 105" in runs["printed"][0]


def test_a_start_that_came_to_no_checkpoint_leaves_no_tokenizer_to_the_next(tmp_path, shards):
    """The pieces must be those of the tower, and of the captions as they are cleaned now."""
    text, run = pretrained(tmp_path / "xlmr"), tmp_path / "run"
    chosen = ["init_from=somewhere", "text.variant=", f"text.pretrained={text}", "text.vocabulary=0"]
    lit.prepare(tiny("init_from=somewhere", "text.vocabulary=0"), shards, run)
    own = (run / "tokenizer" / MODEL_FILE).read_bytes()
    lit.prepare(tiny(*chosen), shards, run)
    theirs = (text / MODEL_FILE).read_bytes()
    assert (run / "tokenizer" / MODEL_FILE).read_bytes() == theirs != own
    (run / "checkpoints" / "step_0000001").mkdir(parents=True)
    (run / "checkpoints" / "step_0000001" / manifest.NAME).touch()
    (text / MODEL_FILE).write_bytes(own)
    lit.prepare(tiny(*chosen), shards, run)  # a run that is continued keeps its own
    assert (run / "tokenizer" / MODEL_FILE).read_bytes() == theirs


# -------------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("settings", [[], ["loss=siglip"], ["data.features=cache"], ["lock=none", "chunk=2"]], ids=str)
def test_what_a_pair_costs_is_what_torch_counts(settings):
    cfg, pairs = tiny("optim.batch_size=6", *settings), 6
    made = on_meta(lambda: lit.objective(cfg, NO_SHARDS), torch.float32)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, LiveBytes():
        made(lit.example(cfg, pairs))  # type: ignore[arg-type]
    assert counter.get_total_flops() / 2 == pairs * lit.cost(cfg).forward


def test_cached_features_leave_out_the_image_tower_and_nothing_else():
    images, cached = (lit.cost(tiny(f"data.features={kind}")) for kind in ("images", "cache"))
    assert images.frozen > 0
    assert cached == Cost(images.trained)
    assert set(lit.example(tiny("data.features=cache"), 2)) == {"features", "token_ids", "token_mask"}


@pytest.mark.parametrize("loss", contrastive.LOSSES)
@pytest.mark.parametrize("ranks", [8, 64])
def test_the_planned_memory_of_a_loss_over_all_ranks_is_what_a_step_takes(monkeypatch, loss, ranks):
    cfg: TrainConfig = tiny(f"loss={loss}", "joint_width=256", "chunk=600")
    micro = 96
    planned = plan_memory("lit", cfg, ranks, micro, "cpu")
    monkeypatch.setattr(contrastive, "all_gather_with_grad", lambda x: torch.cat([x] * ranks))
    real = Subject("lit", cfg, cuda=False).memory(1, micro)
    assert planned.activations == pytest.approx(real.activations, rel=0.03)
    assert planned.activations + planned.passing == pytest.approx(real.activations + real.passing, rel=0.15)
