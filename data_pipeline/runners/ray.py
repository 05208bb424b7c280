"""Tasks on a Ray cluster, or on a small Ray of our own on this machine. The only module that imports ray.

    python -m data_pipeline build --engine ray --address auto …

Only calls and their counts travel: inputs and output must lie in a folder that every machine sees under the same path.
Each Ray worker hands its calls to a worker process of ours, so that limits and deaths mean the same as on one machine.
"""

import contextlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self

from data_pipeline import watch
from data_pipeline.errors import DataError, UsageError
from data_pipeline.runners import Call, Lost
from data_pipeline.runners.local import LocalRunner
from data_pipeline.runners.worker import portable
from data_pipeline.watch import Limits

try:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError:
    raise UsageError("--engine ray needs Ray, which is not installed: pip install 'maws-open[cluster]'") from None

RETRIES: Final = 5  # of a call whose machine is lost; Ray's own, so the task knows nothing of it
AHEAD: Final = 4  # calls per CPU that Ray holds at a time
STORE: Final = 100 << 20  # bytes of Ray's object store: nothing of ours lies in it


class RayRunner:
    """`address`: "auto" or host:port of a running cluster; "local" starts Ray here and ends it again."""

    def __init__(self, address: str, workers: int | None, limits: Limits | None = None) -> None:
        self.address = address
        self.workers = workers
        self.limits = limits or Limits()
        self._folder: str | None = None

    def __enter__(self) -> Self:
        options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if self.address == "local":
            self._folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: it becomes part of socket names
            options |= {"num_cpus": self.workers, "include_dashboard": False, "_temp_dir": self._folder}
            options |= {"object_store_memory": STORE}
        elif self.workers is not None:
            raise UsageError("--workers is for this machine; a Ray cluster is used with all its CPUs: leave it out")
        try:
            ray.init(address=self.address, **options)
        except (ConnectionError, RayError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"no Ray cluster at --address {self.address} ({reason}); start one with `ray start --head`, or use "
                "--address local for a Ray on this machine; one with token authentication needs its token here, in "
                "~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from None
        return self

    def __exit__(self, *ending: object) -> None:
        ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        waiting = deque(enumerate(calls))
        held: dict[Any, int] = {}
        most = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        try:
            while waiting or held:
                while waiting and len(held) < most:
                    number, call = waiting.popleft()
                    held[_carry_out.remote(call, self.limits, str(Path.cwd()))] = number
                for reference in ray.wait(list(held))[0]:
                    number = held.pop(reference)
                    yield number, _answer(reference)
        finally:  # an exception, or nobody wants the rest
            for reference in held:
                with contextlib.suppress(RayError):
                    ray.cancel(reference, force=True)

    def blind(self, path: Path) -> list[str]:
        """Machines of the cluster that do not see this file."""
        machines = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        asked = [
            _sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                str(path.resolve())
            )
            for node in machines
        ]
        return [node["NodeManagerHostname"] for node, sees in zip(machines, ray.get(asked), strict=True) if not sees]


def _answer(reference: Any) -> Any:
    try:
        kind, answer = ray.get(reference)
    except RayError as error:  # the Ray worker itself is gone, and RETRIES others after it
        return Lost("killed_worker", type(error).__name__, watch.NONE)
    if kind == "raised":
        raise answer
    return answer


_process: LocalRunner | None = None  # of this Ray worker


@ray.remote(num_cpus=1, max_retries=RETRIES, retry_exceptions=False)
def _carry_out(call: Call, limits: Limits, folder: str) -> tuple[str, Any]:
    global _process
    try:
        if _process is None:
            with contextlib.suppress(OSError):  # paths are meant as they were typed
                os.chdir(folder)
            _process = LocalRunner(1, limits, outside=True)
        return "done", next(_process.run([call]))[1]
    except Exception as error:
        return "raised", portable(error)


@ray.remote(num_cpus=0)
def _sees(path: str) -> bool:
    return Path(path).is_file()
