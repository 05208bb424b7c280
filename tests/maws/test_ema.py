"""The mean of all trained weights (optim.ema) against a plain loop, on partitions; and ZeRO's other homes for them.

Two ranks run `on_two_ranks` once, one process `alone`; each of CLAIMS looks at another part of what they returned.
"""

import json
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.testing import assert_close
from whole import whole_weights

DECAY, STEPS, MORE, LR = 0.8, 3, 2, 0.05
FINE = 0.9995  # in bfloat16 a mean of this decay would stand still


class Toy(nn.Module):
    """Two layers, the first of which is frozen; 5 x 7 weights do not divide by two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 7)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = batch["image"].to(self.last.weight.dtype)
        return {"loss": (self.last(self.first(x).relu()).float() - 1).square().mean()}


def rows(step: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """This rank's share of a step's eight rows, in micro-batches of two."""
    whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    return whole.chunk(ranks)[rank]


def train(ds: str, precision: str, ema: float, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train Toy and remember weights and means; continue from `state` when that is given."""
    from maws import dist, optim
    from maws.config import Duration, EngineConfig, OptimConfig
    from maws.engine import Runtime
    from maws.models import init

    cfg = OptimConfig(batch_size=8, micro_batch=2, lr=LR, ema=ema, length=Duration(STEPS, "steps"))
    runtime = Runtime(EngineConfig(ds_config=ds, precision=precision), cfg)
    with runtime.partitioned():
        toy = Toy()
    init.fill(toy, [(".*", init.Normal(0.3))], 1, runtime.gather, writer=dist.rank() == 0)
    engine = runtime.build(toy, optim.groups(toy, [("first.*", None), (".*", optim.BASE)], 1.0, 0.1), cfg)
    if state:
        engine.load_local_state({k: torch.tensor(v) for k, v in state.items()}, STEPS)
    found: dict[str, Any] = {"weights": [whole(engine)], "losses": []}
    found["keys"] = sorted(engine.partitions())
    for step in range(STEPS, STEPS + MORE) if state else range(STEPS):
        engine.set_lr(LR)
        image = rows(step, dist.rank(), dist.world_size())
        found["losses"].append(dist.mean([engine.step({"image": image})["loss"]], engine.device)[0])  # type: ignore
        found["weights"].append(whole(engine))
    found["state"] = {k: v.tolist() for k, v in engine.local_state().items()}
    found["sizes"] = {k: engine.partition(p)[0] for k, p in engine.partitions().items()}
    if ema:
        found["ema"] = whole(engine, ema=True)
        found["dtypes"] = sorted({str(m.dtype) for m in engine.ema.means.values()})
    engine.close()
    return found


def whole(engine: Any, ema: bool = False) -> dict[str, Any]:
    return {n: v.tolist() for n, v in whole_weights(engine, ema)}


def on_two_ranks() -> dict[str, Any]:
    found = {"fp32": train("zero3_cpu", "fp32", DECAY), "bf16": train("zero3_cpu", "bf16", FINE)}
    found["resumed"] = train("zero3_cpu", "fp32", DECAY, found["fp32"]["state"])
    for ds in ("zero3_hpz", "zero3_offload_all"):
        found[ds] = train(ds, "fp32", DECAY)
        found[f"{ds} resumed"] = train(ds, "fp32", DECAY, found[ds]["state"])
    return found


def alone(state: str) -> dict[str, Any]:
    return {"resumed": train("zero3_cpu", "fp32", DECAY, json.loads(state)), "none": train("zero3_cpu", "fp32", 0.0)}


@pytest.mark.timeout(400)  # real processes: seconds on an idle machine, minutes on a busy one
def test_on_two_ranks_and_then_on_one(tmp_path, subtests):
    two = run_ranks("test_ema", "on_two_ranks", tmp_path)
    one = run_ranks("test_ema", "alone", tmp_path, ranks=1, state=json.dumps(put_together(two)))[0]
    for claim in CLAIMS:
        with subtests.test(claim.__name__):
            claim(two, one)


def put_together(two: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The state of one rank out of that of two: parts one after the other, without the padding."""
    states, sizes = [rank["fp32"]["state"] for rank in two], two[0]["fp32"]["sizes"]
    return {key: (states[0][key] + states[1][key])[: sizes[key]] for key in states[0]}


def plain(weights: list[dict[str, Any]], name: str, decay: float) -> Tensor:
    """The loop, in float64, over weights of which each step's are known."""
    mean = torch.tensor(weights[0][name], dtype=torch.float64)
    for now in weights[1:]:
        mean = decay * mean + (1 - decay) * torch.tensor(now[name], dtype=torch.float64)
    return mean


def the_mean_is_the_plain_loop_after_each_step_and_not_each_micro_batch(two: list[Any], one: dict[str, Any]) -> None:
    for found in (two[0]["fp32"], two[1]["fp32"]):
        assert found["losses"][-1] < found["losses"][0]
        for name in ("last.weight", "last.bias"):
            got = torch.tensor(found["ema"][name], dtype=torch.float64)
            assert_close(got, plain(found["weights"], name, DECAY), rtol=0, atol=1e-6)
            assert (got - torch.tensor(found["weights"][-1][name])).abs().max() > 1e-3
        for name in ("first.weight", "first.bias"):  # not trained: as it is
            assert found["ema"][name] == found["weights"][0][name]


def in_bfloat16_it_moves_where_a_bfloat16_mean_would_stand_still(two: list[Any], one: dict[str, Any]) -> None:
    found = two[0]["bf16"]
    assert found["dtypes"] == ["torch.float32"]
    got = torch.tensor(found["ema"]["last.weight"], dtype=torch.float64)
    assert_close(got, plain(found["weights"], "last.weight", FINE), rtol=0, atol=1e-6)
    start = torch.tensor(found["weights"][0]["last.weight"])
    assert ((got - start).abs() > 0).all()
    still = start.bfloat16()
    for now in found["weights"][1:]:
        still.lerp_(torch.tensor(now["last.weight"]).bfloat16(), 1 - FINE)
    assert (still == start.bfloat16()).float().mean() > 0.8  # the rest are too small to be rounded away


def a_checkpoint_holds_it_under_its_own_keys(two: list[Any], one: dict[str, Any]) -> None:
    assert [k for k in two[0]["fp32"]["keys"] if k.startswith("ema/")] == ["ema/last.bias", "ema/last.weight"]
    assert not [k for k in one["none"]["keys"] if k.startswith("ema/")]
    assert "ema" not in one["none"]


def a_resume_goes_on_with_it_on_two_ranks_and_on_one(two: list[Any], one: dict[str, Any]) -> None:
    for found in (two[0]["resumed"], one["resumed"]):
        weights = [*two[0]["fp32"]["weights"], *found["weights"][1:]]
        assert found["weights"][0] == two[0]["fp32"]["weights"][-1]
        for name in ("last.weight", "last.bias"):
            got = torch.tensor(found["ema"][name], dtype=torch.float64)
            assert_close(got, plain(weights, name, DECAY), rtol=0, atol=1e-6)
    assert one["resumed"]["losses"] == pytest.approx(two[0]["resumed"]["losses"], abs=1e-6)


def states_on_the_host_and_copies_within_a_node_train_alike_and_resume_to_the_bit(
    two: list[Any], one: dict[str, Any]
) -> None:
    for ds in ("zero3_hpz", "zero3_offload_all"):
        assert two[0][ds]["losses"] == pytest.approx(two[0]["fp32"]["losses"], abs=1e-6), ds
        for kind in ("weights", "ema"):
            got, want = ((two[1][d]["weights"][-1] if kind == "weights" else two[1][d]["ema"]) for d in (ds, "fp32"))
            for name, values in want.items():
                assert_close(torch.tensor(got[name]), torch.tensor(values), rtol=0, atol=1e-5)
        assert two[0][f"{ds} resumed"]["losses"] == pytest.approx(two[0]["resumed"]["losses"], abs=1e-6), ds
        assert two[0][f"{ds} resumed"]["weights"][0] == two[0][ds]["weights"][-1], ds


CLAIMS = [
    the_mean_is_the_plain_loop_after_each_step_and_not_each_micro_batch,
    in_bfloat16_it_moves_where_a_bfloat16_mean_would_stand_still,
    a_checkpoint_holds_it_under_its_own_keys,
    a_resume_goes_on_with_it_on_two_ranks_and_on_one,
    states_on_the_host_and_copies_within_a_node_train_alike_and_resume_to_the_bit,
]
