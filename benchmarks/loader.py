"""Images a second and core: our loader, webdataset with torchvision's transforms, and ImageFolder with DataLoader.

    OMP_NUM_THREADS=1 python benchmarks/loader.py [--pictures 1000] [--rounds 5] [--scale 0.2 1] [--filter bicubic]

All three read the same JPEGs of 500 x 375 (quality 90) in one process with one thread, take a random resized crop of
224, mirror half of them, and give batches of 64. Ours stay uint8, since normalisation happens on the device; the other
two end as normalised float32, as their users write them. They take turns; the ratio is the median over rounds.

The JPEGs are crops of the two photographs that scikit-learn carries (extra `dev`), at 0.8 to 1.2 times their size, with
grain of a standard deviation of `--grain` levels, since two small photographs are smoother than a camera's.
"""

import argparse
import io
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision import transforms
from webdataset import WebDataset

from data_pipeline.shardset import Sample, ShardSet, write_manifest, write_shard, write_vocabulary
from maws.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from maws.data.loader import LoadImage, StepDataset
from maws.data.order import Order, Part

SIZE, SIDE, BATCH, PER_SHARD = (500, 375), 224, 64, 250


def pictures(number: int, grain: float) -> Iterator[bytes]:
    photos = [Image.fromarray(array) for array in load_sample_images().images]
    rng, noise = random.Random(0), np.random.default_rng(0)
    for _ in range(number):
        photo = rng.choice(photos)
        width = min(SIZE[0] / rng.uniform(0.8, 1.2), photo.height * SIZE[0] / SIZE[1])
        height = width * SIZE[1] / SIZE[0]
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        picture = photo.resize(SIZE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        pixels = np.asarray(picture) + noise.normal(0, grain, (SIZE[1], SIZE[0], 1))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=90)
        yield buffer.getvalue()


def prepare(folder: Path, number: int, grain: float) -> float:
    """The same JPEGs as a shard set and as a folder of files; returns their mean size in kB."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "set" / "shards").mkdir(parents=True)
    made = list(pictures(number, grain))
    entries = []
    for first in range(0, number, PER_SHARD):
        samples = [
            Sample(f"p{i:06}", data, "jpg", {"key": f"p{i:06}", "labels": [], "repeat": 1.0}, [], 1.0)
            for i, data in enumerate(made[first : first + PER_SHARD], first)
        ]
        entries.append(write_shard(folder / "set" / "shards", f"{first // PER_SHARD:05}", samples))
    vocabulary = write_vocabulary(folder / "set" / "vocabulary.parquet", [])
    write_manifest(folder / "set", {"samples": number, "shards": entries, "vocabulary_sha256": vocabulary})
    for i, data in enumerate(made):
        file = folder / "files" / f"class{i % 10}" / f"p{i:06}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return statistics.mean(map(len, made)) / 1e3


def ours(folder: Path, scale: tuple[float, float]) -> Callable[[int], Iterator[torch.Tensor]]:
    shards = ShardSet.open(folder / "set")
    order = Order(shards, 0, BATCH, resample=False)
    data = StepDataset(order, Part(), LoadImage(DataConfig(crop_scale=scale), shards, 0, SIDE))
    return lambda epoch: (data[epoch * order.steps_per_epoch + i]["image"] for i in range(order.steps_per_epoch))


def usual(scale: tuple[float, float], kind: str) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, scale, interpolation=transforms.InterpolationMode(kind)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def webdataset(folder: Path, transform: transforms.Compose) -> Callable[[int], Iterator[torch.Tensor]]:
    urls = sorted(map(str, (folder / "set" / "shards").glob("*.tar")))
    data = WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode("pil")
    data = data.to_tuple("jpg").map_tuple(transform).batched(BATCH, partial=False)
    return lambda epoch: (images for (images,) in data)


def image_folder(folder: Path, transform: transforms.Compose) -> Callable[[int], Iterator[torch.Tensor]]:
    data = torchvision.datasets.ImageFolder(str(folder / "files"), transform)
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True)
    return lambda epoch: (images for images, _ in loader)


def rate(batches: Iterator[torch.Tensor]) -> float:
    """Images a second of this process's CPU time: other programs on the machine do not count."""
    begun, images = time.process_time(), sum(len(batch) for batch in batches)
    return images / (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, nargs=2, default=(0.2, 1.0), help="of the crop; MAE's is 0.2 to 1")
    parser.add_argument("--filter", default="bicubic", help="of torchvision's resize; MAE's is bicubic, ours is always")
    parser.add_argument("--grain", type=float, default=4.0)
    parser.add_argument("--work", type=Path, default=Path("/tmp/benchmark_loader"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    kilobytes = prepare(options.work, options.pictures, options.grain)
    print(f"{options.pictures} JPEGs of {SIZE[0]} x {SIZE[1]}, on average {kilobytes:.0f} kB")
    scale, transform = tuple(options.scale), usual(tuple(options.scale), options.filter)
    ways = {
        "ours": ours(options.work, scale),
        "webdataset": webdataset(options.work, transform),
        "ImageFolder": image_folder(options.work, transform),
    }
    rounds = [{name: rate(way(n)) for name, way in ways.items()} for n in range(options.rounds + 1)][1:]
    for name in ways:
        ratios = [each["ours"] / each[name] for each in rounds]
        print(
            f"{name:12} {statistics.median(each[name] for each in rounds):5.0f} images/s and core; ours is "
            f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
