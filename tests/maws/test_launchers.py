"""Launchers: what each leaves in the environment, what contradicts itself, and the scripts of docs/launch/."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import BEFORE, ROOT, arguments, losses

from maws import launchers
from maws.config import ConfigError
from maws.launchers import World, detect, expand_counts, expand_nodes, port_of_job

LAUNCH = ROOT / "docs" / "launch"
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "4711", "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_JOB_NODELIST": "node[001-003,7]",
}  # fmt: skip
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
       "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip


@pytest.fixture
def started(monkeypatch):
    """`detect()` in a process started with these variables."""

    def _started(env: dict[str, str]) -> tuple[World, dict[str, str]]:
        monkeypatch.setattr(os, "environ", dict(env))
        monkeypatch.setattr(launchers, "_last", None)
        return detect(), dict(os.environ)

    return _started


def test_each_launcher_is_found_by_what_it_leaves(started):
    assert started(TORCHRUN)[0] == World(3, 4, 1, "torchrun", 2)
    assert started({**TORCHRUN, "TORCHELASTIC_RUN_ID": ""})[0].launcher == "torchrun"
    by_hand = {k: v for k, v in TORCHRUN.items() if k not in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE")}
    assert started({**by_hand, "CROSS_RANK": "1", "LOCAL_SIZE": "2"})[0] == World(3, 4, 1, "deepspeed", 2)
    assert started(by_hand)[0] == World(3, 4, 1, "environment", 4)
    assert started(SRUN)[0] == World(5, 6, 1, "srun", 2)
    assert started({**MPI, "MASTER_ADDR": "a", "MASTER_PORT": "1"})[0] == World(1, 2, 1, "mpirun", 2)
    pmi = {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
    assert started(pmi)[0] == World(0, 1, 0, "mpirun", 1)
    assert started({})[0] == World(0, 1, 0, "plain python", 1)


def test_what_torch_and_deepspeed_need_is_filled_in_and_a_second_look_sees_the_same(started):
    for env in (TORCHRUN, SRUN, {}):
        world, after = started(env)
        assert {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE"} <= set(after)
        assert (after["RANK"], after["LOCAL_SIZE"]) == (str(world.rank), str(world.local_size))
        assert detect() == world
    one, other = (started({})[1]["MASTER_PORT"] for _ in range(2))
    assert one != other  # two plain runs on a machine do not meet


def test_ranks_of_srun_meet_on_the_first_node_of_the_step_at_a_port_of_the_job(started):
    after = started({**SRUN, "SLURM_LAUNCH_NODE_IPADDR": "login.host"})[1]
    assert (after["MASTER_ADDR"], after["MASTER_PORT"]) == ("node001", str(port_of_job("4711", "0")))
    assert started({**SRUN, "SLURM_STEP_NODELIST": "b[9-10]"})[1]["MASTER_ADDR"] == "b9"
    assert started({**SRUN, "MASTER_ADDR": "mine", "MASTER_PORT": "7"})[1]["MASTER_ADDR"] == "mine"
    no_list = {k: v for k, v in SRUN.items() if k != "SLURM_JOB_NODELIST"}
    assert started({**no_list, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"})[1]["MASTER_ADDR"] == "10.0.0.1"
    with pytest.raises(ConfigError, match=r"srun started 6 tasks and names no nodes .* set MASTER_ADDR"):
        started(no_list)
    alone = {
        **SRUN,
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
    }
    assert started(alone)[1]["MASTER_ADDR"] == "127.0.0.1"  # all on one machine
    ports = {port_of_job(str(job), str(step)) for job in range(1000) for step in range(16)}
    assert len(ports) == 16000 and min(ports) >= 15000 and max(ports) < 32768


def test_lists_of_nodes_and_counts_are_read_as_slurm_writes_them():
    assert list(expand_nodes("node[001-003,7]")) == ["node001", "node002", "node003", "node7"]
    assert list(expand_nodes("a,b[08-11],c[1]x")) == ["a", "b08", "b09", "b10", "b11", "c1x"]
    assert list(expand_nodes("r[1-2]n[01-02]")) == ["r1n01", "r1n02", "r2n01", "r2n02"]
    assert expand_counts("4(x2),1") == [4, 4, 1]
    with pytest.raises(ConfigError, match="is not a list of nodes as Slurm writes them"):
        list(expand_nodes("node[1-x]"))
    with pytest.raises(ConfigError, match="SLURM_TASKS_PER_NODE='4x2' is not"):
        expand_counts("4x2")


def test_inside_a_job_torchrun_and_one_process_are_themselves(started):
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1", "SLURM_NNODES": "1"}
    assert started(batch)[0] == World(0, 1, 0, "plain python", 1)
    assert started({**batch, **TORCHRUN})[0].launcher == "torchrun"
    one_task = {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "1"}  # fmt: skip
    assert started(one_task)[0] == World(0, 1, 0, "srun", 1)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({**TORCHRUN, "RANK": "4"}, r"rank 4 cannot be one of 4: ranks count from 0 \(by torchrun\)"),
        ({"RANK": "0"}, r"WORLD_SIZE is not set; environment gives both"),
        ({"WORLD_SIZE": "2"}, r"RANK is not set"),
        ({**TORCHRUN, "RANK": "one"}, r"RANK='one' is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, r"WORLD_SIZE=2 but LOCAL_RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, r"MASTER_ADDR is not set, which says where rank 0 is"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, r"local rank 2 of 2 on this machine cannot be with 4 ranks"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, r"local rank 1 of 8 on this machine cannot be with 4"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, r"batch script of a job of SLURM_NTASKS=8"),
        ({**SRUN, "SLURM_PROCID": "6"}, r"rank 6 cannot be one of 6"),
        (MPI, r"mpirun does not say where rank 0 is; add -x MASTER_ADDR"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, r"MPI_LOCALRANKID is not set; PMI was found by PMI_RANK"),
        ({**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NNODES": "2"},
         r"srun started torchrun 2 times, and each knows only its own machine"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_with_a_way_out(env, words, started):
    with pytest.raises(ConfigError, match=words):
        started(env)


def test_a_rank_that_is_shown_only_its_own_gpu_takes_that_one(started, monkeypatch):
    started(TORCHRUN)
    assert launchers.one_device_each(1) == World(3, 4, 0, "torchrun", 2)
    assert os.environ["LOCAL_RANK"] == "0"
    started({**TORCHRUN, "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"})
    with pytest.raises(ConfigError, match="local rank 2 needs a GPU of its own and 2 are visible"):
        launchers.one_device_each(2)


# The scripts: with programs of their names that write down how they were called.
FAKES = {
    "srun": 'echo "srun $*" >> "$CALLS"; while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "scancel": 'echo "scancel $*" >> "$CALLS"; kill -USR1 "$(cat "$CALLS.pid")"',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" = show ] && echo node001 && echo node002; exit 0',
    "python": 'echo "python $*" >> "$CALLS"; trap "exit 75" USR1; echo $$ > "$CALLS.pid"; [ -z "$CODE" ] || exit $CODE'
              "; for i in $(seq 100); do sleep 0.1; done",
    "torchrun": """echo "torchrun $*" >> "$CALLS"; echo '{"event": "stop", "code": 75}' >> "$EVENTS"; exit 1""",
    "deepspeed": 'echo "deepspeed $*" >> "$CALLS"',
    "pkill": 'echo "pkill $*" >> "$CALLS"',
}  # fmt: skip


@pytest.fixture
def dry(tmp_path):
    """Run a script with fakes on PATH; (the process, the file of calls)."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in FAKES.items():
        (programs / name).write_text("#!/bin/bash\n" + body + "\n")
        (programs / name).chmod(0o755)
    calls, run = tmp_path / "calls", tmp_path / "run"
    run.mkdir()
    started: list[subprocess.Popen] = []

    def _dry(script: str, *words: str, code: str = "", **env: str) -> tuple[subprocess.Popen, Path]:
        slurm = {
            "SLURM_JOB_ID": "99",
            "SLURM_JOB_NODELIST": "node[001-002]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
        }
        env = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls), "EVENTS": str(run / "events.jsonl"),
               "CODE": code, **slurm, **env}  # fmt: skip
        command = ["bash", str(LAUNCH / script), *words, str(run), "data.shards=x"]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1], calls

    yield _dry
    for process in started:
        process.kill()


def test_every_script_is_bash_and_names_the_job_as_the_readme_does():
    scripts = [p for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch")]
    assert {p.name for p in scripts} == {"srun.sbatch", "torchrun.sbatch", "torchrun_static.sh", "deepspeed.sh"}
    for script in scripts:
        assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0, script
        assert "maws/train.py --stage" in script.read_text()


def test_sbatch_passes_the_signal_to_the_ranks_and_requeues_when_they_leave_with_75(dry):
    process, calls = dry("srun.sbatch", "mae", "debug")
    until = time.monotonic() + 20
    while not (calls.parent / "calls.pid").exists():
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)  # as Slurm does two minutes before the limit
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 75, printed
    lines = calls.read_text().splitlines()
    assert lines[0].startswith("srun python maws/train.py --stage mae --preset debug --run ")
    assert lines[0].endswith("--resume auto data.shards=x")
    assert lines[2:] == ["scancel --signal=USR1 99", "scontrol requeue 99"]


@pytest.mark.parametrize("code", ["0", "1", "130"])
def test_sbatch_ends_the_job_on_any_other_code(code, dry):
    process, calls = dry("srun.sbatch", "mae", "debug", code=code)
    process.communicate(timeout=20)
    assert process.returncode == int(code)
    assert "requeue" not in calls.read_text()


def test_torchrun_meets_at_the_first_node_and_is_requeued_by_a_new_stop_in_the_history(dry, tmp_path):
    process, calls = dry("torchrun.sbatch", "mae", "debug")
    process.communicate(timeout=20)
    text = calls.read_text()
    assert "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node001:15099 --rdzv-id 99" in text
    assert text.splitlines()[-1] == "scontrol requeue 99"
    calls.unlink()
    (tmp_path / "bin" / "torchrun").write_text("#!/bin/bash\nexit 1\n")  # fails before it does anything
    process, calls = dry("torchrun.sbatch", "mae", "debug")
    process.communicate(timeout=20)
    assert process.returncode == 1 and "requeue" not in calls.read_text()


def test_static_torchrun_and_deepspeed_are_given_their_hosts(dry):
    process, calls = dry("torchrun_static.sh", "2", "8", "first-host", "mae", "debug", NODE_RANK="1")
    process.communicate(timeout=20)
    assert (
        "--nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr first-host --master-port 29500" in calls.read_text()
    )
    hosts = LAUNCH / "hostfile"
    process, calls = dry("deepspeed.sh", str(hosts), "mae", "debug")
    process.communicate(timeout=20)
    assert f"deepspeed --hostfile {hosts} --master_port 29500 maws/train.py --stage mae" in calls.read_text()
    assert all(re.fullmatch(r"[\w.-]+ slots=\d+", line) for line in hosts.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["static", "rdzv"])
def test_two_hosts_on_loopback_train_as_one_process(how, shards_path, trained, tmp_path):
    """Two torchrun agents that know each other by address alone, one rank each, run the debug preset to its end."""
    assert not BEFORE["mae"]
    port = launchers.free_port()
    command = arguments("mae", tmp_path / "run", shards_path, "log.every=1")
    agents = []
    for node, address in enumerate(("127.0.0.1", "127.0.0.2")):
        meet = ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        if how == "rdzv":
            meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "x",
                    "--local-addr", address]  # fmt: skip
        agents.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meet,
                 "--", str(ROOT / "maws" / "train.py"), *command],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                env={k: v for k, v in os.environ.items() if k not in launchers.ALWAYS} | {"OMP_NUM_THREADS": "1"},
            )
        )  # fmt: skip
    try:
        printed = [agent.communicate(timeout=500)[0] for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(printed)
    assert any("started by torchrun: 2 rank(s)" in text for text in printed)
    one, two = losses(trained["mae"]), losses(tmp_path / "run")
    assert list(two) == list(one)
    assert max(abs(two[step] - one[step]) for step in one) < 2e-5
    assert json.loads((tmp_path / "run" / "release" / "config.json").read_text())["stage"] == "mae"
