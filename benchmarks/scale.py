"""How a build grows: time per record and peak memory for 10,000, 100,000, … captions with tiny pictures.

    python benchmarks/scale.py 10000 100000 --folder /tmp/scale --workers 2

Every picture is another file (so that no copy is removed), most captions share a few thousand nouns as a real corpus
does (Zipf), and every tenth has a hashtag of its own. Memory is the system's own high-water mark (VmHWM) of the
directing process and of the largest worker; the step's time is that from its first finished task to the next step's.
"""

import argparse
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.wordnet import open_wordnet

ROOT: Final = Path(__file__).parents[1]
FILE_ROWS: Final = 100_000
GROUP_ROWS: Final = 1000
NOUNS: Final = 5000
SIDE: Final = 8  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=int, nargs="+")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/scale"))
    parser.add_argument("--workers", default="2")
    parser.add_argument("--near", default="off", help="--near-duplicates of the build")
    parser.add_argument(
        "--only-tables",
        action="store_true",
        help="16 pictures again and again, each prepared once, no duplicates removed, one process: what is left is all "
        "that could grow",
    )
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one build")
    options = parser.parse_args()
    for records in options.records:
        corpus = options.folder / f"corpus{records}{'t' if options.only_tables else ''}"
        if not corpus.exists():
            write_corpus(corpus, records, 16 if options.only_tables else records)
        output = options.folder / f"shards{records}"
        shutil.rmtree(output, ignore_errors=True)
        found = measure(corpus, output, command(options), options.timeout)
        sys.stdout.write(json.dumps({"records": records, **found}) + "\n")
        sys.stdout.flush()
        shutil.rmtree(output, ignore_errors=True)


def command(options: argparse.Namespace) -> list[str]:
    if options.only_tables:
        return [sys.executable, "-c", PREPARED_ONCE, "build", "--workers", "0", "--keep-duplicates"]
    program = [sys.executable, "-m", "data_pipeline", "build"]
    return [*program, "--workers", options.workers, "--near-duplicates", options.near]


PREPARED_ONCE: Final = """
import functools, sys
from data_pipeline import images
images.prepare = functools.lru_cache(64)(images.prepare)
from data_pipeline.__main__ import main
from data_pipeline.ending import leave
leave(main(sys.argv[1:]))
"""


def write_corpus(folder: Path, records: int, pictures: int) -> None:
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    nouns = random.Random(0).sample([tag for tag in _nouns() if tag.isalpha()], NOUNS)
    weights = list(accumulate(1 / (rank + 1) for rank in range(NOUNS)))
    for start in range(0, records, FILE_ROWS):
        numbers = range(start, min(start + FILE_ROWS, records))
        draw = random.Random(start)
        captions = [
            " ".join(f"#{noun}" for noun in draw.choices(nouns, cum_weights=weights, k=draw.randint(1, 4)))
            + (f" #own{number}" if number % 10 == 0 else "")
            for number in numbers
        ]
        table = pa.table(
            {"key": [f"{n:09d}" for n in numbers], "image": [png(n % pictures) for n in numbers], "caption": captions}
        )
        pq.write_table(table, temporary / f"{start // FILE_ROWS:04d}.parquet", row_group_size=GROUP_ROWS)
    temporary.rename(folder)


def _nouns() -> list[str]:
    return open_wordnet().lemmas["squashed"].to_pylist()


def png(number: int) -> bytes:
    """A picture of noise that no other number gives."""
    noise = random.Random(number).randbytes(SIDE * SIDE * 3)
    lines = b"".join(b"\0" + noise[row * SIDE * 3 : (row + 1) * SIDE * 3] for row in range(SIDE))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def measure(corpus: Path, output: Path, command: list[str], timeout: float) -> dict[str, Any]:
    command = [*command, "--input", str(corpus), "--output", str(output)]
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peaks: dict[int, int] = {}
    steps: dict[str, float] = {}
    before = os.times()
    try:
        while process.poll() is None and time.monotonic() - start < timeout:
            for pid in (process.pid, *children(process.pid)):
                peaks[pid] = max(peaks.get(pid, 0), peak(pid))
            for step in begun(output):
                steps.setdefault(step, time.monotonic())
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            process.kill()
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"the build failed ({process.returncode}): {errors[-2000:]}")
    seconds = time.monotonic() - start
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    records = json.loads((output / "manifest.json").read_bytes())["counts"]["read"]
    parent = peaks.pop(process.pid)
    return {
        "seconds": round(seconds, 1),
        "us_per_record": round(1e6 * seconds / records),
        "cpu_us_per_record": round(1e6 * used / records),
        "parent_mib": parent >> 10,
        "worker_mib": max(peaks.values(), default=0) >> 10,
        "output_mib": size >> 20,
        "us_per_record_by_step": {name: round(1e6 * (b - a) / records) for name, (a, b) in spans(steps)},
    }


def spans(steps: dict[str, float]) -> Iterator[tuple[str, tuple[float, float]]]:
    """A step lasts from the end of its first task to that of the next step."""
    begins = sorted((first, name) for name, first in steps.items())
    for (first, name), (end, _) in zip(begins, [*begins[1:], (time.monotonic(), "")], strict=True):
        yield name, (first, end)


def begun(output: Path) -> list[str]:
    """Steps with a task that is done."""
    try:
        return [path.name for path in (output / ".work" / "done").iterdir()]
    except OSError:
        return []


def children(parent: int) -> list[int]:
    try:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def peak(process: int) -> int:
    """KiB."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    main()
