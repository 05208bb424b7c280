"""A run that is asked to stop saves and leaves, in bounded time. SIGTERM, SIGUSR1: requeue me; Ctrl-C: stop."""

import ctypes
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

REQUEUE, INTERRUPTED = 75, 130
PR_SET_PDEATHSIG = 1  # prctl(2): a signal for when the parent dies


class Stopped(Exception):
    """The run was asked to stop, has saved what there was to save, and leaves with this exit code."""

    def __init__(self, code: int, step: int, saved: bool = True) -> None:
        super().__init__(f"saved at step {step}" if saved else f"stopped at step {step}, before a first one was taken")
        self.code, self.step = code, step


class StopSignal:
    """SIGTERM and SIGUSR1 mean 'requeue me', Ctrl-C means 'stop'; a second Ctrl-C does not wait for the save.

    Nobody waits for ever: `bound` says how long after the first signal the process leaves, saved or not. A thread of
    its own watches that, woken by the interpreter's pipe for signals, because no Python handler runs while the main
    thread is stuck in a collective.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.code = self._others = 0
        self._seconds, self._farewell = math.inf, _say_nothing
        self._wakeup, self._bell = os.pipe()
        os.set_blocking(self._bell, False)
        for number in self.NUMBERS:
            signal.signal(number, self._note)
        signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_no_wakeup)  # a loader worker's signals are not ours
        threading.Thread(target=self._wait, name="stop signal", daemon=True).start()

    def bound(self, seconds: float, farewell: Callable[[str], None]) -> None:
        """Leave this long after a signal at the latest; `farewell` tells the other ranks why."""
        self._seconds, self._farewell = seconds, farewell

    def agreed(self, code: int) -> None:
        """Another rank was told to stop: the time counts here as well."""
        self._others = code
        os.write(self._bell, b"\xff")

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        os.write(self._bell, b"\0")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.code == INTERRUPTED:
            raise KeyboardInterrupt
        self.code = INTERRUPTED if number == signal.SIGINT else REQUEUE

    def _wait(self) -> None:
        """In a thread: leave when the time is over, or a second after a second Ctrl-C that the main thread missed."""
        code, since, again, interrupts = 0, math.inf, math.inf, 0
        while time.monotonic() < min(since + self._seconds, again):
            if not select.select([self._wakeup], [], [], 0.5 if code else None)[0]:
                continue
            for number in os.read(self._wakeup, 64):
                if number == 0:
                    os.close(self._wakeup)
                    os.close(self._bell)
                    return
                if number == 0xFF or number in self.NUMBERS:  # the pipe has all signals that Python handles
                    interrupts += number == signal.SIGINT
                    code = INTERRUPTED if interrupts else self._others or REQUEUE
                    since = min(since, time.monotonic())
                    again = time.monotonic() + 1 if interrupts > 1 else again
        why = "interrupted twice" if again < math.inf else f"not saved {self._seconds:g} s (faults.stop_seconds) after"
        why += "" if again < math.inf else " the signal to stop"
        self._farewell(why)
        os.write(2, f"error: {why}; the last whole checkpoint stays, continue with --resume auto\n".encode())
        os._exit(code)


def stop_with_the_launcher() -> None:
    """In a rank: take the death of the process that started it as SIGTERM, so that it saves and leaves (Linux).

    A launcher that is killed (kill -9, out of memory) leaves its ranks training, and who starts the run again then has
    two that write one folder. For torchrun, which starts ranks itself; the parent of plain python may be a shell.
    """
    when_the_parent_dies(signal.SIGTERM)


def when_the_parent_dies(number: int) -> None:
    """This process is sent the signal once the thread that started it is gone, however that ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _say_nothing(why: str) -> None:
    """Before there are other ranks to tell."""


def _no_wakeup() -> None:
    signal.set_wakeup_fd(-1)
