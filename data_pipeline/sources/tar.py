"""Members of a tar that nobody vouches for: read forwards, nothing is unpacked, every size is bounded.

Plain files only. Links, devices and sparse files, names that point outside, and members larger than a picture may be
are passed over by their sizes and named with a reason; so is the place where a damaged or cut archive ends. The formats
are those of POSIX (ustar, pax) and GNU, plain or in gzip.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

BLOCK: Final = 512
MAX_EXTENDED: Final = 64 << 10  # bytes of a long name or of pax records; ours: names are at most a few hundred
MAX_SIZE: Final = 1 << 50  # bytes; no disk has a file of a petabyte
SKIP: Final = 1 << 20  # bytes read at a time
_LINKS: Final = frozenset(b"12")
_DEVICES: Final = frozenset(b"346")
_FILES: Final = frozenset(b"0\x007")
_NO_DATA: Final = _LINKS | _DEVICES | frozenset(b"5")
_SPARSE: Final = ord("S")


@dataclass(frozen=True)
class Member:
    name: str
    offset: int  # of the first header block that belongs to it
    size: int
    data: bytes | None  # null if there is a problem, or when only headers are read
    problem: str | None = None


class _EndsHereError(Exception):
    """With the reason why nothing after it can be read."""


def is_gzip(head: bytes) -> bool:
    return head.startswith(b"\x1f\x8b")


def looks_like_tar(head: bytes) -> bool:
    return len(head) >= BLOCK and (head[257:262] == b"ustar" or _checksum_fits(head[:BLOCK]))


def members(
    file: BinaryIO, limit: int, start: int = 0, stop: int | None = None, *, data: bool = True
) -> Iterator[Member]:
    """Files from one offset to another (of the unpacked archive). Without `data` only headers are looked at."""
    stream: BinaryIO = file
    file.seek(0)
    packed = is_gzip(file.read(2))
    end = None if packed else file.seek(0, 2)
    file.seek(0 if packed else start)
    if packed:
        assert start == 0, "what is packed can only be read from its beginning"
        stream = gzip.GzipFile(fileobj=file)  # pyright: ignore[reportAssignmentType]
    source = _Source(stream, start, end)
    try:
        yield from _read(source, limit, stop, data)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        yield Member("", source.position, 0, None, "damaged_tar")


class _Source:
    """Counts what was read, so that members know where they lie."""

    def __init__(self, file: BinaryIO, position: int, end: int | None) -> None:
        self.file, self.position, self.end = file, position, end  # the end is unknown where one cannot seek

    def read(self, size: int) -> bytes:
        if self.end is not None and self.position + size > self.end:
            self.position = self.file.seek(self.end)
            raise _EndsHereError("truncated_tar")
        parts: list[bytes] = []
        left = size
        while left:
            part = self.file.read(min(left, SKIP))
            if not part:
                raise _EndsHereError("truncated_tar")
            parts.append(part)
            left -= len(part)
        self.position += size
        return b"".join(parts)

    def header(self) -> bytes:
        """A block, or nothing at the very end."""
        block = self.file.read(BLOCK)
        while block and len(block) < BLOCK:
            more = self.file.read(BLOCK - len(block))
            if not more:
                raise _EndsHereError("truncated_tar")
            block += more
        self.position += len(block)
        return block

    def skip(self, size: int) -> None:
        if self.end is None:
            for place in range(0, size, SKIP):
                self.read(min(SKIP, size - place))
            return
        if self.position + size > self.end:  # a seek past the end says nothing
            self.position = self.file.seek(self.end)
            raise _EndsHereError("truncated_tar")
        self.position = self.file.seek(self.position + size) if size else self.position


def _read(source: _Source, limit: int, stop: int | None, wanted: bool) -> Iterator[Member]:
    name, begin = "", source.position
    try:
        while stop is None or source.position < stop:
            begin, name = source.position, ""
            found = _next(source, limit, wanted)
            if found is None:
                return
            if found.name or found.problem:
                yield found
    except _EndsHereError as error:
        yield Member(name, begin, 0, None, str(error))


def _next(source: _Source, limit: int, wanted: bool) -> Member | None:
    """The next member; one without name or problem for folders and the like; null at the end of the archive."""
    begin, long_name, pax, too_long = source.position, None, {}, False
    while True:
        header = source.header()
        if not header:
            if long_name is not None or pax:
                raise _EndsHereError("truncated_tar")
            return None
        if not any(header):
            return None  # one block of zeros is enough for other readers too
        if not _checksum_fits(header):
            raise _EndsHereError("damaged_tar")
        size, kind = _number(header[124:136]), header[156]
        if kind in b"LKxg" and size > MAX_EXTENDED:
            source.skip(size + -size % BLOCK)
            too_long = too_long or kind in b"Lx"
        elif kind in b"Lx":
            extended = source.read(size)
            source.skip(-size % BLOCK)
            if kind == ord("L"):
                long_name = extended.split(b"\0", 1)[0]
            else:
                pax |= _pax(extended)
        elif kind in b"Kg":
            source.skip(size + -size % BLOCK)
        else:
            break
    sparse = kind == _SPARSE or any(word.startswith(b"GNU.sparse") for word in pax)
    if b"size" in pax:
        size = _decimal(pax[b"size"])
    if kind == _SPARSE:
        _skip_sparse_map(source, header)
    raw = pax.get(b"path") or long_name or _ustar_name(header)
    name = raw.decode("utf-8", "replace")
    size = 0 if kind in _NO_DATA else size
    reason = "header_too_long" if too_long else _reason(kind, sparse, raw, size, limit)
    padded = size + -size % BLOCK
    data = None
    try:
        if reason is not None or kind == ord("5") or not wanted:
            source.skip(padded)
        else:
            data = source.read(size)
            source.skip(-size % BLOCK)
    except _EndsHereError as error:
        return Member(name, begin, size, None, str(error))  # nothing comes after it
    return Member("" if kind == ord("5") and reason is None else name, begin, size, data, reason)


def _reason(kind: int, sparse: bool, name: bytes, size: int, limit: int) -> str | None:
    if kind == ord("5"):
        return None
    if kind in _LINKS:
        return "tar_link"
    if kind in _DEVICES:
        return "tar_device"
    if sparse:
        return "tar_sparse"
    if kind not in _FILES:
        return "tar_unknown_kind"
    if not is_safe(name):
        return "unsafe_name"
    return "too_many_bytes" if size > limit else None


def is_safe(name: bytes) -> bool:
    """Relative, below, of UTF-8 and without control characters."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return False
    parts = text.split("/")
    return not (
        text.startswith(("/", "\\")) or ".." in parts or "\\" in text or re.search(r"[\x00-\x1f\x7f]|^\w:", text)
    )


def _ustar_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _skip_sparse_map(source: _Source, header: bytes) -> None:
    """GNU's list of holes goes on in further blocks."""
    extended = header[482]
    while extended:
        extended = source.read(BLOCK)[504]


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Records `LENGTH name=value`."""
    found: dict[bytes, bytes] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > 6 or not 4 < int(length) <= len(data):
            raise _EndsHereError("damaged_tar")
        record, data = data[: int(length)], data[int(length) :]
        name, _, value = record[len(length) + 1 : -1].partition(b"=")
        found[name] = value
    return found


def _checksum_fits(header: bytes) -> bool:
    try:
        stated = _number(header[148:156])
    except _EndsHereError:
        return False
    plain = sum(header) - sum(header[148:156]) + 8 * 32
    return stated == plain


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256."""
    if field[0] == 0x80:
        size = int.from_bytes(field[1:], "big")
        if size > MAX_SIZE:
            raise _EndsHereError("damaged_tar")
        return size
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not re.fullmatch(rb"[0-7]+", digits):
        raise _EndsHereError("damaged_tar")
    return int(digits or b"0", 8)


def _decimal(field: bytes) -> int:
    if not field.isdigit() or len(field) > 15:
        raise _EndsHereError("damaged_tar")
    return int(field)
