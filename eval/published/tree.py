"""The files of a published set: a folder, with the plain tars in it as if they were unpacked.

    DIR/devkit/data/…txt          a file
    DIR/ILSVRC2012_img_val.tar    its members are files too, below the folder that the set's description says

Names are relative and below the folder: what a list says is only looked up here, and a name that points outside is
refused. Nothing is unpacked and nothing is written.
"""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from data_pipeline.errors import DataError
from data_pipeline.images import MAX_BYTES
from data_pipeline.sources import tar
from eval.sources.source import PICTURES, some
from eval.sources.tars import Tar

BLOCK: Final = 1 << 20
AT_ONCE: Final = 10_000
MAX_LIST: Final = 4 << 30  # bytes of one list; ours: the largest is iNaturalist 2021's train.json, about a gigabyte


@dataclass(frozen=True)
class Packed:
    """A tar that stands for a folder."""

    path: Path
    into: str = ""  # the folder below which its members are, "" for the set's own
    nested: bool = False  # it holds a tar per class (ILSVRC2012_img_train.tar), each a folder of its name


@dataclass(frozen=True)
class Hashes:
    """What is known of a file's content."""

    bytes: int | None = None
    md5: str | None = None
    sha256: str | None = None


class Tree:
    """Files by name below a folder; safe in threads."""

    def __init__(self, root: Path, packed: Sequence[Packed] = ()) -> None:
        if not root.is_dir():
            raise DataError(f"no data at {root}: no such folder; give the folder that the published files lie in")
        self.root, self._root = root, os.fspath(root)
        self.packed = tuple(packed)
        self.left_out: Counter[str] = Counter()
        self.hashes: dict[str, Hashes] = {}  # of the lists that were read
        self._members: dict[str, tuple[Tar, tar.Member]] = {}
        self._below: dict[str, set[str]] = {}  # folder -> names of the folders in it
        self._in: dict[str, list[str]] = {}  # folder -> names of the files in it
        for one in packed:
            for name, found in _members(one, self.left_out):
                self._add(name, found)

    def _add(self, name: str, found: tuple[Tar, tar.Member]) -> None:
        if self._members.setdefault(name, found) is not found:
            self.left_out["duplicate_member"] += 1
            return
        folder, _, file = name.rpartition("/")
        self._in.setdefault(folder, []).append(file)
        while folder:
            above, _, own = folder.rpartition("/")
            self._below.setdefault(above, set()).add(own)
            folder = above

    def has_folder(self, name: str) -> bool:
        name = name.strip("/")
        return name in self._in or name in self._below or (self.root / safe(name)).is_dir()

    def folders(self, name: str = "") -> list[str]:
        """Names of the folders in a folder that are not hidden, sorted."""
        found = set(self._below.get(name, ()))
        found |= {entry.name for entry in _entries(self.root / safe(name)) if entry.is_dir()}
        return sorted(one for one in found if not one.startswith("."))

    def files(self, name: str = "") -> list[str]:
        """Names of the files in a folder, sorted."""
        found = set(self._in.get(name, ()))
        found |= {entry.name for entry in _entries(self.root / safe(name)) if entry.is_file()}
        return sorted(found)

    def pictures(self, name: str = "") -> Iterator[str]:
        """Every picture below a folder, sorted within each."""
        start = f"{name}/" if name else ""
        yield from (start + file for file in self.files(name) if is_picture(file))
        for folder in self.folders(name):
            yield from self.pictures(start + folder)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        if name in self._members:
            return self._members[name][1].size
        try:
            found = os.stat(f"{self._root}/{safe(name)}")
        except (OSError, ValueError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def read(self, name: str) -> bytes:
        if name in self._members:
            opened, member = self._members[name]
            return opened.read(member)
        try:
            return (self.root / safe(name)).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {self.root / name}: {error.strerror}") from None

    def read_list(self, name: str) -> bytes:
        """A list of pictures or labels, of a bounded size; its hashes are kept, so that it is read once."""
        size = self.size(name)
        if size is None:
            raise DataError(f"{self.root} has no {name}")
        if size > MAX_LIST:
            raise DataError(f"{self.root / name} has {size:,} bytes; a list has at most {MAX_LIST:,}")
        data = self.read(name)
        self.hashes[name] = hash_bytes(data)
        return data

    def digest(self, names: Sequence[str], tars: Mapping[Path, Hashes]) -> str:
        """One sha256 of the contents of all files in their order; what was hashed before is not read again, and a file
        in a tar stands for its tar.
        """
        total = hashlib.sha256()
        with ThreadPoolExecutor(8) as pool:
            for start in range(0, len(names), AT_ONCE):  # a million pictures are not a million tasks in memory
                for one in pool.map(lambda name: self._hash(name, tars), names[start : start + AT_ONCE]):
                    total.update(f"{one}\n".encode())
        return total.hexdigest()

    def _hash(self, name: str, tars: Mapping[Path, Hashes]) -> str:
        if name in self._members:
            opened, member = self._members[name]
            return f"{tars[opened.path].sha256}:{member.offset}"
        known = self.hashes[name].sha256 if name in self.hashes else None
        return known or hashlib.sha256(self.read(name)).hexdigest()


def hash_bytes(data: bytes) -> Hashes:
    return Hashes(len(data), hashlib.md5(data, usedforsecurity=False).hexdigest(), hashlib.sha256(data).hexdigest())


def hash_file(path: Path) -> Hashes:
    """Size and both hashes, in one pass; a file that has not changed since is not read again."""
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return _hash_file(path, found.st_size, found.st_mtime_ns, found.st_ino)


@cache
def _hash_file(path: Path, *_: int) -> Hashes:
    md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                md5.update(block)
                sha256.update(block)
                size += len(block)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return Hashes(size, md5.hexdigest(), sha256.hexdigest())


def safe(name: str) -> str:
    """The name as it is, if it is relative and points to nothing outside. Raises DataError."""
    if name and not tar.is_safe(name.encode("utf-8", "surrogatepass")):
        raise DataError(f"{name[:200]!a} is no name of a file of this set: it must be relative and below its folder")
    return name


def is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURES and not name.startswith(".")


def first(tree: Tree, wanted: Any, what: str) -> str:
    """The first of several folders that is there. Raises DataError that names them all."""
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if tree.has_folder(name):
            return name
    raise DataError(f"{tree.root} has no {what}: expected the folder {' or '.join(f'{name}/' for name in names)}")


def first_file(tree: Tree, wanted: Any, what: str) -> str:
    """The first of several files that is there. Raises DataError that names them all."""
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if tree.size(name) is not None:
            return name
    raise DataError(f"{tree.root} has no {what}: expected {some(names) if len(names) > 1 else names[0]}")


def _entries(path: Path) -> Iterable[os.DirEntry[str]]:
    try:
        with os.scandir(path) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _members(packed: Packed, left_out: Counter[str]) -> Iterator[tuple[str, tuple[Tar, tar.Member]]]:
    """Every file of a tar by its name in the tree."""
    opened = Tar(packed.path)
    start = f"{packed.into}/" if packed.into else ""
    limit = tar.MAX_SIZE if packed.nested else MAX_BYTES
    for member in _headers(packed.path, limit, left_out):
        name = member.name.removeprefix("./")
        if not packed.nested:
            yield start + name, (opened, member)
            continue
        if not name.endswith(".tar"):
            left_out["no_class_tar"] += 1
            continue
        begin = _data(packed.path, member.offset)
        for inner in _headers(packed.path, MAX_BYTES, left_out, begin, begin + member.size):
            yield f"{start}{name.removesuffix('.tar')}/{inner.name.removeprefix('./')}", (opened, inner)


def _data(path: Path, offset: int) -> int:
    """Where the data of a member begin: after its header, and what is said of it in further ones."""
    with path.open("rb") as file:
        while True:
            file.seek(offset)
            header = file.read(tar.BLOCK)
            offset += tar.BLOCK
            if len(header) < tar.BLOCK or header[156] not in b"LKxg":
                return offset
            size = int(header[124:136].strip(b"\0 ") or b"0", 8)
            offset += size + -size % tar.BLOCK


def _headers(
    path: Path, limit: int, left_out: Counter[str], start: int = 0, stop: int | None = None
) -> Iterator[tar.Member]:
    with path.open("rb") as file:
        for member in tar.members(file, limit, start, stop, data=False):
            if member.problem in ("truncated_tar", "damaged_tar"):
                raise DataError(f"{path} is cut off or damaged near byte {member.offset:,}; copy or download it again")
            if member.problem:
                left_out[member.problem] += 1
            else:
                yield member
