"""Prove that a training can be killed at any moment and goes on as if nothing had happened; or show that it cannot.

    python -m maws verify-resume --stage mae --preset debug --ranks 4,2,1,2 --output runs/proof data.shards=shards/

    straight      4 ranks  0 ───────────────────────────────────────▶ 40
    interrupted   4 ranks  0 ─────────────✗
                  2 ranks       10 ───────────────✗ in a save
                  1 rank                20 ──────────────────✗
                  2 ranks                            30 ────────────▶ 40     the same samples, losses, weights?

Both are real processes of maws/train.py, killed by SIGKILL. On one number of ranks throughout, everything must be the
same to the bit; on several, sums of floats are taken in another order, and differences must stay within a tolerance.
"""

import argparse
import itertools
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from data_pipeline.errors import UserError
from maws import stages
from maws.compare_runs import Found, Tolerance, compare, lines_of
from maws.config import ConfigError
from maws.files import write_json
from maws.history import read as events_of
from maws.launch import Ranks, Script, Starter, start_ranks

# Many times what the debug presets differ by after 40 steps on 4, 2 and 1 ranks (losses by up to 5e-7,
# weights by 5e-4). Weights have a wide bound: a key's bias changes no attention, so that its gradient is nothing but
# rounding, which Adam makes as large as any other's. Batch norm over ranks can make rounding larger too (lc_mae).
TOLERANCES: Final = {
    "mae": Tolerance(loss=2e-5, grad_norm=1e-3, weights=1e-2),
    "simmim": Tolerance(loss=3e-4, grad_norm=1e-2, weights=1e-2),
    "lc_mae": Tolerance(loss=5e-3, grad_norm=1e-1, weights=1e-2),
    "wsp": Tolerance(loss=2e-5, grad_norm=1e-3, weights=1e-2),
    "lit": Tolerance(loss=5e-5, grad_norm=1e-3, weights=1e-2),
}
POLL: Final = 0.0005  # seconds between two looks at a run: a save of a small model takes few milliseconds
LEAVING: Final = 120.0  # seconds that the other ranks have to end once one has failed


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be proved."""

    stage: str
    preset: str
    output: Path
    settings: tuple[str, ...] = ()
    init_from: str = ""
    ranks: tuple[int, ...] = (2, 2, 1, 2)  # of the first start, the second, … and again from the front
    kills: int = -1  # -1: one for each further number of ranks
    seed: int = 0  # of the moments
    tolerance: float = 0.0  # of losses; 0: the stage's own


@dataclass
class Start:
    """One start of the run that is killed, and its end."""

    ranks: int
    begun_at: int = 0  # step
    killed_at: int | None = None  # the last step it had logged; none: it was left to finish
    during: str = ""  # step or save
    left: list[str] = field(default_factory=list)  # what the kill left in the folder of checkpoints, half written


@dataclass
class Certificate:
    """What was done and what was found."""

    asked: Asked
    about: dict[str, Any]
    starts: list[Start]
    tolerance: Tolerance | None  # none: to the bit
    found: Found | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        asked = {**asdict(self.asked), "output": str(self.asked.output)}
        return {
            "verdict": "PASSED" if self.passed else "FAILED", "asked": asked, **self.about,
            "starts": [asdict(s) for s in self.starts], "tolerance": self.tolerance and asdict(self.tolerance),
            "found": self.found and self.found.to_json(), "failures": self.failures,
        }  # fmt: skip


class RunFailed(UserError):
    """A run ended by itself, and not well."""


def run(options: argparse.Namespace) -> int:
    certificate = verify(
        Asked(
            stage=options.stage, preset=options.preset, output=options.output, settings=tuple(options.settings),
            init_from=options.init_from, ranks=numbers(options.ranks), kills=options.kills, seed=options.seed,
            tolerance=options.tolerance,
        )
    )  # fmt: skip
    sys.stdout.write("\n".join(text(certificate)) + "\n")
    return 0 if certificate.passed else 1


def numbers(given: str) -> tuple[int, ...]:
    parts = given.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--ranks {given} is not a list of numbers of ranks; for example 4,2,1,2")
    return tuple(map(int, parts))


def verify(asked: Asked, starter: Starter = Script) -> Certificate:
    """Train straight, train with kills, compare; the certificate is also written to OUTPUT/certificate.json.

    Raises ConfigError when the configuration or the folder cannot be used, RunFailed when the straight run fails.
    """
    stages.preset(asked.stage, asked.preset)  # an unknown name is told at once
    if asked.output.exists() and any(asked.output.iterdir()):
        raise ConfigError(f"{asked.output} is not empty; choose another --output")
    straight, killed = asked.output / "straight", asked.output / "interrupted"
    with start_ranks(
        asked.ranks[0], arguments(asked, straight), log=asked.output / "log_straight", starter=starter
    ) as r:
        finish(r)
    lines = lines_of(straight)
    certificate = Certificate(asked, about(straight), [], tolerance_of(asked))
    try:
        for moment in [*moments(asked, max(lines)), None]:
            certificate.starts.append(one_start(asked, killed, len(certificate.starts), moment, starter))
            if certificate.starts[-1].killed_at is None:
                break
        certificate.found = compare(straight, killed)
        allowed = certificate.tolerance
        certificate.failures = certificate.found.beyond(allowed or Tolerance())
        if allowed is None and not certificate.found.same() and not certificate.failures:
            certificate.failures = [f"the state differs by {certificate.found.state.largest:.2g}"]
        if len(certificate.starts) == 1 and asked.kills:
            certificate.failures.append("the run was done before it could be killed: make it longer")
    except (RunFailed, ValueError) as e:
        certificate.failures.append(f"the interrupted run failed: {e}")
    write_json(asked.output / "certificate.json", certificate.to_json())
    return certificate


def arguments(asked: Asked, run: Path) -> list[str]:
    out = ["--stage", asked.stage, "--preset", asked.preset, "--run", str(run), "--resume", "auto"]
    out += ["--init-from", asked.init_from] if asked.init_from else []
    return [*out, *asked.settings, "log.every=1", "log.keys=yes"]


def moments(asked: Asked, steps: int) -> list[tuple[int, str]]:
    """Random moments, each in its part of the run, so that every start takes steps: (step, in a step or in a save)."""
    rng = random.Random(asked.seed)
    count = len(asked.ranks) - 1 if asked.kills < 0 else asked.kills
    bounds = [1 + (steps - 1) * i // count for i in range(count + 1)] if count else []
    steps_of = [rng.randrange(a, max(b, a + 1)) for a, b in itertools.pairwise(bounds)]
    kinds = ["save" if (i + rng.randrange(2)) % 2 else "step" for i in range(count)]
    if "save" not in kinds and count > 1:
        kinds[rng.randrange(count)] = "save"
    return list(zip(steps_of, kinds, strict=True))


def one_start(asked: Asked, run: Path, number: int, moment: tuple[int, str] | None, starter: Starter) -> Start:
    """Start or resume the run, kill all its ranks at the moment, or let it finish."""
    start, begun = Start(asked.ranks[number % len(asked.ranks)]), time.time()
    log = asked.output / "log_interrupted"
    with start_ranks(start.ranks, arguments(asked, run), log=log, starter=starter) as ranks:
        if moment is not None and reached(ranks, run, *moment, begun):
            ranks.end()
            start.during = moment[1]
            start.left = sorted(p.name for p in (run / "checkpoints").glob("tmp-*"))
            start.killed_at = newest_step(run, begun)
        else:
            finish(ranks)
    begins = [e["step"] for e in events_of(run / "events.jsonl") if e["event"] == "start"]
    start.begun_at = begins[-1] if len(begins) > number else 0
    return start


def reached(ranks: Ranks, run: Path, step: int, kind: str, begun: float) -> bool:
    """Wait until this start has come to the moment: False when it ended before."""
    there = False
    while all(p.poll() is None for p in ranks.processes):
        there = there or newest_step(run, begun) >= step
        if there and (kind == "step" or any((run / "checkpoints").glob("tmp-step_*"))):
            return True
        time.sleep(POLL)
    return False


def newest_step(run: Path, since: float) -> int:
    """The last step in metrics.jsonl that was logged after `since`, which leaves out those of earlier starts."""
    try:
        with (run / "metrics.jsonl").open("rb") as f:
            f.seek(max(0, f.seek(0, 2) - 4096))
            lines = f.read().split(b"\n")[1:-1]
        newest = json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return 0
    return newest["step"] if newest["time"] > since else 0


def finish(ranks: Ranks) -> None:
    """Wait for the end. Raises RunFailed with the last words when it is not a good one."""
    codes = ranks.wait(POLL)
    while None in codes and not any(codes):
        codes = ranks.wait(1.0)
    codes = ranks.wait(LEAVING)
    if any(codes):
        first = next(rank for rank, code in enumerate(codes) if code)
        words = ranks.printed(first).strip().splitlines()[-3:]
        raise RunFailed(f"rank {first} of {len(codes)} ended with exit code {codes[first]}: {' / '.join(words)}")


def about(run: Path) -> dict[str, Any]:
    record = json.loads((run / "config.json").read_text())
    return {name: record[name] for name in ("revision", "versions", "seed", "shards_sha256")}


def tolerance_of(asked: Asked) -> Tolerance | None:
    """None: to the bit, because the number of ranks never changes. --tolerance widens all bounds alike."""
    if len(set(asked.ranks)) == 1:
        return None
    own = TOLERANCES.get(asked.stage, TOLERANCES["mae"])
    return own.times(asked.tolerance / own.loss) if asked.tolerance else own


def text(certificate: Certificate) -> list[str]:
    """The certificate for people."""
    asked, found = certificate.asked, certificate.found
    versions = ", ".join(f"{name} {version}" for name, version in certificate.about["versions"].items())
    out = [
        f"{asked.stage}, preset {asked.preset} {' '.join(asked.settings)}".rstrip(),
        f"revision {certificate.about['revision'] or 'unknown'}; {versions}",
        f"straight       {_ranks(asked.ranks[0])}",
    ]
    for start in certificate.starts:
        end = "finished" if start.killed_at is None else f"killed at step {start.killed_at} in a {start.during}"
        left = f", which left {', '.join(start.left)}" if start.left else ""
        out.append(f"interrupted    {_ranks(start.ranks)}, from step {start.begun_at:>4}, {end}{left}")
    if found:
        limit = certificate.tolerance
        out.append(f"samples        {found.samples or f'the same in each of {found.steps} steps'}")
        rows = [("loss", limit and limit.loss), ("lr", 0.0), ("grad_norm", limit and limit.grad_norm),
                ("weights", limit and limit.weights), ("state", None)]  # fmt: skip
        for name, allowed in rows:
            kind = getattr(found, name)
            bound = "" if limit is None or allowed is None else f", {allowed:.2g} allowed"
            seen = f"largest difference {kind.largest:.2g} ({kind.where}){bound}" if kind.largest else "the same"
            out.append(f"{name.replace('_', ' '):<14} {seen}")
    out += [f"failure        {failure}" for failure in certificate.failures]
    return [*out, "PASSED" if certificate.passed else "FAILED"]


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ' '}"
