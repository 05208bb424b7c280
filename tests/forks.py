"""Ranks forked from a process that has torch, DeepSpeed and maws/train.py imported: a start takes milliseconds.

rank = Forked("maws.train:main", [arguments], env=os.environ | {"RANK": "0"}, cwd=ROOT)
code = rank.wait(timeout=60)                  # or rank.poll(), rank.printed(), os.killpg(rank.pid, SIGKILL)

One server for each process that runs tests, started by its first `Forked` and gone with it. The server only imports:
it runs no operation of torch and starts no thread, so that what it forks is as good as a fresh process, but for two
things: all ranks hash strings alike, and modules that a rank would import late are there already. Tests that are about
`python maws/train.py` itself start that.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

TESTS = Path(__file__).resolve().parent
REQUEST_BYTES: Final = 1 << 18  # more than a Unix socket takes in one message
# What a rank imports after its start. DeepSpeed looks at each optimiser it knows, one of which loads torch's compiler.
LATE: Final = (
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "pyarrow.dataset",
    "transformers.models.xlm_roberta.modeling_xlm_roberta",
    "pytest",
    "torch.testing",
)
# Read when libraries are loaded: numpy and Arrow start threads then. CUDA is asked through NVML, as it does not work in
# a process forked from one that has called it.
SERVER_ENV: Final = {
    "OMP_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "PYTHONWARNINGS": "default",
}


class Forked:
    """A process that calls `module:function` with `arguments` (JSON) and leaves with the exit code it returns.

    It leads a session of its own. stderr goes to the descriptor `output`, or is kept for `printed`; stdout goes there
    too, or nowhere. `path` is put in front of the module path.
    """

    def __init__(
        self,
        target: str,
        arguments: Sequence[Any] = (),
        *,
        env: Mapping[str, str],
        cwd: Path,
        path: Sequence[str] = (),
        output: int | None = None,
        stdout: bool = False,
    ) -> None:
        request = {"target": target, "arguments": list(arguments), "env": dict(env), "cwd": str(cwd), "path": [*path]}
        self.returncode: int | None = None
        self._kept = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        self._status, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        weakref.finalize(self, _close, [self._kept, self._status])
        output = self._kept.fileno() if output is None else output
        with status, Path(os.devnull).open("r+b") as null:
            files = [null.fileno(), output if stdout else null.fileno(), output, status.fileno()]
            socket.send_fds(server(), [json.dumps(request).encode()], files)
        self.pid = int(self._said() or 0)
        if not self.pid:
            raise RuntimeError(f"the server of ranks has ended:\n{_server.printed() if _server else ''}")

    def _said(self) -> str:
        """The server's next message: the process id, later the exit code. Empty once the server is gone."""
        return self._status.recv(32).decode()

    def poll(self) -> int | None:
        """The exit code, -N for death by signal N; None while it runs."""
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit code; None if it still runs after `timeout` seconds."""
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._said() or -signal.SIGKILL)
        return self.returncode

    def printed(self) -> str:
        """What it has written by now."""
        return content(self._kept)


class Server:
    """The process that forks. When the connection closes, as when this process dies, it kills what it has forked."""

    def __init__(self) -> None:
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._kept = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=os.environ | SERVER_ENV, pass_fds=[theirs.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=self._kept, stderr=self._kept,
            )  # fmt: skip
        atexit.register(self.end)

    def printed(self) -> str:
        return content(self._kept)

    def end(self) -> None:
        self.connection.close()
        self.process.wait()
        self._kept.close()


_server: Server | None = None


def server() -> socket.socket:
    """The connection to this process's server; the first call starts it."""
    global _server
    _server = _server or Server()
    return _server.connection


def server_pid() -> int:
    server()
    assert _server is not None
    return _server.process.pid


def server_printed() -> str:
    """What this process's server and the libraries that it imports have written by now."""
    server()
    assert _server is not None
    return _server.printed()


def content(file: Any) -> str:
    """The whole file, without moving the position at which others write."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def _close(files: Iterable[Any]) -> None:
    for file in files:
        file.close()


def serve(requests: socket.socket) -> None:
    """Fork a process for each request until the connection closes; tell who asked its id and, later, its exit code."""
    from maws import stages

    for name in ("maws.train", *LATE):
        importlib.import_module(name)
    for name in stages.names():
        stages.load(name)
    gc.collect()
    gc.freeze()  # a child's collector leaves these pages shared
    running: dict[int, socket.socket] = {}
    wake, woken = socket.socketpair()
    woken.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    while True:
        ready = select.select([requests, wake], [], [])[0]
        if wake in ready:
            wake.recv(1024)
            _reap(running)
        if requests in ready:
            message, files, _, _ = socket.recv_fds(requests, REQUEST_BYTES, 4)
            if not message:
                break
            *standard, status = files
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _close([requests, wake, woken, *running.values()])
                os.close(status)
                _become(json.loads(message), standard)
            for file in standard:
                os.close(file)
            running[pid] = socket.socket(fileno=status)
            _tell(running[pid], pid)
    for pid in running:
        os.killpg(pid, signal.SIGKILL)


def _reap(running: dict[int, socket.socket]) -> None:
    for pid in list(running):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _tell(running[pid], os.waitstatus_to_exitcode(status))
            running.pop(pid).close()


def _tell(who: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody waits for it any more
        who.send(f"{number}".encode())


def _become(request: dict[str, Any], standard: list[int]) -> NoReturn:
    """In the child: be the process that was asked for."""
    from data_pipeline.ending import leave

    code = 1
    try:
        os.setsid()
        for number, file in enumerate(standard):
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.path[:0] = [*request["path"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        module, _, function = request["target"].partition(":")
        sys.argv = [module]
        code = getattr(importlib.import_module(module), function)(*request["arguments"]) or 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    leave(code)


if __name__ == "__main__":
    sys.path.remove(str(TESTS))  # tests/maws is not the package
    serve(socket.socket(fileno=int(sys.argv[1])))
