"""Train one stage, from a shard set to a release.

    deepspeed maws/train.py --stage mae --preset demo --run runs/mae data.shards=shards/ optim.lr=1e-3
    python maws/train.py --stage wsp --preset demo --init-from runs/mae --run runs/wsp --resume auto data.shards=shards/

Exit codes: 0 done, 1 failure, 2 usage, 75 asked to stop and saved (requeue me), 130 Ctrl-C.
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and sys.path and Path(sys.path[0]) == Path(__file__).resolve().parent:
    sys.path.pop(0)  # as a script, this folder is first on the path; `maws` itself comes from the installation

from data_pipeline.ending import leave, told
from data_pipeline.errors import UserError
from maws import checkpoint, config, dist, optim, stages, telemetry, twin
from maws.config import TrainConfig
from maws.data.feed import Feed
from maws.data.loader import open_shards
from maws.data.order import Order, Part
from maws.engine import Engine, Runtime
from maws.export import publish
from maws.guard import Guard
from maws.history import History
from maws.log import start as start_log
from maws.meter import Meter, Past, peak_flops
from maws.models import init
from maws.quarantine import Quarantine
from maws.release import open_release
from maws.run_folder import RunLock, claim, finished, remember
from maws.saver import Saver
from maws.stop_signal import INTERRUPTED, Stopped, StopSignal, stop_with_the_launcher
from maws.trainer import Plan, Probe, Watch, train
from maws.watchdog import Watchdog

log = logging.getLogger("maws.train")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.twin:  # before the signals are taken over: Ctrl-C ends a twin at once
        return told(lambda: twin.run(args.stage, args.preset, configure(args), args.run))
    stop = StopSignal()
    try:
        return run_stage(args, stop)
    except Stopped as stopped:
        log.info("%s; continue with --resume auto", stopped)
        return stopped.code
    except UserError as e:
        if dist.started_as_first() or not isinstance(e, config.UsageError):  # all ranks meet a usage error
            print(f"error: {e}", file=sys.stderr, flush=True)
        return e.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        stop.close()


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
    parser.add_argument("--twin", action="store_true", help="rehearse it first: the same, tiny, on two CPU ranks")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("settings", nargs="*", metavar="group.name=value", help="change single settings of the preset")
    return parser.parse_intermixed_args(argv)  # settings may stand before, between and after flags


def run_stage(args: argparse.Namespace, stop: StopSignal) -> int:
    stage, cfg = stages.load(args.stage), configure(args)
    stages.image_side(cfg.model)
    telemetry.check(cfg.log)
    shards, run = open_shards(cfg.data), args.run
    runtime = Runtime(cfg.engine, cfg.optim, stages.shape_of(cfg.model).width)
    start_log(dist.rank())
    if finished(run, cfg, shards.sha256):
        log.info("%s is finished; its release is %s", run, run / "release")
        runtime.close()
        return 0
    if runtime.world.launcher == "torchrun":
        stop_with_the_launcher()
    with Watchdog(run, cfg.faults) as watchdog, RunLock(run) as lock:  # the others learn how this rank leaves
        stop.bound(cfg.faults.stop_seconds, watchdog.farewell)
        return run_watched(args, stage, cfg, shards, runtime, stop, watchdog, lock)


def run_watched(
    args: argparse.Namespace, stage: stages.Stage, cfg: TrainConfig, shards: Any, runtime: Runtime, stop: StopSignal,
    watchdog: Watchdog, lock: RunLock,
) -> int:  # fmt: skip
    run = args.run
    lock.take(make=False)
    resume_from = claim(run, args.resume)
    lineage = [args.stage]
    if cfg.init_from:
        lineage = [s for s in open_release(cfg.init_from).lineage if s != args.stage] + lineage
    cfg = stage.prepare(cfg, shards, run)
    dataset = stage.dataset(cfg, shards, run, Part(dist.rank(), dist.world_size()))
    plan = Plan.of(cfg, dataset.order.steps_per_epoch)
    lock.take()
    record = remember(run, args.stage, args.preset, cfg, lineage, shards.sha256, dataset.order.facts)

    watchdog.pulse(0, "build")
    with runtime.partitioned():
        objective = stage.objective(cfg, shards)
    make_probe = getattr(stage, "probe", None)
    probe = make_probe(objective, cfg, shards, run, dataset.part) if make_probe else None
    rules = objective.init_rules()  # type: ignore[operator]
    init.fill(objective, rules, cfg.seed, runtime.gather, writer=dist.rank() == 0)
    init.check(objective, rules, runtime.gather)
    handover = stage.initialise(objective, cfg, runtime.gather)
    groups = optim.groups(objective, stage.param_rules(cfg), cfg.optim.peak_lr, cfg.optim.weight_decay)
    engine = runtime.build(objective, groups, cfg.optim)
    announce(runtime, cfg, plan, record, optim.table(objective, stage.param_rules(cfg)), dataset.order.streams)
    if handover is not None:
        handover.verify(engine, run)

    step, history = 0, History(run)
    if resume_from:
        watchdog.pulse(0, "load")
        step = checkpoint.load(engine, resume_from, dataset.order.identity, history.updates)
        log.info("resumed from %s at step %d of %d", resume_from, step, plan.total)
    history.start(step, of=plan.total, ranks=dist.world_size(), launcher=runtime.world.launcher)
    watch = watch_over(engine, stage, cfg, plan, run, step, dataset.order, history, stop, watchdog, probe)
    feed = Feed(
        dataset, step, plan.total, cfg.data.workers, cfg.faults.worker_restarts, cfg.data.prefetch,
        restarted=lambda at, facts: history.note("worker_restart", at, **facts),
    )  # fmt: skip
    train(engine, feed, cfg, plan, run, step, watch)
    watchdog.pulse(plan.total, "release")
    publish(engine.objective, stage, cfg, shards, run, record, plan.total)
    history.add("done", plan.total)
    log.info("done: %s", run / "release")
    watchdog.pulse(plan.total, "end")
    engine.close()
    runtime.close()
    return 0


def watch_over(
    engine: Engine, stage: stages.Stage, cfg: TrainConfig, plan: Plan, run: Path, step: int, order: Order,
    history: History, stop: StopSignal, watchdog: Watchdog, probe: Probe | None,
) -> Watch:  # fmt: skip
    """What looks after the training from `step` on."""
    guard = Guard(cfg.faults, engine, history, run, plan.snapshot_every)
    saver = Saver(engine, run / "checkpoints", cfg.checkpoint, {"order": order.identity}, plan.keep_every, history)
    peak = peak_flops(engine.device, engine.runtime.precision, cfg.log.peak_tflops) * dist.world_size()
    meter = Meter(
        cfg.optim.batch_size, plan.total, step, stage.cost(cfg).training_flops, peak, engine.device,
        past=Past.of(run, step) if dist.rank() == 0 else Past(),
    )  # fmt: skip
    quarantine = Quarantine(run / "quarantine.jsonl", cfg.data.max_bad, order.samples)
    return Watch(stop, history, guard, watchdog, saver, meter, quarantine, probe)


def configure(args: argparse.Namespace) -> TrainConfig:
    """Preset, then flags, then settings."""
    cfg = config.override(stages.preset(args.stage, args.preset), args.settings)
    if args.seed is not None:
        cfg = dataclasses.replace(cfg, seed=args.seed)
    if args.init_from:
        cfg = dataclasses.replace(cfg, init_from=args.init_from, init_sha256=open_release(args.init_from).sha256)
    return cfg


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
    log.info("DeepSpeed settings: %s (%s)", runtime.ds_config, runtime.ds_config_why)
    for pattern, treatment, tensors, elements in table:
        log.info("  %-62s %-22s %4d tensors %12s parameters", pattern, treatment, tensors, f"{elements:,}")


if __name__ == "__main__":
    leave(main())  # also after a failure, where waiting for the other ranks (or for gloo's threads) could hang
