"""The files of ds_configs/ and how they are merged: what DeepSpeed accepts, and what we refuse before it is asked."""

import json
import re

import pytest

from maws import compiling, ds_config, stages
from maws.config import ConfigError, Duration, EngineConfig, OptimConfig
from maws.ds_config import DS_CONFIGS
from maws.models.vit import VARIANTS
from maws.stages import shape_of

FILES = sorted(p.stem for p in DS_CONFIGS.glob("*.json"))
OPTIM = OptimConfig(batch_size=8, lr=1.0, clip=0.5, length=Duration(1, "steps"))


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """What the files take from the environment."""
    monkeypatch.setenv("MAWS_NVME_PATH", str(tmp_path))
    monkeypatch.setenv("LOCAL_SIZE", "2")


def read(name: str, device: str = "cuda") -> dict:
    return ds_config.ds_config(EngineConfig(ds_config=name), device)


@pytest.mark.parametrize("name", FILES)
def test_deepspeed_accepts_every_file_merged_with_our_settings(name):
    """Its own parser: a key it rejects or has removed raises there."""
    from maws.engine import deepspeed

    for precision in ("fp32", "bf16"):
        config = ds_config.merged(read(name), OPTIM, precision, micro=4, accumulate=2)
        parsed = deepspeed.runtime.config.DeepSpeedConfig(config)
        assert parsed.zero_config.stage == 3
        assert parsed.zero_config.reduce_bucket_size == config["zero_optimization"]["reduce_bucket_size"]
        assert parsed.bfloat16_config.enabled == (precision == "bf16")
        assert (parsed.gradient_clipping, parsed.gradient_accumulation_steps) == (0.5, 2)
        assert parsed.train_micro_batch_size_per_gpu == 4


def test_our_list_of_keys_is_deepspeeds():
    from maws.engine import deepspeed

    zero, offload = deepspeed.runtime.zero.config, deepspeed.runtime.zero.offload_config
    for model, known in (
        (zero.DeepSpeedZeroConfig, ds_config.ZERO),
        (offload.DeepSpeedZeroOffloadParamConfig, ds_config.OFFLOAD_PARAM),
        (offload.DeepSpeedZeroOffloadOptimizerConfig, ds_config.OFFLOAD_OPTIMIZER),
    ):
        fields = {
            f.alias or n for n, f in model.model_fields.items() if not (f.json_schema_extra or {}).get("deprecated")
        }
        assert fields == set(known)


def test_every_file_and_every_key_in_them_has_a_line_in_the_readme():
    text = (DS_CONFIGS / "README.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`([\w.]+)`", " ".join(rows)))
    for path in DS_CONFIGS.glob("*.json"):
        keys = {key for _, key, value in ds_config._walk(json.loads(path.read_text()))}
        assert {path.name} | keys <= named, f"{path.name}: {sorted(keys - named)}"


@pytest.mark.parametrize(("name", "variant"), [("zero3_2b", "vit_2b14"), ("zero3_6.5b", "vit_6.5b14")])
def test_buckets_of_large_towers_follow_the_width(name, variant):
    """width^2 to reduce, 10 width stay whole (transformers' rule), and one block, which is gathered whole, ahead."""
    zero, w = read(name)["zero_optimization"], VARIANTS[variant].width
    assert zero["reduce_bucket_size"] == w**2
    assert zero["stage3_param_persistence_threshold"] == 10 * w
    block = 12 * w**2 + 13 * w  # its matrices; biases and norms
    assert block <= zero["stage3_prefetch_bucket_size"] < 1.1 * block


@pytest.mark.parametrize(
    ("variant", "device", "want"),
    [("atto", "cpu", "zero3_cpu"), ("vit_6.5b14", "cpu", "zero3_cpu"), ("vit_b16", "cuda", "zero3"),
     ("vit_h14", "cuda", "zero3"), ("vit_2b14", "cuda", "zero3_2b"), ("vit_6.5b14", "cuda", "zero3_6.5b")],
)  # fmt: skip
def test_auto_chooses_by_device_and_width_and_says_why(variant, device, want):
    name, why = ds_config.chosen("auto", device, VARIANTS[variant].width)
    assert name == want and why.startswith("auto: ")
    assert (
        ds_config.chosen("auto", "cpu", ranks=1)[0] == "zero3_cpu_alone" != ds_config.chosen("auto", "cpu", ranks=2)[0]
    )
    assert ds_config.chosen("zero3_hpz", device, 5000) == ("zero3_hpz", "as asked")


REFUSED = [  # (zero_optimization besides the stage, what stands beside it, words of the refusal)
    ({}, {"gradient_clipping": 1.0}, r"sets gradient_clipping, which is ours: remove it there and set optim\.clip"),
    ({}, {"train_batch_size": 8}, r"train_batch_size, .* set optim\.batch_size"),
    ({}, {"optimizer": {"type": "AdamW"}}, r"sets optimizer, .* set optim\.lr"),
    ({}, {"scheduler": {"type": "WarmupLR"}}, r"sets scheduler, .* set optim\.schedule"),
    ({}, {"bf16": {"enabled": True}}, r"sets bf16, .* set engine\.precision"),
    ({}, {"torch_autocast": {"enabled": True}}, r"sets torch_autocast, .* set engine\.precision"),
    ({}, {"activation_checkpointing": {}}, r"set model\.checkpoint_blocks"),
    ({"gradient_clipping": 1.0}, {}, r"sets zero_optimization\.gradient_clipping, which is ours"),
    ({"leaf_module": {"optimizer": 1}}, {}, r"sets zero_optimization\.leaf_module\.optimizer, which is ours"),
    ({"overlap_com": True}, {}, r"does not know; did you mean overlap_comm\?"),
    ({"offload_param": {"devise": "cpu"}}, {}, r"offload_param\.devise, .* did you mean device\?"),
    ({}, {"zero_optimisation": {}}, r"does not know; did you mean zero_optimization\?"),
    ({"mics_shard_size": 8}, {}, r"has removed; use zero_hpz_partition_size"),
    ({"stage": 2}, {}, r"has ZeRO stage 2; checkpoints and export are written for stage 3"),
    ({"stage": None}, {}, r"has ZeRO stage None"),
    ({}, {"zero_optimization": True}, r"has ZeRO stage None"),
    ({"sub_group_size": "$NOT_THERE"}, {}, r"takes sub_group_size from the environment: .* export NOT_THERE=8"),
    ({"offload_param": {"device": "nvme", "nvme_path": "/nowhere"}}, {}, r"in /nowhere, which is not a folder"),
    ({"offload_param": {"device": "nvme"}}, {}, r"on NVMe in no folder \(nvme_path\)"),
    ({"zero_quantized_gradients": True}, {}, r"for CUDA only; use zero3_hpz"),
]


@pytest.mark.parametrize(("zero", "beside", "words"), REFUSED)
def test_a_file_that_doubles_a_setting_or_cannot_be_meant_is_refused(zero, beside, words, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3} | zero} | beside))
    with pytest.raises(ConfigError, match=words):
        read(str(path), "cpu")


def test_the_nvme_file_says_which_path_it_needs(monkeypatch):
    monkeypatch.delenv("MAWS_NVME_PATH")
    with pytest.raises(
        ConfigError, match=r"takes nvme_path from the environment: .* export MAWS_NVME_PATH=/local/nvme"
    ):
        read("zero3_nvme")


def test_what_deepspeed_would_refuse_is_one_line_before_anything_is_built():
    from maws.engine import _understood

    def refused(name: str, change: dict, world: int = 2) -> None:
        config = read(name)
        config["zero_optimization"] |= change
        _understood(config, name, world)

    with pytest.raises(ConfigError, match=r"ds_config=zero3: DeepSpeed refuses it: .*reduce_bucket_size"):
        refused("zero3", {"reduce_bucket_size": -1})
    with pytest.raises(ConfigError, match=r"zero_hpz_partition_size=2 must divide the 3 ranks"):
        refused("zero3_hpz", {}, world=3)
    refused("zero3_hpz", {}, world=4)


def test_the_6_5b_preset_is_float32_and_its_alternative_has_float32_where_it_matters():
    paper, other = (stages.preset("mae", f"vit_6.5b14{end}") for end in ("", "_bf16"))
    assert (paper.engine.precision, paper.model.fp32_attention) == ("fp32", False)
    assert (other.engine.precision, other.model.fp32_attention) == ("bf16", True)
    assert other.optim == paper.optim
    assert ds_config.chosen("auto", "cuda", shape_of(other.model).width)[0] == "zero3_6.5b"


def test_compiling_is_refused_where_there_is_no_compiler(monkeypatch):
    compiling.check("none", "cpu")
    with pytest.raises(ConfigError, match=r"engine\.compile=block is not known; did you mean blocks\?"):
        compiling.check("block", "cpu")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"needs a compiler \(g\+\+ or clang\+\+\) and there is none; install one"):
        compiling.check("blocks", "cpu")
    monkeypatch.setenv("CC", "/usr/bin/missing")
    with pytest.raises(ConfigError, match=r"needs a compiler \(/usr/bin/missing\)"):
        compiling.check("blocks", "cuda")
