"""Ranks watch each other: one that dies or hangs is named, and nobody waits half an hour for it.

    with Watchdog(run, cfg.faults) as watchdog:      # on all ranks, once the process group stands
        watchdog.pulse(step)                         # this rank goes on
        watchdog.pulse(step, "save")                 # … with something that is not a step

A rank that died (killed, out of memory, its node gone) is known by its connection to rank 0 (maws/peers.py), at once
when its process ended and after `faults.peer_seconds` when its machine fell silent. No pulse of any rank for
`faults.hang_seconds` is a hang: the stacks of all threads of all ranks go to RUN/hang/rank_00000.txt. `hang_seconds` is
for each pulse, whatever it is for: choose it longer than the longest single thing that a run does (building the model,
a first step that compiles, one save, one probe). Either way every rank prints why and leaves with exit code 1: a
collective that waits for a dead rank can be ended by nothing else.
"""

import faulthandler
import os
import secrets
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self

from data_pipeline.errors import UserError
from maws import dist
from maws.config import FaultsConfig
from maws.files import append
from maws.link import Message
from maws.peers import Hub, Limits, Spoke, Verdict

LEARN = 3.0  # seconds a rank whose collective failed waits to learn whose fault it was
GRACE = 1.0  # seconds the main thread has to end by itself, with a message of its own, before it is ended
GRACE_TOLD = 5.0  # the same when the rank said what went wrong: then the others are often about to say the same
JOIN = 60.0  # seconds to connect to rank 0
WRITE = 5.0  # seconds for a last word on the disk
BLOCKED = 60.0  # seconds on top of hang_seconds after which stacks are printed without the interpreter's help


class Watchdog:
    """Started on all ranks once the process group stands; ends the process when another rank is gone."""

    def __init__(self, run: Path, cfg: FaultsConfig) -> None:
        self.run, self.cfg, self.rank = run, cfg, dist.rank()
        self._pulse: tuple[int, int, str] = (0, 0, "start")  # how many so far, step, doing; replaced as a whole
        self._me: Message = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._known, self._left = threading.Event(), threading.Event()
        self._verdict = Verdict("")
        self._last = threading.Lock()
        self._armed = -BLOCKED
        if not faulthandler.is_enabled():
            faulthandler.enable(file=2)  # a segmentation fault says where
        self._post = self._join(Limits(cfg.peer_seconds, cfg.hang_seconds))
        _close_in_children(self._post)
        self._post.start()

    def _join(self, limits: Limits) -> Hub | Spoke:
        """Rank 0 listens on all interfaces, under a secret that only the process group knows; the others connect to it
        under the launcher's MASTER_ADDR."""
        world = dist.world_size()
        if world == 1:
            return Hub(1, None, "", self._own, limits, self._judge)
        if self.rank == 0:
            listener, token = listen(world), secrets.token_hex(16)
            dist.broadcast((listener.getsockname()[1], token))
            return Hub(world, listener, token, self._own, limits, self._judge)
        port, token = dist.broadcast(None)
        return Spoke(self.rank, connect(dist.master(), port), token, self._own, limits, self._judge)

    def pulse(self, step: int, doing: str = "step") -> None:
        """This rank is alive and begins this."""
        self._pulse = (self._pulse[0] + 1, step, doing)

    def farewell(self, why: str = "") -> None:
        """This rank is about to leave: because it is done, or (`why`) because it failed, which the others are told."""
        if not self._left.is_set():
            self._left.set()
            self._post.farewell(why)
            self._post.join(2.0)
            faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, UserError):
            self.farewell(str(error or ""))
        elif not self._left.is_set():
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        """The main thread met an error: its own, or (then this does not return) what another rank's death looks like
        from here, such as gloo's `Connection closed by peer`."""
        if isinstance(error, Exception) and dist.world_size() > 1 and self._known.wait(LEARN):
            self._leave()
        first_line = next(iter(str(error).splitlines()), "")
        self.farewell(f"{type(error).__name__}: {first_line}")

    def _own(self) -> Message:
        """This rank's line; asked for once a second, so a thread that cannot answer is stuck behind the interpreter."""
        if self.cfg.hang_seconds and time.monotonic() > self._armed + BLOCKED / 4:
            self._armed = time.monotonic()
            faulthandler.dump_traceback_later(self.cfg.hang_seconds + BLOCKED, file=2)
        count, step, doing = self._pulse
        return {**self._me, "count": count, "step": step, "doing": doing, "where": where()}

    def _judge(self, verdict: Verdict) -> None:
        """In the watching thread: all ranks leave."""
        self._verdict = verdict
        if verdict.hang:
            _try(self._write_stacks)
        self._known.set()
        if not self._left.wait(GRACE_TOLD if verdict.told else GRACE):
            self._leave()

    def _leave(self) -> NoReturn:
        """Say why and end the process, and with it the loader's workers, whatever its other threads are stuck in."""
        with self._last:  # the main thread may be here too
            stacks = f"; the stacks of all ranks are in {self.run / 'hang'}" if self._verdict.hang else ""
            message = f"error: {self._verdict.text}{stacks}. Rank {self.rank} leaves too, at step {self._pulse[1]}; "
            message += "continue with --resume auto\n"
            with suppress(OSError):
                os.write(2, message.encode())  # not through sys.stderr, whose lock a stuck thread may hold
            if self.rank == 0 or (self._verdict.text.startswith("rank 0 ") and self.rank == 1):
                _try(self._write_event)
            os._exit(1)

    def _write_stacks(self) -> None:
        own = self._own()
        path = self.run / "hang" / f"rank_{self.rank:05}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as f:
            f.write(f"{own['host']}, pid {own['pid']}, step {own['step']} ({own['doing']}), in {own['where']}\n\n")
            f.flush()
            faulthandler.dump_traceback(f, all_threads=True)

    def _write_event(self) -> None:
        """One rank does: the first that is there."""
        event = "hang" if self._verdict.hang else "failed"
        entry = {"event": event, "step": self._pulse[1], "time": round(time.time(), 3), "why": self._verdict.text}
        if self.run.is_dir():
            append(self.run / "events.jsonl", entry)


def _try(write: Callable[[], None]) -> None:
    """Write something, if that can be done in time: the disk may be what is full or hangs, and must not keep us."""

    def quietly() -> None:
        with suppress(OSError):
            write()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(WRITE)


def listen(world: int) -> socket.socket:
    """A listening socket on all interfaces, IPv6 ones too where there are some."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=world)
    return socket.create_server(("", 0), backlog=world)


def connect(host: str, port: int, seconds: float = JOIN) -> socket.socket:
    """Raises UserError when rank 0 cannot be reached."""
    until = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(0.1, until - time.monotonic()))
        except OSError as e:
            if time.monotonic() > until:
                raise UserError(
                    f"rank 0 cannot be reached at {host}:{port} ({e}), where it listens for the other ranks; ports "
                    f"must be open between the machines of a run, as they must for its collectives"
                ) from None
            time.sleep(0.5)


def where() -> str:
    """What the main thread is in: the innermost call of this project, and the innermost of all."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    inner, ours = frame, frame
    while ours and f"{os.sep}site-packages{os.sep}" in ours.f_code.co_filename:
        ours = ours.f_back
    names = [
        f"{Path(f.f_code.co_filename).name}:{f.f_lineno} {f.f_code.co_name}" for f in (inner, ours) if f is not None
    ]
    return " called by ".join(dict.fromkeys(names))


_posts: "weakref.WeakSet[Hub | Spoke]" = weakref.WeakSet()


def _close_in_children(post: Hub | Spoke) -> None:
    """A forked loader worker would keep this rank's connection open after the rank died."""
    if not _posts:
        os.register_at_fork(after_in_child=_close_all)
    _posts.add(post)


def _close_all() -> None:
    for post in list(_posts):
        post.close()
