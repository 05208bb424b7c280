"""The objective of WSP. What its loss is over the classes is tested in test_chunked_softmax.py."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from data_pipeline.shardset import ShardSet
from maws import config, stages
from maws.config import IMAGENET_MEAN, IMAGENET_STD, ConfigError
from maws.data.order import Part
from maws.models import init
from maws.models.vit import build_vit, normalise
from maws.objectives.multi_label import Head, MultiLabel
from maws.optim import BASE, treat


def images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def made(head: str = "mlp", loss: str = "softmax", **shape) -> MultiLabel:
    backbone = build_vit("atto", seed=None, **shape)
    objective = MultiLabel(backbone, 7, IMAGENET_MEAN, IMAGENET_STD, head, loss=loss, chunk=3)
    init.fill(objective, objective.init_rules(), seed=0)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(objective.head[-1].weight, generator=generator)  # starts at zero, which would hide mistakes
    return objective.eval()


@pytest.fixture
def multi_label() -> MultiLabel:
    return made()


def test_loss_of_masked_images_is_that_of_the_visible_patches_and_depends_on_no_other(multi_label):
    batch = {"image": images(3), "synset_ids": torch.tensor([[0, 2], [1, -1], [6, 3]])}
    ids = torch.tensor([[0, 5, 7], [1, 2, 3], [15, 8, 4]])
    want = multi_label(batch | {"ids_keep": ids})
    assert not torch.allclose(want["loss"], multi_label(batch)["loss"])
    hidden = torch.ones(3, 16).scatter(1, ids, 0.0).view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    painted = torch.where(hidden.bool(), 255 - batch["image"], batch["image"])
    assert_close(multi_label(batch | {"image": painted, "ids_keep": ids})["loss"], want["loss"])


def test_a_head_that_starts_at_the_prior_predicts_the_shares_of_the_synsets():
    counts = [1, 2, 3, 0, 10, 4, 4]  # a count of 0 cannot be predicted as impossible: it is taken as 1
    objective = MultiLabel(build_vit("atto", seed=None), 7, IMAGENET_MEAN, IMAGENET_STD, "linear", counts)
    rules = objective.init_rules()
    init.fill(objective, rules, seed=0)
    init.check(objective, rules)
    scores = objective.logits(normalise(images(2), IMAGENET_MEAN, IMAGENET_STD)).softmax(dim=1)
    assert_close(scores, torch.tensor([1, 2, 3, 1, 10, 4, 4]).float().expand(2, 7) / 25)


def test_every_image_weighs_the_same_whatever_its_number_of_synsets(multi_label):
    batch = {"image": images(2), "synset_ids": torch.tensor([[4, -1, -1], [0, 2, 6]])}
    target = torch.tensor([[0, 0, 0, 0, 1, 0, 0], [1, 0, 1, 0, 0, 0, 1]]) / torch.tensor([[1], [3]])
    logits = multi_label.logits(normalise(batch["image"], IMAGENET_MEAN, IMAGENET_STD))
    assert_close(multi_label(batch)["loss"], F.cross_entropy(logits, target))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_images_without_a_synset_do_not_count(loss):
    objective = made(loss=loss)
    ids = torch.tensor([[4, -1], [-1, -1], [0, 2]])
    without = {"image": images(3)[[0, 2]], "synset_ids": ids[[0, 2]]}
    assert_close(objective({"image": images(3), "synset_ids": ids})["loss"], objective(without)["loss"])
    assert objective({"image": images(3), "synset_ids": torch.full((3, 2), -1)})["loss"] == 0


def mixed_with(other: list[int], batch: dict[str, torch.Tensor], weight: float) -> dict[str, torch.Tensor]:
    """What the loader adds to mix each sample with another."""
    parts = {f"{name}_other": batch[name][other] for name in ("image", "synset_ids")}
    return parts | {"mix_weight": torch.full((len(other),), weight)}


def test_mixing_images_mixes_their_targets_by_the_same_weight(multi_label):
    batch = {"image": images(3), "synset_ids": torch.tensor([[4, -1], [0, 2], [5, 1]])}
    mixed = batch | mixed_with([1, 2, 0], batch, 0.7)
    x = normalise(batch["image"], IMAGENET_MEAN, IMAGENET_STD)
    dense = torch.tensor([[0, 0, 0, 0, 1, 0, 0], [0.5, 0, 0.5, 0, 0, 0, 0], [0, 0.5, 0, 0, 0, 0.5, 0]])
    logits = multi_label.logits(0.7 * x + 0.3 * x[[1, 2, 0]])
    assert_close(multi_label(mixed)["loss"], F.cross_entropy(logits, 0.7 * dense + 0.3 * dense[[1, 2, 0]]))


def test_mixed_pairs_are_those_of_any_number_of_ranks_and_a_batch_can_be_cut_between_any_two(labelled_path):
    settings = ["mixup=0.5", "data.streams=4", "optim.batch_size=12", f"data.shards={labelled_path}"]
    stage, shards = stages.load("wsp"), ShardSet.open(labelled_path)
    cfg: Any = config.override(stages.preset("wsp", "debug"), settings)
    whole, one, two = (
        stage.dataset(cfg, shards, labelled_path, Part(*part))[3] for part in ((0, 1), (0, 2), (1, 2))
    )  # fmt: skip

    def rows(batch: Any) -> dict[str, tuple[bytes, bytes, int, float]]:
        parts = (batch[name] for name in ("keys", "image", "image_other", "synset_ids_other", "mix_weight"))
        return {k: (a.numpy().tobytes(), b.numpy().tobytes(), int(s), float(w))
                for k, a, b, s, w in zip(*parts, strict=True)}  # fmt: skip

    assert rows(whole) == rows(one) | rows(two)
    assert all(own != other for own, other, *_ in rows(whole).values())
    objective = MultiLabel(build_vit("atto", seed=None), len(shards.vocabulary), IMAGENET_MEAN, IMAGENET_STD, "linear")
    init.fill(objective, objective.init_rules(), seed=0)
    torch.nn.init.normal_(objective.get_parameter("head.0.weight"))
    tensors: Any = {k: v for k, v in whole.items() if isinstance(v, Tensor)}
    cuts: Any = [{k: v[at : at + 2] for k, v in tensors.items()} for at in range(0, 12, 2)]  # streams have 3 samples
    assert_close(torch.stack([objective(cut)["loss"] for cut in cuts]).mean(), objective(tensors)["loss"])


def test_a_sigmoid_asks_for_each_synset_whether_it_is_there_and_sums_over_them():
    objective = made(loss="sigmoid")
    batch = {"image": images(3), "synset_ids": torch.tensor([[4, -1], [0, 2], [5, 1]])}
    mixed = batch | mixed_with([1, 2, 0], batch, 0.7)
    x = normalise(batch["image"], IMAGENET_MEAN, IMAGENET_STD)
    present = torch.tensor([[0, 0, 0, 0, 1, 0, 0], [1, 0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1, 0]]).float()
    for given, pixels, target in [
        (batch, x, present),
        (mixed, 0.7 * x + 0.3 * x[[1, 2, 0]], 0.7 * present + 0.3 * present[[1, 2, 0]]),
    ]:
        p = objective.logits(pixels).double().sigmoid()
        want = -(target * p.log() + (1 - target) * (1 - p).log()).sum(dim=1).mean()
        assert_close(objective(given)["loss"].double(), want)


def test_a_hit_is_a_best_guess_among_the_images_own_synsets(multi_label):
    x = images(4)
    best = multi_label.logits(normalise(x, IMAGENET_MEAN, IMAGENET_STD)).argmax(dim=1)
    ids = torch.stack([(best + torch.tensor([0, 1, 1, 2])) % 7, torch.tensor([-1, int(best[1]), -1, -1])], dim=1)
    got = multi_label({"image": x, "synset_ids": ids})
    assert got["hit"] == 0.5  # the first by its only synset, the second by its other one
    assert got["synsets_per_image"] == 1.25


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_heads_are_those_of_swags_code_and_start_as_it_does(head):
    objective = MultiLabel(build_vit("atto", seed=None), 7, IMAGENET_MEAN, IMAGENET_STD, head)
    rules = objective.init_rules()
    init.fill(objective, rules, seed=0)
    init.check(objective, rules)
    state = {n: p for n, p in objective.named_parameters() if n.startswith("head.")}
    x = torch.randn(2, 32)
    if head == "linear":
        assert {n: tuple(p.shape) for n, p in state.items()} == {"head.0.weight": (7, 32), "head.0.bias": (7,)}
        assert not any(p.any() for p in state.values())
        return
    shapes = {"head.0.weight": (32, 32), "head.0.bias": (32,), "head.2.weight": (7, 32), "head.2.bias": (7,)}
    assert {n: tuple(p.shape) for n, p in state.items()} == shapes
    assert not any(state[n].any() for n in ("head.0.bias", "head.2.weight", "head.2.bias"))
    torch.nn.init.normal_(state["head.2.weight"])
    hidden = torch.tanh(x @ state["head.0.weight"].T + state["head.0.bias"])
    assert_close(objective.head(x), hidden @ state["head.2.weight"].T + state["head.2.bias"])


def test_the_trunk_starts_with_maes_values_or_swags():
    for initial, expected in (("mae", 0.02), ("swag", 0.0)):
        backbone = build_vit("atto", seed=None)
        objective = MultiLabel(backbone, 7, IMAGENET_MEAN, IMAGENET_STD, initial=initial)
        init.fill(objective, objective.init_rules(), seed=0)
        assert_close(float(backbone.cls_token.detach().std()), expected, rtol=0.5, atol=0)


def test_the_mean_of_patches_can_stand_for_an_image_that_has_no_class_token():
    objective = made(class_tokens=0, pool="mean")
    x = normalise(images(2), IMAGENET_MEAN, IMAGENET_STD)
    assert_close(objective.logits(x), objective.head(objective.backbone(x).mean(dim=1)))


def test_one_recipe_serves_every_size_and_imagenet_21k_has_its_own():
    presets = {n: stages.preset("wsp", n) for n in stages.load("wsp").PRESETS if n.startswith("vit_")}
    sizes = {"vit_b16", "vit_l16", "vit_h14", "vit_2b14", "vit_6.5b14"}
    assert set(presets) == sizes | {"vit_l16_in21k"}
    assert len({(presets[n].optim, presets[n].data, presets[n].mixup) for n in sizes}) == 1
    assert {n: presets[n].model.variant for n in sizes} == {n: n for n in sizes}
    in21k = presets["vit_l16_in21k"]
    assert (in21k.mixup, str(in21k.optim.length), in21k.data.resample) == (0.5, "90 epochs", False)


@pytest.mark.parametrize("positions", ["sincos", "relative"])
def test_positions_are_learned(positions):
    cfg = config.override(stages.preset("wsp", "debug"), [f"model.positions={positions}"])
    objective = MultiLabel(stages.backbone(cfg.model), 7, IMAGENET_MEAN, IMAGENET_STD)
    rules = stages.load("wsp").param_rules(cfg)
    found = [treat(n, rules) for n, _ in objective.named_parameters() if "pos_embed" in n or "rel_pos" in n]
    assert found == [BASE]  # recipes §6.3: biases and norms alone do not decay


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss=hinge", "use softmax or sigmoid"),
        ("head=deep", "use mlp or linear"),
        ("initial=zeros", "use mae or swag"),
        ("chunk=-1", "or 0"),
    ],
)
def test_settings_that_cannot_work_say_what_would(setting, message, shards, tmp_path):
    cfg = config.override(stages.preset("wsp", "debug"), [setting])
    with pytest.raises(ConfigError, match=message):
        stages.load("wsp").prepare(cfg, shards, tmp_path)


def test_a_softmaxs_prior_is_refused_for_a_sigmoid(shards, tmp_path):
    cfg = config.override(stages.preset("wsp", "debug"), ["loss=sigmoid", "prior_bias=true"])
    with pytest.raises(ConfigError, match="prior of a softmax"):
        stages.load("wsp").prepare(cfg, shards, tmp_path)


def test_an_unknown_head_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="mlp or linear"):
        Head(4, 7, "deep")
