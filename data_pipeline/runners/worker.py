"""A worker process: it takes one call after the other from its parent, and ends when the parent does.

Parent and worker talk over a socket of their own, so the parent knows what each worker holds when it dies. (The
standard library's pool does not say, and breaks as a whole.)
"""

import contextlib
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from data_pipeline import watch
from data_pipeline.ending import leave
from data_pipeline.errors import DataError, UserError
from data_pipeline.runners import Call, Lost
from data_pipeline.watch import Limits

START: Final = """import sys
sys.path[:] = {path!r}
from data_pipeline.runners.worker import work
work({calls}, {position})"""
FIRST_TO_GO: Final = "500"  # of 1000: when memory runs out, the system ends a worker rather than its parent
PATIENCE: Final = 5.0  # seconds for a worker to leave by itself


class Worker:
    """The parent's end."""

    def __init__(self, limits: Limits) -> None:
        ours, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as shared:
            shared.truncate(watch.SIZE)
            self._position = mmap.mmap(shared.fileno(), watch.SIZE)
            code = START.format(path=sys.path, calls=theirs.fileno(), position=shared.fileno())
            with _without_interrupt():
                self.process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), shared.fileno()),
                )
        self.connection = Connection(ours.detach())
        self.limits = limits
        self.ready = False

    def send(self, call: Call) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: `answers` will say so
            self.connection.send((call, self.limits if call.guarded else None))

    def answers(self) -> list[Any]:
        """The answer, or Lost if the worker died; nothing if it only said that it has started. What the call raised is
        raised here."""
        try:
            kind, answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return [self._lost()]
        if kind == "ready":
            self.ready = True
            return []
        if kind == "raised":
            raise answer
        return [answer]

    def _lost(self) -> Lost:
        code = self.process.wait()
        if code > 0 and not self.ready:
            raise DataError(f"a worker process cannot start ({_ending(code)}); what it wrote is above")
        reason = "timed_out" if code == -signal.SIGALRM else "killed_worker"
        return Lost(reason, _ending(code), watch.where(self._position))

    def close(self, *, kill: bool = False) -> None:
        self.connection.close()
        if kill:
            self.process.kill()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._position.close()


def work(calls: int, position: int) -> None:
    """The worker's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered once, by the parent
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_GO)
    threading.Thread(target=_end_with_parent, args=(calls,), daemon=True).start()
    connection = Connection(calls)
    watch.share(position)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(("ready", None))
        while True:
            try:
                call, limits = connection.recv()
            except (EOFError, ConnectionResetError):
                break
            except Exception as error:  # a function or argument that cannot be found here
                answer = "raised", portable(error)
            else:
                answer = _carry_out(call, limits)
            connection.send(answer)
    leave(0)


def _carry_out(call: Call, limits: Limits | None) -> tuple[str, Any]:
    try:
        if limits is None:
            return "done", call()
        with watch.limited(limits):
            try:
                return "done", call()
            except MemoryError as error:
                return "done", Lost("out_of_memory", type(error).__name__, watch.where())
    except BaseException as error:
        return "raised", portable(error)


def portable(error: BaseException) -> BaseException:
    """The exception, if it survives the way to the parent; else its text. Its traceback here goes along as a note."""
    if not isinstance(error, UserError):
        error.add_note(f"in a worker process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 our own exception, made in this process
    except Exception:
        return DataError(str(error)) if isinstance(error, UserError) else RuntimeError(traceback.format_exc())
    return error


def _end_with_parent(calls: int) -> None:
    """A parent that is killed cannot end its workers: a call under way would go on for nobody."""
    poll = select.poll()
    poll.register(calls, select.POLLHUP)
    poll.poll()
    os._exit(1)


@contextlib.contextmanager
def _without_interrupt() -> Iterator[None]:
    """What is started here never sees Ctrl-C, not even before its first line: signals held back are inherited."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
