"""Images that were taken down: a line of JSON each, by hash, so that no later build lets them in again.

    {"key": "photo17", "content_sha256": "…", "stored_sha256": "…", "perceptual_hash": "…", "reason": "on request"}

A line names no caption and no source. `content_sha256` is of the bytes as they came, `stored_sha256` of those in the
shard, `perceptual_hash` finds smaller and re-encoded copies (see phash.py).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from data_pipeline.errors import DataError

NAME: Final = "tombstones.jsonl"
HASHES: Final = ("content_sha256", "stored_sha256", "perceptual_hash")


@dataclass(frozen=True)
class Tombstone:
    key: str
    content_sha256: str
    stored_sha256: str
    perceptual_hash: str | None
    reason: str
    near: int | None = None  # bits in which a copy may differ, where looks were to count
    date: str | None = None  # only if the user gave one: the same call gives the same bytes

    def line(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None}) + "\n"


@dataclass(frozen=True)
class Tombstones:
    """What a build looks images up in."""

    hashes: frozenset[bytes] = frozenset()  # sha256 of bytes as they came, or as they were stored
    looks: tuple[tuple[bytes, int], ...] = ()  # perceptual hash, and bits in which a copy may differ

    def hold(self, image: bytes) -> bool:
        return bool(self.hashes) and hashlib.sha256(image).digest() in self.hashes

    def look_like(self, perceptual_hash: bytes | None) -> bool:
        """Is it a copy of a picture whose takedown counted looks?"""
        if perceptual_hash is None:
            return False
        mine = int.from_bytes(perceptual_hash)
        return any((int.from_bytes(hashed) ^ mine).bit_count() <= near for hashed, near in self.looks)

    @staticmethod
    def parse(path: Path, data: bytes) -> "Tombstones":
        lines = read_lines(path, data)
        return Tombstones(
            frozenset(bytes.fromhex(line[name]) for line in lines for name in HASHES[:2] if name in line),
            tuple(
                (bytes.fromhex(line[HASHES[2]]), int(line["near"]))
                for line in lines
                if {HASHES[2], "near"} <= set(line)
            ),
        )

    @staticmethod
    def open(path: Path) -> "Tombstones":
        """The file of a build's work folder; a build without tombstones has none."""
        return Tombstones.parse(path, path.read_bytes()) if path.is_file() else Tombstones()


def read_lines(path: Path, data: bytes) -> list[dict[str, str]]:
    """Raises DataError at a line that is none of ours: a tombstone that is not understood lets an image in."""
    found: list[dict[str, str]] = []
    for number, text in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not any(name in line for name in HASHES):
                raise ValueError("it names no hash")
            for name in HASHES:
                if len(bytes.fromhex(line.get(name) or "00" * 32)) != 32:
                    raise ValueError(f"{name} is no hash of 32 bytes")
            if not 0 <= int(line.get("near") or 0) <= 256:
                raise ValueError("near is no number of bits")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is no tombstone ({error}); take it out or mend it") from None
        found.append({name: value for name, value in line.items() if value is not None})
    return found


def as_lines(tombstones: Iterable[Tombstone], known: Iterable[Mapping[str, str]] = ()) -> bytes:
    """What is new after what is known already."""
    old = [json.dumps(dict(line)) + "\n" for line in known]
    return "".join([*old, *(stone.line() for stone in tombstones)]).encode()
