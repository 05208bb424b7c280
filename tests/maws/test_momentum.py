"""A momentum target on two ZeRO-3 ranks, and what else of LC-MAE is over all ranks: batch norm and InfoNCE.

Both ranks run `on_two_ranks` once; each of CLAIMS looks at another part of what it returned.
"""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from training import arguments, losses, metrics
from whole import whole_weights

from maws.dist import free_port
from maws.models import init
from maws.models.batch_norm import BatchNorm1d
from maws.models.mae import MaskedAutoencoder
from maws.momentum import MomentumTarget, cosine_to_one
from maws.release import load_image_tower, open_release
from maws.stages import lc_mae, shape_of

STEPS = 5
SHORT = ("optim.length=20 steps", "checkpoint.every=5 steps", "log.every=1")
MOMENTUM = [0.9, 0.93, 0.96, 0.99, 0.999]
BFLOAT16_MOMENTUM = 0.9995


class Toy(nn.Module):
    """A trained branch and its follower; `seen` is what forward makes of the follower."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(6, 40), BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 5))
        self.target = nn.Sequential(nn.Linear(6, 40), BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 5)).eval()
        self.constant = 0.0

    def train(self, mode: bool = True) -> "Toy":
        super().train(mode)
        self.target.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = batch["image"].to(self.online[0].weight.dtype)
        with torch.no_grad():
            seen = self.target(x).float().mean()
        return {"loss": (self.online(x).float() - 1).square().mean(), "seen": seen}

    def follows(self) -> dict[str, str]:
        return {"target.": "online."}

    def momentum(self, progress: float) -> float:
        return self.constant or MOMENTUM[round(progress * STEPS)]

    def init_rules(self) -> init.InitRules:
        return [(r".*1\.weight", init.Constant(1.0)), (r".*bias", init.Constant(0.1)), (r".*", init.Normal(0.3))]


def rows(rank: int, count: int = 4) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(rank))


def average(precision: str, threshold: int, folder: str, constant: float = 0.0, lr: float = 0.05) -> dict[str, Any]:
    """Train Toy on two ranks: values and statistics after each step, and what forward saw of the target."""
    import json

    from maws import dist, optim
    from maws.config import Duration, EngineConfig, OptimConfig
    from maws.ds_config import DS_CONFIGS
    from maws.engine import Runtime

    settings = json.loads((DS_CONFIGS / "zero3_cpu.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    path = Path(folder) / f"threshold_{threshold}_{dist.detect().rank}.json"
    path.write_text(json.dumps(settings))
    cfg = OptimConfig(batch_size=16, micro_batch=4, lr=lr, length=Duration(STEPS, "steps"))
    runtime = Runtime(EngineConfig(ds_config=str(path), precision=precision), cfg)
    with runtime.partitioned():
        toy = Toy()
    toy.constant = constant
    init.fill(toy, toy.init_rules(), 1, runtime.gather, writer=dist.rank() == 0)
    engine = runtime.build(toy, optim.groups(toy, [(r"target.*", None), (r".*", optim.BASE)], 1.0, 0.0), cfg)

    def values() -> dict[str, Any]:
        whole = {n: v.tolist() for n, v in whole_weights(engine)}
        return whole | {n: b.tolist() for n, b in engine.objective.named_buffers()}

    found: dict[str, Any] = {"values": [values()], "seen": []}
    for step in range(STEPS):
        image = torch.cat([rows(10 * step + dist.rank()), rows(100 + 10 * step + dist.rank())])  # two micro-batches
        engine.set_lr(lr)
        found["seen"].append(float(engine.step({"image": image}, step / STEPS)["seen"]))  # type: ignore[typeddict-item]
        found["values"].append(values())
    found["means"] = {n: m.tolist() for n, m in engine.target.means.items()}
    found["dtypes"] = sorted({str(m.dtype) for m in engine.target.means.values()})
    found["gradients"] = [n for n, p in toy.target.named_parameters() if p.grad is not None]
    return found


def normalised() -> dict[str, Any]:
    """One step of batch norm over different numbers of rows on the ranks."""
    from maws import dist

    norm = BatchNorm1d(6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 7)), norm.bias.fill_(0.5)
    x = (rows(dist.rank(), 3 + dist.rank()) + 2).double().requires_grad_()
    y = norm(x)
    (y.square() * torch.arange(6)).sum().backward()
    return {
        "y": y.tolist(), "gradient": x.grad.tolist(), "weight_gradient": norm.weight.grad.tolist(),  # type: ignore
        "mean": norm.running_mean.tolist(), "var": norm.running_var.tolist(),
    }  # fmt: skip


def contrasted() -> dict[str, Any]:
    from maws import dist
    from maws.objectives.similarity import info_nce

    prediction = rows(dist.rank()).requires_grad_()
    loss = info_nce(prediction, rows(50 + dist.rank()), 0.2)
    loss.backward()
    return {"loss": float(loss), "gradient": prediction.grad.tolist()}  # type: ignore[union-attr]


def on_two_ranks(scratch: str, shards: str, ports: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "small": average("fp32", 10**5, scratch),  # all parameters are kept whole
        "large": average("fp32", 0, scratch),  # none is
        "bf16": average("bf16", 41, scratch, constant=BFLOAT16_MOMENTUM, lr=1e-3),
        "norm": normalised(),
        "infonce": contrasted(),
    }
    return found | {"codes": train(Path(scratch), shards, ports)}


def train(folder: Path, shards: str, ports: list[int]) -> list[int]:
    """LC-MAE's debug preset on both ranks; again from step 15; and from there in one process."""
    from maws import dist
    from maws.train import main

    first, codes = dist.rank() == 0, [main(arguments("lc_mae", folder / "straight", Path(shards), *SHORT))]
    if first:
        cut_short(folder / "straight", folder / "resumed")
        cut_short(folder / "straight", folder / "alone")
    os.environ["MASTER_PORT"] = str(ports[0])  # the last group's store may still answer on its own
    codes.append(main([*arguments("lc_mae", folder / "resumed", Path(shards), *SHORT), "--resume", "auto"]))
    if first:
        os.environ |= {"WORLD_SIZE": "1", "MASTER_PORT": str(ports[1])}
        codes.append(main([*arguments("lc_mae", folder / "alone", Path(shards), *SHORT), "--resume", "auto"]))
    return codes


def cut_short(run: Path, copy: Path) -> None:
    """The run as a kill after step 15 of 20 would have left it."""
    (copy / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.json", copy)
    shutil.copytree(run / "checkpoints" / "step_0000015", copy / "checkpoints" / "step_0000015")


@pytest.mark.timeout(400)  # real processes: seconds on an idle machine, minutes on a busy one
def test_on_two_ranks(tmp_path, shards_path, subtests):
    """One test, because each of pytest's workers would start ranks of its own for what they share."""
    ports = [free_port(), free_port()]
    first, second = run_ranks(
        "test_momentum", "on_two_ranks", tmp_path, scratch=str(tmp_path), shards=str(shards_path), ports=ports
    )
    for claim in CLAIMS:
        with subtests.test(claim.__name__):
            claim({"first": first, "second": second, "folder": tmp_path})


def exact_mean(values: list[dict[str, Any]], name: str, momentum: list[float]) -> Tensor:
    """The plain loop, in float64."""
    mean = torch.tensor(values[0]["online." + name], dtype=torch.float64)
    for now, m in zip(values[1:], momentum, strict=True):
        mean = m * mean + (1 - m) * torch.tensor(now["online." + name], dtype=torch.float64)
    return mean


def weights_and_running_statistics_are_the_plain_loops(two_ranks: dict[str, Any]) -> None:
    for kept in ("small", "large"):
        found = two_ranks["first"][kept]
        names = [n.removeprefix("target.") for n in found["values"][0] if n.startswith("target.")]
        assert len(names) == 9  # six parameters and three buffers
        for name in names:
            got = torch.tensor(found["values"][-1]["target." + name], dtype=torch.float64)
            if name.endswith("num_batches_tracked"):
                assert int(got) == 2 * STEPS  # copied; two micro-batches a step, and one step of the mean
            else:
                assert_close(got, exact_mean(found["values"], name, MOMENTUM), rtol=0, atol=1e-6)
        assert two_ranks["second"][kept]["values"] == found["values"]
        assert found["gradients"] == []


def forward_reads_the_new_values_at_once(two_ranks: dict[str, Any]) -> None:
    for kept in ("small", "large"):
        for step in range(STEPS):
            seen = []
            for rank in ("first", "second"):
                t = {n: torch.tensor(v) for n, v in two_ranks[rank][kept]["values"][step].items()}
                number = 0 if rank == "first" else 1
                x = torch.cat([rows(10 * step + number), rows(100 + 10 * step + number)])
                hidden = F.linear(x, t["target.0.weight"], t["target.0.bias"])
                hidden = (hidden - t["target.1.running_mean"]) / (t["target.1.running_var"] + 1e-5).sqrt()
                hidden = (hidden * t["target.1.weight"] + t["target.1.bias"]).relu()
                seen.append(F.linear(hidden, t["target.3.weight"], t["target.3.bias"]).mean())
                assert two_ranks[rank][kept]["seen"][step] == pytest.approx(float(seen[-1]), abs=1e-6)


def in_bfloat16_the_mean_moves_where_a_bfloat16_mean_would_stand_still(two_ranks: dict[str, Any]) -> None:
    first, second = two_ranks["first"]["bf16"], two_ranks["second"]["bf16"]
    assert first["dtypes"] == ["torch.float32"]
    for name in ("0.weight", "3.weight", "1.bias"):
        own = [torch.tensor(r["means"]["target." + name]) for r in (first, second)]
        want = exact_mean(first["values"], name, [BFLOAT16_MOMENTUM] * STEPS)
        got = torch.cat(own)[: want.numel()].view(want.shape)  # the partitions of both ranks
        assert_close(got.double(), want, rtol=0, atol=1e-6)
        start = torch.tensor(first["values"][0]["online." + name])
        assert (got - start).abs().max() > 1e-6
        still = start.bfloat16()
        for now in first["values"][1:]:
            still.lerp_(torch.tensor(now["online." + name]).bfloat16(), 1 - BFLOAT16_MOMENTUM)
        assert torch.equal(still, start.bfloat16())
        assert torch.equal(torch.tensor(first["values"][-1]["target." + name]), got.bfloat16().float())


def batch_norm_is_over_the_rows_of_both_ranks(two_ranks: dict[str, Any]) -> None:
    parts = [(rows(0, 3) + 2).double(), (rows(1, 4) + 2).double()]
    x = torch.cat(parts).requires_grad_()
    norm = nn.BatchNorm1d(6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 7)), norm.bias.fill_(0.5)
    y = norm(x)
    (y.square() * torch.arange(6)).sum().backward()
    found = [two_ranks["first"]["norm"], two_ranks["second"]["norm"]]
    for want, key in ((y, "y"), (x.grad, "gradient")):
        got = torch.cat([torch.tensor(f[key], dtype=torch.float64) for f in found])
        assert_close(got, want.detach(), rtol=0, atol=1e-9)
    weight = sum(torch.tensor(f["weight_gradient"], dtype=torch.float64) for f in found)
    assert_close(weight, norm.weight.grad, rtol=0, atol=1e-9)
    for f in found:
        assert f["mean"] == pytest.approx(norm.running_mean.tolist(), abs=1e-9)
        assert f["var"] == pytest.approx(norm.running_var.tolist(), abs=1e-9)


def infonce_has_the_targets_of_both_ranks_as_negatives(two_ranks: dict[str, Any]) -> None:
    prediction = torch.cat([rows(0), rows(1)]).double().requires_grad_()
    target = torch.cat([rows(50), rows(51)]).double()
    per_row = []
    for i, p in enumerate(prediction):
        logits = torch.stack([(p @ t) / (p.norm() * t.norm()) / 0.2 for t in target])
        per_row.append(torch.logsumexp(logits, 0) - logits[i])
    for rank, part in (("first", slice(0, 4)), ("second", slice(4, 8))):
        want = torch.stack(per_row[part]).mean()
        (gradient,) = torch.autograd.grad(want, prediction, retain_graph=True)
        found = two_ranks[rank]["infonce"]
        assert found["loss"] == pytest.approx(float(want.detach()), abs=1e-6)
        assert_close(torch.tensor(found["gradient"]).double(), gradient[part], rtol=0, atol=1e-6)


def a_killed_run_of_two_ranks_goes_on_to_the_bit(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["first"]["codes"] == [0, 0, 0] and two_ranks["second"]["codes"] == [0, 0]
    straight, resumed = two_ranks["folder"] / "straight", two_ranks["folder"] / "resumed"
    assert list(losses(resumed)) == [16, 17, 18, 19, 20]
    for ours, theirs in zip(metrics(resumed), metrics(straight)[15:], strict=True):
        same = ("train/loss", "train/reconstruction", "train/guidance", "train/momentum", "train/grad_norm")
        assert [ours[k] for k in same] == [theirs[k] for k in same]
    for rank in (0, 1):  # weights, moments, the target's means, running statistics
        name = f"checkpoints/step_0000020/rank_{rank:05}.safetensors"
        mine, other = load_file(resumed / name), load_file(straight / name)
        assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in other)
        assert {
            "average/target.encoder.blocks.1.mlp.fc2.weight", "average/target.projector.global.0.weight",
            "buffer/target.projector.global.1.running_var", "buffer/predictor.global.1.running_mean",
        } <= mine.keys()  # fmt: skip


def a_run_of_two_ranks_goes_on_in_one_process(two_ranks: dict[str, Any]) -> None:
    straight, alone = losses(two_ranks["folder"] / "straight"), losses(two_ranks["folder"] / "alone")
    assert list(alone) == [16, 17, 18, 19, 20]
    for step, loss in alone.items():
        assert loss == pytest.approx(straight[step], abs=2e-5), step  # sums of floats in another order


def the_loss_falls_and_the_release_is_an_mae_release_of_the_online_branch(two_ranks: dict[str, Any]) -> None:
    run = two_ranks["folder"] / "straight"
    values = list(losses(run).values())
    assert sum(values[-4:]) < 0.9 * sum(values[:4])
    release, debug = open_release(run), lc_mae.PRESETS["debug"]
    with torch.device("meta"):
        autoencoder = MaskedAutoencoder(shape_of(debug.model), 32, debug.decoder)
    released = load_file(run / "release" / "model.safetensors")
    assert released.keys() == autoencoder.state_dict().keys() and release.lineage == ("lc_mae",)
    parts = [load_file(run / "checkpoints" / "step_0000020" / f"rank_{r:05}.safetensors") for r in (0, 1)]
    key = "blocks.1.attn.qkv.weight"
    online, target = (
        torch.cat([p[name] for p in parts])
        for name in (f"weight/online.encoder.{key}", f"average/target.encoder.{key}")
    )
    tower = load_image_tower(release).get_parameter(key)
    assert torch.equal(tower.flatten(), online) and not torch.equal(tower.flatten(), target)


CLAIMS = [
    weights_and_running_statistics_are_the_plain_loops,
    forward_reads_the_new_values_at_once,
    in_bfloat16_the_mean_moves_where_a_bfloat16_mean_would_stand_still,
    batch_norm_is_over_the_rows_of_both_ranks,
    infonce_has_the_targets_of_both_ranks_as_negatives,
    a_killed_run_of_two_ranks_goes_on_to_the_bit,
    a_run_of_two_ranks_goes_on_in_one_process,
    the_loss_falls_and_the_release_is_an_mae_release_of_the_online_branch,
]


def test_momentum_rises_along_a_cosine_and_is_one_at_the_end():
    assert cosine_to_one(0.996, 0.0) == pytest.approx(0.996)
    assert cosine_to_one(0.996, 0.5) == pytest.approx(0.998)
    assert cosine_to_one(0.996, 1.0) == 1.0
    assert cosine_to_one(0.9, 0.25) == pytest.approx(1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2)


def test_without_an_engine_the_target_starts_as_a_copy_and_follows():
    toy = Toy()
    init.fill(toy, toy.init_rules(), 1)
    toy.target.requires_grad_(False)
    target = MomentumTarget(toy, lambda p: p.data)
    target.start()
    assert all(torch.equal(a, b) for a, b in zip(toy.target.parameters(), toy.online.parameters(), strict=True))
    before = toy.online[0].weight.detach().clone()
    with torch.no_grad():
        toy.online[0].weight += 1
    target.follow(0.75)
    assert_close(toy.target[0].weight, before + 0.25)
