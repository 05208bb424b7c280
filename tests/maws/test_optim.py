"""Layer-wise learning rates against MAE's and BEiT's rule written out, for every stage that trains an image tower."""

import re

import pytest
import torch

from maws import config, optim, stages
from maws.config import ConfigError
from maws.optim import BASE, NO_DECAY, Layers

DECAY = 0.75
# What the names of each stage's image tower begin with.
TOWERS = {
    "mae": "autoencoder.", "simmim": "model.", "lc_mae": "online.encoder.", "wsp": "backbone.", "lit": "towers.image.",
}  # fmt: skip


def layer(name: str, tower: str, depth: int) -> int:
    """As `get_layer_id_for_vit` does for a plain ViT, from the words of the papers."""
    if not name.startswith(tower):
        return depth + 1
    own = name[len(tower) :]
    if own.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    return int(own.split(".")[1]) + 1 if own.startswith("blocks.") else depth + 1


def built(stage: str, *settings: str):
    """(configuration, objective on the meta device) of a debug preset."""
    module = stages.load(stage)
    sizes = {"wsp": ["synsets=7"], "lit": ["text.vocabulary=50"]}.get(stage, [])
    cfg = config.override(stages.preset(stage, "debug"), [*sizes, *settings])
    with torch.device("meta"):
        return cfg, module.objective(cfg, SHARDS)


class SHARDS:
    vocabulary = ()


def rates(stage: str, cfg: config.TrainConfig, objective: torch.nn.Module) -> dict[str, tuple[float, float]]:
    """Name -> (rate, decay) of what is trained."""
    names = {id(p): n for n, p in objective.named_parameters()}
    groups = optim.groups(objective, stages.load(stage).param_rules(cfg), 1.0, 0.05)
    assert all(g["lr"] == g["lr_scale"] for g in groups)
    return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("stage", TOWERS)
def test_every_tower_has_rates_that_fall_towards_its_input_and_keeps_its_decay(stage):
    lock = ["lock=none"] if stage == "lit" else []
    cfg, objective = built(stage, f"optim.layer_decay={DECAY}", "model.variant=vit_ti16", *lock)
    plain = rates(stage, *built(stage, "model.variant=vit_ti16", *lock))
    found = rates(stage, cfg, objective)
    assert found.keys() == plain.keys()
    for name, (rate, decay) in found.items():
        want = DECAY ** (13 - layer(name, TOWERS[stage], 12))
        if name.endswith("mask_token") and stage == "simmim":
            want = DECAY**13  # its encoder sees mask tokens
        assert rate == pytest.approx(want * plain[name][0], rel=1e-12), name
        assert decay == plain[name][1], name
    ladder = [found[f"{TOWERS[stage]}blocks.{i}.attn.qkv.weight"][0] for i in range(12)]
    assert ladder == pytest.approx([DECAY ** (12 - i) for i in range(12)])


def test_mask_tokens_that_enter_maes_encoder_are_embeddings_and_those_of_its_decoder_are_not():
    for setting, want in (("encode_mask_tokens=yes", DECAY**3), ("encode_mask_tokens=no", 1.0)):
        cfg, objective = built("mae", f"optim.layer_decay={DECAY}", setting)
        assert rates("mae", cfg, objective)["autoencoder.mask_token"][0] == pytest.approx(want)


def test_the_printed_table_has_one_row_for_a_rule_whatever_its_layers():
    cfg, objective = built("mae", f"optim.layer_decay={DECAY}", "model.variant=vit_b16")
    rules = stages.load("mae").param_rules(cfg)
    rows = optim.table(objective, rules)
    assert [pattern for pattern, *_ in rows] == [pattern for pattern, _ in rules]
    assert rows[1][1] == "decay x0, lr x0.024 to 1 in 14 layers"  # 0.75 ** 13
    frozen, *trained = (elements for *_, elements in rows)
    assert frozen + sum(trained) == sum(p.numel() for p in objective.parameters())


def test_without_decay_the_rules_are_the_stages_own():
    assert optim.layer_wise([(".*", BASE)], "x.", 3, 1.0) == [(".*", BASE)]
    rules = optim.layer_wise([("a.*", None), ("x.*", NO_DECAY), (".*", BASE)], "x.", 2, 0.5)
    assert optim.treat("a", rules) is None
    assert optim.treat("x.blocks.0.norm.bias", rules) == optim.Treatment(0.0, 0.25)
    assert Layers("x.", 2, 0.5).scale("x.decoder_blocks.0.norm.bias") == 1.0


@pytest.mark.parametrize("value", [0.0, -0.5, 1.1])
def test_an_impossible_decay_is_refused(value):
    with pytest.raises(ConfigError, match=rf"optim\.layer_decay={re.escape(str(value))} must be more than 0"):
        optim.layer_wise([(".*", BASE)], "x.", 2, value)


def test_lit_refuses_a_decay_of_the_tower_it_locks(tmp_path):
    cfg = config.override(stages.preset("lit", "debug"), ["optim.layer_decay=0.7", "init_from=somewhere"])
    with pytest.raises(ConfigError, match=r"lock=image does not train; set lock=none or lock=text"):
        stages.load("lit").prepare(cfg, SHARDS, tmp_path)  # type: ignore[arg-type]
