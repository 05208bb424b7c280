"""Stage finetune: augmentation as a function of the visit, the loss, what is trained and how fast, and its probe."""

import random
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import timm.data.mixup as timm_mixup
import torch
from PIL import Image
from ranks import run_ranks
from releases import mae_release
from timm.data.auto_augment import rand_augment_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.testing import assert_close

from data_pipeline.images import decode
from data_pipeline.shardset import ShardSet
from maws import optim, probe
from maws.config import ConfigError, override
from maws.data.augment import AugmentConfig, erase, erased_box
from maws.data.loader import open_shards
from maws.data.mix import Draw, cut_out, drawn, mixed, neighbours
from maws.data.order import Part
from maws.data.rand_augment import RandAugment
from maws.handover import load_backbone
from maws.models.init import _dense, fill
from maws.models.vit import VARIANTS, normalise
from maws.objectives.classification import Classification, frozen_patterns
from maws.rehearsal import on_meta
from maws.schedule import schedule_of
from maws.stages import finetune
from maws.stages.finetune import PRESETS

DEBUG: finetune.Config = PRESETS["debug"]
MEAN, STD = DEBUG.data.mean, DEBUG.data.std
NONE: Any = None


def small(*settings: str) -> finetune.Config:
    return override(DEBUG, ["classes=4", *settings])


def built(cfg: finetune.Config) -> Classification:
    objective = finetune.objective(cfg, NONE)
    fill(objective, objective.init_rules(), 0)
    return objective.train()


# --------------------------------------------------------------------------------------------------------- augmentation


def test_rand_augment_is_timms_for_a_seed_and_leaves_the_global_generators_alone():
    image = Image.effect_noise((40, 40), 70).convert("RGB")
    augment = RandAugment("rand-m9-mstd0.5-inc1", 40, MEAN)
    around = {"translate_const": 18, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    theirs: Any = rand_augment_transform("rand-m9-mstd0.5-inc1", around)
    random.seed(3)
    np.random.seed(4)
    states = random.getstate(), np.random.get_state()
    first = [np.asarray(augment(image, seed)) for seed in range(12)]
    assert random.getstate() == states[0] and np.array_equal(np.random.get_state()[1], states[1][1])  # type: ignore[index]
    random.random()
    np.random.rand(7)
    assert all(np.array_equal(np.asarray(augment(image, seed)), one) for seed, one in enumerate(first))
    assert len({one.tobytes() for one in first}) > 6
    for seed, one in enumerate(first):
        random.seed(seed)
        np.random.seed(seed)
        assert np.array_equal(np.asarray(theirs(image)), one)


def test_rand_augment_at_its_greatest_magnitude_posterises_to_black_and_a_wrong_policy_is_refused():
    augment = RandAugment("rand-m10-p1-n1-inc1", 8)
    augment._ops.ops = [op for op in augment._ops.ops if op.name == "PosterizeIncreasing"]
    assert not np.asarray(augment(Image.new("RGB", (8, 8), "white"), seed=1)).any()
    with pytest.raises(ConfigError, match="rand_augment=randm9 is no policy"):
        RandAugment("randm9", 8)


def test_erasing_fills_one_rectangle_with_noise_of_the_data_sets_mean_and_deviation():
    pixels = torch.full((3, 224, 200), 7, dtype=torch.uint8)
    erase(pixels, np.random.default_rng(1), MEAN, STD)
    top, left, height, width = erased_box(224, 200, np.random.default_rng(1)) or (0, 0, 0, 0)
    inside = torch.zeros(224, 200, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert (pixels[:, ~inside] == 7).all() and height * width > 800
    noise = normalise(pixels[None], MEAN, STD)[0][:, inside]
    assert noise.mean().abs() < 0.1 and 0.9 < noise.std() < 1.05
    shares = [h * w / 64**2 for rng in map(np.random.default_rng, range(400)) if (b := erased_box(64, 64, rng))
              for h, w in [b[2:]]]  # fmt: skip
    assert 0.015 < min(shares) < 0.05 and 0.25 < max(shares) < 0.36


@pytest.mark.parametrize("cuts", [False, True])
def test_mixing_is_timms_with_the_same_weight_and_box(cuts, monkeypatch):
    images = torch.randint(0, 256, (2, 3, 24, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.random.seed(5)
    box, weight = timm_mixup.cutmix_bbox_and_lam((2, 3, 24, 20), 0.3) if cuts else (None, 0.3)
    theirs = timm_mixup.Mixup(num_classes=4, label_smoothing=0.1)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (0.3, cuts))
    np.random.seed(5)
    wanted, target = theirs(images.double(), torch.tensor([1, 3]))
    other = neighbours(2, 2)
    ours = mixed(images, images[other], Draw(weight, box))
    assert_close(ours.double(), wanted, rtol=0, atol=0 if cuts else 0.501)
    objective, scores = built(small()), torch.randn(2, 4, dtype=torch.float32)
    monkeypatch.setattr(objective, "logits", lambda images: scores)
    labels = torch.tensor([1, 3])
    batch = {"image": ours, "label": labels, "label_other": labels[other], "mix_weight": torch.full((2,), weight)}
    assert_close(objective(batch)["loss"], SoftTargetCrossEntropy()(scores, target))


def test_a_box_is_timms_for_the_same_place_and_each_batch_has_one_of_both(monkeypatch):
    for y, x, weight in ((0, 0, 0.4), (11, 9, 0.7), (23, 19, 0.05)):
        rng: Any = SimpleNamespace(integers=Mock(side_effect=[y, x]))
        ours = cut_out(24, 20, weight, rng)
        monkeypatch.setattr(np.random, "randint", Mock(side_effect=[np.int64(y), np.int64(x)]))
        box, left = timm_mixup.cutmix_bbox_and_lam((2, 3, 24, 20), weight)
        assert ours.box == tuple(map(int, box)) and ours.weight == pytest.approx(left)
    rng = np.random.default_rng(0)
    draws = [drawn(AugmentConfig(), 32, 32, rng) for _ in range(300)]
    assert 0.4 < sum(d.box is not None for d in draws) / 300 < 0.6
    assert drawn(AugmentConfig(mixup=0, cutmix=0), 32, 32, rng) == Draw(1.0, None)


def test_a_batch_does_not_depend_on_the_number_of_ranks_nor_on_the_batches_before(labelled_path):
    cfg = override(DEBUG, [f"data.shards={labelled_path}", "augment.cutmix=1", "augment.erase=0.5"])
    shards = open_shards(cfg.data)

    def rows(step: int, world: int) -> dict[str, tuple[bytes, int, int, float]]:
        found = {}
        for rank in range(world):
            batch: Any = finetune.dataset(cfg, shards, NONE, Part(rank, world))[step]
            parts = zip(batch["keys"], batch["image"], batch["label"], batch["label_other"], batch["mix_weight"],
                        strict=True)  # fmt: skip
            found |= {k: (i.numpy().tobytes(), int(a), int(b), float(w)) for k, i, a, b, w in parts}
        return found

    alone = rows(7, 1)
    assert alone == rows(7, 2) and len(alone) == 16
    assert len({row[3] for row in alone.values()}) == 1


# ------------------------------------------------------------------------------------------------------------ objective


def test_label_smoothing_is_timms():
    scores, labels = torch.randn(5, 9), torch.tensor([0, 8, 3, 3, 1])
    objective = built(small("classes=9", "smoothing=0.2"))
    objective.logits = lambda images: scores  # type: ignore[method-assign]
    image = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
    assert_close(
        objective({"image": image, "label": labels})["loss"],
        LabelSmoothingCrossEntropy(0.2)(scores, labels),  # type: ignore[arg-type]
    )


def mae_layer(name: str, depth: int) -> int:
    """recipes §9.4: layer 0 patch, class token and positions; block i is i + 1; the rest depth + 1."""
    parts = name.removeprefix("backbone.").split(".")
    if parts[0] in ("patch_embed", "cls_token", "pos_embed"):
        return 0
    return int(parts[1]) + 1 if parts[0] == "blocks" else depth + 1


@pytest.mark.parametrize("preset", ["mae_b16", "mae_l16_last4"])
def test_learning_rates_and_weight_decay_are_maes(preset):
    cfg = override(PRESETS[preset], ["classes=10"])
    objective: Any = on_meta(lambda: finetune.objective(cfg, NONE), torch.float32)
    names = {id(p): n for n, p in objective.named_parameters()}
    depth, decay = len(objective.backbone.blocks), cfg.optim.layer_decay
    groups = optim.groups(objective, finetune.param_rules(cfg), cfg.optim.peak_lr, cfg.optim.weight_decay)
    trained = {names[id(p)]: g for g in groups for p in g["params"]}
    for name, group in trained.items():
        assert group["lr_scale"] == pytest.approx(decay ** (depth + 1 - mae_layer(name, depth))), name
        param = objective.get_parameter(name)
        bare = param.ndim == 1 or name.endswith(("cls_token", "pos_embed"))
        assert group["weight_decay"] == (0 if bare else 0.05), name
    frozen = {n for n in names.values() if n not in trained}
    first = depth - 4 if preset.endswith("last4") else 0
    assert frozen == {n for n in names.values() if first and mae_layer(n, depth) <= first}


PARTS = {  # of two blocks: what of the trunk is trained
    "all": ("patch_embed", "cls_token", "pos_embed", "blocks.0", "blocks.1", "norm"),
    "last 2": ("blocks.0", "blocks.1", "norm"),
    "last 1": ("blocks.1", "norm"),
    "half": ("blocks.1.mlp", "norm"),
    "none": (),
}


@pytest.mark.parametrize("trainable", PARTS)
def test_only_what_is_to_be_trained_changes_and_the_rest_takes_part_in_no_backward_pass(trainable):
    cfg = small(f"trainable={trainable}", "head_std=0.1", "model.pool=mean_norm", "model.drop_path=0.3")
    objective = built(cfg)
    adam = torch.optim.AdamW(optim.groups(objective, finetune.param_rules(cfg), 1e-2, 0.05))
    before = {n: p.detach().clone() for n, p in objective.named_parameters()}
    seen = []
    objective.backbone.blocks[0].register_forward_hook(lambda module, given, out: seen.append(out.requires_grad))
    image = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    objective({"image": image, "label": torch.arange(6) % 4})["loss"].backward()  # type: ignore[arg-type]
    adam.step()
    changed = {n for n, p in objective.named_parameters() if not torch.equal(p, before[n])}
    parts = tuple(f"backbone.{part}" for part in PARTS[trainable])
    wanted = {n for n in before if n.startswith("head.") or n.startswith(parts)}
    if trainable != "none":
        wanted -= {"backbone.cls_token", "backbone.norm.bias"} - changed  # whose gradients may vanish
    assert {n for n in changed if n.startswith("backbone.")} <= wanted and changed >= {
        n for n in wanted if n.endswith("weight") and "norm" not in n
    }
    assert seen == [trainable in ("all", "last 2")]
    assert objective.backbone.blocks[0].training == (trainable in ("all", "last 2"))
    shares = finetune.cost(cfg)
    assert shares.forward == finetune.cost(small()).forward
    assert (shares.frozen == 0) == (trainable == "all")


def test_parts_that_cannot_be_trained_are_refused():
    for wrong in ("last 3", "last 0", "last", "some"):
        with pytest.raises(ConfigError, match=r"write all, none \(the head alone\), half"):
            frozen_patterns(wrong, 2, "backbone.")


def test_a_norm_of_all_tokens_is_not_taken_for_that_of_their_mean(tmp_path):
    release = mae_release(tmp_path / "release", VARIANTS["atto"])
    cfg = small("model.pool=mean_norm", "model.image_size=48")
    tower = built(cfg).backbone
    handover = load_backbone(tower, release, _dense)
    assert "norm.weight" in handover.dropped and (tower.norm.weight == 1).all()  # type: ignore[union-attr]
    assert "4 x 4 to 6 x 6" in handover.adapted["pos_embed"]
    x = torch.randn(2, 3, 48, 48)
    tokens = tower.eval()(x)
    mean = torch.nn.functional.layer_norm(tokens[:, 1:].mean(1), (32,), eps=1e-6)
    assert_close(tower.pooled(tokens), mean)
    assert_close(tower.pooled(tokens, "cls"), tower.norm(tokens)[:, 0])


# ---------------------------------------------------------------------------------------------------------------- stage


def test_pictures_with_several_labels_and_impossible_settings_are_refused(shards, labelled_path, tmp_path):
    with pytest.raises(ConfigError, match=r"have several labels, .* `python -m eval shards"):
        finetune.prepare(DEBUG, shards, tmp_path)
    labelled = ShardSet.open(labelled_path)
    assert finetune.prepare(DEBUG, labelled, tmp_path).classes == 4
    for setting, said in (
        ("trainable=last 1", "freezes random values; add --init-from"), ("smoothing=1", "smoothing=1.0 must"),
        ("augment.erase=2", "augment.erase=2.0 must"), ("crop=2", "crop=2.0 must"), ("head_std=-1", "head_std=-1.0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            finetune.prepare(override(DEBUG, [setting]), labelled, tmp_path)
    alone = override(DEBUG, [f"data.shards={labelled_path}", "data.streams=4", "optim.batch_size=4"])
    with pytest.raises(ConfigError, match="need two samples of a stream"):
        finetune.dataset(alone, labelled, NONE, Part())


def test_evaluation_sees_pictures_as_maes_and_maws_classifiers_do():
    def seen(name: str, *settings: str) -> tuple[int, int, bool]:
        made = finetune.preprocess(override(PRESETS[name], settings))
        return made.image_size, made.resize, made.squash

    assert seen("mae_b16") == (224, 256, False)
    assert seen("mae_h14_448") == (448, 0, False)
    assert seen("vit_b16_512") == (512, 0, True) and seen("vit_h14_518") == (518, 0, True)
    assert seen("vit_b16_512", "squash=no", "crop=0.875") == (512, 585, False)


def test_the_presets_hold_the_recipes_numbers():
    rows = {  # recipes §9.4: base lr, layer-wise decay, epochs, drop path
        "mae_b16": (5e-4, 0.65, 100, 0.1), "mae_l16": (1e-3, 0.75, 50, 0.2), "mae_h14": (1e-3, 0.75, 50, 0.3),
        "scratch_b16": (1e-4, 1, 300, 0.1), "scratch_l16": (1e-4, 1, 200, 0.2), "scratch_h14": (1e-4, 1, 200, 0.2),
    }  # fmt: skip
    for name, row in rows.items():
        cfg = PRESETS[name]
        assert (cfg.optim.lr, cfg.optim.layer_decay, cfg.optim.length.value, cfg.model.drop_path) == row
        assert cfg.optim.peak_lr == pytest.approx(row[0] * cfg.optim.batch_size / 256)
        assert (cfg.augment, cfg.smoothing, cfg.data.crop_scale) == (AugmentConfig(), 0.1, (0.08, 1.0))
    mae, scratch = PRESETS["mae_b16"], PRESETS["scratch_b16"]
    assert (mae.optim.betas, mae.optim.weight_decay, mae.optim.batch_size) == ((0.9, 0.999), 0.05, 1024)
    assert (mae.model.pool, mae.head_std, mae.optim.ema, mae.optim.clip) == ("mean_norm", 2e-5, 0, 0)
    assert (scratch.optim.betas, scratch.optim.weight_decay, scratch.optim.batch_size) == ((0.9, 0.95), 0.3, 4096)
    assert (str(mae.optim.warmup), str(scratch.optim.warmup), scratch.optim.ema) == ("5 epochs", "20 epochs", 0.9999)


def test_the_learning_rate_falls_to_min_lr_as_in_maes_code():
    cfg = PRESETS["mae_b16"].optim
    peak, schedule = cfg.peak_lr, schedule_of(cfg, 5, 105, 0)
    for step in (5, 30, 104):
        want = 1e-6 + (peak - 1e-6) * 0.5 * (1 + np.cos(np.pi * (step - 5) / 100))
        assert peak * schedule(step) == pytest.approx(want)
    assert schedule(2) == pytest.approx(0.4)
    with pytest.raises(ConfigError, match="less than the learning rate"):
        schedule_of(override(PRESETS["debug"], ["optim.min_lr=1"]).optim, 5, 105, 0)


def test_two_ranks_probe_each_picture_once_and_have_the_gradients_of_one_process(labelled_path, tmp_path):
    """31 pictures on two ranks: one of them is padded. Parts of the tower are frozen, under ZeRO-3."""
    found = run_ranks("test_finetune", "on_two_ranks", tmp_path, shards=str(labelled_path))
    cfg = probed(str(labelled_path))
    objective, shards = built(cfg).eval(), open_shards(cfg.data)
    hits = []
    for choice in probe.choose(shards, 31, {i: i for i in range(4)}):
        image = finetune.preprocess(cfg)(decode(shards.image_bytes(choice.shard, choice.row)))
        with torch.no_grad():
            hits.append(int(objective.logits(normalise(image[None], MEAN, STD)).argmax()) == choice.synsets[0])
    assert found[0] == found[1]
    assert found[0]["top1"] == pytest.approx(sum(hits) / 31, abs=1e-4) and 0 < sum(hits) < 31
    for part in PARTS:
        objective = built(override(cfg, [f"trainable={part}"]))
        groups = optim.groups(objective, finetune.param_rules(override(cfg, [f"trainable={part}"])), 1.0, 0.0)
        objective(fixed_batch())["loss"].backward()
        norm = torch.stack([p.grad.norm() for g in groups for p in g["params"] if p.grad is not None]).norm()
        assert found[0][part] == pytest.approx(float(norm), rel=1e-4), part


def probed(shards: str) -> finetune.Config:
    return small(f"data.shards={shards}", "probe.every=1 steps", "probe.queries=31", "head_std=0.5",
                 "model.pool=mean_norm")  # fmt: skip


def fixed_batch() -> Any:
    """The same on every rank."""
    image = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"image": image, "label": torch.arange(8) % 4}


def on_two_ranks(shards: str) -> dict[str, float]:
    """Runs on the ranks: the probe's accuracy, and the norm of the gradient for each part that can be trained."""
    from maws import dist
    from maws.engine import Runtime

    base, found = probed(shards), {}
    opened, runtime = open_shards(base.data), Runtime(base.engine, base.optim)
    for part in PARTS:
        cfg = override(base, [f"trainable={part}"])
        with runtime.partitioned():
            objective = finetune.objective(cfg, opened)
        fill(objective, objective.init_rules(), 0, runtime.gather, writer=dist.rank() == 0)
        made = finetune.probe(objective, cfg, opened, NONE, Part(dist.rank(), dist.world_size()))
        engine = runtime.build(objective, optim.groups(objective, finetune.param_rules(cfg), 1e-3, 0.0), cfg.optim)
        if not found:
            assert made is not None
            found["top1"] = made(engine)["probe/top1"]
        engine.step(fixed_batch())
        found[part] = engine.grad_norm()
        engine.close()
    return found
