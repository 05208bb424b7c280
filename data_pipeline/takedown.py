"""Take pictures out of a finished shard set, for good.

    python -m data_pipeline takedown SHARDS --keys KEY … | --hashes SHA256 … | --images FILE …
                                            [--near BITS] [--runs RUNS …] [--dry-run]

The shards that hold them are written again without them; names and labels of all else stay, images per class are
counted down. SHARDS/tombstones.jsonl says what went, by hash, so that `build --tombstones` lets none of it in again.
The data page and cached features in SHARDS, which may show what went, are removed.

All new files are made in SHARDS/.takedown first. Once they are whole, a marker says so, and they take their places, the
manifest last. Killed before the marker, nothing has changed; killed after it, the set is refused as unfinished until a
takedown of it is run again, which goes on from there. Either way the bytes at the end are the same.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import images, shardset, vocabulary
from data_pipeline.errors import DataError, UsageError
from data_pipeline.files import atomic_write, locked, sha256_bytes, sha256_file, sync_folder, write_bytes
from data_pipeline.lookup import Lookup, Place, base_key
from data_pipeline.shardset import Sample, ShardSet
from data_pipeline.summary import Printer, clean
from data_pipeline.tombstones import NAME, Tombstone, as_lines, read_lines

STAGE: Final = shardset.TAKEDOWN
READY: Final = "ready.json"
COPIES: Final = "duplicates.parquet"
COPIES_AT_ONCE: Final = 10_000  # rows
SHOWN: Final = 10  # names on the terminal
MAX_DEPTH: Final = 4  # folders below --runs that are searched for runs


@dataclass(frozen=True)
class Wanted:
    """What is to go."""

    keys: Sequence[str] = ()
    hashes: Sequence[str] = ()  # sha256 of pictures as they came
    files: Sequence[Path] = ()  # pictures
    near: int | None = None  # bits of the perceptual hash in which a copy may differ


@dataclass(frozen=True)
class Run:
    """A run that was trained on the set, or on one that it was made from."""

    folder: Path
    stage: str
    steps: int
    set_sha256: str


@dataclass
class Outcome:
    """What went, or would go."""

    taken: list[Tombstone] = field(default_factory=list)
    samples: int = 0  # copies counted
    shards: int = 0
    labelled: int = 0
    near: int = 0  # of them, found by their looks only
    already: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    before: str = ""
    after: str = ""


def takedown(
    path: Path, wanted: Wanted, *, reason: str = "", date: str | None = None, runs: Sequence[Path] = (),
    dry_run: bool = False,
) -> Outcome:  # fmt: skip
    """Raises UsageError or DataError before anything is touched."""
    if not path.is_dir():
        shardset.read_manifest(path)  # says that there is none
    if (path / ".work").is_dir():
        raise DataError(f"{path} is being built, or its build was killed; finish it first")
    with _locked(path, dry_run):
        if not dry_run:
            _finish(path)
        shards = ShardSet.open(path)
        outcome = Outcome(before=shards.sha256, after=shards.sha256)
        known = _known(path, shards.manifest)
        looks = _Looks.of(wanted, shards)
        chosen = _choose(shards, wanted, looks, known, outcome)
        outcome.taken = _tombstones(shards, chosen, looks, reason, date, wanted.near)
        outcome.samples, outcome.shards = sum(map(len, chosen.values())), len(chosen)
        outcome.runs = list(_runs(runs, shards))
        if outcome.samples == len(shards):
            raise DataError(f"this would leave no sample in {path}; delete the folder instead")
        if chosen and not dry_run:
            _stage(shards, chosen, outcome, known)
            _finish(path)
            outcome.after = ShardSet.open(path).sha256
    return outcome


# ------------------------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class _Looks:
    """Perceptual hashes of what is to go, one row each; none where looks do not count."""

    hashes: np.ndarray  # N 32
    near: int

    @staticmethod
    def of(wanted: Wanted, shards: ShardSet) -> "_Looks":
        found: list[bytes] = []
        if wanted.near is not None:
            for file in wanted.files:
                try:
                    hashed = images.prepare(_read(file), images.Options()).perceptual_hash
                except images.BadImage as error:
                    raise UsageError(f"--near: {file} is no picture that can be read ({error.reason})") from None
                if hashed is not None:
                    found.append(hashed)
        return _Looks(_matrix(found), wanted.near or 0)

    def like(self, others: np.ndarray) -> np.ndarray:
        """Which rows of others (M 32) are near to one of these."""
        near = np.zeros(len(others), bool)
        for hashed in self.hashes:
            near |= np.bitwise_count(others ^ hashed).sum(axis=1, dtype=np.int64) <= self.near
        return near

    def plus(self, more: Iterable[bytes | None]) -> "_Looks":
        rows = [hashed for hashed in more if hashed is not None]
        return _Looks(np.concatenate([self.hashes, _matrix(rows)]), self.near)


def _matrix(hashes: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), 32)


def _choose(
    shards: ShardSet, wanted: Wanted, looks: _Looks, known: Sequence[Mapping[str, str]], outcome: Outcome
) -> dict[int, set[int]]:
    """Rows by shard. What is near is near to a picture that was named, not to one that is near itself."""
    by_hash = {_hash(text): text for text in wanted.hashes} | {sha256_bytes(_read(f)): str(f) for f in wanted.files}
    places, unknown = _by_key(shards, list(dict.fromkeys(wanted.keys)))
    if by_hash:
        found = dict(_by_content(shards, by_hash.keys()))
        places.extend(place for here in found.values() for place in here)
        unknown.extend(by_hash[hashed] for hashed in by_hash if hashed not in found)
    chosen: dict[int, set[int]] = {}
    for shard, row in places:
        chosen.setdefault(shard, set()).add(row)
    if wanted.near is not None:
        named = [shards.index(shard)["perceptual_hash"][row].as_py() for shard, row in places]
        outcome.near = _add_near(shards, looks.plus(named), chosen)
    gone = {line[name] for line in known for name in ("key", "content_sha256", "stored_sha256") if name in line}
    names = {text: hashed for hashed, text in by_hash.items()}
    for text in unknown:
        (outcome.already if {text, names.get(text)} & gone else outcome.unknown).append(text)
    return dict(sorted(chosen.items()))


def _by_key(shards: ShardSet, keys: Sequence[str]) -> tuple[list[Place], list[str]]:
    lookup = Lookup(shards)
    found = {key: lookup.find(key) for key in keys}
    missing = {key for key, places in found.items() if not places}
    if missing:  # a set that was not sorted when it was made must not keep what is to go
        found |= lookup.scan(missing)
    places = [place for key in keys for place in found[key]]
    return places, [key for key in keys if not found[key]]


def _by_content(shards: ShardSet, hashes: Collection[str]) -> Iterator[tuple[str, list[Place]]]:
    """Places of the pictures whose bytes, as they came in, have one of these sha256."""
    found: dict[str, list[Place]] = {}
    wanted = {bytes.fromhex(text): text for text in hashes}
    for shard in range(shards.num_shards):
        for row, content in enumerate(_column(shards, shard, "content_sha256")):
            if content is None:  # of an older version, which kept none
                content = bytes.fromhex(sha256_bytes(shards.image_bytes(shard, row)))
            if content in wanted:
                found.setdefault(wanted[content], []).append((shard, row))
    yield from found.items()


def _add_near(shards: ShardSet, looks: _Looks, chosen: dict[int, set[int]]) -> int:
    more = 0
    for shard in range(shards.num_shards):
        column = _column(shards, shard, "perceptual_hash")
        rows = np.array([row for row, hashed in enumerate(column) if hashed is not None], np.int64)
        near = looks.like(_matrix([hashed for hashed in column if hashed is not None]))
        for row in rows[near].tolist():
            if row not in chosen.get(shard, ()):
                chosen.setdefault(shard, set()).add(row)
                more += 1
    return more


def _column(shards: ShardSet, shard: int, name: str) -> list[Any]:
    schema = shardset.INDEX_SCHEMA
    return pq.read_table(shards.tar_path(shard).with_suffix(".parquet"), columns=[name], schema=schema)[
        name
    ].to_pylist()


def _hash(text: str) -> str:
    clean = text.strip().lower()
    with contextlib.suppress(ValueError):
        if len(bytes.fromhex(clean)) == 32:
            return clean
    raise UsageError(f"--hashes {text!r} is no sha256: 64 digits from 0 to f")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"--images {file}: cannot read it ({error.strerror})") from None


def _tombstones(
    shards: ShardSet, chosen: Mapping[int, set[int]], looks: _Looks, reason: str, date: str | None, near: int | None
) -> list[Tombstone]:
    """One per picture, sorted by key; copies of one sample are one picture."""
    stones: dict[str, Tombstone] = {}
    for shard, rows in chosen.items():
        index = shards.index(shard)
        for row in sorted(rows):
            key = base_key(index["key"][row].as_py())
            stored = sha256_bytes(shards.image_bytes(shard, row))
            content, hashed = index["content_sha256"][row].as_py(), index["perceptual_hash"][row].as_py()
            stones.setdefault(
                key,
                Tombstone(
                    key,
                    content.hex() if content else stored,
                    stored,
                    hashed.hex() if hashed else None,
                    reason,
                    near,
                    date,
                ),
            )
    return [stones[key] for key in sorted(stones)]


def _known(path: Path, manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    """Tombstones of earlier calls."""
    expected = manifest.get("files", {}).get(NAME)
    file = path / NAME
    if expected is None:
        if file.exists():
            raise DataError(f"{file} is not of this shard set; move it away")
        return []
    data = file.read_bytes() if file.is_file() else b""
    if sha256_bytes(data) != expected:
        raise DataError(f"{file} is missing or was changed: its sha256 is not the one in the manifest")
    return read_lines(file, data)


# -------------------------------------------------------------------------------------------------------------- writing


def _stage(shards: ShardSet, chosen: Mapping[int, set[int]], outcome: Outcome, known: list[dict[str, str]]) -> None:
    """All new files, in a folder of their own, and the list of what goes where."""
    path, stage = shards.path, shards.path / STAGE
    entries: list[dict[str, Any]] = []
    fewer: dict[int, int] = {}  # images by label
    files, gone = [], []
    repeats, pictures, labels = 0.0, 0, 0
    for number, entry in enumerate(shards.manifest["shards"]):
        if number not in chosen:
            entries.append(entry)
            continue
        if problems := shardset.verify_shard(path / "shards", entry):
            raise DataError(f"{problems[0]}; nothing was taken down")
        index = shards.index(number).to_pylist()
        for row in chosen[number]:
            repeats += index[row]["repeat"]
            if "+" not in index[row]["key"]:
                pictures += 1
                mine = index[row]["labels"]
                outcome.labelled += bool(mine)
                labels += len(mine)
                for label in mine:
                    fewer[label] = fewer.get(label, 0) + 1
        names = [f"shards/{entry['name']}.{kind}" for kind in ("tar", "parquet")]
        if len(chosen[number]) == entry["samples"]:
            gone.extend(names)
            continue
        kept = (_sample(shards, number, row, found) for row, found in enumerate(index) if row not in chosen[number])
        entries.append(dict(shardset.write_shard(stage / "shards", entry["name"], kept)))
        files.extend(names)
    vocabulary.recount(path / "vocabulary.parquet", stage / "vocabulary.parquet", fewer)
    write_bytes(stage / NAME, as_lines(outcome.taken, known))
    files += ["vocabulary.parquet", NAME]
    if _forget_copies(shards, {stone.key for stone in outcome.taken}, stage / COPIES):
        files.append(COPIES)
    gone.append("report.html")
    manifest = _manifest(shards, entries, stage, pictures, outcome.labelled, labels, repeats)
    shardset.write_manifest(stage, manifest)
    write_bytes(stage / READY, json.dumps({"files": files, "gone": gone}).encode())


def _forget_copies(shards: ShardSet, keys: Collection[str], output: Path) -> bool:
    """The list of removed copies without the small pictures of what goes; False if it names none of them."""
    if COPIES not in shards.manifest.get("files", {}):
        return False
    with pq.ParquetFile(shards.path / COPIES) as file:
        named = (row for batch in file.iter_batches(columns=["key", "kept"]) for row in batch.to_pylist())
        if not any(row["key"] in keys or row["kept"] in keys for row in named):
            return False
        with atomic_write(output) as target, pq.ParquetWriter(target, file.schema_arrow, compression="zstd") as writer:
            for batch in file.iter_batches(COPIES_AT_ONCE):
                rows = batch.to_pylist()
                for row in rows:
                    if row["key"] in keys or row["kept"] in keys:
                        row |= {"picture": None, "kept_picture": None}
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=file.schema_arrow))
    return True


def _sample(shards: ShardSet, shard: int, row: int, found: dict[str, Any]) -> Sample:
    extension = found["member"].rpartition(".")[2]
    return Sample(
        found["key"], shards.image_bytes(shard, row), extension, shards.record(shard, row), found["labels"],
        found["repeat"], found["content_sha256"], found["perceptual_hash"],
    )  # fmt: skip


def _manifest(
    shards: ShardSet,
    entries: list[dict[str, Any]],
    stage: Path,
    pictures: int,
    labelled: int,
    labels: int,
    repeats: float,
) -> dict[str, Any]:
    """The old one with fewer images; what it came from stays as it was."""
    old = shards.manifest
    counts, resampling = dict(old["counts"]), dict(old["resampling"])
    counts["dropped"] = dict(sorted((counts["dropped"] | {
        "taken_down": counts["dropped"].get("taken_down", 0) + pictures}).items()))  # fmt: skip
    for name, number in (("kept", pictures), ("labelled", labelled), ("labels", labels)):
        counts[name] -= number
    resampling["samples_per_epoch"] -= repeats
    changed = {name: sha256_file(stage / name) for name in (NAME, COPIES) if (stage / name).is_file()}
    return {
        **{name: value for name, value in old.items() if name not in ("format", "digest")},
        "samples": sum(entry["samples"] for entry in entries),
        "shards": entries,
        "vocabulary_sha256": sha256_file(stage / "vocabulary.parquet"),
        "files": dict(sorted((old.get("files", {}) | changed).items())),
        "counts": counts,
        "resampling": resampling,
        "parents": [*old.get("parents", []), {"sha256": shards.sha256, "taken_down": pictures}],
    }


def _finish(path: Path) -> None:
    """Put staged files in their places, or throw away what a killed call had not made whole. Can be called again."""
    stage = path / STAGE
    ready = stage / READY
    if ready.is_file():
        plan = json.loads(ready.read_bytes())
        if (stage / "manifest.json").is_file():
            (path / "manifest.json").unlink(missing_ok=True)  # from here on the set is refused as unfinished
            sync_folder(path)
            for name in plan["files"]:
                if (stage / name).is_file():
                    os.replace(stage / name, path / name)
            for name in plan["gone"]:
                (path / name).unlink(missing_ok=True)
            shutil.rmtree(path / shardset.FEATURES, ignore_errors=True)
            sync_folder(path / "shards")
            os.replace(stage / "manifest.json", path / "manifest.json")
            sync_folder(path)
        ready.unlink()
    for item in stage.iterdir():
        if item.name != "lock":
            shutil.rmtree(item) if item.is_dir() else item.unlink()


@contextlib.contextmanager
def _locked(path: Path, dry_run: bool) -> Iterator[None]:
    """One takedown at a time; a dry run writes nothing at all."""
    stage = path / STAGE
    if dry_run:
        yield
        return
    with locked(stage / "lock", str(path), f"another takedown is at work in {path}; wait for it"):
        try:
            yield
        except Exception:
            _tidy(stage)
            raise
        _tidy(stage)


def _tidy(stage: Path) -> None:
    if not (stage / READY).exists():
        shutil.rmtree(stage)


# ----------------------------------------------------------------------------------------------------------------- runs


def _runs(folders: Sequence[Path], shards: ShardSet) -> Iterator[Run]:
    """Runs whose config names this set, or one that it was made from by earlier takedowns."""
    sets = {shards.sha256, *(parent["sha256"] for parent in shards.manifest.get("parents", []) if "sha256" in parent)}
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"--runs {folder}: no such folder")
        for config in sorted(_configs(folder)):
            try:
                facts = json.loads(config.read_bytes())
                sha256, stage = facts["shards_sha256"], str(facts.get("stage", "?"))
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if sha256 in sets:
                yield Run(config.parent, stage, _steps(config.parent), sha256)


def _configs(folder: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    if (folder / "config.json").is_file():
        yield folder / "config.json"
    elif depth:
        for inner in folder.iterdir():
            if inner.is_dir() and not inner.is_symlink():
                yield from _configs(inner, depth - 1)


def _steps(run: Path) -> int:
    """The last step that was logged."""
    try:
        lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0


# ---------------------------------------------------------------------------------------------------------------- words


def print_outcome(printer: Printer, path: Path, outcome: Outcome, dry_run: bool) -> None:
    near = f", {outcome.near:,} of them found by their looks" if outcome.near else ""
    labelled = "" if dry_run else f", {outcome.labelled:,} with labels"
    printer.line(
        f"{'would go' if dry_run else 'taken down'}: {len(outcome.taken):,} pictures ({outcome.samples:,} samples in "
        f"{outcome.shards:,} shards{near}){labelled}"
    )
    for title, names in (("already taken down", outcome.already), ("not in the set", outcome.unknown)):
        if names:
            more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
            printer.line(f"{title}: {', '.join(map(clean, names[:SHOWN]))}{more}")
    if dry_run:
        for stone in outcome.taken[:SHOWN]:
            printer.line(f"  {clean(stone.key)}")
    rows = [(str(run.folder), run.stage, run.steps, run.set_sha256[:12]) for run in outcome.runs]
    if rows:
        printer.table("Runs that could draw them", ("run", "stage", "steps done", "set"), rows, right=(2,))
    if outcome.taken and not dry_run:
        printer.line(
            f"sha256 of the set: {outcome.after}; the sources still hold the pictures: build with "
            f"--tombstones {path / NAME} from now on. A run that began on the old set cannot be resumed on this one."
        )
