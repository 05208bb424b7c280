"""Who is still there: every rank holds a TCP connection to rank 0 and says once a second where it is.

    rank r ──{"token", "rank", "host", "pid"}──▶ rank 0           once; who does not know the token is turned away
    rank r ──{"count", "step", "doing", "where"}──▶ rank 0        every second: how many pulses so far, and the last one
    rank 0 ──{"rank", "host", "pid", "count", "step", …}──▶ all   the same about itself
    either ──{"farewell": why}──▶ the other                       before it leaves
    rank 0 ──{"verdict": …, "hang": …}──▶ all                     somebody is gone, or nobody goes on

The kernel closes the connections of a process however it ends, so the others know at once; a machine that falls silent
is known by the lines that do not come. Nothing here needs torch or its process group, which may be what is stuck.
"""

import hmac
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from maws.link import Closed, Link, Message

BEAT, TICK = 1.0, 0.25  # seconds between two lines, and between two looks
INTRODUCTION = 10.0  # seconds in which a newcomer must say who it is
NEWCOMERS = 64  # strangers that may be waiting beside the ranks that are expected
SUSPENDED = 10.0  # seconds without a look: this process was stopped itself and cannot blame others


class Verdict(NamedTuple):
    """Why all ranks leave."""

    text: str
    hang: bool = False  # nobody is gone, but nobody goes on: the stacks are wanted
    told: bool = False  # the rank said so itself: the others may be about to find the same


class Limits(NamedTuple):
    """Seconds; 0: for ever."""

    peer: float  # that a rank may be silent
    hang: float  # that all ranks may go without a new pulse


class Clock:
    """Seconds in which this process was able to look; a job that was suspended for hours has missed nothing."""

    def __init__(self) -> None:
        self._last, self._now = time.monotonic(), 0.0

    def now(self) -> float:
        t = time.monotonic()
        gap, self._last = t - self._last, t
        self._now += gap if gap < SUSPENDED else 0.0
        return self._now


@dataclass
class Peer:
    """What is known of a rank."""

    rank: int
    host: str = "unknown"
    pid: int = 0
    count: int = -1  # pulses so far
    step: int = 0
    doing: str = "start"
    where: str = ""  # what its main thread is in
    heard: float = 0.0  # when its last line came
    moved: float = 0.0  # when its last new pulse came
    left: bool = False

    def note(self, m: Message, now: float) -> None:
        """Take in a line of this rank."""
        self.heard = now
        self.host, self.pid = str(m.get("host", self.host))[:80], int(m.get("pid", self.pid))
        if int(m.get("count", self.count)) > self.count:
            self.moved, self.count = now, int(m["count"])
        self.step, self.doing = int(m.get("step", self.step)), str(m.get("doing", self.doing))[:80]
        self.where = str(m.get("where", self.where))[:160]

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def died(self) -> Verdict:
        return Verdict(f"{self} died at step {self.step} ({self.doing}): its connection closed without a word")

    def silent(self, seconds: float) -> Verdict:
        return Verdict(f"{self} has not been heard of for {seconds:.0f} s; it was at step {self.step} ({self.doing})")

    def failed(self, why: str) -> Verdict:
        return Verdict(f"{self} failed at step {self.step} ({self.doing}): {why}", told=True)


class _Post(threading.Thread):
    """What rank 0's and the others' threads share."""

    def __init__(self, own: Callable[[], Message], limits: Limits, judge: Callable[[Verdict], None]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.own, self.limits, self.judge = own, limits, judge  # own line; what to do with a verdict
        self.clock, self._told = Clock(), 0.0
        self.leaving = self.over = False  # no more judging; and no more watching
        self.links: list[Link] = []

    def run(self) -> None:
        self.tell(self.own())
        while not self.over:
            verdict = self.look()
            now = self.clock.now()
            if now >= self._told + BEAT:
                self._told = now
                self.tell(self.own())
            if not self.leaving and (verdict := verdict or self.late(now)):
                self.tell({"verdict": verdict.text, "hang": verdict.hang, "told": verdict.told})
                self.judge(verdict)
                break
        self.close()

    def tell(self, message: Message) -> None:
        for link in list(self.links):
            link.send(message)

    def farewell(self, why: str) -> None:
        """Tell the others, from any thread, and stop watching."""
        self.leaving = True  # first: the others close their ends as soon as they have heard
        self.tell({**self.own(), "farewell": why[:500]})
        self.over = True  # and its thread closes the connections

    def look(self) -> Verdict | None:
        """Wait for a moment and take in what has come."""
        raise NotImplementedError

    def late(self, now: float) -> Verdict | None:
        """Has somebody been silent, or standing still, for too long?"""
        raise NotImplementedError

    def close(self) -> None:
        """Also in a forked child, where the same connections would stay open after this process's end."""
        for link in self.links:
            link.close()


class Hub(_Post):
    """Rank 0: listens, and judges. Without a listener it watches itself alone."""

    def __init__(
        self, world: int, listener: socket.socket | None, token: str, own: Callable[[], Message], limits: Limits,
        judge: Callable[[Verdict], None],
    ) -> None:  # fmt: skip
        super().__init__(own, limits, judge)
        self.token, self.listener = token, listener
        self.peers = [Peer(rank) for rank in range(world)]
        self.known: dict[Link, Peer] = {}
        self.newcomers: dict[Link, float] = {}  # -> when it came
        self.selector = selectors.DefaultSelector()
        if listener:
            listener.setblocking(False)
            self.selector.register(listener, selectors.EVENT_READ)

    def look(self) -> Verdict | None:
        ready = self.selector.select(TICK)
        now = self.clock.now()
        self.peers[0].note(self.own(), now)
        found = [v for key, _ in ready if (v := self._accept(now) if key.data is None else self._hear(key.data, now))]
        for link in [link for link, came in self.newcomers.items() if now > came + INTRODUCTION]:
            self._drop(link)
        return found[0] if found else None

    def late(self, now: float) -> Verdict | None:
        there = [p for p in self.peers if not p.left]
        quiet = max(there, key=lambda p: now - p.heard)
        if self.limits.peer and now - quiet.heard > self.limits.peer:
            return quiet.silent(now - quiet.heard)
        still = now - max(p.moved for p in there)
        return (
            Verdict(standing_still(there, still), hang=True) if self.limits.hang and still > self.limits.hang else None
        )

    def _accept(self, now: float) -> None:
        assert self.listener
        try:
            link = Link(self.listener.accept()[0])
        except OSError:  # gone again
            return
        if len(self.newcomers) >= NEWCOMERS + len(self.peers):
            link.close()
            return
        self.newcomers[link] = now
        self.selector.register(link.socket, selectors.EVENT_READ, link)

    def _hear(self, link: Link, now: float) -> Verdict | None:
        try:
            for message in link.receive():
                if link in self.newcomers:
                    self._welcome(link, message)
                peer = self.known[link]
                peer.note(message, now)
                if "farewell" in message:
                    peer.left = True
                    if message["farewell"]:
                        return peer.failed(str(message["farewell"]))
        except (Closed, ValueError, TypeError):  # a line of other types is no line of ours either
            peer = self.known.get(link)
            self._drop(link)
            return peer.died() if peer and not peer.left else None
        return None

    def _welcome(self, link: Link, message: Message) -> None:
        """Raises Closed for a stranger."""
        rank = message.get("rank")
        if not hmac.compare_digest(str(message.get("token")).encode(), self.token.encode()):
            raise Closed("wrong token")
        if not isinstance(rank, int) or not 0 < rank < len(self.peers) or self.peers[rank] in self.known.values():
            raise Closed("no such rank is missing")
        del self.newcomers[link]
        self.known[link] = self.peers[rank]
        self.links.append(link)
        link.send(self.own())  # who rank 0 is, before it can die

    def _drop(self, link: Link) -> None:
        self.selector.unregister(link.socket)
        self.newcomers.pop(link, None)
        if self.known.pop(link, None):
            self.links.remove(link)
        link.close()

    def close(self) -> None:
        super().close()
        for link in self.newcomers:
            link.close()
        if self.listener:
            self.listener.close()
        self.selector.close()


class Spoke(_Post):
    """Every other rank: says where it is, and watches rank 0."""

    def __init__(
        self, rank: int, sock: socket.socket, token: str, own: Callable[[], Message], limits: Limits,
        judge: Callable[[Verdict], None],
    ) -> None:  # fmt: skip
        super().__init__(own, limits, judge)
        self.hub, self.link = Peer(0), Link(sock)
        self.links.append(self.link)
        self.link.send({"token": token, "rank": rank, **own()})
        self.selector = selectors.DefaultSelector()
        self.selector.register(sock, selectors.EVENT_READ)

    def look(self) -> Verdict | None:
        if not self.selector.select(TICK):
            return None
        try:
            for message in self.link.receive():
                if "verdict" in message:
                    return Verdict(str(message["verdict"]), bool(message.get("hang")), bool(message.get("told")))
                self.hub.note(message, self.clock.now())
                if message.get("farewell"):
                    return self.hub.failed(str(message["farewell"]))
                if "farewell" in message:
                    self.leaving = self.over = True  # whoever dies after rank 0 is done is not missed
        except (Closed, ValueError, TypeError):
            return None if self.over else self.hub.died()
        return None

    def late(self, now: float) -> Verdict | None:
        quiet = now - self.hub.heard
        return self.hub.silent(quiet) if self.limits.peer and quiet > self.limits.peer else None

    def close(self) -> None:
        super().close()
        self.selector.close()


def standing_still(peers: list[Peer], seconds: float) -> str:
    """Who is behind, and where everybody is: ranks at one place are named together."""
    places: dict[tuple[int, int, str, str], list[Peer]] = {}
    for p in sorted(peers, key=lambda p: (p.step, p.count)):
        places.setdefault((p.step, p.count, p.doing, p.where), []).append(p)
    first = min(places)[:2]
    behind = [place for place in places if place[:2] == first]
    if len(behind) == len(places):  # all began the same thing: who is somewhere else than most is the suspect
        behind = sorted(places, key=lambda place: len(places[place]))
    lines = [
        f"{'; '.join(map(str, places[place][:4]))}{f' and {n} more' if (n := len(places[place]) - 4) > 0 else ''} "
        f"at step {place[0]} ({place[2]}), in {place[3] or 'unknown'}"
        for place in [*behind, *(p for p in places if p not in behind)][:6]
    ]
    text = f"no rank has gone on for {seconds:.0f} s. Furthest behind: {lines[0]}"
    return (text + "".join(f". Then: {line}" for line in lines[1:]))[:3000]
