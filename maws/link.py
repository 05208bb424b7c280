"""One connection between two ranks: JSON objects, a line each, sent and read without ever waiting."""

import json
import socket
import threading
from typing import Any

LONGEST = 4096  # bytes of a line

Message = dict[str, Any]


class Closed(Exception):
    """A connection has ended, or what came through it is not ours."""


class Link:
    """One connection of JSON objects, a line each; never waits."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self._rest, self._mute, self._lock = sock, b"", False, threading.Lock()

    def send(self, message: Message) -> None:
        """Best effort: that the other end is gone is for `receive` to find out."""
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            if not self._mute:
                try:
                    self._mute = self.socket.send(data) < len(data)  # half a line: the rest would be read as nonsense
                except OSError:
                    self._mute = True

    def receive(self) -> list[Message]:
        """What has come since the last call. Raises Closed at the end, and for what is too long or no JSON object."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError as e:
            raise Closed(str(e)) from None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or max(map(len, [*lines, self._rest])) > LONGEST:
            raise Closed("the connection closed" if not data else "a line is too long")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            raise Closed("a line is not JSON") from None
        if not all(isinstance(m, dict) for m in messages):
            raise Closed("a line is not a JSON object")
        return messages

    def close(self) -> None:
        self.socket.close()
