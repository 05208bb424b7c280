"""Processes that make batches ahead of time: forked from the training process, fed with step numbers, replaced by it.

    training process ──step 12──▶ worker 0        a batch comes back as a description over the socket and its tensors
                     ◀──batch 12──                in memory that both see (memfd), so that nothing big is copied

A worker ends when its socket does, and on Linux together with the thread that forked it: none outlives the training
process, however that ends, or keeps the process's connections to other ranks open. Signals of a launcher (SIGINT,
SIGTERM, SIGUSR1 to the whole group) are the training process's matter. Memory by memfd and not in /dev/shm, which
containers keep small: a full /dev/shm kills a worker in the middle of a write.
"""

import logging
import mmap
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection
from typing import Any, NoReturn, cast
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import DataError, UserError
from maws.data.batch import Batch
from maws.stop_signal import when_the_parent_dies

log = logging.getLogger(__name__)

FOR_THE_PARENT = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
ALIGN = 64  # bytes between the starts of tensors, a cache line
Make = Callable[[int], Batch]

_ends: WeakSet[Connection] = WeakSet()  # the training process's ends of all sockets; a worker closes what it inherits


class WorkerDied(Exception):
    """A worker is gone; its text says how. The batch it worked on can be asked of another one."""


class Worker:
    """One process that makes the batches of the steps it is asked for, in that order."""

    def __init__(self, make: Make) -> None:
        self.socket, theirs = Pipe()
        _ends.add(self.socket)
        self.parent = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_PARENT)  # until the worker ignores them
        try:
            with warnings.catch_warnings():  # of Python 3.12 and later, where there are threads: a worker takes no lock
                warnings.simplefilter("ignore", DeprecationWarning)
                self.pid = os.fork()
            if self.pid == 0:
                _work(make, theirs, self.parent, before)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def ask(self, step: int) -> None:
        with suppress(OSError):  # it has died: `take` says so when the batch is due
            self.socket.send(step)

    def take(self, step: int) -> Batch:
        """The batch of the step asked for first. Raises WorkerDied, or what the worker met (DataError and the like)."""
        try:
            answer = self.socket.recv()
            if isinstance(answer, tuple):
                raise _error(step, *answer)
            descriptor = reduction.recv_handle(self.socket) if answer["bytes"] else -1
        except (EOFError, OSError, RuntimeError) as e:
            raise WorkerDied(self._how()) from e
        return _unpack(answer, descriptor)

    def _how(self) -> str:
        self.kill()  # a worker that closed its socket and lives is of no use either
        status = self._wait()
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            name = signal.Signals(number).name
            return f"was killed by {name}" + (" (out of memory?)" if number == signal.SIGKILL else "")
        return f"ended with exit code {os.waitstatus_to_exitcode(status)}"

    def kill(self) -> None:
        """It has no state, so it need not finish anything."""
        if self.pid and os.getpid() == self.parent:  # not in another worker, where a copy of this one is cleared away
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        self._wait()
        self.socket.close()

    def _wait(self) -> int:
        pid, self.pid = self.pid, 0
        return os.waitpid(pid, 0)[1] if pid and os.getpid() == self.parent else 0


# ---------------------------------------------------------------------------------------------------------- the worker


def _work(make: Make, socket: Connection, parent: int, mask: Iterable[int]) -> NoReturn:
    """Life of a worker. It never returns into the code that forked it."""
    code = 1
    try:
        for number in FOR_THE_PARENT:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        when_the_parent_dies(signal.SIGKILL)
        for end in list(_ends):
            end.close()
        torch.set_num_threads(1)
        while os.getppid() == parent:
            _answer(make, socket)
    except (EOFError, OSError):
        code = 0  # the training process is gone, or has no more use for this one
    except MemoryError:
        log.error("a loader worker has run out of memory")
    finally:
        os._exit(code)


def _answer(make: Make, socket: Connection) -> None:
    step = socket.recv()
    try:
        batch = make(step)
        answer, descriptor = _pack(batch)
    except MemoryError:
        raise
    except Exception as e:
        kind = type(e) if isinstance(e, UserError) else None
        socket.send((kind, str(e) if kind else f"{type(e).__name__}: {e}", traceback.format_exc()))
        return
    socket.send(answer)
    if descriptor >= 0:
        reduction.send_handle(socket, descriptor, os.getppid())
        os.close(descriptor)


def _error(step: int, kind: type[UserError] | None, text: str, trace: str) -> UserError:
    """What a worker met, as if it had been met here."""
    if kind is None:
        log.error("a loader worker failed at step %d:\n%s", step, trace)
        return DataError(f"the batch of step {step} could not be made: {text}")
    error = kind.__new__(kind, text)  # not by its constructor, which may want other things than a text
    error.args = (text,)
    return error


# ------------------------------------------------------------------------------------------------------------- batches


def _pack(batch: Batch) -> tuple[dict[str, Any], int]:
    """What describes a batch, and an open file with its tensors (-1: it has none)."""
    values = cast(dict[str, Any], batch)
    tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
    layout, size = {}, 0
    for name, tensor in tensors.items():
        layout[name] = (tensor.dtype, tuple(tensor.shape), size)
        size += -(-tensor.nbytes // ALIGN) * ALIGN
    rest = {name: value for name, value in values.items() if name not in tensors}
    answer = {"rest": rest, "names": list(values), "layout": layout, "bytes": size}
    if not size:
        return answer, -1
    descriptor = _memory(size)
    with mmap.mmap(descriptor, size) as memory:
        whole = np.frombuffer(memory, np.uint8)
        for name, tensor in tensors.items():
            start = layout[name][2]
            whole[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy()
        del whole
    return answer, descriptor


def _unpack(answer: dict[str, Any], descriptor: int) -> Batch:
    """The tensors live in the shared memory, which goes when they do."""
    values = dict(answer["rest"])
    memory: Any = b""
    if descriptor >= 0:
        memory = mmap.mmap(descriptor, answer["bytes"])
        os.close(descriptor)
    for name, (dtype, shape, start) in answer["layout"].items():
        count = int(np.prod(shape))
        values[name] = (
            torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)
            if count
            else torch.empty(shape, dtype=dtype)
        )
    return cast(Batch, {name: values[name] for name in answer["names"]})


def _memory(size: int) -> int:
    """An open file of `size` bytes that has no name and goes with its last user."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("batch", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size)
    return descriptor
