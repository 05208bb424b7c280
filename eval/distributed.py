"""Evaluation on several ranks: extraction is shared out, everything else is computed by every rank, and rank 0 tells.

    torchrun --nproc_per_node 8 -m -- eval knn linear --run RUN --train … --data …
    deepspeed --module eval knn …          srun --ntasks 8 python -m eval knn …

    return as_one(command)                 # instead of `told`, where a launcher started this process
    device = start("auto")                 # in the command: joins the others; a device for each rank
    if is_first(): …                       # files are written by rank 0 alone

All ranks have the same features after `extract`, draw the same random numbers and so have the same scores. A rank that
fails, or dies, ends all of them with one message, by rank 0 where that still lives: the ranks watch each other over
connections of their own (maws/peers.py), for a collective waits half an hour for whoever is missing.
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn, TypeVar

import torch
import torch.distributed as td
from torch import Tensor

from data_pipeline.ending import INTERRUPTED
from data_pipeline.errors import DataError, UsageError, UserError
from maws import dist, launchers
from maws.config import FaultsConfig
from maws.link import Message
from maws.peers import Hub, Limits, Spoke, Verdict
from maws.watchdog import connect, listen

T = TypeVar("T")

# Seconds. GRACE: for rank 0 to come upon what another rank said by itself, as it does with every wrong flag. PATIENCE:
# for rank 0 to say what another rank told it, before that one ends and the launcher takes the rest down. LEARN: for a
# rank whose collective failed to hear whose fault it was.
GRACE: Final = 2.0
PATIENCE: Final = 4.0
LEARN: Final = 5.0
BLOCK: Final = 1 << 14  # rows that are sent at a time


def is_first() -> bool:
    """Is this the rank that prints and writes? A single process is."""
    return dist.rank() == 0


def world_size() -> int:
    return dist.world_size()


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank; made by us."""
    return dist.gather_objects(value)


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, which alone calls it; the value is made by us."""
    return dist.broadcast(make() if is_first() else None)


# ------------------------------------------------------------------------------------------------------ start and end


class Company:
    """The other ranks: who of them has left, and why."""

    def __init__(self) -> None:
        self.rank = dist.rank()
        self.verdict = Verdict("")
        self.known, self.left = threading.Event(), threading.Event()
        self.at_end: list[Callable[[], None]] = []  # before the process group is taken down
        self._speak = threading.Lock()
        self._doing, self._count = "start", 0
        self._me: Message = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid()}
        limits = Limits(FaultsConfig().peer_seconds, hang=0)  # a probe may take hours, and says nothing meanwhile
        if self.rank == 0:
            listener, token = listen(dist.world_size()), secrets.token_hex(16)
            dist.broadcast((listener.getsockname()[1], token))
            self._post = Hub(dist.world_size(), listener, token, self._own, limits, self._judge)
        else:
            port, token = dist.broadcast(None)
            self._post = Spoke(self.rank, connect(dist.master(), port), token, self._own, limits, self._judge)
        self._post.start()

    def pulse(self, step: int, doing: str) -> None:
        """What this rank is at, for the message of its failure."""
        self._count, self._doing = step, doing

    def _own(self) -> Message:
        return {**self._me, "count": self._count, "step": self._count, "doing": self._doing}

    def _judge(self, verdict: Verdict) -> None:
        """In the watching thread: somebody failed or is gone."""
        self.verdict = verdict
        self.known.set()
        if not self.left.wait(GRACE if verdict.told else GRACE / 2):
            self.leave()

    def leave(self) -> NoReturn:
        """Because of another rank, whatever this one is stuck in."""
        with self._speak:
            if self.rank == 0 or (self.verdict.text.startswith("rank 0 ") and self.rank == 1):
                with contextlib.suppress(OSError):
                    os.write(2, f"error: {self.verdict.text}\n".encode())
            os._exit(1)

    def failed(self, why: str) -> None:
        """Tell the others why this rank is about to leave; rank 0 has said it, and the others wait until it has."""
        with self._speak:
            self.left.set()
        self._post.farewell(why)
        self._post.join(2.0)
        if self.rank:
            time.sleep(PATIENCE)

    def done(self) -> None:
        """All ranks have come to a good end. Only then: who waits for a rank that failed waits for ever."""
        dist.barrier()
        self.left.set()
        for close in self.at_end:
            close()
        dist.barrier()
        self._post.farewell("")
        self._post.join(2.0)
        td.destroy_process_group()


_company: Company | None = None


def company() -> Company | None:
    return _company


def pulse(step: int, doing: str) -> None:
    if _company is not None:
        _company.pulse(step, doing)


def start(device: str) -> torch.device:
    """Join the process group: nccl between GPUs, gloo between processes. The device of this rank.

    Raises UsageError for a device that the ranks cannot each have one of, ConfigError as maws.launchers does.
    """
    global _company
    world, own = _own_device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        dist.share_cores(world)
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    td.init_process_group(backend, timeout=dist.timeout(), rank=world.rank, world_size=world.size)
    _company = Company()
    return own


def _own_device(name: str) -> tuple[launchers.World, torch.device]:
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {name}: every rank has a device of its own; use auto, cuda or cpu under a launcher")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda cannot be used on {socket.gethostname()}: there is no GPU; try auto")
    if name == "cpu" or not torch.cuda.is_available():
        return launchers.detect(), torch.device("cpu")
    world = launchers.one_device_each(torch.cuda.device_count())
    return world, torch.device("cuda", world.local_rank)


def as_one(command: Callable[[], int], interrupted: str) -> int:
    """The exit code of a command that all ranks run; what goes wrong is one message, whichever rank it happens to."""
    first = launchers.started_as_first()
    with contextlib.nullcontext() if first else _silent():
        try:
            code = command()
            if _company is not None:
                _company.done()
            return code
        except (UserError, OSError) as error:
            code = error.exit_code if isinstance(error, UserError) else DataError.exit_code
            _say(f"error: {error}", everybody=not isinstance(error, UsageError))
            why = str(error)
        except KeyboardInterrupt:
            code, why = INTERRUPTED, "interrupted"
            _say(interrupted)
        except Exception as error:
            if _company is not None and _company.known.wait(LEARN):  # what another's end looks like from here
                _company.leave()
            code, why = 1, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            _say(traceback.format_exc(), everybody=True)
    if _company is not None:
        _company.failed(why)
    return code


def _say(text: str, everybody: bool = False) -> None:
    """On rank 0; before the ranks know each other also on others, for what may have happened to them alone."""
    if launchers.started_as_first() or (everybody and _company is None):
        print(text, file=sys.__stderr__, flush=True)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - no path of anybody's
        handlers = [h for h in _handlers() if isinstance(h.stream, type(sys.stderr))]
        before = [handler.setStream(nowhere) for handler in handlers]
        try:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        finally:
            for handler, stream in zip(handlers, before, strict=True):
                handler.setStream(stream)


def _handlers() -> list[Any]:
    """Of logging, those that print."""
    import logging

    return [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.StreamHandler)]


def same_everywhere(facts: Mapping[str, str]) -> None:
    """Raises DataError when the ranks see other files, as machines with copies of their own may."""
    everybody = dist.gather_objects((socket.gethostname(), dict(facts)))
    host, first = everybody[0]
    for rank, (other, theirs) in enumerate(everybody):
        if odd := [name for name in first if theirs.get(name) != first[name]]:
            raise DataError(
                f"rank {rank} on {other} has another {odd[0]} than rank 0 on {host}: sha256 "
                f"{str(theirs.get(odd[0]))[:12]}… and {first[odd[0]][:12]}…; give all machines the same files"
            )


# ------------------------------------------------------------------------------------------------------------- sharing


def own_share(batches: Sequence[T]) -> Sequence[T]:
    """The batches of this rank: every rank takes the next one. They are those that one process would have, so that
    what is computed of them has the same bits."""
    return batches[dist.rank() :: dist.world_size()]


def steps(batches: Sequence[Any]) -> int:
    """Forwards that every rank does, whether it has a batch or not."""
    return -(-len(batches) // dist.world_size())


def exchange(tables: Mapping[Any, Tensor], rows: Tensor) -> Tensor:
    """Give all ranks the rows that each has filled in tables (N D) of the same shape; all filled rows, in order."""
    if dist.world_size() == 1:
        return rows
    filled = [torch.from_numpy(one) for one in dist.gather_objects(rows.numpy())]
    for sender, theirs in enumerate(filled):
        for part in theirs.split(BLOCK):
            for table in tables.values():
                block = table[part] if sender == dist.rank() else table.new_empty(len(part), table.shape[1])
                td.broadcast(block, sender)
                table[part] = block
    return torch.cat(filled).sort().values


def send_from_first(tensor: Tensor | None) -> Tensor:
    """Rank 0's tensor on all ranks, in pieces; on the CPU."""
    if dist.world_size() == 1:
        assert tensor is not None
        return tensor
    shape, dtype = dist.broadcast((tuple(tensor.shape), tensor.dtype) if tensor is not None else None)
    whole = torch.empty(shape, dtype=dtype) if tensor is None else tensor
    for part in whole.split(BLOCK):
        td.broadcast(part, 0)  # views: what comes is in its place
    return whole
