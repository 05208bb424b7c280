"""Extraction of features against the pure forward of the same batches: ViT-B/16 at 224 on JPEG pictures.

    python benchmarks/features.py                                  # on this machine's CPU, some minutes
    python benchmarks/features.py --pictures 4096 --batch 256 --precision bf16 --device cuda
    OMP_NUM_THREADS=1 python benchmarks/features.py --ranks 2      # one rank against two, a core each

The pictures are made first: noise with the spectrum of photographs at 500 x 375, which is ImageNet's usual size, as
JPEGs of quality 90 in class folders. In every round, in turn: the forward alone, of batches that are decoded already;
`extract` with everything it does; and decoding alone. Figures are medians over rounds, and the shares that matter are
ratios of one round's. With --ranks the same extraction is done by several processes, each of which takes its share.
"""

import argparse
import hashlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eval import distributed, features
from eval.datasets import Dataset, open_data
from eval.decode import decoded, workers
from eval.features import Encoder, extract, pick_device
from maws.data.transforms import Preprocess
from maws.launchers import free_port, started_alone
from maws.models.vit import build_vit

SIZE, QUALITY, CLASSES = (500, 375), 90, 4
LEARNT = Preprocess(224, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", default="vit_b16")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ranks", type=int, default=0, help="compare one process with so many")
    parser.add_argument("--data", type=Path, help="class folders that are there already")
    parser.add_argument("--seconds", action="store_true", help=argparse.SUPPRESS)  # what a rank is started with
    options = parser.parse_args()
    if options.seconds:
        as_rank(options)
        return
    if options.data:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.data = Path(folder)
        make_pictures(options.data, options.pictures)
        if options.ranks:
            compare_ranks(options)
        else:
            measure(options)


def make_pictures(folder: Path, number: int) -> None:
    """Noise whose amplitude falls with frequency, in related channels."""
    width, height = SIZE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    total = 0
    for position in range(number):
        rng = np.random.default_rng(position)
        shape = (4, height, width // 2 + 1)
        spectrum = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / frequency**1.15
        noise = np.fft.irfft2(spectrum, s=(height, width))
        noise /= noise.std(axis=(1, 2), keepdims=True)
        pixels = (128 + 45 * (0.85 * noise[:1] + 0.5 * noise[1:])).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "jpeg", quality=QUALITY)
        file = folder / str(position % CLASSES) / f"{position:06}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(buffer.getvalue())
        total += len(buffer.getvalue())
    print(f"{number} JPEGs of {width} x {height}, {total / number / 1000:.0f} kB each", flush=True)


def measure(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    begin = time.perf_counter()
    data = open_data([options.data]).test
    hashing = time.perf_counter() - begin
    encode = encoder_of(options, device)
    size = sum(file.stat().st_size for file in options.data.rglob("*.jpg"))
    print(f"{options.variant}, {options.precision} on {device}, batches of {options.batch}; {threads()}")
    print(f"opened, every byte read and hashed: {size / hashing / 1e9:.2f} GB/s, {len(data) / hashing:,.0f} pictures/s")
    rows = []
    for number in range(options.rounds):
        rows.append(one_round(encode, data))
        forward, whole, decoding, waited = rows[-1]
        print(
            f"round {number + 1}: forward {len(data) / forward:.1f}/s, extract {len(data) / whole:.1f}/s "
            f"({forward / whole:.3f} of it), waiting {waited:.1%}, decoding alone {len(data) / decoding:.0f}/s",
            flush=True,
        )
    ratio = statistics.median(forward / whole for forward, whole, *_ in rows)
    waited = statistics.median(row[3] for row in rows)
    print(
        f"median: extraction is {ratio:.1%} as fast as the forward alone; {waited:.1%} of its time waits for pictures"
    )


def encoder_of(options: argparse.Namespace, device: torch.device) -> Encoder:
    tower = build_vit(options.variant, LEARNT.image_size)
    return Encoder(tower, LEARNT, device=device, precision=options.precision, batch=options.batch)


def one_round(encode: Encoder, data: Dataset) -> tuple[float, float, float, float]:
    """Seconds of the forward alone, of extraction, of decoding alone; and the share of extraction without pictures."""
    begin = time.perf_counter()
    batches = [batch.images for batch in decoded(data, range(len(data)), encode.preprocess, encode.batch)]
    decoding = time.perf_counter() - begin
    if encode.device.type == "cuda":
        batches = [images.pin_memory() for images in batches]
    encode.all(batches[0])
    finish(encode)
    begin = time.perf_counter()
    for images in batches:
        encode.all(images)
    finish(encode)
    forward = time.perf_counter() - begin
    waited: list[float] = []
    timed = features._Timed

    class Seen(timed):
        def end(self) -> None:
            waited.append(self.share)
            super().end()

    features._Timed = Seen
    begin = time.perf_counter()
    extract(encode, data)
    whole = time.perf_counter() - begin
    features._Timed = timed
    return forward, whole, decoding, waited[0]


def finish(encode: Encoder) -> None:
    if encode.device.type == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------------- ranks


def compare_ranks(options: argparse.Namespace) -> None:
    """One process and several, in turn; each says how long its extractions took, and the hash of what it has."""
    base = [sys.executable, __file__, "--seconds", "--data", str(options.data), "--device", options.device]
    base += ["--batch", str(options.batch), "--variant", options.variant, "--precision", options.precision]
    ratios = []
    for _ in range(options.rounds):
        one, digest = started(base, 1)
        many, other = started(base, options.ranks)
        ratios.append(one / many)
        same = "the same bits" if digest == other else "OTHER FEATURES"
        times = f"one rank {one:.2f} s, {options.ranks} ranks {many:.2f} s"
        print(f"{times}: {ratios[-1]:.2f} times as fast, {same}", flush=True)
    print(f"median: {options.ranks} ranks are {statistics.median(ratios):.2f} times as fast as one")


def started(command: list[str], ranks: int) -> tuple[float, str]:
    """Seconds of the extraction, and the hash of its features."""
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(ranks)
    ]
    said = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), said
    seconds, digest = said[0].split()
    return float(seconds), digest


def as_rank(options: argparse.Namespace) -> None:
    """One of them: extract once."""
    device = pick_device(options.device) if started_alone() else distributed.start(options.device)
    data, encode = open_data([options.data]).test, encoder_of(options, device)
    encode.all(torch.zeros(options.batch, 3, LEARNT.image_size, LEARNT.image_size, dtype=torch.uint8))
    distributed.gather("ready")
    begin = time.perf_counter()
    found = extract(encode, data)
    seconds = time.perf_counter() - begin
    if distributed.is_first():
        print(seconds, hashlib.sha256(found.features.cpu().numpy().tobytes()).hexdigest())
    if (company := distributed.company()) is not None:
        company.done()


def threads() -> str:
    return f"{torch.get_num_threads()} thread(s) for the forward, {workers()} for decoding"


if __name__ == "__main__":
    main()
