"""The shard set on disk: tars of images with their labels, an index per tar, a vocabulary, a manifest.

    SHARDS/shards/00000.tar        KEY.json, KEY.jpg|png|webp, … sorted by key (any webdataset reader opens it)
    SHARDS/shards/00000.parquet    one row per sample: key, byte offsets of both members, labels, repeat factor
    SHARDS/vocabulary.parquet      label index -> synset, wnid, lemmas, gloss, number of images
    SHARDS/dropped.parquet, …      what was left out and why, and other tables of schema.py, named in the manifest
    SHARDS/manifest.json           sha256 of all of the above, how it was made, every drop by reason; written last

The same input gives the same bytes: members carry no time and no owner, and the manifest no date.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypedDict, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.files import atomic_write, sha256_bytes, sha256_file, write_bytes

FORMAT: Final = 1
MAX_JSON: Final = 1 << 20  # bytes of one sample's json; captions are capped far below this
MAX_KEY: Final = 90  # characters: key + ".json" fits the 100 bytes of a ustar name
BLOCK: Final = 512  # tar block
RECORD: Final = 20 * BLOCK  # tars are padded to whole records
TAKEDOWN: Final = ".takedown"  # folder of a takedown under way
FEATURES: Final = "features"  # folder of what a locked image tower makes of the pictures (maws/feature_cache.py)
IMAGE_EXTENSIONS: Final = ("jpg", "png", "webp")

INDEX_SCHEMA: Final = pa.schema(
    [
        ("key", pa.string()),
        ("member", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("labels", pa.list_(pa.int32())),
        ("repeat", pa.float64()),
        ("content_sha256", pa.binary()),  # of the picture as it came in, before any resizing
        ("perceptual_hash", pa.binary()),  # of the picture; null where it has none
    ]
)
VOCABULARY_SCHEMA: Final = pa.schema(
    [
        ("index", pa.int32()),
        ("synset", pa.string()),
        ("wnid", pa.string()),
        ("lemmas", pa.list_(pa.string())),
        ("gloss", pa.string()),
        ("count", pa.int64()),
        ("frozen_count", pa.int64()),  # in the corpus that the vocabulary was chosen on; null if that is this one
    ]
)

_SAFE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*")

T = TypeVar("T")


@dataclass(frozen=True)
class VocabularyEntry:
    """One class: a WordNet noun synset and the number of images that carry it."""

    index: int
    synset: str
    wnid: str
    lemmas: list[str]
    gloss: str
    count: int
    frozen_count: int | None = None  # in the corpus the vocabulary was chosen on, where that is another


@dataclass(frozen=True)
class Sample:
    """What the writer stores for one image; `record` is the json beside it."""

    key: str
    image: bytes
    extension: str
    record: dict[str, Any]
    labels: list[int]
    repeat: float
    content_sha256: bytes | None = None
    perceptual_hash: bytes | None = None


class ShardEntry(TypedDict):
    """A shard as the manifest names it."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


# ---------------------------------------------------------------------------------------------------------------- keys


def safe_key(text: str) -> str:
    """A tar name that cannot escape, hide or collide: safe keys stay as they are, others end in 12 digits of a hash."""
    if len(text) <= MAX_KEY and _SAFE_KEY.fullmatch(text):
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    words = re.sub(r"[^A-Za-z0-9_/-]+", "_", text)
    readable = "/".join(part for part in words.split("/") if part.strip("_"))[: MAX_KEY - 13].rstrip("/")
    return f"{readable}-{digest}" if readable else f"key-{digest}"


# -------------------------------------------------------------------------------------------------------------- writer


def write_shard(folder: Path, name: str, samples: Iterable[Sample]) -> ShardEntry:
    """Write `name`.tar and `name`.parquet from samples sorted by key; one image is in memory at a time."""
    rows: list[dict[str, Any]] = []
    digest, position = hashlib.sha256(), 0
    with atomic_write(folder / f"{name}.tar") as file:

        def append(member: str, data: bytes) -> int:
            nonlocal position
            info = tarfile.TarInfo(member)  # mtime 0, uid and gid 0, no names
            info.size, info.mode = len(data), 0o644
            head = info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
            for part in (head, data, bytes(-len(data) % BLOCK)):
                file.write(part)
                digest.update(part)
            start = position + len(head)
            position = start + len(data) + -len(data) % BLOCK
            return start

        for sample in samples:
            text = json.dumps(sample.record, ensure_ascii=False, separators=(",", ":")).encode()
            assert rows == [] or rows[-1]["key"] < sample.key, "samples must come sorted by key, each key once"
            assert len(text) <= MAX_JSON
            assert sample.extension in IMAGE_EXTENSIONS
            member = f"{sample.key}.{sample.extension}"
            rows.append(
                {
                    "key": sample.key,
                    "member": member,
                    "json_offset": append(f"{sample.key}.json", text),
                    "json_size": len(text),
                    "image_offset": append(member, sample.image),
                    "image_size": len(sample.image),
                    "labels": sample.labels,
                    "repeat": sample.repeat,
                    "content_sha256": sample.content_sha256,
                    "perceptual_hash": sample.perceptual_hash,
                }
            )
        end = bytes(2 * BLOCK + -(position + 2 * BLOCK) % RECORD)
        file.write(end)
        digest.update(end)
    write_table(folder / f"{name}.parquet", pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
    return {
        "name": name,
        "samples": len(rows),
        "bytes": position + len(end),
        "sha256": digest.hexdigest(),
        "index_sha256": sha256_file(folder / f"{name}.parquet"),
    }


def write_table(path: Path, table: pa.Table, row_group_size: int | None = None) -> None:
    with atomic_write(path) as file:
        pq.write_table(table, file, row_group_size=row_group_size, compression="zstd")


def write_vocabulary(path: Path, entries: Iterable[VocabularyEntry]) -> str:
    """Write the table and return its sha256."""
    write_table(path, pa.Table.from_pylist([asdict(entry) for entry in entries], schema=VOCABULARY_SCHEMA))
    return sha256_file(path)


def manifest_bytes(content: dict[str, Any]) -> bytes:
    """The manifest as stored: its last key is the sha256 of everything before it, so that a changed digit shows."""
    content = {key: value for key, value in content.items() if key != "digest"}
    content["digest"] = sha256_bytes(json.dumps(content, ensure_ascii=True, indent=1).encode())
    return json.dumps(content, ensure_ascii=True, indent=1).encode() + b"\n"


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """The last file of a shard set: with it the set is finished."""
    write_bytes(folder / "manifest.json", manifest_bytes({"format": FORMAT, **content}))


# -------------------------------------------------------------------------------------------------------------- reader


class ShardSet:
    """A finished shard set, read by position: (shard, row). Safe in threads and in forked or spawned workers."""

    def __init__(self, path: Path, manifest: dict[str, Any], sha256: str) -> None:
        self.path = path
        self.manifest = manifest
        self.sha256 = sha256  # of manifest.json: the identity of the set, written into everything made from it
        self.shard_sizes: list[int] = [shard["samples"] for shard in manifest["shards"]]
        self.vocabulary: list[VocabularyEntry] = _read_vocabulary(path / "vocabulary.parquet", manifest)
        self._indexes: _Recent[pa.Table] = _Recent(64)
        self._tars: _Recent[_Tar] = _Recent(128)

    @staticmethod
    def open(path: str | Path) -> "ShardSet":
        path = Path(path)
        manifest, sha256 = read_manifest(path)
        return ShardSet(path, manifest, sha256)

    @property
    def num_shards(self) -> int:
        return len(self.shard_sizes)

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet, (self.path, self.manifest, self.sha256)  # open files and caches stay behind

    def index(self, shard: int) -> pa.Table:
        """The shard's table, INDEX_SCHEMA; recent ones are kept."""
        return self._indexes.get(shard, self._read_index)

    def keep(self, shards: int) -> None:
        """Keep the indexes of at least this many recent shards: whoever reads more at a time in turn says so."""
        self._indexes.size = max(self._indexes.size, shards)

    def image_bytes(self, shard: int, row: int) -> bytes:
        """The image as stored (jpg, png or webp)."""
        return self._member(shard, row, "image")

    def record(self, shard: int, row: int) -> dict[str, Any]:
        """The sample's json: key, caption, language, hashtags, synsets, labels, repeat, source, licence."""
        where = f"sample {row} of {self.tar_path(shard)}"
        try:
            record = json.loads(self._member(shard, row, "json", limit=MAX_JSON))
        except (ValueError, RecursionError) as error:
            raise DataError(f"the json of {where} is damaged ({error}); build the shard set again") from None
        if not isinstance(record, dict):
            raise DataError(f"the json of {where} is not an object; build the shard set again")
        return record

    def verify(self) -> Iterator[str]:
        """One line per problem: a file that is missing, of the wrong size or sha256, or an index that does not fit."""
        yield from verify_tables(self.path, self.manifest)
        for entry in self.manifest["shards"]:
            yield from verify_shard(self.path / "shards", entry)

    def tar_path(self, shard: int) -> Path:
        return self.path / "shards" / f"{self.manifest['shards'][shard]['name']}.tar"

    def _read_index(self, shard: int) -> pa.Table:
        path = self.tar_path(shard).with_suffix(".parquet")
        try:
            table = pq.read_table(path, schema=INDEX_SCHEMA)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot read the index {path} ({error}); build the shard set again") from None
        if table.num_rows != self.shard_sizes[shard]:
            raise DataError(f"{path} has {table.num_rows} rows, the manifest says {self.shard_sizes[shard]}")
        return table

    def _member(self, shard: int, row: int, member: str, limit: int | None = None) -> bytes:
        index = self.index(shard)
        offset: int = index[f"{member}_offset"][row].as_py()
        size: int = index[f"{member}_size"][row].as_py()
        path = self.tar_path(shard)
        if limit is not None and size > limit:
            raise DataError(f"the {member} of sample {row} of {path} has {size:,} bytes, the limit is {limit:,}")
        tar = self._tars.get(shard, lambda number: _Tar(self.tar_path(number)))
        data = os.pread(tar.descriptor, size, offset)
        if len(data) != size:
            raise DataError(f"{path} ends inside sample {row}; run `python -m data_pipeline inspect {self.path}`")
        return data


def read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a finished shard set and the sha256 of its file."""
    file = path / "manifest.json"
    if not path.is_dir():
        raise DataError(f"no shard set at {path}: no such folder; make one with `python -m data_pipeline build`")
    if not file.is_file():
        if (path / TAKEDOWN).is_dir():
            raise DataError(
                f"a takedown in {path} was interrupted; run `python -m data_pipeline takedown {path} …` again to end it"
            )
        if (path / ".work").is_dir():
            raise DataError(
                f"{path} is an unfinished build; run the same `python -m data_pipeline build` command again"
            )
        raise DataError(f"{path} is not a shard set: it has no manifest.json")
    data = file.read_bytes()
    return parse_manifest(data, str(file)), sha256_bytes(data)


def parse_manifest(data: bytes, file: str) -> dict[str, Any]:
    """The manifest that `file` holds, if it is as it was written."""
    try:
        manifest = json.loads(data)
        number = manifest["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{file} is damaged or not the manifest of a shard set; build the shard set again") from None
    if not isinstance(number, int) or number > FORMAT:
        raise DataError(f"{file} has format {number!r}, this version reads up to {FORMAT}; update the software")
    if manifest_bytes(manifest) != data:
        raise DataError(f"{file} was changed after it was written: its digest does not fit; build the shard set again")
    return manifest


def verify_tables(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """The vocabulary and the tables beside it; older sets have none."""
    yield from _verify_file(folder / "vocabulary.parquet", manifest["vocabulary_sha256"])
    for name, sha256 in manifest.get("files", {}).items():
        yield from _verify_file(folder / Path(name).name, sha256)


def verify_shard(folder: Path, entry: ShardEntry) -> list[str]:
    """The problems of one shard: both files against the manifest, then the index against what the tar holds."""
    tar, index = folder / f"{entry['name']}.tar", folder / f"{entry['name']}.parquet"
    problems = [*_verify_file(tar, entry["sha256"], entry["bytes"]), *_verify_file(index, entry["index_sha256"])]
    return problems or list(_verify_offsets(tar, index, entry["samples"]))


def _verify_file(path: Path, sha256: str, size: int | None = None) -> Iterator[str]:
    if not path.is_file():
        yield f"{path} is missing"
    elif size is not None and path.stat().st_size != size:
        yield f"{path} has {path.stat().st_size:,} bytes, the manifest says {size:,}"
    elif sha256_file(path) != sha256:
        yield f"{path} is damaged: its sha256 is not the one in the manifest"


def _verify_offsets(tar: Path, index: Path, samples: int) -> Iterator[str]:
    rows = pq.read_table(index, schema=INDEX_SCHEMA).to_pylist()
    expected = [
        member
        for row in rows
        for member in (
            (f"{row['key']}.json", row["json_offset"], row["json_size"]),
            (row["member"], row["image_offset"], row["image_size"]),
        )
    ]
    with tarfile.open(tar, "r:") as archive:
        found = [(member.name, member.offset_data, member.size) for member in archive]
    if len(rows) != samples or expected != found:
        yield f"{index} does not fit {tar.name}: members or offsets differ"
        return
    with tar.open("rb") as file:
        for row in rows:
            file.seek(row["json_offset"])
            record = json.loads(file.read(row["json_size"]))
            if (record["key"], record["labels"], record["repeat"]) != (row["key"], row["labels"], row["repeat"]):
                yield f"{index} does not fit {tar.name}: {row['key']} differs from its json"


def _read_vocabulary(path: Path, manifest: dict[str, Any]) -> list[VocabularyEntry]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); build the shard set again") from None
    if sha256_bytes(data) != manifest["vocabulary_sha256"]:
        raise DataError(f"{path} is damaged: its sha256 is not the one in the manifest; build the shard set again")
    table = pq.read_table(io.BytesIO(data), schema=VOCABULARY_SCHEMA)
    return [VocabularyEntry(**row) for row in table.to_pylist()]


class _Tar:
    """An open tar. Closed when nobody holds it any more, so that a thread never loses a file it is reading."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}); build the shard set again") from None

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _Recent(Generic[T]):
    """The `size` things used last, made on first use."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._items: OrderedDict[int, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int, make: Callable[[int], T]) -> T:
        with self._lock:
            if number not in self._items:
                self._items[number] = make(number)
            self._items.move_to_end(number)
            while len(self._items) > self.size:
                self._items.popitem(last=False)
            return self._items[number]
