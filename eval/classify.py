"""Name what pictures show: a ranked table for each.

    python -m eval classify photo.jpg album/ --run runs/demo/lit --classes "dog, cat, grand piano"
    python -m eval classify photo.jpg --run RELEASE --classes imagenet1k --top 3
    python -m eval classify photo.jpg --run runs/demo/mae_wsp                   the synsets of its head
    find . -name '*.jpg' | python -m eval classify - --run RUN --classes names.txt --json

Any run or release with a text tower (LiT), a head over synsets (WSP) or a classifier's head will do. Folders are looked
through; `-` reads names from stdin, one a line. A picture that cannot be read is named on stderr, and the others go on;
the exit code is 1 then.
"""

import argparse
import json
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from data_pipeline.errors import DataError, UsageError

if TYPE_CHECKING:  # torch takes seconds to import: a wrong flag is told at once
    from eval.answers import Answer, Answers
    from eval.classes import Classes
    from eval.datasets import Dataset
    from eval.features import Encoder

log = logging.getLogger("eval")

Parser = Callable[..., argparse.ArgumentParser]  # one whose errors are UsageErrors

AT_ONCE: Final = 1024  # pictures whose features are held before they are ranked and shown; ours
WIDTH: Final = 200  # columns where the output is no terminal: nothing is wrapped that a program reads


def parser(make_parser: Parser) -> argparse.ArgumentParser:
    p = make_parser("python -m eval classify", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.allow_abbrev = False
    p.add_argument("images", nargs="+", metavar="IMAGE", help="pictures, folders of them, or - for names on stdin")
    p.add_argument("--run", type=Path, required=True, help="run folder or release folder")
    p.add_argument("--classes", metavar="CLASSES", help='"dog, cat, …", a bundled set (imagenet1k) or a file')
    p.add_argument("--templates", metavar="FILE", help="sentences around a name: a file or a bundled set")
    p.add_argument("--language", metavar="CODE", help="of the names and templates, such as fr")
    p.add_argument("--top", type=int, default=5, metavar="K", help="classes shown per picture (5)")
    p.add_argument("--json", action="store_true", help="one JSON object a picture instead of tables")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    return p


def main(arguments: Sequence[str], make_parser: Parser) -> int:
    args = parser(make_parser).parse_args(list(arguments))
    if args.top < 1:
        raise UsageError(f"--top {args.top}: show at least one class")
    files = find_pictures(args.images)
    classes = read_names(args.classes, args.language) if args.classes is not None else None
    from eval.answers import find_answers
    from eval.features import open_encoder, pick_device

    encode = open_encoder(args.run, pick_device(args.device))
    assert encode.release is not None
    answers = find_answers(encode, classes, args.templates)
    log.info("model: %s, weights sha256 %s", " -> ".join(encode.release.lineage), encode.sha256[:12])
    log.info("probability: %s", answers.about)
    show = show_json if args.json else show_table
    broken = 0
    for name, found in classified(encode, answers, files, args.top):
        broken += isinstance(found, str)
        show(readable(name), found)
    return 1 if broken else 0


# -------------------------------------------------------------------------------------------------------------- asked


def find_pictures(asked: Iterable[str]) -> list[Path]:
    """The files of all that was named, in that order. What is no folder is taken as it is, and tried."""
    from eval.sources.folders import is_picture

    files: list[Path] = []
    for name in asked:
        if name == "-":
            files += [Path(line) for line in (line.rstrip("\r\n") for line in sys.stdin) if line.strip()]
        elif Path(name).is_dir():
            inside = sorted(file for file in Path(name).rglob("*") if is_picture(file))
            if not inside:
                raise DataError(f"the folder {name} holds no pictures")
            files += inside
        else:
            files.append(Path(name))
    if not files:
        raise UsageError("no pictures were named on stdin")
    return files


def read_names(text: str, language: str | None = None) -> "Classes":
    """A bundled set, a file, or the names themselves with commas between them."""
    from eval.classes import plain_classes, read_classes
    from eval.languages import ENGLISH, canonical

    if not re.search("[,，、;]", text) or os.path.isfile(text):
        return read_classes(text, language)
    names = [name.strip() for name in re.split("[,，、;]", text) if name.strip()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--classes names '{twice[0]}' twice; each class once")
    if len(names) < 2:
        raise UsageError(f"--classes {text}: to choose between classes takes two or more")
    return replace(plain_classes(names, "--classes"), language=canonical(language) if language else ENGLISH)


# ---------------------------------------------------------------------------------------------------------- classified


def classified(
    encode: "Encoder", answers: "Answers", files: Sequence[Path], top: int
) -> "Iterator[tuple[str, list[Answer] | str]]":
    """Each file in its place with its best classes, or with why it cannot be read."""
    import torch

    from eval.features import decoded

    dataset = as_dataset(files)
    for start in range(0, len(files), AT_ONCE):
        rows = range(start, min(start + AT_ONCE, len(files)))
        reasons: dict[str, str] = {}
        good: list[int] = []
        pieces: list[torch.Tensor] = []
        for batch in decoded(dataset, rows, encode.preprocess):
            reasons |= {bad.key: bad.reason for bad in batch.broken}
            good += batch.rows
            pieces += [encode(batch.images, answers.kind)] if batch.rows else []
        ranked = dict(zip(good, answers(torch.cat(pieces), top), strict=True)) if pieces else {}
        for row in rows:
            yield dataset.keys[row], ranked[row] if row in ranked else reasons[dataset.keys[row]]


def as_dataset(files: Sequence[Path]) -> "Dataset":
    """Files as the features are made from; one that is not there counts as one that cannot be decoded."""
    import numpy as np

    from data_pipeline.images import MAX_BYTES, BadImage
    from eval.datasets import Dataset

    def read(position: int) -> bytes:
        try:
            if files[position].stat().st_size > MAX_BYTES:
                raise BadImage("too_many_bytes")
            return files[position].read_bytes()
        except OSError as error:
            raise BadImage((error.strerror or "unreadable file").lower()) from None

    return Dataset("given", tuple(map(str, files)), np.full(len(files), -1), read, "", {})


# ---------------------------------------------------------------------------------------------------------------- shown


def show_json(name: str, found: "list[Answer] | str") -> None:
    """{"image": …, "classes": [{"name", "synset", "probability", "cosine"}, …]}, or {"image": …, "error": …}"""
    if isinstance(found, str):
        log.error("%s cannot be read: %s", name, found)
        line = {"image": name, "error": found}
    else:
        line = {"image": name, "classes": [answer._asdict() for answer in found]}
    sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")


def show_table(name: str, found: "list[Answer] | str") -> None:
    """Rank, name, probability in percent; cosine and synset where there are any. Names may be of any script."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if isinstance(found, str):
        log.error("%s cannot be read: %s", name, found)
        return
    plain = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else WIDTH)
    rows = [(f"  {rank}", readable(a.name), f"{100 * a.probability:.1f} %") for rank, a in enumerate(found, 1)]
    cosines = [f"{answer.cosine:.3f}" for answer in found if answer.cosine is not None]
    synsets = [answer.synset or "" for answer in found] if any(answer.synset for answer in found) else []
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    if cosines:
        table.add_column(justify="right")
    for rank, row in enumerate(rows):
        cells = (*row, *cosines[rank : rank + 1], *synsets[rank : rank + 1])
        table.add_row(*map(Text, cells), style="bold" if rank == 0 else None)
    plain.print(Text(name))
    plain.print(table)


def readable(text: str) -> str:
    """Without what would move the cursor of a terminal, and without bytes that are no text (in names of files)."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join("\ufffd" if unicodedata.category(letter) == "Cc" else letter for letter in text)
