"""Which samples a step of a run has, written down again from its settings: the order is a function, not a state.

    python -m maws ledger runs/mae --step 12:15          python -m maws ledger runs/mae --key fluent-emoji-1f23a
    python -m maws ledger runs/mae --check               (with RUN/keys, which log.keys=yes writes)

Steps count from 0, A:B ends before B, as in RUN/keys. Steps that a rewind left out (RUN/events.jsonl) and samples that
could not be read and were replaced (RUN/quarantine.jsonl) are marked. Reads the shard set's indexes and no picture.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.errors import DataError, UsageError
from data_pipeline.shardset import ShardSet
from maws.config import ConfigError, Duration, load_json
from maws.data.order import MAX_REPLACEMENTS, Item, Order, Part
from maws.files import json_lines

THREADS = 16  # reading waits for the disk or the network


@dataclass(frozen=True)
class Ledger:
    """A run's order, and what became of it."""

    order: Order
    total: int  # steps of the whole run
    done: int  # steps taken so far
    skipped: dict[int, str]  # step -> why
    bad: dict[str, str]  # key -> reason

    @classmethod
    def open(cls, run: Path, moved: str = "") -> "Ledger":
        """Raises ConfigError when there is no run, DataError when its shard set is gone or is another one."""
        record = _record(run)
        shards = _shards(run, record, moved)
        facts = record["order"]
        order = Order(shards, facts["seed"], facts["batch_size"], **{k: facts[k] for k in _ORDER})
        total = max(1, Duration.parse(record["optim"]["length"]).steps(order.steps_per_epoch))
        events = json_lines(run / "events.jsonl")
        skipped = {e["step"]: str(e.get("why", "")) for e in events if e.get("event") == "rewind"}
        bad = {e["key"]: str(e["reason"]) for e in json_lines(run / "quarantine.jsonl") if {"key", "reason"} <= set(e)}
        steps = [e["step"] for e in [*json_lines(run / "metrics.jsonl"), *events] if isinstance(e.get("step"), int)]
        return cls(order, total, min(total, max(steps, default=0)), skipped, bad)

    def entry(self, step: int, part: Part = Part()) -> dict[str, Any]:
        """One line: the keys the order gives, why none of them was used, and what stood in for which."""
        places = list(self._places(step, part))
        line: dict[str, Any] = {"step": step, "keys": [planned.key for planned, _ in places]}
        if step in self.skipped:
            line["skipped"] = self.skipped[step]
        replaced = [
            {"key": planned.key, "by": used.key, "reason": self.bad[planned.key]}
            for planned, used in places
            if planned is not used
        ]
        return line | ({"replaced": replaced} if replaced else {})

    def used(self, step: int) -> list[str]:
        """The keys whose pictures the step was taken with; none where it is left out."""
        return [] if step in self.skipped else [used.key for _, used in self._places(step, Part())]

    def _places(self, step: int, part: Part) -> Iterator[tuple[Item, Item]]:
        """What the order gives for each place of a batch, and what took the place: the next of its stream that is
        whole, as in the loader."""
        for s in range(part.rank, self.order.streams, part.world):
            for place in range(self.order.per_stream):
                planned = used = self.order.item(s, step, place)
                for skip in range(1, MAX_REPLACEMENTS):
                    if used.key not in self.bad:
                        break
                    used = self.order.item(s, step, place, skip)
                yield planned, used

    def steps_of(self, key: str) -> list[dict[str, Any]]:
        """The steps done so far that a sample was given to. Raises DataError for a key that the shard set has not."""
        shard, row = find(self.order.shards, key)
        epochs = -(-self.done // self.order.steps_per_epoch)
        steps = [step for epoch in range(epochs) for step in self.order.steps_of(shard, row, epoch) if step < self.done]
        return [
            {"step": step, "times": times}
            | ({"skipped": self.skipped[step]} if step in self.skipped else {})
            | ({"replaced": self.bad[key]} if key in self.bad else {})
            for step, times in sorted(Counter(steps).items())
        ]


_ORDER = ("streams", "window", "resample", "labelled")


def _record(run: Path) -> dict[str, Any]:
    if not (run / "config.json").is_file():
        raise ConfigError(f"no run at {run}: it has no config.json; name a folder that was --run of a training")
    record = load_json(run / "config.json")
    try:
        missing = {"seed", "batch_size", *_ORDER} - set(record["order"])
        complete = not missing and {record["shards_sha256"], record["data"]["shards"], record["optim"]["length"]}
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise ConfigError(
            f"{run / 'config.json'} does not say in which order the samples came: it was written by an older version; "
            f"continue the run with this one (--resume auto), which writes it anew"
        )
    return record


def _shards(run: Path, record: dict[str, Any], moved: str) -> ShardSet:
    """The run's shard set, where it was or has moved to. Raises DataError when it is not the one."""
    place = moved or record["data"]["shards"]
    try:
        shards = ShardSet.open(place)
    except DataError as e:
        raise DataError(f"{e}" if moved else f"{e}; if the run's shard set has moved, add --shards FOLDER") from None
    if shards.sha256 != record["shards_sha256"]:
        raise DataError(
            f"{place} is not the shard set of {run}: the hash of its manifest is {shards.sha256[:12]}…, the run was "
            f"trained on {record['shards_sha256'][:12]}…; name the right one with --shards FOLDER"
        )
    return shards


def find(shards: ShardSet, key: str) -> tuple[int, int]:
    """Shard and row of a sample. Raises DataError when there is none of that key."""

    def look(shard: int) -> int:
        keys = pq.read_table(shards.tar_path(shard).with_suffix(".parquet"), columns=["key"], use_threads=False)["key"]
        return pc.index(keys, key).as_py()  # type: ignore[attr-defined]  # made at run time

    with ThreadPoolExecutor(THREADS) as pool:
        for shard, row in enumerate(pool.map(look, range(shards.num_shards))):
            if row >= 0:
                return shard, row
    raise DataError(f"no sample of {shards.path} has the key {key!r}")


# --------------------------------------------------------------------------------------------------------- command line


def run(options: argparse.Namespace) -> int:
    wanted = [name for name in ("step", "key", "check") if getattr(options, name)]
    if len(wanted) != 1:
        raise UsageError("say what to look up: one of --step N, --step A:B, --key KEY or --check")
    if options.rank is not None and not (options.step and options.ranks):
        raise UsageError("--rank R goes with --ranks W and --step: the share of rank R of W")
    ledger = Ledger.open(options.run, options.shards)
    if options.check:
        return _check(ledger, options.run)
    if options.key:
        return _show(ledger.steps_of(options.key), options.json, f"{options.key} was in none of {ledger.done} steps")
    part = Part()
    if options.ranks:
        ledger.order.check_world(options.ranks)
        part = Part(options.rank or 0, options.ranks)
        if not 0 <= part.rank < part.world:
            raise UsageError(f"--rank {part.rank} of --ranks {part.world}: ranks count from 0 to {part.world - 1}")
    return _show((ledger.entry(step, part) for step in steps_in(options.step, ledger.total)), options.json)


def steps_in(text: str, total: int) -> range:
    """`12` or `12:15`. Raises UsageError for what is neither, or outside of the run."""
    first, colon, last = text.partition(":")
    try:
        start = int(first)
        stop = int(last) if colon else start + 1
    except ValueError:
        raise UsageError(f"--step {text} is not a step; write 12, or 12:15 for the steps 12, 13 and 14") from None
    if not 0 <= start < stop <= total:
        raise UsageError(f"--step {text} is outside of the run: its steps are 0:{total}")
    return range(start, stop)


def _show(lines: Iterable[dict[str, Any]], as_json: bool, nothing: str = "") -> int:
    """Results go to stdout, one a line."""
    empty = True
    for line in lines:
        empty = False
        sys.stdout.write((json.dumps(line) if as_json else _text(line)) + "\n")
    if empty and nothing:
        sys.stderr.write(nothing + "\n")
    return 0


def _text(line: dict[str, Any]) -> str:
    words = [f"step {line['step']}"]
    if line.get("times", 1) > 1:
        words.append(f"{line['times']} times")
    if "skipped" in line:
        words.append(f"left out ({line['skipped']})")
    for entry in line["replaced"] if isinstance(line.get("replaced"), list) else []:
        words.append(f"{entry['key']} replaced by {entry['by']} ({entry['reason']})")
    if isinstance(line.get("replaced"), str):
        words.append(f"replaced ({line['replaced']})")
    return ", ".join(words) + (": " + " ".join(line["keys"]) if "keys" in line else "")


def _check(ledger: Ledger, run: Path) -> int:
    """Compare with what the ranks wrote; 1 when a step had other samples."""
    written: dict[int, list[str]] = {}
    for path in sorted((run / "keys").glob("rank_*.jsonl")):
        for line in json_lines(path):
            written.setdefault(line["step"], []).extend(line["keys"])
    if not written:
        raise DataError(f"{run / 'keys'} has no lines; a run writes them with log.keys=yes")
    wrong = [step for step, keys in sorted(written.items()) if sorted(keys) != sorted(ledger.used(step))]
    last = max(written)
    if last in wrong and not Counter(written[last]) - Counter(ledger.used(last)):
        wrong.remove(last)  # not all ranks had written their line when the run ended
    first, steps = min(written), len(written)
    if wrong:
        shown = ", ".join(map(str, wrong[:10])) + (", …" if len(wrong) > 10 else "")
        sys.stdout.write(f"{len(wrong)} of {steps} steps had other samples than the order gives: {shown}\n")
        return 1
    gap = "" if steps == last - first + 1 else f", {last - first + 1 - steps} between them are not written"
    sys.stdout.write(f"{steps} steps ({first} to {last}{gap}) had the samples that the order gives\n")
    return 0
