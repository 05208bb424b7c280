"""Patches of the product in forked ranks: a death at an exact moment, a resume that forgets. The product has no hooks.

start_ranks(2, arguments, log=folder, starter=dying("manifest", time=2, rank=0))   # dies there, the second time
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

from forks import TESTS, Forked

from maws.launch import Starter

ROOT = TESTS.parent


def _starter(function: str, *given: Any) -> Starter:
    def start(arguments: Sequence[str], env: Mapping[str, str], output: int) -> Forked:
        env = {**env, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
        call = [*given, list(arguments)]
        return Forked(f"sabotage:{function}", call, env=env, cwd=ROOT, path=[str(TESTS)], output=output, stdout=True)

    return start


def dying(moment: str, time: int = 1, rank: int = 0) -> Starter:
    """Ranks of which one is killed (SIGKILL) when it comes to the moment for the `time`-th time."""
    return _starter("die", moment, time, rank)


def forgetful(lost: str) -> Starter:
    """Ranks whose resume loses the moments, is a step off in the schedule, or a step off in the samples."""
    return _starter("forget", lost)


def die(moment: str, time: int, rank: int, arguments: list[str]) -> int:
    from maws import train

    if int(os.environ.get("RANK", "0")) == rank:
        MOMENTS[moment](Countdown(time))
    return train.main(arguments)


class Countdown:
    """Kills this process the n-th time it is called."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            killed()


def killed() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL cannot be survived")


def _before(owner: Any, name: str, count: Countdown, only: Callable[..., bool] = lambda *given: True) -> None:
    _around(owner, name, count, only, before=True)


def _after(owner: Any, name: str, count: Countdown) -> None:
    _around(owner, name, count, lambda *given: True, before=False)


def _around(owner: Any, name: str, count: Countdown, only: Callable[..., bool], before: bool) -> None:
    original = getattr(owner, name)

    def patched(*given: Any, **named: Any) -> Any:
        counts = only(*given)
        if counts and before:
            count()
        result = original(*given, **named)
        if counts and not before:
            count()
        return result

    setattr(owner, name, patched)


def in_the_part(count: Countdown) -> None:
    """Half of this rank's file is written."""
    from maws import save_job

    write = save_job.write_tensors

    def half(tensors: Iterable[Any], of: int) -> Iterator[Any]:
        for i, item in enumerate(tensors):
            if i == of // 2:
                count()
            yield item

    save_job.write_tensors = lambda path, specs, tensors: write(path, specs, half(tensors, len(specs)))  # type: ignore


def before_the_rename(count: Countdown) -> None:
    """The manifest is written, and the folder still has its temporary name."""
    from maws import manifest

    _after(manifest, "write", count)


def before_latest(count: Countdown) -> None:
    """The folder has its name, and `latest` still says another."""
    from maws import save_job

    _before(save_job, "write_whole", count, lambda path, content: path.name == "latest")


def before_the_old_ones_go(count: Countdown) -> None:
    from maws.retention import Retention

    _before(Retention, "prune", count)


def in_the_first_step(count: Countdown) -> None:
    """Weights are already other ones, and nothing is logged."""
    from maws.engine import Engine

    _after(Engine, "step", count)


def while_loading(count: Countdown) -> None:
    """A tensor of many has been read."""
    from maws.checkpoint import RankFiles

    _after(RankFiles, "cut", count)


MOMENTS: Final = {
    "part": in_the_part, "manifest": before_the_rename, "latest": before_latest, "prune": before_the_old_ones_go,
    "step": in_the_first_step, "load": while_loading,
}  # fmt: skip


def forget(lost: str, arguments: list[str]) -> int:
    from maws import checkpoint, train, trainer
    from maws.engine import Engine

    resumed = False
    load, load_state, feed = checkpoint.load, Engine.load_local_state, train.Feed

    def noting_load(*args: Any) -> int:
        nonlocal resumed
        resumed = True
        return load(*args)

    def without_moments(engine: Engine, state: dict[str, Any], steps: int) -> None:
        load_state(engine, {k: v * 0 if k.startswith("exp_avg/") else v for k, v in state.items()}, steps)

    def late_feed(dataset: Any, start: int, stop: int, *more: Any, **named: Any) -> Any:
        return feed(dataset, start + resumed, stop + resumed, *more, **named)

    class Late(trainer.Plan):
        def schedule(self, optim: Any) -> Callable[[int], float]:
            own = super().schedule(optim)
            return lambda step: own(step + resumed)

    checkpoint.load = noting_load
    if lost == "moments":
        Engine.load_local_state = without_moments  # type: ignore[method-assign]
    elif lost == "samples":
        train.Feed = late_feed  # type: ignore[misc, assignment]
    else:
        train.Plan = Late  # type: ignore[misc]
    return train.main(arguments)
