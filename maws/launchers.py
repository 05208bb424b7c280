"""Which launcher started this process, and what it says: the only reader of launcher environment variables.

    torchrun, deepspeed   RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torch.distributed reads them
    environment           the same, set by hand or by a launcher we do not know
    srun                  SLURM_PROCID and its like; where rank 0 is follows from the step's list of nodes
    mpirun                Open MPI's and MPICH's (Intel MPI's); MASTER_ADDR and MASTER_PORT must be given
    plain python          nothing: one process

What contradicts itself is refused at once: ranks that do not find each other would wait for half an hour.
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from maws.config import ConfigError

ALWAYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OPEN_MPI = "OMPI_COMM_WORLD_"
MPI = {  # rank, size, rank and size on this machine
    "Open MPI": (OPEN_MPI + "RANK", OPEN_MPI + "SIZE", OPEN_MPI + "LOCAL_RANK", OPEN_MPI + "LOCAL_SIZE"),
    "PMI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
FIRST = ("RANK", "SLURM_PROCID", *(kind[0] for kind in MPI.values()))  # what says which rank this is
FIRST_PORT, PORTS = 15000, 16384  # below what Linux gives to outgoing connections (from 32768)


@dataclass(frozen=True)
class World:
    """This process among the others, and which launcher started it."""

    rank: int
    size: int
    local_rank: int
    launcher: str
    local_size: int = 1  # ranks on this machine


_last: tuple[dict[str, str], World] | None = None


def detect() -> World:
    """Read what a launcher left in the environment and fill in what `torch.distributed` and DeepSpeed need.

    Raises ConfigError where the variables contradict each other or some are missing.
    """
    global _last
    env = os.environ
    if _last and _last[0] == {name: env.get(name) for name in _last[0]}:  # what is there is what we wrote
        return _last[1]
    if "RANK" in env or "WORLD_SIZE" in env:
        world = _named(env)
    elif "SLURM_PROCID" in env:
        world = _slurm(env)
    elif found := next((kind for kind, (rank, *_) in MPI.items() if rank in env), None):
        world = _mpi(env, found)
    else:
        world = World(0, 1, 0, "plain python")
    _check(world)
    _fill(env, world)
    _last = {name: env[name] for name in (*ALWAYS[:-1], "LOCAL_SIZE")}, world  # each group may have a port of its own
    return world


def one_device_each(devices: int) -> World:
    """The world of ranks with a GPU each, `devices` of them visible here: a launcher may show every rank only its own.

    Raises ConfigError when there are several, but not for all ranks.
    """
    global _last
    world = detect()
    if devices == 1 and world.local_rank:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed takes this for the number of the device
        world = replace(world, local_rank=0)
        _last = {name: os.environ[name] for name in (*ALWAYS[:-1], "LOCAL_SIZE")}, world
    if world.local_rank >= devices:
        raise ConfigError(
            f"local rank {world.local_rank} needs a GPU of its own and {devices} are visible; start one rank for each "
            f"GPU, or show each rank one (srun --gpus-per-task=1)"
        )
    return world


def started_alone() -> bool:
    """Is this the only process, as far as the environment says? Nothing is filled in where no launcher is named.

    Raises ConfigError as `detect` does.
    """
    return not any(name in os.environ for name in FIRST) or detect().size == 1


def started_as_first() -> bool:
    """Is this rank 0, as far as can be told without an error?"""
    return next((os.environ[n] for n in FIRST if n in os.environ), "0").strip() in ("", "0")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _named(env: Mapping[str, str]) -> World:
    """From the names of torch.distributed."""
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_RANK" in env else "environment"
    rank, size = (_number(env, name, f"{launcher} gives both RANK and WORLD_SIZE") for name in ("RANK", "WORLD_SIZE"))
    if size > 1:
        for name, rule in (("LOCAL_RANK", "which device is whose"), ("MASTER_ADDR", "where rank 0 is")):
            if name not in env:
                raise ConfigError(
                    f"WORLD_SIZE={size} but {name} is not set, which says {rule}; "
                    f"set {', '.join(ALWAYS)} for every rank, or start with torchrun, deepspeed or srun"
                )
    local = _number(env, "LOCAL_RANK", "it is this machine's rank") if "LOCAL_RANK" in env else 0
    machine = int(env["LOCAL_SIZE"]) if launcher == "deepspeed" else int(env.get("LOCAL_WORLD_SIZE", size))
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if launcher == "torchrun" and tasks > 1 and size == machine and int(env.get("SLURM_NNODES", "1")) > 1:
        raise ConfigError(
            f"srun started torchrun {tasks} times, and each knows only its own machine (WORLD_SIZE={size}): {tasks} "
            f"runs would write the same folder; give torchrun --nnodes $SLURM_NNODES and --rdzv-endpoint, as in "
            f"docs/launch/torchrun.sbatch"
        )
    return World(rank, size, local, launcher, machine)


def _slurm(env: Mapping[str, str]) -> World:
    """From Slurm's names. Raises ConfigError in the batch script itself, which is one process of a job of several."""
    if "SLURM_STEP_ID" not in env and "SLURM_STEPID" not in env:  # no step: a batch script, or a shell in it
        if int(env.get("SLURM_NTASKS", "1")) > 1:
            raise ConfigError(
                f"this is the batch script of a job of SLURM_NTASKS={env['SLURM_NTASKS']} and not one of its tasks; "
                f"write `srun python maws/train.py …` (or torchrun), or set RANK=0 WORLD_SIZE=1 for one process"
            )
        return World(0, 1, 0, "plain python")
    size = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
    env = {"SLURM_STEP_NUM_TASKS": size, "SLURM_LOCALID": "0", **env}
    rule = "srun sets it for every task"
    rank, size, local = (_number(env, n, rule) for n in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
    tasks = expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", str(size))))
    node = int(env.get("SLURM_NODEID", "0"))
    return World(rank, size, local, "srun", tasks[node] if node < len(tasks) else local + 1)


def _mpi(env: Mapping[str, str], kind: str) -> World:
    names = MPI[kind]
    rank, size, local, machine = (_number(env, n, f"{kind} was found by {names[0]}") for n in names)
    if size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= set(env):
        raise ConfigError(
            f"{names[1]}={size}, but mpirun does not say where rank 0 is; add -x MASTER_ADDR=HOST -x MASTER_PORT=29500 "
            f"(MPICH: -genv NAME VALUE), or start with torchrun, deepspeed or srun"
        )
    return World(rank, size, local, "mpirun", machine)


def _number(env: Mapping[str, str], name: str, rule: str) -> int:
    text = env.get(name, "")
    if not text.strip().isdecimal():
        what = f"{name}={text!r} is not a number" if name in env else f"{name} is not set"
        raise ConfigError(f"{what}; {rule}. Correct it, or unset RANK and WORLD_SIZE to run one process")
    return int(text)


def _check(world: World) -> None:
    if world.rank >= world.size:
        raise ConfigError(f"rank {world.rank} cannot be one of {world.size}: ranks count from 0 (by {world.launcher})")
    if world.local_rank >= world.local_size or world.local_size > world.size:
        raise ConfigError(
            f"local rank {world.local_rank} of {world.local_size} on this machine cannot be with {world.size} ranks in "
            f"all (by {world.launcher}); LOCAL_RANK counts from 0 on every machine"
        )


def _fill(env: "os._Environ[str]", world: World) -> None:
    env.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank))
    env["LOCAL_SIZE"] = str(world.local_size)  # without it DeepSpeed asks `numactl` for every bucket it sends
    if world.launcher == "srun":
        env.setdefault("MASTER_ADDR", _first_node(env, world))
        env.setdefault("MASTER_PORT", str(port_of_job(env.get("SLURM_JOB_ID", "0"), env.get("SLURM_STEP_ID", "0"))))
    elif world.size == 1 and world.launcher != "torchrun":
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        if world.launcher == "plain python" or "MASTER_PORT" not in env:
            env["MASTER_PORT"] = str(free_port())
    env.setdefault("MASTER_PORT", "29500")  # torch.distributed's own


def _first_node(env: Mapping[str, str], world: World) -> str:
    """Where rank 0 of a step is: the first of its nodes. SLURM_LAUNCH_NODE_IPADDR is only where srun was called, which
    may be a login node; it is taken where there is no list."""
    if world.local_size == world.size:
        return "127.0.0.1"
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    if nodes:
        return next(expand_nodes(nodes))
    if "SLURM_LAUNCH_NODE_IPADDR" in env:
        return env["SLURM_LAUNCH_NODE_IPADDR"]
    raise ConfigError(f"srun started {world.size} tasks and names no nodes (SLURM_JOB_NODELIST); set MASTER_ADDR")


def port_of_job(job: str, step: str = "0") -> int:
    """A port that all ranks of a job's step agree on and that two jobs on one node hardly share."""
    numbers = [int(re.sub(r"\D", "", text) or 0) for text in (job, step)]
    return FIRST_PORT + (numbers[0] * 16 + numbers[1]) % PORTS


def expand_nodes(text: str) -> Iterator[str]:
    """The hosts of a Slurm list in order: `a[01-03,7],b` is a01, a02, a03, a7, b. Raises ConfigError."""
    for item in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        yield from _expand(item, text)


def _expand(item: str, whole: str) -> Iterator[str]:
    head, bracket, rest = item.partition("[")
    if not bracket:
        yield head
        return
    inside, closing, tail = rest.partition("]")
    if not closing:
        raise ConfigError(f"{whole!r} is not a list of nodes as Slurm writes them; set MASTER_ADDR")
    for part in inside.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise ConfigError(f"{whole!r} is not a list of nodes as Slurm writes them ({part!r}); set MASTER_ADDR")
        for number in range(int(first), int(last or first) + 1):
            yield from (f"{head}{number:0{len(first)}}{end}" for end in _expand(tail, whole))


def expand_counts(text: str) -> list[int]:
    """Tasks of each node: `4(x2),1` is 4, 4, 1. Raises ConfigError for another form."""
    counts: list[int] = []
    for item in text.split(","):
        if not (match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())):
            raise ConfigError(f"SLURM_TASKS_PER_NODE={text!r} is not as Slurm writes it: 4(x2),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
