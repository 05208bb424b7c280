"""A folder of runs as training and evaluation leave it, made in a moment: for tests of the report and the demo."""

import io
import json
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.shardset import Sample, VocabularyEntry, write_manifest, write_shard, write_vocabulary

LINEAGES = {"mae": ["mae"], "wsp": ["wsp"], "mae_wsp": ["mae", "wsp"], "lit": ["mae", "wsp", "lit"]}
LEVEL = {"mae": 0.22, "wsp": 0.34, "mae_wsp": 0.41}
METRICS = {
    "linear": ["top1", "top5"],
    "knn": ["top1@k=1", "top1@k=20"],
    "lowshot": ["1-shot/linear/top1", "5-shot/vpt/top1"],
}


def picture(seed: int, side: int = 48) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = np.full((side, side, 3), 255, np.uint8)
    x, y, r = rng.integers(8, side - 8, 2).tolist() + [int(rng.integers(5, side // 3))]
    yy, xx = np.mgrid[:side, :side]
    pixels[(xx - x) ** 2 + (yy - y) ** 2 < r * r] = rng.integers(0, 220, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_shards(folder: Path, number: int = 60) -> Path:
    names = [f"thing_{index}.n.01" for index in range(20)]
    samples = []
    for index in range(number):
        label = min(int(random.Random(index).expovariate(0.25)), 19)
        key = f"set-{index:04d}"
        record = {
            "key": key,
            "caption": f"<b>thing</b> {label} & friends #thing{label} #fun",
            "language": "en",
            "hashtags": [f"thing{label}", "fun"],
            "synsets": [names[label]],
            "labels": [label],
            "repeat": 1.0 + label / 10,
            "source": "synthetic",
            "licence": None,
        }
        samples.append(Sample(key, picture(index), "png", record, [label], 1.0 + label / 10))
    entry = write_shard(folder / "shards", "00000", samples)
    entries = [
        VocabularyEntry(i, name, f"n{i:08d}", [name.split(".")[0]], f"gloss of {name}", max(1, 200 // (i + 1)))
        for i, name in enumerate(names)
    ]
    digest = write_vocabulary(folder / "vocabulary.parquet", entries)
    counts = {"read": number + 5, "kept": number, "dropped": {"no_hashtags": 3, "undecodable": 2}, "hashtags": 120}
    content = {"samples": number, "classes": len(names), "shards": [entry], "vocabulary_sha256": digest}
    write_manifest(folder, {**content, "counts": counts, "inputs": [{"path": "x.parquet"}], "parents": []})
    return folder


def write_run(root: Path, name: str, lineage: list[str], seed: int = 0, steps: int = 200, done: bool = False) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    config = {
        "stage": lineage[-1],
        "preset": "demo",
        "seed": seed,
        "order": {"seed": seed, "streams": 4},
        "init_sha256": name,  # repeats start from repeats
        "lineage": lineage,
        "model": {"variant": "nano", "image_size": 48},
        "data": {"shards": str(root / "shards")},
        "optim": {"batch_size": 64},
        "revision": "0123456789abcdef",
        "versions": {"torch": "2.15.0"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = random.Random(name)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(10, steps + 1, 10):
            loss = 1.2 + 3 * math.exp(-step / 60) + rng.gauss(0, 0.06) - (0.4 if lineage == ["mae", "wsp"] else 0)
            line = {"step": step, "time": 1.0, "train/loss": loss, "train/lr": 1e-3, "train/images_per_second": 150.0}
            file.write(json.dumps(line) + "\n")
    if done:
        (folder / "release").mkdir()
        (folder / "release" / "model.safetensors").write_bytes(name.encode())
    return folder


def write_results(root: Path, name: str, lineage: list[str], seed: int, level: float) -> None:
    lines = []

    def add(evaluator: str, metric: str, value: float, draw: int) -> None:
        config = {"num_classes": 362}
        line = {
            "run": f"{root}/{name}",
            "evaluator": evaluator,
            "metric": metric,
            "value": value,
            "n": 362,
            "seed": draw,
        }
        lines.append({**line, "config": config, "hashes": {"data": "d" * 64}, "lineage": lineage, "time": "2026-01-01"})

    rng = random.Random(f"{name}{seed}")
    for evaluator, metrics in METRICS.items():
        for place, metric in enumerate(metrics):
            for draw in range(5 if evaluator == "lowshot" else 1):
                add(evaluator, metric, level * (0.8 + 0.25 * place) + rng.gauss(0, 0.01), draw)
    with (root / name / "results.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def write_folder(root: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> Path:
    """shards/, mae/, wsp/, mae_wsp/ with their seeds, lit/: none with weights that load."""
    write_shards(root / "shards")
    for name, level in LEVEL.items():
        for seed in seeds if name != "mae" else (0,):
            run = name if seed == 0 else f"{name}_seed{seed}"
            write_run(root, run, LINEAGES[name], seed)
            write_results(root, run, LINEAGES[name], seed, level)
    write_run(root, "lit", LINEAGES["lit"])
    return root
