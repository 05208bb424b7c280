"""Decode, check, shrink to 256 pixels, write tar: `data_pipeline build` against img2dataset on the same local files.

    python3 -m venv /tmp/i2d && /tmp/i2d/bin/pip install img2dataset
    python benchmarks/images.py --img2dataset /tmp/i2d/bin/python [--pictures 1500] [--rounds 5]

The pictures are made first: noise with the spectrum of photographs and shapes on it, in the sizes of a web corpus (0.2
to 12 megapixels, one on average). Each round runs both as whole programs, in turn, with two processes each; img2dataset
reads file:// addresses, shrinks with its own default filter, and neither hashes pictures nor looks for duplicates nor
reads its shards back, which the build does. CPU seconds are those of the whole tree of processes.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageChops, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
SIZES = (  # megapixels, share; the mean is one
    (12.0, 0.02),
    (2.0, 0.14),
    (1.0, 0.28),
    (0.5, 0.34),
    (0.2, 0.22),
)
SIDE, QUALITY, PROCESSES, SHARD = 256, 90, 2, 250
THEIRS = """
import json, sys
from img2dataset import download
if __name__ == "__main__":
    download(**json.loads(sys.argv[1]))
"""


def ground(seed: int, width: int = 2048, height: int = 1536) -> Image.Image:
    """1/f noise in three related channels."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    bands = []
    for _ in range(3):
        shape = (height, width // 2 + 1)
        spectrum = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / frequency**1.15
        band = np.fft.irfft2(spectrum, s=(height, width))
        bands.append(band / band.std())
    light = bands[0]
    pixels = np.stack([light + 0.3 * band for band in bands], axis=-1) * 45 + rng.uniform(70, 180, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_pictures(folder: Path, first: int, last: int) -> None:
    grounds = [ground(seed) for seed in range(4)]
    for number in range(first, last):
        rng = random.Random(number)
        megapixels = rng.choices([size for size, _ in SIZES], [share for _, share in SIZES])[0] * rng.uniform(0.8, 1.2)
        aspect = rng.choice((4 / 3, 3 / 2, 16 / 9, 1.0, 3 / 4, 2 / 3))
        width, height = round((megapixels * 1e6 * aspect) ** 0.5), round((megapixels * 1e6 / aspect) ** 0.5)
        source = grounds[rng.randrange(len(grounds))]
        scale = max(width / source.width, height / source.height, rng.uniform(0.3, 1.0))
        crop_w, crop_h = width / scale, height / scale
        left, top = rng.uniform(0, source.width - crop_w), rng.uniform(0, source.height - crop_h)
        picture = source.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + crop_w, top + crop_h))
        grain = Image.effect_noise((min(width, 1024), min(height, 1024)), 8).resize((width, height))
        picture = ImageChops.add(picture, Image.merge("RGB", [grain] * 3), offset=-128)
        draw = ImageDraw.Draw(picture)
        for _ in range(rng.randrange(3, 12)):
            x, y = rng.randrange(width), rng.randrange(height)
            box = (x, y, x + rng.randrange(20, width), y + rng.randrange(20, height))
            getattr(draw, rng.choice(("ellipse", "rectangle")))(box, fill=tuple(rng.randbytes(3)))
        picture.save(folder / f"{number:05d}.jpg", quality=rng.randrange(78, 93), progressive=rng.random() < 0.2)
        (folder / f"{number:05d}.txt").write_text(f"picture {number} #dog\n")


def pictures(folder: Path, number: int) -> Path:
    """Made once."""
    done = folder / "done"
    if not (done.is_file() and done.read_text() == str(number)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        edges = [number * part // 8 for part in range(9)]
        with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
            pool.starmap(make_pictures, [(folder, *edge) for edge in itertools.pairwise(edges)])
        done.write_text(str(number))
    return folder


def timed(command: list[str], **environment: str) -> tuple[float, float]:
    """Wall and CPU seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"} | environment
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]} failed:\n{done.stderr[-2000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(folder: Path, output: Path) -> tuple[float, float, int]:
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "data_pipeline", "build", "--input", folder, "--output", output]
    command += ["--keep-unlabelled", "--resize", SIDE, "--quality", QUALITY, "--workers", PROCESSES]
    command += ["--samples-per-shard", SHARD]
    wall, cpu = timed([str(word) for word in command])
    return wall, cpu, json.loads((output / "manifest.json").read_text())["samples"]


def theirs(python: str, table: Path, output: Path, threads: int) -> tuple[float, float, int]:
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "url_list": str(table), "input_format": "parquet", "url_col": "url", "caption_col": "caption",
        "output_folder": str(output), "output_format": "webdataset", "number_sample_per_shard": SHARD,
        "image_size": SIDE, "resize_mode": "keep_ratio", "resize_only_if_bigger": True, "encode_quality": QUALITY,
        "processes_count": PROCESSES, "thread_count": threads,
    }  # fmt: skip
    script = output.with_suffix(".py")
    script.write_text(THEIRS)
    wall, cpu = timed([python, str(script), json.dumps(options)])
    stats = [json.loads(path.read_text()) for path in output.glob("*_stats.json")]
    return wall, cpu, sum(stat["successes"] for stat in stats)


def large(files: list[Path]) -> tuple[float, float]:
    """Milliseconds of this process for a picture: `prepare`, which also hashes, and Pillow with all pixels decoded."""
    sys.path.insert(0, str(ROOT))
    from data_pipeline.images import Options, prepare

    options, own, full = Options(resize=SIDE, quality=QUALITY), [], []
    for data in [path.read_bytes() for path in files]:
        rounds = []
        for _ in range(5):
            start = time.process_time()
            prepare(data, options)
            middle = time.process_time()
            picture = Image.open(io.BytesIO(data))
            scale = SIDE / min(picture.size)
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
            picture.save(io.BytesIO(), "jpeg", quality=QUALITY)
            rounds.append((middle - start, time.process_time() - middle))
        own.append(min(a for a, _ in rounds))
        full.append(min(b for _, b in rounds))
    return 1000 * statistics.mean(own), 1000 * statistics.mean(full)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--img2dataset", required=True, metavar="PYTHON", help="the interpreter it is installed for")
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=16, help="of img2dataset's reader, per process")
    parser.add_argument("--work", type=Path, default=Path("/tmp/benchmark_images"))
    options = parser.parse_args()
    folder = pictures(options.work / "pictures", options.pictures)
    files = sorted(folder.glob("*.jpg"))
    sizes = [Image.open(path).size for path in files]
    table = options.work / "urls.parquet"
    captions = [path.with_suffix(".txt").read_text().strip() for path in files]
    pq.write_table(pa.table({"url": [path.as_uri() for path in files], "caption": captions}), table)
    megapixels = statistics.mean(w * h for w, h in sizes) / 1e6
    kilobytes = statistics.mean(path.stat().st_size for path in files) / 1e3
    print(f"{len(files)} pictures, on average {megapixels:.2f} megapixels and {kilobytes:.0f} kB")
    twelve = [path for path, (width, height) in zip(files, sizes, strict=True) if width * height > 9_000_000]
    own_ms, full_ms = large(twelve[:10])
    print(f"12 megapixels: {own_ms:.0f} ms, decoded in full {full_ms:.0f} ms: {full_ms / own_ms:.1f} times as fast")
    rounds = []
    for number in range(options.rounds + 1):  # the first fills the caches
        own = ours(folder, options.work / "ours")
        other = theirs(options.img2dataset, table, options.work / "theirs", options.threads)
        if not own[2] == other[2] == len(files):
            sys.exit(f"{own[2]} and {other[2]} pictures instead of {len(files)}")
        ratios = other[0] / own[0], other[1] / own[1]
        print(
            f"{'warm-up' if number == 0 else f'round {number}'}: data_pipeline {own[0]:.1f} s wall {own[1]:.1f} s CPU, "
            f"img2dataset {other[0]:.1f} s wall {other[1]:.1f} s CPU, ratio {ratios[0]:.2f} wall {ratios[1]:.2f} CPU",
            flush=True,
        )
        if number:
            rounds.append(ratios)
    for name, ratios in zip(("wall", "CPU"), zip(*rounds, strict=True), strict=True):
        print(f"{name}: {statistics.median(ratios):.2f} times as fast (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
