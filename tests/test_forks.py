"""Forked ranks are what fresh processes would have been."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from forks import TESTS, Forked, server_pid
from processes import is_alive, status
from training import Training, arguments, build_shards, losses

ROOT = TESTS.parent


def fork(target: str, *given: object, **env: str) -> Forked:
    return Forked(target, given, env=os.environ | env, cwd=ROOT, path=[str(TESTS)])


def leave(code: int) -> int:
    print(os.environ["MARK"], os.getcwd(), os.getsid(0) == os.getpid(), sys.argv, file=sys.stderr)
    return code


def raises(name: str) -> None:
    raise {"exit": SystemExit(2), "text": SystemExit("sorry"), "error": ValueError("wrong")}[name]


@pytest.mark.parametrize("code", [0, 1, 2, 75, 130])
def test_the_exit_code_is_seen(code):
    rank = fork("test_forks:leave", code, MARK="here")
    assert rank.wait(60) == rank.poll() == code
    assert rank.printed() == f"here {ROOT} True ['test_forks']\n"


def test_an_error_is_printed_and_a_death_by_signal_is_told():
    assert [fork("test_forks:raises", name).wait(60) for name in ("exit", "text", "error")] == [2, 1, 1]
    failed = fork("test_forks:raises", "error")
    assert failed.wait(60) == 1 and "ValueError: wrong" in failed.printed()
    for number in (signal.SIGKILL, signal.SIGTERM):
        sleeper = fork("time:sleep", 60)
        assert sleeper.poll() is None and sleeper.wait(0.05) is None
        os.killpg(sleeper.pid, number)
        assert sleeper.wait(20) == -number
        assert not is_alive(sleeper.pid)


def test_the_server_has_no_thread_that_a_fork_would_lose():
    """Python 3.12 warns of such forks; locks held by the lost thread would stay locked."""
    fork("time:sleep", 0).wait(60)
    assert len(list(Path(f"/proc/{server_pid()}/task").iterdir())) == 1


@pytest.mark.slow  # it imports everything once more
def test_a_server_whose_process_is_gone_ends_with_all_it_has_forked():
    killed = fork("test_forks:start_a_sleeper")
    assert killed.wait(120) == -signal.SIGKILL
    server, sleeper = (int(word) for word in killed.printed().split()[-2:])
    until = time.monotonic() + 20
    while is_alive(server) or is_alive(sleeper):
        assert time.monotonic() < until, (status(server), status(sleeper))
        time.sleep(0.05)


def start_a_sleeper() -> None:
    rank = fork("time:sleep", 600)
    print(server_pid(), rank.pid, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.timeout(600)
def test_the_script_does_to_the_bit_what_a_forked_rank_does(tmp_path):
    shards = build_shards(tmp_path)
    asked = [arguments("mae", tmp_path / name, shards, "optim.length=2 steps") for name in ("script", "forked")]
    script = Training([], command=[sys.executable, str(ROOT / "maws" / "train.py"), *asked[0]])
    codes, printed = script.wait()
    assert codes == [0] and "started by plain python: 1 rank(s) on cpu" in printed, printed
    assert Training(asked[1]).wait()[0] == [0]
    assert losses(tmp_path / "script") == losses(tmp_path / "forked")
