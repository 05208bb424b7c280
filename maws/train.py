"""Train one stage, from a shard set to a release.

    deepspeed maws/train.py --stage mae --preset demo --run runs/mae data.shards=shards/ optim.lr=1e-3
    python maws/train.py --stage wsp --preset demo --init-from runs/mae --run runs/wsp --resume auto data.shards=shards/

Exit codes: 0 done, 1 failure, 2 usage, 75 asked to stop and saved (requeue me), 130 Ctrl-C.
"""

import argparse
import dataclasses
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and sys.path and Path(sys.path[0]) == Path(__file__).resolve().parent:
    sys.path.pop(0)  # as a script, this folder is first on the path; `maws` itself comes from the installation

from data_pipeline.ending import leave
from data_pipeline.errors import UserError
from maws import __version__, checkpoint, config, dist, optim, stages
from maws.config import ConfigError, TrainConfig
from maws.data.feed import Feed
from maws.data.loader import open_shards
from maws.data.order import Part
from maws.data.transforms import Preprocess
from maws.engine import Engine, Runtime
from maws.files import write_json
from maws.guard import Guard
from maws.history import History
from maws.log import start as start_log
from maws.meter import Meter
from maws.models import init
from maws.quarantine import Quarantine
from maws.release import describe, open_release, write_release
from maws.saver import Saver
from maws.trainer import INTERRUPTED, Plan, Stopped, StopSignal, Watch, train
from maws.watchdog import Watchdog

log = logging.getLogger("maws.train")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    stop = StopSignal()
    try:
        return run_stage(args, stop)
    except Stopped as stopped:
        log.info("saved at step %d; continue with --resume auto", stopped.step)
        return stopped.code
    except UserError as e:
        if dist.detect().rank == 0 or not isinstance(e, config.UsageError):  # all ranks meet a usage error
            print(f"error: {e}", file=sys.stderr, flush=True)
        return e.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "maws/train.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", required=True, help=f"one of {', '.join(stages.names())}")
    parser.add_argument("--preset", required=True, help="a whole configuration of the stage: vit_b16, demo, debug")
    parser.add_argument("--run", required=True, type=Path, metavar="FOLDER", help="where the run is kept")
    parser.add_argument("--init-from", default="", metavar="RUN", help="start from the weights of a finished run")
    parser.add_argument("--resume", metavar="auto|latest|PATH", help="continue the same run from a checkpoint")
    parser.add_argument("--seed", type=int, help="of order, crops, masks and initial values")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("settings", nargs="*", metavar="group.name=value", help="change single settings of the preset")
    return parser.parse_intermixed_args(argv)  # settings may stand before, between and after flags


def run_stage(args: argparse.Namespace, stop: StopSignal) -> int:
    stage, cfg = stages.load(args.stage), configure(args)
    stages.image_side(cfg.model)
    shards, run = open_shards(cfg.data), args.run
    runtime = Runtime(cfg.engine, cfg.optim)
    start_log(dist.rank())
    if finished(run, cfg, shards.sha256):
        log.info("%s is finished; its release is %s", run, run / "release")
        runtime.close()
        return 0
    watchdog = Watchdog(run, cfg.faults)
    resume_from = claim(run, args.resume)
    lineage = [args.stage]
    if cfg.init_from:
        lineage = [s for s in open_release(cfg.init_from).lineage if s != args.stage] + lineage
    cfg = stage.prepare(cfg, shards, run)
    dataset = stage.dataset(cfg, shards, run, Part(dist.rank(), dist.world_size()))
    plan = Plan.of(cfg, dataset.order.steps_per_epoch)
    record = remember(run, args, cfg, lineage, shards.sha256)

    with runtime.partitioned():
        objective = stage.objective(cfg, shards)
    rules = objective.init_rules()  # type: ignore[operator]
    init.fill(objective, rules, cfg.seed, runtime.gather, writer=dist.rank() == 0)
    init.check(objective, rules, runtime.gather)
    handover = stage.initialise(objective, cfg, runtime.gather)
    groups = optim.groups(objective, stage.param_rules(cfg), cfg.optim.peak_lr, cfg.optim.weight_decay)
    engine = runtime.build(objective, groups, cfg.optim)
    announce(runtime, cfg, plan, record, optim.table(objective, stage.param_rules(cfg)), dataset.order.streams)
    if handover is not None:
        handover.verify(engine, run)

    step = 0
    if resume_from:
        step = checkpoint.load(engine, resume_from, dataset.order.identity)
        log.info("resumed from %s at step %d of %d", resume_from, step, plan.total)
    history = History(run)
    history.add("start", step, ranks=dist.world_size(), launcher=runtime.world.launcher)
    watch = Watch(
        stop, history, Guard(cfg.faults, engine, history, run, plan.snapshot_every), watchdog,
        Saver(engine, run / "checkpoints", cfg.checkpoint, {"order": dataset.order.identity}),
        Meter(cfg.optim.batch_size, plan.total, step),
        Quarantine(run / "quarantine.jsonl", cfg.data.max_bad, dataset.order.samples),
    )  # fmt: skip
    feed = Feed(dataset, step, plan.total, cfg.data.workers, cfg.faults.worker_restarts)
    train(engine, feed, cfg, plan, run, step, watch)
    publish(engine, stage, cfg, shards, run, record, plan)
    history.add("done", plan.total)
    log.info("done: %s", run / "release")
    watchdog.farewell()
    engine.close()
    runtime.close()
    return 0


def configure(args: argparse.Namespace) -> TrainConfig:
    """Preset, then flags, then settings."""
    cfg = config.override(stages.preset(args.stage, args.preset), args.settings)
    if args.seed is not None:
        cfg = dataclasses.replace(cfg, seed=args.seed)
    if args.init_from:
        cfg = dataclasses.replace(cfg, init_from=args.init_from, init_sha256=open_release(args.init_from).sha256)
    return cfg


def finished(run: Path, cfg: TrainConfig, shards: str) -> bool:
    """Is there a release of just this configuration? Raises ConfigError when there is one of another."""
    if not (run / "release" / "config.json").exists():
        return False
    compare(run, cfg, shards)
    return True


def claim(run: Path, resume: str | None) -> Path | None:
    """The checkpoint to continue from. Raises ConfigError when the folder holds a run that nobody said to continue."""
    if resume:
        return checkpoint.find(run, resume)
    if checkpoint.complete(run / "checkpoints"):
        raise ConfigError(
            f"{run} holds a run that is not finished; add --resume auto to continue it, or choose another --run"
        )
    return None


def compare(run: Path, cfg: TrainConfig, shards: str) -> None:
    """Raises ConfigError when the run in the folder is not the one that was asked for."""
    old, new = config.load_json(run / "config.json"), config.to_json(cfg) | {"shards_sha256": shards}
    different = config.differences({k: old.get(k) for k in new}, new)
    if different:
        raise ConfigError(
            f"{run} holds a run with other settings ({'; '.join(different[:5])}); "
            f"repeat its own settings to continue it, or choose another --run"
        )


def remember(run: Path, args: argparse.Namespace, cfg: TrainConfig, lineage: list[str], shards: str) -> dict[str, Any]:
    """Write RUN/config.json, or check that it is the same as what is being continued."""
    record = {
        "stage": args.stage,
        "preset": args.preset,
        "lineage": lineage,
        **config.to_json(cfg),
        "shards_sha256": shards,
        "revision": revision(),
        "versions": versions(),
    }
    if dist.rank() == 0 and (run / "checkpoints").exists() and (run / "config.json").exists():
        compare(run, cfg, shards)
    dist.barrier()
    if dist.rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "config.json", record)
    return record


def revision() -> str:
    """The git revision of the code, with `+` when files were changed since; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"maws": __version__, **{n: version(n) for n in ("torch", "deepspeed", "timm", "transformers")}}


def announce(
    runtime: Runtime, cfg: TrainConfig, plan: Plan, record: dict[str, Any], table: list[Any], streams: int
) -> None:
    """Everything that was derived, before the first step."""
    world = runtime.world
    log.info(
        "%s, preset %s, revision %s, started by %s: %d rank(s) on %s, %s",
        " → ".join(record["lineage"]), record["preset"], record["revision"] or "unknown", world.launcher, world.size,
        runtime.device.type, runtime.precision,
    )  # fmt: skip
    log.info(
        "batch %d = %d ranks x %d images x %d micro-steps, %d streams; %d steps (%s; %d an epoch), warm-up %d, lr %.3g",
        cfg.optim.batch_size, world.size, runtime.micro, runtime.accumulate, streams, plan.total, cfg.optim.length,
        plan.steps_per_epoch, plan.warmup, cfg.optim.peak_lr,
    )  # fmt: skip
    for pattern, treatment, tensors, elements in table:
        log.info("  %-62s %-22s %4d tensors %12s parameters", pattern, treatment, tensors, f"{elements:,}")


def publish(
    engine: Engine, stage: stages.Stage, cfg: Any, shards: Any, run: Path, record: dict[str, Any], plan: Plan
) -> None:
    """Write the release; all ranks take part in making the weights whole."""
    parts = stage.release(engine.objective, cfg, shards, run)
    weights = {}
    for name, value in engine.full_weights(parts.rename):  # those that get a name
        if dist.rank() == 0:
            weights[parts.rename(name)] = value.contiguous()
    if dist.rank() == 0:
        side = stages.image_side(cfg.model)
        trained = {
            "preset": record["preset"], "steps": plan.total, "batch_size": cfg.optim.batch_size, "seed": cfg.seed,
            "init_from": cfg.init_from, "revision": record["revision"],
        }  # fmt: skip
        facts = {
            "stage": record["stage"], "lineage": record["lineage"], "variant": cfg.model.variant,
            "model": describe(stages.shape_of(cfg.model)), "image_size": side, **parts.config,
            "train": trained, "shards_sha256": record["shards_sha256"], "init_sha256": cfg.init_sha256,
        }  # fmt: skip
        write_release(
            run / "release", weights, facts, Preprocess(side, mean=cfg.data.mean, std=cfg.data.std), parts.files
        )
    dist.barrier()


if __name__ == "__main__":
    leave(main())  # also after a failure, where waiting for the other ranks (or for gloo's threads) could hang
