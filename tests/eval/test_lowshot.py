"""Low-shot scores: what is trained on what, what is chosen once, and what is written down."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from data_pipeline.errors import DataError, UsageError
from eval import base, features, logistic, msn, splits
from eval.adapters import adapted, bench
from eval.adapters.adapted import Adapted, fresh
from eval.adapters.settings import ADAPTERS, AdaptformerConfig, LinearConfig, LoraConfig, VptConfig
from eval.adapters.training import Fast, Paper, centre_views, crops, train_paper
from eval.adapters.vpt import Deep, initial_prompts
from eval.base import File, Score
from eval.evaluators import lowshot
from eval.evaluators.lowshot import Config, Lowshot
from eval.features import Encoder, extract
from eval.metrics import topk
from maws.data.transforms import Preprocess
from tests.eval.adapting import CLASSES, WIDTH, some_head, some_shots, stirred_trunk
from tests.eval.conftest import SIDE, atto

QUICK: dict[str, Any] = {"steps": 2, "batch": 8}
SMALL = Config(
    k=(1, 5),
    seeds=2,
    vpt=VptConfig(**QUICK, prompts=2, paper=Paper(epochs=2, warmup_epochs=1, lr=(1.0, 0.1), weight_decay=(0.0,))),
    adaptformer=AdaptformerConfig(**QUICK, paper=Paper(epochs=2, warmup_epochs=1, lr=(0.1,), weight_decay=(0.0,))),
    lora=LoraConfig(**QUICK),
    linear=LinearConfig(l2=(0.1, 0.01)),
)


@pytest.fixture(scope="module")
def encode():
    return Encoder(atto(), Preprocess(SIDE))


@pytest.fixture(scope="module")
def items(data, encode):
    return list(Lowshot(SMALL, data, 3).run(encode))


def scores_of(items) -> list[Score]:
    return [item for item in items if isinstance(item, Score)]


def files_of(items, folder: str) -> list[File]:
    return [item for item in items if isinstance(item, File) and item.name.startswith(folder)]


def test_one_score_per_seed_shot_and_method(items):
    scores = scores_of(items)
    expected = {(f"{k}-shot/{m}/top1", seed) for k in (1, 5) for m in ("linear", "vpt") for seed in (3, 4)}
    assert {(score.metric, score.seed) for score in scores} == expected and len(scores) == 8
    assert all(score.n == 28 and 0 <= score.value <= 1 for score in scores)
    told = {score.metric.split("/")[1]: score.facts["protocol"] for score in scores}
    assert told == {"linear": "lowshot/logistic", "vpt": "lowshot/vpt-deep/fast"}


def test_splits_are_written_down_with_sorted_keys(items, data):
    splits = files_of(items, "splits/")
    assert len(splits) == len({file.name for file in splits}) == 4
    for file in splits:
        content = json.loads(file.text)
        assert content["keys"] == sorted(content["keys"]) and set(content["keys"]) <= set(data.train.keys)
        assert len(content["keys"]) == 7 * content["k"]
        assert f"-{content['k']}shot-seed{content['seed']}.json" in file.name


def test_a_class_with_fewer_than_k_images_gives_all_it_has(data, encode):
    items = list(Lowshot(replace(SMALL, k=(10,), seeds=1, methods=("linear",)), data, 0).run(encode))
    (file,) = files_of(items, "splits/")
    assert json.loads(file.text)["keys"] == sorted(data.train.keys)  # six of each
    assert [score.metric for score in scores_of(items)] == ["10-shot/linear/top1"]


def test_linear_is_a_logistic_regression_on_the_written_split(items, data, encode):
    train, test = extract(encode, data.train), extract(encode, data.test)
    scores = {(score.metric, score.seed): score for score in scores_of(items)}
    for file in files_of(items, "splits/"):
        content = json.loads(file.text)
        rows = [train.keys.index(key) for key in content["keys"]]
        score = scores[f"{content['k']}-shot/linear/top1", content["seed"]]
        l2 = score.chosen["linear.l2"]
        head = logistic.fit(train.features[rows], train.labels[rows], 7, l2, iterations=SMALL.linear.iterations)
        assert score.value == pytest.approx(topk(head(test.features), test.labels, 1))


def test_the_same_seed_gives_the_same_items(data, encode):
    cfg = replace(SMALL, k=(5,), seeds=1, methods=("linear", "ridge", "msn", "vpt", "vpt-shallow", "adaptformer"))
    first = list(Lowshot(cfg, data, 3).run(encode))
    assert list(Lowshot(cfg, data, 3).run(encode)) == first
    assert len(scores_of(first)) == 6


@pytest.mark.parametrize("method", ["vpt", "vpt-shallow"])
def test_vpt_without_prompts_or_training_is_the_linear_score(data, encode, method):
    cfg = replace(SMALL, seeds=1, methods=("linear", method), vpt=VptConfig(prompts=0, steps=0))
    scores = {s.metric: s for s in scores_of(Lowshot(cfg, data, 0).run(encode))}
    for k in (1, 5):
        assert scores[f"{k}-shot/{method}/top1"].right == scores[f"{k}-shot/linear/top1"].right != b""


def test_linear_alone_decodes_no_picture_twice(data, encode, monkeypatch):
    monkeypatch.setattr(bench.Pictures, "batches", lambda *_: pytest.fail("pictures were decoded"))
    metrics = {s.metric for s in scores_of(Lowshot(replace(SMALL, methods=("linear",)), data, 0).run(encode))}
    assert metrics == {"1-shot/linear/top1", "5-shot/linear/top1"}


def test_msn_minimises_its_loss():
    draw = torch.Generator().manual_seed(0)
    x, labels = torch.randn(40, 6, generator=draw, dtype=torch.float64), torch.arange(40) % 3
    head = msn.fit(x, labels, 3, 0.5)
    rows = torch.stack([(row - row.mean()) / (row - row.mean()).norm() for row in x])
    weight = head.weight.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(rows @ weight.T, labels) + 0.5 / 40 / 2 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 2e-5
    assert torch.allclose(head(x), rows @ head.weight.T)


def test_of_many_training_images_only_those_drawn_are_made_into_features(data, monkeypatch):
    read: set[int] = set()
    dataset = data.train
    watched = replace(dataset, read=lambda position: (read.add(position), dataset.read(position))[1])
    cfg = replace(SMALL, k=(1,), seeds=2, linear=LinearConfig(l2=(0.1,)))
    encode = Encoder(atto(), Preprocess(SIDE))
    first = list(Lowshot(cfg, replace(data, train=watched), 0).run(encode))
    keys = {key for file in files_of(first, "splits/") for key in json.loads(file.text)["keys"]}
    assert {dataset.keys[position] for position in read} >= keys
    assert len(read) < len(dataset)  # and the five of each class on which nothing needed to be chosen
    monkeypatch.setattr(lowshot, "ALL", 0.0)
    again = list(Lowshot(cfg, data, 0).run(encode))
    assert [score.value for score in scores_of(again)] == [score.value for score in scores_of(first)]


def test_the_next_image_of_its_class_stands_in_for_one_that_cannot_be_read(data, monkeypatch):
    monkeypatch.setattr(features, "MAX_BAD", 1.0)
    dataset, cfg = data.train, replace(SMALL, k=(2,), seeds=1, methods=("linear",), linear=LinearConfig(l2=(0.1,)))
    encode = Encoder(atto(), Preprocess(SIDE))
    pool = splits.Pool(dataset)
    lost = set(pool.draw(2, 0)[:2])
    damaged = replace(dataset, read=lambda position: b"?" if position in lost else dataset.read(position), sha256="d")
    for share in (0.5, 0.0):  # features of the drawn ones, and of all
        monkeypatch.setattr(lowshot, "ALL", share)
        (file,) = files_of(Lowshot(cfg, replace(data, train=damaged), 0).run(encode), "splits/")
        assert json.loads(file.text)["keys"] == [dataset.keys[p] for p in pool.draw(2, 0, lost)]


def test_a_share_of_all_training_images_may_be_broken_whatever_the_number_drawn(data, encode, monkeypatch):
    monkeypatch.setattr(features, "MAX_BAD", 1 / 42)
    dataset, cfg = data.train, replace(SMALL, k=(1,), seeds=1, methods=("ridge",))
    (first, second), pool = splits.Pool(dataset).draw(1, 0)[:2], splits.Pool(dataset)
    one = replace(dataset, read=lambda p: b"?" if p == first else dataset.read(p), sha256="one")
    (file,) = files_of(Lowshot(cfg, replace(data, train=one), 0).run(encode), "splits/")
    assert json.loads(file.text)["keys"] == [dataset.keys[p] for p in pool.draw(1, 0, {first})]
    lost = {first, *pool.draw(1, 0, {first, second})[:1]}  # one at a time: the second stands in for the first
    two = replace(dataset, read=lambda p: b"?" if p in lost else dataset.read(p), sha256="two")
    with pytest.raises(DataError, match="of the 42 pictures of the training data cannot be read"):
        list(Lowshot(cfg, replace(data, train=two), 0).run(encode))


def test_adapters_take_as_many_pictures_at_a_time_as_asked(data, monkeypatch):
    sizes, forward = set(), bench.right

    def seen(models, queries):
        sizes.update(len(images) for images, _ in queries.batches())
        return forward(models, queries)

    monkeypatch.setattr(bench, "right", seen)
    cfg = replace(SMALL, k=(1,), seeds=1, methods=("vpt",), choose_on=2)
    list(Lowshot(cfg, data, 0).run(Encoder(atto(), Preprocess(SIDE), batch=5)))
    assert sizes == {5, 28 % 5}


def test_given_splits_with_a_picture_that_cannot_be_read_are_refused(data, encode, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAX_BAD", 1.0)
    dataset = data.train
    positions = splits.Pool(dataset).draw(2, 0)
    (tmp_path / "2shot-seed0.txt").write_text("\n".join(dataset.keys[p] for p in positions))
    cfg = replace(SMALL, k=(2,), seeds=1, methods=("linear",), splits=str(tmp_path), linear=LinearConfig(l2=(0.1,)))
    damaged = replace(dataset, read=lambda p: b"?" if p == positions[0] else dataset.read(p), sha256="e")
    with pytest.raises(DataError, match=f"asks for pictures that cannot be read: {dataset.keys[positions[0]]}; repair"):
        list(Lowshot(cfg, replace(data, train=damaged), 0).run(encode))


def test_adapters_follow_the_encoders_precision(data):
    """bf16 changes the features a little, as it does in extraction, and not the type of anything that is trained."""
    trunk, images = stirred_trunk(), torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    adapter = Deep(initial_prompts(trunk, 2, torch.Generator().manual_seed(0)))
    exact, rough = (Encoder(trunk, Preprocess(SIDE), precision=precision) for precision in ("fp32", "bf16"))
    a, b = (adapted.features(adapter, encode, images) for encode in (exact, rough))
    assert a.dtype == b.dtype == torch.float32 and not a.equal(b)
    torch.testing.assert_close(a, b, atol=0.1, rtol=0.1)
    model = Adapted(trunk, adapter, adapted.solved(some_head()))
    model.scores(rough, images).sum().backward()
    assert model.adapter.prompts.grad.dtype == torch.float32 and model.adapter.prompts.grad.any()


def test_adapters_are_refused_on_a_tower_that_is_split_over_the_ranks(data, encode):
    split = replace(encode, partition=object())
    with pytest.raises(UsageError, match=r"give --partition none, or --set lowshot\.methods=linear,ridge,msn"):
        list(Lowshot(SMALL, data, 0).run(split))


# --------------------------------------------------------------------------------------------------------------- choice


def test_the_choice_is_made_once_on_one_split_and_written_down(items):
    (file,) = files_of(items, "lowshot/")
    content = json.loads(file.text)
    assert file.name.startswith("lowshot/chosen-fast-") and content["budget"] == "fast"
    linear = content["methods"]["linear"]
    assert linear["on"] == "seed 3, 5-shot, 7 of its images held out"
    for score in scores_of(items):
        assert score.chosen["linear.l2"] == linear["values"]["l2"]
        assert score.chosen["linear.chosen_on"] == linear["on"]
        assert ("vpt.lr" in score.chosen) == ("vpt" in score.metric)
    assert content["methods"]["vpt"] == {
        "values": {"lr": 3e-3, "weight_decay": 0.0}, "on": "fixed", "held_out_top1": None,
    }  # fmt: skip


def test_the_choice_is_the_best_on_images_held_out_of_the_split(data, encode):
    """By hand: one image of each class away, every rate tried on the rest, whatever the evaluation data says."""
    rates = (0.05, 1e-6)
    cfg = replace(SMALL, methods=("vpt",), k=(5,), seeds=1, vpt=replace(SMALL.vpt, lr=rates, head_lr=0.0, steps=3))
    (file,) = files_of(Lowshot(cfg, data, 0).run(encode), "lowshot/")
    vpt = json.loads(file.text)["methods"]["vpt"]
    train, test = extract(encode, data.train), extract(encode, data.test)
    drawn = {(5, 0): splits.Pool(data.train).draw(5, 0)}
    table = bench.Bench(cfg, data, encode, train, test, drawn, 0)
    rows = torch.tensor(drawn[5, 0])
    held = bench.hold_out(train.labels[rows], 1 / 5, 0)
    assert held.sum() == 7 and train.labels[rows][held].unique().numel() == 7
    choices = {"linear": table.choose()["linear"]}
    found = {}
    for rate in sorted(rates):
        model = table.adapt("vpt", rows[~held], {"lr": rate, "weight_decay": 0.0}, choices, 0)
        pictures = table.shots.part(rows[held])
        found[rate] = topk(model(encode.prepare(pictures.all())), pictures.labels, 1)
    assert vpt["held_out_top1"] == pytest.approx(max(found.values()))
    assert vpt["values"]["lr"] == next(rate for rate, value in found.items() if value == max(found.values()))


def test_a_choice_is_used_again_on_another_encoder(items, data, tmp_path, monkeypatch):
    (file,) = files_of(items, "lowshot/")
    path = tmp_path / "chosen.json"
    path.write_text(file.text.replace('"lr": 0.003', '"lr": 0.004'))
    monkeypatch.setattr(bench.Bench, "choose", lambda *_: pytest.fail("it was chosen again"))
    again = Lowshot(replace(SMALL, seeds=1, chosen=str(path)), data, 8).run(Encoder(atto(seed=1), Preprocess(SIDE)))
    scores = scores_of(again)
    assert len(scores) == 4
    for score in scores:
        assert score.chosen["linear.l2"] == json.loads(file.text)["methods"]["linear"]["values"]["l2"]
        assert score.chosen["linear.chosen_on"].startswith("chosen.json: seed 3, 5-shot") and "chosen" in score.hashes
    assert {score.chosen["vpt.lr"] for score in scores if "vpt" in score.metric} == {0.004}


@pytest.mark.parametrize(
    ("change", "settings", "kind", "message"),
    [
        ({}, {"methods": ("linear", "adaptformer")}, UsageError, "has no choice for adaptformer, only for linear, vpt"),
        ({}, {"budget": "paper"}, UsageError, "is of lowshot.budget=fast, and paper is asked for"),
        ({"format": 9}, {}, DataError, "is not a file of choices"),
        ({"methods": {"linear": {"values": {"l2": "x"}}, "vpt": {}}}, {}, DataError, "expected numbers from 0 for l2"),
        ({"methods": {"linear": {"values": {"lr": 1}}, "vpt": {}}}, {}, DataError, "expected numbers from 0 for l2"),
    ],
)
def test_a_file_of_choices_that_does_not_fit_is_refused(items, data, tmp_path, change, settings, kind, message):
    (file,) = files_of(items, "lowshot/")
    path = tmp_path / "chosen.json"
    path.write_text(json.dumps(json.loads(file.text) | change))
    with pytest.raises(kind, match=message):
        Lowshot(replace(SMALL, chosen=str(path), **settings), data, 3)
    with pytest.raises(DataError, match="cannot be read"):
        Lowshot(replace(SMALL, chosen=str(tmp_path / "nowhere.json")), data, 3)


def test_one_image_a_class_leaves_nothing_to_choose_on(data, encode):
    cfg = replace(SMALL, k=(1,), seeds=1, methods=("linear",), linear=LinearConfig(l2=(1.0, 0.1, 0.01)))
    (score,) = scores_of(Lowshot(cfg, data, 0).run(encode))
    assert score.chosen == {"linear.l2": 0.1, "linear.chosen_on": "the middle: no class has two images"}
    (score,) = scores_of(Lowshot(replace(cfg, choose_on=4), data, 0).run(encode))
    assert score.chosen["linear.chosen_on"] == "seed 0, 4-shot, 7 of its images held out"


def test_given_splits_are_what_is_learnt_from(items, data, encode, tmp_path):
    for file in files_of(items, "splits/"):
        content = json.loads(file.text)
        (tmp_path / f"{content['k']}shot-seed{content['seed'] + 10}.txt").write_text("\n".join(content["keys"]))
    cfg = replace(SMALL, splits=str(tmp_path), methods=("linear",))
    again = list(Lowshot(cfg, data, 13).run(encode))
    values = [score.value for score in scores_of(items) if "linear" in score.metric]
    assert [score.value for score in scores_of(again)] == values
    assert {score.facts["splits"] for score in scores_of(items)} == {"drawn"}
    assert all(len(score.facts["splits"]) == 8 for score in scores_of(again))  # not those that seed 13 would draw
    assert {json.loads(file.text)["seed"] for file in files_of(again, "splits/")} == {13, 14}
    with pytest.raises(UsageError, match="has no 1-shot split of seed 3; there are: 1-shot seed 13"):
        Lowshot(cfg, data, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["methods=linear,vtp"], "unknown method 'vtp', there are: linear, ridge, msn, vpt, vpt-shallow"),
        (["budget=cheap"], "unknown budget 'cheap', there are: fast, paper"),
        (["methods="], "methods at least one"),
        (["choose_on=1"], "choose_on must be 2 or more"),
        (["vpt.paper.optimiser=lion"], "optimiser must be sgd or adamw"),
        (["lora.paper.epochs=5"], "epochs must be more than warmup_epochs"),
        (["vpt.lr=0"], "lr must be numbers above 0"),
        (["adaptformer.batch=0"], "batch must be 1 or more"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        base.configure([base.load("lowshot")], settings)


# ---------------------------------------------------------------------------------------------------------------- paper


def test_the_papers_rates_are_the_default():
    cfg = Config(budget="paper")
    assert len(cfg.candidates("vpt")) == len(cfg.candidates("vpt-shallow")) == 40
    assert cfg.candidates("adaptformer") == [{"lr": 0.1, "weight_decay": 0.0}]
    assert [cfg.adapter(m).paper.warmup_epochs for m in ADAPTERS] == [10, 10, 20, 10]
    assert all(cfg.adapter(m).paper.epochs == 100 for m in ADAPTERS) and cfg.tuned == ("linear", "vpt")
    assert [values["l2"] for values in cfg.candidates("linear")] == [10.0**n for n in range(2, -7, -1)]
    assert Config(k=(1, 10)).choice_k == 10 and Config().choice_k == 5


def test_the_papers_budget_runs_and_says_how_pictures_were_shown(data, encode):
    cfg = replace(SMALL, budget="paper", k=(5,), seeds=1, methods=("vpt", "adaptformer"))
    items = list(Lowshot(cfg, data, 0).run(encode))
    vpt, adaptformer = scores_of(items)
    shown = {"augmentation": "resize 37, random crop 32, flip", "splits": "drawn"}
    assert vpt.facts == {"protocol": "lowshot/vpt-deep"} | shown
    assert adaptformer.facts["protocol"] == "lowshot/adaptformer" and "linear.l2" not in vpt.chosen
    assert vpt.chosen["vpt.lr"] in (1.0, 0.1) and "held out" in vpt.chosen["vpt.chosen_on"]


def test_a_step_is_sgd_at_the_rate_of_256_images_without_decay_of_the_heads_bias():
    trunk, wd = stirred_trunk(), 0.5
    shots = some_shots(trunk)
    cfg = Paper(epochs=1, warmup_epochs=0, batch=100)  # one step of all 21 images, at the full rate
    prompts = initial_prompts(trunk, 2, torch.Generator().manual_seed(0))
    model = Adapted(trunk, Deep(prompts), fresh(WIDTH, CLASSES, "vpt", torch.Generator().manual_seed(1)))
    ((images, labels),) = crops(shots, cfg, 21, seed=4)
    loss = torch.nn.functional.cross_entropy(model(shots.encode.prepare(images)), labels)
    parameters = [model.adapter.prompts, model.head.weight, model.head.bias]
    gradients = torch.autograd.grad(loss, parameters)
    rate, decays = 2.0 * 21 / 256, (wd, wd, 0.0)
    expected = [p - rate * (g + d * p) for p, g, d in zip(parameters, gradients, decays, strict=True)]
    train_paper(model, shots, cfg, 2.0, wd, seed=4)
    for parameter, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter, wanted)


def test_an_epoch_shows_every_picture_once_and_no_two_epochs_are_alike():
    shots = some_shots(stirred_trunk())
    cfg = Paper(epochs=2, warmup_epochs=0)
    batches = list(crops(shots, cfg, 7, seed=0))
    assert [len(images) for images, _ in batches] == [7] * 6
    first, second = (torch.cat([labels for _, labels in batches[start : start + 3]]) for start in (0, 3))
    assert first.sort()[0].equal(shots.labels.sort()[0]) and not first.equal(second)
    again = list(crops(shots, cfg, 7, seed=0))
    assert all(a.equal(b) for (a, _), (b, _) in zip(batches, again, strict=True))


def test_rates_too_high_are_told_when_fixed_and_passed_over_when_chosen(data, encode):
    wild = replace(SMALL, methods=("vpt",), k=(5,), seeds=1, vpt=replace(SMALL.vpt, lr=(1e30,), steps=4))
    with pytest.raises(DataError, match=r"vpt diverged on the 5-shot split of seed 0 .*--set lowshot.vpt.lr="):
        list(Lowshot(wild, data, 0).run(encode))
    both = replace(wild, vpt=replace(wild.vpt, lr=(1e-3, 1e30)))
    (score,) = scores_of(Lowshot(both, data, 0).run(encode))
    assert score.chosen["vpt.lr"] == 1e-3


def test_half_of_the_pictures_are_mirrored_and_each_is_decoded_once(monkeypatch):
    shots = some_shots(stirred_trunk())
    images = shots.all()
    object.__setattr__(shots.dataset, "read", lambda _: pytest.fail("it was decoded again"))
    mirrored = total = 0
    for shown, labels in centre_views(shots, Fast(steps=20, batch=10), seed=0):
        for one, label in zip(shown, labels, strict=True):
            own = images[shots.labels == label]
            total += 1
            mirrored += any(one.equal(other.flip(-1)) for other in own)
            assert any(one.equal(other) or one.equal(other.flip(-1)) for other in own)
    assert total == 200 and 70 < mirrored < 130
