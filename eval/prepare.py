"""`python -m eval prepare`: published sets, and whether a folder holds one of them whole.

python -m eval prepare                                            a line a set
python -m eval prepare inat2018                                   where it is published, its archives, how it lies
python -m eval prepare inat2018 --source /data/inat2018           counts pictures and classes, checks hashes
python -m eval prepare imagenet1k --source /data/imagenet --split val

Nothing is downloaded, unpacked or changed. Exit code: 0 if all that was asked for is whole, 1 if not.
"""

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_pipeline.errors import DataError, UsageError
from eval.listing import aligned
from eval.published import registry
from eval.published.description import Archive, Published
from eval.published.tree import hash_file
from eval.sources.source import some

MakeParser = Callable[..., argparse.ArgumentParser]  # one whose errors are UsageErrors


def parser(make_parser: MakeParser) -> argparse.ArgumentParser:
    p = make_parser("python -m eval prepare", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.allow_abbrev = False
    p.add_argument("name", nargs="?", metavar="NAME", help="a published set; none: list them all")
    p.add_argument("--source", type=Path, metavar="DIR", help="the folder that its files lie in")
    p.add_argument("--split", action="append", default=[], metavar="S", help="check this split alone; may be repeated")
    return p


def main(argv: Sequence[str], make_parser: MakeParser) -> int:
    """The command `prepare`."""
    args = parser(make_parser).parse_args(list(argv))
    if args.name is None:
        if args.source or args.split:
            raise UsageError(f"--source and --split belong to one set: {', '.join(registry.names())}")
        _say(every_set())
        return 0
    published = registry.find(args.name)
    _say(one_set(published))
    if args.source is None:
        return 0
    if published.any_split is not None and not args.split:
        raise UsageError(
            f"{published.name} is a form, not a set: name the annotations with --split annotations/FILE.json"
        )
    whole = True
    for split in args.split or published.splits:
        lines, fits = checked(published, published.split(split).name, args.source)
        _say(lines)
        whole = whole and fits
    _say(["", f"{args.source} holds {published.name} whole" if whole else f"{published.name} is not whole"])
    return 0 if whole else 1


def _say(lines: Sequence[str] | Iterator[str]) -> None:
    print("\n".join(lines))  # noqa: T201  the result of the command


def every_set() -> Iterator[str]:
    """A table of what is described."""
    rows = [("name", "classes", "splits", "of")]
    for name in registry.names():
        one = registry.find(name)
        splits = [f"{split.name} {split.images:,}" if split.images else split.name for split in one.splits.values()]
        rows.append((name, f"{one.num_classes:,}" if one.num_classes else "-", ", ".join(splits) or "-", one.title))
    yield from aligned(rows)
    yield ""
    yield "NAME=FOLDER or NAME:SPLIT=FOLDER stands where --data and --train take a path"


def one_set(published: Published) -> Iterator[str]:
    """All that is known of a set."""
    yield f"{published.name}: {published.title}" + (
        f", {published.num_classes:,} classes" if published.num_classes else ""
    )
    yield f"published at {published.source}"
    yield f"licence: {published.licence}"
    if published.paper:
        yield f"paper: {published.paper}"
    for split in published.splits.values():
        used = [
            use for use, name in (("evaluates", published.evaluate), ("trains", published.train)) if name == split.name
        ]
        least = f"at least {split.at_least:,} pictures" if split.at_least else "number of pictures not known here"
        count = f"{split.images:,} pictures" if split.images else least
        yield f"split {split.name}: {count}" + (f"; the field {' and '.join(used)} on it" if used else "")
    for archive in published.archives:
        yield f"archive {archive.name}" + (f" ({', '.join(_published_hashes(archive))})" if archive.hashes else "")
    yield from (f"lies as: {line}" for line in published.lay_out[:1])
    yield from (f"         {line}" for line in published.lay_out[1:])
    if published.note:
        yield f"note: {published.note}"
    for one in published.sources:
        yield f"source: {one['fact']}: {one['from']}" + (f" ({one['licence']})" if "licence" in one else "")


def _published_hashes(archive: Archive) -> list[str]:
    hashes = archive.hashes
    size = [f"{hashes.bytes:,} bytes"] if hashes.bytes else []
    texts = [f"{kind} {value}" for kind, value in (("md5", hashes.md5), ("sha256", hashes.sha256)) if value]
    return [*size, *texts] or ["no hash is published"]


def checked(published: Published, split: str, source: Path) -> tuple[list[str], bool]:
    """What lies there of one split, and whether it is whole."""
    try:
        found = registry.verify(published, split, source)
    except DataError as error:
        return ["", f"{split}: not there: {error}", *_packed(published, split, source)], False
    if found.whole:
        hashes = f"; hashes fit: {some(found.checked)}" if found.checked else ""
        return ["", f"{split}: whole: {found.images:,} pictures of {found.classes:,} classes{hashes}"], True
    return [
        "",
        f"{split}: not whole",
        *(f"  {one}" for one in found.problems),
        *_packed(published, split, source),
    ], False


def _packed(published: Published, split: str, source: Path) -> Iterator[str]:
    """What to do about the archives of a split: unpack those that lie there, get the others."""
    lying = dict(registry.lying(published, source))
    for archive in published.archives:
        if archive.splits and split not in archive.splits:
            continue
        if archive not in lying:
            yield f"  {archive.name} is not there; it is published at {published.source}"
        elif archive.unpack:
            wrong = _wrong(archive, lying[archive])
            yield f"  {archive.name} lies there packed: " + (
                wrong or f"cd {shlex.quote(str(source))} && {archive.unpack.format(archive.name)}"
            )


def _wrong(archive: Archive, path: Path) -> str:
    """Why an archive is not the published one; nothing if it is, or if no hash is published."""
    own = hash_file(path) if archive.hashes.md5 or archive.hashes.sha256 else None
    for kind in ("bytes", "md5", "sha256"):
        wanted = getattr(archive.hashes, kind)
        if own is not None and wanted is not None and getattr(own, kind) != wanted:
            return f"its {kind} is {getattr(own, kind)}, published is {wanted}; copy or download it again"
    return ""
