"""`python -m eval shards`: any labelled set as a shard set with one class a picture, for `--stage finetune`.

python -m eval shards --data imagenet1k=/data/imagenet --output shards/in1k
python -m eval shards --data demo/emoji/eval-emojione.parquet --classes demo/emoji/classes.json --output shards/emoji

The vocabulary is the classes in their order: what a class is called are its lemmas, and its wnid and synset stand there
where they are known. Pictures stay the bytes they are; only forms that a shard does not hold (GIF, BMP, TIFF) become
PNG. A picture that cannot be read is left out, counted and named; more than one in a hundred is an error. The output
appears under its name when it is whole.
"""

import argparse
import hashlib
import io
import logging
import os
import re
import secrets
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from data_pipeline.errors import DataError, UsageError
from data_pipeline.images import KEPT_AS_IS, BadImage, Limits, check
from data_pipeline.shardset import (
    Sample,
    ShardSet,
    VocabularyEntry,
    safe_key,
    write_manifest,
    write_shard,
    write_vocabulary,
)
from eval.classes import Classes
from eval.datasets import Dataset, open_training
from eval.processes import Stopped, stopping_on_signals
from eval.sources.shards import CLASSES
from eval.sources.source import some

MakeParser = Callable[..., argparse.ArgumentParser]  # one whose errors are UsageErrors
log = logging.getLogger(__name__)

SAMPLES: Final = 1000  # a shard; ours: a hundred megabytes of ImageNet's pictures, which are in memory one shard a time
MAX_BROKEN: Final = 0.01  # of all pictures; ours: more than a slip of the disk
ANY: Final = Limits(
    min_side=1, max_aspect=float("inf")
)  # a set is taken as it is: small and long pictures belong to it
_WNID: Final = re.compile(r"n\d{8}")


def parser(make_parser: MakeParser) -> argparse.ArgumentParser:
    p = make_parser("python -m eval shards", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.allow_abbrev = False
    p.add_argument("--data", type=Path, nargs="+", required=True, metavar="PATH|NAME=PATH", help="labelled pictures")
    p.add_argument("--classes", metavar="NAME|FILE", help="a bundled class set or a file; default: the data's own")
    p.add_argument("--labels", type=Path, metavar="FILE", help="Parquet of key, label for --data")
    p.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must not be there yet")
    p.add_argument("--samples-per-shard", type=int, default=SAMPLES, metavar="N", help=f"default: {SAMPLES}")
    return p


def main(argv: Sequence[str], make_parser: MakeParser) -> int:
    """The command `shards`."""
    args = parser(make_parser).parse_args(list(argv))
    if args.samples_per_shard < 1:
        raise UsageError(f"--samples-per-shard {args.samples_per_shard} must be at least 1")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UsageError(f"--output {args.output} is there already; give another folder, or remove it first")
    classes, dataset = open_training(args.data, args.classes, args.labels)
    try:
        with stopping_on_signals():  # a killed one leaves its hidden folder behind, a stopped one nothing
            shards = write(dataset, classes, args.output, [str(path) for path in args.data], args.samples_per_shard)
    except Stopped as stop:
        log.warning("stopped; %s was not written", args.output)
        return 128 + stop.number
    broken = shards.manifest["counts"]["broken"]
    left = f"; left out: {sum(broken.values()):,} that cannot be read" if broken else ""
    size = f"{len(shards):,} pictures of {len(shards.vocabulary):,} classes, {shards.num_shards:,} shards"
    _say(
        f"{args.output}: {size}{left}",
        f"train on it: deepspeed maws/train.py --stage finetune … {shlex.quote(f'data.shards={args.output}')}",
    )
    return 0


def _say(*lines: str) -> None:
    print("\n".join(lines))  # noqa: T201  the result of the command


def write(
    dataset: Dataset, classes: Classes, output: Path, paths: Sequence[str] = (), samples_per_shard: int = SAMPLES
) -> ShardSet:
    """Write the shard set and open it. Raises DataError, and then nothing is there."""
    counts = Counter(dataset.labels.tolist())
    if empty := [classes.name(label) for label in range(len(classes)) if not counts[label]]:
        raise DataError(
            f"{len(empty)} of {len(classes)} classes have no picture: {some(empty)}; give --classes that lists those "
            f"of this data, or the data that belongs to these classes"
        )
    stage = output.parent / f".{output.name}.{secrets.randbits(64)}.tmp"
    try:
        stage.mkdir(parents=True)
        write_manifest(stage, _write(stage, dataset, classes, paths, samples_per_shard))
        os.replace(stage, output)
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror}") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return ShardSet.open(output)


def _write(
    folder: Path, dataset: Dataset, classes: Classes, paths: Sequence[str], samples_per_shard: int
) -> dict[str, Any]:
    """All files but the manifest, whose content is returned."""
    keys = [safe_key(key) for key in dataset.keys]
    if len(set(keys)) != len(keys):
        raise DataError(f"two pictures of {some(paths)} have the same key in a shard set; rename one of them")
    order = sorted(range(len(keys)), key=lambda row: hashlib.sha256(keys[row].encode()).digest())  # classes are mixed
    writer = _Writer(dataset, classes, keys)
    entries = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(order), samples_per_shard):
            rows = sorted(order[start : start + samples_per_shard], key=lambda row: keys[row])
            read = zip(rows, pool.map(writer.picture, rows), strict=True)
            samples = [sample for row, picture in read if (sample := writer.sample(row, picture)) is not None]
            entries.append(write_shard(folder / "shards", f"{len(entries):05d}", samples))
            writer.check()
    counts = Counter(writer.written)
    if lost := [classes.name(label) for label in range(len(classes)) if not counts[label]]:
        raise DataError(f"no picture of {some(lost)} can be read: {some(writer.named)}")
    vocabulary = write_vocabulary(folder / "vocabulary.parquet", _vocabulary(classes, counts))
    return {
        "kind": CLASSES,
        "samples": sum(entry["samples"] for entry in entries),
        "classes": len(classes),
        "shards": entries,
        "vocabulary_sha256": vocabulary,
        "class_set": {"source": classes.source, "sha256": classes.sha256},
        "data": {"paths": list(paths), "sha256": dataset.sha256, "published": dataset.published},
        "counts": {
            "kept": sum(counts.values()),
            "broken": dict(sorted(writer.broken.items())),
            "written_as_png": writer.changed,
            "dropped": dict(sorted((Counter(dataset.left_out) + writer.broken).items())),
        },
        "parents": [],
    }


@dataclass(frozen=True)
class _Picture:
    """What a shard holds of one, or why it holds none."""

    data: bytes = b""
    extension: str = ""
    sha256: bytes = b""  # of the bytes it came as
    problem: str = ""
    changed: bool = False


class _Writer:
    """Makes samples, and counts what became of the pictures."""

    def __init__(self, dataset: Dataset, classes: Classes, keys: Sequence[str]) -> None:
        self.dataset, self.keys = dataset, keys
        self.names = [_spellings(classes, label) for label in range(len(classes))]
        self.written: list[int] = []
        self.broken: Counter[str] = Counter()
        self.named: list[str] = []
        self.changed = 0

    def picture(self, row: int) -> _Picture:
        """Safe in threads."""
        return _picture(self.dataset.read(row))

    def sample(self, row: int, picture: _Picture) -> Sample | None:
        """None, and counted, for a picture that cannot be read."""
        if picture.problem:
            self.broken[picture.problem] += 1
            self.named.append(f"{self.dataset.keys[row]} ({picture.problem})")
            return None
        label = int(self.dataset.labels[row])
        self.written.append(label)
        self.changed += picture.changed
        key, synset = self.keys[row], self.names[label][0]
        record = {"key": key, "caption": "", "language": None, "hashtags": [], "synsets": [synset], "labels": [label]}
        record |= {"repeat": 1.0, "source": self.dataset.keys[row], "licence": None}
        return Sample(key, picture.data, picture.extension, record, [label], 1.0, picture.sha256)

    def check(self) -> None:
        """Refuse to go on when too many pictures are broken."""
        if len(self.named) > max(1, MAX_BROKEN * len(self.dataset)):
            raise DataError(
                f"{len(self.named):,} pictures cannot be read, more than {100 * MAX_BROKEN:g} % of "
                f"{len(self.dataset):,}: {some(self.named)}; copy the data again"
            )


def _picture(data: bytes) -> _Picture:
    """A picture that was decoded once to see that it can be; JPEG, PNG and WebP stay as they are."""
    try:
        kind, image = check(data, ANY)
    except BadImage as error:
        return _Picture(problem=error.reason)
    digest = hashlib.sha256(data).digest()
    if kind in KEPT_AS_IS:
        return _Picture(data, KEPT_AS_IS[kind], digest)
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return _Picture(buffer.getvalue(), "png", digest, changed=True)


def _vocabulary(classes: Classes, counts: Counter[int]) -> Iterator[VocabularyEntry]:
    for label in range(len(classes)):
        synset, wnid = _spellings(classes, label)
        yield VocabularyEntry(label, synset, wnid, list(classes.names[label]), "", counts[label])


def _spellings(classes: Classes, label: int) -> tuple[str, str]:
    """Synset and wnid of a class; its name and nothing where they are not known."""
    synset = classes.synsets[label]
    known = [synset, *(classes.folders[label] if classes.folders else ()), *classes.names[label]]
    wnid = next((text for text in known if text and _WNID.fullmatch(text)), "")
    return synset or wnid or classes.name(label), wnid
