"""How each run's training went, from metrics.jsonl, events.jsonl and quarantine.jsonl: the report's table and curves.

Older runs lack some of these files or numbers; what is not known is None, and stays empty on the page.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.figures import Curve
from eval.report_runs import Run
from maws import history

WARMING_UP = 0.02  # share of a run's lines, at its beginning, that say nothing of its speed


@dataclass(frozen=True)
class Course:
    """One run's training in numbers."""

    run: Run
    images_per_second: float | None  # median
    data_wait: float | None  # median share of a step's time
    mfu: float | None  # median
    memory_gib: float | None  # the most of any rank
    goodput: float | None
    restarts: int | None  # None: nobody wrote that down
    rewinds: int | None
    lost_steps: int | None
    bad_samples: int
    grad_norm: tuple[float, float] | None  # median, largest
    probes: list[tuple[str, float, float | None]]  # name, last score, chance
    marks: list[int]  # steps at which the run was set back


def course(run: Run) -> Course:
    """What the files of one run folder say."""
    events = history.read(run.folder / "events.jsonl")
    rewinds = [e["step"] for e in events if e["event"] == "rewind"]
    norms = run.series("train/grad_norm")[1]
    goodput = history.goodput(events, run.metrics) or run.last("run/goodput")
    return Course(
        run=run,
        images_per_second=_median(_warm(run.series("train/images_per_second")[1])),
        data_wait=_median(_warm(run.series("data/wait_share")[1])),
        mfu=_median(_warm(run.series("train/mfu")[1])),
        memory_gib=max(_all(run, "memory/device_gib") or _all(run, "memory/process_gib"), default=None),
        goodput=goodput,
        restarts=history.restarts(events) if events else None,
        rewinds=len(rewinds) if events else None,
        lost_steps=history.lost_steps(events) if events else None,
        bad_samples=bad_samples(run.folder / "quarantine.jsonl"),
        grad_norm=(statistics.median(norms), max(norms)) if norms else None,
        probes=[(n, score, _chance(run, n)) for n in probe_names(run) if (score := _score(run, n)) is not None],
        marks=rewinds,
    )


def probe_names(run: Run) -> list[str]:
    """`knn_top1`, `zeroshot_top1`: what was measured while the run trained."""
    logged = {name for line in run.metrics for name in line if name.startswith("probe/")}
    return sorted(name.removeprefix("probe/") for name in logged if not name.endswith("_chance"))


def bad_samples(path: Path) -> int:
    """Samples that were left out; each is listed once."""
    keys = set()
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    for line in text.splitlines():
        try:
            keys.add(json.loads(line)["key"])
        except (ValueError, KeyError, TypeError):  # half a line of a killed writer
            continue
    return len(keys)


def panels(courses: Sequence[Course]) -> dict[str, list[Curve]]:
    """Title of a panel -> a curve for each run that has the number."""
    found: dict[str, list[Curve]] = {}
    wanted = [("images a second", "train/images_per_second", 1.0), ("gradient norm", "train/grad_norm", 1.0)]
    for name in sorted({name for c in courses for name in probe_names(c.run)}):
        wanted.append((f"probe {name.replace('_', ' ')}, %", f"probe/{name}", 100.0))
    for title, metric, scale in wanted:
        for c in courses:
            steps, values = c.run.series(metric)
            if metric == "train/images_per_second":
                skipped = len(steps) - len(_warm(values))
                steps, values = steps[skipped:], values[skipped:]
            if len(steps) > 1:
                curve = Curve(c.run.title, steps, [scale * v for v in values], c.marks)
                found.setdefault(title, []).append(curve)
    return found


def _score(run: Run, probe: str) -> float | None:
    return run.last(f"probe/{probe}")


def _chance(run: Run, probe: str) -> float | None:
    return run.last(f"probe/{probe.rpartition('_')[0]}_chance")


def _warm(values: Sequence[float]) -> Sequence[float]:
    """Without the first lines: compiling, filling caches, starting workers."""
    return values[max(1, round(WARMING_UP * len(values))) :] if len(values) > 1 else values


def _all(run: Run, name: str) -> list[float]:
    return run.series(name)[1]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
