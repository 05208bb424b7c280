"""Duplicates: what finding them costs as the corpus grows, and what is found at which distance.

    python benchmarks/duplicates.py scale [--sizes 10000 100000 1000000] [--near 14]
    python benchmarks/duplicates.py found                  (the demo corpus, and copies made of it)

`scale` makes up records (hashes as random as those of unrelated pictures, 5 % equal files, 5 % near copies) and runs
the steps of a build on them in one process per size: CPU time, peak memory, and how many of the copies were found.
"""

import argparse
import io
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from data_pipeline import dedup, images, schema
from data_pipeline.build import _remove_duplicates
from data_pipeline.job import Job
from data_pipeline.look import SIZE, look
from data_pipeline.phash import perceptual_hash
from data_pipeline.runners.local import LocalRunner
from data_pipeline.steps import Settings, Work, duplicates

PARTITION = 100_000
EMOJI = Path("demo/emoji")
VENDORS = ("noto", "noto-v1", "twemoji", "openmoji", "fluent-emoji", "fluent-emoji-flat")


# --------------------------------------------------------------------------------------------------------------- scale


def scale(sizes: list[int], near: int) -> None:
    heads = zip(
        ("records", "removed", "of", "CPU s", "us/record", "peak MiB", "work MiB"), (9, 8, 8, 7, 9, 8, 8), strict=True
    )
    print(*(f"{head:>{width}}" for head, width in heads), " CPU s by step")
    for size in sizes:
        command = [sys.executable, __file__, "one", "--sizes", str(size), "--near", str(near)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["steps"].items())
        print(
            f"{size:9,} {found['removed']:8,} {found['copies']:8,} {found['cpu']:7.1f} "
            f"{1e6 * found['cpu'] / size:9.1f} {found['peak']:8.0f} {found['disk']:8.0f}  {steps}",
            flush=True,
        )


def one(size: int, near: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="duplicates-"))
    try:
        work = Work(folder)
        partitions = -(-size // PARTITION)
        copies = sum(make_partition(work, number, partitions, size) for number in range(partitions))
        before, steps = time.process_time(), {}
        with LocalRunner(1) as runner:
            job = Timed(folder / "job", runner, steps)
            counts = _remove_duplicates(work, Settings(near_duplicates=near), [], job, partitions)
        disk = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "unique" not in p.parts) / 2**20
        print(json.dumps({
            "removed": sum(counts["dropped"].values()), "copies": copies, "cpu": time.process_time() - before,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "disk": disk, "steps": steps,
        }))  # fmt: skip
    finally:
        shutil.rmtree(folder)


class Timed(Job):
    def __init__(self, folder: Path, runner: LocalRunner, steps: dict[str, float]) -> None:
        super().__init__(folder, runner)
        self.steps = steps

    def run(self, step: str, tasks: list, unit: str = "tasks") -> list:  # type: ignore[override]
        start = time.process_time()
        found = super().run(step, tasks, unit)
        self.steps[step] = self.steps.get(step, 0.0) + time.process_time() - start
        return found


def make_partition(work: Work, number: int, partitions: int, size: int) -> int:
    """Records in the order of samples; 1 of 20 is an equal file and 1 of 20 a near copy of one in its partition."""
    rng = np.random.default_rng(number)
    count = min(PARTITION, size - number * PARTITION)
    state = rng.choice(np.array([0, 0, 1, 2], np.uint8), (count, 128))  # neither, neither, strongly -, strongly +
    looks = rng.integers(0, 256, (count, SIZE), np.uint8)
    content = rng.integers(0, 256, (count, 32), np.uint8)
    kinds = rng.random(count)
    kinds[:10] = 1
    originals = np.flatnonzero(kinds > 0.1)
    of = np.where(kinds < 0.1, rng.choice(originals, count), np.arange(count))
    state, looks, content = state[of], looks[of], np.where((kinds < 0.05)[:, None], content[of], content)
    for row in np.flatnonzero((kinds >= 0.05) & (kinds < 0.1)):
        changed = rng.choice(128, rng.integers(0, 7), replace=False)
        state[row, changed] = np.where(state[row, changed] == 0, 1, 0)  # one bit each
    bits = np.stack([state == 2, state == 1], axis=2).reshape(count, 256)
    hashes = np.packbits(bits, axis=1)
    order = np.sort(rng.integers(number * 2**32 // partitions, (number + 1) * 2**32 // partitions, count)).astype(">u4")

    def column(name: str) -> pa.Array:
        kind = schema.RECORDS.field(name).type
        if name == "order":
            return pa.array([value.tobytes() + bytes(28) for value in order], kind)
        given = {"content_sha256": content, "perceptual_hash": hashes, "look": looks}.get(name)
        if given is not None:
            return pa.array([row.tobytes() for row in given], kind)
        if name == "image_path":
            return pa.array(["/nowhere"] * count, kind)
        if name in ("image_offset", "image_size"):
            return pa.array(np.zeros(count), kind)
        if name == "key":
            return pa.array([f"k{number}-{row}" for row in range(count)], kind)
        if name in ("row", "width", "height"):
            return pa.array(np.arange(count) if name == "row" else np.full(count, 256), kind)
        return pa.array(np.full(count, number), kind) if name == "task" else pa.nulls(count, kind)

    table = pa.table([column(name) for name in schema.RECORDS.names], schema=schema.RECORDS)
    path = work.table("unique", number)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return int((kinds < 0.1).sum())


# --------------------------------------------------------------------------------------------------------------- found


def found() -> None:
    keys, vendors, pictures = read_emoji()
    hashes = [perceptual_hash(picture) for picture in pictures]
    looks = np.array([np.frombuffer(look(picture), np.uint8) for picture in pictures])
    pairs = close_pairs(hashes)
    apart = dedup.looks_apart(looks[pairs.first], looks[pairs.second]).astype(int)
    print(
        f"{len(pictures):,} drawings, {sum(h is None for h in hashes):,} without a hash. Pairs at most T bits apart:\n"
    )
    kinds = np.array([kind(keys, vendors, a, b) for a, b in zip(pairs.first, pairs.second, strict=True)])
    print(f"{'T':>3} {'look':>5}" + "".join(f" {name:>22}" for name in KINDS) + f" {'removed':>8}")
    for limit in (0, 4, 8, 14, 20, 31):
        for most in (4, duplicates.NEAR_LOOK, 64, 255):
            there = (pairs.distance <= limit) & (apart <= most)
            inside = dedup.Pairs(pairs.first[there], pairs.second[there], pairs.distance[there])
            chosen = dedup.choose(inside, len(keys))
            counts = Counter(kinds[there].tolist())
            print(f"{limit:3} {most:5}" + "".join(f" {counts[name]:22,}" for name in KINDS) + f" {len(chosen[0]):8,}")
    picked = np.random.default_rng(0).choice(len(pictures), 400, replace=False)
    print("\nCopies made of 400 of the drawings: share found by the hash alone, and with the look")
    print_recall([pictures[n] for n in picked])
    print("\nof 90 squares cut out of three photographs")
    print_recall(list(photographs()))


def print_recall(originals: list[Image.Image]) -> None:
    for name, change in CHANGES.items():
        measured = []
        for picture in originals:
            copy, before = change(picture), perceptual_hash(picture)
            if before is not None:
                seen = dedup.looks_apart(*(np.frombuffer(look(image), np.uint8) for image in (picture, copy)))
                measured.append((bits(before, perceptual_hash(copy)), int(seen)))
        distance, seen = (np.array(column) for column in zip(*measured, strict=True))
        shares = [
            f"{100 * np.mean((distance <= limit) & (seen <= most)):5.1f}"
            for limit, most in ((8, 255), (8, duplicates.NEAR_LOOK), (14, 255), (14, duplicates.NEAR_LOOK), (31, 255))
        ]
        print(f"  {name:24} T=8 {shares[0]} {shares[1]}   T=14 {shares[2]} {shares[3]}   T=31 {shares[4]}")


def photographs() -> Iterator[Image.Image]:
    """Of the packages that tests and reports need anyway: scikit-learn and matplotlib."""
    import matplotlib
    import sklearn

    draw = random.Random(0)
    for path in (
        Path(sklearn.__file__).parent / "datasets" / "images" / "flower.jpg",
        Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg",
        Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
    ):
        whole = images.decode(path.read_bytes())
        for _ in range(30):
            side = draw.randint(160, min(whole.size))
            x, y = draw.randint(0, whole.width - side), draw.randint(0, whole.height - side)
            yield whole.crop((x, y, x + side, y + side))


KINDS = ("fluent and flat, same", "same, other vendors", "other, same vendor", "other, other vendor")


def kind(keys: list[str], vendors: list[str], a: int, b: int) -> str:
    same = keys[a][len(vendors[a]) :] == keys[b][len(vendors[b]) :]
    if same and {vendors[a], vendors[b]} == {"fluent-emoji", "fluent-emoji-flat"}:
        return KINDS[0]
    return KINDS[1] if same else KINDS[2] if vendors[a] == vendors[b] else KINDS[3]


def read_emoji() -> tuple[list[str], list[str], list[Image.Image]]:
    keys, vendors, pictures = [], [], []
    for vendor in VENDORS:
        table = pq.read_table(EMOJI / f"{vendor}.parquet", columns=["key", "image"])
        keys += table["key"].to_pylist()
        vendors += [vendor] * len(table)
        pictures += [images.decode(data) for data in table["image"].to_pylist()]
    return keys, vendors, pictures


def close_pairs(hashes: list[bytes | None]) -> dedup.Pairs:
    ids = np.array([number for number, value in enumerate(hashes) if value is not None])
    words = np.frombuffer(b"".join(value for value in hashes if value is not None), np.uint64).reshape(-1, 4)
    block = dedup.Hashes(ids, words, np.full(len(ids), dedup.TRAINING, np.uint8))
    limits = dedup.Limits(dedup.LARGEST_DISTANCE, -1)
    parts = [part for band in range(dedup.BANDS) for part in dedup.pairs_within(block, band, limits)]
    first, second, distance = (np.concatenate(column) for column in zip(*parts, strict=True))
    return dedup.Pairs(first, second, distance)


def bits(a: bytes | None, b: bytes | None) -> int:
    return 256 if a is None or b is None else (int.from_bytes(a) ^ int.from_bytes(b)).bit_count()


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=quality)
    return images.decode(buffer.getvalue())


def resized(picture: Image.Image, share: float) -> Image.Image:
    size = (round(share * picture.width), round(share * picture.height))
    return picture.resize(size, Image.Resampling.BICUBIC)


def cropped(picture: Image.Image, share: float) -> Image.Image:
    large = resized(picture, 4)
    cut = round(share * large.width)
    return large.crop((cut, cut, large.width - cut, large.height - cut))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG 95": lambda picture: jpeg(picture, 95),
    "JPEG 75": lambda picture: jpeg(picture, 75),
    "JPEG 30": lambda picture: jpeg(picture, 30),
    "twice the size": lambda picture: resized(picture, 2),
    "half the size, JPEG 75": lambda picture: jpeg(resized(picture, 0.5), 75),
    "a quarter of the size": lambda picture: resized(picture, 0.25),
    "1 % cut off each side": lambda picture: cropped(picture, 0.01),
    "2 % cut off each side": lambda picture: cropped(picture, 0.02),
    "5 % cut off each side": lambda picture: cropped(picture, 0.05),
    "brighter by 15 %": lambda picture: ImageEnhance.Brightness(picture).enhance(1.15),
    "without colours": lambda picture: picture.convert("L").convert("RGB"),
    "mirrored": lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scale", "found", "one"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--near", type=int, default=14)
    options = parser.parse_args()
    if options.what == "found":
        found()
    elif options.what == "one":
        one(options.sizes[0], options.near)
    else:
        scale(options.sizes, options.near)


if __name__ == "__main__":
    main()
