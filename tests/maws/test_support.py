"""What goes with what: every feature of training in every stage, as a table that is checked and printed in docs/.

A cell says what three steps of the debug preset on one batch do with the feature: SAME losses as without it, OTHER ones
that still fall, or the words of a refusal before anything is built. The quick part tries what is SAME together and what
is OTHER together; the slow part every cell alone, on one process and on two.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training import ROOT

from maws import config, stages
from maws.config import ConfigError

STAGES = ("mae", "simmim", "lc_mae", "wsp", "lit")
QUICK = ("mae", "lc_mae", "lit")  # simmim and wsp have mae's path and no other; the slow part has them
SAME, OTHER = "same", "other"


@dataclasses.dataclass(frozen=True)
class Row:
    """A feature, the settings that turn it on, and its cells: one for all stages, and those that differ."""

    feature: str
    settings: tuple[str, ...]
    cell: str  # SAME, OTHER, or the words of a refusal
    but: dict[str, str] = dataclasses.field(default_factory=dict)
    why: str = ""
    how: str = "quick"  # quick; slow; or two: it means something on two ranks only

    def of(self, stage: str) -> str:
        return self.but.get(stage, self.cell)

    def refused(self, stage: str) -> bool:
        return self.of(stage) not in (SAME, OTHER)


TABLE = [
    Row("float32", ("engine.precision=fp32",), SAME),
    Row("bfloat16", ("engine.precision=bf16",), OTHER, why="float32 master weights and losses"),
    Row("bfloat16, float32 attention", ("engine.precision=bf16", "model.fp32_attention=yes"), OTHER),
    Row("accumulation", ("optim.micro_batch=8",), SAME, {"lc_mae": OTHER, "lit": OTHER},
        "batch norm (lc_mae) and negatives (lit) are of one micro-batch"),
    Row("clipping", ("optim.clip=0.05",), OTHER),
    Row("recomputing all blocks", ("model.checkpoint_blocks=all",), SAME),
    Row("recomputing every 2nd block", ("model.checkpoint_blocks=every 2",), SAME),
    Row("torch.compile", ("engine.compile=blocks",), SAME,
        why="refused where there is no compiler; text towers are not compiled", how="slow"),
    Row("compile and recompute", ("engine.compile=blocks", "model.checkpoint_blocks=all"), SAME, how="slow"),
    Row("drop path", ("model.drop_path=0.2",), OTHER, {"lit": SAME}, "lit's locked tower is in evaluation mode"),
    Row("layer-wise lr decay", ("optim.layer_decay=0.5",), OTHER, {"lit": r"lock=image does not train"},
        "lit with lock=none or text has it"),
    Row("mean of weights (ema)", ("optim.ema=0.9",), SAME, why="kept beside the weights that are trained"),
    Row("optimizer on the host", ("engine.ds_config=zero3_offload",), SAME),
    Row("parameters on the host too", ("engine.ds_config=zero3_offload_all",), SAME),
    Row("optimizer on NVMe", ("engine.ds_config=zero3_nvme",), r"export MAWS_NVME_PATH=/local/nvme",
        why="needs a path and libaio; never run by the project"),
    Row("hpZ", ("engine.ds_config=zero3_hpz",), SAME, how="two"),
    Row("qwZ and qgZ", ("engine.ds_config=zero3_zeropp",), r"for CUDA only", why="lossy; never run by the project"),
    Row("two ranks", (), SAME, {"lc_mae": OTHER}, "lc_mae within 5e-3: batch norm's sums in another order", how="two"),
    Row("resumed on another number of ranks", ("optim.ema=0.9",), SAME, how="two"),
]  # fmt: skip
# Half of the quick settings cannot be together with the others of their kind: one home for the states, one policy.
NOT_TOGETHER = {"recomputing every 2nd block", "optimizer on the host", "bfloat16"}


def configured(stage: str, settings: tuple[str, ...], folder: str, shards: str) -> Any:
    cfg = config.override(
        stages.preset(stage, "debug"), [f"data.shards={shards}", "optim.length=20 steps", "optim.lr=4e-3", *settings]
    )
    return dataclasses.replace(cfg, init_from=folder) if stage == "lit" else cfg  # nothing is loaded here


BATCHES: dict[str, Any] = {}  # of every stage, one for all steps


def train(
    stage: str, settings: tuple[str, ...], folder: str, shards: str, steps: range = range(3), state: Any = None
) -> dict[str, Any]:
    """Losses of some steps (all alike on all ranks) and the state after them; a refusal as its words."""
    from maws import dist, optim
    from maws.data.loader import open_shards
    from maws.data.order import Part
    from maws.engine import Runtime
    from maws.models import init
    from maws.seeding import seed_everything

    module, cfg = stages.load(stage), configured(stage, settings, folder, shards)
    runtime = Runtime(cfg.engine, cfg.optim)
    opened = open_shards(cfg.data)
    cfg = module.prepare(cfg, opened, Path(folder))
    if stage not in BATCHES:
        data = module.dataset(cfg, opened, Path(folder), Part(dist.rank(), dist.world_size()))
        BATCHES[stage] = data[0]
    with runtime.partitioned():
        objective = module.objective(cfg, opened)
    init.fill(objective, objective.init_rules(), 1, runtime.gather, writer=dist.rank() == 0)
    engine = runtime.build(objective, optim.groups(objective, module.param_rules(cfg), 1.0, 0.05), cfg.optim)
    if state:
        engine.load_local_state({k: torch.tensor(v) for k, v in state.items()}, steps.start)
    losses = []
    for step in steps:
        seed_everything(step)
        engine.set_lr(cfg.optim.lr)
        losses.append(dist.mean([engine.step(BATCHES[stage], step / 20)["loss"]], engine.device)[0])
    found: dict[str, Any] = {"losses": losses, "norm": engine.grad_norm()}
    if steps == range(2):
        found["state"] = {k: v.tolist() for k, v in engine.local_state().items()}
        found["sizes"] = {k: engine.partition(p)[0] for k, p in engine.partitions().items()}
    engine.close()
    return found


def together(kind: str, stage: str) -> tuple[str, ...]:
    rows = [r for r in TABLE if r.how == "quick" and r.of(stage) == kind and r.feature not in NOT_TOGETHER]
    return tuple(dict.fromkeys(s for row in rows for s in row.settings))


def quick(scratch: str, shards: str) -> dict[str, Any]:
    """In one process: each stage without anything, with all that is SAME, and with all that is OTHER."""
    return {
        stage: {kind: train(stage, s, scratch, shards) for kind, s in (
            ("without", ()), (SAME, together(SAME, stage)), (OTHER, together(OTHER, stage)),
        )} for stage in QUICK
    }  # fmt: skip


def each(scratch: str, shards: str, how: list[str]) -> dict[str, Any]:
    """Every cell alone; what is refused is not tried."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        rows = [
            row for row in TABLE if row.how in how and not row.refused(stage) and not row.feature.startswith("resumed")
        ]
        found[stage] = {row.feature: train(stage, row.settings, scratch, shards) for row in rows}
        found[stage]["without"] = train(stage, (), scratch, shards)
        if "two" in how:
            ema = ("optim.ema=0.9",)
            found[stage]["half"] = train(stage, ema, scratch, shards, range(2))
            found[stage]["rest"] = train(stage, ema, scratch, shards, range(2, 4), found[stage]["half"]["state"])
    return found


def on_one(scratch: str, shards: str, states: str) -> dict[str, Any]:
    """What two ranks began, continued by one."""
    import json

    halves = json.loads(Path(states).read_text())
    return {s: train(s, ("optim.ema=0.9",), scratch, shards, range(2, 4), halves[s]) for s in STAGES}


def holds(cell: str, found: list[float], without: list[float], tolerance: float = 2e-6) -> None:
    """Is it what the cell says?"""
    apart = max(abs(a - b) for a, b in zip(found, without, strict=True))
    if cell == SAME:
        assert apart <= tolerance
    else:
        assert apart > 1e-6
        assert found[-1] < found[0] + 0.02


@pytest.mark.timeout(300)
def test_features_that_change_nothing_and_those_that_do_work_together_in_one_run(shards_path, tmp_path):
    found = run_ranks("test_support", "quick", tmp_path, ranks=1, scratch=str(tmp_path), shards=str(shards_path))[0]
    for stage in QUICK:
        without = found[stage]["without"]["losses"]
        holds(SAME, found[stage][SAME]["losses"], without)
        holds(OTHER, found[stage][OTHER]["losses"], without)


@pytest.mark.parametrize("stage", STAGES)
def test_refusals_have_the_words_of_the_table(stage, shards_path, tmp_path, monkeypatch):
    from maws import ds_config
    from maws.data.loader import open_shards

    monkeypatch.delenv("MAWS_NVME_PATH", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    refusals = [row for row in TABLE if row.refused(stage)]
    assert len(refusals) == (3 if stage == "lit" else 2)
    for row in refusals:
        cfg = configured(stage, row.settings, str(tmp_path), str(shards_path))
        with pytest.raises(ConfigError, match=row.of(stage)):
            ds_config.ds_config(cfg.engine, "cpu")
            stages.load(stage).prepare(cfg, open_shards(cfg.data), tmp_path)


def markdown() -> str:
    """The table for people."""
    words = {SAME: "works, same losses", OTHER: "works"}
    head = ["| feature | settings | " + " | ".join(STAGES) + " | |", "|---" * (len(STAGES) + 3) + "|"]
    rows = [
        f"| {row.feature} | {' '.join(f'`{s}`' for s in row.settings)} | "
        + " | ".join(words.get(row.of(stage), "refused") for stage in STAGES)
        + f" | {'; '.join(filter(None, [row.why, *_refusals(row)]))} |"
        for row in TABLE
    ]
    return "\n".join(head + rows)


def _refusals(row: Row) -> list[str]:
    words = {row.of(stage).replace("\\", "") for stage in STAGES if row.refused(stage)}
    return [f'the refusal says "{w}"' for w in sorted(words)]


def test_the_table_in_the_documentation_is_this_one():
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    assert any(markdown() in page for page in pages), f"put this into a page of docs/:\n{markdown()}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_cell_holds_alone(shards_path, tmp_path, subtests):
    arguments = {"scratch": str(tmp_path), "shards": str(shards_path), "how": ["quick", "slow"]}
    found = run_ranks("test_support", "each", tmp_path, ranks=1, seconds=1400, **arguments)[0]
    for row in (row for row in TABLE if row.how != "two"):
        for stage in (stage for stage in STAGES if not row.refused(stage)):
            with subtests.test(f"{row.feature}, {stage}"):
                tolerance = 1e-4 if "compile" in row.feature else 2e-6  # other kernels
                holds(row.of(stage), found[stage][row.feature]["losses"], found[stage]["without"]["losses"], tolerance)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_cell_holds_on_two_ranks_and_a_run_goes_on_on_one(shards_path, tmp_path, subtests):
    import json

    places = {"scratch": str(tmp_path), "shards": str(shards_path)}
    one = run_ranks("test_support", "each", tmp_path, ranks=1, how=[], **places)[0]
    two = run_ranks("test_support", "each", tmp_path, seconds=800, how=["two"], **places)
    halves = {stage: put_together([rank[stage]["half"] for rank in two]) for stage in STAGES}
    (tmp_path / "states.json").write_text(json.dumps(halves))
    alone = run_ranks("test_support", "on_one", tmp_path, ranks=1, states=str(tmp_path / "states.json"), **places)[0]
    for stage in STAGES:
        with subtests.test(stage):
            tolerance = 5e-3 if stage == "lc_mae" else 1e-4
            holds(SAME, two[0][stage]["two ranks"]["losses"], one[stage]["without"]["losses"], tolerance)
            holds(SAME, two[0][stage]["hpZ"]["losses"], two[0][stage]["without"]["losses"])
            holds(SAME, alone[stage]["losses"], two[0][stage]["rest"]["losses"], tolerance)


def put_together(halves: list[dict[str, Any]]) -> dict[str, list[float]]:
    """One rank's state out of that of two: parts one after the other without the padding; buffers are alike."""
    first, second, sizes = halves[0]["state"], halves[1]["state"], halves[0]["sizes"]
    return {key: (first[key] + second[key])[: sizes[key]] if key in sizes else first[key] for key in first}


def test_the_table_has_a_row_for_every_setting_of_the_engine_that_may_clash():
    named = {setting.split("=")[0] for row in TABLE for setting in row.settings}
    wanted = r"engine\..*|optim\.(micro_batch|clip|layer_decay|ema)|model\.(fp32_attention|drop_path|checkpoint_blocks)"
    have = {
        name for name in config.flatten(config.to_json(stages.preset("mae", "debug"))) if re.fullmatch(wanted, name)
    }
    assert have == named
