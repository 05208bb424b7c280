import pytest

from maws import config, ds_config, optim, schedule, stages
from maws.config import ConfigError, Duration, OptimConfig
from maws.models.vit import build_vit

DEBUG = stages.preset("mae", "debug")


def test_settings_are_typed_by_their_field():
    cfg = config.override(
        DEBUG,
        ["optim.lr=3e-4", "data.flip=no", "optim.length=2 epochs", "data.crop_scale=0.5,0.9", "decoder.width=64",
         "optim.batch_size=32", "mask.ratio=0.6"],
    )  # fmt: skip
    assert (cfg.optim.lr, cfg.data.flip, cfg.data.crop_scale) == (3e-4, False, (0.5, 0.9))
    assert (cfg.optim.length, cfg.decoder.width, cfg.mask.ratio) == (Duration(2, "epochs"), 64, 0.6)
    assert DEBUG.optim.batch_size == 16  # presets are never changed


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.lrr=1", r"unknown setting optim\.lrr; did you mean optim\.lr\?"),
        ("batch_size=4", r"unknown setting batch_size; did you mean optim\.batch_size\?"),
        ("optim.batch_size=many", r"optim\.batch_size=many is not a int"),
        ("optim.length=fortnight", "'fortnight' is not a duration; write '400 epochs', '1000 steps' or '5%'"),
        ("optim", "'optim' is not a setting; write name=value"),
        ("data.crop_scale=0.5", r"data\.crop_scale=0\.5 is not a tuple"),
        ("optim=3", "optim is a group; set one of optim.batch_size"),
    ],
)
def test_a_wrong_setting_says_what_would_be_right(setting, message):
    with pytest.raises(ConfigError, match=message):
        config.override(DEBUG, [setting])


def test_unknown_stages_and_presets_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown stage 'mea'; did you mean mae\?"):
        stages.load("mea")
    with pytest.raises(ConfigError, match=r"stage wsp has no preset 'debugg'; did you mean debug\?"):
        stages.preset("wsp", "debugg")


@pytest.mark.parametrize("stage", stages.names())
def test_every_preset_survives_json_and_every_stage_has_debug_and_the_papers(stage):
    presets = stages.load(stage).PRESETS
    assert {"vit_b16", "demo", "debug"} <= set(presets)
    for preset in presets.values():
        assert config.from_json(type(preset), config.to_json(preset)) == preset


def test_durations_become_steps():
    assert Duration.parse("5%").steps(100, total=800) == 40
    assert Duration.parse("1.5 epochs").steps(100) == 150
    assert str(Duration.parse("1,5 %".replace(",", "."))) == "1.5%"


def test_schedules_equal_their_formula():
    cosine, linear = (schedule.SCHEDULES[name](10, 110) for name in ("cosine", "linear"))
    assert [cosine(0), cosine(9), cosine(10), cosine(60)] == pytest.approx([0, 0.9, 1, 0.5])
    assert [linear(5), linear(10), linear(35), linear(110)] == pytest.approx([0.5, 1, 0.75, 0])
    assert cosine(110) == pytest.approx(0)


def test_what_has_one_axis_is_not_decayed_and_mae_positions_are_frozen(shards):
    """recipes §2.5."""
    module = stages.load("mae")
    objective = module.objective(DEBUG, shards)
    groups = optim.groups(objective, module.param_rules(DEBUG), lr=1.0, weight_decay=0.05)
    names = {id(p): n for n, p in objective.named_parameters()}
    undecayed = {names[id(p)] for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    want = {n for n, p in objective.named_parameters() if p.ndim == 1}
    assert undecayed == want
    assert not any(p.requires_grad for n, p in objective.named_parameters() if "pos_embed" in n)


def test_a_parameter_no_rule_matches_is_an_error():
    with pytest.raises(KeyError, match="no parameter rule matches cls_token"):
        optim.groups(build_vit("atto"), [(r"blocks.*", optim.BASE)], 1.0, 0.0)


@pytest.mark.parametrize(
    ("batch", "micro", "world", "want"),
    [(64, 0, 2, (32, 1)), (64, 8, 2, (8, 4)), (64, 64, 1, (64, 1))],
)
def test_batch_arithmetic(batch, micro, world, want):
    cfg = OptimConfig(batch_size=batch, micro_batch=micro, lr=1, length=Duration(1, "steps"))
    assert ds_config.accumulation(cfg, world) == want


def test_a_batch_that_does_not_divide_says_which_would():
    cfg = OptimConfig(batch_size=60, micro_batch=8, lr=1, length=Duration(1, "steps"))
    with pytest.raises(ConfigError, match=r"must be a multiple of 16 \(2 ranks x optim.micro_batch=8\); try 64"):
        ds_config.accumulation(cfg, 2)
