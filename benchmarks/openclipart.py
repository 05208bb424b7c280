"""Open Clip Art through the whole pipeline: 6,900 drawings with the keywords that people gave them, as dirty as life.

    apt-get install openclipart-png openclipart-svg                  # Debian's packages, public domain
    python benchmarks/openclipart.py --folder /tmp/openclipart       # then options of `python -m data_pipeline build`

The titles and keywords are RDF inside of the SVG files (dc:title, and rdf:li of dc:subject). They are written to one
JSON line per PNG, and the pipeline reads that table. Prints what was dropped for what, the time and the peak memory.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from xml.parsers import expat

ROOT: Final = Path(__file__).parents[1]
INSTALLED: Final = Path("/usr/share/openclipart")
MAX_SVG: Final = 64 << 20  # bytes; the largest of the package has 18 million
MAX_TEXT: Final = 10_000  # characters of one title or keyword
DC: Final = "http://purl.org/dc/elements/1.1/ "
RDF: Final = "http://www.w3.org/1999/02/22-rdf-syntax-ns# "
METADATA: Final = "http://www.w3.org/2000/svg metadata"


@dataclass
class Work:
    """What the RDF of one drawing says."""

    title: str | None = None
    creator: str | None = None
    language: str | None = None
    licence: str | None = None
    keywords: list[str] = field(default_factory=list)


class RefusedError(ValueError):
    """An SVG whose text is not read: broken, too large, or with entities of its own."""


class _Done(Exception):
    pass


def read_work(data: bytes) -> Work:
    """From the metadata element of an SVG; nothing after it is parsed, no entity is ever expanded or fetched."""
    if len(data) > MAX_SVG:
        raise RefusedError("too large")
    work, path, text = Work(), [], []

    def start(name: str, attributes: dict[str, str]) -> None:
        path.append(name)
        text.clear()
        if name.endswith(" license"):
            licence = attributes.get(f"{RDF}resource", "").rsplit("/", 1)[-1]
            work.licence = work.licence or licence or None

    def characters(part: str) -> None:
        if sum(map(len, text)) < MAX_TEXT:
            text.append(part)

    def end(name: str) -> None:
        found = "".join(text).strip()[:MAX_TEXT] or None
        above = path[:-1]
        if name == f"{RDF}li" and f"{DC}subject" in above and found:
            work.keywords.append(found)
        elif name == f"{DC}title" and f"{DC}creator" in above:
            work.creator = work.creator or found
        elif name == f"{DC}title" and not any(one.startswith(DC) for one in above):
            work.title = work.title or found
        elif name == f"{DC}language":
            work.language = work.language or found
        path.pop()
        text.clear()
        if name == METADATA:
            raise _Done

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = characters
    parser.EntityDeclHandler = _refuse
    try:
        parser.Parse(data, True)
    except _Done:
        pass
    except expat.ExpatError as error:
        raise RefusedError(f"not XML: {error}") from None
    return work


def _refuse(name: str, *_: Any) -> None:
    raise RefusedError(f"declares the entity {name[:100]!r}")


def rows(installed: Path, refused: Counter[str]) -> Iterator[dict[str, Any]]:
    """One for each PNG; links are the same drawing under another name and are left out."""
    for image in sorted((installed / "png").rglob("*.png")):
        if image.is_symlink() or not image.is_file():
            continue
        name = image.relative_to(installed / "png").with_suffix("")
        row: dict[str, Any] = {"path": str(image), "key": name.as_posix(), "source": "openclipart"}
        try:
            work = read_work((installed / "svg" / f"{name}.svg").read_bytes())
            row |= {"caption": work.title, "hashtags": work.keywords, "licence": work.licence}
            row |= {"language": work.language if work.language and len(work.language) < 20 else None}
        except RefusedError as error:
            refused[str(error).split(":")[0].split(" '")[0]] += 1
        except FileNotFoundError:
            refused["no svg of that name"] += 1
        yield row


def write_table(installed: Path, path: Path) -> dict[str, Any]:
    refused: Counter[str] = Counter()
    count = with_keywords = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows(installed, refused):
            count += 1
            with_keywords += bool(row.get("hashtags"))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {"pictures": count, "with_keywords": with_keywords, "refused_svg": dict(refused)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--installed", type=Path, default=INSTALLED)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/openclipart"))
    options, given = parser.parse_known_args()
    if not (options.installed / "png").is_dir():
        sys.exit(f"error: no {options.installed}/png: apt-get install openclipart-png openclipart-svg")
    begin = time.monotonic()
    found = write_table(options.installed, options.folder / "openclipart.jsonl")
    found["table_s"] = round(time.monotonic() - begin, 1)
    output = options.folder / "shards"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "data_pipeline", "build", "--input", options.folder / "openclipart.jsonl",
               "--output", output, *given]  # fmt: skip
    begin = time.monotonic()
    done = subprocess.run(list(map(str, command)), cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    manifest = json.loads((output / "manifest.json").read_bytes())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found |= {
        "build_s": round(time.monotonic() - begin, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "largest_process_mib": used.ru_maxrss >> 10,
        "samples": manifest["samples"],
        "classes": manifest["classes"],
        "shards_mib": sum(shard["bytes"] for shard in manifest["shards"]) >> 20,
        "counts": manifest["counts"],
    }
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
