"""The software: Python, the tested versions, torch and its companions, CUDA, NCCL's settings, DeepSpeed's ops."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from maws.checks import OK, PROBLEM, WARNING, Finding, gib

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
OURS = "maws-open"
TRAPS = {  # environment variable -> (values that harm, what they do)
    "NCCL_P2P_DISABLE": (("1",), "GPUs of a node talk through the host's memory"),
    "NCCL_IB_DISABLE": (("1",), "nodes talk over TCP where they have InfiniBand"),
    "NCCL_SOCKET_IFNAME": (("lo",), "nodes cannot reach each other"),
    "GLOO_SOCKET_IFNAME": (("lo",), "nodes cannot reach each other"),
    "NCCL_DEBUG": (("TRACE",), "every operation is logged"),
    "TORCH_DISTRIBUTED_DEBUG": (("DETAIL",), "every collective is checked, slowly"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (("0",), "a failed collective waits for ever"),
    "TORCH_NCCL_BLOCKING_WAIT": (("1",), "collectives cannot overlap with computing"),
    "CUDA_LAUNCH_BLOCKING": (("1",), "every kernel is waited for"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (("1",), "every tensor is asked of the driver"),
}
Output = Callable[[list[str]], str]


def python() -> Finding:
    seen = f"{'.'.join(map(str, sys.version_info[:3]))} in {sys.prefix}"
    if sys.prefix == sys.base_prefix:
        return Finding("python", WARNING, f"{seen}, no virtual environment", "`make` makes one in .venv")
    return Finding("python", OK, seen)


def packages(constraints: Path = CONSTRAINTS, installed: Callable[[str], str] = version) -> Iterator[Finding]:
    """What is required is there, in the accepted range; and which versions are others than the tested ones."""
    missing, outside = list[str](), list[str]()
    try:
        wanted = [Requirement(line) for line in requires(OURS) or []]
    except PackageNotFoundError:
        yield Finding("packages", PROBLEM, f"{OURS} itself is not installed", "pip install -c constraints.txt -e .")
        return
    for need in (w for w in wanted if w.marker is None or w.marker.evaluate({"extra": ""})):
        try:
            have = installed(need.name)
        except PackageNotFoundError:
            missing.append(need.name)
            continue
        if not need.specifier.contains(have, prereleases=True):
            outside.append(f"{need.name} {have} (accepted: {need.specifier})")
    do = "pip install -c constraints.txt -e ."
    if missing or outside:
        seen = "; ".join([*([f"missing: {', '.join(missing)}"] if missing else []), *outside])
        yield Finding("packages", PROBLEM, seen, do)
    else:
        yield Finding("packages", OK, f"all {len(wanted)} requirements in their ranges")
    yield from _tested(constraints, installed, do)


def _tested(constraints: Path, installed: Callable[[str], str], do: str) -> Iterator[Finding]:
    if not constraints.is_file():
        yield Finding("versions", WARNING, f"there is no {constraints} to compare with", "work in a checkout")
        return
    other = []
    for name, tested in re.findall(r"^([\w.-]+)==(\S+)", constraints.read_text(), re.MULTILINE):
        try:
            if Version(have := installed(name)) != Version(tested):
                other.append(f"{name} {have} (tested: {tested})")
        except PackageNotFoundError:
            continue  # of an extra, or of another platform
    if other:
        more = f" and {len(other) - 5} more" if len(other) > 5 else ""
        yield Finding("versions", WARNING, f"other than tested: {', '.join(other[:5])}{more}", do)
    else:
        yield Finding("versions", OK, "all as in constraints.txt")


def torch_and_vision(installed: Callable[[str], str] = version) -> Finding:
    """torchvision is built for one version of torch and fails, late and strangely, with another."""
    torch, vision = installed("torch"), installed("torchvision")
    built_for = next((r for r in map(Requirement, requires("torchvision") or []) if r.name == "torch"), None)
    seen = f"torch {torch}, torchvision {vision}"
    if built_for and not built_for.specifier.contains(Version(torch).public, prereleases=True):
        return Finding(
            "torch",
            PROBLEM,
            f"{seen}, which wants torch{built_for.specifier}",
            "install both at once: pip install -c constraints.txt -e .",
        )
    return Finding("torch", OK, seen)


def gpus() -> Iterator[Finding]:
    """GPUs, their driver and their free memory."""
    import torch

    driver = Path("/proc/driver/nvidia/version")
    if not torch.cuda.is_available():
        if torch.version.cuda and driver.exists():
            first = driver.read_text().splitlines()[0].strip()
            do = "is the driver new enough for this CUDA, CUDA_VISIBLE_DEVICES empty, the container without --gpus all?"
            yield Finding(
                "gpus", PROBLEM, f"there is a driver ({first}), torch (CUDA {torch.version.cuda}) sees no GPU", do
            )
        else:
            yield Finding("gpus", OK, "none here: trains on the CPU over gloo")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        seen = f"{torch.cuda.get_device_name(index)}, {gib(free)} free of {gib(total)}, CUDA {torch.version.cuda}"
        if free < 0.9 * total:
            yield Finding(
                f"gpu {index}",
                WARNING,
                seen,
                "somebody else is on it (nvidia-smi); end that, or choose others with CUDA_VISIBLE_DEVICES",
            )
        else:
            yield Finding(f"gpu {index}", OK, seen)
    yield from gpu_processes(_output)


def gpu_processes(output: Output) -> Iterator[Finding]:
    """Other processes on the GPUs, as nvidia-smi knows them."""
    if shutil.which("nvidia-smi") is None and output is _output:
        return
    lines = output(["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"])
    others = [
        line.strip() for line in lines.splitlines() if line.strip() and line.split(",")[0].strip() != str(os.getpid())
    ]
    if others:
        yield Finding(
            "gpu processes", WARNING, "; ".join(others[:4]), "make sure that they may share the GPU with a training"
        )


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=3, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def nccl(env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """NCCL's version, and settings of the environment that slow or break a training."""
    import torch

    if torch.cuda.is_available():
        from torch.cuda.nccl import version as nccl_version

        yield Finding("nccl", OK, ".".join(map(str, nccl_version())))
    caught = {name: f"{name}={env[name]}: {harm}" for name, (values, harm) in TRAPS.items() if env.get(name) in values}
    for name, seen in caught.items():
        yield Finding("environment", WARNING, seen, f"unset {name}, unless it was set to look for a fault")
    if not caught:
        yield Finding("environment", OK, "no setting that slows or breaks collectives")


def deepspeed(env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Its version, and what building one of its ops would need; none is built, and it is not imported."""
    if importlib.util.find_spec("deepspeed") is None:
        yield Finding("deepspeed", PROBLEM, "not installed", "pip install -c constraints.txt -e .")
        return
    have = version("deepspeed")
    tested = next((r.specifier for r in map(Requirement, requires(OURS) or []) if r.name == "deepspeed"), None)
    outside = tested is not None and not tested.contains(have)
    yield Finding(
        "deepspeed",
        PROBLEM if outside else OK,
        have,
        f"install {tested}: its traps were measured there" if outside else "",
    )
    cache = Path(env.get("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions")))
    if locks := sorted(cache.glob("**/lock"))[:3]:
        yield Finding(
            "deepspeed ops",
            WARNING,
            f"{locks[0]} is there: a build was killed, or one is under way",
            "delete it if nothing builds: the next load would wait for it for ever",
        )
    lacking = [
        tool for tool in ("c++", "ninja") if shutil.which(tool) is None and importlib.util.find_spec(tool) is None
    ]
    seen = (
        f"none is needed; built so far: {', '.join(sorted({p.parent.name for p in cache.glob('*/*/*.so')})) or 'none'}"
    )
    if lacking:
        yield Finding(
            "deepspeed ops",
            WARNING,
            f"{seen}; {', '.join(lacking)} missing",
            "only ds_configs that offload to NVMe build one (async_io, needs libaio)",
        )
    else:
        yield Finding("deepspeed ops", OK, seen)
