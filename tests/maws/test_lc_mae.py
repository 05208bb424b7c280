"""LC-MAE's objective against a slow re-computation, and its presets against the paper's tables."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from maws import optim
from maws.config import ConfigError, flatten, override, to_json
from maws.data.order import Part
from maws.data.views import DISTORTED, SIMPLE
from maws.models import init
from maws.models.mae import MaskedAutoencoder
from maws.models.vit import VisionTransformer, normalise
from maws.momentum import MomentumTarget
from maws.objectives import similarity
from maws.objectives.momentum_guidance import MomentumGuidance
from maws.stages import lc_mae

DEBUG = lc_mae.PRESETS["debug"]
B, N, K = 5, 16, 4


def build(*settings: str) -> MomentumGuidance:
    """The debug preset's objective in float64; the target is not the online branch any more."""
    cfg = override(DEBUG, ["guidance.hidden=12", *settings])
    objective = lc_mae.objective(cfg, None)  # type: ignore[arg-type]
    init.fill(objective, objective.init_rules(), seed=3)
    optim.groups(objective, lc_mae.param_rules(cfg), 1.0, 0.0)
    target = MomentumTarget(objective, lambda p: p.data)
    target.start()
    torch.manual_seed(1)
    with torch.no_grad():
        for _, mine, _ in target.params:
            mine += 0.05 * torch.randn_like(mine)
        for name, buffer in objective.named_buffers():
            if name.endswith("running_mean"):
                buffer.uniform_(-0.2, 0.2)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return objective.double().train()


def batch() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (B, 3, 32, 32), generator=g, dtype=torch.uint8),
        "image_other": torch.randint(0, 256, (B, 3, 32, 32), generator=g, dtype=torch.uint8),
        "ids_shuffle": torch.stack([torch.randperm(N, generator=g) for _ in range(B)]),
    }


def images(name: str) -> Tensor:
    return normalise(batch()[name], DEBUG.data.mean, DEBUG.data.std).double()


def head(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Linear, batch norm, ReLU, linear; of the rows' own statistics in training, else of the running ones."""
    weight = dict(module.named_parameters()) | dict(module.named_buffers())
    x = torch.einsum("ri,oi->ro", x, weight["0.weight"])
    mean, var = x.mean(0), x.var(0, unbiased=False)
    if not module.training:
        mean, var = weight["1.running_mean"], weight["1.running_var"]
    x = ((x - mean) / (var + 1e-5).sqrt() * weight["1.weight"] + weight["1.bias"]).clamp(min=0)
    return torch.einsum("ri,oi->ro", x, weight["3.weight"])


def predicted(o: MomentumGuidance, tokens: Tensor, level: str = "global") -> Tensor:
    rows = tokens[:, 1:].mean(1) if level == "global" else tokens[:, 1:].flatten(0, 1)
    return head(o.predictor.get_submodule(level), head(o.online.projector.get_submodule(level), rows))


def wanted(o: MomentumGuidance, tokens: Tensor, level: str = "global") -> Tensor:
    assert o.target is not None
    rows = tokens[:, 1:].mean(1) if level == "global" else tokens[:, 1:].flatten(0, 1)
    return head(o.target.projector.get_submodule(level), rows)


def encode(branch: Any, x: Tensor, ids: Tensor | None = None) -> Tensor:
    return VisionTransformer.forward(branch.encoder, x, ids)


def distance(rows: Tensor, others: Tensor) -> float:
    """Mean of 2 - 2 cos, row by row."""
    found = [2 - 2 * float(a @ b / (a.norm() * b.norm())) for a, b in zip(rows.detach(), others.detach(), strict=True)]
    return sum(found) / len(found)


def reconstruction(o: MomentumGuidance, keep: int = K) -> float:
    """Squared error of the masked patches of view 1, each with its own mean and deviation taken out."""
    first, ids = images("image"), batch()["ids_shuffle"]
    prediction = MaskedAutoencoder.forward(o.online.encoder, first, ids, keep)  # type: ignore[arg-type]
    found = []
    for b in range(B):
        for i, patch in enumerate(ids[b, keep:].tolist()):
            row, col = divmod(patch, 4)
            pixels = first[b, :, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8].permute(1, 2, 0).flatten()
            pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            found.append(float((prediction[b, i].detach() - pixels).square().mean()))
    return sum(found) / len(found)


def test_both_views_are_guided_by_the_others_target_and_view_1_is_reconstructed():
    o, ids = build("guidance.alpha=0.3"), batch()["ids_shuffle"]
    losses = o(batch())
    v1, v2 = images("image"), images("image_other")
    one = distance(predicted(o, encode(o.online, v1, ids[:, :K])), wanted(o, encode(o.target, v2)))
    two = distance(predicted(o, encode(o.online, v2, ids[:, K : 2 * K])), wanted(o, encode(o.target, v1)))
    assert losses["guidance"].item() == pytest.approx((one + two) / 2, abs=1e-6)
    assert losses["reconstruction"].item() == pytest.approx(reconstruction(o), abs=1e-6)
    assert losses["loss"].item() == pytest.approx(reconstruction(o) + 0.3 * (one + two) / 2, abs=1e-6)


def test_one_way_is_guided_by_view_2_alone():
    o, ids = build("guidance.symmetric=no"), batch()["ids_shuffle"]
    one = distance(
        predicted(o, encode(o.online, images("image"), ids[:, :K])),
        wanted(o, encode(o.target, images("image_other"))),
    )
    assert o(batch())["guidance"].item() == pytest.approx(one, abs=1e-6)


def test_tokens_are_compared_with_the_targets_at_the_same_places_and_both_is_the_mean():
    ids, v1, v2 = batch()["ids_shuffle"], images("image"), images("image_other")
    for level, levels in (("tokens", ["tokens"]), ("both", ["global", "tokens"])):
        o, found = build(f"guidance.level={level}"), []
        for view, other, seen in ((v1, v2, ids[:, :K]), (v2, v1, ids[:, K : 2 * K])):
            online, whole = encode(o.online, view, seen), encode(o.target, other)
            for which in levels:
                targets = whole
                if which == "tokens":
                    targets = torch.stack([torch.cat([whole[b, :1], whole[b, 1 + seen[b]]]) for b in range(B)])
                found.append(distance(predicted(o, online, which), wanted(o, targets, which)))
        assert o(batch())["guidance"].item() == pytest.approx(sum(found) / len(found), abs=1e-6)


def test_visible_and_mask_tokens_are_those_of_the_decoder_which_the_target_has_too():
    o, ids = build("guidance.guided=all"), batch()["ids_shuffle"]
    v1, v2 = images("image"), images("image_other")
    found = []
    for view, other, order in ((v1, v2, ids), (v2, v1, torch.cat([ids[:, K:], ids[:, :K]], dim=1))):
        encoder, target = o.online.encoder, o.target.encoder  # type: ignore[union-attr]
        online = MaskedAutoencoder.decode(encoder, MaskedAutoencoder.encode(encoder, view, order, K), order, K)  # type: ignore[arg-type]
        rows = torch.arange(N).expand(B, N)
        whole = MaskedAutoencoder.decode(target, MaskedAutoencoder.encode(target, other, rows, N), rows, N)  # type: ignore[arg-type]
        assert online.shape == whole.shape == (B, 1 + N, 32)
        found.append(distance(predicted(o, online), wanted(o, whole)))
    assert o(batch())["guidance"].item() == pytest.approx(sum(found) / 2, abs=1e-6)


def test_class_tokens_can_be_what_is_guided():
    o, ids = build("guidance.pooled=cls", "guidance.symmetric=no"), batch()["ids_shuffle"]
    online = encode(o.online, images("image"), ids[:, :K])[:, 0]
    target = encode(o.target, images("image_other"))[:, 0]
    rows = head(o.predictor.get_submodule("global"), head(o.online.projector.get_submodule("global"), online))
    want = distance(rows, head(o.target.projector.get_submodule("global"), target))  # type: ignore[union-attr]
    assert o(batch())["guidance"].item() == pytest.approx(want, abs=1e-6)


def seen_patches(o: MomentumGuidance) -> tuple[list[set[int]], list[set[int]]]:
    """Which patches each encoder is shown of each image of a batch."""
    shown: dict[str, Tensor] = {}
    o.online.encoder.register_forward_pre_hook(lambda _, args: shown.update(online=args[1][:, : args[2]]))
    o.target.encoder.register_forward_pre_hook(lambda _, args: shown.update(target=args[1]))  # type: ignore[union-attr]
    o(batch())
    online, target = ([set(row.tolist()) for row in shown[k]] for k in ("online", "target"))
    return online, target


def test_a_masked_target_sees_what_the_online_branch_does_not():
    online, target = seen_patches(build("guidance.target_mask_ratio=0.5"))
    assert len(online) == len(target) == 2 * B
    for b in range(B):
        first, second = online[b], online[B + b]
        assert len(first) == len(second) == K and not first & second
        assert target[b] == target[B + b] == set(range(N)) - first - second


def test_no_gradient_reaches_the_target_and_none_of_its_statistics_move():
    o = build()
    before = {n: b.clone() for n, b in o.named_buffers() if n.startswith("target.")}
    o(batch())["loss"].backward()
    assert all(p.grad is None for n, p in o.named_parameters() if n.startswith("target."))
    without = {n for n, p in o.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()
    assert before and all(torch.equal(b, before[n]) for n, b in o.named_buffers() if n in before)
    assert o.target is not None and not o.target.training and o.online.training


def test_without_guidance_it_is_mae_alone():
    o = build("guidance.loss=none")
    one_view = {k: v for k, v in batch().items() if k != "image_other"}
    assert o(one_view)["loss"].item() == pytest.approx(reconstruction(o), abs=1e-6)  # type: ignore[arg-type]
    assert o.follows() == {} and not [n for n, _ in o.named_parameters() if not n.startswith("online.encoder.")]


def test_losses_are_their_formulas():
    torch.manual_seed(4)
    p, t = torch.randn(6, 7, dtype=torch.float64) * 3, torch.randn(6, 7, dtype=torch.float64)
    assert float(similarity.cosine(p, t)) == pytest.approx(distance(p, t), abs=1e-9)
    units = [(a / a.norm(), b / b.norm()) for a, b in zip(p, t, strict=True)]
    assert distance(p, t) == pytest.approx(sum(float((a - b).square().sum()) for a, b in units) / 6)
    nce = [
        float(torch.logsumexp(torch.stack([a @ b / 0.2 for _, b in units]), 0) - a @ units[i][1] / 0.2)
        for i, (a, _) in enumerate(units)
    ]
    assert float(similarity.info_nce(p, t, 0.2)) == pytest.approx(sum(nce) / 6, abs=1e-9)
    smooth = []
    for a, b in zip(p, t, strict=True):
        a, b = ((v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt() for v in (a, b))
        smooth += [float(d**2 / 4) if d < 2 else float(d - 1) for d in (a - b).abs()]
    assert max(smooth) > 1 > min(smooth)  # both pieces of it
    assert float(similarity.smooth_l1(p, t, 2.0)) == pytest.approx(sum(smooth) / len(smooth), abs=1e-9)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("mim=beit", "mim=beit is not known"),
        ("guidance.loss=cosin", "did you mean cosine"),
        ("guidance.target_mask_ratio=0.99", "leaves the target 0 of 16"),
        ("mask.ratio=0.3", "without overlap; raise mask.ratio to 0.5"),
        ("guidance.momentum=1.2", "must lie between 0 and 1"),
        ("decoder.heads=5", "do not go together"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, complaint):
    with pytest.raises(ConfigError, match=complaint):
        lc_mae.prepare(override(DEBUG, [setting]), None, None)  # type: ignore[arg-type]


def test_tokens_with_negatives_or_a_masked_target_are_refused():
    for other in ("guidance.loss=infonce", "guidance.target_mask_ratio=0.5"):
        with pytest.raises(ConfigError, match="compares each token with the target's at the same place"):
            lc_mae.prepare(override(DEBUG, ["guidance.level=tokens", other]), None, None)  # type: ignore[arg-type]


def differing(name: str) -> dict[str, Any]:
    base, row = (flatten(to_json(lc_mae.PRESETS[n])) for n in ("vit_b16_ablation", f"vit_b16_{name}"))
    return {k: row[k] for k in row if row[k] != base[k]}


def test_each_row_of_the_ablations_differs_in_what_it_says_alone():
    assert {name: differing(name) for name in lc_mae.ABLATIONS} == {
        "infonce": {"guidance.loss": "infonce"},
        "smooth_l1": {"guidance.loss": "smooth_l1"},
        "mae_rrc": {"guidance.loss": "none", "data.crop": "resized"},
        "mae_src": {"guidance.loss": "none"},
        "rrc": {"data.crop": "resized"},
        "tokens": {"guidance.level": "tokens"},
        "both": {"guidance.level": "both"},
        "target_mask50": {"guidance.target_mask_ratio": 0.5},
        "target_mask75": {"guidance.target_mask_ratio": 0.75},
        "cls": {"guidance.pooled": "cls"},
        "visible_and_mask": {"guidance.guided": "all"},
        "alpha0.1": {"guidance.alpha": 0.1},
        "alpha0.5": {"guidance.alpha": 0.5},
        "alpha1.0": {"guidance.alpha": 1.0},
        "one_way": {"guidance.symmetric": False},
    }


@pytest.mark.parametrize("name", [n for n in lc_mae.PRESETS if n not in ("demo", "debug")])
def test_every_preset_builds_and_has_a_value_and_a_rule_for_each_parameter(name):
    cfg = lc_mae.prepare(lc_mae.PRESETS[name], None, None)  # type: ignore[arg-type]
    with torch.device("meta"):
        objective = lc_mae.objective(cfg, None)  # type: ignore[arg-type]
    groups = optim.groups(objective, lc_mae.param_rules(cfg), 1.0, 0.05)
    names = {id(p): n for n, p in objective.named_parameters()}
    undecayed = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    kept = r".*cls_token" if cfg.mim == "simmim" else "none"  # SimMIM's code does not decay it, LC-MAE's does
    assert undecayed == {n for n, p in trained.items() if p.ndim == 1 or re.fullmatch(kept, n)}
    rules = objective.init_rules()
    assert all(init.formula(n, rules) for n in names.values())
    assert not any(n.startswith("target.") for n in trained)
    pairs = MomentumTarget(objective, lambda p: p.data).params
    assert len(pairs) == sum(n.startswith("target.") for n in names.values())
    assert all(p.target.shape == p.source.shape for p in pairs)


def test_the_papers_recipe_is_the_papers():
    for name, epochs, alpha in (("vit_s16", 400, 1.0), ("vit_b16", 1600, 0.25), ("vit_l16", 1600, 0.25)):
        cfg = lc_mae.PRESETS[name]
        assert (str(cfg.optim.length), str(cfg.optim.warmup)) == (f"{epochs} epochs", "40 epochs")
        assert cfg.optim.peak_lr == pytest.approx(2.4e-3) and cfg.optim.betas == (0.9, 0.95)
        assert (cfg.guidance.alpha, cfg.guidance.momentum, cfg.guidance.hidden) == (alpha, 0.996, 4096)
        assert (cfg.mask.ratio, cfg.norm_pix, cfg.decoder.width) == (0.75, True, 512)
        first, second = lc_mae.views(cfg)
        assert (first.crop, first.jitter, first.three_augment) == (SIMPLE.crop, SIMPLE.jitter, SIMPLE.three_augment)
        assert second == DISTORTED
    simmim = lc_mae.PRESETS["lc_simmim"]
    assert (str(simmim.optim.length), simmim.guidance.alpha, simmim.mask.ratio) == ("100 epochs", 0.25, 0.6)


def test_the_views_of_token_wise_guidance_show_one_crop(shards):
    apart, same = (
        lc_mae.dataset(override(DEBUG, [f"guidance.level={level}"]), shards, None, Part(0, 1))  # type: ignore[arg-type]
        for level in ("global", "both")
    )
    assert (apart.load.load.same_crop, same.load.load.same_crop) == (False, True)  # type: ignore[attr-defined]
    keys = same[0].keys()
    assert {"image", "image_other", "ids_shuffle"} <= keys
    alone = lc_mae.dataset(override(DEBUG, ["guidance.loss=none"]), shards, None, Part(0, 1))  # type: ignore[arg-type]
    assert "image_other" not in alone[0]
