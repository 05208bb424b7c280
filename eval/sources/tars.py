"""WebDataset tars as evaluation data: neighbouring members with the same name up to its first dot are one sample.

    val-000.tar   dog1.jpg dog1.cls · dog2.png dog2.json …     a .cls holds a number or a name, a .json a field `label`
    val-{000..049}.tar                                         braces as the webdataset library has them, or a folder

Only headers and labels are read at first; a picture is read at its offset when it is asked for. Nothing is unpacked,
and members that cannot be trusted (links, names that point outside, larger than a picture may be) are left out and
counted (data_pipeline/sources/tar.py). The grouping rule is that of `webdataset.tariterators.group_by_keys`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from data_pipeline.errors import DataError
from data_pipeline.files import sha256_file
from data_pipeline.images import MAX_BYTES
from data_pipeline.sources import tar
from eval.classes import Label
from eval.sources.source import PICTURES, Source

MAX_LABEL: Final = 1 << 20  # bytes of a .cls or .json; ours: a record with its captions is a few kilobytes
FIELDS: Final = ("label", "cls")  # of a .json
BROKEN: Final = ("truncated_tar", "damaged_tar")
MAX_FILES: Final = 100_000  # that braces may stand for; ours: the largest public sets have a few thousand shards
_KEY_AND_ENDING: Final = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_OWN: Final = re.compile(r"__[^/]*__(/|$)")  # what writers of shards keep for themselves
_BRACES: Final = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


@dataclass
class Sample:
    """Neighbouring members of one key, by ending in lower case: where each begins, and its size."""

    key: str
    members: dict[str, tar.Member] = field(default_factory=dict)

    @property
    def picture(self) -> tar.Member | None:
        """`jpg` before `seg.jpg`."""
        plain = (self.members[ending] for ending in self.members if f".{ending}" in PICTURES)
        longer = (m for ending, m in self.members.items() if f".{ending.rpartition('.')[2]}" in PICTURES)
        return next(plain, None) or next(longer, None)


class Tar:
    """A tar whose members are read by where they begin; opened for each, so it is safe in threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                head = file.read(tar.BLOCK)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        if tar.is_gzip(head):
            raise DataError(f"{path} is packed, and its pictures are read in any order; unpack it first: gunzip {path}")
        if not tar.looks_like_tar(head):
            raise DataError(f"{path} is not a tar" + ("; it is empty" if not head else ""))

    def samples(self, left_out: Counter[str]) -> Iterator[Sample]:
        """Samples in the order of the tar; what is refused is counted. DataError for a tar that is cut or damaged."""
        current: Sample | None = None
        with self.path.open("rb") as file:
            for member in tar.members(file, MAX_BYTES, data=False):
                if member.problem in BROKEN:
                    whole = f"after {current.key}" if current else "at its beginning"
                    raise DataError(f"{self.path} is cut off or damaged {whole} ({member.problem}); copy it again")
                if member.problem:
                    left_out[member.problem] += 1
                    continue
                fits = _KEY_AND_ENDING.fullmatch(member.name)
                if fits is None or _OWN.match(member.name):
                    continue  # no part of a sample
                if current is None or current.key != fits[1]:
                    if current is not None:
                        yield current
                    current = Sample(fits[1])
                if current.members.setdefault(fits[2].lower(), member) is not member:
                    left_out["duplicate_member"] += 1
        if current is not None:
            yield current

    def read(self, member: tar.Member) -> bytes:
        try:
            with self.path.open("rb") as file:
                found = next(tar.members(file, MAX_BYTES, member.offset, member.offset + 1), None)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from None
        if found is None or found.data is None or found.name != member.name:
            raise DataError(f"{self.path} has changed since it was looked through: {member.name} is no longer there")
        return found.data


def read_tar(path: Path, prefix: bool) -> Source:
    """Every sample with a picture and a label; with `prefix` the keys say which tar."""
    opened, left_out, sha256 = Tar(path), Counter[str](), sha256_file(path)
    names: list[str] = []
    labels: list[Label | None] = []
    pictures: list[tar.Member] = []
    for sample in opened.samples(left_out):
        if sample.picture is None:
            left_out["missing_image"] += 1
            continue
        label = _label(opened, sample, left_out)
        names.append(sample.key)
        labels.append(label)
        pictures.append(sample.picture)
    start = f"{path.stem}-{sha256[:8]}/" if prefix else ""
    keys = [start + name for name in names]
    return Source(
        str(path), keys, labels, lambda row: opened.read(pictures[row]), sha256, left_out=left_out, own_keys=names
    )


def _label(opened: Tar, sample: Sample, left_out: Counter[str]) -> Label | None:
    """What the .cls says, else the .json; None is counted under its reason."""
    member = sample.members.get("cls") or sample.members.get("json")
    if member is None:
        left_out["no_label"] += 1
        return None
    if member.size > MAX_LABEL:
        left_out["label_too_long"] += 1
        return None
    data = opened.read(member)
    label, reason = _of_text(data) if "cls" in sample.members else _of_json(data)
    if label is None:
        left_out[reason] += 1
    return label


def _of_text(data: bytes) -> tuple[Label | None, str]:
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return None, "label_not_utf8"
    if re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text), ""
    return text or None, "empty_label"


def _of_json(data: bytes) -> tuple[Label | None, str]:
    try:
        record: Any = json.loads(data)
    except (ValueError, RecursionError):  # also what is not UTF-8
        return None, "bad_json"
    if not isinstance(record, dict):
        return None, "bad_json"
    label = next((record[name] for name in FIELDS if name in record), None)
    is_label = isinstance(label, (int, str)) and not isinstance(label, bool) and label != ""
    return (label, "") if is_label else (None, "no_label" if label is None else "bad_label")


def expand(text: str) -> list[str]:
    """`a-{00..11}.tar` and `{train,val}.tar` as the names they stand for; a number keeps its leading zeros."""
    found = _BRACES.search(text)
    if found is None:
        return [text]
    first, last, words = found.groups()
    if words is not None:
        parts = words.split(",")
    elif int(last) < int(first):
        raise DataError(f"{text} stands for no file: {first} is more than {last}")
    elif int(last) - int(first) >= MAX_FILES:
        raise DataError(f"{text} stands for more than {MAX_FILES:,} files")
    else:
        parts = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [name for part in parts for name in expand(text[: found.start()] + part + text[found.end() :])]
