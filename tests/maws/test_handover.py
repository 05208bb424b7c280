import json
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from reference import encoder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from maws.checkpoint import CheckpointError
from maws.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ConfigError,
    Duration,
    EngineConfig,
    HandoverConfig,
    OptimConfig,
)
from maws.data.transforms import Preprocess
from maws.handover import fixed_images, load_backbone
from maws.models import init
from maws.models.mae import DecoderShape, MaskedAutoencoder
from maws.models.pos_embed import relative_index
from maws.models.text import TEXT_VARIANTS, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import Shape, VisionTransformer
from maws.objectives.contrastive import Contrastive
from maws.objectives.multi_label import MultiLabel
from maws.release import Release, open_release
from maws.tower_file import Fit, TowerFile, reference_tokens

SHAPE = Shape(patch=8, depth=2, width=32, heads=2, image=32)


def no_gather(params):
    return init._dense(params)


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Values that are all different from each other: zeros and ones would hide a tensor that was not taken."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator) + (p.ndim == 1))
    return module.eval()


def write(folder: Path, module: nn.Module, shape: Shape, stage: str = "mae", image_size: int = 32) -> Release:
    """A release folder with what the handover reads."""
    folder.mkdir(parents=True)
    weights = {n: p.detach().contiguous() for n, p in module.named_parameters()}
    save_file(weights, folder / "model.safetensors")
    model = {"model": asdict(shape), "image_size": image_size, "variant": "atto"}
    (folder / "config.json").write_text(json.dumps({"format": 1, "stage": stage, "lineage": [stage], **model}))
    preprocess = Preprocess(image_size, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    (folder / "preprocess.json").write_text(json.dumps(preprocess.to_json()))
    return open_release(folder)


def mae_release(folder: Path, shape: Shape = SHAPE, stage: str = "mae") -> tuple[Release, MaskedAutoencoder]:
    mae = MaskedAutoencoder(shape, 32, DecoderShape(16, 1, 2))
    shaken(mae)
    return write(folder, mae, shape, stage), mae


def multi_label(shape: Shape = SHAPE, image_size: int = 32, synsets: int = 11) -> MultiLabel:
    objective = MultiLabel(VisionTransformer(shape, image_size), synsets, IMAGENET_MEAN, IMAGENET_STD, chunk=4)
    shaken(objective, seed=1)
    return objective


class PlainEngine:
    """What the handover asks of the engine, without DeepSpeed."""

    def __init__(self, objective: nn.Module) -> None:
        self.objective, self.device, self.runtime = objective, torch.device("cpu"), SimpleNamespace(precision="fp32")

    @torch.no_grad()
    def inside(self, module: nn.Module, function) -> Tensor:
        return function()


def bias_of(tower: VisionTransformer) -> Tensor | None:
    """heads T T of relative positions, in float64."""
    if tower.rel_pos_bias is None:
        return None
    table = tower.rel_pos_bias.relative_position_bias_table.double()
    return table[relative_index(tower.grid, tower.class_tokens)].permute(2, 0, 1)


@pytest.mark.parametrize(
    "changes", [{}, {"class_tokens": 0, "pool": "mean"}, {"class_tokens": 3}, {"positions": "relative"}]
)
def test_tokens_streamed_from_a_release_are_those_of_the_model_written_out_in_loops(changes, tmp_path):
    shape = replace(SHAPE, image=16, **changes)
    tower = VisionTransformer(shape, 16)
    release = write(tmp_path / "release", shaken(tower), shape, image_size=16)
    images = fixed_images(16)
    with TowerFile(release) as file, torch.no_grad():
        got = reference_tokens(file, images, Fit(shape, tower.grid))
        state = {n: p.double() for n, p in tower.named_parameters()}
        want = torch.stack([encoder(state, image.double(), 8, 2, bias=bias_of(tower)) for image in images])
    assert_close(got.double(), want, rtol=0, atol=1e-5)  # float32 against float64
    assert_close(got, tower(images), rtol=0, atol=1e-5)


def test_a_release_is_streamed_with_one_block_in_memory(tmp_path, monkeypatch):
    shape = replace(SHAPE, depth=6)
    tower = VisionTransformer(shape, 32)
    release = write(tmp_path / "release", shaken(tower), shape)
    read, held, most = TowerFile.read, [], 0

    def watched(self, name: str, fit: Fit | None = None) -> Tensor:
        nonlocal most
        value = read(self, name, fit)
        held.append(weakref.ref(value))
        most = max(most, sum(t.numel() for t in (ref() for ref in held) if t is not None))
        return value

    monkeypatch.setattr(TowerFile, "read", watched)
    with TowerFile(release) as file:
        reference_tokens(file, fixed_images(32), Fit(shape, tower.grid))
    block = sum(p.numel() for p in tower.blocks[0].parameters())
    assert block <= most <= 2 * block  # the next is read while the last one is let go


def test_the_report_says_what_is_taken_dropped_and_new(tmp_path):
    release, mae = mae_release(tmp_path / "mae")
    objective = multi_label()
    head = [p.clone() for p in objective.head.parameters()]
    handover = load_backbone(objective.backbone, release, no_gather)
    report = handover.report(objective)
    encoder_names = {n for n, _ in objective.backbone.named_parameters()}
    decoder_names = {n for n, _ in mae.named_parameters()} - encoder_names
    assert set(report["taken"]["names"]) == encoder_names
    assert set(report["dropped"]["names"]) == decoder_names
    assert report["new"]["names"] == ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]
    assert report["taken"]["patterns"]["blocks.*.attn.qkv"] == 4  # weight and bias of two blocks
    assert report["new"]["patterns"] == {"head.0": 2, "head.2": 2}
    assert sum(report["dropped"]["patterns"].values()) == report["dropped"]["tensors"] == len(decoder_names)
    for name, param in objective.backbone.named_parameters():
        assert torch.equal(param, mae.get_parameter(name))
    assert all(torch.equal(a, b) for a, b in zip(head, objective.head.parameters(), strict=True))


def test_the_image_tower_of_a_lit_release_is_found_under_its_own_names(tmp_path):
    towers = TwoTower(VisionTransformer(SHAPE, 32), TextTower(TEXT_VARIANTS["atto"]), 24)
    release = write(tmp_path / "lit", shaken(towers), SHAPE, "lit")
    objective = multi_label()
    handover = load_backbone(objective.backbone, release, no_gather)
    for name, param in objective.backbone.named_parameters():
        assert torch.equal(param, towers.image.get_parameter(name))
    assert all(n.startswith("text") or n in ("vision_projection", "logit_scale") for n in handover.dropped)
    handover.verify(PlainEngine(objective), tmp_path)


@pytest.mark.parametrize("align_corners", [False, True])
def test_positions_are_resized_as_asked_and_class_tokens_keep_theirs(align_corners, tmp_path):
    shape = replace(SHAPE, class_tokens=2)
    release, mae = mae_release(tmp_path / "mae", shape)
    objective = multi_label(shape, image_size=48)
    handover = load_backbone(objective.backbone, release, no_gather, HandoverConfig(align_corners=align_corners))
    old, new = mae.pos_embed[0], objective.backbone.pos_embed[0]
    assert torch.equal(new[:2], old[:2])
    picture = old[2:].T.reshape(1, 32, 4, 4)
    want = F.interpolate(picture, size=(6, 6), mode="bicubic", align_corners=align_corners)
    assert_close(new[2:], want[0].reshape(32, 36).T)
    assert handover.adapted == {"pos_embed": f"4 x 4 to 6 x 6 patches, bicubic, align_corners={align_corners}"}
    handover.verify(PlainEngine(objective), tmp_path)


@pytest.mark.parametrize("method", ["bicubic", "pinv"])
def test_a_patch_kernel_is_resampled_only_when_asked(method, tmp_path):
    release, mae = mae_release(tmp_path / "mae")
    objective = multi_label(replace(SHAPE, patch=16), image_size=64)  # the same grid
    with pytest.raises(CheckpointError, match=r"handover\.patch=bicubic or pinv"):
        load_backbone(objective.backbone, release, no_gather)
    handover = load_backbone(objective.backbone, release, no_gather, HandoverConfig(patch=method))
    old, new = mae.patch_embed.proj.weight, objective.backbone.patch_embed.proj.weight
    small = torch.randn(5, 3, 8, 8)
    large = F.interpolate(small, size=(16, 16), mode="bicubic", antialias=True)
    if method == "pinv":  # it answers to an enlarged patch as the old one to the patch
        assert_close(torch.einsum("bchw,dchw->bd", large, new), torch.einsum("bchw,dchw->bd", small, old))
    else:
        assert_close(new, F.interpolate(old, size=(16, 16), mode="bicubic"))
    assert handover.adapted == {"patch_embed.proj.weight": f"8 to 16 px, {method}"}
    handover.verify(PlainEngine(objective), tmp_path)


@pytest.mark.parametrize(
    ("changes", "image_size", "message"),
    [
        ({"class_tokens": 8}, 32, "1 class token.s., this model 8.*set model.class_tokens=1"),
        ({"heads": 4}, 32, "heads 2 there and 4 here: choose the model.variant"),
        ({"depth": 1, "width": 64}, 32, "depth 2 there and 1 here, width 32 there and 64 here"),
        ({"positions": "relative"}, 32, "set model.positions=sincos"),
    ],
)
def test_what_cannot_be_handed_over_is_refused_with_the_reason(changes, image_size, message, tmp_path):
    release, _ = mae_release(tmp_path / "mae")
    objective = multi_label(replace(SHAPE, **changes), image_size)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(objective.backbone, release, no_gather)


def test_relative_positions_of_another_grid_are_refused(tmp_path):
    shape = replace(SHAPE, positions="relative")
    release = write(tmp_path / "release", shaken(VisionTransformer(shape, 32)), shape)
    with pytest.raises(CheckpointError, match=r"4 x 4 patches, this model has 6 x 6, and only position tables"):
        load_backbone(multi_label(shape, 48).backbone, release, no_gather)


def test_a_release_that_lacks_a_tensor_or_is_damaged_is_refused(tmp_path):
    release, mae = mae_release(tmp_path / "mae")
    weights = {n: p.detach() for n, p in mae.named_parameters() if n != "blocks.1.norm2.weight"}
    save_file(weights, release.weights)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.norm2\.weight is missing there"):
        load_backbone(multi_label().backbone, release, no_gather)
    save_file(weights | {"blocks.1.norm2.weight": torch.ones(31)}, release.weights)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.norm2\.weight is \(31,\) there and \(32,\) here"):
        load_backbone(multi_label().backbone, release, no_gather)
    save_file(weights | {"blocks.1.norm2.weight": torch.ones(32), "pos_embed": torch.ones(1, 5, 32)}, release.weights)
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json: a position table of 5 rows"):
        load_backbone(multi_label().backbone, release, no_gather)
    release.weights.write_bytes(release.weights.read_bytes()[:999])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_backbone(multi_label().backbone, release, no_gather)


def test_an_unknown_way_of_resampling_is_refused(tmp_path):
    release, _ = mae_release(tmp_path / "mae")
    with pytest.raises(ConfigError, match="use refuse, bicubic or pinv"):
        load_backbone(multi_label().backbone, release, no_gather, HandoverConfig(patch="nearest"))


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc2.bias", "pos_embed", "cls_token", "norm.weight"])
def test_a_corrupted_handover_is_refused_and_recorded(name, tmp_path):
    release, _ = mae_release(tmp_path / "mae")
    objective = multi_label()
    handover = load_backbone(objective.backbone, release, no_gather)
    handover.verify(PlainEngine(objective), tmp_path)
    good = json.loads((tmp_path / "handover.json").read_text())["parity"]
    assert good["difference"] < 1e-5
    with torch.no_grad():
        objective.backbone.get_parameter(name).flatten()[3] += 0.5
    with pytest.raises(CheckpointError, match="is not the one in"):
        handover.verify(PlainEngine(objective), tmp_path)
    bad = json.loads((tmp_path / "handover.json").read_text())["parity"]
    assert bad["difference"] > bad["tolerance"] == 1e-4
    with torch.no_grad():
        objective.backbone.get_parameter(name).fill_(torch.nan)
    with pytest.raises(CheckpointError, match="differ by nan"):
        handover.verify(PlainEngine(objective), tmp_path)


# On two ranks, with every parameter partitioned: nothing is small enough to be kept whole.


def test_on_two_ranks_towers_arrive_and_the_chunked_loss_is_the_dense_one(tmp_path):
    ds_config = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3_cpu.json").read_text())
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(ds_config))
    mae_release(tmp_path / "lc_mae", stage="lc_mae")
    both = run_ranks("test_handover", "on_this_rank", tmp_path, folder_name=str(tmp_path))
    for found in both:
        assert found["lit"] < 1e-5
        assert found["wsp"] < 1e-5
        assert found["loss"] < 1e-6
        assert found["gradients"] < 1e-6
        assert found["smallest gradient"] > 1e-4  # there was something to compare
        assert "is not the one in" in found["refusal"]


def on_this_rank(folder_name: str) -> dict[str, object]:
    """A frozen tower handed to LiT and a trained one to WSP; WSP's loss and gradients; and a damaged partition."""
    from maws.engine import Runtime

    folder = Path(folder_name)
    optim = OptimConfig(batch_size=6, lr=1.0, length=Duration(1, "steps"))
    runtime = Runtime(EngineConfig(ds_config=str(folder / "zero3.json")), optim)
    release, found = open_release(folder / "lc_mae"), {}
    with runtime.partitioned():
        towers = TwoTower(VisionTransformer(SHAPE, 32), TextTower(TEXT_VARIANTS["atto"]), 24)
        lit, wsp = Contrastive(towers, IMAGENET_MEAN, IMAGENET_STD), objective_of_two_ranks()
    for name, objective, tower in (("lit", lit, towers.image), ("wsp", wsp, wsp.backbone)):
        init.fill(objective, objective.init_rules(), 0, runtime.gather, torch.distributed.get_rank() == 0)
        if name == "wsp":
            start_last_layer(objective, runtime.gather)
        handover = load_backbone(tower, release, runtime.gather)
        towers.image.requires_grad_(False)
        groups = [{"params": [p for p in objective.parameters() if p.requires_grad], "lr": 1.0, "lr_scale": 1.0}]
        engine = runtime.build(objective, groups, optim)
        handover.verify(engine, folder)
        torch.distributed.barrier()  # rank 0 has written
        found[name] = json.loads((folder / "handover.json").read_text())["parity"]["difference"]
        torch.distributed.barrier()
    found |= compared_with_dense(engine, release)
    if torch.distributed.get_rank() == 1:
        wsp.backbone.blocks[1].mlp.fc1.weight.ds_tensor.mul_(1.01)
    try:
        handover.verify(engine, folder)
    except CheckpointError as e:
        found["refusal"] = str(e)
    return found


def objective_of_two_ranks() -> MultiLabel:
    return MultiLabel(VisionTransformer(SHAPE, 32), 11, IMAGENET_MEAN, IMAGENET_STD, chunk=4)


def start_last_layer(objective: MultiLabel, gather: init.Gather) -> None:
    """It starts at zero, and then no gradient reaches the trunk."""
    weight = objective.head[2].weight
    with gather([weight]), torch.no_grad():
        weight.copy_(torch.randn(11, 32, generator=torch.Generator().manual_seed(4)))


def compared_with_dense(engine, release: Release) -> dict[str, object]:
    """Loss and gradients of this rank's three images of six through the engine, and of all six in plain torch."""
    from deepspeed.utils import safe_get_full_grad

    rank, generator = torch.distributed.get_rank(), torch.Generator().manual_seed(5)
    dense = objective_of_two_ranks()
    init.fill(dense, dense.init_rules(), 0)
    start_last_layer(dense, no_gather)
    dense.backbone.load_state_dict(
        {n: p for n, p in load_file(release.weights).items() if "decoder" not in n and n != "mask_token"}
    )
    batch = {
        "image": torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "synset_ids": torch.tensor([[4, -1, -1], [0, 2, 6], [10, 3, -1], [5, -1, 9], [1, 7, 8], [8, -1, -1]]),
    }
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = (batch["image"].float() / 255 - mean) / std
    target = torch.zeros(6, 11)
    for row, ids in enumerate(batch["synset_ids"].tolist()):
        present = [i for i in ids if i >= 0]
        target[row, present] = 1 / len(present)
    each = F.cross_entropy(dense.logits(x), target, reduction="none")
    each.mean().backward()

    engine._engine.train()
    loss = engine._engine({k: v[3 * rank : 3 * rank + 3] for k, v in batch.items()})["loss"]
    engine._engine.backward(loss)
    far, sizes = 0.0, []
    for (_, p), (_, q) in zip(engine.objective.named_parameters(), dense.named_parameters(), strict=True):
        far = max(far, float((safe_get_full_grad(p) - q.grad).abs().max() / q.grad.abs().max().clamp(min=1)))
        sizes.append(float(q.grad.abs().max()))
    own = float((loss - each[3 * rank : 3 * rank + 3].mean()).abs())
    return {"loss": own, "gradients": far, "smallest gradient": min(sizes)}
