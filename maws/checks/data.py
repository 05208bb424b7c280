"""What a training reads: the shard set, the tokenizer, and the run it would continue."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.images import BadImage, decode
from data_pipeline.shardset import ShardSet, verify_shard, verify_tables
from maws.checks import OK, PROBLEM, WARNING, Finding

SAMPLE_SHARDS, SAMPLE_IMAGES, SAMPLE_BYTES, SECONDS = 3, 16, 512 * 2**20, 4.0


def shards(folder: Path, full: bool = False) -> Iterator[Finding]:
    """It opens; hashes of a few shards (all with `full`) are those of the manifest; some pictures can be decoded."""
    try:
        found = ShardSet.open(folder)
    except DataError as e:
        yield Finding("shards", PROBLEM, str(e), "build it with `python -m data_pipeline build`")
        return
    yield Finding(
        "shards", OK, f"{len(found):,} samples in {found.num_shards:,} shards, {len(found.vocabulary):,} synsets"
    )
    yield _hashes(found, full)
    yield _pictures(found)


def _hashes(found: ShardSet, full: bool) -> Finding:
    entries, started, checked, read = list(found.manifest["shards"]), time.monotonic(), 0, 0
    if not full:
        random.shuffle(entries)
    problems = list(verify_tables(found.path, found.manifest))
    missing = [e["name"] for e in entries if not (found.path / "shards" / f"{e['name']}.tar").is_file()]
    problems += [f"{name}.tar is missing" for name in missing[:3]]
    for entry in entries:
        enough = (
            checked >= SAMPLE_SHARDS or read + entry["bytes"] > SAMPLE_BYTES or time.monotonic() - started > SECONDS
        )
        if not full and checked and enough:
            break
        problems += verify_shard(found.path / "shards", entry)
        checked, read = checked + 1, read + entry["bytes"]
    if problems:
        more = f" and {len(problems) - 2} more" if len(problems) > 2 else ""
        return Finding(
            "shard files", PROBLEM, f"{'; '.join(problems[:2])}{more}", "copy these files again, or build the set again"
        )
    left = "" if checked == len(entries) else " (--full looks at all)"
    return Finding("shard files", OK, f"{checked} of {len(entries)} shards are as the manifest says{left}")


def _pictures(found: ShardSet) -> Finding:
    bad, tried = list[str](), 0
    rows = [(s, r) for s in range(found.num_shards) for r in (0, found.shard_sizes[s] - 1) if found.shard_sizes[s]]
    for shard, row in random.sample(rows, min(SAMPLE_IMAGES, len(rows))):
        tried += 1
        try:
            decode(found.image_bytes(shard, row))
        except (BadImage, DataError) as e:
            bad.append(f"sample {row} of {found.tar_path(shard).name}: {e}")
    if bad:
        return Finding(
            "pictures",
            WARNING,
            f"{len(bad)} of {tried} cannot be read: {bad[0]}",
            "a run replaces them up to data.max_bad; `python -m data_pipeline inspect` counts them",
        )
    return Finding("pictures", OK, f"{tried} can be read")


def tokenizer(folder: Path) -> Finding:
    """It loads, and makes ids of a caption."""
    from maws.data.tokenizer import load_tokenizer

    try:
        ids, _ = load_tokenizer(folder, 16)(["a red dog"])
    except (DataError, OSError, ValueError, RuntimeError) as e:
        return Finding(
            "tokenizer",
            PROBLEM,
            f"{folder}: {e}",
            "give a folder with tokenizer.model or tokenizer.json, such as RUN/tokenizer",
        )
    return Finding("tokenizer", OK, f"{folder}: 'a red dog' becomes {int((ids[0] > 2).sum())} pieces")


def run(folder: Path) -> Iterator[Finding]:
    """A run that is there: can it be continued?"""
    from maws import manifest
    from maws.checkpoint import complete

    if not folder.exists():
        yield Finding("run", OK, f"{folder} is not there yet")
        return
    if (folder / "release" / "config.json").is_file():
        yield Finding("run", OK, f"{folder} is finished; its release is {folder / 'release'}")
        return
    found = complete(folder / "checkpoints")
    if not found:
        level = WARNING if (folder / "metrics.jsonl").exists() else OK
        yield Finding(
            "run", level, f"{folder} has no whole checkpoint", "it starts again from step 0" if level == WARNING else ""
        )
        return
    entries = json.loads((found[-1] / manifest.NAME).read_text())["files"]
    sizes = {p.name: p.stat().st_size for p in found[-1].iterdir()}
    if cut := [e["name"] for e in entries if sizes.get(e["name"]) != e["bytes"]]:
        seen = f"{found[-1].name}: {cut[0]} is missing or of another size"
        yield Finding("run", WARNING, seen, "--resume auto takes the newest whole one before it, if there is one")
    else:
        yield Finding("run", OK, f"continues from {found[-1].name} with --resume auto")
