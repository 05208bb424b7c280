"""Other places that metrics go to: TensorBoard (log.tensorboard=yes) and Weights & Biases (log.wandb=PROJECT).

    pip install 'maws-open[tensorboard]'; tensorboard --logdir runs/

Both are extras. Neither stops or slows a training: TensorBoard's library writes from a thread of its own, and Weights &
Biases, which talks to a network, gets one here.
"""

import importlib.util
import json
import logging
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from maws.config import ConfigError, LogConfig

log = logging.getLogger(__name__)

WAITING = 10_000  # lines that Weights & Biases may be behind; more are left out
CLOSING = 20.0  # seconds that the end of a training waits for it


class Writer(Protocol):
    """Somewhere that metrics are written to. Any exception ends its part."""

    def write(self, step: int, values: dict[str, Any]) -> None: ...

    def go_to(self, step: int) -> None:
        """What was written of later steps does not count any more."""

    def close(self) -> None: ...


def check(cfg: LogConfig) -> None:
    """Raises ConfigError when a library that the settings ask for is not installed; to be called at the start."""
    for setting, wanted, library in (
        ("log.tensorboard=yes", cfg.tensorboard, "tensorboard"),
        (f"log.wandb={cfg.wandb}", cfg.wandb, "wandb"),
    ):
        if wanted and importlib.util.find_spec(library) is None:
            raise ConfigError(f"{setting} needs {library}, which is not installed: pip install 'maws-open[{library}]'")


def further_writers(run: Path, cfg: LogConfig, start_step: int) -> list[Writer]:
    """Those that the settings ask for and that can be opened; a warning names one that cannot."""
    wanted: list[tuple[bool, str, Callable[[], Writer]]] = [
        (cfg.tensorboard, "TensorBoard", lambda: TensorBoard(run / "tensorboard", start_step)),
        (bool(cfg.wandb), "Weights & Biases", lambda: WeightsAndBiases(run, cfg.wandb)),
    ]
    writers = []
    for is_wanted, name, make in wanted:
        if not is_wanted:
            continue
        try:
            writers.append(make())
        except Exception as e:  # a full disk, a broken installation
            log.warning("%s could not be opened and is left out: %s", name, e)
    return writers


class TensorBoard:
    """Event files in one folder. A new one says from which step on older ones do not count (`purge_step`)."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self.folder = folder
        self._open(start_step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1, flush_secs=5)

    def write(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def go_to(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Lines go to a thread that owns the connection, so that a slow or missing network costs lines and never time.

    The id of its run is kept in RUN/wandb_id: a resumed run goes on with the same curves. What was sent cannot be taken
    back there; steps taken again after a resume or a rewind are sent again, with `step` as the axis of all curves.
    """

    def __init__(self, run: Path, project: str) -> None:
        self.run, self.project = run, project
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING)
        self._lost = 0
        self._thread = threading.Thread(target=self._send, daemon=True, name="wandb")
        self._thread.start()

    def write(self, step: int, values: dict[str, Any]) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._lines.put_nowait({"step": step, **values})
        except queue.Full:
            self._lost += 1

    def go_to(self, step: int) -> None:
        pass

    def close(self) -> None:
        if self._thread.is_alive():
            try:
                self._lines.put(None, timeout=CLOSING)
            except queue.Full:
                self._lost += self._lines.qsize()
            self._thread.join(CLOSING)
            if self._thread.is_alive():
                log.warning("Weights & Biases takes more than %.0f s to end and is left behind", CLOSING)
        if self._lost:
            log.warning("%d lines did not reach Weights & Biases; metrics.jsonl has them", self._lost)

    def _send(self) -> None:
        try:
            import wandb  # type: ignore[import-not-found]  # an extra

            live = wandb.init(
                project=self.project, name=self.run.resolve().name, id=self._id(), resume="allow",
                dir=str(self.run), config=json.loads((self.run / "config.json").read_text()),
            )  # fmt: skip
            live.define_metric("*", step_metric="step")
            while (line := self._lines.get()) is not None:
                live.log(line)
            live.finish()
        except BaseException as e:  # it ends the interpreter where it has no key and nobody to ask for one
            log.warning("Weights & Biases failed and is left out from now on: %s", e)

    def _id(self) -> str:
        path = self.run / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(4) + "\n")
        return path.read_text().strip()
