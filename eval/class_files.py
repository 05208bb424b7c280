"""Files that list classes: JSON, CSV or plain lines; the bundled ones in eval/prompts/ are named without their ending.

JSON   [{"label": 0, "names": ["dog", "hound"], "synset": "dog.n.01"}, …], or {"classes": […], "templates": […]}
       a class has `name` or `names`, and may have `synset`, `wnid` and `folder` (one or several)
CSV    columns label, name or names, synset, wnid, folder; without label the rows count from 0; several names by ";"
lines  a class a line from label 0, several names by ";"; empty lines and lines that start with "# " are left out
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from data_pipeline.errors import DataError, UsageError
from maws.config import nearest

PROMPTS: Final = Path(__file__).parent / "prompts"
EXAMPLE: Final = "expected a list of {label, name, synset}"


@dataclass(frozen=True)
class Entry:
    """One class as a file has it."""

    names: tuple[str, ...]
    synset: str | None = None
    wnid: str | None = None
    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClassFile:
    """A whole file, classes in the order of their labels."""

    path: Path
    sha256: str
    entries: tuple[Entry, ...]
    templates: tuple[str, ...] = ()
    language: str = "en"
    about: dict[str, Any] | None = None  # what else a JSON file says of itself: title, source, order, …


# ------------------------------------------------------------------------------------------------------------- bundled


@cache
def bundled() -> dict[str, Path]:
    """Class sets by name, such as imagenet1k and imagenet1k.it."""
    return {file.stem: file for file in sorted(PROMPTS.glob("*.json"))}


def find(name: str | Path) -> Path:
    """A bundled set, whatever its separators and capitals (Food-101 is food101), else a path. Raises UsageError."""
    sets = {_folded(stem): file for stem, file in bundled().items()}
    if _folded(str(name)) in sets:
        return sets[_folded(str(name))]
    path = Path(name)
    if not path.is_file() and str(name) == path.name and not path.suffix:  # meant as a name
        known = [stem for stem in bundled() if "." not in stem]
        raise UsageError(f"--classes {name}: neither a bundled class set nor a file; {nearest(str(name), known)}")
    return path


def language_file(path: Path, language: str) -> Path | None:
    """The same classes in another language: imagenet1k.it.json beside imagenet1k.json."""
    beside = path.parent / f"{path.stem}.{language}{path.suffix}"
    return beside if beside.is_file() else None


def languages(path: Path) -> list[str]:
    """Those there is such a file for."""
    return sorted(file.stem.rpartition(".")[2] for file in path.parent.glob(f"{path.stem}.*{path.suffix}"))


def _folded(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).casefold()


# ---------------------------------------------------------------------------------------------------------------- read


def read_class_file(path: Path) -> ClassFile:
    """Checked: labels are 0..n-1, each once, and each class has a name. Raises DataError."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")  # spreadsheets begin a CSV with a byte order mark
    except OSError as error:
        raise DataError(f"cannot read classes from {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"cannot read classes from {path}: it is not UTF-8 text") from None
    about: dict[str, Any] = {}
    if path.suffix == ".json":
        about, rows = _parse_json(text, path)
    elif path.suffix in (".csv", ".tsv"):
        rows = _parse_csv(text, path, "\t" if path.suffix == ".tsv" else ",")
    else:
        rows = [{"label": label, "names": _split(line)} for label, line in enumerate(lines(text))]
    if not rows:
        raise DataError(f"{path} must be a list of {{label, name, synset}}, and not empty")
    entries = [_entry(row, f"entry {position} of {path}") for position, row in enumerate(rows)]
    labels: list[Any] = [row.get("label") for row in rows]
    if any(type(label) is not int for label in labels) or sorted(labels) != list(range(len(labels))):
        raise DataError(f"{path}: the labels of its {len(labels)} classes must be 0..{len(labels) - 1}, each once")
    ordered = tuple(entries[position] for position in sorted(range(len(labels)), key=lambda at: labels[at]))
    templates, language = about.pop("templates", []), about.pop("language", "en")
    if not isinstance(language, str) or not _is_texts(templates):
        raise DataError(f"{path}: 'templates' must be a list of text and 'language' a text")
    return ClassFile(path, hashlib.sha256(data).hexdigest(), ordered, tuple(templates), language, about)


def lines(text: str) -> list[str]:
    """What stands in a text file, without empty lines and comments."""
    return [line for line in text.splitlines() if line.strip() and not line.startswith("# ")]


def _parse_json(text: str, path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); {EXAMPLE}") from None
    about = dict(content) if isinstance(content, dict) else {"classes": content}
    rows = about.pop("classes", None)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} must be a list of {{label, name, synset}}, and not empty")
    return about, rows


def _parse_csv(text: str, path: Path, separator: str) -> list[dict[str, Any]]:
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        read = [{key: value for key, value in row.items() if key and value} for row in table]
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file: {error}") from None
    columns = list(table.fieldnames or ())
    if not {"name", "names"} & set(columns):
        raise DataError(f"{path} has no column 'name' or 'names', only {', '.join(columns)}")
    rows: list[dict[str, Any]] = []
    for position, row in enumerate(read):
        found: dict[str, Any] = {**row, "names": _split(row.get("names") or row.get("name") or "")}
        found["folder"] = _split(row.get("folder", ""))
        label = row.get("label", "")
        found["label"] = int(label) if label.strip().isdecimal() else None if "label" in columns else position
        rows.append(found)
    return rows


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def _entry(row: dict[str, Any], where: str) -> Entry:
    names, folders = (_as_list(row.get(key)) for key in ("names", "folder"))
    names = names or _as_list(row.get("name"))
    if not _is_texts(names) or not names:
        raise DataError(f"{where} needs a 'name' (text) or 'names' (a list of text)")
    synset, wnid = row.get("synset"), row.get("wnid")
    if not _is_texts(folders) or not all(value is None or isinstance(value, str) for value in (synset, wnid)):
        raise DataError(f"{where}: 'synset', 'wnid' and 'folder' must be text")
    return Entry(tuple(names), synset or None, wnid or None, tuple(folders))


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


def _is_texts(values: Any) -> bool:
    if not isinstance(values, Sequence):
        return False
    return all(isinstance(text, str) and text.strip() and is_utf8(text) for text in values)


def is_utf8(text: str) -> bool:
    """False for half a surrogate pair, which JSON can hold, and names of files that are not UTF-8."""
    return re.search("[\ud800-\udfff]", text) is None
