"""maws/train.py --twin: the training that was asked for, small enough for two CPU ranks and a minute, before it.

    python maws/train.py --twin --stage mae --preset vit_6.5b14 --run runs/big [data.shards=…] [group.name=value …]

It takes the same path: same stage, objective and engine settings (maws/twin_config.py shrinks sizes and lengths, and
says which), on the given shard set or one made on the spot. Two ranks train, are killed, go on from their checkpoint,
release; the checkpoint is exported. Each part is a line that says whether it held.
"""

import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import UserError
from maws import checkpoint, dist, stages
from maws.config import ConfigError, TrainConfig
from maws.files import json_lines, write_json
from maws.launch import Ranks, start_ranks
from maws.release import open_release, read_weights
from maws.twin_config import EVERY, RANKS, STEPS, donor, settings, shrink, shrink_ds_config
from maws.twin_data import make_shards

log = logging.getLogger(__name__)

MARK = "twin.json"  # in a folder that a twin made, and that the next one may remove
PATIENCE = 600.0  # seconds for each start
KILL_AT = EVERY + 4  # steps: between two checkpoints


def run(stage: str, preset: str, cfg: TrainConfig, run: Path) -> int:
    """0 when everything held, 1 otherwise. Under a launcher the first rank does it, with two ranks of its own."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not dist.started_as_first():
        return 0
    folder = run.with_name(f"{run.name}.twin")
    _clear(folder)
    folder.mkdir(parents=True)
    write_json(folder / MARK, {"stage": stage, "preset": preset})
    tiny, changed = shrink(stage, cfg)
    changed += shrink_ds_config(cfg, folder / "ds_config.json")
    log.info("twin of %s %s in %s: %d CPU ranks, %d steps; changed are", stage, preset, folder, RANKS, STEPS)
    for line in changed:
        log.info("  %s", line)
    if not cfg.data.shards:
        log.info("  data.shards: (none) -> 96 coloured squares, made now")
        tiny = replace(tiny, data=replace(tiny.data, shards=str(make_shards(folder / "shards"))))
    ds_config = str((folder / "ds_config.json").resolve())
    tiny = replace(tiny, engine=replace(tiny.engine, ds_config=ds_config), init_from="", init_sha256="")
    twin = Twin(stage, preset, tiny, folder, starts_from=bool(cfg.init_from) or stage == "lit")
    held = twin.rehearse()
    log.info("%s", "the twin held: what is left to find out needs the real size" if held else "the twin did not hold")
    return 0 if held else 1


def _clear(folder: Path) -> None:
    if folder.exists() and not (folder / MARK).is_file():
        raise ConfigError(f"{folder} is there and no twin made it; choose another --run")
    shutil.rmtree(folder, ignore_errors=True)


class Failed(Exception):
    """A part did not hold; the rest cannot be tried."""


class Twin:
    """The parts, in turn; what each found is one line."""

    def __init__(self, stage: str, preset: str, cfg: TrainConfig, folder: Path, starts_from: bool) -> None:
        self.stage, self.preset, self.cfg, self.folder, self.run = stage, preset, cfg, folder, folder / "run"
        self.starts_from, self.started = starts_from, time.monotonic()
        self.before: dict[int, dict[str, Any]] = {}

    def rehearse(self) -> bool:
        """All parts; False when one did not hold."""
        parts: list[tuple[str, Callable[[], str]]] = [
            ("stepped and saved", self._train_and_kill), ("resumed to the bit", self._resume),
            ("loss fell", self._loss), ("released", self._release), ("exported", self._export),
        ]  # fmt: skip
        if self.starts_from:
            parts.insert(0, ("made a tower to start from", self._donor))
        for name, part in parts:
            try:
                log.info("ok      %-28s %s", name, part())
            except (Failed, UserError) as e:
                log.info("FAILED  %-28s %s", name, e)
                return False
        log.info("        %.0f s in all", time.monotonic() - self.started)
        return True

    def _arguments(self, *more: str) -> list[str]:
        base = stages.preset(self.stage, self.preset)
        source = ["--init-from", str(self.folder / "tower")] if self.starts_from else []
        return ["--stage", self.stage, "--preset", self.preset, "--run", str(self.run), *source, *more,
                *settings(base, self.cfg)]  # fmt: skip

    def _donor(self) -> str:
        stage, cfg = donor(self.cfg)
        cfg = replace(cfg, data=replace(cfg.data, shards=self.cfg.data.shards))
        arguments = ["--stage", stage, "--preset", "debug", "--run", str(self.folder / "tower")]
        changed = settings(stages.preset(stage, "debug"), cfg)
        with self._ranks([*arguments, *changed], ranks=1, log="tower_log") as ranks:
            self._ended(ranks)
        return f"{stage}, 2 steps"

    def _train_and_kill(self) -> str:
        with self._ranks(self._arguments()) as ranks:
            until = time.monotonic() + PATIENCE
            while len(self._lines()) < KILL_AT or not checkpoint.complete(self.run / "checkpoints"):
                if any(p.poll() is not None for p in ranks.processes) or time.monotonic() > until:
                    raise Failed(f"the ranks ended early:\n{_last_words(ranks)}")
                time.sleep(0.005)
            for rank in range(RANKS):
                ranks.kill(rank, signal.SIGKILL)
            ranks.wait(PATIENCE)
        self.before = self._lines()
        saved = [path.name for path in checkpoint.complete(self.run / "checkpoints")]
        return f"{len(self.before)} steps, then killed; whole: {', '.join(saved)}"

    def _resume(self) -> str:
        """Steps between the oldest checkpoint and the kill are taken again."""
        first = min(checkpoint.complete(self.run / "checkpoints"), key=lambda path: path.name)
        with self._ranks(self._arguments("--resume", str(first))) as ranks:
            self._ended(ranks)
        after = self._lines()
        again = [step for step in self.before if int(first.name.removeprefix("step_")) < step]
        for step in again:
            for name in ("train/loss", "train/grad_norm", "train/lr"):
                if self.before[step].get(name) != after[step].get(name):
                    raise Failed(
                        f"{name} of step {step}: {self.before[step].get(name)} before, {after[step].get(name)}"
                    )
        if not again:
            raise Failed(f"no step was taken twice: killed at {max(self.before)}, resumed from {first.name}")
        return f"from {first.name}: losses and gradient norms of {len(again)} steps are the same"

    def _loss(self) -> str:
        losses = [line["train/loss"] for _, line in sorted(self._lines().items())]
        if len(losses) != STEPS:
            raise Failed(f"{len(losses)} of {STEPS} steps are in metrics.jsonl")
        quarter = STEPS // 4
        first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
        if not last < first:
            raise Failed(f"mean of the first {quarter} steps {first:.4f}, of the last {last:.4f}")
        return f"{first:.4f} -> {last:.4f}, means of {quarter} steps"

    def _release(self) -> str:
        release = open_release(self.run)
        weights = read_weights(release)
        if bad := [name for name, value in weights.items() if not bool(value.isfinite().all())]:
            raise Failed(f"{bad[0]} is not finite")
        return f"{len(weights)} tensors, all finite"

    def _export(self) -> str:
        from maws.export import export

        logging.getLogger("maws.export").setLevel(logging.WARNING)
        out = export(self.run, self.folder / "export")
        released, exported = read_weights(open_release(self.run)), read_weights(open_release(out))
        if released.keys() != exported.keys():
            raise Failed(f"other tensors than in the release: {sorted(released.keys() ^ exported.keys())[:3]}")
        if different := [name for name, value in released.items() if not torch.equal(value, exported[name])]:
            raise Failed(f"{different[0]} differs from the release")
        return "from the last checkpoint's files, equal to the release"

    @contextmanager
    def _ranks(self, arguments: list[str], ranks: int = RANKS, log: str = "log") -> Iterator[Ranks]:
        with start_ranks(ranks, arguments, {"OMP_NUM_THREADS": "1"}, log=self.folder / log) as started:
            yield started

    def _ended(self, ranks: Ranks) -> None:
        codes = ranks.wait(PATIENCE)
        if any(code != 0 for code in codes):
            raise Failed(f"exit codes {codes}:\n{_last_words(ranks)}")

    def _lines(self) -> dict[int, dict[str, Any]]:
        return {line["step"]: line for line in json_lines(self.run / "metrics.jsonl") if "train/loss" in line}


def _last_words(ranks: Ranks) -> str:
    return "\n".join(
        f"  rank {i}: {line}" for i in range(len(ranks.processes)) for line in ranks.printed(i).splitlines()[-8:]
    )
