"""How long the decisions of a large set take: thresholds, the deny-list, finding a key, taking pictures down.

    .venv/bin/python benchmarks/decisions.py

Counts are those of a corpus of 3 billion images with 28,000 classes whose frequencies fall like those of words; the
shards on disk are 100 of 1,000 samples, with 2 kB pictures. Seconds of one core, the disk's left out.
"""

import hashlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.lookup import Lookup
from data_pipeline.overrides import Overrides
from data_pipeline.resample import Repeats, solve_threshold
from data_pipeline.shardset import Sample, ShardSet, VocabularyEntry, write_manifest, write_shard, write_vocabulary
from data_pipeline.takedown import Wanted, takedown
from data_pipeline.wordnet import open_wordnet

IMAGES, CLASSES = 3_000_000_000, 28_000
SIGNATURES = 200_000  # different combinations of label counts, for `cap`
SHARDS, SAMPLES = 100, 1000


def timed(name: str, function: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = function()
    print(f"{name:<64} {time.process_time() - start:8.3f} s")
    return result


def thresholds() -> None:
    random_ = random.Random(0)
    counts = [int(IMAGES / 12 / rank) for rank in range(1, CLASSES + 1)]
    share = IMAGES / sum(counts)
    by_rarest = {(count,): count * share for count in set(counts)}
    for method in ("sqrt", "identity"):
        t = timed(f"{method}: an epoch of 5 billion, {len(by_rarest):,} different counts",
                  lambda m=method: solve_threshold(by_rarest, IMAGES, samples=5e9, method=m))  # fmt: skip
        print(f"    t = {t:.3g}, the epoch has {Repeats(t, IMAGES, method).samples(by_rarest):,.0f} samples")
    combinations = Counter(
        tuple(sorted(random_.choices(counts, k=random_.randint(1, 5)))) for _ in range(SIGNATURES)
    )  # fmt: skip
    images = sum(combinations.values())
    weights = {counts: number * IMAGES / images for counts, number in combinations.items()}
    t = timed(f"cap: an epoch of 400 million, {len(weights):,} combinations of counts",
              lambda: solve_threshold(weights, IMAGES, samples=4e8, method="cap"))  # fmt: skip
    print(f"    t = {t:.3g}, the epoch has {Repeats(t, IMAGES, 'cap').samples(weights):,.0f} samples")


def write_set(folder: Path) -> list[str]:
    keys = sorted(
        (f"photos/{n:07d}" for n in range(SHARDS * SAMPLES)), key=lambda k: hashlib.sha256(k.encode()).digest()
    )
    noise = random.Random(0).randbytes(2000 + SHARDS * SAMPLES)
    shards = []
    for number in range(SHARDS):
        chosen = sorted(keys[number * SAMPLES : (number + 1) * SAMPLES])
        samples = (
            Sample(key, picture, "jpg", {"key": key, "labels": [0], "repeat": 1.0}, [0], 1.0,
                   hashlib.sha256(picture).digest(), hashlib.sha256(picture).digest())
            for key in chosen for picture in [noise[int(key[7:]) : int(key[7:]) + 2000]]
        )  # fmt: skip
        shards.append(write_shard(folder / "shards", f"{number:05d}", samples))
    digest = write_vocabulary(
        folder / "vocabulary.parquet", [VocabularyEntry(0, "dog.n.01", "n02084071", ["dog"], "", len(keys))]
    )
    counts = {"read": len(keys), "kept": len(keys), "labelled": len(keys), "labels": len(keys), "dropped": {}}
    resampling = {"samples_per_epoch": float(len(keys))}
    write_manifest(
        folder,
        {
            "samples": len(keys),
            "shards": shards,
            "vocabulary_sha256": digest,
            "counts": counts,
            "resampling": resampling,
        },
    )
    return keys


def finding(folder: Path) -> None:
    keys = timed(f"(writing {SHARDS} shards of {SAMPLES:,})", lambda: write_set(folder))
    shards = ShardSet.open(folder)
    timed("one key, by binary search", lambda: Lookup(shards).find(keys[77_777]))
    lookup = Lookup(shards)
    timed("1,000 keys", lambda: [lookup.find(key) for key in keys[:: len(keys) // 1000]])
    timed("a key that is not there, and keys like it", lambda: lookup.nearest("photos/77777777"))
    timed("one picture taken down, by key", lambda: takedown(folder, Wanted(keys=[keys[5]])))
    digest = shards.index(50)["content_sha256"][7].as_py().hex()
    timed("one picture taken down, by hash", lambda: takedown(folder, Wanted(hashes=[digest])))
    timed("50 pictures in 50 shards", lambda: takedown(folder, Wanted(keys=keys[300::2000])))
    timed("looks of one picture against 100,000 (dry run)",
          lambda: takedown(folder, Wanted(keys=[keys[9]], near=12), dry_run=True))  # fmt: skip


def main() -> None:
    thresholds()
    wordnet = open_wordnet()
    timed("the shipped deny-list", lambda: Overrides.load(None, "all", wordnet))
    with tempfile.TemporaryDirectory() as folder:
        finding(Path(folder))


if __name__ == "__main__":
    main()
