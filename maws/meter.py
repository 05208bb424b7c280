"""What a training tells: means since the last logged line, speed, waiting, memory, and how long it will take.

    step 480/5000 (9%)  loss 0.4312  lr 1.50e-04  512 images/s  data wait 3 ms (1%)  MFU 41.2%  18.3 GiB  1:12:40 left

A step's time runs from the end of the last one, waiting for data included. What happens between steps (checkpoints,
probes, rewinds) is set aside: it counts in the time that is left, and against goodput, not in the speed.
"""

import logging
import math
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from maws import devices, dist
from maws.devices import GIB
from maws.history import read, read_metrics, useful_seconds
from maws.log import duration

log = logging.getLogger(__name__)

HORIZON = 600.0  # seconds after which a step counts 1/e in the speed that the time left is made from
QUIET = 2.0  # seconds between lines for people


@dataclass(frozen=True)
class Past:
    """What a run had behind it when this process started."""

    useful: float = 0.0  # seconds of steps that count
    began: float = field(default_factory=time.time)  # when it was first started, seconds since 1970

    @classmethod
    def of(cls, run: Path, start: int) -> "Past":
        """From RUN/metrics.jsonl, up to the step that is resumed from, and RUN/events.jsonl."""
        events = read(run / "events.jsonl")
        lines = [line for line in read_metrics(run) if line["step"] <= start]
        return cls(useful_seconds(events, lines), min((e["time"] for e in events), default=time.time()))


@dataclass
class Meter:
    """Sums up steps between two logged lines. All ranks make one and call it alike; rank 0's numbers are kept."""

    batch_size: int
    total: int
    start: int  # the step this process began with
    flops: float = 0.0  # of one image in training, forward and backward; 0: not known
    peak_flops: float = 0.0  # a second, of all devices together; 0: not known
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    past: Past = field(default_factory=Past)
    spoke: float = -math.inf

    def __post_init__(self) -> None:
        self.mark = time.perf_counter()  # the end of the last step, or of what came after it
        self.step = self.start
        self.useful = self.past.useful
        self.aside_seconds, self.recent_seconds, self.recent_steps = 0.0, 0.0, 0.0
        self._clear()

    def _clear(self) -> None:
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        self.sums: dict[str, float] = {}

    def add(self, losses: dict[str, float], waited: float) -> None:
        """One step was taken; `waited` seconds of it for its batch."""
        took = self._since_mark()
        self.step += 1
        self.steps += 1
        self.seconds += took
        self.waited += waited
        self.useful += took
        if self.step > self.start + 1:  # the first one also warms up: it says nothing of the others
            fade = math.exp(-took / HORIZON)
            self.recent_seconds = fade * self.recent_seconds + took
            self.recent_steps = fade * self.recent_steps + 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def aside(self) -> None:
        """The time since the last step went into something else: a checkpoint, a probe."""
        self.aside_seconds += self._since_mark()

    def skip(self) -> None:
        """A step was passed over without training."""
        self.step += 1

    def go_to(self, step: int) -> None:
        """The run was set back: the steps after this one did not count."""
        self.aside()
        self.useful = max(0.0, self.useful - (self.step - step) * self._step_seconds())
        self.step = step
        self._clear()

    def report(self) -> dict[str, float]:
        """Means since the last report, which begins the next; empty when no step was taken. All ranks call it.

        Waiting and memory are those of the rank where they are largest: it is the one the others wait for, and the
        one that runs out first.
        """
        if not self.steps:
            return {}
        name, peak = peak_memory(self.device)
        waited, peak = dist.largest([self.waited, peak], self.device)
        speed = self.steps * self.batch_size / self.seconds
        values = {f"train/{k}": v / self.steps for k, v in self.sums.items()} | {
            "train/images_per_second": round(speed, 1),
            "train/step_ms": round(1000 * self.seconds / self.steps, 3),
            "data/wait_ms": round(1000 * waited / self.steps, 1),
            "data/wait_share": round(min(1.0, waited / self.seconds), 4),
            name: round(peak, 3),
            "run/goodput": round(min(1.0, self.useful / max(time.time() - self.past.began, self.useful, 1e-9)), 4),
            "run/seconds_left": round(self.seconds_left(), 1),
        }
        if self.flops and self.peak_flops:
            values["train/mfu"] = round(speed * self.flops / self.peak_flops, 4)
        self._clear()
        return values

    def seconds_left(self) -> float:
        """Steps at their recent speed, and with each its share of what this process has set aside so far."""
        taken = max(1, self.step - self.start)
        return (self.total - self.step) * (self._step_seconds() + self.aside_seconds / taken)

    def say(self, done: int, values: dict[str, float]) -> None:
        """A line for people, at most every two seconds."""
        now = time.perf_counter()
        if now - self.spoke < QUIET and done < self.total:
            return
        self.spoke = now
        log.info("step %d/%d (%d%%)  %s", done, self.total, 100 * done // self.total, "  ".join(_words(values)))

    def _since_mark(self) -> float:
        before, self.mark = self.mark, time.perf_counter()
        return self.mark - before

    def _step_seconds(self) -> float:
        return self.recent_seconds / self.recent_steps if self.recent_steps else self.seconds / max(1, self.steps)


def _words(values: dict[str, float]) -> Iterable[str]:
    """The parts of a progress line; a number that is not there costs its part and no more."""
    yield f"loss {values['train/loss']:.4f}"
    yield f"lr {values['train/lr']:.2e}"
    yield f"{values['train/images_per_second']:.0f} images/s"
    yield f"data wait {values['data/wait_ms']:.0f} ms ({100 * values['data/wait_share']:.0f}%)"
    if "train/mfu" in values:
        yield f"MFU {100 * values['train/mfu']:.1f}%"
    for name in MEMORY.values():
        if name in values:
            yield f"{values[name]:.1f} GiB"
    for name, value in values.items():
        if name.startswith("probe/") and not name.endswith("_chance"):
            yield f"{name.removeprefix('probe/').replace('_', ' ')} {100 * value:.1f}%"
    yield f"{duration(values['run/seconds_left'])} left"
    if values["run/goodput"] < 0.995:
        yield f"goodput {100 * values['run/goodput']:.0f}%"


def peak_flops(device: torch.device, precision: str, tflops: float = 0.0) -> float:
    """FLOP/s of one device: what `log.peak_tflops` says, or the data sheet of its GPU; 0: not known."""
    if tflops or device.type != "cuda":
        return tflops * 1e12
    name = torch.cuda.get_device_name(device)
    found = devices.peak_flops(name, devices.training_precision(precision))
    if found is None:
        log.info("the peak speed of %s is not known: no MFU; log.peak_tflops can tell it", name)
    return found or 0.0


MEMORY = {"cuda": "memory/device_gib", "cpu": "memory/process_gib"}


def peak_memory(device: torch.device) -> tuple[str, float]:
    """(name of the metric, GiB): the most that tensors took on the device so far, or this process of the host."""
    if device.type == "cuda":
        return MEMORY["cuda"], torch.cuda.max_memory_allocated(device) / GIB
    try:
        status = Path("/proc/self/status").read_text()  # getrusage counts what the parent had before this process
        return MEMORY["cpu"], next(int(s.split()[1]) for s in status.splitlines() if s.startswith("VmHWM")) * 1024 / GIB
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return MEMORY["cpu"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
