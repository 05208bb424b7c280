"""`python -m maws plan` against what real engines hold, what real backward passes keep, and its own answers."""

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maws import devices, stages
from maws.__main__ import main, parser
from maws.config import ConfigError, TrainConfig, override
from maws.models import init
from maws.optim import groups, treat
from maws.plan_memory import Subject, Zero, plan_memory
from maws.planning import measured, plan
from maws.rehearsal import LiveBytes, on_meta, rehearse
from maws.weight_files import parse_size

STATES = ("weights", "gradients", "master", "moments", "target", "frozen")
TINY = {
    "mae": [], "lc_mae": [], "simmim": [], "wsp": ["synsets=300", "chunk=300"],
    "lit": ["text.vocabulary=300", "optim.batch_size=6"], "finetune": ["classes=7"],
}  # fmt: skip


NO_SHARDS: Any = None


def tiny(stage: str, *settings: str) -> TrainConfig:
    return override(stages.preset(stage, "debug"), [*TINY[stage], *settings])


def options(*arguments: str) -> argparse.Namespace:
    return parser().parse_args(["plan", *arguments])


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("mae", []),
        ("mae", ["decoder.reduction=conv"]),
        ("mae", ["encode_mask_tokens=yes", "mask.ratio=0.5", "target.kind=hog"]),
        ("mae", ["mask.kind=unit", "mask.unit=2", "mask.whole_units=yes", "mask.ratio=0.6"]),
        ("simmim", []),
        ("wsp", ["mask_ratio=0.5"]),
        ("wsp", ["head=linear"]),
        ("lc_mae", []),
        ("lc_mae", ["guidance.symmetric=no", "guidance.target_mask_ratio=0.5", "guidance.predictor_depth=3"]),
        ("lc_mae", ["guidance.guided=all", "guidance.level=both"]),
        ("lc_mae", ["mim=simmim", "model.positions=relative"]),
        ("lc_mae", ["guidance.loss=none"]),
        ("lit", []),
        ("lit", ["lock=text"]),
        ("finetune", []),
        ("finetune", ["trainable=half", "model.pool=mean_norm"]),
    ],
    ids=lambda v: v if isinstance(v, str) else ",".join(v) or "plain",
)
def test_every_stage_says_what_a_sample_costs_and_torch_counts_the_same(stage, settings):
    module, cfg, images = stages.load(stage), tiny(stage, *settings), 6
    objective = on_meta(lambda: module.objective(cfg, NO_SHARDS), torch.float32)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, LiveBytes():
        objective(module.example(cfg, images))
    assert counter.get_total_flops() / 2 == images * module.cost(cfg).forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("mae", []),
        ("mae", ["model.checkpoint_blocks=all"]),
        ("mae", ["model.checkpoint_blocks=every 2"]),
        ("wsp", []),
        ("wsp", ["mixup=0.2", "model.checkpoint_blocks=first 1"]),
        ("simmim", ["model.positions=sincos"]),  # torch has no fused kernel for a trained bias on a CPU
        ("lc_mae", []),
        ("finetune", ["trainable=last 2", "augment.mixup=0"]),
    ],
    ids=lambda v: v if isinstance(v, str) else ",".join(v) or "plain",
)
def test_the_bytes_kept_for_backward_are_those_that_a_real_pass_keeps(stage, settings, dtype):
    cfg, images = tiny(stage, "model.variant=nano", *settings), 12
    module = stages.load(stage)
    real = build(stage, cfg, dtype)
    bare = frozen(stage, cfg, on_meta(lambda: module.objective(cfg, NO_SHARDS), dtype))
    planned = rehearse(bare, module.example(cfg, images)).saved
    assert kept_bytes(real, batch(stage, cfg, images)) == pytest.approx(planned, rel=0.03)


def build(stage: str, cfg: TrainConfig, dtype: torch.dtype) -> nn.Module:
    objective: Any = stages.load(stage).objective(cfg, NO_SHARDS)
    init.fill(objective, objective.init_rules(), 0)
    for param in objective.parameters():
        param.data = param.data.to(dtype)
    return frozen(stage, cfg, objective).train()


def frozen(stage: str, cfg: TrainConfig, objective: nn.Module) -> nn.Module:
    """With what the stage's rules freeze."""
    rules = stages.load(stage).param_rules(cfg)
    for name, param in objective.named_parameters():
        param.requires_grad_(treat(name, rules) is not None)
    return objective


def batch(stage: str, cfg: TrainConfig, images: int) -> dict[str, Tensor]:
    """The batch that `example` describes, with values that an objective can take."""
    out = {}
    for name, shape in stages.load(stage).example(cfg, images).items():
        if name.startswith("ids_"):
            out[name] = torch.rand(shape.shape).argsort(dim=1)
        elif shape.is_floating_point():
            out[name] = torch.full(shape.shape, 0.5)
        else:
            out[name] = torch.randint(0, 3, shape.shape).to(shape.dtype)
    return out


def kept_bytes(objective: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes of what autograd saves, each storage once, without parameters and the batch."""
    known = {t.untyped_storage().data_ptr() for t in [*objective.parameters(), *objective.buffers(), *inputs.values()]}
    found, held = {}, []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # or its address is given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = objective(inputs)["loss"]
    assert loss.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("ranks", [1, 2])
def test_states_are_those_that_a_real_engine_holds(tmp_path, ranks):
    """One 2-rank group and one of a single rank: mae in fp32 and bf16, lc_mae with its target in bf16."""
    cases = [("mae", "fp32"), ("mae", "bf16"), ("lc_mae", "bf16")]
    held = run_ranks("test_planning", "hold", tmp_path, ranks=ranks, cases=cases)
    for (stage, precision), *by_rank in zip(cases, *held, strict=True):
        cfg = tiny(stage, "model.variant=nano", f"engine.precision={precision}")
        planned = plan_memory(stage, cfg, ranks, 16 // ranks, "cpu")
        for found in by_rank:
            for kind in STATES:
                assert found[kind] == pytest.approx(getattr(planned, kind), rel=0.02, abs=64), (stage, precision, kind)
            passing = planned.activations + planned.passing
            least, most = max(passing, planned.step), max(passing + planned.whole, planned.step) + planned.buckets
            assert 0.98 * least <= found["most in a step"] <= most, (stage, precision, planned)
            if ranks == 1:  # nothing is made whole: to the byte, but for what is too small to be asked for
                assert found["most in a step"] == pytest.approx(least, rel=0.02)


def hold(cases: list[list[str]]) -> list[dict[str, int]]:
    """Bytes of every kind that DeepSpeed's engine has after a step; runs on the ranks."""
    from maws import optim
    from maws.engine import MOMENTS, Runtime

    found = []
    for stage, precision in cases:
        cfg = tiny(stage, "model.variant=nano", f"engine.precision={precision}")
        runtime, module = Runtime(cfg.engine, cfg.optim), stages.load(stage)
        with runtime.partitioned():
            objective: Any = module.objective(cfg, NO_SHARDS)
        init.fill(objective, objective.init_rules(), 0, runtime.gather)
        rules = module.param_rules(cfg)
        engine = runtime.build(objective, optim.groups(objective, rules, 1e-4, 0.05), cfg.optim)
        images = batch(stage, cfg, runtime.micro)
        engine.step(images)  # type: ignore[arg-type]
        gc.collect()
        there = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
        with LiveBytes(there) as live:
            engine.step(images)  # type: ignore[arg-type]
        zero = engine._engine.optimizer
        params: list[Any] = list(objective.parameters())
        nbytes = lambda tensors: sum(  # noqa: E731
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
        )
        weights = nbytes(p.ds_tensor for p in params if p.requires_grad)
        masters = zero.fp32_partitioned_groups_flat
        found.append(
            {
                "weights": weights,
                "frozen": nbytes(p.ds_tensor for p in params if not p.requires_grad),
                "gradients": zero.grad_partitions_flat_buffer.untyped_storage().nbytes(),
                "master": nbytes(masters) if precision == "bf16" else nbytes(masters) - weights,
                "moments": nbytes(zero.optimizer.state[m][k] for m in masters for k in MOMENTS),
                "target": nbytes(engine.target.means.values()),
                "most in a step": live.peak,
            }
        )
        engine.close()
    return found


def test_states_are_shared_by_the_ranks_and_activations_follow_the_micro_batch():
    subject = Subject("mae", tiny("mae", "model.variant=nano", "optim.batch_size=64"))
    alone, shared = subject.memory(1, 64), subject.memory(8, 8)
    assert alone.states == pytest.approx(8 * shared.states, rel=1e-3)
    assert alone.activations == pytest.approx(8 * shared.activations, rel=1e-3)
    assert alone.whole == 0 < shared.whole
    assert alone.total == alone.allocated + alone.context


def test_recomputed_blocks_keep_less_and_cost_more():
    plain = plan(options(*VIT_B))
    again = plan(options(*VIT_B, "model.checkpoint_blocks=all"))
    assert again.memory.activations < plain.memory.activations / 4
    assert again.time["step_seconds"] == pytest.approx(plain.time["step_seconds"] * 4 / 3)
    assert again.flops["model_flops_utilisation"] == pytest.approx(0.3)


VIT_B = ("--stage", "mae", "--preset", "vit_b16", "--gpus", "8", "--gpu", "h100", "--samples", "1e6")


def test_time_data_and_checkpoints_are_sums_that_can_be_done_by_hand():
    found = plan(options(*VIT_B, "--sample-bytes", "5e4", "engine.precision=bf16"))
    seconds = 4096 / 8 * 6 * found.flops["forward_macs_per_sample"] / (0.4 * 989e12)
    assert found.time["step_seconds"] == pytest.approx(seconds)
    assert found.time["steps"] == 1_000_000 // 4096
    assert found.data["bytes_per_second"] == pytest.approx(4096 / seconds * 5e4)
    assert found.checkpoints["bytes"] == 12 * found.parameters["trained"]
    assert "assumed" in found.assumed[0]


@pytest.mark.parametrize(
    "asked",
    [
        ("--stage", "mae", "--preset", "demo", "--gpus", "2", "--memory", "2.6GB", "optim.batch_size=1024"),
        ("--stage", "wsp", "--preset", "demo", "--gpus", "1", "--memory", "2.4GB", "--micro-batch", "64"),
        ("--stage", "mae", "--preset", "debug", "--gpus", "3", "--gpu", "h100"),
    ],
    ids=["too much", "too much for two", "cannot be shared"],
)
def test_what_does_not_fit_is_refused_and_what_is_named_instead_does_fit(asked, capsys):
    assert main(["plan", *asked, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["refused"]
    assert answer["nearest"]
    for one in answer["nearest"][:2]:
        flags, own = [a for a in asked if "=" not in a], [a for a in asked if "=" in a]
        again = plan(options(*flags, "--gpus", str(one["ranks"]), *own, *one["settings"]))
        assert not again.refused, again.refused
        assert again.memory.total == one["total_bytes"] <= again.usable


def test_what_is_printed_has_no_colour_and_no_broken_columns_when_piped(capsys):
    assert main(["plan", *VIT_B]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert "fits: " in printed


def test_the_speed_of_a_run_stands_in_for_an_assumed_one(tmp_path):
    from maws.config import to_json

    cfg = tiny("mae")
    record = {"stage": "mae", "preset": "debug", **to_json(cfg), "shards_sha256": "", "versions": {}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    rates = [10.0, 10.0, 400.0, 500.0, 600.0]  # the first ones are of a machine that warms up
    lines = [json.dumps({"step": i, "train/images_per_second": rate}) for i, rate in enumerate(rates)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "train/im')
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "start", "step": 0, "ranks": 2}) + "\n")
    assert measured(tmp_path).flops == pytest.approx(6 * stages.load("mae").cost(cfg).forward * 500 / 2)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no line with train/images_per_second"):
        measured(tmp_path)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("ds_configs/*.json")), ids=lambda p: p.stem)
def test_every_ds_config_can_be_planned_with(path):
    zero = Zero.named(path.stem)
    assert zero.reduce_bucket > 0
    subject = Subject("mae", tiny("mae", f"engine.ds_config={path.stem}"))
    memory = subject.memory(4, 4)
    offloaded = memory.host + memory.disk
    assert (offloaded > 0) == (zero.optimizer != "none" or zero.params != "none")
    whole = Subject("mae", tiny("mae")).memory(4, 4)
    assert memory.states + offloaded == whole.states + memory.secondary


def test_devices_are_found_by_what_torch_calls_them():
    names = {
        "NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA A100-PCIE-40GB": "a100-40gb", "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4", "NVIDIA GH200 480GB": "gh200", "AMD Instinct MI300X": "mi300x",
    }  # fmt: skip
    found = {name: devices.recognise(name) for name in names}
    assert {name: device.name for name, device in found.items() if device} == names
    assert devices.peak_flops("NVIDIA H200", "bf16") == 989e12
    assert devices.peak_flops("Some CPU", "fp32") is None
    for device in devices.DEVICES:
        assert device.bf16 >= device.tf32 >= device.fp32
        assert device.source
    with pytest.raises(ConfigError, match="did you mean h100"):
        devices.find("h10")


@pytest.mark.parametrize(("text", "number"), [("141GB", 141e9), ("80 GiB", 80 * 2**30), ("1.5tb", 1.5e12)])
def test_sizes_are_read_as_people_write_them(text, number):
    assert parse_size(text, plain=False) == number
    with pytest.raises(ConfigError, match="is not a size"):  # 80 bytes are no GPU's memory
        parse_size("80", plain=False)


def test_gradients_of_groups_are_what_param_rules_train():
    """The planner asks the rules itself: it must freeze what the optimizer's groups freeze."""
    module, cfg = stages.load("lc_mae"), tiny("lc_mae")
    objective = on_meta(lambda: module.objective(cfg, NO_SHARDS), torch.float32)
    found = groups(objective, module.param_rules(cfg), 1e-4, 0.05)
    trained = sum(p.numel() for group in found for p in group["params"])
    assert sum(Subject("lc_mae", cfg).trained) == trained


@pytest.mark.slow
@pytest.mark.parametrize("stage", stages.names())
def test_every_preset_can_be_planned(stage):
    for name in stages.load(stage).PRESETS:
        found = plan(options("--stage", stage, "--preset", name, "--gpus", "64", "--gpu", "h200"))
        assert found.memory.activations > 0
        assert found.time["seconds"] > 0
