"""Ranks that die, fall silent or hang are named to all others; strangers are not listened to."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from maws import dist, peers, watchdog
from maws.config import FaultsConfig
from maws.data.workers import Worker
from maws.history import read
from maws.peers import Hub, Limits, Peer, Spoke, Verdict, standing_still
from maws.watchdog import Watchdog, listen

TOKEN = "secret"


class Rank:
    """One rank's thread, and what it concluded."""

    def __init__(self, number: int, pid: int = 0) -> None:
        self.line: dict[str, Any] = {"host": f"node{number}", "pid": pid or 100 + number, "count": 0, "step": 7,
                                     "doing": "step", "where": f"file.py:{number} forward"}  # fmt: skip
        self.verdicts: list[Verdict] = []
        self.told = threading.Event()
        self.post: Hub | Spoke

    def own(self) -> dict[str, Any]:
        return dict(self.line)

    def judge(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        self.told.set()

    def knows(self, **facts: Any) -> None:
        """Wait until rank 0 has heard this of another rank (`rank`), or rank 0's own word has come here."""
        rank = facts.pop("rank", 0)
        until = time.monotonic() + 5
        while time.monotonic() < until:
            peer = self.post.peers[rank] if isinstance(self.post, Hub) else self.post.hub
            if all(getattr(peer, name) == value for name, value in facts.items()):
                return
            time.sleep(0.005)
        raise AssertionError(f"{facts} of rank {rank} was not heard")

    def hears(self, seconds: float = 5) -> Verdict:
        assert self.told.wait(seconds), "no verdict"
        return self.verdicts[0]


Star = Callable[..., list[Rank]]


@pytest.fixture
def star(monkeypatch) -> Iterator[Star]:
    """Start rank 0 and some others as threads of this process; the rest of the world is left to the test."""
    monkeypatch.setattr(peers, "BEAT", 0.1)
    monkeypatch.setattr(peers, "TICK", 0.02)
    started: list[Rank] = []

    def _star(world: int, threads: int, peer: float = 0, hang: float = 0) -> list[Rank]:
        listener = listen(world)
        limits = Limits(peer, hang)
        started.append(Rank(0))
        started[0].post = Hub(world, listener, TOKEN, started[0].own, limits, started[0].judge)
        _star.port = listener.getsockname()[1]  # type: ignore[attr-defined]
        started[0].post.start()
        for number in range(1, threads):
            rank = Rank(number)
            rank.post = Spoke(number, dial(_star), TOKEN, rank.own, limits, rank.judge)
            rank.post.start()
            started.append(rank)
            started[0].knows(rank=number, pid=100 + number)
            rank.knows(pid=100)
        return started

    yield _star
    for rank in started:
        rank.post.farewell("")
    for rank in started:
        rank.post.join(5)
        assert not rank.post.is_alive()


def dial(star: Star) -> socket.socket:
    return socket.create_connection(("127.0.0.1", star.port), timeout=5)  # type: ignore[attr-defined]


def introduced(star: Star, number: int) -> socket.socket:
    """The connection of a rank that the test plays itself."""
    sock = dial(star)
    sock.sendall(json.dumps({"token": TOKEN, "rank": number, **Rank(number).own(), "count": 3}).encode() + b"\n")
    sock.recv(1000)  # rank 0 has answered, so it knows this one
    return sock


def test_a_rank_whose_connection_closes_is_named_to_all_others_at_once(star):
    ranks = star(world=3, threads=2)
    introduced(star, 2).close()
    for rank in ranks:
        assert rank.hears(2).text.startswith("rank 2 (host node2, pid 102) died at step 7 (step)")


def test_rank_0_is_missed_by_all_others(star):
    ranks = star(world=3, threads=3)
    ranks[0].post.over = True  # its thread ends and closes its connections, without a word
    for rank in ranks[1:]:
        assert rank.hears(2).text.startswith("rank 0 (host node0, pid 100) died at step 7")
    assert not ranks[0].verdicts


def test_who_says_farewell_is_not_missed_and_who_says_why_is_quoted(star):
    ranks = star(world=3, threads=3)
    ranks[2].post.farewell("")
    ranks[0].knows(rank=2, left=True)
    time.sleep(0.1)
    assert not any(rank.verdicts for rank in ranks)
    ranks[1].post.farewell("ValueError: no such thing")
    verdict = ranks[0].hears(2)
    assert verdict.told and verdict.text.endswith("failed at step 7 (step): ValueError: no such thing")


def test_nobody_is_missed_after_rank_0_is_done(star):
    ranks = star(world=3, threads=3)
    ranks[0].post.farewell("")
    ranks[0].post.join(5)
    ranks[1].post.farewell("")
    time.sleep(0.15)
    assert not any(rank.verdicts for rank in ranks)


def test_a_rank_that_falls_silent_is_named_and_so_is_one_that_never_came(star):
    ranks = star(world=3, threads=2, peer=0.4)
    silent = introduced(star, 2)
    verdict = ranks[1].hears(3).text
    assert verdict.startswith("rank 2 (host node2, pid 102) has not been heard of for") and "at step 7" in verdict
    silent.close()


def test_a_rank_that_never_came_is_named(star):
    assert star(world=2, threads=1, peer=0.3)[0].hears(3).text.startswith("rank 1 (host unknown, pid 0) has not been")


HELLO = {"token": TOKEN, "rank": 1, "host": "x", "pid": 1}


@pytest.mark.parametrize(
    "line",
    [
        json.dumps(HELLO | {"token": "guess"}).encode(), json.dumps(HELLO | {"token": "ü"}).encode(),
        json.dumps(HELLO | {"token": None}).encode(), json.dumps(HELLO | {"rank": 0}).encode(),
        json.dumps(HELLO | {"rank": 9}).encode(), json.dumps(HELLO | {"rank": "1"}).encode(), b"[]", b"GET / HTTP/1.1",
        b"[" * 4000, b"\xff\xfe", b"x" * 5000, b"", json.dumps(HELLO).encode(),
    ],
)  # fmt: skip
def test_strangers_are_turned_away_and_disturb_nobody(star, line):
    """The last one knows the secret, but rank 1 is here already."""
    ranks = star(world=2, threads=2)
    with dial(star) as stranger:
        stranger.settimeout(5)
        stranger.sendall(line + b"\n")
        assert stranger.recv(1000) == b""  # closed from the other side
    ranks[1].line["step"] = 8
    ranks[0].knows(rank=1, step=8)
    assert not any(rank.verdicts for rank in ranks)


def test_strangers_who_say_nothing_are_few_and_not_kept(star, monkeypatch):
    monkeypatch.setattr(peers, "INTRODUCTION", 0.2)
    monkeypatch.setattr(peers, "NEWCOMERS", 1)  # and two ranks
    star(world=2, threads=2)
    crowd = [dial(star) for _ in range(6)]
    for stranger in crowd:
        stranger.settimeout(3)
        assert stranger.recv(10) == b""
        stranger.close()


def test_hundreds_of_ranks_that_come_at_once_are_all_let_in(star):
    (hub,) = star(world=301, threads=1)
    others = [dial(star) for _ in range(300)]
    for number, sock in enumerate(others, 1):
        sock.sendall(json.dumps({"token": TOKEN, "rank": number, **Rank(number).own()}).encode() + b"\n")
    for number in range(1, 301):
        hub.knows(rank=number, host=f"node{number}")
    assert not hub.verdicts
    hub.post.farewell("")
    for sock in others:
        sock.close()


def test_a_known_rank_that_sends_nonsense_counts_as_dead(star):
    ranks = star(world=2, threads=1)
    with introduced(star, 1) as broken:
        broken.sendall(b'{"step": "seven"}\n')
        assert "rank 1 (host node1" in ranks[0].hears(2).text


def test_without_new_pulses_anywhere_all_hear_of_a_hang(star):
    ranks = star(world=2, threads=2, hang=0.4)
    until = time.monotonic() + 0.7
    while time.monotonic() < until:  # one of them goes on: no hang
        ranks[1].line["count"] += 1
        time.sleep(0.05)
    assert not ranks[0].verdicts
    ranks[1].line["step"] = 8
    verdicts = [rank.hears(3) for rank in ranks]
    assert verdicts[0] == verdicts[1] and verdicts[0].hang
    assert "Furthest behind: rank 0 (host node0, pid 100) at step 7 (step), in file.py:0 forward" in verdicts[0].text


def test_of_many_at_the_same_step_the_one_that_is_elsewhere_is_suspected():
    all_reduce = [Peer(r, "a", r, 4, 9, "step", "comm.py:1 all_reduce") for r in range(1000)]
    all_reduce[617].where = "disk.py:2 read"
    text = standing_still(all_reduce, 60)
    assert "Furthest behind: rank 617 (host a, pid 617) at step 9 (step), in disk.py:2 read" in text
    assert "and 995 more at step 9 (step), in comm.py:1 all_reduce" in text


def test_a_job_that_was_suspended_blames_nobody(monkeypatch):
    times = iter([0.0, 1.0, 2.0, 3600.0, 3601.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    clock = peers.Clock()
    assert [clock.now() for _ in range(4)] == [1.0, 2.0, 2.0, 3.0]


# Real processes, without torch's process group: what it would broadcast goes through a pipe.
def as_rank(rank: int, world: int, run: Path, pipe: Any, cfg: FaultsConfig, doing: Callable[[Watchdog], None]) -> None:
    def broadcast(value: Any) -> Any:
        if rank == 0:
            pipe[1].send(value)
        return value if rank == 0 else pipe[0].recv()

    dist.rank, dist.world_size, dist.broadcast = lambda: rank, lambda: world, broadcast
    dist.master = lambda: "127.0.0.1"
    os.dup2(os.open(run / f"printed_{rank}", os.O_CREAT | os.O_WRONLY), 2)
    with Watchdog(run, cfg) as dog:
        dog.pulse(12)
        (run / f"ready_{rank}").touch()
        doing(dog)
    os._exit(0)


@pytest.fixture
def two(tmp_path, monkeypatch) -> Iterator[Callable[..., list[Any]]]:
    fork = multiprocessing.get_context("fork")
    started = []
    monkeypatch.setattr(peers, "BEAT", 0.1)
    for name, seconds in (("LEARN", 1.0), ("WRITE", 0.3), ("GRACE", 0.2)):
        monkeypatch.setattr(watchdog, name, seconds)

    def _two(*doings: Callable[[Watchdog], None], **faults: float) -> list[Any]:
        pipe, cfg = fork.Pipe(duplex=False), FaultsConfig(**faults)  # type: ignore[arg-type]
        for rank, doing in enumerate(doings):
            started.append(fork.Process(target=as_rank, args=(rank, len(doings), tmp_path, pipe, cfg, doing)))
            started[-1].start()
        until = time.monotonic() + 20
        while len(list(tmp_path.glob("ready_*"))) < len(doings) and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.3)  # they have met
        return started

    yield _two
    for process in started:
        process.kill()
        process.join()


def sleep(dog: Watchdog) -> None:
    time.sleep(60)


def ended(process: Any, seconds: float = 8) -> tuple[int | None, float]:
    began = time.monotonic()
    process.join(seconds)
    return process.exitcode, time.monotonic() - began


@pytest.mark.parametrize("dead", [0, 1])
def test_when_a_process_is_killed_the_other_names_it_and_ends_within_seconds(two, tmp_path, dead):
    ranks = two(sleep, sleep)
    os.kill(ranks[dead].pid, signal.SIGKILL)
    code, seconds = ended(ranks[1 - dead])
    assert code == 1 and seconds < 4
    printed = (tmp_path / f"printed_{1 - dead}").read_text()
    assert f"error: rank {dead} (host {socket.gethostname()}, pid {ranks[dead].pid}) died at step 12 (step)" in printed
    (event,) = read(tmp_path / "events.jsonl")
    assert event["event"] == "failed" and event["step"] == 12 and f"rank {dead} (host" in event["why"]


def test_an_error_that_another_rank_caused_is_printed_under_its_name(two, tmp_path):
    def fail(dog: Watchdog) -> None:
        raise ValueError("rank 1 went wrong\nin two lines")

    def closed_by_peer(dog: Watchdog) -> None:
        time.sleep(0.5)
        raise RuntimeError("Connection closed by peer")

    ranks = two(closed_by_peer, fail)
    assert ended(ranks[0])[0] == 1
    printed = (tmp_path / "printed_0").read_text()
    assert "failed at step 12 (step): ValueError: rank 1 went wrong." in printed


def test_a_process_that_is_alone_sees_that_it_hangs(two, tmp_path):
    (alone,) = two(sleep, hang_seconds=0.5)
    assert ended(alone)[0] == 1
    assert "in sleep" in (tmp_path / "hang" / "rank_00000.txt").read_text()
    assert [e["event"] for e in read(tmp_path / "events.jsonl")] == ["hang"]


def test_a_disk_that_hangs_does_not_keep_a_rank_from_leaving(two, tmp_path):
    os.mkfifo(tmp_path / "events.jsonl")  # opening it for writing waits for a reader, for ever
    ranks = two(sleep, sleep)
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert ended(ranks[0], 12)[0] == 1


def test_a_stopped_process_is_named_after_peer_seconds(two, tmp_path):
    ranks = two(sleep, sleep, peer_seconds=1.0)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    assert ended(ranks[0])[0] == 1
    assert f"pid {ranks[1].pid}) has not been heard of for" in (tmp_path / "printed_0").read_text()


def test_a_hang_leaves_the_stacks_of_all_ranks_and_takes_the_workers_along(two, tmp_path):
    def with_a_worker(dog: Watchdog) -> None:
        worker = Worker(lambda step: time.sleep(60))  # type: ignore[arg-type, return-value]
        worker.ask(12)
        (tmp_path / "worker").write_text(str(worker.pid))
        stuck_here()

    def stuck_here() -> None:
        time.sleep(60)

    ranks = two(with_a_worker, sleep, hang_seconds=0.6)
    assert [ended(rank)[0] for rank in ranks] == [1, 1]
    assert "in stuck_here" in (tmp_path / "hang" / "rank_00000.txt").read_text()
    assert "in sleep" in (tmp_path / "hang" / "rank_00001.txt").read_text()
    printed = (tmp_path / "printed_0").read_text()
    assert "no rank has gone on for 1 s. Furthest" in printed and "stuck_here" in printed and "/hang" in printed
    state = Path("/proc", (tmp_path / "worker").read_text(), "stat")
    until = time.monotonic() + 5
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":  # nobody may have collected it
        assert time.monotonic() < until, "the worker outlived its rank"
        time.sleep(0.02)
