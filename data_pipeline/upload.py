"""--output s3://bucket/set: a shard set is built here and laid down in a store, its manifest last.

    WORK_DIR/shards/ … manifest.json      the set, built as any other; removed when the store has it
    WORK_DIR.uploaded                     what the store has, so that a killed upload goes on where it was
    URL/uploading.json                    says that the set in the store is not whole; gone once it is

Every file is read back and its sha256 compared. A request that the network fails is made again (sources/location.py).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from data_pipeline import shardset
from data_pipeline.build import OURS, WORK, build, check_made_alike
from data_pipeline.errors import DataError
from data_pipeline.files import sha256_file
from data_pipeline.progress import progress
from data_pipeline.runners import Runner
from data_pipeline.sources.location import Reading, file_system, printable, steadily
from data_pipeline.steps import Settings

MARKER: Final = "uploading.json"
MANIFEST: Final = "manifest.json"
AT_ONCE: Final = 4  # files under way; ours
BLOCK: Final = 8 << 20  # bytes


class Store:
    """A folder in a store."""

    def __init__(self, url: str, storage: str) -> None:
        self.url = printable(url)
        self._files, self._root = file_system(url, Reading(storage))

    def size(self, name: str) -> int | None:
        try:
            info = steadily(self._files.info, self._path(name))
        except FileNotFoundError:
            return None
        return None if info["type"] == "directory" else int(info["size"] or 0)

    def read(self, name: str) -> bytes | None:
        try:
            return steadily(self._read, name)
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """Everything that lies there, relative and sorted."""
        try:
            found = steadily(self._files.find, self._root)
        except FileNotFoundError:
            return []
        root = self._root.strip("/") + "/"
        return sorted(name.strip("/").removeprefix(root) for name in found)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            steadily(self._files.rm_file, self._path(name))

    def write(self, name: str, data: bytes) -> None:
        steadily(self._write, name, data)

    def put(self, path: Path, name: str) -> None:
        """Copy a file and read it back; a copy that differs is made once more."""
        wanted = sha256_file(path)
        for _ in range(2):
            steadily(self._put, path, name)
            if self.size(name) == path.stat().st_size and steadily(self._sha256, name) == wanted:
                return
        raise DataError(
            f"{self.url}/{name} has other bytes than were sent, twice; the store or the way to it is broken"
        )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _read(self, name: str) -> bytes:
        with self._files.open(self._path(name), "rb") as file:
            return file.read()

    def _write(self, name: str, data: bytes) -> None:
        self._make_folder(name)
        with self._files.open(self._path(name), "wb") as file:
            file.write(data)

    def _put(self, path: Path, name: str) -> None:
        self._make_folder(name)
        with path.open("rb") as source, self._files.open(self._path(name), "wb") as target:
            shutil.copyfileobj(source, target, BLOCK)

    def _make_folder(self, name: str) -> None:
        """Some file systems have folders; stores of objects do not mind."""
        with contextlib.suppress(Exception):
            self._files.makedirs(self._path(name).rsplit("/", 1)[0], exist_ok=True)

    def _sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._files.open(self._path(name), "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        return digest.hexdigest()


def build_to_url(
    inputs: Sequence[str | Path],
    url: str,
    settings: Settings,
    runner: Runner,
    *,
    work_dir: Path | None = None,
    storage: str = "{}",
    hash_input: bool = False,
    evaluation: Sequence[Path] = (),
    overwrite: bool = False,
) -> tuple[dict[str, Any], bool]:
    """The manifest, and whether there was anything to do."""
    store = Store(url, storage)
    folder = work_dir or default_folder(url)
    finished = store.read(MANIFEST)
    if finished is not None and not overwrite:
        manifest = shardset.parse_manifest(finished, f"{store.url}/{MANIFEST}")
        check_made_alike(
            store.url, manifest, inputs, folder, settings, runner,
            storage=storage, hash_input=hash_input, evaluation=evaluation,
        )  # fmt: skip
        _check_sizes(store, manifest)
        return manifest, False
    if finished is None and (names := store.names()) and MARKER not in names:
        raise DataError(
            f"--output {store.url} is not empty and not a shard set ({names[0]!r} is in it); choose another"
        )
    with _locked(folder):
        manifest, _ = build(
            inputs, folder, settings, runner,
            storage=storage, hash_input=hash_input, evaluation=evaluation, overwrite=overwrite,
        )  # fmt: skip
        upload(folder, store)
        shutil.rmtree(folder)
    return manifest, True


def upload(folder: Path, store: Store) -> None:
    """Lay down a finished set; what the store has already of just this set is not sent again."""
    identity = sha256_file(folder / MANIFEST)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and WORK not in path.relative_to(folder).parts)
    names = [path.relative_to(folder).as_posix() for path in paths]
    log = _log_of(folder)
    done = _read_log(log, identity)
    store.write(MARKER, json.dumps({"manifest_sha256": identity}).encode())
    store.remove(MANIFEST)
    waiting = [name for name in names if name != MANIFEST and not (name in done and store.size(name) is not None)]
    with log.open("a") as noted, progress("uploading", len(waiting), "files") as counter:
        if not done:
            noted.write(json.dumps(identity) + "\n")
        for name in _in_threads(lambda name: store.put(folder / name, name), waiting):
            noted.write(json.dumps(name) + "\n")
            noted.flush()
            counter.advance(1)
    for name in store.names():  # of the set that was there before
        if name not in names and name != MARKER and OURS.fullmatch(name.split("/")[0]):
            store.remove(name)
    store.put(folder / MANIFEST, MANIFEST)
    store.remove(MARKER)
    log.unlink()


def default_folder(url: str) -> Path:
    """One place per URL, so that the same command finds it again."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "maws-open" / "builds" / hashlib.sha256(url.encode()).hexdigest()[:16]


def _in_threads(call: Callable[[str], None], names: Sequence[str]) -> Iterator[str]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for name, _ in zip(names, pool.map(call, names), strict=True):
                yield name
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_sizes(store: Store, manifest: dict[str, Any]) -> None:
    for entry in manifest["shards"]:
        name = f"shards/{entry['name']}.tar"
        size = store.size(name)
        if size != entry["bytes"]:
            raise DataError(
                f"{store.url}/{name} {'is missing' if size is None else f'has {size:,} bytes'}, the manifest says "
                f"{entry['bytes']:,}; build again with --overwrite"
            )


def _log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.uploaded")


def _read_log(path: Path, identity: str) -> set[str]:
    """Names that were sent for the set with this manifest."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return set()
    if not lines or lines[0] != json.dumps(identity):
        path.unlink()
        return set()
    found = set()
    for line in lines[1:]:
        with contextlib.suppress(ValueError):  # the last one may be half written
            found.add(json.loads(line))
    return found


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One upload per work folder at a time; the lock ends with the process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.lock")
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"another build is using {folder}; wait for it or choose another --work-dir") from None
        yield
        path.unlink(missing_ok=True)
