"""SimMIM against a slow re-computation with the modules of the paper: a convolution and pixel shuffle."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from maws import optim, schedule
from maws.config import Duration, OptimConfig, override
from maws.data.masks import make_mask
from maws.models import init
from maws.models.simmim import CutNormal, SimMIM
from maws.models.vit import VARIANTS, VisionTransformer, normalise
from maws.objectives.simmim import MaskedPixelsL1
from maws.stages import grid_of, lc_mae, simmim
from maws.trainer import Plan

SHAPE = replace(VARIANTS["atto"], positions="relative")
B, N, K = 3, 16, 6


@pytest.fixture
def model() -> SimMIM:
    torch.manual_seed(0)
    model = SimMIM(SHAPE, 32)
    init.fill(model, model.init_rules(), seed=3)
    nn.init.normal_(model.rel_pos_bias.relative_position_bias_table, std=0.5)  # type: ignore[union-attr]
    nn.init.normal_(model.mask_token)
    return model.double()


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (B, 3, 32, 32), generator=g, dtype=torch.uint8)
    return {"image": image, "ids_shuffle": torch.stack([torch.randperm(N, generator=g) for _ in range(B)])}


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def test_the_loss_is_the_papers_with_a_convolution_and_pixel_shuffle(model):
    images, ids = normalise(batch()["image"], MEAN, STD).double(), batch()["ids_shuffle"]
    mask = torch.ones(B, 4, 4, dtype=torch.float64)  # 1 = masked
    tokens = model.patch_embed(images).clone()
    for b in range(B):
        for patch in ids[b, :K].tolist():
            mask[b, patch // 4, patch % 4] = 0
        for patch in ids[b, K:].tolist():
            tokens[b, patch] = model.mask_token[0, 0]
    x = torch.cat([model.cls_token.expand(B, 1, -1), tokens], dim=1)
    bias = model.rel_pos_bias()
    for block in model.blocks:
        y, (d, h) = block.norm1(x), (32, 2)
        q, k, v = block.attn.qkv(y).view(B, 1 + N, 3, h, d // h).unbind(2)
        logits = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(d // h) + bias
        y = torch.einsum("bhts,bshd->bthd", logits.softmax(-1), v).reshape(B, 1 + N, d)
        x = x + block.attn.proj(y)
        x = x + block.mlp(block.norm2(x))
    grid = model.norm(x)[:, 1:].transpose(1, 2).reshape(B, 32, 4, 4)
    convolution = nn.Conv2d(32, 3 * 8 * 8, kernel_size=1).double()
    with torch.no_grad():
        convolution.weight.copy_(model.decoder_pred.weight[..., None, None])
        convolution.bias.copy_(model.decoder_pred.bias)  # type: ignore[union-attr]
    whole = nn.PixelShuffle(8)(convolution(grid))  # B 3 H W
    hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]  # B 1 H W
    want = ((images - whole).abs() * hidden).sum() / (hidden.sum() + 1e-5) / 3
    got = MaskedPixelsL1(model, K, MEAN, STD)(batch())["loss"]  # type: ignore[arg-type]
    assert got.item() == pytest.approx(want.item(), abs=1e-6)


def test_hidden_pixels_change_no_token(model):
    images, ids = normalise(batch()["image"], MEAN, STD).double(), batch()["ids_shuffle"]
    other = images.clone()
    for b in range(B):
        for patch in ids[b, K:].tolist():
            row, col = divmod(patch, 4)
            other[b, :, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8] += 7
    assert torch.equal(model.encode(images, ids, K), model.encode(other, ids, K))
    ids_all = torch.arange(N).expand(B, N)
    assert_close(model.encode(images, ids_all, N), VisionTransformer.forward(model, images))


def test_the_papers_mask_hides_30_of_49_squares_of_32_pixels():
    cfg = simmim.PRESETS["vit_b16"]
    grid, rng = grid_of(cfg.model), np.random.default_rng(0)
    keep = cfg.mask.keep(grid)
    assert 196 - keep == 30 * 4 == 4 * math.ceil(0.6 * 49)
    seen = np.zeros(196, int)
    seen[make_mask(cfg.mask, rng, grid)[:keep]] = 1
    squares = seen.reshape(7, 2, 7, 2).transpose(0, 2, 1, 3).reshape(49, 4)
    assert sorted(squares.sum(1).tolist()) == [0] * 30 + [4] * 19


def test_initial_values_are_cut_normals_and_the_blocks_outputs_get_smaller_with_depth():
    draw = CutNormal(0.02).draw(torch.Size([200, 300]), torch.Generator().manual_seed(0))
    assert float(draw.abs().max()) <= 0.02
    assert float(draw.std()) == pytest.approx(CutNormal(0.02).std(draw.shape), rel=0.02)
    rules = SimMIM(SHAPE, 32).init_rules()
    assert init.formula("blocks.1.mlp.fc2.weight", rules) == CutNormal(0.02 / math.sqrt(4))
    assert init.formula("mask_token", rules) == init.formula("blocks.1.attn.qkv.weight", rules) == CutNormal(0.02)


def test_the_learning_rate_starts_small_and_drops_at_epoch_700():
    cfg = simmim.PRESETS["vit_b16"]
    plan = Plan.of(cfg, steps_per_epoch=50)
    rate = [cfg.optim.peak_lr * plan.schedule(cfg.optim)(step) for step in (0, 250, 500, 34_999, 35_000, 39_999)]
    peak = 1e-4 * 2048 / 512
    assert rate == pytest.approx([peak * 0.005, peak * 0.5025, peak, peak, peak / 10, peak / 10])
    short = OptimConfig(
        batch_size=1, lr=1.0, schedule="multistep", milestone=Duration(5, "steps"), length=Duration(9, "steps")
    )
    with pytest.raises(Exception, match="within the 6 steps of warm-up"):
        schedule.schedule_of(short, warmup=6, total=9, milestone=5)
    with pytest.raises(Exception, match="did you mean cosine"):
        schedule.schedule_of(override(short, ["schedule=cosin"]), 1, 9, 5)
    for rate in ("0", "-1", "nan"):
        with pytest.raises(Exception, match="give a learning rate above 0"):
            schedule.schedule_of(override(short, [f"lr={rate}"]), 1, 9, 5)


@pytest.mark.parametrize("name", ["vit_b16", "vit_b16_100ep", "demo"])
def test_presets_build_and_every_parameter_has_a_value_and_a_rule(name):
    cfg = simmim.prepare(simmim.PRESETS[name], None, None)  # type: ignore[arg-type]
    with torch.device("meta"):
        objective = simmim.objective(cfg, None)  # type: ignore[arg-type]
    optim.groups(objective, simmim.param_rules(cfg), 1.0, 0.05)
    assert all(p.requires_grad for p in objective.parameters())
    assert all(init.formula(n, objective.init_rules()) for n, _ in objective.named_parameters())
    assert not hasattr(objective.model, "pos_embed") or objective.model.pos_embed is None


def test_lc_simmim_pools_the_positions_that_it_saw():
    settings = ["mim=simmim", "model.positions=relative", "guidance.hidden=12", "mask.ratio=0.6"]
    objective = lc_mae.objective(override(lc_mae.PRESETS["debug"], settings), None)  # type: ignore[arg-type]
    init.fill(objective, objective.init_rules(), seed=3)
    objective.double().train()
    images, ids = normalise(batch()["image"], MEAN, STD).double(), batch()["ids_shuffle"]
    assert objective.keep == K
    tokens, prediction = objective.online.encoder(images, ids, K, 2)
    whole = SimMIM.encode(objective.online.encoder, images, ids, K)  # type: ignore[arg-type]
    for b in range(B):
        mean = sum(whole[b, 1 + patch] for patch in ids[b, :K].tolist()) / K
        assert_close(objective.online.encoder.pooled(tokens, "mean")[b], mean)
    assert prediction.shape == (2, N - K, 192)
    losses = objective(batch() | {"image_other": batch()["image"].flip(0)})  # type: ignore[arg-type]
    alone = MaskedPixelsL1(objective.online.encoder, K, objective.mean, objective.std)  # type: ignore[arg-type]
    alone.model.forward = lambda *a: SimMIM.forward(objective.online.encoder, *a)  # type: ignore[arg-type, method-assign]
    assert losses["reconstruction"].item() == pytest.approx(alone(batch())["loss"].item(), abs=1e-6)  # type: ignore[arg-type]
