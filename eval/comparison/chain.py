"""A plan as a chain of commands that a user could type: trainings, evaluations, and what they take."""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import maws
from eval.comparison.plan import TITLES, Comparison, Entry, Plan, Training
from eval.processes import count_gpus
from eval.steps import Step, evaluators_in

WEIGHTS = "release/model.safetensors"


def launcher(gpus: int | None = None) -> tuple[str, ...]:
    """How trainings are started here: on all GPUs, or as one process."""
    gpus = count_gpus() if gpus is None else gpus
    ranks = 1 << (min(gpus, 8).bit_length() - 1) if gpus else 1  # a power of two divides the streams of any shard set
    return ("deepspeed", "--num_gpus", str(ranks)) if gpus else ("python",)


def train_py() -> str:
    """maws/train.py as one would write it here."""
    path = Path(maws.__file__).parent / "train.py"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def chain(plan: Plan, start: Sequence[str]) -> list[Step]:
    """All trainings and evaluations: those of one seed and rung together, small rungs first.

    Without GPUs a training is one process, and two commands run side by side. A step is out of date when its command
    or its input files changed; a new version of the code or of a library does not throw trained models away.
    """
    alone = start[0] != "python"
    order = sorted(plan.entries, key=lambda e: (e.budget, plan.comparison.seeds.index(e.seed)))
    steps: dict[str, Step] = {}
    for entry in order:
        for training in entry.trainings:
            steps.setdefault(training.run, train_step(training, start, side_by_side=not alone))
        steps[f"{entry.run}/eval"] = eval_step(entry, plan.comparison)
    return list(steps.values())


def train_step(training: Training, start: Sequence[str], side_by_side: bool) -> Step:
    command = [*start, train_py(), "--stage", training.stage, "--preset", training.preset, "--run", training.run]
    command += ["--init-from", training.init_from] if training.init_from else []
    command += ["--seed", str(training.seed), "--resume", "auto", *training.overrides]
    inputs = [f"{training.shards}/manifest.json"]
    inputs += [f"{training.init_from}/{WEIGHTS}"] if training.init_from else []
    return Step(
        Path(training.run).name, tuple(command), tuple(inputs), (f"{training.run}/{WEIGHTS}",), code=(),
        side_by_side=side_by_side,
    )  # fmt: skip


def eval_step(entry: Entry, asked: Comparison) -> Step:
    command = ["python", "-m", "eval", *asked.evaluators, "--run", entry.run]
    command += ["--train", *asked.train] if asked.train else []
    command += ["--train-labels", asked.train_labels] if asked.train_labels else []
    command += ["--data", *asked.data] + (["--classes", asked.classes] if asked.classes else [])
    command += ["--set", *asked.evaluator_settings] if asked.evaluator_settings else []
    results = f"{entry.run}/results.jsonl"
    files = [path for path in (*asked.data, *asked.train, asked.train_labels, asked.classes) if Path(path).is_file()]
    files += [f"{path}/manifest.json" for path in asked.train if (Path(path) / "manifest.json").is_file()]
    return Step(
        f"eval-{Path(entry.run).name}", tuple(command), (f"{entry.run}/{WEIGHTS}", *files), (results,), code=(),
        side_by_side=True, done=lambda root: set(asked.evaluators) <= evaluators_in(root / results),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- words


def describe(plan: Plan, output: Path) -> list[str]:
    """The plan for people: what every arm gets, and what all of it costs."""
    asked = plan.comparison
    lines = [
        f"comparison: {', '.join(TITLES[arm] for arm in asked.arms)}; {len(asked.seeds)} seeds "
        f"({', '.join(map(str, asked.seeds))}); budgets {', '.join(f'{100 * b:g} %' for b in asked.budgets)} of "
        f"{_flops(plan.total)} ({asked.total} of WSP)",
        f"{'arm':<12} {'budget':>7} {'FLOPs':>10} {'off':>7}  stages",
    ]
    first = asked.seeds[0]
    for entry in (entry for entry in plan.entries if entry.seed == first):
        if not entry.budget:
            lines.append(f"{TITLES[entry.arm]:<12} {'–':>7} {_flops(0):>10} {'':>7}  random values")
            continue
        off = entry.multiply_adds / (entry.budget * plan.total) - 1
        parts = ", then ".join(f"{t.stage} {t.steps:,} steps of {t.batch:,}" for t in entry.trainings)
        lines.append(
            f"{TITLES[entry.arm]:<12} {100 * entry.budget:>6g}% {_flops(entry.multiply_adds):>10} {100 * off:>+6.2f}%  "
            f"{parts}"
        )
    trainings = plan.trainings
    lines.append(
        f"{len(trainings)} trainings, {_flops(plan.multiply_adds)} in all (a multiply-add counts as two FLOPs; "
        f"products of matrices only), and {len(plan.entries)} evaluations, into {output}"
    )
    return lines


def estimate(plan: Plan) -> str:
    """The least time it can take: all FLOPs at the speed of one product of matrices, measured here and now."""
    speed, device = matrix_speed()
    seconds = 2 * plan.multiply_adds / speed
    return (
        f"estimated cost: at least {_time(seconds)} of computing at {speed / 1e9:,.0f} GFLOP/s, what a product of "
        f"matrices reaches on {device} now; training reaches a part of that, and start-up, reading of pictures and "
        f"evaluations come on top"
    )


def matrix_speed(side: int = 1024, seconds: float = 0.2) -> tuple[float, str]:
    """FLOP/s of a float32 product (bfloat16 on a GPU), over all devices or cores that trainings would have."""
    import torch

    gpus = torch.cuda.device_count()
    device, kind, side = ("cuda", torch.bfloat16, 8 * side) if gpus else ("cpu", torch.float32, side)
    a = torch.ones(side, side, device=device, dtype=kind)
    out = torch.mm(a, a)  # the first one warms up
    float(out[0, 0])
    products, start = 0, time.perf_counter()
    while not products or time.perf_counter() - start < seconds:
        torch.mm(a, a, out=out)
        float(out[0, 0])  # waits for a GPU
        products += 1
    speed = products * 2 * side**3 / (time.perf_counter() - start)
    if gpus:
        return speed * gpus, f"{gpus} x {torch.cuda.get_device_name()}"
    side_by_side = max(1, min(2, len(os.sched_getaffinity(0)) // torch.get_num_threads()))
    return speed * side_by_side, f"{torch.get_num_threads() * side_by_side} CPU cores"


def _flops(multiply_adds: float) -> str:
    """2 x multiply-adds, as 1.2e15."""
    if not multiply_adds:
        return "0"
    exponent = math.floor(math.log10(2 * multiply_adds))
    return f"{2 * multiply_adds / 10**exponent:.2f}e{exponent}"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"
