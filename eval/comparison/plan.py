"""What is trained, and for how long, so that every arm has had the same computing (recipes 9.12).

    plan = make_plan(Comparison(shards="shards", …), Path("runs/compare"))
    plan.trainings                 # each with its steps; every arm of a rung within one step of the same multiply-adds

    scratch      random values, 0 FLOPs
    mae, wsp     one stage
    mae_wsp      MAE, then WSP, which share the budget
    supervised   the finetune stage from random values, where a labelled shard set is given

A rung of the ladder is a training of its own, to the end of its own schedule, as the paper varies epochs (MAWS Fig. 5).
Counted are the multiply-adds of matrix products, 3 x forward x samples (maws/models/flops.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_pipeline.errors import UsageError
from data_pipeline.shardset import ShardSet
from maws import stages
from maws.config import ConfigError, Duration, TrainConfig, load_json, nearest, override
from maws.data.order import Part

ARMS = ("scratch", "mae", "wsp", "mae_wsp", "supervised")
OF_THE_PLAN = ("data.shards", "optim.length")
TITLES = {"scratch": "random", "mae": "MAE", "wsp": "WSP", "mae_wsp": "MAE→WSP", "supervised": "supervised"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `--config FILE` holds (JSON), and flags and `--set name=value` change."""

    shards: str = ""  # what MAE and WSP are trained on
    labelled: str = ""  # a shard set with one label a picture (`python -m eval shards`): adds the arm supervised
    data: tuple[str, ...] = ()  # evaluation pictures
    train: tuple[str, ...] = ()  # labelled pictures that the probes learn from
    train_labels: str = ""
    classes: str = ""
    arms: tuple[str, ...] = ("scratch", "mae", "wsp", "mae_wsp")
    seeds: tuple[int, ...] = (0, 1, 2)  # ours; the papers report one training each
    total: str = "1 epochs"  # what the arm wsp is trained for at budget 1; the others get as many FLOPs
    budgets: tuple[float, ...] = (0.25, 0.5, 1.0)  # ours; MAWS Fig. 5 spans about 10 x, its grid is only partly given
    mae_share: float = 0.0  # of mae_wsp's FLOPs that MAE gets; 0: MAE sees as many pictures as WSP, as in MAWS
    preset: str = "vit_b16"  # of stages mae and wsp
    supervised_preset: str = "scratch_b16"  # of stage finetune
    settings: tuple[str, ...] = ()  # group.name=value for every training
    mae_settings: tuple[str, ...] = ()
    wsp_settings: tuple[str, ...] = ()
    supervised_settings: tuple[str, ...] = ()
    evaluators: tuple[str, ...] = ("linear", "knn")
    evaluator_settings: tuple[str, ...] = ()  # as for --set of `python -m eval`
    headline: str = "linear/top1"  # the score that the verdict is about: evaluator/metric
    draws: int = 10_000  # of the bootstrap, and of tests by random signs


EMOJI = "demo/emoji"
DEMO = Comparison(
    data=(f"{EMOJI}/eval-emojione.parquet",), train=("runs/demo/shards",), classes=f"{EMOJI}/classes.json",
    train_labels=f"{EMOJI}/train-labels.parquet", shards="runs/demo/shards", preset="demo", supervised_preset="demo",
    total="60 steps", budgets=(0.5, 1.0), seeds=(0, 1, 2),
)  # fmt: skip
PRESETS = {
    "vit_b16": Comparison(),
    "vit_l16": Comparison(preset="vit_l16", supervised_preset="scratch_l16"),
    "demo": DEMO,  # minutes on two CPU cores: what it shows is how to read the result, not which arm wins
    "debug": replace(DEMO, preset="debug", supervised_preset="debug", total="8 steps", seeds=(0, 1), draws=2000),
}


@dataclass(frozen=True)
class Training:
    """One call of maws/train.py."""

    run: str  # folder
    stage: str
    preset: str
    seed: int
    steps: int
    batch: int  # pictures a step
    per_sample: int  # multiply-adds of a picture, forward and backward
    settings: tuple[str, ...] = ()
    shards: str = ""
    init_from: str = ""
    warmup: str = ""  # where it is not the preset's

    @property
    def multiply_adds(self) -> int:
        return self.steps * self.batch * self.per_sample

    @property
    def overrides(self) -> tuple[str, ...]:
        warmup = (f"optim.warmup={self.warmup}",) if self.warmup else ()
        return (f"data.shards={self.shards}", *self.settings, f"optim.length={self.steps} steps", *warmup)


@dataclass(frozen=True)
class Entry:
    """A trained model that takes part: an arm at a budget with a seed."""

    arm: str
    budget: float  # share of the total; 0: no training
    seed: int
    trainings: tuple[Training, ...]

    @property
    def run(self) -> str:
        return self.trainings[-1].run

    @property
    def multiply_adds(self) -> int:
        return sum(training.multiply_adds for training in self.trainings) if self.budget else 0


@dataclass(frozen=True)
class Plan:
    comparison: Comparison
    total: int  # multiply-adds of an arm at budget 1
    entries: tuple[Entry, ...]
    unit: dict[str, int] = field(default_factory=dict)  # multiply-adds of one step, by stage

    @property
    def trainings(self) -> list[Training]:
        return list(dict.fromkeys(training for entry in self.entries for training in entry.trainings))

    @property
    def multiply_adds(self) -> int:
        return sum(training.multiply_adds for training in self.trainings)


def read_comparison(
    preset: str, file: Path | None, settings: Sequence[str], flags: Mapping[str, Any] = MappingProxyType({})
) -> Comparison:
    """A preset, changed by a file of settings, then by `name=value` (lists with commas), then by flags.

    Raises UsageError.
    """
    if preset not in PRESETS:
        raise UsageError(f"compare has no preset {preset!r}; {nearest(preset, list(PRESETS))}")
    given = [(f"{file}: {name}", name, value) for name, value in load_json(file).items()] if file else []
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: expected name=value; {nearest(name, [*KINDS])}")
        parts = [part.strip() for part in text.split(",") if part.strip()]
        given.append((f"--set {setting}", name, parts if name in LISTS else text))
    given += [(f"--{name.replace('_', '-')}", name, value) for name, value in flags.items()]
    found = PRESETS[preset]
    for where, name, value in given:
        found = replace(found, **{name: _typed(where, name, value)})
    return check(found)


KINDS: dict[str, type] = {item.name: str for item in fields(Comparison)}
KINDS |= {"seeds": int, "budgets": float, "mae_share": float, "draws": int}
LISTS = {item.name for item in fields(Comparison) if isinstance(item.default, tuple)}


def _typed(where: str, name: str, value: Any) -> Any:
    """A value as its field wants it. Raises UsageError for another name, and for a value of another kind."""
    if name not in KINDS:
        raise UsageError(f"{where}: there is no setting {name}; {nearest(name, [*KINDS])}")
    kind, several = KINDS[name], name in LISTS
    try:
        if several != isinstance(value, list) or isinstance(value, dict):
            raise ValueError
        return tuple(kind(part) for part in value) if several else kind(value)
    except (ValueError, TypeError):
        what = f"a list of {kind.__name__}" if several else f"a {kind.__name__}"
        raise UsageError(f"{where}: {value!r} is not {what}") from None


def check(asked: Comparison) -> Comparison:
    """Settings that cannot be meant are refused before anything is read."""
    for arm in asked.arms:
        if arm not in ARMS:
            raise UsageError(f"there is no arm {arm!r}; {nearest(arm, list(ARMS))}")
    arms = dict.fromkeys((*asked.arms, *(("supervised",) if asked.labelled else ())))
    if "supervised" in arms and not asked.labelled:
        raise UsageError(
            "the arm supervised learns from labels: give a shard set with --labelled "
            "(`python -m eval shards --data … --classes … --output FOLDER` makes one)"
        )
    if len(arms) < 2:
        raise UsageError(f"a comparison needs two arms or more of {', '.join(ARMS)}")
    if not asked.seeds or len(set(asked.seeds)) != len(asked.seeds):
        raise UsageError(f"seeds={','.join(map(str, asked.seeds))}: give one or more, each once")
    if not asked.budgets or min(asked.budgets) <= 0 or max(asked.budgets) != 1:
        raise UsageError("budgets are shares of the total, above 0, and the largest is 1, such as 0.25,0.5,1")
    if not 0 <= asked.mae_share < 1:
        raise UsageError(f"mae_share={asked.mae_share} must be at least 0 and less than 1")
    if "/" not in asked.headline or asked.headline.split("/")[0] not in asked.evaluators:
        raise UsageError(f"headline={asked.headline} must be EVALUATOR/METRIC of {', '.join(asked.evaluators)}")
    every = (*asked.settings, *asked.mae_settings, *asked.wsp_settings, *asked.supervised_settings)
    if own := [text for text in every if text.partition("=")[0] in OF_THE_PLAN]:
        raise UsageError(f"{own[0]}: the plan sets this for every training; use shards, labelled and total instead")
    for name, what in (("shards", "a shard set to pretrain on"), ("data", "evaluation pictures")):
        if not getattr(asked, name):
            raise UsageError(f"compare needs {what}: give --{name}")
    return replace(asked, arms=tuple(arms), budgets=tuple(sorted(set(asked.budgets))))


# ---------------------------------------------------------------------------------------------------------------- steps


def make_plan(asked: Comparison, output: Path) -> Plan:
    """Steps of every training. Raises ConfigError for a budget too small to be split, and as the stages do."""
    makers = {stage: _maker(asked, stage, output) for stage in _stages_of(asked.arms)}
    unit = {stage: make("", 0, 1).multiply_adds for stage, make in makers.items()}
    wsp = makers["wsp"]("", 0, 1)
    total = _total_steps(asked, output) * wsp.multiply_adds
    entries = [
        _entry(arm, budget, seed, total, makers, asked, output)
        for arm in asked.arms
        for budget in (asked.budgets if arm != "scratch" else (0.0,))
        for seed in asked.seeds
    ]
    return Plan(asked, total, tuple(entries), unit)


def _stages_of(arms: Sequence[str]) -> list[str]:
    """`wsp` is always there: it is the measure of the total."""
    found = ["wsp"]
    found += ["mae"] if {"mae", "mae_wsp"} & set(arms) else []
    return found + (["finetune"] if "supervised" in arms else [])


def settings_of(asked: Comparison, stage: str) -> tuple[str, str, tuple[str, ...]]:
    """Preset, shard set and settings of a stage's trainings."""
    own = {"mae": asked.mae_settings, "wsp": asked.wsp_settings, "finetune": asked.supervised_settings}[stage]
    supervised = stage == "finetune"
    preset, shards = (asked.supervised_preset, asked.labelled) if supervised else (asked.preset, asked.shards)
    return preset, shards, (*asked.settings, *own)


def configured(asked: Comparison, stage: str, output: Path) -> tuple[TrainConfig, ShardSet]:
    """The config of a stage as its trainings will have it, what follows from the data filled in."""
    preset, shards, settings = settings_of(asked, stage)
    cfg = override(stages.preset(stage, preset), [f"data.shards={shards}", *settings])
    found = ShardSet.open(Path(shards))
    return stages.load(stage).prepare(cfg, found, output), found


def _maker(asked: Comparison, stage: str, output: Path) -> Any:
    """(run, seed, steps, init_from) -> Training of this stage."""
    cfg, _ = configured(asked, stage, output)
    preset, shards, settings = settings_of(asked, stage)
    per_sample = stages.load(stage).cost(cfg).training()

    def make(run: str, seed: int, steps: int, init_from: str = "") -> Training:
        folder = str(output / run)
        return Training(
            folder, stage, preset, seed, steps, cfg.optim.batch_size, per_sample, settings, shards, init_from
        )

    return make


def _total_steps(asked: Comparison, output: Path) -> int:
    """Steps of the arm wsp at budget 1."""
    length = Duration.parse(asked.total)
    if length.unit == "steps":
        return max(1, length.steps(1))
    cfg, shards = configured(asked, "wsp", output)
    return max(1, length.steps(stages.load("wsp").dataset(cfg, shards, output, Part(0, 1)).order.steps_per_epoch))


def _entry(
    arm: str, budget: float, seed: int, total: int, makers: dict[str, Any], asked: Comparison, output: Path
) -> Entry:
    if arm == "scratch":
        # One step at the beginning of a warm-up has a learning rate of 0: the release holds the random values.
        make = makers["wsp"](f"scratch_s{seed}", seed, 1)
        return Entry(arm, 0.0, seed, (replace(make, warmup="1 steps"),))
    name, flops = f"b{100 * budget:g}_s{seed}", budget * total
    if arm != "mae_wsp":
        stage = "finetune" if arm == "supervised" else arm
        return Entry(arm, budget, seed, (makers[stage](f"{arm}_{name}", seed, steps_for(flops, makers[stage])),))
    share = asked.mae_share or _equal_samples(makers)
    first = makers["mae"](f"mae_for_wsp_{name}", seed, steps_for(share * flops, makers["mae"]))
    rest = steps_for(flops - first.multiply_adds, makers["wsp"])
    return Entry(arm, budget, seed, (first, makers["wsp"](f"mae_wsp_{name}", seed, rest, first.run)))


def steps_for(flops: float, make: Any) -> int:
    """The whole number of steps that is nearest to so many multiply-adds."""
    one = make("", 0, 1)
    steps = round(flops / one.multiply_adds)
    if steps < 1:
        raise ConfigError(
            f"a budget of {flops:.2g} multiply-adds is less than one step of {one.stage} ({one.multiply_adds:.2g}); "
            f"raise the total or leave out the smallest budget"
        )
    return steps


def _equal_samples(makers: dict[str, Any]) -> float:
    """MAE's share when both stages see the same number of pictures, as MAWS's one epoch each."""
    mae, wsp = makers["mae"]("", 0, 1).per_sample, makers["wsp"]("", 0, 1).per_sample
    return mae / (mae + wsp)
