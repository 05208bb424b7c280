"""The machine: processors, memory, disks, limits, clock, ports, and whether two processes can talk."""

import math
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from maws.checks import OK, PROBLEM, WARNING, Finding, gib
from maws.devices import GIB
from maws.files import sync

CGROUP = Path("/sys/fs/cgroup")
SHM = Path("/dev/shm")
OPEN_FILES = 4096  # 128 tars kept open by each loader worker and rank, and sockets; ours
SHM_BYTES = GIB  # what NVIDIA's manual of NCCL gives a container
SLOW_SYNC = 0.5  # seconds for a file of one MiB; ours
PORT = 29500  # what launchers take where nothing is said


def cores() -> Iterator[Finding]:
    """Processors that this process may use: by affinity, and by the limit of its control group."""
    have, may, limit = os.cpu_count() or 1, len(os.sched_getaffinity(0)), cpu_limit()
    seen = f"{have} there, {may} may be used" + (f", limited to {limit:g} by the control group" if limit else "")
    if limit and limit < may - 0.5:
        do = "start as many ranks and workers as the limit allows; set OMP_NUM_THREADS accordingly"
        yield Finding("processors", WARNING, seen, do)
    elif may < have:
        yield Finding("processors", WARNING, seen, "ask the scheduler for more, if this job was to have them all")
    else:
        yield Finding("processors", OK, seen)
    threads, policy = os.environ.get("OMP_NUM_THREADS", ""), os.environ.get("OMP_WAIT_POLICY", "")
    if threads.isdecimal() and int(threads) > may:
        do = f"set it to at most {may} over the ranks of this machine, or leave it out"
        yield Finding("threads", WARNING, f"OMP_NUM_THREADS={threads}, {may} processors", do)
    else:
        said = f"OMP_NUM_THREADS={threads}" if threads else "OMP_NUM_THREADS not set: ranks share the processors"
        yield Finding("threads", OK, said + (f", OMP_WAIT_POLICY={policy}" if policy else ""))


def cpu_limit(root: Path = CGROUP) -> float:
    """Processors that the control group allows (v2, or v1); 0: no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return 0.0 if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return 0.0 if int(quota) < 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return 0.0


def memory(saving: float = 0.0) -> Finding:
    """Host memory: what is free, and the control group's limit; `saving` bytes are needed for a checkpoint."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = memory_limit()
    seen = f"{gib(free)} free of {gib(total)}"
    if limit and limit < total:
        seen += f"; the control group allows {gib(limit)}"
    room = min(free, limit or free)
    if room < saving:
        return Finding(
            "memory",
            PROBLEM,
            f"{seen}; a copy for saving takes {gib(saving)}",
            "use more nodes, or set checkpoint.asynchronous=no",
        )
    if room < 4 * GIB:
        return Finding(
            "memory", WARNING, seen, "end what else runs here, or ask for more: loading torch takes 1 GiB a rank"
        )
    return Finding("memory", OK, seen)


def memory_limit(root: Path = CGROUP) -> int:
    """Bytes that the control group allows; 0: no limit."""
    for path in (root / "memory.max", root / "memory" / "memory.limit_in_bytes"):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        return 0 if text == "max" or int(text) > 2**60 else int(text)
    return 0


def free_memory() -> float:
    """Bytes that this process may still take; infinity where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return min(int(lines["MemAvailable"].split()[0]) * 1024, memory_limit() or math.inf)
    except (OSError, KeyError, ValueError):
        return math.inf


def shared_memory(path: Path = SHM) -> Finding:
    """Where NCCL's ranks of one machine meet and talk when they cannot reach each other's GPU."""
    if not path.is_dir():
        return Finding(
            "shared memory",
            PROBLEM,
            f"there is no {path}, which NCCL needs",
            "in a container: --ipc=host or --shm-size=1g",
        )
    use = shutil.disk_usage(path)
    seen = f"{gib(use.free)} free of {gib(use.total)} in {path}"
    if use.free < SHM_BYTES:
        return Finding("shared memory", WARNING, seen, "for NCCL, in a container: --ipc=host or --shm-size=1g")
    return Finding("shared memory", OK, seen)


def open_files() -> Finding:
    """How many files a process may hold open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = [("unlimited" if n == resource.RLIM_INFINITY else str(n)) for n in (soft, hard)]
    seen = f"at most {limits[0]} a process (hard limit {limits[1]})"
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        return Finding("open files", WARNING, seen, f"ulimit -n {OPEN_FILES} in the job, or more")
    return Finding("open files", OK, seen)


def disk(folder: Path, needed: float = 0.0) -> Finding:
    """Room for checkpoints where runs are kept; `needed` bytes, 0 where that is not known."""
    there = nearest_folder(folder)
    free = shutil.disk_usage(there).free
    seen = f"{gib(free)} free in {there}" + (
        f"; the kept checkpoints and one under way take {gib(needed)}" if needed else ""
    )
    if free < needed:
        return Finding("disk", PROBLEM, seen, "free some, choose another --run, or lower checkpoint.keep")
    if free < max(2 * needed, 5 * GIB):
        return Finding("disk", WARNING, seen, "free some before a long training: saves must not meet a full disk")
    return Finding("disk", OK, seen)


def nearest_folder(path: Path) -> Path:
    """The path, or the first folder above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def durability(folder: Path) -> Finding:
    """Whether a rename replaces a file at once and whole, and how long it takes until a file is on the disk."""
    there = nearest_folder(folder)
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".maws-doctor-") as name:
            new, old = Path(name) / "new", Path(name) / "old"
            old.write_bytes(b"old")
            started = time.perf_counter()
            new.write_bytes(os.urandom(1 << 20))
            sync(new)
            new.replace(old)
            sync(Path(name))
            took = time.perf_counter() - started
            whole = not new.exists() and old.stat().st_size == 1 << 20
    except OSError as e:
        return Finding(
            "file system", PROBLEM, f"{there}: {e}", "give a --run that can be written to and knows fsync and rename"
        )
    seen = f"1 MiB written, synced and renamed in {1000 * took:.0f} ms in {there}"
    if not whole:
        return Finding(
            "file system", PROBLEM, f"{there}: a rename did not replace the file", "keep runs on another file system"
        )
    if took > SLOW_SYNC:
        return Finding(
            "file system", WARNING, seen, "saves will take long: keep runs on a faster disk, or save less often"
        )
    return Finding("file system", OK, seen)


def clock() -> Finding:
    """A clock that is far off makes logs and certificates useless; here only what can be seen without a network."""
    year, code = time.gmtime().tm_year, Path(__file__).stat().st_mtime
    seen = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if year < 2024 or time.time() < code - 86_400:
        return Finding("clock", WARNING, f"{seen}, before these files were written", "set it: timedatectl set-ntp true")
    return Finding("clock", OK, seen)


def port(number: int = PORT) -> Finding:
    """Can rank 0 be listened for where launchers expect it?"""
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", number))
        except OSError:
            return Finding("port", WARNING, f"{number} is taken", "give the launcher another: --master_port 29501")
    return Finding("port", OK, f"{number} is free")


def gloo(seconds: float = 8.0) -> Finding:
    """Two ranks of this machine add a number over gloo; forked, so that torch is imported once."""
    with tempfile.TemporaryDirectory() as name:
        store, started = f"file://{name}/{uuid.uuid4().hex}", time.perf_counter()
        children = [_child(rank, store, name) for rank in range(2)]
        codes = [_wait(child, started + seconds) for child in children]
        took = time.perf_counter() - started
        said = "; ".join(p.read_text().strip() for p in sorted(Path(name).glob("error_*")))
    if codes == [0, 0]:
        return Finding("gloo", OK, f"two ranks met over loopback in {took:.1f} s")
    name = os.environ.get("GLOO_SOCKET_IFNAME", "")
    do = (
        f"GLOO_SOCKET_IFNAME={name} is set: is there such an interface?"
        if name
        else "is loopback up and the host's name in /etc/hosts?"
    )
    return Finding("gloo", PROBLEM, f"two ranks on this machine did not meet in {seconds:g} s ({said or codes})", do)


def _child(rank: int, store: str, folder: str) -> int:
    """A forked rank; its exit code is 0 when the sum came out right."""
    import torch
    import torch.distributed as td

    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        td.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        value = torch.tensor([float(rank + 1)])
        td.all_reduce(value)
        td.barrier()
        os._exit(0 if value.item() == 3 else 1)
    except BaseException as e:
        Path(folder, f"error_{rank}").write_text(str(e).splitlines()[0][:200] if str(e) else type(e).__name__)
        os._exit(1)


def _wait(pid: int, until: float) -> int:
    """The exit code of a child; one that takes longer is killed."""
    while time.perf_counter() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
