"""`python -m eval classes`: the bundled class sets, or one set in full.

python -m eval classes                          a line a set
python -m eval classes imagenet1k               source, licence, order, templates, classes
python -m eval classes cifar100 --language fr   its names in French
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from eval import class_files
from eval.class_files import ClassFile
from eval.classes import Classes, read_classes
from eval.templates import bundled

Parser = Callable[..., argparse.ArgumentParser]  # one whose errors are UsageErrors


def main(arguments: Sequence[str], make_parser: Parser) -> int:
    """The command `classes`."""
    print(page(arguments, make_parser))  # noqa: T201  the result of the command
    return 0


def page(arguments: Sequence[str], make_parser: Parser) -> str:
    """What the command prints."""
    parser = make_parser("python -m eval classes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", nargs="?", metavar="NAME|FILE", help="a bundled set or a file of classes")
    parser.add_argument("--language", metavar="LANGUAGE", help="its names in another language, such as fr")
    args = parser.parse_args(list(arguments))
    if args.name is None:
        return "\n".join(every_set())
    file = class_files.read_class_file(class_files.find(args.name))
    return "\n".join(one_set(file, read_classes(args.name, args.language)))


def every_set() -> Iterator[str]:
    """A table of what is bundled."""
    rows = [("name", "classes", "templates", "languages", "of")]
    for name, path in class_files.bundled().items():
        if "." in name:
            continue  # a translation
        file = class_files.read_class_file(path)
        spoken = " ".join([file.language, *class_files.languages(path)])
        rows.append((name, str(len(file.entries)), str(len(file.templates)), spoken, _said(file, "task")))
    yield from aligned(rows)
    yield ""
    yield f"templates alone: {', '.join(bundled())}"


def one_set(file: ClassFile, classes: Classes) -> Iterator[str]:
    """All that is known of a set."""
    yield f"{_said(file, 'title') or classes.source}: {len(classes)} classes, language {classes.language}"
    yield f"file: {file.path}, sha256 {file.sha256}"
    for key in ("order", "note"):
        if said := _said(file, key):
            yield f"{key}: {said}"
    for source in (file.about or {}).get("sources", []) if file.path.parent == class_files.PROMPTS else ():
        yield f"source: {source['file']} ({source['version'][:12]}), {source['licence']}"
    yield f"templates: {len(classes.templates) or 'none of its own'}"
    yield from (f"  {template}" for template in classes.templates)
    yield "classes:"
    folders = classes.folders or ((),) * len(classes)
    yield from aligned(
        (str(label), "; ".join(classes.names[label]), classes.synsets[label] or "", "; ".join(folders[label]))
        for label in range(len(classes))
    )


def _said(file: ClassFile, key: str) -> str:
    value: Any = (file.about or {}).get(key, "")
    return str(value)


def aligned(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    table = list(rows)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
