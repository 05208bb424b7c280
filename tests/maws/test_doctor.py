"""`python -m maws doctor` sees what is broken, says what to do, and never fails over a broken thing itself."""

import json
import os
import resource
import shutil
import socket
from collections import namedtuple
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from maws.__main__ import main
from maws.checks import OK, PROBLEM, WARNING, Finding, data, found, machine, software

Usage = namedtuple("Usage", "total used free")


def levels(findings) -> dict[str, str]:
    return {f.subject: f.level for f in findings}


def test_a_sound_machine_has_no_problem_and_json_says_the_same(shards_path, tmp_path, capsys):
    arguments = ["doctor", "--shards", str(shards_path), "--run", str(tmp_path / "new"), "--json"]
    code = main(arguments)
    findings = json.loads(capsys.readouterr().out)
    assert code == (1 if any(f["level"] == PROBLEM for f in findings) else 0)
    assert {"python", "packages", "torch", "gpus", "deepspeed", "gloo", "disk", "shards", "pictures"} <= {
        f["subject"] for f in findings
    }
    assert all(f["do"] for f in findings if f["level"] != OK), "a finding without a way out"
    assert not list(tmp_path.iterdir()), "it left something behind"


def test_what_is_printed_fits_its_columns_and_counts_what_it_found(monkeypatch, capsys):
    bad = Finding("disk", PROBLEM, "a very long story " * 20, "free some")
    monkeypatch.setattr("maws.doctor.checks", lambda options: [("disk", lambda: bad), ("python", software.python)])
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 110
    assert "-> free some" in printed
    assert "1 problems" in printed
    assert "…" not in printed


def test_a_check_that_fails_itself_is_a_warning_and_the_others_are_heard():
    def broken() -> Finding:
        raise RuntimeError("no such thing")

    (finding,) = found("clock", broken)
    assert (finding.subject, finding.level) == ("clock", WARNING)
    assert "no such thing" in finding.seen


@pytest.mark.parametrize(("free", "level"), [(10, PROBLEM), (12 * 2**30, WARNING), (100 * 2**30, OK)])
def test_a_tiny_disk_is_seen_before_the_save_that_would_fill_it(free, level, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free))
    assert machine.disk(tmp_path / "not" / "there" / "yet", 10 * 2**30).level == level


def test_a_folder_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    assert machine.durability(tmp_path).level in (OK, WARNING)
    monkeypatch.setattr(os, "fsync", refuse)
    finding = machine.durability(tmp_path)
    assert finding.level == PROBLEM
    assert "Read-only" in finding.seen
    assert not list(tmp_path.iterdir())


def test_little_shared_memory_and_few_open_files_are_warnings(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 * 2**20, 0, 64 * 2**20))  # docker's default
    assert machine.shared_memory(tmp_path).level == WARNING
    assert machine.shared_memory(tmp_path / "none").level == PROBLEM
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 1024))
    assert machine.open_files().level == WARNING


@pytest.mark.parametrize(("text", "limit"), [("max 100000", 0), ("150000 100000", 1.5)])
def test_the_processor_limit_of_a_control_group_is_read(text, limit, tmp_path):
    (tmp_path / "cpu.max").write_text(text)
    assert machine.cpu_limit(tmp_path) == limit


def test_the_memory_limit_of_a_control_group_is_read(tmp_path):
    assert machine.memory_limit(tmp_path) == 0
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert machine.memory_limit(tmp_path) == 2**30


def test_more_threads_than_processors_are_a_warning(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert levels(machine.cores())["threads"] == WARNING


def test_a_port_that_is_taken_is_named():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        number = s.getsockname()[1]
        assert machine.port(number).level == WARNING
    assert machine.port(number).level == OK


def test_two_ranks_meet_and_ranks_that_cannot_are_a_problem(monkeypatch):
    assert machine.gloo().level == OK
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothere0")
    finding = machine.gloo(3.0)
    assert finding.level == PROBLEM
    assert "GLOO_SOCKET_IFNAME=nothere0" in finding.do


def without(name: str):
    def installed(wanted: str) -> str:
        if wanted.lower() == name:
            raise PackageNotFoundError(wanted)
        return version(wanted)

    return installed


def test_a_missing_package_is_named_with_the_line_that_installs_it():
    finding = next(f for f in software.packages(installed=without("timm")) if f.subject == "packages")
    assert finding.level == PROBLEM
    assert "missing: timm" in finding.seen
    assert "pip install" in finding.do


def test_versions_other_than_the_tested_ones_are_a_warning(tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text(f"# tested\ntimm=={version('timm')}\nnumpy==1.0.0\nnot-installed-at-all==3.1\n")
    finding = next(f for f in software.packages(pins) if f.subject == "versions")
    assert finding.level == WARNING
    assert "numpy" in finding.seen
    assert "timm" not in finding.seen
    assert "not-installed" not in finding.seen


def test_torchvision_for_another_torch_is_a_problem():
    assert software.torch_and_vision().level == OK
    other = software.torch_and_vision(lambda name: "2.11.0" if name == "torch" else version(name))
    assert other.level == PROBLEM
    assert "wants torch" in other.seen


def test_traps_in_the_environment_are_named():
    seen = [f.seen for f in software.nccl({"NCCL_P2P_DISABLE": "1", "CUDA_LAUNCH_BLOCKING": "0"}) if f.level == WARNING]
    assert len(seen) == 1
    assert seen[0].startswith("NCCL_P2P_DISABLE=1")


def test_the_lock_of_a_killed_build_is_found(tmp_path):
    (tmp_path / "py311_cu132" / "async_io").mkdir(parents=True)
    (tmp_path / "py311_cu132" / "async_io" / "lock").touch()
    findings = list(software.deepspeed({"TORCH_EXTENSIONS_DIR": str(tmp_path)}))
    assert any(f.level == WARNING and "lock" in f.seen for f in findings)


def test_another_process_on_a_gpu_is_named_and_this_one_is_not():
    lines = f"{os.getpid()}, python, 500 MiB\n4242, somebody, 70000 MiB\n"
    (finding,) = software.gpu_processes(lambda command: lines)
    assert "4242" in finding.seen
    assert str(os.getpid()) not in finding.seen


@pytest.fixture
def copied(shards_path, tmp_path) -> Path:
    return Path(shutil.copytree(shards_path, tmp_path / "shards"))


def test_a_bit_flipped_in_a_shard_and_a_missing_shard_are_named(copied):
    assert levels(data.shards(copied, full=True)) == {"shards": OK, "shard files": OK, "pictures": OK}
    tar = sorted((copied / "shards").glob("*.tar"))[1]
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    finding = next(f for f in data.shards(copied, full=True) if f.subject == "shard files")
    assert finding.level == PROBLEM
    assert tar.name in finding.seen
    tar.unlink()
    assert any(f"{tar.name} is missing" in f.seen for f in data.shards(copied) if f.level == PROBLEM)


def test_a_folder_that_is_no_shard_set_and_one_that_is_no_tokenizer_are_problems(tmp_path):
    (finding,) = data.shards(tmp_path)
    assert finding.level == PROBLEM
    assert data.tokenizer(tmp_path).level == PROBLEM


def test_a_run_says_whether_it_can_be_continued(tmp_path):
    assert levels(data.run(tmp_path / "new")) == {"run": OK}
    step = tmp_path / "checkpoints" / "step_0000010"
    step.mkdir(parents=True)
    (tmp_path / "metrics.jsonl").touch()
    assert levels(data.run(tmp_path)) == {"run": WARNING}
    (step / "rank_00000.safetensors").write_bytes(b"12345")
    entry = {"name": "rank_00000.safetensors", "bytes": 5, "sha256": ""}
    (step / "manifest.json").write_text(json.dumps({"format": 1, "files": [entry]}))
    assert "step_0000010" in next(iter(data.run(tmp_path))).seen
    assert levels(data.run(tmp_path)) == {"run": OK}
    (step / "rank_00000.safetensors").write_bytes(b"123")
    assert levels(data.run(tmp_path)) == {"run": WARNING}
