"""A store of objects on this machine that speaks as much S3 as a client needs: objects, ranges, lists, parts."""

import contextlib
import hashlib
import itertools
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@dataclass
class Store:
    """What lies in it by "bucket/key", what was asked of it, and what is to fail."""

    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, bucket/key
    broken: dict[tuple[str, str], int] = field(default_factory=dict)  # times that a request gets a 500
    spoil: set[str] = field(default_factory=set)  # objects whose next write is damaged
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    uploads: Iterator[int] = field(default_factory=itertools.count, repr=False)
    url: str = ""

    def below(self, prefix: str) -> dict[str, bytes]:
        return {name.removeprefix(prefix): data for name, data in self.objects.items() if name.startswith(prefix)}


@contextlib.contextmanager
def serve() -> Iterator[Store]:
    store = Store()

    class Handler(_Handler):
        pass

    Handler.store = store
    server = _Server(("127.0.0.1", 0), Handler)
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    store: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _begin(self, method: str) -> bool:
        """Take the request apart; answer it here if it is to fail."""
        parts = urlsplit(self.path)
        self.name = unquote(parts.path).strip("/")
        self.bucket, _, self.key = self.name.partition("/")
        self.query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.body = self._read_body()
        self.store.requests.append((method, self.name))
        if self.store.broken.get((method, self.name), 0) > 0:
            self.store.broken[method, self.name] -= 1
            self._answer(403, _error("SlowDown"))  # one that the client itself does not try again
            return False
        return True

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):  # signed or with a checksum behind
            plain, rest = b"", data
            while True:
                head, _, rest = rest.partition(b"\r\n")
                size = int(head.split(b";")[0], 16)
                if not size:
                    return plain
                plain, rest = plain + rest[:size], rest[size + 2 :]
        return data

    def _answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        if not self._begin("HEAD"):
            return
        data = self.store.objects.get(self.name)
        if not self.key:
            known = any(name.startswith(f"{self.bucket}/") for name in self.store.objects)
            self._answer(200 if known else 404)
        elif data is None:
            self._answer(404)
        else:
            self._answer(200, Content_Length=str(len(data)), **_facts(data))

    def do_GET(self):
        if not self._begin("GET"):
            return
        if not self.key or "list-type" in self.query:
            self._list()
            return
        data = self.store.objects.get(self.name)
        if data is None:
            self._answer(404, _error("NoSuchKey"))
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(200, data, **_facts(data))
            return
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1) + 1
        self._answer(206, data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(data)}", **_facts(data))

    def _list(self) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        names = sorted(
            name.partition("/")[2] for name in self.store.objects if name.startswith(f"{self.bucket}/{prefix}")
        )
        folders, found = {}, []
        for name in names:
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders[prefix + rest.split(delimiter)[0] + delimiter] = None
            else:
                found.append(name)
        found = found[: int(self.query.get("max-keys", 1000))]
        time = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        sizes = [len(self.store.objects[f"{self.bucket}/{name}"]) for name in found]
        rows = [f"<Contents><Key>{escape(name)}</Key><Size>{size}</Size>{time}</Contents>"
                for name, size in zip(found, sizes, strict=True)]  # fmt: skip
        rows += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders]
        body = "".join(rows)
        count = len(found) + len(folders)
        head = f"<IsTruncated>false</IsTruncated><KeyCount>{count}</KeyCount>"
        self._answer(200, _xml("ListBucketResult", head + body))

    def do_PUT(self):
        if not self._begin("PUT"):
            return
        if "partNumber" in self.query:
            self.store.parts[self.query["uploadId"]][int(self.query["partNumber"])] = self.body
        elif self.key:
            self._keep(self.body)
        self._answer(200, **_facts(self.body))

    def do_POST(self):
        if not self._begin("POST"):
            return
        if "uploads" in self.query:
            number = f"upload{next(self.store.uploads)}"  # of its own: several are under way at once
            self.store.parts[number] = {}
            self._answer(200, _xml("InitiateMultipartUploadResult", f"<UploadId>{number}</UploadId>"))
        elif "uploadId" in self.query:
            parts = self.store.parts.pop(self.query["uploadId"])
            self._keep(b"".join(parts[number] for number in sorted(parts)))
            self._answer(200, _xml("CompleteMultipartUploadResult", '<ETag>"x-1"</ETag>'))
        elif "delete" in self.query:
            for key in re.findall(r"<Key>(.*?)</Key>", self.body.decode()):
                self.store.objects.pop(f"{self.bucket}/{key}", None)
            self._answer(200, _xml("DeleteResult", ""))

    def do_DELETE(self):
        if self._begin("DELETE"):
            self.store.objects.pop(self.name, None)
            self._answer(204)

    def _keep(self, data: bytes) -> None:
        if self.name in self.store.spoil:
            self.store.spoil.discard(self.name)
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.store.objects[self.name] = data


def _facts(data: bytes) -> dict[str, str]:
    return {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}


def _xml(name: str, body: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?><{name}>{body}</{name}>'.encode()


def _error(code: str) -> bytes:
    return _xml("Error", f"<Code>{code}</Code><Message>{code}</Message>")
