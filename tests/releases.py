"""Tiny releases and runs with values that no formula gives, for tests of what reads or rewrites them."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from maws import config, manifest, optim, stages
from maws.data.tokenizer import train_tokenizer
from maws.data.transforms import Preprocess
from maws.files import sha256, write_json
from maws.models import init
from maws.models.mae import DecoderShape, MaskedAutoencoder
from maws.models.text import TextShape, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import Shape, VisionTransformer, build_vit
from maws.release import Release, describe, open_release, write_release
from maws.seeding import generator
from maws.weight_files import Weights

TINY = Shape(patch=8, depth=2, width=32, heads=4, image=32)
TEXT = TextShape(width=32, depth=1, heads=2, vocabulary=0, context=14, dropout=0.0)
CAPTIONS = ["a red fox jumps over the lazy dog", "лиса sees 狐狸 in rain", "photo of many cats and houses"]
PREPROCESS = Preprocess(32, resize=40, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator) + (1.0 if "orm" in name and p.ndim == 1 else 0.0))
    return module.eval()


def write(folder: Path, stage: str, weights: dict[str, Any], shape: Shape, **config: Any) -> Release:
    made = config.pop("preprocess", PREPROCESS)
    extras = config.pop("extras", {})
    record = {
        "stage": stage, "lineage": [stage], "variant": "", "model": asdict(shape), "image_size": 32, "train": {},
        "shards_sha256": "",
    }  # fmt: skip
    write_release(folder, weights, record | config, made, extras)
    return open_release(folder)


def image_release(folder: Path, shape: Shape = TINY, classes: int = 0, **config: Any) -> Release:
    weights = dict(randomise(VisionTransformer(shape, 32)).named_parameters())
    if classes:
        head = randomise(nn.Linear(shape.width, classes), 1)
        weights |= {f"head.0.{name}": p for name, p in head.named_parameters()}
        config = {"head": "linear", "loss": "softmax", "classes": classes} | config
    return write(folder, "wsp" if classes else "imported", weights, shape, **config)


def mae_release(folder: Path, shape: Shape = TINY, **decoder: Any) -> Release:
    small = DecoderShape(width=16, depth=1, heads=2, **decoder)
    mae = randomise(MaskedAutoencoder(shape, 32, small))
    config = {"decoder": asdict(small), "mask": {"kind": "random", "ratio": 0.75}, "target": {"kind": "norm_pixels"}}
    return write(folder, "mae", dict(mae.named_parameters()), shape, **config)


def lit_release(folder: Path, shape: Shape = TINY, text: TextShape = TEXT, siglip: bool = False) -> Release:
    tokenizer = train_tokenizer(CAPTIONS * 20, 200, text.context)
    tokenizer.save(folder.with_name(folder.name + "-tokenizer"))
    text = replace(text, vocabulary=tokenizer.vocabulary)
    towers = TwoTower(VisionTransformer(shape, 32), TextTower(text), 24, bias=siglip)
    randomise(towers)
    with torch.no_grad():
        towers.logit_scale.fill_(2.0)
    return write(
        folder, "lit", dict(towers.named_parameters()), shape, text=asdict(text), joint_width=24,
        loss="siglip" if siglip else "clip", extras={"tokenizer": folder.with_name(folder.name + "-tokenizer")},
    )  # fmt: skip


def write_run(
    run: Path, stage: str = "mae", ranks: int = 2, shards: Any = None, ema: bool = False, *settings: str,
    preset: str = "debug", init_from: str = "", moments: bool = True,
) -> nn.Module:  # fmt: skip
    """A run folder with one checkpoint of step 7, and the objective whose values are in it."""
    module = stages.load(stage)
    cfg = config.override(stages.preset(stage, preset), settings)
    if init_from:
        digest = open_release(init_from).sha256
        cfg = config.override(cfg, [f"init_from={init_from}", f"init_sha256={digest}"])
    if shards:
        cfg = module.prepare(config.override(cfg, [f"data.shards={shards.path}"]), shards, run)
    objective: Any = module.objective(cfg, shards)
    init.fill(objective, objective.init_rules(), cfg.seed)
    if init_from:
        module.initialise(objective, cfg, init._dense)
    folder = run / "checkpoints" / "step_0000007"
    folder.mkdir(parents=True)
    parts: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    elements = {}
    for name, p in objective.named_parameters():
        if optim.treat(name, module.param_rules(cfg)) is None and not name.startswith("target."):
            continue
        with torch.no_grad():
            p.add_(torch.randn(p.shape, generator=generator(1, name)))
        elements[name] = p.numel()
        kinds = {"average": p} if name.startswith("target.") else {"weight": p}
        kinds |= {"exp_avg": p + 2, "exp_avg_sq": p + 3} if moments else {}
        kinds |= {"ema": p + 1} if ema else {}
        for kind, value in kinds.items():
            for part, piece in zip(parts, cut(value.detach().flatten(), ranks), strict=True):
                part[f"{kind}/{name}"] = piece
    for rank, part in enumerate(parts):
        save_file(part, folder / f"rank_{rank:05}.safetensors")
    state = {"format": 1, "step": 7, "ranks": ranks, "order": "o", "elements": elements, "buffers": []}
    write_json(folder / "state.json", state)
    manifest.write(folder, [manifest.Entry(p.name, p.stat().st_size, sha256(p)) for p in folder.iterdir()])
    digest = shards.sha256 if shards else "none"
    record = {"stage": stage, "preset": preset, "lineage": [stage], "shards_sha256": digest, "revision": "r"}
    write_json(run / "config.json", record | config.to_json(cfg))
    return objective


def cut(flat: Tensor, ranks: int) -> list[Tensor]:
    size = math.ceil(len(flat) / ranks)
    return [part.clone() for part in torch.cat([flat, torch.full((size * ranks - len(flat),), 9.0)]).split(size)]


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


def untrained(folder: Path, seed: int) -> Path:
    """A release of an image tower that nobody has trained."""
    tower = build_vit("atto", seed=seed)
    facts = {
        "stage": "mae", "lineage": ["mae"], "variant": "atto", "model": describe(tower.shape),
        "image_size": tower.image_size, "train": {},
    }  # fmt: skip
    write_release(folder, Weights.of(dict(tower.state_dict())), facts, Preprocess(tower.image_size))
    return folder
