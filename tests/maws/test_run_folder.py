"""Whose a run folder is, before the first step."""

import os
import signal
import subprocess
import sys
import time

import pytest

from maws import run_folder
from maws.checkpoint import CheckpointError
from maws.run_folder import RunLock

HOLD = "import sys; from pathlib import Path; from maws.run_folder import RunLock\n" + (
    "lock = RunLock(Path(sys.argv[1])); lock.take(); print('held', flush=True); sys.stdin.read()"
)


def test_of_two_trainings_in_one_folder_the_second_is_refused_by_name_and_the_first_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LEAVING", 0.0)
    with RunLock(tmp_path / "run") as first, RunLock(tmp_path / "run") as second:
        first.take()
        first.take()  # once is enough
        with pytest.raises(CheckpointError, match=rf"is being trained by pid {os.getpid()} on .*another --run"):
            second.take()
    with RunLock(tmp_path / "run") as third:  # a run that ended lets go
        third.take()


def test_a_killed_training_lets_go_and_one_that_is_leaving_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LEAVING", 60.0)
    monkeypatch.setattr(time, "sleep", lambda _: holder.send_signal(signal.SIGKILL))
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with RunLock(tmp_path) as lock:
            lock.take()
        assert holder.wait() == -signal.SIGKILL


def test_a_folder_that_is_not_there_is_made_only_when_asked(tmp_path):
    with RunLock(tmp_path / "run") as lock:
        lock.take(make=False)
        assert not (tmp_path / "run").exists()
        lock.take()
        assert (tmp_path / "run" / "lock").exists()
